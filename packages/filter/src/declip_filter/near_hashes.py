"""All pairs of 64-bit hashes that differ in few bits: exact, without comparing all with all.

Two hashes that differ in at most ``d`` bits differ in at most ``d`` of ``m`` blocks of bits, so
they are equal on some ``m - d`` blocks (pigeonhole). For each choice of ``m - d`` blocks the
hashes are sorted by these bits, and only those equal on them are compared. A pair is reported at
the first choice at which it is equal, hence once. A bucket that is still large is searched in
the same way by the bits that are left. (Banding by more than one block at a time: Manku et al.
2007, "Detecting near-duplicates for web crawling", section 3.)

Where a number goes with each hash and near things differ little in it (the brightness of a
picture), a bucket is sorted by it and only neighbors are compared.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from declip_shards import DeclipError

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Distances = npt.NDArray[np.int32]
Pairs = tuple[Rows, Rows, Distances]
"""Left row, right row, bits in which they differ; one entry a pair."""

NUM_BITS = 64
MAX_DISTANCE = 16
"""Beyond it unlike pictures are as near as copies, and the search degenerates."""
LARGE_BUCKET = 4096
"""A bucket with as many comparisons as one of so many rows is searched by the bits left."""
MATCHES_AT_ONCE = 1 << 20
"""Pairs compared at once: some 50 MB."""
MOST_CHOICES = 500
SAMPLE = 20_000
"""Rows from which the cost of a division into blocks is estimated."""
_CHOICE_COST, _SORT_COST, _PAIR_COST = 200_000.0, 300.0, 12.0
"""Nanoseconds, measured: a choice of blocks, sorting and gathering a row, comparing a pair."""
# Neighboring bits of a picture's hash hang together; a step of 25 sets the bits of a block apart.
_SPREAD = tuple(place * 25 % NUM_BITS for place in range(NUM_BITS))


@dataclass(frozen=True, kw_only=True)
class Places:
    """A whole number for each hash, by which near ones differ little."""

    values: Rows
    max_gap: int
    """Most difference of two that are near."""


def parse_hashes(digits: Sequence[str]) -> Hashes:
    """Hashes of 16 hex digits as numbers.

    Raises:
        DeclipError: one is not of 16 hex digits.
    """
    try:
        data = bytes.fromhex("".join(digits))
        if len(data) == 8 * len(digits) and all(len(d) == 16 for d in digits):
            return np.frombuffer(data, dtype=">u8").astype(np.uint64)
    except ValueError:
        pass
    bad = next(d for d in digits if len(d) != 16 or set(d.lower()) - set("0123456789abcdef"))
    raise DeclipError(
        f"{bad!r} is no 64-bit hash: 16 hex digits are due; rerun the stage that measures."
    )


def information(hashes: Hashes) -> Distances:
    """How much a hash says: its bits set or its bits unset, whichever are fewer; 0 to 32.

    A flat picture has none of one kind; so have all flat pictures, which are no copies of each
    other for that.
    """
    ones = np.bitwise_count(hashes).astype(np.int32)
    return np.minimum(ones, NUM_BITS - ones)


def near_pairs(hashes: Hashes, max_distance: int, places: Places | None = None) -> Iterator[Pairs]:
    """Every pair of rows whose hashes differ in at most ``max_distance`` bits, once, in parts.

    Args:
        hashes: (rows,), repeats allowed.
        max_distance: 0 to 16.
        places: also only pairs that are near by these.

    Yields:
        Left rows, right rows (left < right) and distances; the order of pairs is of no meaning.
    """
    _check_distance(max_distance)
    if places is None:
        places = Places(values=np.zeros(len(hashes), dtype=np.int64), max_gap=0)
    rows = np.argsort(places.values, kind="stable")
    yield from _search(hashes, rows, places, _SPREAD, max_distance)


def near_matches(
    base: Hashes,
    queries: Hashes,
    max_distance: int,
    places: tuple[Rows, Rows, int] | None = None,
) -> Iterator[Pairs]:
    """Every (row of ``base``, row of ``queries``) within ``max_distance`` bits, once, in parts.

    Args:
        places: numbers of base and of queries, and the most by which near ones differ.
    """
    _check_distance(max_distance)
    if not len(base) or not len(queries):
        return
    nothing = (np.zeros(len(base), np.int64), np.zeros(len(queries), np.int64), 0)
    at_base, at_queries, gap = nothing if places is None else places
    lowest = min(int(at_base.min()), int(at_queries.min()))
    span = max(int(at_base.max()), int(at_queries.max())) - lowest + 2 * gap + 1
    ordered = np.argsort(at_base, kind="stable")
    known = Places(values=at_base, max_gap=gap)
    num_blocks, _ = _choose_blocks(base, ordered, known, _SPREAD, max_distance, len(queries))
    for mask, earlier in _choices(_SPREAD, num_blocks, max_distance):
        order = ordered[np.argsort((base & mask)[ordered], kind="stable")]
        keys, bucket = np.unique((base & mask)[order], return_inverse=True)
        line = bucket * span + at_base[order] - lowest + gap
        wanted = np.searchsorted(keys, queries & mask)
        exists = keys[np.minimum(wanted, len(keys) - 1)] == queries & mask
        middle = wanted * span + at_queries - lowest + gap
        low = np.searchsorted(line, middle - gap, side="left")
        counts = np.where(exists, np.searchsorted(line, middle + gap, side="right") - low, 0)
        for start, stop in slices(counts):
            found = counts[start:stop]
            query = np.repeat(np.arange(start, stop, dtype=np.int64), found)
            within = np.arange(len(query)) - np.repeat(np.cumsum(found) - found, found)
            row = order[np.repeat(low[start:stop], found) + within]
            near, distance = _verify(base[row] ^ queries[query], max_distance, earlier)
            if near.size:
                yield row[near], query[near], distance


def _check_distance(max_distance: int) -> None:
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise DeclipError(
            f"the distance of hashes is {max_distance}; it must be from 0 to {MAX_DISTANCE} bits. "
            "Choose another."
        )


def _choose_blocks(
    hashes: Hashes,
    rows: Rows,
    places: Places,
    positions: Sequence[int],
    distance: int,
    num_queries: int | None = None,
) -> tuple[int, float]:
    """The number of blocks for which sorting and comparing together cost least, and that cost.

    Hashes of pictures are far from even, so the comparisons are counted on a sample of the rows
    and of the choices.
    """
    sample = rows[:: max(1, len(rows) // SAMPLE)]
    scale = len(rows) / len(sample)
    per_pair = scale**2 if num_queries is None else 2 * scale * num_queries / len(sample)
    best, least = distance + 1, math.inf
    for blocks in range(distance + 1, min(len(positions), distance + 8) + 1):
        num_choices = math.comb(blocks, distance)
        sorting = num_choices * (len(rows) * _SORT_COST + _CHOICE_COST)
        if sorting >= least or (blocks > distance + 1 and num_choices > MOST_CHOICES):
            break
        compared = []
        for mask, _ in list(_choices(positions, blocks, distance))[:: -(-num_choices // 5)]:
            keys = hashes[sample] & mask
            order = np.argsort(keys, kind="stable")
            ends = _ends(keys[order], places.values[sample[order]], places.max_gap)
            compared.append(int((ends - np.arange(len(ends)) - 1).sum()))
        pairs = sum(compared) / len(compared) * per_pair
        cost = sorting + num_choices * pairs * _PAIR_COST
        if cost < least:
            best, least = blocks, cost
    return best, least


def _choices(
    positions: Sequence[int], num_blocks: int, distance: int
) -> Iterator[tuple[np.uint64, list[np.uint64]]]:
    """For each choice of blocks: its bits, and the blocks left out that come before its last.

    A pair that is equal on one of the latter was found at an earlier choice.
    """
    masks = [
        np.uint64(sum(1 << place for place in positions[block::num_blocks]))
        for block in range(num_blocks)
    ]
    for chosen in itertools.combinations(range(num_blocks), num_blocks - distance):
        mask = np.bitwise_or.reduce([masks[block] for block in chosen])
        yield mask, [masks[block] for block in range(chosen[-1]) if block not in chosen]


def _ends(keys: Hashes, values: Rows, max_gap: int) -> Rows:
    """For each entry the end of those behind it with its key and a value within the gap.

    Entries are sorted by key, those of one key by value.
    """
    if not len(keys):
        return np.empty(0, dtype=np.int64)
    bucket = np.cumsum(np.concatenate([[False], keys[1:] != keys[:-1]]), dtype=np.int64)
    lowest = int(values.min())
    line = bucket * (int(values.max()) - lowest + max_gap + 1) + (values - lowest)
    return np.searchsorted(line, line + max_gap, side="right")


def _search(
    hashes: Hashes, rows: Rows, places: Places, positions: Sequence[int], distance: int
) -> Iterator[Pairs]:
    """Near pairs among ``rows``, sorted by place, which agree in all bits but ``positions``."""
    if len(rows) < 2:
        return
    same = np.zeros(len(rows), dtype=np.uint64)
    ends = _ends(same, places.values[rows], places.max_gap)
    num_blocks, cost = distance + 1, math.inf
    if len(positions) > distance + 1:
        num_blocks, cost = _choose_blocks(hashes, rows, places, positions, distance)
    if float((ends - np.arange(len(ends)) - 1).sum()) * _PAIR_COST <= cost:
        yield from _compare(hashes, rows, ends, distance, [])
        return
    for mask, earlier in _choices(positions, num_blocks, distance):
        keys = hashes[rows] & mask
        order = np.argsort(keys, kind="stable")
        keys, members = keys[order], rows[order]
        ends = _ends(keys, places.values[members], places.max_gap)
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        stops = np.append(starts[1:], len(keys))
        compared = np.add.reduceat(ends - np.arange(len(ends)) - 1, starts)
        free = [place for place in positions if not (int(mask) >> place) & 1]
        large = np.flatnonzero(compared > LARGE_BUCKET**2 // 2) if free else starts[:0]
        for number in large.tolist():
            inside = slice(int(starts[number]), int(stops[number]))
            for left, right, found in _search(hashes, members[inside], places, free, distance):
                new = _is_new(hashes[left] ^ hashes[right], earlier)
                if new.any():
                    yield left[new], right[new], found[new]
            ends[inside] = 0  # done
        yield from _compare(hashes, members, ends, distance, earlier)


def _compare(
    hashes: Hashes, members: Rows, ends: Rows, distance: int, earlier: Sequence[np.uint64]
) -> Iterator[Pairs]:
    """Near pairs within buckets: member ``i`` is compared with those before place ``ends[i]``."""
    sorted_hashes = hashes[members]
    active = np.flatnonzero(ends > np.arange(len(members)) + 1)
    step = 1
    while active.size:
        for start in range(0, len(active), MATCHES_AT_ONCE):
            one = active[start : start + MATCHES_AT_ONCE]
            differences = sorted_hashes[one] ^ sorted_hashes[one + step]
            near, found = _verify(differences, distance, earlier)
            if near.size:
                left, right = members[one[near]], members[one[near] + step]
                yield np.minimum(left, right), np.maximum(left, right), found
        step += 1
        active = active[ends[active] > active + step]


def _verify(
    differences: Hashes, distance: int, earlier: Sequence[np.uint64]
) -> tuple[Rows, Distances]:
    """Places of the differences that are small and were not found before, and how many bits."""
    bits = np.bitwise_count(differences)
    near = np.flatnonzero(bits <= distance)
    near = near[_is_new(differences[near], earlier)]
    return near, bits[near].astype(np.int32)


def _is_new(differences: Hashes, earlier: Sequence[np.uint64]) -> npt.NDArray[np.bool_]:
    new = np.ones(len(differences), dtype=np.bool_)
    for mask in earlier:
        new &= (differences & mask) != 0
    return new


def slices(counts: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Runs of entries whose counts add up to at most MATCHES_AT_ONCE, or are one entry."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + MATCHES_AT_ONCE, side="right"))
        stop = max(stop, start + 1)
        yield start, stop
        start = stop
