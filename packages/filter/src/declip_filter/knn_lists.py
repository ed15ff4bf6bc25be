"""Candidate lists while they are searched for: merged in place, in bounded memory."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from declip_filter.knn_select import Coarse

Candidates = npt.NDArray[np.int32]
"""Rows in the clusters' order, best first; -1 where there are fewer."""
Groups = npt.NDArray[np.int32]
ROWS_AT_ONCE = 2**18
"""Rows whose new candidates are sorted at once."""
CLOSED_AT_ONCE = 2048
"""Rows whose lists are closed at once: few enough for a core's cache."""
STEP_BITS = 23
MOST_ROWS = 2**28
LOWEST = np.float32(-2)


@dataclass(frozen=True)
class Lists:
    """The best candidates of each row so far."""

    near: Candidates
    """(rows, width)"""
    scores: Coarse
    """(rows, width)"""
    groups: Groups | None = None
    """From 0, (rows,): rows of one group are not neighbors, and a list has one of each at most."""

    @property
    def num_rows(self) -> int:
        return int(self.near.shape[0])

    @property
    def width(self) -> int:
        return int(self.near.shape[1])

    def thresholds(self) -> Coarse:
        """What a candidate must score above to be of use: (rows,)."""
        return np.maximum(self.scores[:, -1], LOWEST)

    def merge(
        self, first: int, stop: int, rows: Candidates, ids: Candidates, scores: Coarse
    ) -> None:
        """Take candidates into the lists of rows from ``first`` to ``stop`` (not included).

        Args:
            first, stop: at most ROWS_AT_ONCE.
            rows: whose candidates they are, (candidates,), any order.
            ids: the candidates; a row itself and members of its group are left out.
            scores: theirs.
        """
        useful = (ids != rows) & (scores > self.scores[rows, -1])
        if self.groups is not None:
            useful &= self.groups[rows] != self.groups[ids]
        rows, ids, scores = rows[useful] - np.int32(first), ids[useful], scores[useful]
        if self.groups is not None:  # else a group's members crowd the others out
            best = _best_of_groups(rows, self.groups[ids], scores)
            rows, ids, scores = rows[best], ids[best], scores[best]
        entries, target, place = _best_of_targets(rows, scores, stop - first, self.width)
        packed = _pack(ids[entries], scores[entries])
        for start in range(0, stop - first, CLOSED_AT_ONCE):
            end = min(start + CLOSED_AT_ONCE, stop - first)
            own = slice(first + start, first + end)
            here = slice(*np.searchsorted(target, (start, end)))
            table = np.full((end - start, 2 * self.width), -1, dtype=np.int64)
            table[:, : self.width] = _pack(self.near[own], self.scores[own])
            table[target[here] - start, self.width + place[here]] = packed[here]
            self._close(own, table)

    def add_reverse(self) -> None:
        """Give each row the rows that list it: what one of a pair saw, both know.

        A row does not meet the clusters of all rows that meet its own. On real text this finds a
        quarter of what a scan missed, at no product at all.
        """
        limits = np.append(self.scores[:, -1], np.float32(np.inf))  # the last is nobody's
        near, scores = self.near.ravel(), self.scores.ravel()
        entries = np.flatnonzero(scores > limits[near])
        rows, ids = near[entries], (entries // self.width).astype(np.int32)
        scores = scores[entries]
        for first in range(0, self.num_rows, ROWS_AT_ONCE):
            stop = min(first + ROWS_AT_ONCE, self.num_rows)
            if stop - first == self.num_rows:
                self.merge(first, stop, rows, ids, scores)
            else:
                here = (rows >= first) & (rows < stop)
                self.merge(first, stop, rows[here], ids[here], scores[here])

    def _close(self, own: slice, table: npt.NDArray[np.int64]) -> None:
        """The best of a table of candidates into the lists, each once; less than 0 is nothing."""
        table.sort(axis=1)
        ids = table >> STEP_BITS
        again = np.zeros_like(ids, dtype=bool)
        again[:, :-1] = ids[:, :-1] == ids[:, 1:]
        keys = ((table & (2**STEP_BITS - 1)) << 32) | (2**31 - 1 - ids)
        keys[again] = -1
        keys[table < 0] = -1
        if self.groups is not None:
            _drop_later_of_group(keys, self.groups)
        keys.sort(axis=1)
        best = keys[:, ::-1][:, : self.width]
        self.near[own] = np.where(best < 0, -1, 2**31 - 1 - (best & (2**32 - 1)))
        self.scores[own] = np.where(best < 0, -np.inf, _unpack_score(best >> 32))


def _pack(ids: Candidates, scores: Coarse) -> npt.NDArray[np.int64]:
    """Integers that sort by id and then by score, which keeps 20 bits behind the point."""
    steps = (np.clip(scores, -4, 3.99) + np.float32(4)) * np.float32(2**20)
    return (ids.astype(np.int64) << STEP_BITS) | steps.astype(np.int64)  # -1 stays negative


def _unpack_score(steps: npt.NDArray[np.int64]) -> Coarse:
    return steps.astype(np.float32) * np.float32(2**-20) - np.float32(4)


def _best_of_targets(
    targets: Candidates, scores: Coarse, num_targets: int, width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The best few entries of each target: entries, their targets, their places from 0.

    One integer sorts by target, then by (rough) score, and says which entry it was: sorting is four
    times as fast as finding the order.
    """
    entry_bits = max(1, len(targets).bit_length())
    score_bits = min(16, 63 - num_targets.bit_length() - entry_bits)
    rough = np.clip(
        (scores + np.float32(4)) * np.float32(2 ** (score_bits - 3)), 0, 2**score_bits - 1
    )
    keys = targets.astype(np.int64) << (entry_bits + score_bits)
    keys |= (2**score_bits - 1 - rough.astype(np.int64)) << entry_bits
    keys |= np.arange(len(targets))
    keys.sort()
    found = keys >> (entry_bits + score_bits)
    place = np.arange(len(found)) - np.searchsorted(found, np.arange(num_targets))[found]
    kept = place < width
    return keys[kept] & (2**entry_bits - 1), found[kept], place[kept]


def _best_of_groups(rows: Candidates, groups: Groups, scores: Coarse) -> npt.NDArray[np.int64]:
    """Entries that are the best of their row and group."""
    order = np.lexsort((-scores, groups, rows))
    rows, groups = rows[order], groups[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (rows[1:] != rows[:-1]) | (groups[1:] != groups[:-1])
    return order[is_first]


def _drop_later_of_group(keys: npt.NDArray[np.int64], groups: Groups) -> None:
    """Of each row's candidates keep the best of a group; the others become -1."""
    keys.sort(axis=1)
    keys[:] = keys[:, ::-1]
    ids = 2**31 - 1 - (keys & (2**32 - 1))
    members = np.where(keys < 0, -1 - np.arange(keys.shape[1]), groups[np.where(keys < 0, 0, ids)])
    order = np.argsort(members, axis=1, kind="stable")
    ordered = np.take_along_axis(members, order, axis=1)
    later = np.zeros_like(keys, dtype=bool)
    np.put_along_axis(later, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    keys[later] = -1
