"""The approximate neighbor graph that method ``graph`` takes its candidates from.

neighbors/NAME/graph/ids.npy      int32 or int64 (rows, width): candidate rows, best first, -1
neighbors/NAME/graph/rows.parquet  key of every row
neighbors/NAME/graph/graph.json   of which vectors, with the recall that was measured
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_filter.embeddings import read_parts
from declip_filter.encoders import check_device
from declip_filter.index_files import publish, read_info
from declip_filter.neighbor_rows import read_table_rows
from declip_filter.neighbor_search import SPARE_CANDIDATES, TableRows, groups_of
from declip_filter.neighbors import BuildNeighbors, choose_method, needs_graph
from declip_filter.signals import shard_tasks
from declip_filter.vectors import side_kinds
from declip_shards import DeclipError, Store, TaskStats, sidecars
from declip_shards.manifest import canonical_json

if TYPE_CHECKING:
    from declip_filter.knn_graph import Graph

TASK = "all"
FORMAT_VERSION = 1
"""Of graph.json; a reader refuses a higher one."""


RECALL_MEASURED_ON = "recall measured on"
"""Entry of graph.json: rows when it was made, where an opt-out has taken some since."""


def graph_path(table: str) -> str:
    return f"neighbors/{table}/graph/ids.npy"


def graph_rows_path(table: str) -> str:
    return f"neighbors/{table}/graph/rows.parquet"


def graph_info_path(table: str) -> str:
    return f"neighbors/{table}/graph/graph.json"


@dataclass(frozen=True, kw_only=True)
class BuildGraph(BuildNeighbors):
    """Make the graph that the neighbor table's method needs; nothing where it needs none."""

    @property
    def num_gpus(self) -> float:
        """One where exact search runs on it; an approximate graph is made on the CPU."""
        on_gpu = self.device.startswith("cuda") and self.method in ("auto", "exact")
        return 1.0 if on_gpu else 0.0

    def tasks(self) -> Sequence[str]:
        return (TASK,) if needs_graph(self, choose_method(self, *_size(self))) else ()

    def is_done(self, task: str) -> bool:
        store = Store(self.root)
        return all(map(store.exists, (graph_path(self.name), graph_info_path(self.name))))

    def worker(self) -> Callable[[str], TaskStats]:
        return lambda task: make_graph(self, Store(self.root))


def _size(settings: BuildNeighbors) -> tuple[int, int]:
    """Rows and length of the vectors, without opening them."""
    if settings.method != "auto":
        return 0, 0
    store = Store(settings.root)
    if settings.index:
        info = read_info(store, settings.index)
        dim = int(info["vectors dimension"])
        if settings.kind and settings.kind != info["kind"]:
            own = 2 if info["kind"] == "both" else 1
            dim = dim // own * len(side_kinds(settings.kind))
        return int(info["nb vectors"]), dim
    parts = read_parts(store, settings.embeddings, shard_tasks(settings.root))
    dim = (parts[0].dim if parts else 0) * len(side_kinds(settings.kind))
    return sum(part.num_rows for part in parts), dim


def graph_width(settings: BuildNeighbors, num_rows: int) -> int:
    """Length of the graph's lists."""
    width = settings.k + SPARE_CANDIDATES
    if settings.rules.reads_images:
        width = max(width, settings.num_candidates)
    return max(0, min(width, num_rows - 1))


def _rows_digest(encoder_digest: str, side: str, keys: Sequence[str]) -> str:
    """sha256 over the keys and the encoder: a graph is of these rows and no others."""
    digest = hashlib.sha256(encoder_digest.encode())
    digest.update(side.encode())
    for start in range(0, len(keys), 2**16):
        digest.update("\n".join(keys[start : start + 2**16]).encode() + b"\n")
    return digest.hexdigest()


def _digest_of(table: TableRows) -> str:
    encoder_digest = table.vectors.parts[0].encoder_digest
    return _rows_digest(encoder_digest, table.vectors.side, table.keys.tolist())


def make_graph(settings: BuildNeighbors, store: Store) -> TaskStats:
    """Compute the graph and write it; graph.json comes last."""
    table, _ = read_table_rows(settings, store)
    for number in range(len(table.vectors.parts)):
        table.vectors.check_part(number)
    width = graph_width(settings, table.num_rows)
    ids: npt.NDArray[np.integer] = np.empty((table.num_rows, 0), dtype=np.int64)
    recall: float | None = 1.0
    if width:
        graph = _compute(settings, table, width)
        ids, recall = graph.ids, graph.recall
    if table.num_rows < 2**31:
        ids = ids.astype(np.int32)
    with publish(store, graph_path(settings.name)) as opened, opened() as f:
        np.save(f, ids)
    names = pa.table({"key": pa.array(table.keys.tolist(), pa.string())})
    sidecars.write_table(store, graph_rows_path(settings.name), names)
    info: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "num_rows": table.num_rows,
        "width": width,
        "recall": None if recall is None else round(recall, 6),
        "encoder_digest": table.vectors.parts[0].encoder_digest,
        "side": table.vectors.side,
        "exclude_same_caption": settings.exclude_same_caption,
        "rows_sha256": _digest_of(table),
        "ids_sha256": store.sha256(graph_path(settings.name)),
    }
    store.write_bytes(graph_info_path(settings.name), canonical_json(info))
    num = table.num_rows
    return TaskStats(
        num_in=num,
        num_out=num,
        files=[
            graph_path(settings.name),
            graph_rows_path(settings.name),
            graph_info_path(settings.name),
        ],
        extra={"width": width, "recall": info["recall"]},
    )


