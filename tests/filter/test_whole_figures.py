import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st

from declip_filter import whole_figures
from declip_filter.evaluation import as_column
from declip_filter.expressions import WholeFigure, parse
from declip_filter.whole_figures import (
    CountSearch,
    RankSearch,
    from_ordered_bits,
    least_count,
    ordered_bits,
)

NUMBERS = st.floats(allow_nan=False) | st.integers(-3, 3).map(float)


@given(st.lists(NUMBERS, min_size=2))
def test_ordered_bits_order_as_the_numbers_do_and_can_be_undone(values):
    bits = ordered_bits(np.array(values, dtype=np.float64))
    assert [from_ordered_bits(int(bit)) for bit in bits] == values
    for a, x in zip(values, bits, strict=True):
        for b, y in zip(values, bits, strict=True):
            assert (a < b) == (x < y)


@runs(deadline=None)
@given(
    st.lists(st.lists(st.none() | NUMBERS, max_size=8), min_size=1, max_size=6),
    st.floats(0.01, 0.99),
    st.booleans(),
    st.integers(0, 3),
)
def test_a_fraction_is_the_one_of_a_sort_whatever_the_shards(shards, fraction, is_top, limit):
    whole_figures.MAX_CANDIDATES, before = limit, whole_figures.MAX_CANDIDATES
    try:
        found = []
        for order in (shards, shards[::-1], [[v for shard in shards for v in shard]]):
            search = RankSearch(fraction, is_top=is_top)
            while not search.is_done:
                for shard in order:
                    search.add(as_column(pa.array(shard, pa.float64())))
                search.end_pass()
            found.append(search.limit)
    finally:
        whole_figures.MAX_CANDIDATES = before
    values = [v for shard in shards for v in shard if v is not None and math.isfinite(v)]
    values.sort(reverse=is_top)
    if not values:
        assert found == [None] * 3
        return
    wanted = max(math.floor(fraction * len(values) + 0.5), 1)
    assert found == [values[wanted - 1]] * 3


@runs(deadline=None)
@given(
    st.lists(st.lists(st.none() | st.sampled_from("abcdefgh"), max_size=9), min_size=1, max_size=5),
    st.integers(2, 4),
    st.integers(1, 6),
)
def test_counts_are_those_of_a_counter_however_many_passes(shards, least, max_hashes):
    num = sum(map(len, shards))
    search = CountSearch(least, num, max_hashes)
    assert search.num_passes == max(-(-num // max_hashes), 1)
    while not search.is_done:
        for shard in reversed(shards):
            search.add(pa.array(shard, pa.string()))
        search.end_pass()
    counts = Counter(value for shard in shards for value in shard)
    for shard in shards:
        found = search.result()(pa.array(shard, pa.string())).to_pylist()
        assert found == [
            None if value is None else counts[value] if counts[value] >= least else 1
            for value in shard
        ]


@pytest.mark.parametrize(
    ("texts", "least"),
    [
        (["count(a) > 10"], 11),
        (["count(a) >= 10"], 10),
        (["not count(a) <= 10"], 11),
        (["count(a) < 10"], 10),
        (["count(a) > 10", "count(a) > 5 and b > 3"], 6),
        (["count(a) > 10 or count(a) == 3"], 2),
        (["count(a) > b"], 2),
        (["count(a) > 0"], 2),
        (["5 < count(a) < 10"], 2),
        (["count(b) > 3", "count(a) > 10"], 11),
        (["count(a) * 2 > 10"], 2),
    ],
)
def test_only_counts_that_make_a_difference_are_kept(texts, least):
    assert least_count([parse(text) for text in texts], WholeFigure("count", "a")) == least


@runs(deadline=None)
@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=30),
    st.sampled_from(["<", "<=", ">", ">="]),
    st.integers(-1, 12),
)
def test_what_is_not_kept_changes_no_comparison(values, operator, limit):
    from declip_filter.evaluation import evaluate

    expression, figure = parse(f"count(a) {operator} {limit}"), WholeFigure("count", "a")
    column = pa.array(values)
    found = []
    for least in (1, least_count([expression], figure)):
        search = CountSearch(least, len(values))
        search.add(column)
        search.end_pass()
        found.append(evaluate(expression, {"a": column}, {figure: search.result()}))
    assert found[0] == found[1]
