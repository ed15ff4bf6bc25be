"""Pairs that mean the same: near vectors within clusters (SemDeDup).

Abbas et al. 2023, "SemDeDup: Data-efficient learning at web-scale through semantic
deduplication" (arXiv 2303.09540): k-means over the embeddings, and within each cluster what is
nearer than ``1 - eps`` by cosine counts as one. Two things are settled otherwise than there.
What stays is the same sample as at the other rungs of the ladder (the largest picture, then the
smallest key) and not the one that is farthest from its centroid: two rungs that disagree about
who stays would drop both. And a duplicate is near the very sample that is kept, not near any
other duplicate (:mod:`declip_filter.leaders`).

Blocks of fixed shape and a second look in float64 at what is close to the limit make the outcome
the same for any number of threads.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from declip_filter.leaders import leaders_of

Rows = npt.NDArray[np.int64]
Singles = npt.NDArray[np.float32]

ROWS_PER_CLUSTER = 2000
"""Rows of a cluster on average where the number of clusters is not set."""
TRAINING_ROWS_PER_CLUSTER = 128
"""Rows of the sample on which centroids are trained."""
ITERATIONS = 10
LARGE_CLUSTER = 50_000
"""Rows from which a cluster is clustered again."""
ROWS_AT_ONCE = 16_384
BLOCK = 1024
"""Rows compared with rows at once within a cluster."""
ROUNDING = 1e-9
"""A vector's cosine with itself comes out this near 1."""
MARGIN = 2e-3
"""Products from this much below the limit are computed again, in float64 and with the lengths of
the vectors, which in float16 are 1 to three digits only."""


class Vectors(Protocol):
    """A tall matrix of unit vectors (:class:`declip_filter.vectors.StoredVectors` is one)."""

    @property
    def num_rows(self) -> int: ...

    @property
    def dim(self) -> int: ...

    def take(self, rows: Rows, /) -> npt.NDArray[np.floating[Any]]:
        """The rows named, in the order named: (len(rows), dim)."""


def semantic_leaders(
    vectors: Vectors,
    rank: Rows,
    *,
    min_cosine: float,
    num_clusters: int | None = None,
    seed: int = 0,
    num_threads: int = 1,
) -> tuple[Rows, Singles]:
    """For each row the kept row that it is a semantic duplicate of.

    Args:
        vectors: unit vectors, one a row.
        rank: (rows,) place of each row in the order of preference; the smallest stays.
        min_cosine: from here on two rows of a cluster count as one; SemDeDup's ``1 - eps``.
        num_clusters: k of k-means; None for one cluster per 2,000 rows. More clusters are faster,
            and part more pairs from each other.
        seed: of the sample and the centroids.
        num_threads: threads; the outcome does not depend on it.

    Returns:
        (rows,) the leader's row or -1, and (rows,) the cosine with it, 0 where there is none.
    """
    leader = np.full(vectors.num_rows, -1, dtype=np.int64)
    cosine = np.zeros(vectors.num_rows, dtype=np.float32)
    wanted = num_clusters or max(1, round(vectors.num_rows / ROWS_PER_CLUSTER))
    everything = np.arange(vectors.num_rows, dtype=np.int64)

    def settle(rows: Rows) -> tuple[Rows, Rows, Singles]:
        ordered = rows[np.argsort(rank[rows], kind="stable")]
        return ordered, *cluster_leaders(vectors, ordered, min_cosine)

    clusters = _clusters(vectors, everything, wanted, seed, num_threads)
    for ordered, found, near in _in_order(settle, clusters, num_threads):
        claimed = found >= 0
        leader[ordered[claimed]] = ordered[found[claimed]]
        cosine[ordered[claimed]] = near[claimed]
    return leader, cosine


def cluster_leaders(vectors: Vectors, rows: Rows, min_cosine: float) -> tuple[Rows, Singles]:
    """Leaders within one cluster, in blocks: memory grows with the leaders alone.

    Args:
        rows: of the cluster, the best first.

    Returns:
        For each row the place of its leader in ``rows`` or -1, and the cosine with it.
    """
    leader = np.full(len(rows), -1, dtype=np.int64)
    cosine = np.zeros(len(rows), dtype=np.float32)
    chosen: list[tuple[Rows, npt.NDArray[Any]]] = []
    for start in range(0, len(rows), BLOCK):
        places = np.arange(start, min(start + BLOCK, len(rows)), dtype=np.int64)
        block = vectors.take(rows[places])
        for known, kept in chosen:
            near = _near(block, kept, min_cosine)
            if not near[0].size:
                continue
            order = np.lexsort((near[1], near[0]))
            first = order[np.unique(near[0][order], return_index=True)[1]]
            leader[places[near[0][first]]] = known[near[1][first]]
            cosine[places[near[0][first]]] = near[2][first]
            free = leader[places] < 0
            places, block = places[free], block[free]
        one, other, values = _near(block, block, min_cosine)
        above = one < other
        one, other, values = one[above], other[above], values[above]
        local = leaders_of(one, other, len(places))
        claimed = local >= 0
        leader[places[claimed]] = places[local[claimed]]
        with_leader = local[other] == one
        cosine[places[other[with_leader]]] = values[with_leader]
        chosen.append((places[~claimed], block[~claimed]))
    return leader, cosine


