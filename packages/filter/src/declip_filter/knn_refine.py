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

from declip_filter.knn_grouped import Candidates, close_up, later_of_group
from declip_filter.knn_select import LIFT, MISSING, Coarse, Columnwise, largest, run_in_threads

BLOCK_ROWS = 8
BLOCKS_AT_ONCE = 8
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


def add_reverse(near: Candidates, scores: Coarse) -> Candidates:
    """Lists with the rows that list them, by score: what one of a pair saw, both know.

    A row does not meet the clusters of all rows that meet its own. On real text this finds a
    quarter of what a scan missed, at no product at all.

    Args:
        near: (rows, candidates), best first, -1 where there are fewer.
        scores: of those, any scale, -inf where there are fewer.

    Returns:
        int32 (rows, candidates), best first, -1 where there are fewer.
    """
    num_rows, width = near.shape
    steps = np.clip(scores.astype(np.float64) * 2**20 + 2**22, 0, 2**23 - 1).astype(np.int64)
    own = np.repeat(np.arange(num_rows, dtype=np.int64), width)
    there = near.ravel() >= 0
    target = near.ravel()[there].astype(np.int64)
    # By target, and there by score: of many that name a row only the best can be its neighbors.
    order = np.argsort((target << 24) | (2**23 - 1 - steps.ravel()[there]), kind="stable")
    target, source = target[order], own[there][order]
    worth = steps.ravel()[there][order]
    place = np.arange(len(target)) - np.searchsorted(target, np.arange(num_rows))[target]
    kept = place < width
    keys = np.full((num_rows, 2 * width), -1, dtype=np.int64)
    ids = near.astype(np.int64)
    keys[:, :width] = np.where(ids < 0, -1, (ids << 24) | steps)
    keys[target[kept], width + place[kept]] = (source[kept] << 24) | worth[kept]
    keys.sort(axis=1)
    ids = keys >> 24
    again = np.zeros_like(ids, dtype=bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    by_score = np.where(again | (keys < 0), -1, ((keys & (2**24 - 1)) << 32) | (2**31 - 1 - ids))
    by_score.sort(axis=1)
    best = by_score[:, ::-1][:, :width]
    return np.where(best < 0, -1, 2**31 - 1 - (best & (2**32 - 1))).astype(np.int32)


def refine(
    matrix: torch.Tensor,
    near: Candidates,
    *,
    num_hops: int,
    offset: float = 0.0,
    groups: npt.NDArray[np.int32] | None = None,
    num_threads: int = 1,
) -> Candidates:
    """One round: the best of each row's candidates among neighbors of neighbors.

    Args:
        matrix: (more than rows, dim), unit length, padded as knn_space.py does.
        near: (rows, candidates), best first, -1 where there are fewer.
        num_hops: neighbors that are followed, each way; at most 31.
        offset: about what a neighbor scores.
        groups: of the rows, from 0.
        num_threads: threads.

    Returns:
        int32 like ``near``.
    """
    links = both_ways(near, num_hops)
    found = np.full_like(near, -1)
    part = BLOCK_ROWS * BLOCKS_AT_ONCE
    local = threading.local()

    def work(start: int) -> None:
        if not hasattr(local, "buffers"):
            local.buffers = _Buffers(matrix.dtype, matrix.shape[1], offset)
        _refine_part(matrix, links, start, found, groups, local.buffers)

    run_in_threads(range(0, near.shape[0], part), work, num_threads)
    return found


class _Buffers:
    """What a thread needs for a batch of blocks."""

    def __init__(self, dtype: torch.dtype, dim: int, offset: float) -> None:
        self.dtype, self.dim, self.offset = dtype, dim, offset
        self.width = 0

    def grow(self, width: int) -> None:
        """Make room for so many candidates a block."""
        if width <= self.width:
            return
        self.width = width
        num = BLOCKS_AT_ONCE * width
        self.rows = torch.zeros(num, self.dim, dtype=self.dtype)
        self.coarse = torch.empty(num * BLOCK_ROWS, dtype=self.dtype)
        self.lifted = torch.empty(num * BLOCK_ROWS, dtype=torch.float32)


def _refine_part(
    matrix: torch.Tensor,
    links: Candidates,
    start: int,
    found: Candidates,
    groups: npt.NDArray[np.int32] | None,
    buffers: _Buffers,
) -> None:
    """Refine the rows of one batch of blocks, written into ``found``."""
    num_rows = len(links) - 1
    rows = np.minimum(np.arange(start, start + BLOCK_ROWS * BLOCKS_AT_ONCE), num_rows - 1)
    rows = rows.reshape(BLOCKS_AT_ONCE, BLOCK_ROWS)
    shared = _distinct(links[rows], num_rows)
    shared = _distinct(links[shared], num_rows)
    width = shared.shape[1]
    buffers.grow(width)
    taken = buffers.rows[: BLOCKS_AT_ONCE * width]
    torch.index_select(matrix, 0, torch.from_numpy(shared.ravel()), out=taken)
    taken = taken.view(BLOCKS_AT_ONCE, width, -1)
    queries = matrix[torch.from_numpy(rows)]
    queries[:, :, -1] = -buffers.offset
    coarse = buffers.coarse[: rows.size * width].view(BLOCKS_AT_ONCE, BLOCK_ROWS, width)
    torch.bmm(queries, taken.transpose(1, 2), out=coarse)
    lifted = buffers.lifted[: rows.size * width].view(BLOCKS_AT_ONCE, BLOCK_ROWS, width)
    columnwise = Columnwise(width)
    lifted.copy_(coarse).add_(LIFT)
    if groups is not None:
        own_group = groups[shared][:, None, :] == groups[rows][:, :, None]
        lifted.masked_fill_(torch.from_numpy(own_group), MISSING)
    num = found.shape[1]
    best = largest(
        columnwise.pack(lifted), min(num + 1 + num * (groups is not None), width), in_order=True
    )
    near = np.take_along_axis(shared[:, None, :], columnwise.columns(best), axis=2)
    near[columnwise.are_missing(best) | (near == rows[:, :, None])] = -1
    near = near.reshape(rows.size, -1)
    if groups is not None:
        near[later_of_group(near, groups)] = -1
    near, _ = close_up(near)
    stop = min(start + rows.size, num_rows)
    found[start:stop, : near.shape[1]] = near[: stop - start, :num]


def _distinct(ids: Candidates, filler: int) -> Candidates:
    """Each block's ids once, in order, then ``filler`` up to a common width."""
    ids = ids.reshape(len(ids), -1)
    ids.sort(axis=1)
    repeated = ids[:, 1:] == ids[:, :-1]
    ids[:, 1:][repeated] = NOBODY
    ids.sort(axis=1)
    width = int((ids != NOBODY).sum(axis=1).max())
    ids = ids[:, : min(-(-width // 64) * 64, ids.shape[1])]
    return np.where(ids == NOBODY, np.int32(filler), ids)
