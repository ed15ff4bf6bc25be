import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_filter.duplicate_rungs import (
    Likeness,
    Looks,
    exact_leaders,
    hash_distances,
    perceptual_leaders,
)


def digests_of(values):
    data = b"".join(value.to_bytes(16, "big") for value in values)
    return np.frombuffer(data, dtype=np.uint8).reshape(len(values), 16)


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 2**64, 2**64 + 1]), st.booleans())), st.randoms()
)
def test_equal_digests_have_the_best_of_them_as_leader(entries, random):
    values = [value for value, _ in entries]
    known = np.array([k for _, k in entries], dtype=bool)
    rank = np.array(random.sample(range(len(entries)), len(entries)), dtype=np.int64)
    leader = exact_leaders(digests_of(values), known, rank).tolist()
    for row, value in enumerate(values):
        same = [r for r, v in enumerate(values) if v == value and known[r]]
        best = min(same, key=lambda r: rank[r], default=row)
        assert leader[row] == (best if known[row] and best != row else -1)


@st.composite
def pictures(draw):
    """Pictures of few hashes, layouts and shapes; some are equal files."""
    num = draw(st.integers(1, 40))
    seeds = np.random.default_rng(draw(st.integers(0, 2**32)))
    files = seeds.integers(0, max(1, num // 2), num) if draw(st.booleans()) else np.arange(num)
    base = np.uint64(0x0F0F0F0F0F0F0F0F)
    flips = np.uint64(1) << seeds.integers(0, 12, (num, 3), dtype=np.uint64)
    hashes = (base ^ np.bitwise_or.reduce(flips, axis=1))[files]
    hashes[files % 5 == 4] = np.uint64(3)
    layouts = seeds.integers(100, 116, (num, 16)).astype(np.uint8)[files]
    aspects = seeds.choice([1.0, 1.05, 1.5], num).astype(np.float32)[files]
    return Looks(hashes=hashes, layouts=layouts, aspects=aspects), seeds.permutation(num), files


LIKENESS = Likeness(max_distance=3, min_bits=4, max_brightness_difference=11, max_aspect_change=0.1)


def alike(looks, one, other):
    change = max(looks.aspects[one], looks.aspects[other]) / min(
        looks.aspects[one], looks.aspects[other]
    )
    difference = np.abs(looks.layouts[one].astype(int) - looks.layouts[other]).max()
    bits = int(looks.hashes[one] ^ looks.hashes[other]).bit_count()
    return bits <= 3 and difference <= 11 and change <= 1.1 + 1e-5


@settings(deadline=None, max_examples=80)
@given(pictures(), st.sampled_from([1, 5, 10**6]), st.booleans())
def test_perceptual_leaders_are_those_of_going_one_by_one(made, max_pairs, use_files):
    looks, rank, files = made
    known = np.arange(len(rank)) % 7 != 6
    enough = np.array([4 <= int(h).bit_count() <= 60 for h in looks.hashes])
    wanted = np.full(len(rank), -1)
    kept: list[int] = []
    for row in np.argsort(rank):
        if not (known[row] and enough[row]):
            continue
        near = [k for k in kept if alike(looks, row, k)]
        wanted[row] = near[0] if near else -1
        if not near:
            kept.append(row)
    same_bytes = exact_leaders(digests_of(files.tolist()), known, rank) if use_files else None
    leader = perceptual_leaders(
        looks, known, rank, LIKENESS, same_bytes=same_bytes, max_pairs=max_pairs
    )
    assert leader.tolist() == wanted.tolist()
    again = np.flatnonzero(leader < 0)
    rest = perceptual_leaders(looks.take(again), known[again], rank[again], LIKENESS)
    assert (rest < 0).all()


@pytest.mark.parametrize("level", [0, 2**64 - 1, 7])
def test_pictures_that_say_nothing_are_not_chained_together(level):
    looks = Looks(
        hashes=np.full(50, level, dtype=np.uint64),
        layouts=np.full((50, 16), 255, dtype=np.uint8),
        aspects=np.ones(50, dtype=np.float32),
    )
    leader = perceptual_leaders(looks, np.ones(50, dtype=bool), np.arange(50), LIKENESS)
    assert (leader < 0).all()


def test_distances_are_to_the_leader():
    hashes = np.array([0b1111, 0b1011, 0b0001], dtype=np.uint64)
    assert hash_distances(hashes, np.array([-1, 0, 0])).tolist() == [-1, 1, 3]