def _near(
    one: npt.NDArray[Any], other: npt.NDArray[Any], min_cosine: float
) -> tuple[Rows, Rows, Singles]:
    """Pairs of rows whose cosine is at least ``min_cosine``: places and cosines."""
    rough = one.astype(np.float32) @ other.astype(np.float32).T
    left, right = np.nonzero(rough >= min_cosine - MARGIN)
    values = np.empty(len(left), dtype=np.float64)
    for start in range(0, len(left), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        a, b = one[left[part]].astype(np.float64), other[right[part]].astype(np.float64)
        length = np.sqrt(np.einsum("ij,ij->i", a, a) * np.einsum("ij,ij->i", b, b))
        values[part] = np.einsum("ij,ij->i", a, b) / length
    near = values >= min_cosine - ROUNDING
    return left[near], right[near], values[near].astype(np.float32)


def _clusters(
    vectors: Vectors, rows: Rows, num_clusters: int, seed: int, num_threads: int
) -> Iterator[Rows]:
    """Parts of ``rows`` by k-means; a part that is large is parted again."""
    if num_clusters < 2 or len(rows) < 2:
        yield rows
        return
    label = _assign(vectors, rows, num_clusters, seed, num_threads)
    order = np.argsort(label, kind="stable")
    starts = np.flatnonzero(np.diff(label[order], prepend=-1))
    for part in np.split(rows[order], starts[1:]):
        if len(part) <= LARGE_CLUSTER or len(part) > 0.9 * len(rows):
            yield part
        else:
            again = math.ceil(len(part) / ROWS_PER_CLUSTER)
            yield from _clusters(vectors, part, again, seed, num_threads)


def _assign(
    vectors: Vectors, rows: Rows, num_clusters: int, seed: int, num_threads: int
) -> npt.NDArray[np.int32]:
    """Cluster of each row: spherical k-means trained on a sample, single-threaded by block."""
    import faiss

    num_clusters = min(num_clusters, len(rows))
    rng = np.random.default_rng(seed)
    size = min(len(rows), num_clusters * TRAINING_ROWS_PER_CLUSTER)
    sample = rows[np.sort(rng.choice(len(rows), size, replace=False))]
    threads = faiss.omp_get_max_threads()
    # The sums of k-means, and so its centroids, depend on the number of threads.
    faiss.omp_set_num_threads(1)
    try:
        means = faiss.Kmeans(
            vectors.dim, num_clusters, niter=ITERATIONS, spherical=True, seed=seed + 1,
            min_points_per_centroid=1, max_points_per_centroid=TRAINING_ROWS_PER_CLUSTER,
        )  # fmt: skip
        means.train(_singles(vectors, sample))
        index = faiss.IndexFlatIP(vectors.dim)
        index.add(np.asarray(means.centroids))
    finally:
        faiss.omp_set_num_threads(threads)

    def nearest(part: Rows) -> npt.NDArray[np.int32]:
        faiss.omp_set_num_threads(1)
        found: npt.NDArray[np.int64] = index.search(_singles(vectors, part), 1)[1]
        return found[:, 0].astype(np.int32)

    parts = (rows[at : at + ROWS_AT_ONCE] for at in range(0, len(rows), ROWS_AT_ONCE))
    labels = list(_in_order(nearest, parts, num_threads))
    faiss.omp_set_num_threads(threads)
    return np.concatenate(labels)


def _singles(vectors: Vectors, rows: Rows) -> Singles:
    return np.ascontiguousarray(vectors.take(rows), dtype=np.float32)


def _in_order(work: Any, items: Iterator[Rows], num_threads: int) -> Iterator[Any]:
    """``work`` of each item, in the items' order, at most two items a thread under way."""
    if num_threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: list[Any] = []
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * num_threads:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
