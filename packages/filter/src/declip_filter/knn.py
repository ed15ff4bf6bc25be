"""Nearest neighbor graphs of stored vectors: exact, or as fast as can be at a measured recall.

How the fast one works, and what was tried: docs/design/0005-neighbor-graph.md.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from declip_filter.encoders import one_thread
from declip_filter.kmeans import cluster_rows
from declip_filter.knn_exact import exact_neighbors, number_groups
from declip_filter.knn_graph import ArrayVectors, Graph, Matrix, Rows, check_groups, check_k
from declip_filter.knn_grouped import Scan
from declip_filter.knn_lists import Candidates
from declip_filter.knn_refine import refine
from declip_filter.knn_rerank import StoredRows, rank_lists
from declip_filter.knn_space import (
    LEAST_OFFSET,
    Space,
    candidate_spaces,
    project_rows,
    shares_kept,
    sort_rows,
)
from declip_shards import DeclipError
from declip_shards.allocator import kept_memory

__all__ = ["ArrayVectors", "Graph", "Matrix", "Rows", "approximate_graph", "exact_neighbors"]

logger = logging.getLogger(__name__)

EXACT_BELOW = 4096
"""Fewer rows than this are compared all with all: that takes a second at most."""
SAMPLED_ROWS = 256
"""Rows whose exact neighbors say what the recall is: its standard error is near 0.01."""
CLUSTER_SIZE = 256
CANDIDATES_BEYOND = (5, 9, 17)
"""Candidates a row keeps beyond k (of 15; more in proportion), to be scored in full: the fewest
that do, the most where no space does with fewer."""
SHARE_FOR_SPACE = 5
"""A space may lose this part of what the recall target lets be lost."""
FIRST_PROBES = (3, 8)
"""Clusters that a row meets before it is known how recall grows with them."""
MOST_PROBES = 64
MANY_PROBES = 24
"""Where more would be needed, a round of neighbors of neighbors is cheaper."""
HOPS = 10
"""Neighbors followed each way in a round."""
MOST_GRAPH_ROWS = 2**27
"""What the keys of knn_refine.both_ways have bits for."""
SAME_SCORE = 1e-5
"""Rows that score within this of the last true neighbor count as found: they are as near."""


@dataclass(frozen=True)
class _Sample:
    """Rows whose exact neighbors are known."""

    rows: Rows
    ids: Rows
    last_scores: npt.NDArray[np.float32]
    """Score of the last true neighbor: (sample,), -inf where there are fewer than k."""
    num_true: int

    def recall(self, scores: npt.NDArray[np.float32]) -> float:
        """Share of the true neighbors in lists of these scores, (sample, k)."""
        found = (scores >= self.last_scores[:, None] - SAME_SCORE) & np.isfinite(scores)
        return min(1.0, float(found.sum()) / max(self.num_true, 1))

    @property
    def offset(self) -> float:
        """A typical last neighbor's score."""
        finite = self.last_scores[np.isfinite(self.last_scores)]
        return max(LEAST_OFFSET, float(np.median(finite)) if len(finite) else 0.0)


def approximate_graph(
    vectors: Matrix,
    k: int,
    *,
    recall_target: float = 0.95,
    seed: int = 0,
    num_threads: int = 1,
    max_memory_gib: float = 8.0,
    groups: Rows | None = None,
    scan_dtype: torch.dtype | None = None,
) -> Graph:
    """The (almost) nearest k rows of every row, with the recall that was measured.

    Rows are clustered in a space of fewer dimensions; each meets the members of its nearest
    clusters, then the neighbors of its neighbors; the best are scored in full, in float32. After
    each step the recall of a sample is measured; the work ends when it is at the target, or when
    nothing more helps: then a warning says so, and ``Graph.recall`` is what was reached.

    Memory: see :func:`estimate_bytes`.

    Args:
        vectors: of unit length.
        k: length of a list.
        recall_target: least share of the true neighbors, measured on a sample of rows.
        seed: of the sample and of everything drawn.
        num_threads: threads. The result is the same at any number.
        max_memory_gib: most memory of the projected vectors, lists and buffers together.
        groups: (num_rows,); rows of one group are never each other's neighbors, and a list holds
            at most one row of a group, its best.
        scan_dtype: float32 or bfloat16, what candidates are found in; by default bfloat16 where
            the CPU has it in hardware.

    Raises:
        DeclipError: a setting out of its range, too many rows, one that is not finite, or too
            little memory allowed.
    """
    check_k(k, vectors.num_rows)
    check_groups(groups, vectors.num_rows)
    if not 0 < recall_target <= 1:
        raise DeclipError(f"recall_target is {recall_target}; it must be above 0 and at most 1.")
    if num_threads < 1:
        raise DeclipError(f"num_threads is {num_threads}; it must be at least 1.")
    if vectors.num_rows > MOST_GRAPH_ROWS:
        raise DeclipError(
            f"there are {vectors.num_rows} vectors; a graph takes at most {MOST_GRAPH_ROWS}: take "
            "fewer rows, or use an index."
        )
    if vectors.num_rows < max(EXACT_BELOW, 4 * k):
        everyone = np.arange(vectors.num_rows, dtype=np.int64)
        return exact_neighbors(vectors, everyone, k, groups=groups)
    numbered = None if groups is None else number_groups(groups).astype(np.int32)
    # The same large buffers are needed in every step.
    with kept_memory():
        return _find_graph(
            vectors, k, recall_target, seed, num_threads, max_memory_gib, numbered, scan_dtype
        )


