"""Better lists from lists: neighbors of neighbors, by the block, as matrix products.

A neighbor of a row's neighbor is likely its own. NN-descent (Dong, Moses and Li, WWW 2011) tries
such pairs one at a time. Here eight rows that lie together share one set of candidates, the
neighbors (both ways) of their neighbors (both ways): each candidate is fetched once for the eight,
and scored against all of them in one product. Two of five candidates are members of clusters that
(nearly) all of the eight have met before: those are left out.
"""

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from declip_filter.kmeans import Labels
from declip_filter.knn_graph import Rows
from declip_filter.knn_lists import Candidates, Lists
from declip_filter.knn_select import Coarse, find_positive, run_in_threads

PART_ROWS = 2**18
"""Rows that are refined before their lists are merged: a multiple of a batch."""
BLOCK_ROWS = 8
BLOCKS_AT_ONCE = 32
"""Blocks of a batch: what is done in numpy is done once for all of them."""
BLOCKS_OF_PRODUCT = 8
MET_BY = 6
"""Rows of a block that must have met a candidate's cluster for it to be left out. What all eight
have met is found in nobody's favor; at six a thirtieth of what a round finds is lost, and a
seventh of its candidates (measured on 200,000 real texts)."""
Found = tuple[Candidates, Candidates, Coarse]


def both_ways(near: Candidates, num: int) -> Candidates:
    """Each row's first neighbors, and the rows that have it among theirs, nearest first.

    Args:
        near: (rows, at least num), best first, -1 where there are fewer.
        num: how many of each kind.

    Returns:
        int32 (rows + 1, 2 * num); the row itself where there are fewer. The last is nobody's: it
        names itself only.
    """
    num_rows = near.shape[0]
    own = np.arange(num_rows, dtype=np.int32)
    ahead = near[:, :num]
    found = np.repeat(np.arange(num_rows + 1, dtype=np.int32)[:, None], 2 * num, axis=1)
    found[:-1, :num] = np.where(ahead < 0, own[:, None], ahead)
    there = ahead >= 0
    # One integer sorts by target, then by place in the list; below stands who points.
    keys = (
        (ahead.astype(np.int64) << 36)
        | (np.arange(ahead.shape[1], dtype=np.int64) << 31)
        | own[:, None].astype(np.int64)
    )[there]
    keys.sort()
    target = (keys >> 36).astype(np.int32)
    first = np.searchsorted(target, own, side="left")
    place = np.arange(len(keys)) - first[target]
    kept = place < num
    found[target[kept], num + place[kept]] = (keys[kept] & 0x7FFFFFFF).astype(np.int32)
    return found


@dataclass(frozen=True)
class Met:
    """Which rows a row has met already, by their clusters."""

    probes: Labels
    """Clusters that each row has met: (rows, probes), -1 where there are fewer."""
    cluster_of: Labels
    """The cluster that each row is a member of, -1 of none: (rows + 1,), the last nobody's."""
    num_clusters: int


