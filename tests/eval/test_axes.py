"""Ticks are round, even and enclose the data; axes map ends to ends."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_eval.axes import Axis, linear_ticks, log_ticks, nice_step, short_number, tick_labels

values = st.floats(-1e9, 1e9).map(lambda v: float(f"{v:.6g}"))


@given(values, values, st.integers(2, 10))
def test_linear_ticks_enclose_are_even_and_few(a, b, num_steps):
    low, high = min(a, b), max(a, b)
    if 0 < high - low < 1e-6 * max(abs(low), abs(high)):
        return  # Below the digits that labels have.
    ticks = linear_ticks(low, high, num_steps)
    steps = np.diff(ticks)
    assert ticks[0] <= low + 1e-6 * steps[0]  # A millionth of a step is no pixel.
    assert ticks[-1] >= high - 1e-6 * steps[0]
    assert 2 <= len(ticks) <= num_steps + 2
    assert np.allclose(steps, steps[0])


@given(st.floats(1e-9, 1e9), st.floats(1, 1e9), st.integers(2, 10))
def test_log_ticks_enclose_and_ascend(low, factor, num_steps):
    high = low * factor
    ticks = log_ticks(low, high, num_steps)
    assert ticks[0] <= low * (1 + 1e-6)
    assert ticks[-1] >= high * (1 - 1e-6)
    assert len(ticks) >= 2
    assert all(a < b for a, b in itertools.pairwise(ticks))


@given(st.floats(1e-12, 1e12), st.integers(1, 20))
def test_nice_step_is_one_two_or_five(span, num_steps):
    step = nice_step(span, num_steps)
    assert step * num_steps >= span * (1 - 1e-6)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6


def test_examples():
    assert linear_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert linear_ticks(0.0, 0.3, 3) == [0, 0.1, 0.2, 0.3]
    assert log_ticks(1e-6, 1e-3) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3])
    assert log_ticks(3, 30) == [2, 5, 10, 20, 50]
    with pytest.raises(ValueError, match=r"smallest value is 0, but a logarithmic axis needs"):
        log_ticks(0, 1)
    with pytest.raises(ValueError, match="an axis needs a positive, finite span"):
        nice_step(0, 5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.25, "0.25"), (7, "7"), (1204, "1,204"), (25_000, "25k"), (999_990, "1M"),
        (3e6, "3M"), (1.5e9, "1.5G"), (2e-5, "2e-5"), (-0.5, "-0.5"), (9999.9, "10k"),
        (1000.0, "1,000"), (999.9, "1,000"), (0.001, "0.001"), (1e15, "1e15"), (123_456, "123k"),
    ],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short_number(value) == text


@given(st.floats(1e-12, 1e15))
def test_short_numbers_are_short_and_near(value):
    text = short_number(value)
    assert len(text) <= 8
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    plain = text.replace(",", "")
    number = float(plain[:-1]) * units[plain[-1]] if plain[-1] in units else float(plain)
    assert number == pytest.approx(value, rel=0.006)


def test_neighboring_ticks_have_different_labels():
    assert tick_labels([100000, 100001, 100002]) == ["100000", "100001", "100002"]


def test_axis_maps_ends_to_ends_and_the_geometric_mean_to_the_middle():
    assert [Axis(low=1, high=3, start=0, end=10)(v) for v in (1, 2, 3)] == [0, 5, 10]
    down = Axis(low=0.01, high=100, start=200, end=0, log=True)
    assert [down(v) for v in (0.01, 1, 100)] == pytest.approx([200, 100, 0])
