"""Streams computed together are numpy's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_train.philox import uniform_numbers

WORDS = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5), st.integers(1, 61))
def test_streams_are_numpys(keys, count):
    found = uniform_numbers(np.array(keys, np.uint64), count)
    for row, (low, high) in zip(found, keys, strict=True):
        generator = np.random.Generator(np.random.Philox(key=low + (high << 64)))
        np.testing.assert_array_equal(row, generator.random(count))


@pytest.mark.parametrize("number", [0, 1, 300])
def test_shapes(number):
    found = uniform_numbers(np.zeros((number, 2), np.uint64), 53)
    assert found.shape == (number, 53)
    assert found.dtype == np.float64
