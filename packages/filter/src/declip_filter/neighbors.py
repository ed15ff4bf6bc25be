"""Neighbor table: for every embedded pair, the samples nearest to it whose text says another thing.

    neighbors/NAME/NNNNN.parquet   key, neighbor_keys list<string>, scores list<float32>,
                                   index_sha256, table_sha256
    neighbors/NAME/table.json      of which vectors, how and with which settings

DeCLIP's nearest-neighbor supervision (Li et al. 2021, arXiv 2110.05208, section 3.3) asks for
another text that describes the picture too. Some rows are therefore left out on purpose:

- the sample itself, by its row, not by its score: it is always its own nearest;
- samples whose caption is the same text once normalized (see
  :func:`declip_filter.captions.normalize_caption`): their text is the pair's own positive again
  and supervises nothing new, and with captions shared by many pictures they would fill the table;
- all but the best row of any other caption, so that k neighbors are k different texts;
- by setting, rows whose picture is (nearly) the sample's own: a copy that somebody else described.

Where the candidates come from is a setting (``method``); what becomes of them is not: see
:mod:`declip_filter.neighbor_search`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from declip_filter.encoders import check_device_name
from declip_filter.index_files import LoadedIndex as LoadedIndex
from declip_filter.index_files import load_index as load_index
from declip_filter.limits import require_between, require_folder_name
from declip_filter.neighbor_rows import own_keys, read_table_rows
from declip_filter.neighbor_search import (
    REMOVALS,
    ExactSource,
    Found,
    GraphSource,
    IndexSource,
    Rules,
    Source,
    TableRows,
    find_neighbors,
)
from declip_filter.signals import shard_tasks
from declip_filter.vectors import SIDES
from declip_shards import DeclipError, Store, TaskStats, layout, neighbor_tables, sidecars
from declip_shards.errors import did_you_mean
from declip_shards.manifest import canonical_json, settings_of

METHODS = ("auto", "index", "exact", "graph")
EXACT_PRODUCTS = 1e12
"""With auto: most products (rows x rows x dim) for which every row is compared on a CPU: about 20
seconds of one core. 50,000 rows at 384 dimensions."""
EXACT_PRODUCTS_ON_GPU = 2e17
"""The same on a GPU: minutes. 15 million rows at 512 dimensions are 1.2e17."""
GRAPH_BYTES = 3.0
"""With auto: memory of a graph's making as a multiple of its float16 vectors."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("neighbor_keys", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("index_sha256", pa.string()),
        (neighbor_tables.IDENTITY, pa.string()),
    ]
)
"""Columns of a table, one row an embedded pair, ordered by key; the last two name the index file
(empty: none was asked for) and the table.json that the file belongs to."""


