import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st

from declip_filter.text_hash import hash_column, unit_interval

TEXTS = st.lists(st.text(max_size=40), max_size=20)


@runs(deadline=None)
@given(TEXTS, st.integers(0, 2**40))
def test_a_text_has_one_hash_wherever_it_stands(texts, seed):
    column = pa.array(["before", *texts, "after"], pa.string())
    alone = [int(hash_column(pa.array([text], pa.string()), seed)[0]) for text in texts]
    assert hash_column(column.slice(1, len(texts)), seed).tolist() == alone
    assert hash_column(column.cast(pa.large_string()), seed)[1:-1].tolist() == alone
    assert len(set(alone)) == len(set(texts))


def test_hashes_are_the_same_on_every_machine():
    column = pa.array(["", "a", "caption", "a longer caption", None, "\0", "\0\0"])
    found = [f"{value:016x}" for value in hash_column(column, 3).tolist()]
    assert found[:4] == [
        "bccdfd9c96a18897",
        "dde595192394458c",
        "98640e085268df1b",
        "179a22b0d28601cf",
    ]
    assert len(set(found)) == len(found) - 1  # a missing one is hashed as an empty text


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint16(), pa.float32(), pa.float64()])
def test_numbers_hash_by_value(kind):
    same = hash_column(pa.array([3, 0, 5], kind)).tolist()
    assert same == hash_column(pa.array([3.0, -0.0, 5.0])).tolist()
    assert len(set(same)) == 3


def test_draws_are_even():
    keys = pa.array([f"{number:09d}" for number in range(20_000)])
    drawn = unit_interval(hash_column(keys, 1))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    # 1,000 in each: chi-square with 19 degrees of freedom is below 44 in 999 of 1,000 cases.
    assert ((counts - 1000) ** 2 / 1000).sum() < 44
    other = unit_interval(hash_column(keys, 2))
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.03
