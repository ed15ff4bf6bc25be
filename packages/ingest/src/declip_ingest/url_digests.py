"""Sets and tables of millions of URLs as 128-bit digests in sorted arrays."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_LARGEST_MERGE = 1 << 24
"""Runs of more digests than this stay as they are: merging them would want a second copy."""

Halves = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Digests:
    """128-bit digests of n texts."""

    high: Halves
    """(n,) the first 8 bytes."""
    low: Halves
    """(n,) the last 8 bytes."""

    def __len__(self) -> int:
        return len(self.high)

    def take(self, rows: npt.NDArray[np.int64] | Mask) -> "Digests":
        """Those of these rows."""
        return Digests(high=self.high[rows], low=self.low[rows])


def digest_texts(texts: pa.Array | pa.ChunkedArray) -> Digests:
    """BLAKE2b of each text's UTF-8 bytes. Two texts share one with a chance of 2^-128."""
    new = hashlib.blake2b
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    values = texts.cast(pa.binary()).to_pylist()
    data = b"".join([new(value, digest_size=16).digest() for value in values])
    halves = np.frombuffer(data, np.uint64).reshape(-1, 2)
    return Digests(high=halves[:, 0].copy(), low=halves[:, 1].copy())


class DigestSet:
    """A growing set, in sorted runs that are merged as they grow.

    n digests take 16 n bytes, and for a moment, while two runs are merged, 40 bytes for each of
    theirs (at most 16.8 million).
    """

    def __init__(self) -> None:
        self._runs: list[Digests] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    def contains(self, digests: Digests) -> Mask:
        """(n,) whether each is in the set."""
        found = np.zeros(len(digests), bool)
        for run in self._runs:
            found |= find(run, digests) >= 0
        return found

    def add(self, digests: Digests) -> Mask:
        """Add all; (n,) whether each is here for the first time: in the set and in the batch."""
        order = np.lexsort((digests.low, digests.high))
        ranked = digests.take(order)
        is_new = np.ones(len(order), bool)
        is_new[1:] = (ranked.high[1:] != ranked.high[:-1]) | (ranked.low[1:] != ranked.low[:-1])
        for run in self._runs:
            is_new &= find(run, ranked) < 0
        self._insert(ranked.take(is_new))
        first = np.zeros(len(order), bool)
        first[order[is_new]] = True  # lexsort is stable: the first of equals comes first
        return first

    def _insert(self, run: Digests) -> None:
        if not len(run):
            return
        self._runs.append(run)
        while len(self._runs) > 1 and 2 * len(self._runs[-1]) >= len(self._runs[-2]):
            if len(self._runs[-1]) + len(self._runs[-2]) > _LARGEST_MERGE:
                return
            late, early = self._runs.pop(), self._runs.pop()
            self._runs.append(_merge(early, late))

    def count_shared(self, other: "DigestSet") -> int:
        """How many digests both sets have."""
        return sum(int(other.contains(run).sum()) for run in self._runs)


def _merge(left: Digests, right: Digests) -> Digests:
    """One sorted run of two; equal high halves may stand in any order."""
    high = np.concatenate([left.high, right.high])
    order = np.argsort(high, kind="stable")
    return Digests(high=high[order], low=np.concatenate([left.low, right.low])[order])


def find(run: Digests, wanted: Digests) -> npt.NDArray[np.int64]:
    """(n,) the place of each wanted digest in a run sorted by high half; -1 where it is not."""
    if not len(run):
        return np.full(len(wanted), -1, np.int64)
    start = np.searchsorted(run.high, wanted.high)
    at = np.minimum(start, len(run) - 1)
    is_high = run.high[at] == wanted.high
    is_found = is_high & (run.low[at] == wanted.low)
    places = np.where(is_found, at, -1).astype(np.int64)
    # Two digests with the same first 8 bytes: rare enough to look through one by one.
    for row in np.flatnonzero(is_high & ~is_found):
        place = int(start[row])
        while place < len(run) and run.high[place] == wanted.high[row]:
            if run.low[place] == wanted.low[row]:
                places[row] = place
                break
            place += 1
    return places


class DigestTable:
    """From a URL's digest to a value of fixed width; the first of equal keys counts.

    n rows take 20 + width bytes each.
    """

    def __init__(self, keys: Digests, values: npt.NDArray[np.uint8]) -> None:
        """Args:
        keys: n digests in any order.
        values: (n, width).
        """
        order = np.argsort(keys.high, kind="stable")
        self._keys = keys.take(order)
        self._order = order.astype(np.uint32)
        self._values = values

    def __len__(self) -> int:
        return len(self._keys)

    def look_up(self, wanted: Digests) -> tuple[npt.NDArray[np.uint8], Mask]:
        """The values, (n, width), zeros where there is none; and (n,) whether there is one."""
        places = find(self._keys, wanted)
        is_found = places >= 0
        values = np.zeros((len(places), self._values.shape[1]), np.uint8)
        if len(self._keys):
            values[is_found] = self._values[self._order[places[is_found]]]
        return values, is_found
