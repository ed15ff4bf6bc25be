"""Candidates by clusters: each row against the members of its nearest ones, as matrix products.

FAISS searches an inverted file row by row, at the speed of memory. Here the pairs (row, cluster)
are grouped by cluster, so that a cluster's members meet all rows that ask for them in one product
(performance: eight times the rate, same result).
"""

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from declip_filter.kmeans import Clusters, Labels, nearest_centers
from declip_filter.knn_select import (
    LEAST_KEY,
    MISSING,
    MOST_ROWS,
    Coarse,
    Columnwise,
    Keys,
    Products,
    largest,
    pad_columns,
    run_in_threads,
)

Candidates = npt.NDArray[np.int32]
"""Rows in the clusters' order, best first; -1 where there are fewer."""
KEPT_OF_CLUSTER = 32
"""Candidates that a row takes from each cluster it meets."""
MEMBERS_OF_GROUP = 4
"""Most members of one group that stand in a cluster as candidates: a list holds one."""
MET_TOWNS = 8
"""Towns whose clusters a row meets, to find its nearest clusters."""
SCAN_BYTES = 256 * 2**20
"""Of the candidates before selection; rows are scanned so many at once."""


@dataclass(frozen=True)
class Members:
    """Who stands in each cluster as a candidate: consecutive rows of a matrix of their own."""

    matrix: torch.Tensor
    """(number of members and padding, dim)"""
    rows: Candidates
    """The row that each member is."""
    starts: npt.NDArray[np.int64]
    """(num_clusters + 1,)"""

    @property
    def bits(self) -> int:
        """Bits of a place in a cluster."""
        return max(1, int(np.diff(self.starts).max() - 1).bit_length())


def choose_members(
    matrix: torch.Tensor, clusters: Clusters, groups: npt.NDArray[np.int32] | None
) -> Members:
    """All rows of a cluster; of a group's rows in one cluster only the first few.

    Args:
        matrix: rows in the clusters' order, and padding.
        clusters: of those rows.
        groups: of those rows, from 0.
    """
    num_rows = len(clusters.order)
    if groups is None:
        return Members(matrix, np.arange(num_rows, dtype=np.int32), clusters.starts)
    cluster = np.repeat(np.arange(clusters.num_clusters), np.diff(clusters.starts))
    keys = cluster.astype(np.int64) * (int(groups.max()) + 1) + groups
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.searchsorted(keys, keys, side="left")
    kept = np.sort(order[np.arange(num_rows) - first < MEMBERS_OF_GROUP])
    if len(kept) == num_rows:
        return Members(matrix, np.arange(num_rows, dtype=np.int32), clusters.starts)
    padding = torch.zeros(len(matrix) - num_rows, matrix.shape[1], dtype=matrix.dtype)
    return Members(
        torch.cat([matrix[torch.from_numpy(kept)], padding]),
        kept.astype(np.int32),
        np.searchsorted(kept, clusters.starts).astype(np.int64),
    )


