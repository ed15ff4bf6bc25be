"""Neighbors of rows out of candidates, whoever finds those: an index, exact search or a graph.

A source names candidate rows and nothing more. Their scores are computed again from the stored
vectors, in float32 and one pair at a time, and the same rules choose among them. So whatever the
source, a neighbor's score, what is left out and the order of ties are the same, and three sources
that find the same rows give the same table.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from declip_filter.index_files import Ids, LoadedIndex, Scores, Texts, search
from declip_filter.vectors import StoredVectors
from declip_shards import DeclipError

PRODUCTS_AT_ONCE = 2**24
"""Numbers multiplied at once when candidates are scored: 64 MiB of float32."""
SPARE_CANDIDATES = 8
"""Candidates beyond k that exact search and the graph are asked for: sources round differently."""
TIE_TOLERANCE = 1e-5
"""Scores of one pair from two sources differ by less."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What makes a candidate a neighbor."""

    k: int
    """Most neighbors of a row."""
    min_score: float = -1.0
    """Least cosine."""
    exclude_same_caption: bool = True
    """Whether a row's own caption, and all but the best row of any other, are left out."""
    max_image_hash_distance: int | None = None
    """Most bits between picture hashes that count as the same picture; None: not asked."""
    min_image_cosine: float | None = None
    """Least cosine of pictures that count as the same; None: not asked."""

    @property
    def reads_images(self) -> bool:
        """Whether a picture can rule out a neighbor."""
        return self.max_image_hash_distance is not None or self.min_image_cosine is not None


@dataclass(frozen=True, kw_only=True)
class TableRows:
    """All rows: their vectors, their keys, and what tells that two are of one content."""

    vectors: StoredVectors
    keys: Texts
    """(rows,): sample key of each row."""
    captions: Ids
    """(rows,): equal numbers, equal normalized captions."""
    image_hashes: npt.NDArray[np.uint64] | None = None
    """(rows,): difference hash of each picture."""
    images: StoredVectors | None = None
    """Vectors of the pictures."""

    @property
    def num_rows(self) -> int:
        return self.vectors.num_rows

    def of_shard(self, number: int) -> Ids:
        """Rows of the ``number``-th part."""
        starts = self.vectors.starts
        return np.arange(starts[number], starts[number + 1], dtype=np.int64)


class Source(Protocol):
    """Names candidates."""

    @property
    def rows_at_once(self) -> int:
        """Rows to ask about at once."""

    @property
    def first_width(self) -> int:
        """Candidates of a row to ask for at first."""

    @property
    def widest(self) -> int:
        """Most candidates of a row that it makes sense to ask for."""

    @property
    def depth(self) -> int:
        """How thoroughly to look at first; what that means is the source's own."""

    def deeper(self, depth: int) -> int:
        """A more thorough look, where candidates have run out; the same where there is none."""

    def search(self, rows: Ids, width: int, depth: int) -> Ids:
        """Candidates (len(rows), at most ``width``), best first; -1 where there are fewer."""


@dataclass(kw_only=True)
class Found:
    """Neighbors of some rows, and what was left out."""

    rows: list[Ids]
    """Of each query, best first."""
    scores: list[Scores]
    removed: Counter[str] = field(default_factory=Counter)


REMOVALS = (
    "removed_self",
    "removed_same_caption",
    "removed_repeated_caption",
    "removed_near_duplicate_image",
    "removed_below_min_score",
)
"""Counters of candidates that were looked at and left out, in a task's ``extra``."""


@dataclass(kw_only=True)
class _Kept:
    """What one query's candidates came to."""

    rows: Ids
    scores: Scores
    removed: Mapping[str, int]
    may_find_more: bool


