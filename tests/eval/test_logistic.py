"""Our logistic regression against scikit-learn's, driven to its optimum."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from declip_eval.logistic import LogisticProblem, softmax_block


def classes_of_normals(num_rows=600, dim=24, num_classes=5, seed=0):
    """Overlapping classes whose features differ in scale by a factor 100 and have a mean."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, num_rows)])
    labels = labels[:num_rows]
    centers = rng.standard_normal((num_classes, dim))
    features = 0.4 * centers[labels] + rng.standard_normal((num_rows, dim))
    return features * np.logspace(0.5, -1.5, dim) + rng.standard_normal(dim), labels


def sklearn_fit(features, labels, strength):
    model = LogisticRegression(C=1 / strength, tol=1e-7, max_iter=5000)
    return model.fit(features.astype(np.float64), labels)


def relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_coefficients_are_scikit_learns_at_every_strength(scale):
    features, labels = classes_of_normals()
    features = features * scale
    strengths = [1e4, 1e2, 1.0, 1e-1]
    problem = LogisticProblem(features, labels, num_classes=5)
    for model, strength in zip(problem.fit(strengths), strengths, strict=True):
        expected = sklearn_fit(features, labels, strength)
        assert model.l2_strength == strength
        assert model.converged
        assert relative(model.weights, expected.coef_.T) < 5e-3
        scores = model.scores(features)
        assert np.abs(scores - scores.mean(1, keepdims=True)).max() < 100
        agree = scores.argmax(1) == expected.predict(features)
        assert agree.mean() >= 0.995


def test_two_classes_are_scikit_learns_one_classifier():
    features, labels = classes_of_normals(num_classes=2)
    model = LogisticProblem(features, labels, num_classes=2).fit([1.0])[0]
    expected = sklearn_fit(features, labels, 1.0)
    scores = model.scores(features)
    assert relative(model.weights[:, 1], expected.coef_[0]) < 5e-3
    assert relative(scores[:, 1], expected.decision_function(features)) < 5e-3
    assert np.array_equal(scores[:, 0], -scores[:, 1])


def test_several_labels_are_one_binomial_a_class():
    features, labels = classes_of_normals()
    positives = np.stack([labels == 1, labels > 2, labels % 2 == 0], axis=1)
    strengths = [10.0, 0.1]
    models = LogisticProblem(features, positives, num_classes=3).fit(strengths)
    for model, strength in zip(models, strengths, strict=True):
        for column in range(3):
            expected = sklearn_fit(features, positives[:, column], strength)
            assert relative(model.weights[:, column], expected.coef_[0]) < 5e-3
            assert model.bias[column] == pytest.approx(expected.intercept_[0], rel=0.02, abs=0.02)


def test_the_bias_is_free_and_takes_up_any_shift_of_the_features():
    features, labels = classes_of_normals()
    near = LogisticProblem(features, labels, num_classes=5).fit([1.0])[0]
    far = LogisticProblem(features + 50.0, labels, num_classes=5).fit([1.0])[0]
    assert relative(far.weights, near.weights) < 5e-3
    # With weights drowned the bias alone gives each class its share.
    drowned = LogisticProblem(features, labels, num_classes=5).fit([1e9])[0]
    shares = np.exp(drowned.bias) / np.exp(drowned.bias).sum()
    assert np.allclose(shares, np.bincount(labels) / len(labels), atol=1e-3)


def test_strengths_beside_it_and_their_order_change_no_answer():
    features, labels = classes_of_normals(num_rows=5000)
    one = LogisticProblem(features, labels, num_classes=5, num_threads=1)
    alone = one.fit([1.0])[0]
    company = LogisticProblem(features, labels, num_classes=5, num_threads=3).fit([1e-1, 1.0, 1e3])
    assert [model.l2_strength for model in company] == [1e-1, 1.0, 1e3]
    assert relative(company[1].weights, alone.weights) < 3e-3
    # A warm start ends where a cold one does.
    assert one.fit([1e-1])[0].converged
    assert relative(one.fit([1e-1])[0].weights, company[0].weights) < 2e-2


def test_equal_calls_give_equal_bits_on_any_number_of_threads():
    features, labels = classes_of_normals(num_rows=9000)
    models = [
        LogisticProblem(features, labels, num_classes=5, num_threads=threads).fit([1.0])[0]
        for threads in (1, 2, 2, 5)
    ]
    for model in models[1:]:
        assert np.array_equal(models[0].weights, model.weights)
        assert np.array_equal(models[0].bias, model.bias)


def test_float16_and_constant_features_are_fine():
    features, labels = classes_of_normals()
    half = np.hstack([features, np.full((len(features), 2), 3.0)]).astype(np.float16)
    model = LogisticProblem(half, labels, num_classes=5).fit([1.0])[0]
    expected = sklearn_fit(half, labels, 1.0)
    assert np.abs(model.weights[-2:]).max() < 1e-6
    assert relative(model.weights, expected.coef_.T) < 1e-2


def test_real_digits_take_fewer_passes_than_scikit_learn_and_agree():
    images, labels = (array[::3] for array in load_digits(return_X_y=True))
    model = LogisticProblem(images, labels, num_classes=10).fit([1e2])[0]
    # Within its usual tolerance and 1,000 iterations scikit-learn is not at the optimum.
    plain = LogisticRegression(C=1e-2, max_iter=10_000, tol=1e-6).fit(images, labels)
    agree = model.scores(images).argmax(1) == plain.predict(images)
    assert agree.mean() >= 0.999
    assert model.num_iterations < plain.n_iter_[0]


def test_scores_that_would_overflow_do_not():
    scores = np.array([[[900.0, -900.0], [-900.0, -900.0]]], dtype=np.float32)
    losses, residuals, spread = softmax_block(scores, np.array([1, 0]))
    assert losses[0] == pytest.approx(1800 + np.log(2))
    assert np.allclose(residuals[0], [[1, -0.5], [-1, 0.5]])
    assert np.allclose(spread[0], [0.25, 0.25])


def objective(weights, bias, features, labels, strength):
    scores = features @ weights + bias
    right = scores[np.arange(len(labels)), labels]
    loss = (logsumexp(scores, axis=1) - right).mean()
    return loss + 0.5 * strength / len(labels) * (weights**2).sum()


@pytest.mark.parametrize("kind", ["rows of any length", "one far row", "every other row long"])
def test_rows_that_are_far_longer_than_others_do_not_stop_the_descent(kind):
    features, labels = classes_of_normals(num_rows=900)
    numbers = np.arange(len(features))[:, None]
    lengths = {
        "rows of any length": np.exp(np.random.default_rng(1).standard_normal(numbers.shape)),
        "one far row": np.where(numbers == 499, 100.0, 1.0),
        "every other row long": np.where(numbers % 2, 10.0, 1.0),
    }[kind]
    features = features * lengths
    strengths = [1e4, 1.0]
    models = LogisticProblem(features, labels, num_classes=5).fit(strengths)
    for model, strength in zip(models, strengths, strict=True):
        theirs = LogisticRegression(C=1 / strength, max_iter=2000).fit(features, labels)
        best = objective(theirs.coef_.T, theirs.intercept_, features, labels, strength)
        own = objective(model.weights, model.bias, features, labels, strength)
        assert own <= best * (1 + 3e-5)
        assert model.num_iterations < 200


def test_features_too_large_for_float32_are_refused():
    with pytest.raises(ValueError, match=r"A feature is 1e\+30 in size, but a probe takes up to"):
        LogisticProblem(np.array([[-1e30], [1.0]]), np.array([0, 1]), num_classes=2)
