"""The exact and the perceptual rungs of the ladder: which sample is a duplicate of which.

Each takes arrays over all samples and gives, for each sample, the row of the kept one that it is
a duplicate of, or -1. ``rank`` is the order of preference, the same at every rung: so the best of
whatever hangs together over all rungs stays, however many of them are dropped.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from declip_filter.leaders import choose_leaders
from declip_filter.near_hashes import (
    Hashes,
    Places,
    information,
    near_matches,
    near_pairs,
)

Rows = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Distances = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What pictures look like, one entry a picture."""

    hashes: Hashes
    layouts: Bytes | None
    """(pictures, 16) mean gray levels, or None where they were not measured."""
    aspects: npt.NDArray[np.float32]
    """Width over height, as stored."""

    def take(self, rows: Rows) -> "Looks":
        layouts = None if self.layouts is None else self.layouts[rows]
        return Looks(hashes=self.hashes[rows], layouts=layouts, aspects=self.aspects[rows])


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """When two pictures count as one."""

    max_distance: int
    """Most bits in which the hashes differ."""
    min_bits: int
    """Least information of a hash (:func:`declip_filter.near_hashes.information`)."""
    max_brightness_difference: int
    """Most gray levels, 0 to 255, by which any of the 16 fields differs."""
    max_aspect_change: float
    """Most relative difference of width over height."""

    def alike(self, one: Looks, left: Rows, other: Looks, right: Rows) -> Mask:
        """Whether brightness and shape agree, for pairs whose hashes are near."""
        log_change = np.abs(np.log(one.aspects[left] / other.aspects[right]))
        good: Mask = log_change <= np.log1p(self.max_aspect_change) + 1e-6
        if one.layouts is not None and other.layouts is not None:
            places = np.flatnonzero(good)
            a = one.layouts[left[places]].astype(np.int16)
            b = other.layouts[right[places]].astype(np.int16)
            good[places] = np.abs(a - b).max(axis=1) <= self.max_brightness_difference
        return good

    def brightness(self, looks: Looks) -> tuple[Rows, int]:
        """Sum of each picture's fields, and the most by which those of alike pictures differ."""
        if looks.layouts is None:
            return np.zeros(len(looks.hashes), dtype=np.int64), 0
        sums = looks.layouts.sum(axis=1, dtype=np.int64)
        return sums, self.max_brightness_difference * looks.layouts.shape[1]

    def says_enough(self, hashes: Hashes) -> Mask:
        return information(hashes) >= self.min_bits


def exact_leaders(digests: Bytes, known: Mask, rank: Rows) -> Rows:
    """Duplicates by equal digest: for each row the kept row, or -1.

    Args:
        digests: (rows, 16).
        known: (rows,) False where there is nothing to compare.
        rank: (rows,) place in the order of preference.
    """
    leader = np.full(len(rank), -1, dtype=np.int64)
    halves = np.ascontiguousarray(digests).view("<u8")
    rows = np.flatnonzero(known)
    order = rows[np.argsort(halves[rows, 0], kind="stable")]
    first = halves[order, 0]
    same = np.zeros(len(first) + 1, dtype=np.bool_)
    same[1:-1] = first[1:] == first[:-1]
    # Nearly all samples are alone; only the others are sorted by all three.
    shared = order[same[1:] | same[:-1]]
    shared = shared[np.lexsort((rank[shared], halves[shared, 1], halves[shared, 0]))]
    if not shared.size:
        return leader
    new = np.concatenate([[True], (halves[shared[1:]] != halves[shared[:-1]]).any(axis=1)])
    best = shared[np.flatnonzero(new)[np.cumsum(new) - 1]]
    leader[shared[~new]] = best[~new]
    return leader


def perceptual_leaders(
    looks: Looks,
    known: Mask,
    rank: Rows,
    likeness: Likeness,
    *,
    same_bytes: Rows | None = None,
    max_pairs: int = 1 << 24,
) -> Rows:
    """Duplicates by their looks: for each row the kept row, or -1.

    A sample whose hash says too little is compared with nothing.

    Args:
        known: (rows,) False where a picture has no hash.
        rank: (rows,) place in the order of preference.
        same_bytes: leaders by exact bytes, where known. Equal files look equal, so only one of
            them is searched for and the others go with it: the outcome is the same.
        max_pairs: near pairs held at once (some 100 bytes each while they are sorted out).
    """
    wanted = known & likeness.says_enough(looks.hashes)
    alone = wanted if same_bytes is None else wanted & (same_bytes < 0)
    rows = np.flatnonzero(alone)
    rows = rows[np.argsort(rank[rows], kind="stable")]
    mine = looks.take(rows)

    light, gap = likeness.brightness(mine)

    def neighbors(some: Rows) -> Iterator[tuple[Rows, Rows]]:
        places = Places(values=light[some], max_gap=gap)
        for left, right, _ in near_pairs(mine.hashes[some], likeness.max_distance, places):
            good = likeness.alike(mine, some[left], mine, some[right])
            yield left[good], right[good]

    def matches(chosen: Rows, rest: Rows) -> Iterator[tuple[Rows, Rows]]:
        base, queries = mine.hashes[rest], mine.hashes[chosen]
        places = (light[rest], light[chosen], gap)
        for right, left, _ in near_matches(base, queries, likeness.max_distance, places):
            good = likeness.alike(mine, chosen[left], mine, rest[right])
            yield left[good], right[good]

    local = choose_leaders(neighbors, matches, len(rows), max_pairs=max_pairs)
    leader = np.full(len(rank), -1, dtype=np.int64)
    leader[rows] = np.where(local < 0, -1, rows[local])
    if same_bytes is not None:
        copies = np.flatnonzero(wanted & (same_bytes >= 0))
        twin = same_bytes[copies]
        leader[copies] = np.where(leader[twin] < 0, twin, leader[twin])
    return leader


def hash_distances(hashes: Hashes, leader: Rows) -> Distances:
    """Bits in which each row's hash differs from its leader's; -1 where it has none."""
    distance = np.full(len(leader), -1, dtype=np.int32)
    rows = np.flatnonzero(leader >= 0)
    distance[rows] = np.bitwise_count(hashes[rows] ^ hashes[leader[rows]])
    return distance
