"""Probes of several labels a sample."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from declip_eval.linear_probe import fit_probe
from declip_eval.multilabel_probe import multilabel_metrics, multilabel_split


@pytest.fixture(scope="module")
def samples():
    """Four classes, each true where a direction's projection is large; the last one is rare."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((900, 10))
    directions = rng.standard_normal((10, 4))
    scores = features @ directions + rng.standard_normal((900, 4))
    positives = scores > np.array([0.0, 1.0, -1.0, 5.0])
    return features[:600], positives[:600], features[600:], positives[600:]


def test_one_classifier_a_class_and_the_numbers_are_scikit_learns(samples):
    train, train_labels, test, test_labels = samples
    probe = fit_probe(*samples, seed=0, l2_strengths=(1.0,), multilabel=True)
    scores = np.stack(
        [
            LogisticRegression(tol=1e-8).fit(train, y).decision_function(test)
            for y in train_labels.T
        ],
        axis=1,
    )
    expected = np.mean([average_precision_score(test_labels[:, c], scores[:, c]) for c in range(4)])
    assert probe.metrics["lp_mean_average_precision"] == pytest.approx(expected, abs=1e-3)
    assert np.allclose(probe.scores, scores, atol=0.05)
    assert probe.classes.tolist() == [0, 1, 2, 3]
    assert "lp_acc1" not in probe.metrics


def test_the_strength_is_chosen_by_eleven_point_precision(samples):
    found = fit_probe(*samples, seed=0, multilabel=True, sweep="clip").metrics
    assert 0.8 < found["validation_mean_average_precision_11"] <= 1
    assert 0.8 < found["lp_mean_average_precision_11"] <= 1
    assert found["l2_strength"] < 1e5
    other = fit_probe(
        *samples, seed=0, multilabel=True, selection_metric="mean_average_precision"
    ).metrics
    assert "validation_mean_average_precision" in other


def test_random_labels_have_the_precision_of_their_share():
    rng = np.random.default_rng(1)
    features, labels = rng.standard_normal((2000, 6)), rng.random((2000, 3)) < 0.3
    parts = (features[:500], labels[:500], features[500:], labels[500:])
    found = fit_probe(*parts, seed=0, l2_strengths=(1.0,), multilabel=True).metrics
    assert abs(found["lp_mean_average_precision"] - 0.3) < 0.06


def test_a_class_without_a_positive_in_the_test_set_is_left_out_of_the_mean():
    scores = np.array([[3.0, 0], [2, 0], [1, 0]])
    positives = np.array([[True, False], [False, False], [True, False]])
    found = multilabel_metrics(scores, positives)
    assert found["mean_average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["mean_average_precision_11"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_split_is_a_partition_with_every_class_on_both_sides(samples):
    positives = samples[1]
    fit, held_out = multilabel_split(positives, 0.25, seed=3)
    assert sorted([*fit, *held_out]) == list(range(600))
    shares = positives[held_out].sum(0) / positives.sum(0)
    assert np.all((shares > 0.1) & (shares < 0.45))
    again = multilabel_split(positives, 0.25, seed=3)
    assert np.array_equal(again[1], held_out)
    lone = np.array([[1, 0], [0, 1], [0, 1], [0, 0], [0, 0]], dtype=bool)
    assert lone[multilabel_split(lone, 0.5, seed=0)[0]].any(0).all()


def test_wrong_input_is_refused_in_a_sentence(samples):
    train, train_labels, test, test_labels = samples

    def probe(a=train, b=train_labels, c=test, d=test_labels, **settings):
        return fit_probe(a, b, c, d, **{"seed": 0, "multilabel": True, **settings}).metrics

    with pytest.raises(ValueError, match=r"train_labels has shape \(600,\).*need shape \(600, num"):
        probe(b=train_labels[:, 0])
    with pytest.raises(ValueError, match="holds other values than 0 and 1"):
        probe(b=train_labels * 2)
    with pytest.raises(ValueError, match="4 classes and test_labels 3: both must have the same"):
        probe(d=test_labels[:, :3])
    never = train_labels.copy()
    never[:, 2] = False
    with pytest.raises(ValueError, match=r"1 classes that no sample has \(first: 2\)"):
        probe(b=never)
    with pytest.raises(ValueError, match=r"1 classes that every sample has \(first: 2\)"):
        probe(b=train_labels | np.array([False, False, True, False]))
    with pytest.raises(ValueError, match="selection_metric is 'acc1', but this probe has mean_av"):
        probe(selection_metric="acc1")
    with pytest.raises(ValueError, match="validation_fraction is 0, but it must lie between"):
        probe(validation_fraction=0)
    with pytest.raises(ValueError, match="No class has samples enough to hold one out"):
        multilabel_split(np.array([[True]]), 0.5, seed=0)