@dataclass(frozen=True, kw_only=True)
class BuildNeighbors:
    """Find every embedded pair's nearest other captions."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder, any fsspec URL."""
    index: str = "captions"
    """Index whose rows get neighbors, from index/NAME/; empty: none, and embeddings is named."""
    embeddings: str = ""
    """Vectors to compare, from embeddings/NAME/; empty: those that the index is of."""
    name: str = "captions"
    """Name of the table: it goes to neighbors/NAME/."""
    kind: str = ""
    """What is compared: text_emb, img_emb or both; empty: what the index is of."""
    method: Literal["auto", "index", "exact", "graph"] = "auto"
    """index (FAISS), exact (every row with every row), graph (approximate, of all rows at once), or
    auto: exact where that is affordable, else graph where memory allows it, else index."""
    k: int = 8
    """Most neighbors of a pair."""
    num_candidates: int = 64
    """Rows asked of the index at first; doubled for those pairs that need more. Also the length of
    a graph's lists where pictures can rule out a neighbor."""
    max_candidates: int = 16_384
    """Most rows asked of the index for one pair; one that still lacks neighbors keeps fewer."""
    exclude_same_caption: bool = True
    """Leave out neighbors with the pair's own text, and repeats of another neighbor's text."""
    max_image_hash_distance: int | None = None
    """Leave out neighbors whose picture differs from the pair's own in at most so many of the 64
    bits of its difference hash; unset: pictures are not compared."""
    signals: str = "basic"
    """Signals with the pictures' hashes (image_dhash), for max_image_hash_distance."""
    max_image_cosine: float | None = None
    """Leave out neighbors whose picture's vector has at least this cosine with the pair's own;
    unset: off. The embeddings must have pictures."""
    min_score: float = -1.0
    """Least cosine of a neighbor, -1 to 1."""
    useful_score: float = 0.5
    """Cosine from which a neighbor counts as useful, for the figures; drops nothing."""
    recall_target: float = 0.95
    """Least share of the true neighbors that a graph must find, measured on a sample."""
    seed: int = 0
    """Of a graph's making."""
    max_memory_gib: float = 8.0
    """Most memory of a graph's making, GiB."""
    device: str = "cpu"
    """Where exact search multiplies: cpu (tar by tar), or cuda or cuda:N (all rows at once, by the
    step that makes graphs)."""
    num_threads: int | None = field(default=None, metadata={"fingerprint": False})
    """Threads of a graph's making; unset: all cores. They change no byte."""

    num_cpus: ClassVar[float] = 1

    @property
    def num_gpus(self) -> float:
        """None: what needs one is done by BuildGraph."""
        return 0.0

    def __post_init__(self) -> None:
        require_table_name(self.name)
        _require_input(self)
        if self.method not in METHODS:
            raise DeclipError(f"method is {self.method!r}.{did_you_mean(self.method, METHODS)}")
        require_between("k", self.k, 1)
        require_between("min_score", self.min_score, -1, 1)
        require_between("useful_score", self.useful_score, -1, 1)
        unset = "Unset it to compare no pictures."
        require_between("max_image_cosine", self.max_image_cosine, -1, 1, remedy=unset)
        require_between(
            "max_image_hash_distance", self.max_image_hash_distance, 0, 64, remedy=unset
        )
        require_folder_name("signals", self.signals)
        require_between("recall_target", self.recall_target, 0.01, 1)
        require_between("seed", self.seed, 0, 2**31 - 1)
        require_between("max_memory_gib", self.max_memory_gib, 0.01)
        check_device_name(self.device)
        require_between("num_threads", self.num_threads, 1, remedy="Unset it to use all cores.")
        if self.num_candidates <= self.k:
            raise DeclipError(
                f"num_candidates is {self.num_candidates} and k is {self.k}; the pair itself is "
                f"among the candidates, so at least {self.k + 1} are needed: raise num_candidates."
            )
        if self.max_candidates < self.num_candidates:
            raise DeclipError(
                f"max_candidates is {self.max_candidates}, fewer than the {self.num_candidates} of "
                "num_candidates; raise max_candidates or lower num_candidates."
            )

    @property
    def rules(self) -> Rules:
        """What makes a candidate a neighbor."""
        return Rules(
            k=self.k,
            min_score=self.min_score,
            exclude_same_caption=self.exclude_same_caption,
            max_image_hash_distance=self.max_image_hash_distance,
            min_image_cosine=self.max_image_cosine,
        )

    def tasks(self) -> Sequence[str]:
        return shard_tasks(self.root)

    def is_done(self, task: str) -> bool:
        store = Store(self.root)
        description = neighbor_tables.description_path(self.name)
        return all(map(store.exists, (layout.neighbors_path(self.name, task), description)))

    def worker(self) -> Callable[[str], TaskStats]:
        store = Store(self.root)
        work = _open(self, store)
        return lambda task: write_neighbors(work, store, task)


def require_table_name(name: str) -> None:
    """Refuse a name that is neither a folder's nor a refreshed table's (``NAME@ID``).

    Raises:
        DeclipError: names the setting.
    """
    table, mark, version_id = name.partition(neighbor_tables.MARK)
    require_folder_name("name", table)
    if mark:
        require_folder_name("name", version_id)


def _require_input(settings: BuildNeighbors) -> None:
    """Refuse settings that leave open what is compared, or that contradict each other."""
    if settings.index:
        require_folder_name("index", settings.index)
    if settings.embeddings:
        require_folder_name("embeddings", settings.embeddings)
    if not settings.index and not settings.embeddings:
        raise DeclipError(
            "index and embeddings are both empty, so there is nothing to compare; name one of them."
        )
    if settings.kind and settings.kind not in SIDES:
        raise DeclipError(f"kind is {settings.kind!r}.{did_you_mean(settings.kind, SIDES)}")
    if settings.index:
        return
    if settings.method == "index":
        raise DeclipError(
            "method is 'index', but index is empty; name an index, or choose exact or graph."
        )
    if not settings.kind:
        raise DeclipError(
            f"kind is empty, and there is no index that would say what of embeddings "
            f"{settings.embeddings!r} is compared; choose one of {', '.join(SIDES)}."
        )


