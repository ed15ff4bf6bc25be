"""Metrics of scores: equal to scikit-learn's with and without ties, and their own laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

from declip_eval.metrics import (
    PrecisionCurve,
    RocCurve,
    accuracy_at,
    average_precision,
    eleven_point_ap,
    mean_acc1_acc5,
    mean_over_classes,
    mean_per_class_recall,
    roc_auc,
)

LEVELS = st.sampled_from([-np.inf, -1.5, 0.0, 0.25, 0.5, 3.0, np.inf])
"""Few scores, so that many samples tie."""


@st.composite
def tied_samples(draw):
    size = draw(st.integers(2, 40))
    scores = draw(arrays.arrays(np.float64, size, elements=LEVELS))
    labels = draw(arrays.arrays(bool, size))
    labels[:2] = (True, False)
    return scores, labels


def finite(scores):
    """scikit-learn takes no infinities; replacing them keeps the order."""
    return np.nan_to_num(scores, posinf=1e6, neginf=-1e6)


@settings(max_examples=30, deadline=None)
@given(tied_samples())
def test_with_ties_equal_to_scikit_learn(sample):
    scores, labels = sample
    assert average_precision(scores[:, None], labels[:, None])[0] == pytest.approx(
        average_precision_score(labels, finite(scores)), abs=1e-12
    )
    assert roc_auc(scores, labels) == pytest.approx(
        roc_auc_score(labels, finite(scores)), abs=1e-12
    )


@settings(max_examples=30, deadline=None)
@given(tied_samples(), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_changes_no_bit(sample, random):
    scores, labels = sample
    order = np.asarray(random.sample(range(len(scores)), len(scores)))
    for metric in (roc_auc, lambda s, y: eleven_point_ap(s[:, None], y[:, None])[0]):
        assert metric(scores[order], labels[order]) == metric(scores, labels)


def by_definition(scores, labels):
    """VOC's 11 points, from every threshold there is, in whole numbers."""
    thresholds = np.unique(scores)
    found = [int((labels & (scores >= t)).sum()) for t in thresholds]
    taken = [int((scores >= t).sum()) for t in thresholds]
    total = int(labels.sum())
    points = [
        max(f / n for f, n in zip(found, taken, strict=True) if 10 * f >= level * total)
        for level in range(11)
    ]
    return sum(points) / 11


@settings(max_examples=30, deadline=None)
@given(tied_samples())
def test_eleven_points_are_vocs_definition(sample):
    scores, labels = sample
    ours = eleven_point_ap(scores[:, None], labels[:, None])[0]
    assert ours == pytest.approx(by_definition(scores, labels), abs=1e-12)


def test_eleven_points_at_a_recall_that_floats_miss():
    # Recall 0.3 = 3/10 exactly; the fourth positive comes after many negatives.
    labels = np.array([1, 1, 1] + [0] * 90 + [1] * 7)
    scores = -np.arange(100.0)
    ours = eleven_point_ap(scores[:, None], labels[:, None])[0]
    # Recalls 0, 0.1, 0.2 and 0.3 at precision 1; from 0.4 on the last point is best, 10 of 100.
    assert ours == pytest.approx((4 * 1 + 7 * 0.1) / 11, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(tied_samples(), st.integers(0, 2**16))
def test_a_weight_is_that_many_copies(sample, seed):
    scores, labels = sample
    weights = np.random.default_rng(seed).integers(0, 4, size=(len(scores), 3))
    weights[:2] += 1  # One positive and one negative stay.
    precision, roc = PrecisionCurve(scores, labels), RocCurve(scores, labels)
    for formula, area in (
        (precision.average_precision, average_precision),
        (precision.eleven_point, eleven_point_ap),
    ):
        for column, value in enumerate(formula(weights)):
            rows = np.repeat(np.arange(len(scores)), weights[:, column])
            assert value == pytest.approx(area(scores[rows][:, None], labels[rows][:, None])[0])
    for column, value in enumerate(roc.area(weights)):
        rows = np.repeat(np.arange(len(scores)), weights[:, column])
        assert value == pytest.approx(roc_auc(scores[rows], labels[rows]), abs=1e-12)


def test_a_model_of_one_score_for_all_is_at_chance():
    labels = np.arange(100) < 7
    same = np.zeros(100)
    assert roc_auc(same, labels) == 0.5
    assert average_precision(same[:, None], labels[:, None])[0] == pytest.approx(0.07)
    assert eleven_point_ap(same[:, None], labels[:, None])[0] == pytest.approx(0.07)


def test_weights_that_leave_a_class_empty_give_no_number():
    weights = np.array([[0, 1], [1, 0], [1, 1]])
    scores, labels = np.array([0.1, 0.2, 0.3]), np.array([True, False, False])
    assert np.isnan(PrecisionCurve(scores, labels).average_precision(weights)).tolist() == [
        True,
        False,
    ]
    assert np.isnan(PrecisionCurve(scores, labels).eleven_point(weights)).tolist() == [True, False]
    assert np.isnan(RocCurve(scores, labels).area(weights)).tolist() == [True, False]


def test_a_class_without_positives_is_left_out_of_the_mean():
    scores = np.array([[0.9, 0.1], [0.2, 0.3]])
    per_class = average_precision(scores, np.array([[1, 0], [0, 0]]))
    assert per_class[0] == 1.0
    assert np.isnan(per_class[1])
    assert mean_over_classes(per_class) == 1.0
    with pytest.raises(ValueError, match="No class has a positive sample"):
        mean_over_classes(np.array([np.nan]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=60))
def test_mean_per_class_recall_is_scikit_learns_balanced_accuracy(rows):
    ranks, labels = np.array(rows).T
    predicted = np.where(ranks == 0, labels, labels + 1)
    with np.errstate(all="ignore"):
        expected = np.mean([(predicted[labels == c] == c).mean() for c in np.unique(labels)])
    assert mean_per_class_recall(ranks, labels) == pytest.approx(expected, abs=1e-12)


def test_mean_per_class_recall_against_the_library():
    rng = np.random.default_rng(0)
    labels = rng.choice(5, p=[0.5, 0.2, 0.2, 0.05, 0.05], size=400)
    predicted = np.where(rng.random(400) < 0.6, labels, rng.integers(0, 5, 400))
    ranks = (predicted != labels).astype(np.int64)
    assert mean_per_class_recall(ranks, labels) == pytest.approx(
        balanced_accuracy_score(labels, predicted), abs=1e-12
    )


def test_accuracies_are_shares_of_ranks():
    ranks = np.array([0, 0, 1, 4, 5, 9])
    assert accuracy_at(ranks, 1) == 2 / 6
    assert accuracy_at(ranks, 5) == 4 / 6
    assert mean_acc1_acc5(ranks) == 3 / 6


def test_wrong_input_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"scores has shape \(3,\) and labels \(2,\)"):
        roc_auc(np.zeros(3), np.zeros(2, dtype=int))
    with pytest.raises(ValueError, match="every sample needs a score"):
        roc_auc(np.array([0.1, np.nan]), np.array([0, 1]))
    with pytest.raises(ValueError, match="labels must be 0 and 1"):
        roc_auc(np.array([0.1, 0.2]), np.array([0, 2]))
    with pytest.raises(ValueError, match="All 2 samples are positive, but a ROC curve needs both"):
        roc_auc(np.array([0.1, 0.2]), np.array([1, 1]))
    with pytest.raises(ValueError, match=r"scores has shape \(2,\) and is_positive \(2,\)"):
        average_precision(np.zeros(2), np.zeros(2, dtype=bool))
