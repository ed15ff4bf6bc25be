"""The search finds every occurrence and nothing else."""

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_shards import needles
from declip_shards.needles import NeedleSearch

SMALL = st.binary(max_size=60).map(lambda b: bytes(x % 4 + 97 for x in b))


def by_hand(data: bytes, wanted: set[bytes]) -> set[tuple[bytes, int]]:
    return {
        (needle, match.start())
        for needle in wanted
        for match in re.finditer(b"(?=" + re.escape(needle) + b")", data)
    }


@settings(max_examples=300)
@given(data=SMALL, wanted=st.sets(SMALL.filter(len).map(lambda b: b[:12]), min_size=1, max_size=6))
def test_it_finds_what_a_plain_search_finds(data, wanted):
    search = NeedleSearch(dict.fromkeys(wanted, "x"))
    found = [(needle, first) for _, needle, first in search.find(data)]
    assert len(found) == len(set(found))
    assert set(found) == by_hand(data, wanted)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_do_not_cut_a_needle_in_two(monkeypatch, block):
    monkeypatch.setattr(needles, "BLOCK", block)
    data = bytes(range(256)) * 3
    search = NeedleSearch({data[250:280]: "a", data[3:12]: "b"})
    assert [(label, first) for label, _, first in search.find(data)] == [
        ("b", 3),
        ("b", 259),
        ("a", 250),
        ("b", 515),
        ("a", 506),
    ]


def test_numbers_count_only_where_they_stand_alone():
    search = NeedleSearch({b"000000017": "key"}, whole=[b"000000017"])
    text = b'000000017.jpg 1000000017 0000000170 x000000017 "000000017" 000000017'
    assert [first for _, _, first in search.find(text)] == [0, 48, 59]


def test_nothing_is_found_in_nothing():
    assert list(NeedleSearch({}).find(b"abc")) == []
    assert list(NeedleSearch({b"abc": "x"}).find(b"")) == []
    with pytest.raises(ValueError, match="empty needle"):
        NeedleSearch({b"": "x"})


def test_views_are_searched_as_bytes_are():
    search = NeedleSearch({b"needle": "x"})
    data = b"hay needle hay.."
    wide = memoryview(bytearray(data)).cast("H")
    for view in (bytearray(data), memoryview(data), wide):
        assert [first for *_, first in search.find(view)] == [4]


def test_time_does_not_grow_with_the_number_of_needles():
    rng = np.random.default_rng(0)
    data = rng.bytes(1 << 21)

    def seconds(number: int) -> float:
        search = NeedleSearch({rng.bytes(24): "x" for _ in range(number)})
        start = time.process_time()
        assert list(search.find(data)) == []
        return time.process_time() - start

    assert seconds(2000) < 20 * max(seconds(2), 0.005)