def find_neighbors(source: Source, table: TableRows, rules: Rules, queries: Ids) -> Found:
    """Up to ``k`` neighbors of each query row, best first, ties by row.

    A source is asked for twice as many candidates until a list is full and nothing further could
    tie with its last, until candidates fall below ``min_score``, or until it has no more.
    """
    taken: dict[int, _Kept] = {}
    for start in range(0, len(queries), source.rows_at_once):
        pending = np.arange(start, min(start + source.rows_at_once, len(queries)))
        width, depth = min(source.first_width, source.widest), source.depth
        while len(pending):
            own = queries[pending]
            found = source.search(own, width, depth)
            scores = score_pairs(table, own, found)
            for place, query in enumerate(pending.tolist()):
                taken[query] = _take(table, rules, int(own[place]), found[place], scores[place])
            wider = min(source.widest, width * 2)
            deeper = source.deeper(depth) if bool((found < 0).any()) else depth
            if (wider, deeper) == (width, depth):
                break
            width, depth = wider, deeper
            pending = np.asarray([q for q in pending.tolist() if taken[q].may_find_more], np.int64)
    ordered = [taken[query] for query in range(len(queries))]
    return Found(
        rows=[kept.rows for kept in ordered],
        scores=[kept.scores for kept in ordered],
        removed=sum((Counter(kept.removed) for kept in ordered), Counter()),
    )


