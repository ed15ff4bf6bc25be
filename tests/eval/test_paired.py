"""Paired tests: exact where they can be, fair under no difference, and only of the same queries."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from declip_eval.intervals import newcombe_interval
from declip_eval.outcomes import metric_names, metrics_of
from declip_eval.paired import align, bootstrap_p_value, mcnemar_p_value, paired_test
from declip_eval.score_outcomes import (
    classification_outcomes,
    multilabel_outcomes,
    retrieval_outcomes,
)

NUM = 240


def keys(count):
    return [f"k{n}" for n in range(count)]


def data(num_classes, seed=0):
    rng = np.random.default_rng(seed)
    return rng, rng.integers(0, num_classes, NUM)


def two_models(kind, gap, seed=0):
    """Two noisy models of the same samples; the second is better by `gap`."""
    if kind == "retrieval":
        rng = np.random.default_rng(seed)
        texts = rng.normal(size=(NUM, 8))
        noise = rng.normal(size=(2, NUM, 8))
        scales = (1.0, 1.0 - gap / 2)
        return [
            retrieval_outcomes(
                keys(NUM), keys(NUM), texts + s * part, texts, [[n] for n in range(NUM)]
            )
            for s, part in zip(scales, noise, strict=True)
        ]
    num_classes = 2 if kind == "binary" else 6
    rng, labels = data(num_classes, seed)
    truth = np.eye(num_classes)[labels]
    shared = rng.normal(size=truth.shape)
    scores = [shared + rng.normal(size=truth.shape) + (1 + extra) * truth for extra in (0.0, gap)]
    if kind == "multilabel":
        return [multilabel_outcomes(keys(NUM), part, truth) for part in scores]
    return [classification_outcomes(keys(NUM), part, labels) for part in scores]


KINDS = ["classification", "binary", "multilabel", "retrieval"]


@pytest.mark.parametrize("kind", KINDS)
def test_values_difference_and_interval_fit_together(kind):
    a, b = two_models(kind, gap=1.0)
    for name in metric_names(a):
        result = paired_test(a, b, name, seed=0, num_resamples=400)
        assert result.value_a == metrics_of(a, [name])[name]
        assert result.value_b == metrics_of(b, [name])[name]
        assert result.difference == result.value_b - result.value_a
        assert result.interval[0] <= result.difference <= result.interval[1]
        assert result.num_queries == NUM
        assert 0 < result.p_value < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_turned_around_it_is_the_mirror_image(kind):
    a, b = two_models(kind, gap=0.4)
    for name in metric_names(a):
        there = paired_test(a, b, name, seed=0, num_resamples=400)
        back = paired_test(b, a, name, seed=0, num_resamples=400)
        assert back.difference == -there.difference
        assert (back.num_only_a, back.num_only_b) == (there.num_only_b, there.num_only_a)
        if "McNemar" in there.method:
            assert back.p_value == there.p_value
        else:
            assert back.p_value == pytest.approx(there.p_value, abs=0.1)
        assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]), abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_does_not_differ_from_itself(kind):
    a, _ = two_models(kind, gap=0)
    for name in metric_names(a):
        result = paired_test(a, a, name, seed=0, num_resamples=200)
        assert (result.difference, result.p_value) == (0.0, 1.0)
        assert result.interval[0] <= 0 <= result.interval[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_queries_changes_no_test(kind):
    a, b = two_models(kind, gap=0.5)
    shuffled = b.take(np.random.default_rng(0).permutation(len(b)))
    for name in metric_names(a):
        assert paired_test(a, shuffled, name, seed=1, num_resamples=200) == paired_test(
            a, b, name, seed=1, num_resamples=200
        )


def test_mcnemar_is_the_exact_binomial_test():
    for only_a, only_b in [(0, 0), (3, 3), (0, 5), (12, 4), (400, 321)]:
        expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        assert mcnemar_p_value(only_a, only_b) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="Counts are -1 and 2, but they start at 0"):
        mcnemar_p_value(-1, 2)


def test_accuracy_counts_who_alone_was_right():
    labels = np.array([0] * 10)
    right_a, right_b = (
        np.array([1, 1, 1, 0, 0, 0, 0, 1, 1, 1]),
        np.array([1, 1, 1, 1, 1, 1, 1, 0, 0, 1]),
    )
    a, b = (
        classification_outcomes(keys(10), np.eye(2)[1 - right], labels)
        for right in (right_a, right_b)
    )
    result = paired_test(a, b, "acc1", seed=0)
    assert (result.num_only_a, result.num_only_b) == (2, 4)
    assert result.p_value == mcnemar_p_value(2, 4)
    assert result.interval == newcombe_interval(4, 4, 2, 0)
    assert result.method == "exact McNemar test; Newcombe's interval"


@pytest.mark.parametrize("name", ["acc1", "mean_per_class_recall"])
def test_where_no_model_is_better_few_tests_say_so(name):
    found = []
    for seed in range(200):
        a, b = two_models("classification", 0, seed)
        found.append(paired_test(a, b, name, seed=seed, num_resamples=200).p_value < 0.05)
    assert np.mean(found) < 0.09


def test_a_bootstrap_p_value_is_never_zero_and_counts_both_sides():
    assert bootstrap_p_value(np.ones(99)) == 2 / 100
    assert bootstrap_p_value(np.array([-1.0, 1.0, 1.0, 1.0])) == 4 / 5
    assert bootstrap_p_value(np.zeros(99)) == 1.0


def test_without_the_overlap_of_either_model():
    a, b = two_models("classification", gap=0.5)
    first, second = np.arange(NUM) % 5 == 0, np.arange(NUM) % 7 == 0
    left = ~(first | second)
    expected = paired_test(a.take(left), b.take(left), "acc1", seed=0)
    result = paired_test(
        a.with_overlap(first), b.with_overlap(second), "acc1", seed=0, without_overlap=True
    )
    assert result == expected
    one = paired_test(a.with_overlap(first), b, "acc1", seed=0, without_overlap=True)
    assert one == paired_test(a.take(~first), b.take(~first), "acc1", seed=0)
    with pytest.raises(ValueError, match="have no column 'overlap'"):
        paired_test(a, b, "acc1", seed=0, without_overlap=True)


def test_other_queries_or_labels_are_refused_by_name():
    a, b = two_models("classification", gap=0.5)
    with pytest.raises(
        ValueError, match=r"sample 'k239' is in the first outcomes only \(240 and 239 samples\)"
    ):
        align(a, b.take(np.arange(NUM - 1)))
    with pytest.raises(ValueError, match="sample 'k0' is in the second outcomes only"):
        align(a.take(np.arange(1, NUM)), b)
    labels = a.columns["label"].copy()
    labels[[3, 9]] = (labels[[3, 9]] + 1) % 6
    other = classification_outcomes(keys(NUM), np.eye(6)[labels], labels.astype(int))
    with pytest.raises(
        ValueError, match=rf"'k3' has the label {a.columns['label'][3]} in the first .*\(2 such"
    ):
        paired_test(a, other, "acc1", seed=0)
    several = multilabel_outcomes(keys(2), np.zeros((2, 3)), np.eye(3)[:2])
    more = multilabel_outcomes(keys(2), np.zeros((2, 3)), np.ones((2, 3), int))
    with pytest.raises(
        ValueError, match=r"'k0' has the label \[0\] in the first outcomes and \[0, "
    ):
        align(several, more)
    with pytest.raises(ValueError, match="The first outcomes are of classification with 6 classes"):
        align(a, several)