def needs_graph(settings: BuildNeighbors, method: str) -> bool:
    """Whether candidates of all rows are made beforehand, by BuildGraph.

    On a GPU exact search goes that way, too: tar by tar, moving the vectors there would take many
    times as long as comparing them.
    """
    return method == "graph" or (method == "exact" and settings.device.startswith("cuda"))


def choose_method(settings: BuildNeighbors, num_rows: int, dim: int) -> str:
    """``index``, ``exact`` or ``graph``: what ``auto`` comes to for so many vectors.

    Args:
        settings: method, device and the most memory.
        num_rows: vectors.
        dim: their length.
    """
    if settings.method != "auto":
        return settings.method
    on_gpu = settings.device.startswith("cuda")
    most = EXACT_PRODUCTS_ON_GPU if on_gpu else EXACT_PRODUCTS
    if float(num_rows) ** 2 * dim <= most:
        return "exact"
    if not settings.index or num_rows * dim * 2 * GRAPH_BYTES <= settings.max_memory_gib * 2**30:
        return "graph"
    return "index"


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What a process needs to work on any shard."""

    settings: BuildNeighbors
    table: TableRows
    source: Source
    numbers: Mapping[str, int]
    """Shard -> its number among the parts."""
    index_sha256: str
    table_sha256: str


def _open(settings: BuildNeighbors, store: Store) -> _Work:
    """Open the vectors and the source; write the table's description."""
    table, info = read_table_rows(settings, store)
    method = choose_method(settings, table.num_rows, table.vectors.dim)
    source, recall = _open_source(settings, store, table, info, method)
    description = _published(store, describe(settings, table, info, method, recall))
    return _Work(
        settings=settings,
        table=table,
        source=source,
        numbers={part.shard: number for number, part in enumerate(table.vectors.parts)},
        index_sha256=str(built_as(info).get("index_sha256", "")),
        table_sha256=hashlib.sha256(description).hexdigest(),
    )


def _published(store: Store, description: dict[str, Any]) -> bytes:
    """Bytes of table.json, written where it is not there yet or of another table.

    One that was made of more rows and is the same otherwise stays: an opt-out has taken rows out
    since, and the tables that stand name its digest.
    """
    name = str(description["name"])
    path = neighbor_tables.description_path(name)
    wanted = canonical_json(description)
    if not store.exists(path):
        store.write_bytes(path, wanted)
        return wanted
    standing = store.read_bytes(path)
    if standing == wanted:
        return wanted
    try:
        old = json.loads(standing)
        num_rows = max(int(old["num_rows"]), int(description["num_rows"]))
        if canonical_json(description | {"num_rows": num_rows}) == standing:
            return standing
    except (ValueError, KeyError, TypeError):
        pass  # damaged: written anew
    store.write_bytes(path, wanted)
    return wanted


