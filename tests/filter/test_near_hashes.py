import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from declip_filter import near_hashes
from declip_filter.near_hashes import (
    Places,
    information,
    near_matches,
    near_pairs,
    parse_hashes,
    slices,
)
from declip_shards import DeclipError


def gathered(parts):
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return sorted(zip(*(column.tolist() for column in columns), strict=True)) if columns else []


def brute(one, other, distance, *, is_same):
    bits = np.bitwise_count(one[:, None] ^ other[None])
    left, right = np.nonzero(np.triu(bits <= distance, 1) if is_same else bits <= distance)
    return sorted(zip(left.tolist(), right.tolist(), bits[left, right].tolist(), strict=True))


hashes_of = st.integers(1, 64).flatmap(
    lambda bits: st.lists(st.integers(0, 2**bits - 1), min_size=0, max_size=60)
)


@settings(max_examples=60, deadline=None)
@given(hashes_of, st.integers(0, 8))
@example([0] * 40, 3)
@example([1 << place for place in range(64)], 2)
def test_banding_finds_what_brute_force_finds(values, distance):
    hashes = np.array(values, dtype=np.uint64)
    assert gathered(near_pairs(hashes, distance)) == brute(hashes, hashes, distance, is_same=True)


@settings(max_examples=60, deadline=None)
@given(hashes_of, hashes_of, st.integers(0, 6))
def test_matches_are_those_of_brute_force(one, other, distance):
    base, queries = np.array(one, dtype=np.uint64), np.array(other, dtype=np.uint64)
    found = gathered(near_matches(base, queries, distance))
    assert found == brute(base, queries, distance, is_same=False)


@settings(max_examples=40, deadline=None)
@given(hashes_of, hashes_of, st.integers(0, 5), st.integers(0, 4), st.randoms())
def test_places_leave_out_what_is_far_by_them(one, other, distance, gap, random):
    base, queries = np.array(one, dtype=np.uint64), np.array(other, dtype=np.uint64)
    at, asked = (
        np.array([random.randint(-5, 9) for _ in values], dtype=np.int64) for values in (one, other)
    )
    found = gathered(near_pairs(base, distance, Places(values=at, max_gap=gap)))
    all_pairs = brute(base, base, distance, is_same=True)
    assert found == [pair for pair in all_pairs if abs(at[pair[0]] - at[pair[1]]) <= gap]
    found = gathered(near_matches(base, queries, distance, (at, asked, gap)))
    all_pairs = brute(base, queries, distance, is_same=False)
    assert found == [pair for pair in all_pairs if abs(at[pair[0]] - asked[pair[1]]) <= gap]


@pytest.mark.parametrize("num_copies", [1, 4])
def test_many_rows_are_banded_and_not_all_compared(monkeypatch, num_copies):
    """Beyond some thousand rows the search goes by blocks; a sample says how many."""
    compared: list[int] = []
    verify = near_hashes._verify

    def counted(differences, distance, earlier):
        compared.append(len(differences))
        return verify(differences, distance, earlier)

    monkeypatch.setattr(near_hashes, "_verify", counted)
    rng = np.random.default_rng(7)
    hashes = np.tile(rng.integers(0, 2**64, 20_000 // num_copies, dtype=np.uint64), num_copies)
    hashes[: len(hashes) // num_copies] ^= np.uint64(1) << rng.integers(
        0, 64, len(hashes) // num_copies, dtype=np.uint64
    )
    pairs = gathered(near_pairs(hashes, 2))
    in_groups = len(hashes) // num_copies * (num_copies * (num_copies - 1) // 2)
    assert len(pairs) == in_groups
    assert sum(compared) < 0.05 * len(hashes) ** 2 / 2


@pytest.mark.parametrize(("bits", "distance"), [(64, 3), (20, 2), (13, 4), (40, 6)])
def test_large_buckets_are_searched_by_the_bits_that_are_left(monkeypatch, bits, distance):
    monkeypatch.setattr(near_hashes, "LARGE_BUCKET", 8)
    monkeypatch.setattr(near_hashes, "_CHOICE_COST", 0.0)
    monkeypatch.setattr(near_hashes, "_SORT_COST", 0.1)
    monkeypatch.setattr(near_hashes, "MATCHES_AT_ONCE", 500)
    rng = np.random.default_rng(bits)
    seeds = rng.integers(0, 2**bits, 30, dtype=np.uint64)
    flips = np.uint64(1) << rng.integers(0, bits, (30, 8, 3), dtype=np.uint64)
    hashes = (seeds[:, None] ^ np.bitwise_xor.reduce(flips, axis=2)).ravel()
    found = gathered(near_pairs(hashes, distance))
    assert found == brute(hashes, hashes, distance, is_same=True)
    assert found
    matches = gathered(near_matches(hashes, seeds, distance))
    assert matches == brute(hashes, seeds, distance, is_same=False)


def test_information_is_the_rarer_kind_of_bit():
    hashes = parse_hashes(
        ["0" * 16, "f" * 16, "00000000000000ff", "ffffffff00000000", "f" * 15 + "e"]
    )
    assert information(hashes).tolist() == [0, 0, 8, 32, 1]


def test_hashes_are_read_from_hex_and_others_refused():
    assert parse_hashes(["00000000000000ff", "8000000000000000"]).tolist() == [255, 2**63]
    assert parse_hashes([]).tolist() == []
    for bad in ("ff", "g" * 16, "0" * 17):
        with pytest.raises(DeclipError, match=f"'{bad}' is no 64-bit hash: 16 hex digits are due"):
            parse_hashes(["0" * 16, bad])


def test_distances_out_of_range_are_refused():
    with pytest.raises(DeclipError, match=r"distance of hashes is 17; it must be from 0 to 16"):
        list(near_pairs(np.zeros(2, dtype=np.uint64), 17))


def test_slices_cover_all_and_stay_small(monkeypatch):
    monkeypatch.setattr(near_hashes, "MATCHES_AT_ONCE", 10)
    counts = np.array([3, 4, 4, 50, 0, 0, 9, 1, 1])
    parts = list(slices(counts))
    assert [place for start, stop in parts for place in range(start, stop)] == list(range(9))
    assert all(counts[a:b].sum() <= 10 or b - a == 1 for a, b in parts)
