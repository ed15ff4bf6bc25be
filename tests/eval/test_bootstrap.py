"""Bootstrap intervals: coverage, seeds, and the drawing shortcuts against drawing queries."""

from __future__ import annotations

import numpy as np
import pytest

import declip_eval.bootstrap as bootstrap
from declip_eval.bootstrap import (
    bootstrap_intervals,
    class_means,
    percentile_interval,
    resample,
    resampled_means,
    resampled_metric,
)
from declip_eval.intervals import wilson_interval
from declip_eval.outcomes import metric_names, metrics_of
from declip_eval.score_outcomes import (
    classification_outcomes,
    multilabel_outcomes,
    retrieval_outcomes,
)


def keys(count):
    return [str(n) for n in range(count)]


def classification(count=300, num_classes=6, seed=0, skill=1.5):
    rng = np.random.default_rng(seed)
    labels = rng.choice(num_classes, p=np.arange(1, num_classes + 1) / 21, size=count)
    scores = rng.normal(size=(count, num_classes)) + skill * np.eye(num_classes)[labels]
    return classification_outcomes(keys(count), scores, labels)


def binary(count=300, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.3).astype(np.int64)
    scores = np.stack([np.zeros(count), np.round(rng.normal(size=count) + labels, 1)], axis=1)
    return classification_outcomes(keys(count), scores, labels)


def multilabel(count=300, seed=0):
    rng = np.random.default_rng(seed)
    positive = rng.random((count, 3)) < 0.2
    return multilabel_outcomes(keys(count), rng.normal(size=(count, 3)) + positive, positive)


def pairs(count=40, seed=0):
    rng = np.random.default_rng(seed)
    texts = rng.normal(size=(2 * count, 8))
    images = texts[::2] + texts[1::2] + rng.normal(size=(count, 8))
    return retrieval_outcomes(
        keys(count), keys(2 * count), images, texts, [[2 * n, 2 * n + 1] for n in range(count)]
    )


@pytest.mark.parametrize("make", [classification, binary, multilabel, pairs])
def test_intervals_hold_the_value_and_depend_on_the_seed_alone(make):
    outcomes = make()
    names = metric_names(outcomes)
    intervals = bootstrap_intervals(outcomes, names, seed=3, num_resamples=400)
    for name, value in metrics_of(outcomes, names).items():
        low, high = intervals[name]
        assert 0 <= low < value < high <= 1
    again = bootstrap_intervals(outcomes, names[::-1], seed=3, num_resamples=400)
    assert again == intervals
    alone = bootstrap_intervals(outcomes, names[-1:], seed=3, num_resamples=400)
    assert alone[names[-1]] == intervals[names[-1]]
    assert bootstrap_intervals(outcomes, names, seed=4, num_resamples=400) != intervals


def test_the_size_of_a_block_changes_no_bit(monkeypatch):
    for outcomes in (binary(), multilabel(count=100)):
        name = metric_names(outcomes)[-1]
        whole = resampled_metric(outcomes, name, seed=0, num_resamples=150)
        monkeypatch.setattr(bootstrap, "_BLOCK_CELLS", 7 * len(outcomes))
        assert (resampled_metric(outcomes, name, seed=0, num_resamples=150) == whole).all()
        monkeypatch.undo()


def drawn_by_hand(rng, outcomes, name, num_resamples):
    """Resamples of whole queries, measured by the metric's own code."""
    values = []
    for _ in range(num_resamples):
        rows = rng.integers(0, len(outcomes), len(outcomes))
        part = outcomes.take(rows[:0])  # Keys may repeat in a resample, so only columns are taken.
        columns = {column: values[rows] for column, values in outcomes.columns.items()}
        object.__setattr__(part, "columns", columns)
        object.__setattr__(part, "keys", keys(len(rows)))
        values.append(metrics_of(part, [name])[name])
    return np.array(values)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (classification, "acc1"),
        (classification, "mean_acc1_acc5"),
        (multilabel, "mean_average_precision"),
        (multilabel, "mean_average_precision_11"),
    ],
)
def test_the_shortcuts_draw_from_the_same_distribution(make, name):
    outcomes = make(count=120)
    slow = drawn_by_hand(np.random.default_rng(5), outcomes, name, 400)
    fast = resampled_metric(outcomes, name, seed=0, num_resamples=4000)
    assert fast.mean() == pytest.approx(slow.mean(), abs=4 * slow.std() / 20)
    assert fast.std() == pytest.approx(slow.std(), rel=0.2)


def test_resampled_means_have_the_binomials_spread():
    points = (np.arange(1000) < 200).astype(float)
    values = resampled_means(np.random.default_rng(0), points[None], 20_000)[0]
    assert values.mean() == pytest.approx(0.2, abs=5e-4)
    assert values.std() == pytest.approx(np.sqrt(0.2 * 0.8 / 1000), rel=0.03)


def test_equal_models_are_equal_in_every_resample():
    rng = np.random.default_rng(0)
    points = np.tile(rng.choice([0.0, 0.5, 1.0], size=97), (2, 1))
    first, second = resampled_means(rng, points, 500)
    assert (first == second).all()


def test_mean_per_class_recall_is_drawn_within_the_classes():
    # One class always right, one always wrong: however many queries of each, the mean stays there.
    labels = np.repeat([0, 1], [900, 100])
    right = (labels == 0)[None].astype(np.float64)
    values = class_means(np.random.default_rng(0), right, labels, 2000)[0]
    assert values.mean() == pytest.approx(0.5, abs=1e-3)
    assert values.std() < 0.006
    # The spread of a mean over classes is that of the small class mostly.
    points = (np.arange(1000) % 2)[None].astype(np.float64)
    values = class_means(np.random.default_rng(0), points, labels, 20_000)[0]
    assert values.std() == pytest.approx(0.5 * np.sqrt(0.25 / 900 + 0.25 / 100), rel=0.03)


