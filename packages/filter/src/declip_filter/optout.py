"""Take samples out of what the filter stages wrote: no sample is measured or embedded again.

Each function gives the new bytes of the files that change and writes nothing, so that the caller
can replace them together (:mod:`declip_shards.rewrite`); asked a second time it gives nothing.

What a rebuild would give differs in three places. An index keeps the centroids and ``nprobe`` of
its build, so its recall is the one measured then; a neighbor list becomes shorter instead of being
filled up with the next nearest caption; and what was a duplicate of a removed sample is marked
as nobody's until duplicates are looked for again.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from declip_filter.embedding_files import NOT_FINITE
from declip_filter.embeddings import METADATA_SCHEMA, part_path, read_part, read_parts
from declip_filter.index_building import CHOICE, part_files, stored_sizes
from declip_filter.index_files import (
    ROWS_SCHEMA,
    build_path,
    index_path,
    info_path,
    load_faiss,
    open_faiss,
    pack_rows,
    read_info,
    rows_path,
    vectors_digest,
)
from declip_filter.index_lists import entries_of, has_lists, inner_index, refilled, renumbered
from declip_filter.index_training import ROWS_AT_ONCE, one_thread
from declip_filter.neighbor_graph import RECALL_MEASURED_ON, graph_info_path
from declip_filter.plan_files import plan_path
from declip_filter.selection import selected_keys
from declip_shards import DeclipError, Store, layout, sidecars
from declip_shards.manifest import canonical_json

Changes = dict[str, bytes | None]
"""Relative path -> new bytes; None removes the file."""

BUILT_AS = "built as"
"""Entry of an index's info.json: what it was when its recall was measured."""


def drop_from_sidecars(store: Store, shard: str, keys: Collection[str]) -> Changes:
    """New bytes of a shard's signals, selections, embeddings and neighbor tables.

    In the neighbor tables the samples go as rows and out of the other rows' lists, whose scores
    stay aligned: ``keys`` must therefore be those of the whole dataset, not of the shard alone.

    Raises:
        DeclipError: a table is damaged.
    """
    changes: Changes = {}
    wanted = pa.array(sorted(keys), pa.string())
    for folder, change in (
        ("signals", _drop_signals),
        ("selection", _drop_rows),
        ("neighbors", _drop_neighbors),
    ):
        for name in store.list_folders(folder):
            path = f"{folder}/{name}/{shard}.parquet"
            if store.exists(path):
                table = sidecars.read_table(store, path)
                less = change(table, wanted)
                if less is not None:
                    changes[path] = sidecars.pack_table(less.combine_chunks())
    for name in store.list_folders("embeddings"):
        changes |= _drop_vectors(store, name, shard, wanted)
    return changes


def _drop_rows(table: pa.Table, keys: pa.Array) -> pa.Table | None:
    """``table`` without the rows of ``keys``; None where it has none of them."""
    gone = pc.is_in(table.column("key"), value_set=keys)
    return table.filter(pc.invert(gone)) if pc.any(gone).as_py() else None


DUPLICATE = re.compile(r"duplicate_(.+)_of")
"""Columns of signals that name another sample: the one that is kept of a group of duplicates."""


def _drop_signals(table: pa.Table, keys: pa.Array) -> pa.Table | None:
    """Signals without the samples, as rows and as what others are duplicates of.

    What names an entry of an evaluation set (``contaminated_by``) stays: it is none of ours.
    """
    less = _drop_rows(table, keys)
    rest = table if less is None else less
    for name in rest.column_names:
        rung = DUPLICATE.fullmatch(name)
        if not rung:
            continue
        gone = pc.is_in(rest.column(name), value_set=keys)
        if not pc.any(gone).as_py():
            continue
        near = (f"duplicate_{rung[1]}_distance", f"duplicate_{rung[1]}_cosine")
        for column in (name, *(n for n in near if n in rest.column_names)):
            number, field = rest.column_names.index(column), rest.schema.field(column)
            blank = pc.if_else(gone, pa.scalar(None, field.type), rest.column(column))
            rest = rest.set_column(number, field, blank)
            less = rest
    return less


