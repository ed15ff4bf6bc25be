"""Neighbor table: for every selected pair, the captions nearest to its own, read from FAISS.

    neighbors/NAME/NNNNN.parquet   key, neighbor_keys list<string>, scores list<float32>,
                                   index_sha256

DeCLIP's nearest-neighbor supervision (Li et al. 2021, arXiv 2110.05208, section 3.3) asks for
another text that describes the picture too. Three kinds of row are therefore left out on purpose:

- the sample itself, by its row, not by its score: it is always its own nearest;
- samples whose caption is the same text once normalized (see
  :func:`declip_filter.captions.normalize_caption`): their text is the pair's own positive again
  and supervises nothing new, and with captions shared by many pictures they would fill the table;
- all but the best row of any other caption, so that k neighbors are k different texts.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_filter.embeddings import Half, read_part, read_vectors
from declip_filter.index import (
    FORMAT_VERSION as INDEX_FORMAT,
)
from declip_filter.index import (
    ROWS_SCHEMA,
    Ids,
    Scores,
    index_path,
    info_path,
    rows_path,
    search,
)
from declip_filter.limits import require_between, require_folder_name
from declip_filter.signals import shard_tasks
from declip_shards import DeclipError, Store, TaskStats, layout, sidecars

QUERIES_AT_ONCE = 256
"""Rows searched at once."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("neighbor_keys", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("index_sha256", pa.string()),
    ]
)
"""Columns of a table, one row a selected pair, ordered by key; the last names the index file."""


@dataclass(frozen=True)
class LoadedIndex:
    """An index with what names its rows, checked against its own info.json."""

    faiss_index: Any
    info: Mapping[str, Any]
    keys: npt.NDArray[np.object_]
    """Sample key of each row."""
    shards: npt.NDArray[np.object_]
    """Shard of each row."""
    captions: Ids
    """Number of each row's normalized caption: equal numbers, equal texts."""

    @property
    def num_rows(self) -> int:
        return len(self.keys)