def test_equal_models_are_equal_class_by_class_in_every_resample():
    rng = np.random.default_rng(0)
    points = np.tile(rng.integers(0, 2, 60).astype(np.float64), (2, 1))
    first, second = class_means(rng, points, rng.integers(0, 9, 60), 300)
    assert (first == second).all()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_classes_of_few_queries_keep_their_variance(size):
    num_classes, share = 60, 0.7
    labels = np.repeat(np.arange(num_classes), size)
    rng = np.random.default_rng(size)
    variances = [
        class_means(rng, (rng.random((1, len(labels))) < share).astype(float), labels, 200).var()
        for _ in range(40)
    ]
    assert np.mean(variances) == pytest.approx(share * (1 - share) / len(labels), rel=0.06)


def test_strata_keep_their_size_in_every_resample():
    rows = [np.arange(0, 30, 3), np.setdiff1d(np.arange(30), np.arange(0, 30, 3))]
    sums = resample(
        np.random.default_rng(0),
        rows,
        60,
        lambda counts: [counts[part].sum(axis=0) for part in rows],
    )
    assert (sums[0] == 10).all()
    assert (sums[1] == 20).all()


@pytest.mark.parametrize("name", ["acc1", "mean_per_class_recall"])
def test_intervals_cover_the_true_value_about_95_times_in_100(name):
    truth = metrics_of(classification(count=40_000, seed=99), [name])[name]
    covered = []
    for seed in range(200):
        outcomes = classification(count=200, seed=seed)
        low, high = bootstrap_intervals(outcomes, [name], seed=seed, num_resamples=400)[name]
        covered.append(low <= truth <= high)
    assert 0.88 < np.mean(covered) <= 0.99


def many_labels(count, seed):
    """Twelve classes, a twelfth of the queries positive for each."""
    rng = np.random.default_rng(seed)
    positive = rng.random((count, 12)) < 1 / 12
    positive[:12] |= np.eye(12, dtype=bool)
    scores = rng.normal(size=(count, 12)) + 1.2 * positive
    return multilabel_outcomes(keys(count), scores, positive)


@pytest.mark.parametrize("name", ["mean_average_precision", "mean_average_precision_11"])
def test_the_upward_shift_of_resampled_precision_is_taken_off(name):
    truth = metrics_of(many_labels(60_000, seed=99), [name])[name]
    intervals = [
        bootstrap_intervals(many_labels(300, seed), [name], seed=seed, num_resamples=100)[name]
        for seed in range(40)
    ]
    # The percentile interval lies above the truth more often than not.
    assert np.mean([low <= truth <= high for low, high in intervals]) > 0.75
    perfect = np.eye(3, dtype=bool)[np.arange(30) % 3]
    outcomes = multilabel_outcomes(keys(30), perfect.astype(float), perfect)
    assert bootstrap_intervals(outcomes, [name], seed=0)[name] == (1.0, 1.0)


def test_where_all_answers_are_alike_wilsons_interval_stands_in():
    labels = np.arange(20) % 4
    outcomes = classification_outcomes(keys(20), np.eye(4)[labels], labels)
    names = ["acc1", "mean_per_class_recall"]
    intervals = bootstrap_intervals(outcomes, names, seed=0)
    assert intervals == dict.fromkeys(names, wilson_interval(1.0, 20))
    wrong = classification_outcomes(keys(20), np.eye(4)[(labels + 1) % 4], labels)
    interval = bootstrap_intervals(wrong, ["lp_acc1"], seed=0, level=0.9)["lp_acc1"]
    assert interval == wilson_interval(0.0, 20, confidence=0.9)


def test_without_the_overlap_is_the_interval_of_the_rest():
    outcomes = classification()
    overlap = np.arange(len(outcomes)) % 3 == 0
    assert bootstrap_intervals(
        outcomes.with_overlap(overlap), ["acc1"], seed=0, without_overlap=True
    ) == bootstrap_intervals(outcomes.take(~overlap), ["acc1"], seed=0)


def test_a_higher_level_is_wider():
    outcomes = binary()
    narrow = bootstrap_intervals(outcomes, ["roc_auc"], seed=0, level=0.5)["roc_auc"]
    wide = bootstrap_intervals(outcomes, ["roc_auc"], seed=0, level=0.99)["roc_auc"]
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_wrong_settings_are_refused_in_a_sentence():
    outcomes = classification(count=30)
    with pytest.raises(ValueError, match="seed is -1, but it must be a whole number from 0 on"):
        bootstrap_intervals(outcomes, ["acc1"], seed=-1)
    with pytest.raises(ValueError, match="num_resamples is 10, but an interval needs at least 100"):
        bootstrap_intervals(outcomes, ["acc1"], seed=0, num_resamples=10)
    with pytest.raises(ValueError, match="level is 95, but it must lie between 0 and 1"):
        bootstrap_intervals(outcomes, ["acc1"], seed=0, level=95)
    with pytest.raises(ValueError, match="'roc_auc' is no metric of these classification outcomes"):
        bootstrap_intervals(outcomes, ["roc_auc"], seed=0)
    with pytest.raises(ValueError, match="There are no outcomes to resample"):
        bootstrap_intervals(outcomes.take(np.zeros(30, bool)), ["acc1"], seed=0)
    with pytest.raises(ValueError, match="No resample has the metric"):
        percentile_interval(np.array([np.nan]), 0.95)