def _drop_neighbors(table: pa.Table, keys: pa.Array) -> pa.Table | None:
    """A neighbor table without the samples, as rows and in lists; None where it has none."""
    less = _drop_rows(table, keys)
    rest = table if less is None else less
    lists = rest.column("neighbor_keys").combine_chunks()
    named = pc.is_in(lists.flatten(), value_set=keys)
    if not pc.any(named).as_py():
        return less
    gone = frozenset(keys.to_pylist())
    kept = [[key not in gone for key in row] for row in lists.to_pylist()]
    for column in ("neighbor_keys", "scores"):
        number, field = rest.column_names.index(column), rest.schema.field(column)
        shorter = [
            [value for value, stays in zip(row, flags, strict=True) if stays]
            for row, flags in zip(rest.column(column).to_pylist(), kept, strict=True)
        ]
        rest = rest.set_column(number, field, pa.array(shorter, field.type))
    return rest


def _drop_vectors(store: Store, name: str, shard: str, keys: pa.Array) -> Changes:
    """A shard's part of embeddings ``name``; of an emptied one the record alone is left."""
    if not store.exists(part_path(name, shard)):
        return {}
    part = read_part(store, name, shard)
    path = layout.embedding_path(name, "metadata", part.partition)
    if not part.num_rows:
        return {}
    metadata = sidecars.read_table(store, path, METADATA_SCHEMA.names)
    stays = pc.invert(pc.is_in(metadata.column("key"), value_set=keys))
    num_left = int(pc.sum(stays).as_py() or 0)
    if num_left == part.num_rows:
        return {}
    changes: Changes = {}
    for kind in part.kinds:
        vectors = layout.embedding_path(name, kind, part.partition)
        array = np.load(io.BytesIO(store.read_bytes(vectors)), allow_pickle=False)
        if len(array) != len(metadata):
            raise DeclipError(
                f"{vectors!r} has {len(array)} rows, its metadata {len(metadata)}; rerun the stage "
                "that embeds, then the opt-out again."
            )
        sink = io.BytesIO()
        np.save(sink, array[stays.to_numpy()])
        changes[vectors] = sink.getvalue() if num_left else None
    rest = metadata.filter(stays).combine_chunks()
    changes[path] = sidecars.pack_table(rest) if num_left else None
    changes[part_path(name, shard)] = canonical_json(asdict(replace(part, num_rows=num_left)))
    return changes


def names_a_duplicate(store: Store, name: str, shard: str, keys: Collection[str]) -> bool:
    """Whether signals ``name`` of a shard call a row a duplicate of one of ``keys``."""
    path = layout.signals_path(name, shard)
    if not store.exists(path):
        return False
    with store.open(path) as f:
        columns = [n for n in pq.read_schema(f).names if DUPLICATE.fullmatch(n)]
    if not columns:
        return False
    table = sidecars.read_table(store, path, columns)
    wanted = pa.array(sorted(keys), pa.string())
    return any(pc.any(pc.is_in(column, value_set=wanted)).as_py() for column in table.columns)


def names_a_neighbor(store: Store, name: str, shard: str, keys: Collection[str]) -> set[str]:
    """Keys of the rows of a neighbor table whose list names one of ``keys``."""
    path = layout.neighbors_path(name, shard)
    if not store.exists(path):
        return set()
    table = sidecars.read_table(store, path, ["key", "neighbor_keys"])
    lists = table.column("neighbor_keys").combine_chunks()
    hits = pc.is_in(lists.flatten(), value_set=pa.array(sorted(keys), pa.string()))
    rows = pc.list_parent_indices(lists).filter(hits).unique()
    return set(table.column("key").take(rows).to_pylist())


