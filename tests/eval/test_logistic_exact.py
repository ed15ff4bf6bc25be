"""The passes in float64, for what float32's rounding has ended."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

from declip_eval import logistic, logistic_exact
from declip_eval.logistic import LogisticProblem
from declip_eval.logistic_exact import doubts_of, moved

NUM_CLASSES, DIM = 5, 24


def classes_of_normals(num_rows=800, seed=0):
    """Overlapping classes whose features differ in scale by a factor 100 and have a mean."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % NUM_CLASSES
    centers = rng.standard_normal((NUM_CLASSES, DIM))
    features = 0.4 * centers[labels] + rng.standard_normal((num_rows, DIM))
    return features * np.logspace(0.5, -1.5, DIM) + rng.standard_normal(DIM), labels


def with_a_far_row(features):
    """One row a million times as long as the others."""
    return features * np.where(np.arange(len(features)) == 7, 1e6, 1.0)[:, None]


def objective(model, features, labels):
    scores = features @ model.weights + model.bias
    right = scores[np.arange(len(labels)), labels]
    loss = (logsumexp(scores, axis=1) - right).mean()
    return loss + 0.5 * model.l2_strength / len(labels) * (model.weights**2).sum()


def without_finish(monkeypatch):
    monkeypatch.setattr(logistic_exact, "finish", lambda problem, found, strengths: found)


@pytest.mark.parametrize("kind", ["a far row", "columns", "all"])
def test_what_float32_cannot_reach_is_reached(kind, monkeypatch):
    features, labels = classes_of_normals()
    features = {
        "a far row": with_a_far_row(features),
        "columns": features * np.logspace(-4, 4, DIM),
        "all": features * 1e8,
    }[kind]
    model = LogisticProblem(features, labels, num_classes=NUM_CLASSES).fit([1.0])[0]
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(features, labels)
    other = model._replace(weights=theirs.coef_.T, bias=theirs.intercept_)
    assert model.converged
    assert model.num_iterations <= logistic.MAX_ITERATIONS
    assert objective(model, features, labels) <= objective(other, features, labels)
    without_finish(monkeypatch)
    before = LogisticProblem(features, labels, num_classes=NUM_CLASSES).fit([1.0])[0]
    assert not before.converged
    assert objective(model, features, labels) <= objective(before, features, labels) * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["two classes", "several labels"])
def test_one_classifier_a_class_is_reached_as_well(kind):
    features, labels = classes_of_normals()
    features = with_a_far_row(features)
    several = np.stack([labels == 1, labels > 2], axis=1)
    targets = several if kind == "several labels" else labels // 3
    problem = LogisticProblem(features, targets, num_classes=2)
    model = problem.fit([1.0])[0]
    first = several[:, 0] if kind == "several labels" else labels // 3 == 0
    theirs = LogisticRegression(C=1.0, max_iter=1000, tol=1e-6).fit(features, first)
    scores = model.scores(features)[:, 0]
    agree = (scores > 0) == theirs.predict(features)
    assert agree.mean() > 0.98


def test_what_has_converged_stays_as_it_was_to_the_bit(monkeypatch):
    features, labels = classes_of_normals()
    features = features * np.logspace(-3, 3, DIM)
    strengths = [1e4, 1e-2]
    found = LogisticProblem(features, labels, num_classes=NUM_CLASSES).fit(strengths)
    without_finish(monkeypatch)
    before = LogisticProblem(features, labels, num_classes=NUM_CLASSES).fit(strengths)
    assert [model.converged for model in before] == [True, False]
    assert np.array_equal(found[0].weights, before[0].weights)
    assert found[0].num_iterations == before[0].num_iterations
    assert not np.array_equal(found[1].weights, before[1].weights)


def test_all_iterations_together_are_limited(monkeypatch):
    features, labels = classes_of_normals()
    monkeypatch.setattr(logistic, "MAX_ITERATIONS", 300)
    monkeypatch.setattr(logistic_exact, "MAX_ITERATIONS", 300)
    far = features * np.logspace(-7, 7, DIM)
    model = LogisticProblem(far, labels, num_classes=NUM_CLASSES).fit([1e-6])[0]
    assert not model.converged
    assert model.num_iterations <= 300


def test_equal_calls_give_equal_bits_on_any_number_of_threads():
    features, labels = classes_of_normals(num_rows=2500)
    features = with_a_far_row(features)
    one, two = (
        LogisticProblem(features, labels, num_classes=NUM_CLASSES, num_threads=n).fit([1.0])[0]
        for n in (1, 2)
    )
    assert np.array_equal(one.weights, two.weights)


def test_moving_the_features_and_the_points_changes_no_score():
    rng = np.random.default_rng(0)
    rows, points, shift = rng.normal(size=(9, 4)), rng.normal(size=(2, 3, 5)), rng.normal(size=4)
    other = moved(points, shift)
    for before, after in zip(points, other, strict=True):
        expected = rows @ before[:, :-1].T + before[:, -1]
        np.testing.assert_allclose((rows - shift) @ after[:, :-1].T + after[:, -1], expected)


def test_doubt_is_largest_between_classes_and_never_nothing():
    certain, unsure = doubts_of(np.array([[0.0, 900.0], [2.0, 2.0]]))
    assert 0 < certain < 1e-5
    assert unsure == pytest.approx(0.5)
    # One column decides between two classes.
    assert doubts_of(np.array([[0.0]])) == pytest.approx(0.5)
