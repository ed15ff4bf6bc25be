"""Better lists from lists: neighbors of neighbors, by the block, as matrix products.

A neighbor of a row's neighbor is likely its own. NN-descent (Dong, Moses and Li, WWW 2011) tries
such pairs one at a time. Here eight rows that lie together share one set of candidates, the
neighbors (both ways) of their neighbors (both ways): each candidate is fetched once for the eight,
and scored against all of them in one product.
"""

import threading

import numpy as np
import numpy.typing as npt
import torch

from declip_filter.knn_grouped import PART_ROWS
from declip_filter.knn_lists import Candidates, Lists
from declip_filter.knn_select import Coarse, find_positive, run_in_threads

BLOCK_ROWS = 8
BLOCKS_AT_ONCE = 8
Found = tuple[Candidates, Candidates, Coarse]
NOBODY = np.iinfo(np.int32).max


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


def refine(
    matrix: torch.Tensor, lists: Lists, num_hops: int, offset: float, num_threads: int = 1
) -> None:
    """One round, into the lists: neighbors of neighbors, both ways, then those that list a row.

    Args:
        matrix: rows and padding, as knn_space.py makes them.
        lists: of those rows.
        num_hops: neighbors that are followed, each way; at most 31.
        offset: about what a neighbor scores.
        num_threads: threads.
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
                local.buffers = _Buffers(matrix)
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

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.width = 0

    def grow(self, width: int) -> None:
        """Make room for so many candidates a block."""
        if width <= self.width:
            return
        self.width = width
        num = BLOCKS_AT_ONCE * width
        self.rows = torch.zeros(num, self.matrix.shape[1], dtype=self.matrix.dtype)
        self.coarse = torch.empty(num * BLOCK_ROWS, dtype=self.matrix.dtype)


def _above(
    links: Candidates, limits: torch.Tensor, rows: npt.NDArray[np.int64], buffers: _Buffers
) -> tuple[Candidates, Candidates, Coarse]:
    """Candidates of the rows of a batch that score above the rows' limits."""
    matrix, nobody = buffers.matrix, len(links) - 1
    shared = _distinct(links[rows].reshape(BLOCKS_AT_ONCE, -1), nobody)
    shared = _distinct(links[shared].reshape(BLOCKS_AT_ONCE, -1), nobody)
    width = shared.shape[1]
    buffers.grow(width)
    taken = buffers.rows[: BLOCKS_AT_ONCE * width]
    torch.index_select(matrix, 0, torch.from_numpy(shared.ravel()), out=taken)
    names = torch.from_numpy(rows)
    queries = torch.index_select(matrix, 0, names)
    queries[:, -1] = -limits[names]
    coarse = buffers.coarse[: len(rows) * width].view(BLOCKS_AT_ONCE, BLOCK_ROWS, width)
    torch.bmm(
        queries.view(BLOCKS_AT_ONCE, BLOCK_ROWS, -1),
        taken.view(BLOCKS_AT_ONCE, width, -1).transpose(1, 2),
        out=coarse,
    )
    scores = coarse.view(len(rows), width)
    asked, columns = find_positive(scores)
    # Fillers seem near to rows with a limit below 0; a last batch names its last row repeatedly.
    useful = shared[asked // BLOCK_ROWS, columns] != nobody
    useful &= asked <= rows[-1] - rows[0]
    asked, columns = asked[useful], columns[useful]
    excess = scores[torch.from_numpy(asked), torch.from_numpy(columns)].float()
    found = shared[asked // BLOCK_ROWS, columns]
    own = rows[asked]
    return own.astype(np.int32), found, (excess + limits[torch.from_numpy(own)]).numpy()


def _distinct(ids: Candidates, filler: int) -> Candidates:
    """Each block's ids once, in order, then ``filler`` up to a common width."""
    ids.sort(axis=1)
    repeated = ids[:, 1:] == ids[:, :-1]
    ids[:, 1:][repeated] = NOBODY
    ids.sort(axis=1)
    width = int((ids != NOBODY).sum(axis=1).max())
    ids = ids[:, : min(-(-width // 64) * 64, ids.shape[1])]
    return np.where(ids == NOBODY, np.int32(filler), ids)