def refine(
    matrix: torch.Tensor,
    lists: Lists,
    num_hops: int,
    offset: float,
    num_threads: int = 1,
    met: Met | None = None,
) -> None:
    """One round, into the lists: neighbors of neighbors, both ways, then those that list a row.

    Args:
        matrix: rows and padding, as knn_space.py makes them.
        lists: of those rows.
        num_hops: neighbors that are followed, each way; at most 31.
        offset: about what a neighbor scores.
        num_threads: threads.
        met: what need not be compared again; without it everything is.
    """
    links = both_ways(lists.near, min(num_hops, lists.width))
    limits = torch.from_numpy(lists.thresholds() + np.float32(offset)).to(matrix.dtype)
    batch = BLOCK_ROWS * BLOCKS_AT_ONCE
    local = threading.local()
    for first in range(0, lists.num_rows, PART_ROWS):
        stop = min(first + PART_ROWS, lists.num_rows)
        found: list[Found | None] = [None] * -(-(stop - first) // batch)

        def work(number: int, first: int = first, found: list[Found | None] = found) -> None:
            if not hasattr(local, "buffers"):
                local.buffers = _Buffers(matrix, met)
            start = first + number * batch
            rows = np.minimum(np.arange(start, start + batch), lists.num_rows - 1)
            found[number] = _above(links, limits, rows, local.buffers)

        run_in_threads(range(len(found)), work, num_threads)
        rows, ids, scores = (
            np.concatenate(column) for column in zip(*filter(None, found), strict=True)
        )
        lists.merge(first, stop, rows, ids, scores - np.float32(offset))
    lists.add_reverse()


class _Buffers:
    """What a thread needs for a batch of blocks."""

    def __init__(self, matrix: torch.Tensor, met: Met | None) -> None:
        self.matrix, self.met = matrix, met
        self.width = 0
        # A last column stands for no cluster and is never left set.
        self.is_met = np.zeros((BLOCKS_AT_ONCE, met.num_clusters + 1 if met else 0), dtype=bool)

    def grow(self, width: int) -> None:
        """Make room for so many candidates a block."""
        if width <= self.width:
            return
        self.width = -(-width // 256) * 256
        num = BLOCKS_OF_PRODUCT * self.width
        self.rows = torch.zeros(num, self.matrix.shape[1], dtype=self.matrix.dtype)
        self.coarse = torch.empty(BLOCKS_AT_ONCE * BLOCK_ROWS * self.width, dtype=self.matrix.dtype)

    def are_new(
        self, rows: Rows, ids: Candidates, block: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Which candidates of blocks are not members of what nearly all rows of a block have met.

        Args:
            rows: of the batch, by the block.
            ids: candidates, (any,).
            block: whose they are.
        """
        if self.met is None:
            return np.ones(len(ids), dtype=bool)
        probes = np.take(self.met.probes, rows, axis=0).reshape(BLOCKS_AT_ONCE, -1)
        probes.sort(axis=1)
        last = probes.shape[1] - MET_BY + 1
        which, place = np.nonzero(probes[:, MET_BY - 1 :] == probes[:, :last])
        common = (which, probes[which, place])
        self.is_met[common] = True
        self.is_met[:, -1] = False
        places = self.met.cluster_of.take(ids) + block * self.is_met.shape[1]
        # -1, of no cluster, is the last column of the block before, or of the last one.
        new = ~self.is_met.ravel().take(places, mode="wrap")
        self.is_met[common] = False
        return new


def _above(
    links: Candidates, limits: torch.Tensor, rows: npt.NDArray[np.int64], buffers: _Buffers
) -> tuple[Candidates, Candidates, Coarse]:
    """Candidates of the rows of a batch that score above the rows' limits."""
    matrix, nobody = buffers.matrix, len(links) - 1
    shared, counts = _candidates(links, rows, buffers)
    buffers.grow(shared.shape[1])
    # Blocks of about as many candidates are multiplied together: they are padded to the most.
    order = np.argsort(counts, kind="stable")
    # The last batch names its last row repeatedly; only the first counts.
    is_first = (np.arange(len(rows)) <= rows[-1] - rows[0]).reshape(BLOCKS_AT_ONCE, -1)
    shared, is_first = shared[order], is_first[order].ravel()
    rows = rows.reshape(BLOCKS_AT_ONCE, -1)[order].ravel()
    names = torch.from_numpy(rows)
    queries = torch.index_select(matrix, 0, names)
    limit = limits[names]
    queries[:, -1] = -limit
    queries = queries.view(BLOCKS_AT_ONCE, BLOCK_ROWS, -1)
    widths = _padded(counts[order[BLOCKS_OF_PRODUCT - 1 :: BLOCKS_OF_PRODUCT]])
    starts = np.concatenate([[0], np.cumsum(widths * (BLOCK_ROWS * BLOCKS_OF_PRODUCT))])
    for number, width in enumerate(widths.tolist()):
        blocks = slice(number * BLOCKS_OF_PRODUCT, (number + 1) * BLOCKS_OF_PRODUCT)
        taken = buffers.rows[: BLOCKS_OF_PRODUCT * width]
        wanted = np.ascontiguousarray(shared[blocks, :width]).ravel()
        torch.index_select(matrix, 0, torch.from_numpy(wanted), out=taken)
        torch.bmm(
            queries[blocks],
            taken.view(BLOCKS_OF_PRODUCT, width, -1).transpose(1, 2),
            out=buffers.coarse[starts[number] : starts[number + 1]].view(-1, BLOCK_ROWS, width),
        )
    scores = buffers.coarse[: starts[-1]]
    flat, _ = find_positive(scores[:, None])
    product = np.searchsorted(starts, flat, side="right") - 1
    asked, columns = np.divmod(flat - starts[product], widths[product])
    asked += product * (BLOCK_ROWS * BLOCKS_OF_PRODUCT)
    found, own = shared[asked // BLOCK_ROWS, columns], rows[asked]
    # Fillers seem near to rows with a limit below 0.
    useful = (found != nobody) & is_first[asked]
    flat, asked, found, own = flat[useful], asked[useful], found[useful], own[useful]
    excess = scores[torch.from_numpy(flat)].float() + limit[torch.from_numpy(asked)]
    return own.astype(np.int32), found, excess.numpy()


def _candidates(
    links: Candidates, rows: Rows, buffers: _Buffers
) -> tuple[Candidates, npt.NDArray[np.int64]]:
    """What the links of a block's links name: ids (blocks, width), and how many each has.

    Beyond those stands ``nobody``, the last of the links.
    """
    nobody = len(links) - 1
    ids, block = _distinct(np.take(links, rows, axis=0).reshape(BLOCKS_AT_ONCE, -1), nobody)
    ids, _ = _table(ids, block, nobody)
    ids = np.take(links, ids.ravel(), axis=0).reshape(BLOCKS_AT_ONCE, -1)
    ids, block = _distinct(ids, nobody)
    new = buffers.are_new(rows, ids, block)
    return _table(ids[new], block[new], nobody)


def _distinct(ids: Candidates, nobody: int) -> tuple[Candidates, npt.NDArray[np.int64]]:
    """Each block's ids once, in order, and whose they are; sorts in place."""
    ids.sort(axis=1)
    kept = ids != nobody
    kept[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    return ids[kept], np.repeat(np.arange(len(ids)), np.count_nonzero(kept, axis=1))


def _table(
    ids: Candidates, block: npt.NDArray[np.int64], nobody: int
) -> tuple[Candidates, npt.NDArray[np.int64]]:
    """Blocks' ids side by side, ``nobody`` beyond, and how many each block has."""
    counts = np.bincount(block, minlength=BLOCKS_AT_ONCE)
    table = np.full((BLOCKS_AT_ONCE, int(_padded(counts).max())), nobody, dtype=np.int32)
    table[np.arange(table.shape[1]) < counts[:, None]] = ids
    return table, counts


def _padded(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Widths at or above counts: few different ones, for each costs a kernel of oneDNN's."""
    return np.maximum(64, -(-counts // 64) * 64)