def _find_graph(
    vectors: Matrix,
    k: int,
    recall_target: float,
    seed: int,
    num_threads: int,
    max_memory_gib: float,
    numbered: npt.NDArray[np.int32] | None,
    scan_dtype: torch.dtype | None,
) -> Graph:
    """What :func:`approximate_graph` does, its arguments checked."""
    with one_thread():
        sample = _sample(vectors, k, seed, numbered)
        space, projected, width = _choose_space(
            vectors, sample, seed, scan_dtype, recall_target, max_memory_gib
        )
    needed = estimate_bytes(vectors.num_rows, vectors.dim, k, space)
    keep_rows = needed + vectors.num_rows * vectors.dim * 2 <= max_memory_gib * 2**30
    search = _Search(vectors, k, width, projected, sample, numbered, seed, num_threads, keep_rows)
    return search.run(recall_target)


def _choose_space(
    vectors: Matrix,
    sample: _Sample,
    seed: int,
    dtype: torch.dtype | None,
    recall_target: float,
    max_memory_gib: float,
) -> tuple[Space, torch.Tensor, int]:
    """The smallest space that keeps enough, all rows in it, and how many candidates it takes."""
    k = sample.ids.shape[1]
    widths = [k + max(4, share * k // 15) for share in CANDIDATES_BEYOND]
    for space in candidate_spaces(vectors, k, seed=seed, dtype=dtype):
        needed = estimate_bytes(vectors.num_rows, vectors.dim, k, space)
        if needed > max_memory_gib * 2**30:
            raise DeclipError(
                f"a graph of {vectors.num_rows} rows needs {needed / 2**30:.1f} GiB, and "
                f"max_memory_gib is {max_memory_gib:g}; allow more, take fewer rows, or use an "
                "index."
            )
        projected = project_rows(vectors, space)
        kept = shares_kept(projected, sample.rows, sample.ids, widths, sample.offset)
        logger.info("neighbor graph: %d columns keep %s", space.dim, np.round(kept, 3).tolist())
        # A wider space is cheaper than the longest lists.
        for width, share in zip(widths[:-1], kept, strict=False):
            if share >= 1 - (1 - recall_target) / SHARE_FOR_SPACE:
                return space, projected, width
    return space, projected, widths[-1]  # the last is as good as it gets


def estimate_bytes(num_rows: int, dim: int, k: int, space: Space) -> int:
    """Most memory of :func:`approximate_graph`, without the vectors themselves.

    Two copies of the projected rows (the second is made in the clusters' order), candidates and
    their scores, the clusters to meet, the links of a round while they are sorted, the result, and
    1 GiB of buffers. The stored vectors are kept as well (2 * dim bytes a row) where that fits,
    else read again when lists are scored.
    """
    projected = 2 * space.dim * space.dtype.itemsize
    candidates = 2 * 4 * (k + CANDIDATES_BEYOND[-1] * max(k, 15) // 15)
    links = HOPS * (8 + 2 * 8)
    probes = 4 * MOST_PROBES
    return num_rows * (projected + candidates + probes + links + 12 * k + 16) + 2**30


def _sample(vectors: Matrix, k: int, seed: int, groups: npt.NDArray[np.int32] | None) -> _Sample:
    generator = np.random.default_rng([seed, 1])
    num = min(SAMPLED_ROWS, vectors.num_rows)
    rows = np.sort(generator.choice(vectors.num_rows, num, replace=False)).astype(np.int64)
    grouped = None if groups is None else groups.astype(np.int64)
    found = exact_neighbors(vectors, rows, k, groups=grouped)
    return _Sample(rows, found.ids, found.scores[:, -1], int(np.isfinite(found.scores).sum()))


def next_probes(missed: Sequence[tuple[int, float]], allowed: float) -> int:
    """How many clusters a row should meet so that no more than a share of neighbors is missed.

    What is missed falls about as a power of the number of clusters met.

    Args:
        missed: clusters met and the share missed then, in the order measured.
        allowed: the share that may be missed.
    """
    last, share = missed[-1]
    if len(missed) == 1:
        return max(FIRST_PROBES[1], last + last // 4)
    before, more = missed[-2]
    power = math.log(more / max(share, 1e-6)) / math.log(last / before)
    if power <= 0.05 or allowed <= 0:
        return 2 * last
    needed = float(last * (share / allowed) ** (1 / power))
    return min(max(math.ceil(needed), last + 1), 64 * last)


class _Search:
    """One search: rows in the order of their clusters, and candidates of each."""

    def __init__(
        self,
        vectors: Matrix,
        k: int,
        width: int,
        projected: torch.Tensor,
        sample: _Sample,
        groups: npt.NDArray[np.int32] | None,
        seed: int,
        num_threads: int,
        keep_rows: bool,
    ) -> None:
        self.k, self.width = k, width
        self.sample, self.num_threads = sample, num_threads
        self.clusters = cluster_rows(projected, vectors.num_rows, CLUSTER_SIZE, seed, num_threads)
        order = self.clusters.order
        self.matrix = sort_rows(projected, order)
        self.groups = None if groups is None else groups[order]
        self.rows = StoredRows(vectors, order, keep=keep_rows)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self.sampled = place[sample.rows]

    def run(self, recall_target: float) -> Graph:
        """Meet clusters and refine until the target is reached or nothing is left to try."""
        scan = Scan(
            self.matrix,
            self.clusters,
            most_probes=MOST_PROBES,
            offset=self.sample.offset,
            groups=self.groups,
            num_threads=self.num_threads,
        )
        lists = scan.first_lists(FIRST_PROBES[0], self.width)
        recall = self._recall(lists.near)
        if recall < recall_target:
            lists.add_reverse()
            recall = self._recall(lists.near)
        missed = [(FIRST_PROBES[0], 1 - recall)]
        is_refined = False
        while 1 - missed[-1][1] < recall_target:
            probes = missed[-1][0]
            wanted = next_probes(missed, 1 - recall_target)
            if wanted > MANY_PROBES and probes >= MANY_PROBES // 2 and not is_refined:
                refine(self.matrix, lists, HOPS, self.sample.offset, self.num_threads)
                is_refined = True
                missed = [(probes, 1 - self._recall(lists.near))]
                continue
            if probes >= scan.most_probes:
                break
            if wanted > MANY_PROBES:  # half of them, then a round; and so on
                wanted = max(MANY_PROBES // 2, 2 * probes)
            wanted = min(wanted, scan.most_probes)
            scan.widen(lists, probes, wanted)
            is_refined = False
            missed.append((wanted, 1 - self._recall(lists.near)))
        recall = 1 - missed[-1][1]
        if recall < recall_target:
            logger.warning(
                "neighbor graph: recall@%d is %.3f on a sample of %d rows, below the target of %g, "
                "and more work does not help; use exact search or a lower target.",
                self.k, recall, len(self.sampled), recall_target,
            )  # fmt: skip
        return replace(self._rank(lists.near), recall=recall)

    def _recall(self, near: Candidates) -> float:
        scores, _ = rank_lists(self.rows, self.sampled, near[self.sampled], self.k, self.groups, 1)
        recall = self.sample.recall(scores)
        logger.info("neighbor graph: recall@%d is %.3f", self.k, recall)
        return recall

    def _rank(self, near: Candidates) -> Graph:
        """The final lists, in the vectors' own numbering."""
        everyone = np.arange(len(near), dtype=np.int64)
        scores, ids = rank_lists(self.rows, everyone, near, self.k, self.groups, self.num_threads)
        graph = Graph(np.empty_like(ids), np.empty_like(scores))
        graph.scores[self.clusters.order] = scores
        graph.ids[self.clusters.order] = ids
        return graph
