"""Wilson's interval: known values, coverage, and which metrics get one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_eval.intervals import metric_intervals, newcombe_interval, wilson_interval


def test_known_values():
    # By hand from Wilson's formula with z = 1.959964.
    assert wilson_interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)


@given(st.floats(0, 1), st.integers(1, 10**7))
def test_encloses_the_share_stays_within_bounds_and_mirrors(share, num_trials):
    low, high = wilson_interval(share, num_trials)
    assert 0 <= low <= share <= high <= 1
    mirrored = wilson_interval(1 - share, num_trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_more_trials_or_less_confidence_narrow_it(share, num_trials):
    def width(n, confidence):
        low, high = wilson_interval(share, n, confidence=confidence)
        return high - low

    assert width(4 * num_trials, 0.95) <= width(num_trials, 0.95)
    assert width(num_trials, 0.8) <= width(num_trials, 0.95)


@pytest.mark.parametrize("true_share", [0.002, 0.03, 0.5])
def test_covers_the_true_share_about_95_times_in_100(true_share):
    drawn = np.random.default_rng(0).binomial(1000, true_share, 3000) / 1000
    intervals = [wilson_interval(float(share), 1000) for share in drawn]
    covered = np.mean([low <= true_share <= high for low, high in intervals])
    assert 0.93 < covered < 0.99


COUNTS = st.tuples(*[st.integers(0, 500)] * 4).filter(any)


@settings(max_examples=60, deadline=None)
@given(COUNTS)
def test_newcombes_interval_encloses_the_difference_and_mirrors(counts):
    both, first, second, neither = counts
    difference = (first - second) / sum(counts)
    low, high = newcombe_interval(*counts)
    assert -1 <= low <= difference + 1e-12
    assert difference - 1e-12 <= high <= 1
    mirrored = newcombe_interval(both, second, first, neither)
    assert mirrored == pytest.approx((-high, -low), abs=1e-12)
    # Counting the wrong answers instead of the right ones turns the two around.
    wrong = newcombe_interval(neither, second, first, both)
    assert wrong == pytest.approx((-high, -low), abs=1e-12)


def test_newcombes_interval_has_a_width_where_models_never_differ():
    low, high = newcombe_interval(50, 0, 0, 50)
    assert low < 0 < high
    assert high < 0.1


def test_newcombes_interval_covers_the_true_difference_about_95_times_in_100():
    shares = [0.55, 0.15, 0.08, 0.22]
    drawn = np.random.default_rng(0).multinomial(300, shares, size=2000)
    intervals = [newcombe_interval(*map(int, row)) for row in drawn]
    covered = np.mean([low <= shares[1] - shares[2] <= high for low, high in intervals])
    assert 0.94 < covered < 0.97


def test_shares_get_an_interval_and_means_do_not():
    metrics = {"acc1": 0.5, "mean_per_class_recall": 0.5, "lp_acc5": 0.9, "l2_strength": 0.01}
    assert set(metric_intervals(metrics, 50)) == {"acc1", "lp_acc5"}
    retrieval = {"image_retrieval_recall@5": 0.2, "text_retrieval_recall@5": 0.2}
    intervals = metric_intervals(
        retrieval, {"image_retrieval_recall@5": 10, "text_retrieval_recall@5": 1000}
    )
    assert intervals["image_retrieval_recall@5"] == wilson_interval(0.2, 10)
    assert intervals["text_retrieval_recall@5"] == wilson_interval(0.2, 1000)


def test_wrong_input_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"share is 50, but a share lies between 0 and 1"):
        wilson_interval(50, 100)
    with pytest.raises(ValueError, match="num_trials is 0, but an interval needs at least 1 trial"):
        wilson_interval(0.5, 0)
    with pytest.raises(ValueError, match="confidence is 95, but it must lie between 0 and 1"):
        wilson_interval(0.5, 10, confidence=95)
    with pytest.raises(ValueError, match=r"The counts are \(1, -1, 0, 0\), but none may be below"):
        newcombe_interval(1, -1, 0, 0)
    with pytest.raises(ValueError, match="no entry for 'acc1': add its number of queries"):
        metric_intervals({"acc1": 0.5}, {})