def scan_clusters(
    matrix: torch.Tensor,
    clusters: Clusters,
    num_probes: int,
    num_candidates: int,
    *,
    groups: npt.NDArray[np.int32] | None = None,
    offset: float = 0.0,
    num_threads: int = 1,
) -> tuple[Candidates, Coarse]:
    """The best candidates of each row among the members of its nearest clusters, and their scores.

    Which clusters those are is found in the same way: each row against the clusters of its
    nearest towns.

    Args:
        matrix: rows in the clusters' order, and MOST_ROWS of padding.
        clusters: of those rows.
        num_probes: clusters that a row meets.
        num_candidates: how many it keeps.
        groups: of those rows, from 0: a row meets none of its own group.
        offset: about what a neighbor scores.
        num_threads: threads.

    Returns:
        int32 (num_rows, num_candidates), never the row itself, and coarse scores less the offset,
        float32 of the same shape, -inf where there are fewer.
    """
    members = choose_members(matrix, clusters, groups)
    centers = Members(
        torch.cat([clusters.centers, torch.zeros(MOST_ROWS, matrix.shape[1])]).to(matrix.dtype),
        np.arange(clusters.num_clusters, dtype=np.int32),
        clusters.towns,
    )
    num_rows = len(clusters.order)
    num_probes = min(num_probes, clusters.num_clusters)
    num_towns = max(
        MET_TOWNS, -(-2 * num_probes * (len(clusters.towns) - 1) // clusters.num_clusters)
    )
    towns = nearest_centers(matrix, num_rows, clusters.town_centers, num_towns, num_threads)
    found = np.full((num_rows, num_candidates), -1, dtype=np.int32)
    scores = np.full((num_rows, num_candidates), -np.inf, dtype=np.float32)
    part = max(1024, SCAN_BYTES // (max(num_probes, num_towns) * KEPT_OF_CLUSTER * 4))
    buffer = np.empty(min(part, num_rows) * max(num_probes, num_towns) * KEPT_OF_CLUSTER, np.int32)
    for start in range(0, num_rows, part):
        stop = min(start + part, num_rows)
        near = np.full((stop - start, num_probes), -1, dtype=np.int32)
        met = np.empty((stop - start, num_probes), dtype=np.float32)
        for asked, answered, told, valued, is_last in (
            (towns[start:stop], centers, near, met, False),
            (near, members, found[start:stop], scores[start:stop], True),
        ):
            kept = min(KEPT_OF_CLUSTER, told.shape[1] + is_last)
            wanted = _Part(asked, start, offset * is_last, num_threads, kept, is_last)
            keys = _scan_part(matrix, answered, wanted, groups if is_last else None, buffer)
            _keep_best(keys, answered, wanted, told, valued, groups if is_last else None)
    return found, scores


@dataclass(frozen=True)
class _Part:
    """Rows that are scanned at once."""

    probes: Labels
    """(rows, probes)"""
    first_row: int
    offset: float
    num_threads: int
    kept: int
    """Members that a row keeps of each probe."""
    of_rows: bool
    """Whether members are rows, of which none is its own neighbor."""


def _scan_part(
    matrix: torch.Tensor,
    members: Members,
    part: _Part,
    groups: npt.NDArray[np.int32] | None,
    buffer: Keys,
) -> Keys:
    """The best of every probe of some rows: keys (rows, probes, part.kept).

    A key's column is the member's place in its cluster; how many bits it has is the same for all
    clusters, so that keys of one row compare by score.
    """
    num_rows, num_probes = part.probes.shape
    found = buffer[: num_rows * num_probes * part.kept].reshape(-1, part.kept)
    found.fill(0)
    pairs = part.probes.ravel().astype(np.int64) << 32 | np.arange(num_rows * num_probes)
    pairs = pairs[pairs >= 0]
    pairs.sort()
    slots = pairs & 0xFFFFFFFF
    asking = torch.from_numpy(slots // num_probes + part.first_row)
    bounds = np.searchsorted(pairs >> 32, np.arange(len(members.starts))).tolist()
    starts = members.starts.tolist()
    local = threading.local()

    def scan(cluster: int) -> None:
        if not hasattr(local, "products"):
            local.products = Products(matrix.dtype, matrix.shape[1], part.offset)
        low, high = starts[cluster], starts[cluster + 1]
        size, kept = high - low, min(part.kept, high - low)
        if not size:
            return
        columnwise = Columnwise(size, members.bits)
        block = members.matrix[low : low + pad_columns(size)]
        step = Products.queries_at_once(size)
        for start in range(bounds[cluster], bounds[cluster + 1], step):
            stop = min(start + step, bounds[cluster + 1])
            lifted = local.products.lifted(matrix, asking[start:stop], block, size)
            if groups is not None:
                own = torch.from_numpy(groups[asking[start:stop].numpy()])
                named = torch.from_numpy(groups[members.rows[low:high]])
                lifted.masked_fill_(own[:, None] == named, MISSING)
            found[slots[start:stop], :kept] = largest(columnwise.pack(lifted), kept)

    run_in_threads(range(len(starts) - 1), scan, part.num_threads)
    return found.reshape(num_rows, num_probes, part.kept)


def _keep_best(
    keys: Keys,
    members: Members,
    part: _Part,
    found: Candidates,
    scores: Coarse,
    groups: npt.NDArray[np.int32] | None,
) -> None:
    """The best of each row's keys into ``found``, without itself and the worse of a group."""
    width = keys.shape[1] * keys.shape[2]
    columnwise = Columnwise(width)
    within = Columnwise(1, members.bits)
    num = found.shape[1]
    kept = min(num + 1 if groups is None else 2 * num, width)

    def select(start: int) -> None:
        some = keys[start : start + 2048].reshape(-1, width)
        best = largest(
            columnwise.pack(torch.from_numpy(some.copy()).view(torch.float32)), kept, in_order=True
        )
        places = columnwise.columns(best)
        chosen = np.take_along_axis(some, places, axis=1)
        probes = part.probes[start : start + 2048]
        clusters = np.take_along_axis(probes, places // part.kept, axis=1)
        near = members.rows[
            np.minimum(members.starts[clusters] + within.columns(chosen), len(members.rows) - 1)
        ]
        own = np.arange(len(some), dtype=np.int32) + np.int32(part.first_row + start)
        near[chosen < LEAST_KEY] = -1
        if part.of_rows:
            near[near == own[:, None]] = -1
        if groups is not None:
            near[later_of_group(near, groups)] = -1
        here = slice(start, start + len(some))
        near, order = close_up(near)
        valued = np.take_along_axis(within.scores(chosen), order, axis=1)
        found[here, : near.shape[1]] = near[:, :num]
        scores[here, : near.shape[1]] = np.where(near < 0, -np.inf, valued)[:, :num]

    run_in_threads(range(0, len(keys), 2048), select, part.num_threads)


def later_of_group(near: Candidates, groups: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which entries of lists have one of their group before them."""
    members = np.where(near < 0, -1 - np.arange(near.shape[1]), groups[near])
    order = np.argsort(members, axis=1, kind="stable")
    ordered = np.take_along_axis(members, order, axis=1)
    later = np.zeros_like(near, dtype=bool)
    np.put_along_axis(later, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return later


def close_up(near: Candidates) -> tuple[Candidates, npt.NDArray[np.int64]]:
    """Lists with what is missing (-1) at their ends, else in their order; and that order."""
    gaps = near < 0
    order = np.broadcast_to(np.arange(near.shape[1]), near.shape).copy()
    broken = np.flatnonzero((gaps[:, :-1] & ~gaps[:, 1:]).any(axis=1))
    order[broken] = np.argsort(gaps[broken], axis=1, kind="stable")
    near[broken] = np.take_along_axis(near[broken], order[broken], axis=1)
    return near, order