def _compute(settings: BuildNeighbors, table: TableRows, width: int) -> "Graph":
    """The nearest ``width`` rows of every row: exactly on a GPU, else approximately."""
    from declip_filter import knn

    groups = groups_of(table, settings.rules)
    if choose_method(settings, table.num_rows, table.vectors.dim) == "exact":
        check_device(settings.device)
        rows = np.arange(table.num_rows, dtype=np.int64)
        return knn.exact_neighbors(
            table.vectors, rows, width, device=settings.device, groups=groups
        )
    return knn.approximate_graph(
        table.vectors,
        width,
        recall_target=settings.recall_target,
        seed=settings.seed,
        num_threads=settings.num_threads or os.cpu_count() or 1,
        max_memory_gib=settings.max_memory_gib,
        groups=groups,
    )


def read_graph(
    settings: BuildNeighbors, store: Store, table: TableRows
) -> tuple[npt.NDArray[np.integer], float | None]:
    """The candidates of all rows (rows, width), and the recall that was measured.

    Raises:
        DeclipError: the graph is missing, damaged, of a newer format, of other rows or settings.
    """
    path, info_path = graph_path(settings.name), graph_info_path(settings.name)
    remedy = "rerun the stage that builds the graph, or choose method exact or index."
    for name in (info_path, path):
        if not store.exists(name):
            raise DeclipError(f"{name!r} is missing; {remedy}")
    try:
        info = json.loads(store.read_bytes(info_path))
        newest = int(info["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DeclipError(f"{info_path!r} is damaged ({error}); {remedy}") from error
    if newest > FORMAT_VERSION:
        raise DeclipError(
            f"{info_path!r} is of format {newest}, this version reads up to {FORMAT_VERSION}; "
            "upgrade opendeclip."
        )
    if info["rows_sha256"] != _digest_of(table):
        raise DeclipError(
            f"{path!r} is of other rows than the embeddings {table.vectors.name!r} hold now; "
            f"{remedy}"
        )
    _require_settings(settings, table, path, info, remedy)
    if store.sha256(path) != info["ids_sha256"]:
        raise DeclipError(f"{path!r} has changed since it was written; {remedy}")
    if store.is_local:
        ids = np.load(store.local_path(path), mmap_mode="r", allow_pickle=False)
    else:
        ids = np.load(io.BytesIO(store.read_bytes(path)), allow_pickle=False)
    return ids, info["recall"]


def _require_settings(
    settings: BuildNeighbors, table: TableRows, path: str, info: Mapping[str, Any], remedy: str
) -> None:
    """Refuse a graph whose lists are too short, or hold other captions than the table shall."""
    wanted = graph_width(settings, table.num_rows)
    if int(info.get("width", 0)) < wanted:
        raise DeclipError(
            f"{path!r} has lists of {info.get('width', 0)} candidates, and k {settings.k} with the "
            f"other settings needs {wanted}; {remedy}"
        )
    excluded = info.get("exclude_same_caption", settings.exclude_same_caption)
    if excluded != settings.exclude_same_caption:
        raise DeclipError(
            f"{path!r} was made with exclude_same_caption {excluded}, and it is "
            f"{settings.exclude_same_caption} now; {remedy}"
        )


def drop_from_graph(store: Store, name: str, keys: Collection[str]) -> dict[str, bytes | None]:
    """New bytes of a table's graph without these samples; its rows are numbered through again.

    Nothing where there is no graph, or where it has none of them.
    """
    if not store.exists(graph_info_path(name)):
        return {}
    info = json.loads(store.read_bytes(graph_info_path(name)))
    names = sidecars.read_table(store, graph_rows_path(name), ["key"]).column(0).to_pylist()
    gone = frozenset(keys)
    kept = np.asarray([key not in gone for key in names], dtype=np.bool_)
    if kept.all():
        return {}
    ids = np.load(io.BytesIO(store.read_bytes(graph_path(name))), allow_pickle=False)
    data = _packed(_without(ids, kept))
    left = [key for key in names if key not in gone]
    info |= {
        RECALL_MEASURED_ON: info.get(RECALL_MEASURED_ON, info["num_rows"]),
        "num_rows": len(left),
        "rows_sha256": _rows_digest(info["encoder_digest"], info["side"], left),
        "ids_sha256": hashlib.sha256(data).hexdigest(),
    }
    return {
        graph_path(name): data,
        graph_rows_path(name): sidecars.pack_table(pa.table({"key": pa.array(left, pa.string())})),
        graph_info_path(name): canonical_json(info),
    }


def _without(ids: npt.NDArray[np.integer], kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.integer]:
    """Lists of the kept rows, in new numbers, what is gone left out and -1 behind the rest."""
    numbers = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1).astype(ids.dtype)
    renamed = numbers[ids[kept]]  # -1 takes the last entry
    behind = np.argsort(renamed < 0, axis=1, kind="stable")
    return np.take_along_axis(renamed, behind, axis=1)


def _packed(ids: npt.NDArray[np.integer]) -> bytes:
    sink = io.BytesIO()
    np.save(sink, ids)
    return sink.getvalue()