def score_pairs(table: TableRows, queries: Ids, candidates: Ids) -> Scores:
    """Cosines (queries, candidates) of rows, float32; -inf for candidate -1.

    Each sum runs over one pair, so a score depends on nothing but the two vectors.

    Raises:
        DeclipError: a stored vector is not finite.
    """
    scores = np.full(candidates.shape, -np.inf, dtype=np.float32)
    step = max(1, PRODUCTS_AT_ONCE // max(1, candidates.shape[1] * table.vectors.dim))
    for start in range(0, len(queries), step):
        here = candidates[start : start + step]
        distinct, place = np.unique(here, return_inverse=True)
        near = table.vectors.take(distinct.clip(0)).astype(np.float32)[place.reshape(here.shape)]
        asked = table.vectors.take(queries[start : start + step]).astype(np.float32)
        block = (near * asked[:, None, :]).sum(axis=2)
        if not np.isfinite(block).all():
            row, column = (int(axis[0]) for axis in np.nonzero(~np.isfinite(block)))
            asked_is_bad = not np.isfinite(asked[row]).all()
            bad = queries[start + row] if asked_is_bad else max(here[row, column], 0)
            table.vectors.check_part(int(np.searchsorted(table.vectors.starts, bad, "right")) - 1)
            raise DeclipError(
                f"embeddings {table.vectors.name!r}: the vector of sample "
                f"{str(table.keys[int(bad)])!r} is not finite; rerun the stage that embeds."
            )
        scores[start : start + step] = np.where(here < 0, -np.inf, block)
    return scores


def _take(table: TableRows, rules: Rules, own: int, rows: Ids, scores: Scores) -> _Kept:
    """The neighbors among one query's candidates."""
    ranked = np.lexsort((rows, -scores))
    ranked = ranked[rows[ranked] >= 0]
    near, near_scores = rows[ranked], scores[ranked]
    is_self = near == own
    is_same = np.zeros(len(near), dtype=bool)
    is_repeat = np.zeros(len(near), dtype=bool)
    if rules.exclude_same_caption:
        captions = table.captions[near]
        is_same = (captions == table.captions[own]) & ~is_self
        is_first = np.zeros(len(near), dtype=bool)
        is_first[np.unique(captions, return_index=True)[1]] = True
        is_repeat = ~is_first & ~is_same & ~is_self
    is_above = near_scores >= rules.min_score
    usable = ~is_self & ~is_same & ~is_repeat
    is_copy = _image_copies(table, rules, own, near, usable & is_above)
    chosen = np.flatnonzero(usable & is_above & ~is_copy)[: rules.k]
    is_full = len(chosen) == rules.k
    may_tie = is_full and float(near_scores[chosen[-1]]) <= near_scores[-1] + TIE_TOLERANCE
    return _Kept(
        rows=near[chosen],
        scores=near_scores[chosen],
        removed={
            "removed_self": int(is_self.sum()),
            "removed_same_caption": int(is_same.sum()),
            "removed_repeated_caption": int(is_repeat.sum()),
            "removed_near_duplicate_image": int(is_copy.sum()),
            "removed_below_min_score": int((usable & ~is_above).sum()),
        },
        # A candidate below the limit says that every further one is, too.
        may_find_more=bool(may_tie) or (not is_full and bool(is_above.all())),
    )


def _image_copies(
    table: TableRows, rules: Rules, own: int, near: Ids, asked: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Which of the candidates in question show (nearly) the query's own picture."""
    copies = np.zeros(len(near), dtype=bool)
    places = np.flatnonzero(asked)
    if rules.max_image_hash_distance is not None and table.image_hashes is not None:
        bits = table.image_hashes[near[places]] ^ table.image_hashes[own]
        copies[places] |= np.bitwise_count(bits) <= rules.max_image_hash_distance
    if rules.min_image_cosine is not None and table.images is not None:
        picture = table.images.take(np.asarray([own], np.int64)).astype(np.float32)
        others = table.images.take(near[places]).astype(np.float32)
        copies[places] |= (others * picture).sum(axis=1) >= rules.min_image_cosine
    return copies


# Sources -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExactSource:
    """Every row is compared, on the CPU. Each call reads all vectors, so it asks for many rows."""

    table: TableRows
    rules: Rules
    depth: int = 0
    rows_at_once: int = 16_384

    @property
    def first_width(self) -> int:
        return self.rules.k + SPARE_CANDIDATES

    @property
    def widest(self) -> int:
        return max(0, self.table.num_rows - 1)

    def deeper(self, depth: int) -> int:
        return depth

    def search(self, rows: Ids, width: int, depth: int) -> Ids:
        from declip_filter.knn import exact_neighbors

        if not width:
            return np.empty((len(rows), 0), dtype=np.int64)
        groups = groups_of(self.table, self.rules)
        found = exact_neighbors(self.table.vectors, rows, width, groups=groups)
        return found.ids.astype(np.int64, copy=False)


def groups_of(table: TableRows, rules: Rules) -> Ids | None:
    """Rows of which a list needs at most one, the best: those of one caption."""
    return table.captions if rules.exclude_same_caption else None


@dataclass(frozen=True, kw_only=True)
class GraphSource:
    """Lists that were made beforehand; they do not get longer."""

    ids: npt.NDArray[np.integer]
    """(rows, width); -1 where there are fewer."""
    depth: int = 0
    rows_at_once: int = 1024

    @property
    def first_width(self) -> int:
        return int(self.ids.shape[1])

    @property
    def widest(self) -> int:
        return int(self.ids.shape[1])

    def deeper(self, depth: int) -> int:
        return depth

    def search(self, rows: Ids, width: int, depth: int) -> Ids:
        return np.asarray(self.ids[rows, :width], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class IndexSource:
    """A FAISS index; ``depth`` is its ``nprobe``, 0 where it has no inverted lists."""

    loaded: LoadedIndex
    table: TableRows
    num_candidates: int
    max_candidates: int
    rows_at_once: int = 256

    @property
    def first_width(self) -> int:
        return self.num_candidates

    @property
    def widest(self) -> int:
        return min(self.max_candidates, self.table.num_rows)

    @property
    def depth(self) -> int:
        return int(self.loaded.info.get("nprobe") or 0) if self._num_lists else 0

    @property
    def _num_lists(self) -> int:
        return int(self.loaded.info.get("nlist") or 0)

    def deeper(self, depth: int) -> int:
        return min(self._num_lists, depth * 2) if depth else depth

    def search(self, rows: Ids, width: int, depth: int) -> Ids:
        queries = self.table.vectors.take(rows).astype(np.float32)
        return search(self.loaded.faiss_index, queries, width, depth or None)[1]