def load_index(store: Store, name: str) -> LoadedIndex:
    """Read an index and verify that its files are whole and of each other.

    Raises:
        DeclipError: a file is missing, cut, changed, or of a newer format.
    """
    import faiss

    remedy = "delete the index's folder and rerun the stage that indexes."
    for path in (info_path(name), index_path(name), rows_path(name)):
        if not store.exists(path):
            raise DeclipError(f"index {name!r}: {path!r} is missing; rerun the stage that indexes.")
    try:
        info = json.loads(store.read_bytes(info_path(name)))
        newest = int(info["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DeclipError(f"{info_path(name)!r} is damaged ({error}); {remedy}") from error
    if newest > INDEX_FORMAT:
        raise DeclipError(
            f"index {name!r} is of format {newest}, this version reads up to {INDEX_FORMAT}; "
            "upgrade opendeclip."
        )
    size = store.size(index_path(name))
    if size != info["size in bytes"]:
        raise DeclipError(
            f"{index_path(name)!r} has {size} bytes, {info['size in bytes']} were written: it is "
            f"cut short; {remedy}"
        )
    for path, entry in ((index_path(name), "index_sha256"), (rows_path(name), "rows_sha256")):
        if store.sha256(path) != info[entry]:
            raise DeclipError(f"{path!r} has changed since it was written; {remedy}")
    index = faiss.deserialize_index(np.frombuffer(store.read_bytes(index_path(name)), np.uint8))
    rows = sidecars.read_table(store, rows_path(name), ROWS_SCHEMA.names)
    shas = np.asarray(rows.column("caption_sha").to_pylist())
    return LoadedIndex(
        faiss_index=index,
        info=info,
        keys=np.asarray(rows.column("key").to_pylist(), dtype=object),
        shards=np.asarray(rows.column("shard").to_pylist(), dtype=object),
        captions=np.unique(shas, return_inverse=True)[1].astype(np.int64),
    )


@dataclass(frozen=True, kw_only=True)
class BuildNeighbors:
    """Look up every selected pair's nearest other captions."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder, any fsspec URL."""
    index: str = "captions"
    """Name of the index to search, from index/NAME/."""
    name: str = "captions"
    """Name of the table: it goes to neighbors/NAME/."""
    k: int = 8
    """Most neighbors of a pair."""
    num_candidates: int = 64
    """Rows asked of the index at first; doubled for those pairs that need more."""
    max_candidates: int = 16_384
    """Most rows asked of the index for one pair; one that still lacks neighbors keeps fewer."""
    exclude_same_caption: bool = True
    """Leave out neighbors with the pair's own text, and repeats of another neighbor's text."""
    min_score: float = -1.0
    """Least cosine of a neighbor, -1 to 1."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        require_folder_name("index", self.index)
        require_folder_name("name", self.name)
        require_between("k", self.k, 1)
        require_between("min_score", self.min_score, -1, 1)
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

    def tasks(self) -> Sequence[str]:
        return shard_tasks(self.root)

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(layout.neighbors_path(self.name, task))

    def worker(self) -> Callable[[str], TaskStats]:
        store = Store(self.root)
        loaded = load_index(store, self.index)
        return lambda task: write_neighbors(self, store, loaded, task)


@dataclass(kw_only=True)
class _Found:
    """Neighbors of some rows, and what was left out."""

    rows: list[Ids]
    scores: list[Scores]
    removed: Counter[str]


def write_neighbors(
    settings: BuildNeighbors, store: Store, loaded: LoadedIndex, shard: str
) -> TaskStats:
    """Search for one shard's rows and write its table."""
    vectors, keys, own_rows = _queries(settings, store, loaded, shard)
    found = find_neighbors(settings, loaded, vectors, own_rows)
    table = pa.table(
        {
            "key": keys,
            "neighbor_keys": [loaded.keys[rows].tolist() for rows in found.rows],
            "scores": [scores.tolist() for scores in found.scores],
            "index_sha256": [str(loaded.info["index_sha256"])] * len(keys),
        },
        schema=SCHEMA,
    )
    path = layout.neighbors_path(settings.name, shard)
    sidecars.write_table(store, path, table)
    scores = np.concatenate([np.empty(0, np.float32), *found.scores]).astype(np.float64)
    num_with = sum(len(own) > 0 for own in found.scores)
    extra = {
        "fraction_with_neighbor": round(num_with / len(keys), 6) if keys else 0.0,
        "mean_score": round(float(scores.mean()), 6) if scores.size else 0.0,
        # Fewer than k distinct other captions within reach: all of a small or uniform dataset.
        "num_short": sum(len(own) < settings.k for own in found.scores),
        "num_neighbors": sum(len(rows) for rows in found.rows),
        **{name: found.removed[name] for name in sorted(REMOVALS)},
    }
    return TaskStats(num_in=len(keys), num_out=len(keys), files=[path], extra=extra)


REMOVALS = ("removed_self", "removed_same_caption", "removed_repeated_caption")
"""Counters of candidates that were left out, in a task's ``extra``."""


def _queries(
    settings: BuildNeighbors, store: Store, loaded: LoadedIndex, shard: str
) -> tuple[Half, list[str], Ids]:
    """A shard's vectors, keys and rows in the index, checked to be what was indexed."""
    name, kind = str(loaded.info["embeddings"]), str(loaded.info["kind"])
    part = read_part(store, name, shard)
    if (part.encoder_digest, part.dim) != (
        loaded.info["encoder_digest"],
        loaded.faiss_index.d,
    ):
        raise DeclipError(
            f"index {settings.index!r} is of encoder {loaded.info['encoder']!r} (dim "
            f"{loaded.faiss_index.d}), the embeddings {name!r} of shard {shard} are by "
            f"{part.encoder!r} (dim {part.dim}); rerun the stage that indexes."
        )
    vectors, keys = read_vectors(store, name, kind, part)
    own_rows = np.flatnonzero(loaded.shards == shard)
    if loaded.keys[own_rows].tolist() != keys:
        raise DeclipError(
            f"index {settings.index!r} holds other samples of shard {shard} than the embeddings "
            f"{name!r} do now; rerun the stage that indexes."
        )
    return vectors, keys, own_rows


def find_neighbors(
    settings: BuildNeighbors, loaded: LoadedIndex, vectors: Half, own_rows: Ids
) -> _Found:
    """Up to ``k`` neighbors of each query, best first, ties by row.

    Args:
        vectors: (queries, dim), the queries.
        own_rows: (queries,), their rows in the index.
    """
    taken: dict[int, _Kept] = {}
    stored = getattr(loaded.faiss_index, "nprobe", None)
    for start in range(0, len(vectors), QUERIES_AT_ONCE):
        pending = np.arange(start, min(start + QUERIES_AT_ONCE, len(vectors)))
        widest = min(settings.max_candidates, loaded.num_rows)
        width, nprobe = min(settings.num_candidates, widest), stored
        while len(pending):
            queries = vectors[pending].astype(np.float32)
            scores, rows = search(loaded.faiss_index, queries, width, nprobe)
            for query, row_ids, row_scores in zip(pending.tolist(), rows, scores, strict=True):
                own_row = int(own_rows[query])
                taken[query] = _take(settings, loaded, own_row, row_ids, row_scores)
            wider, deeper = _widen(loaded, width, widest, nprobe, bool((rows < 0).any()))
            if (wider, deeper) == (width, nprobe):
                break
            width, nprobe = wider, deeper
            pending = np.asarray([q for q in pending.tolist() if taken[q].may_find_more], np.int64)
    ordered = [taken[query] for query in range(len(vectors))]
    return _Found(
        rows=[kept.rows for kept in ordered],
        scores=[kept.scores for kept in ordered],
        removed=sum((Counter(kept.removed) for kept in ordered), Counter()),
    )


def _widen(
    loaded: LoadedIndex, width: int, widest: int, nprobe: int | None, ran_out: bool
) -> tuple[int, int | None]:
    """Twice the candidates; twice the lists, too, where the probed ones gave all they had."""
    if nprobe is not None and ran_out:
        nprobe = min(int(loaded.faiss_index.nlist), nprobe * 2)
    return min(widest, width * 2), nprobe


@dataclass(kw_only=True)
class _Kept:
    """What one query's candidates came to."""

    rows: Ids
    """Neighbors, best first."""
    scores: Scores
    removed: Mapping[str, int]
    may_find_more: bool


def _take(
    settings: BuildNeighbors, loaded: LoadedIndex, own_row: int, rows: Ids, scores: Scores
) -> _Kept:
    """The neighbors among one query's candidates."""
    real = rows >= 0
    ranked = np.lexsort((rows, -scores))
    ranked = ranked[real[ranked]]
    is_self = rows[ranked] == own_row
    is_same = np.zeros(len(ranked), dtype=bool)
    is_repeat = np.zeros(len(ranked), dtype=bool)
    if settings.exclude_same_caption:
        captions = loaded.captions[rows[ranked]]
        is_same = (captions == loaded.captions[own_row]) & ~is_self
        first = np.zeros(len(ranked), dtype=bool)
        first[np.unique(captions, return_index=True)[1]] = True
        is_repeat = ~first & ~is_same & ~is_self
    is_near = scores[ranked] >= settings.min_score
    chosen = ranked[~is_self & ~is_same & ~is_repeat & is_near][: settings.k]
    return _Kept(
        rows=rows[chosen],
        scores=scores[chosen],
        removed={
            "removed_self": int(is_self.sum()),
            "removed_same_caption": int(is_same.sum()),
            "removed_repeated_caption": int(is_repeat.sum()),
        },
        # A candidate below the limit says that every further one is, too.
        may_find_more=len(chosen) < settings.k and bool(is_near.all()),
    )


def read_neighbors(store: Store, name: str, shard: str, keys: Sequence[str]) -> pa.Table:
    """A shard's table, checked to be of the samples ``keys`` (ascending).

    Returns:
        A table of :data:`SCHEMA`, rows in the order of ``keys``.

    Raises:
        DeclipError: the table is missing, damaged, or of other samples.
    """
    table = sidecars.read_table(store, layout.neighbors_path(name, shard), SCHEMA.names)
    if table.column("key").to_pylist() != list(keys):
        raise DeclipError(
            f"neighbors {name!r} of shard {shard} are of other samples than are selected now; "
            "rerun the stage that looks neighbors up."
        )
    return table