def drop_from_index(
    store: Store, name: str, keys: Collection[str], shards: Sequence[str]
) -> Changes:
    """New bytes of an index without these samples; its rows are numbered through again.

    Call it when the embeddings have already lost them: the index names their digest. Its recall
    stays as measured, and ``"built as"`` in info.json says of how many vectors and of which file
    that was (the file that the neighbor tables name, too).

    Raises:
        DeclipError: a file is missing or damaged, or of another index.
    """
    if not store.exists(info_path(name)):
        return {}
    info = read_info(store, name)
    rows = sidecars.read_table(store, rows_path(name), ROWS_SCHEMA.names)
    stays = pc.invert(pc.is_in(rows.column("key"), value_set=pa.array(sorted(keys), pa.string())))
    kept: npt.NDArray[np.bool_] = stays.to_numpy()
    if kept.all():
        return {}
    index = open_faiss(store, index_path(name), mmap=False)
    if index.ntotal != len(kept):
        raise DeclipError(
            f"index {name!r} has {index.ntotal} vectors and names {len(kept)} rows; delete its "
            "folder and rerun the stage that indexes, then the opt-out again."
        )
    data = load_faiss().serialize_index(remove_rows(index, kept)).tobytes()
    num_left = int(kept.sum())
    packed = pack_rows(rows.filter(stays))
    built = info.get(BUILT_AS, {k: info[k] for k in ("nb vectors", "index_sha256")})
    parts = read_parts(store, info["embeddings"], shards)
    info |= {
        BUILT_AS: built,
        **stored_sizes(num_left, int(info["vectors dimension"]), len(data)),
        "index_sha256": _sha256(data),
        "rows_sha256": _sha256(packed),
        "embeddings_sha256": vectors_digest(store, info["embeddings"], info["kind"], parts),
    }
    return {
        **dict.fromkeys(part_files(store, name)),
        index_path(name): data,
        rows_path(name): packed,
        info_path(name): canonical_json(info),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def remove_rows(index: Any, kept: npt.NDArray[np.bool_]) -> Any:
    """A FAISS index of the rows that are ``kept`` (rows,), numbered from 0 in their order.

    Inverted lists are written anew in their order, for FAISS's own removal would put the last
    entry of a list into the hole and leave the old numbers: the bytes would then depend on how
    many removals it took. A graph (HNSW), from which FAISS removes nothing, is built anew of the
    vectors that it holds.

    Raises:
        DeclipError: a graph over codes that were trained, from which no row can be taken.
    """
    if not has_lists(index):
        if isinstance(inner_index(index), load_faiss().IndexHNSW):
            return _graph_of(index, kept)
        index.remove_ids(np.flatnonzero(~kept))
        return index
    new_rows = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int64)
    return refilled(index, renumbered(entries_of(index), new_rows), int(kept.sum()))