def built_as(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """An index's entries as of its build: an opt-out may have taken rows out since."""
    return {**info, **info.get("built as", {})}


def describe(
    settings: BuildNeighbors,
    table: TableRows,
    info: Mapping[str, Any],
    method: str,
    recall: float | None,
) -> dict[str, Any]:
    """What table.json says: the same for every worker, and after an opt-out."""
    part = table.vectors.parts[0]
    return {
        "format_version": neighbor_tables.FORMAT_VERSION,
        "name": settings.name,
        "method": method,
        "recall": recall,
        "k": settings.k,
        "kind": table.vectors.side,
        "embeddings": table.vectors.name,
        "encoder": part.encoder,
        "encoder_digest": part.encoder_digest,
        "selection": part.selection,
        "dim": part.dim,
        "num_rows": int(built_as(info).get("nb vectors", table.num_rows)),
        "index_sha256": str(built_as(info).get("index_sha256", "")),
        "settings": settings_of(settings, hashed_only=True),
    }


def _open_source(
    settings: BuildNeighbors,
    store: Store,
    table: TableRows,
    info: Mapping[str, Any],
    method: str,
) -> tuple[Source, float | None]:
    """Who names candidates, and the recall that was measured of it."""
    from declip_filter.neighbor_graph import read_graph

    if needs_graph(settings, method):
        ids, recall = read_graph(settings, store, table)
        return GraphSource(ids=ids), recall
    if method == "exact":
        for number in range(len(table.vectors.parts)):
            table.vectors.check_part(number)
        return ExactSource(table=table, rules=settings.rules), 1.0
    if table.vectors.side != info["kind"]:
        raise DeclipError(
            f"index {settings.index!r} is of {info['kind']}, and kind is {table.vectors.side!r}; "
            "choose method exact or graph, or build an index of that kind."
        )
    loaded = load_index(store, settings.index)
    recall = next((float(v) for k, v in sorted(info.items()) if _is_recall(k, v)), None)
    source = IndexSource(
        loaded=loaded,
        table=table,
        num_candidates=settings.num_candidates,
        max_candidates=settings.max_candidates,
    )
    return source, recall


def _is_recall(name: str, value: object) -> bool:
    """Whether an entry of info.json is the recall: ``recall@10``, and no interval."""
    return name.startswith("recall@") and " " not in name and isinstance(value, float)


def write_neighbors(work: _Work, store: Store, shard: str) -> TaskStats:
    """Find the neighbors of one shard's rows and write its table."""
    settings, table = work.settings, work.table
    number = work.numbers[shard]
    keys = own_keys(settings, store, table, number)
    found = find_neighbors(work.source, table, settings.rules, table.of_shard(number))
    columns = {
        "key": keys,
        "neighbor_keys": [table.keys[rows].tolist() for rows in found.rows],
        "scores": [scores.tolist() for scores in found.scores],
        "index_sha256": [work.index_sha256] * len(keys),
        neighbor_tables.IDENTITY: [work.table_sha256] * len(keys),
    }
    path = layout.neighbors_path(settings.name, shard)
    sidecars.write_table(store, path, pa.table(columns, schema=SCHEMA))
    files = [path]
    if shard == table.vectors.parts[0].shard:
        files.append(neighbor_tables.description_path(settings.name))
    return TaskStats(
        num_in=len(keys), num_out=len(keys), files=files, extra=_figures(settings, found)
    )


def _figures(settings: BuildNeighbors, found: Found) -> dict[str, Any]:
    """What a task's receipt says of its lists."""
    num = len(found.scores)
    scores = np.concatenate([np.empty(0, np.float32), *found.scores]).astype(np.float64)
    best = np.asarray([own[0] for own in found.scores if len(own)], dtype=np.float32)
    num_useful = int((best >= settings.useful_score).sum())
    return {
        "fraction_with_neighbor": round(len(best) / num, 6) if num else 0.0,
        "fraction_useful": round(num_useful / num, 6) if num else 0.0,
        "mean_score": round(float(scores.mean()), 6) if scores.size else 0.0,
        # Fewer than k distinct other captions within reach: all of a small or uniform dataset.
        "num_short": sum(len(own) < settings.k for own in found.scores),
        "num_neighbors": sum(len(rows) for rows in found.rows),
        **{name: found.removed[name] for name in sorted(REMOVALS)},
    }


def read_neighbors(store: Store, name: str, shard: str, keys: Sequence[str]) -> pa.Table:
    """A shard's table for the samples ``keys`` (ascending).

    A sample that has no vector has no row in the table, and an empty list here.

    Returns:
        A table of :data:`SCHEMA`, rows in the order of ``keys``.

    Raises:
        DeclipError: the table is missing or damaged, or has a sample that is not in ``keys``.
    """
    names = [name for name in SCHEMA.names if name != neighbor_tables.IDENTITY]
    table = sidecars.read_table(store, layout.neighbors_path(name, shard), names)
    own = table.column("key").to_pylist()
    if own == list(keys):
        return table
    if not set(own) <= set(keys):
        raise DeclipError(
            f"neighbors {name!r} of shard {shard} are of other samples than are selected now; "
            "rerun the stage that looks neighbors up."
        )
    rows = {row["key"]: row for row in table.to_pylist()}
    empty = {"neighbor_keys": [], "scores": [], "index_sha256": ""}
    filled = [rows.get(key, {"key": key, **empty}) for key in keys]
    return pa.Table.from_pylist(filled, schema=table.schema)
