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
from declip_filter.knn_lists import Candidates, Groups, Lists
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

MEMBERS_OF_GROUP = 4
"""Most members of one group that stand in a cluster as candidates: a list holds one."""
FEW_CLUSTERS = 2048
"""A row meets the centers of so many clusters, all of them; with more it meets those of towns."""
MET_TOWNS = 10
"""Towns whose clusters a row meets, to find its nearest clusters."""
PART_ROWS = 2**18
"""Rows that meet further clusters at once."""
MOST_KEPT = 32
"""Members that a row keeps of a cluster, or clusters of a town."""
BUFFER_KEYS = 2**25
"""Most of them before selection."""


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


class Scan:
    """Clusters that are met one after the other, nearest first."""

    def __init__(
        self,
        matrix: torch.Tensor,
        clusters: Clusters,
        *,
        most_probes: int,
        offset: float,
        groups: Groups | None = None,
        num_threads: int = 1,
    ) -> None:
        """Find the nearest clusters of each row, among those of its nearest towns.

        Args:
            matrix: rows in the clusters' order, and MOST_ROWS of padding.
            clusters: of those rows.
            most_probes: clusters that a row can meet.
            offset: about what a neighbor scores.
            groups: of those rows, from 0: a row meets none of its own group.
            num_threads: threads.
        """
        self.matrix, self.offset, self.num_threads = matrix, offset, num_threads
        self.num_rows = len(clusters.order)
        self.groups = groups
        self.members = choose_members(matrix, clusters, groups)
        self.probes = self._nearest_clusters(clusters, min(most_probes, clusters.num_clusters))

    @property
    def most_probes(self) -> int:
        """Clusters that a row can meet."""
        return int(self.probes.shape[1])

    def _nearest_clusters(self, clusters: Clusters, num: int) -> Labels:
        if clusters.num_clusters <= FEW_CLUSTERS:
            return nearest_centers(
                self.matrix, self.num_rows, clusters.centers, num, self.num_threads
            )
        num_towns = len(clusters.towns) - 1
        met = max(MET_TOWNS, -(-2 * num * num_towns // clusters.num_clusters))
        towns = nearest_centers(
            self.matrix, self.num_rows, clusters.town_centers, met, self.num_threads
        )
        padding = torch.zeros(MOST_ROWS, self.matrix.shape[1])
        centers = Members(
            torch.cat([clusters.centers, padding]).to(self.matrix.dtype),
            np.arange(clusters.num_clusters, dtype=np.int32),
            clusters.towns,
        )
        probes = np.full((self.num_rows, num), -1, dtype=np.int32)
        scores = np.empty((self.num_rows, num), dtype=np.float32)
        self._meet(centers, towns, probes, scores, is_of_rows=False)
        return probes

    def first_lists(self, num_probes: int, width: int) -> Lists:
        """The best candidates of each row among the members of its first few clusters."""
        near = np.full((self.num_rows, width), -1, dtype=np.int32)
        scores = np.full((self.num_rows, width), -np.inf, dtype=np.float32)
        self._meet(self.members, self.probes[:, :num_probes], near, scores, is_of_rows=True)
        return Lists(near, scores, self.groups)

    def _meet(
        self,
        members: Members,
        probes: Labels,
        near: Candidates,
        scores: Coarse,
        *,
        is_of_rows: bool,
    ) -> None:
        """The best of the members of probed clusters into ``near`` and ``scores``."""
        num_rows, num_probes = probes.shape
        kept = min(MOST_KEPT, near.shape[1] + is_of_rows)
        step = max(2048, BUFFER_KEYS // (num_probes * kept))
        buffer = np.empty(min(step, num_rows) * num_probes * kept, dtype=np.int32)
        for start in range(0, num_rows, step):
            here = slice(start, start + step)
            part = _Part(
                probes[here], start, self.offset * is_of_rows, self.num_threads, kept, is_of_rows
            )
            groups = self.groups if is_of_rows else None
            keys = _scan_part(self.matrix, members, part, groups, buffer)
            _keep_best(keys, members, part, near[here], scores[here], groups)

    def widen(self, lists: Lists, first_probe: int, last_probe: int) -> None:
        """Meet further clusters: ``first_probe`` to ``last_probe`` (not included).

        Only what scores above a row's last candidate so far is looked at, a few of a thousand.
        """
        limits = torch.from_numpy(lists.thresholds()).to(self.matrix.dtype)
        for start in range(0, self.num_rows, PART_ROWS):
            stop = min(start + PART_ROWS, self.num_rows)
            probes = self.probes[start:stop, first_probe:last_probe]
            found = self._above(limits, probes, start)
            lists.merge(start, stop, *found)
        lists.add_reverse()

    def _above(
        self, limits: torch.Tensor, probes: Labels, first_row: int
    ) -> tuple[Candidates, Candidates, Coarse]:
        """Candidates above their rows' limits: rows, candidates, scores."""
        members = self.members
        asking, _, bounds = group_by_cluster(probes, first_row, len(members.starts) - 1)
        starts = members.starts.tolist()
        found: list[list[tuple[Candidates, Candidates, Coarse]]] = [[] for _ in starts[1:]]
        local = threading.local()

        def scan(cluster: int) -> None:
            if not hasattr(local, "products"):
                local.products = Products(self.matrix.dtype, self.matrix.shape[1], self.offset)
            low, high = starts[cluster], starts[cluster + 1]
            if low == high:
                return
            block = members.matrix[low : low + pad_columns(high - low)]
            step = Products.queries_at_once(high - low)
            for start in range(bounds[cluster], bounds[cluster + 1], step):
                asked = asking[start : min(start + step, bounds[cluster + 1])]
                rows, columns, scores = local.products.above(
                    self.matrix, asked, limits[asked], block, high - low
                )
                names = asked.numpy()[rows].astype(np.int32)
                found[cluster].append((names, members.rows[low + columns], scores))

        run_in_threads(range(len(found)), scan, self.num_threads)
        every = [piece for pieces in found for piece in pieces]
        if not every:
            nobody = np.empty(0, dtype=np.int32)
            return nobody, nobody, np.empty(0, dtype=np.float32)
        rows, ids, scores = (np.concatenate(column) for column in zip(*every, strict=True))
        return rows, ids, scores


def group_by_cluster(
    probes: Labels, first_row: int, num_clusters: int
) -> tuple[torch.Tensor, npt.NDArray[np.int64], list[int]]:
    """Pairs of row and probed cluster, by cluster.

    Args:
        probes: (rows, probes), -1 where there are fewer.
        first_row: number of the first of those rows.
        num_clusters: how many there are.

    Returns:
        Rows int64 (pairs,), their places in ``probes.ravel()``, and where each cluster's begin.
    """
    pairs = probes.ravel().astype(np.int64) << 32 | np.arange(probes.size)
    pairs = pairs[pairs >= 0]
    pairs.sort()
    slots = pairs & 0xFFFFFFFF
    rows = torch.from_numpy(slots // probes.shape[1] + first_row)
    return rows, slots, np.searchsorted(pairs >> 32, np.arange(num_clusters + 1)).tolist()


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
    asking, slots, bounds = group_by_cluster(part.probes, part.first_row, len(members.starts) - 1)
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
        worth = np.where(near < 0, np.float32(-np.inf), within.scores(chosen))
        # By the members' keys, which have more bits than the places' among all of a row's.
        order = np.argsort(-worth, axis=1, kind="stable")[:, :num]
        found[here, : order.shape[1]] = np.take_along_axis(near, order, axis=1)
        scores[here, : order.shape[1]] = np.take_along_axis(worth, order, axis=1)

    run_in_threads(range(0, len(keys), 2048), select, part.num_threads)


def later_of_group(near: Candidates, groups: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which entries of lists have one of their group before them."""
    members = np.where(near < 0, -1 - np.arange(near.shape[1]), groups[near])
    order = np.argsort(members, axis=1, kind="stable")
    ordered = np.take_along_axis(members, order, axis=1)
    later = np.zeros_like(near, dtype=bool)
    np.put_along_axis(later, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return later