def _graph_of(index: Any, kept: npt.NDArray[np.bool_]) -> Any:
    """A graph of the ``kept`` rows of another, of the same settings."""
    faiss = load_faiss()
    if type(index) is not faiss.IndexHNSWFlat:
        raise DeclipError(
            f"an index of type {type(index).__name__} can lose no row; delete its folder, remove "
            "the samples, then rerun the stage that indexes."
        )
    fresh = faiss.IndexHNSWFlat(index.d, index.hnsw.nb_neighbors(0) // 2, index.metric_type)
    fresh.hnsw.efConstruction = index.hnsw.efConstruction
    fresh.hnsw.efSearch = index.hnsw.efSearch
    rows = np.flatnonzero(kept)
    with one_thread():
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            fresh.add(index.reconstruct_batch(some))
    return fresh


# What the receipts say ---------------------------------------------------------------------------

Figures = dict[str, Any]
"""Fields of a receipt: ``num_in``, ``num_out``, ``reasons``, ``extra``."""


def recount(
    store: Store,
    stage: str,
    settings: Mapping[str, Any],
    task: str,
    extra: Mapping[str, Any],
    changes: Mapping[str, bytes | None],
) -> Figures | None:
    """A task's figures from what its tables hold now.

    Args:
        store: the dataset.
        stage: name of the stage's class.
        settings: of the stage, as its manifest has them.
        task: shard, or ``all``.
        extra: the receipt's further figures. Those of a search or a measurement that is not done
            again stay as they were.
        changes: files that are about to be written and count as they will be.

    Returns:
        The figures that change; None where none does, or the stage is not of this package.
    """
    if stage in ("MeasureImages", "ScorePairs"):
        num = sidecars.num_rows(store, layout.signals_path(settings["name"], task))
        return _figures(num, num, {}, extra)
    if stage in ("FindDuplicates", "ClusterImages"):
        paths = [layout.signals_path(settings["name"], s) for s in layout.list_shards(store)]
        num = sum(sidecars.num_rows(store, path) for path in paths)
        return _figures(num, num, {}, extra)
    if stage == "FilterPairs":
        path = layout.selection_path(settings["name"], task)
        reasons = Counter(sidecars.read_table(store, path, ["reason"]).column(0).to_pylist())
        total = reasons.total()
        return _figures(total, reasons.pop("", 0), reasons, extra)
    if stage == "EmbedPairs":
        statuses = sidecars.read_table(store, layout.shard_parquet_path(task), ["status"]).column(0)
        num_in = statuses.to_pylist().count("success")
        num_out = read_part(store, settings["name"], task).num_rows
        num_kept = len(selected_keys(store, settings["selection"], task))
        reasons = Counter({"not_selected": num_in - num_kept, NOT_FINITE: num_kept - num_out})
        return _figures(num_in, num_out, +reasons, extra)
    if stage == "BuildIndex":
        path = info_path(settings["name"])
        new = changes.get(path)
        info = json.loads(new) if new else read_info(store, settings["name"])
        num = int(info["nb vectors"])
        measured = {"recall measured on": info[BUILT_AS]["nb vectors"]} if BUILT_AS in info else {}
        return _figures(num, num, {}, {**extra, **measured})
    if stage == "BuildGraph":
        return _recount_graph(store, settings["name"], extra, changes)
    if stage == "BuildNeighbors":
        return _recount_neighbors(store, settings, task, extra)
    if stage == "PlanFilter":
        return _recount_plan(store, settings, extra)
    if stage in ("TrainIndex", "FillIndex"):
        return _noted_training(store, settings, stage, task, extra)
    return None


COUNTED_ON = "counted on"
"""Entry of a receipt: samples that its figures were counted on, where an opt-out has taken some."""


def _recount_graph(
    store: Store, name: str, extra: Mapping[str, Any], changes: Mapping[str, bytes | None]
) -> Figures:
    """As many rows as the graph has; width and recall stay those of its making."""
    path = graph_info_path(name)
    info = json.loads(changes.get(path) or store.read_bytes(path))
    num, measured = int(info["num_rows"]), RECALL_MEASURED_ON
    return _figures(num, num, {}, {**extra, **{k: info[k] for k in (measured,) if k in info}})


def _recount_plan(
    store: Store, settings: Mapping[str, Any], extra: Mapping[str, Any]
) -> Figures | None:
    """As many samples as there are; what the plan kept of how many stays, and is said to."""
    name = settings["signals"][0]
    paths = [layout.signals_path(name, shard) for shard in layout.list_shards(store)]
    try:
        num = sum(sidecars.num_rows(store, path) for path in paths)
    except (OSError, pa.ArrowInvalid):
        return None  # the step that measures has to run again, and then this one has, too
    planned = int(json.loads(store.read_bytes(plan_path(settings["name"])))["num_samples"])
    return _figures(num, num, {}, {**extra, **({COUNTED_ON: planned} if planned != num else {})})


def _noted_training(
    store: Store, settings: Mapping[str, Any], stage: str, task: str, extra: Mapping[str, Any]
) -> Figures | None:
    """Training and filling stay as they were done, and say of how many rows that was."""
    about = json.loads(store.read_bytes(build_path(settings["name"], CHOICE)))
    parts = read_parts(store, settings["embeddings"], layout.list_shards(store))
    num_done = int(about["num_rows"])
    if num_done == sum(part.num_rows for part in parts):
        return None
    if stage == "FillIndex":
        group = json.loads(store.read_bytes(build_path(settings["name"], f"{task}.json")))
        num_done = int(group["stop"]) - int(group["start"])
    return {"extra": {**extra, COUNTED_ON: num_done}}


def _figures(num_in: int, num_out: int, reasons: Mapping[str, int], extra: Any) -> Figures:
    return {
        "num_in": num_in,
        "num_out": num_out,
        "reasons": dict(sorted(reasons.items())),
        "extra": dict(extra),
    }


def _recount_neighbors(
    store: Store, settings: Mapping[str, Any], task: str, extra: Mapping[str, Any]
) -> Figures:
    path = layout.neighbors_path(settings["name"], task)
    table = sidecars.read_table(store, path, ["scores"])
    lists = table.column("scores").combine_chunks()
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    scores = lists.flatten().to_numpy().astype(np.float64)
    num = len(lengths)
    counted: dict[str, Any] = {
        "fraction_with_neighbor": round(int((lengths > 0).sum()) / num, 6) if num else 0.0,
        "mean_score": round(float(scores.mean()), 6) if scores.size else 0.0,
        "num_short": int((lengths < settings["k"]).sum()),
        "num_neighbors": int(scores.size),
    }
    if "useful_score" in settings:
        best = np.asarray([row[0] for row in lists.to_pylist() if row], dtype=np.float32)
        num_useful = int((best >= settings["useful_score"]).sum())
        counted["fraction_useful"] = round(num_useful / num, 6) if num else 0.0
    return _figures(num, num, {}, {**extra, **counted})
