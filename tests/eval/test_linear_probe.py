"""The linear probe on scikit-learn's digits, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from declip_eval.linear_probe import fit_probe, stratified_split
from declip_eval.strength_sweep import CLIP_L2_STRENGTHS


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return images[:400] / 16, labels[:400], images[400:700] / 16, labels[400:700]


def test_real_digits_are_learned_and_the_numbers_are_scikit_learns(digits):
    metrics = fit_probe(*digits, seed=0, l2_strengths=(1e-2, 1.0, 1e2)).metrics
    train, train_labels, test, test_labels = digits
    model = LogisticRegression(C=1 / metrics["l2_strength"], max_iter=1000)
    expected = model.fit(train, train_labels).score(test, test_labels)
    assert metrics["lp_acc1"] == pytest.approx(expected)
    assert metrics["lp_acc1"] > 0.8
    assert metrics["lp_acc1"] <= metrics["lp_acc5"] <= 1
    assert metrics["lp_mean_per_class_recall"] > 0.8
    assert metrics["validation_acc1"] > 0.85
    assert metrics["num_iterations"] < 1000


def test_the_strength_with_the_best_validation_accuracy_is_taken(digits):
    # A million drowns every coefficient; it must not be chosen wherever it stands in the list.
    for strengths in ((1.0, 1e6), (1e6, 1.0)):
        assert fit_probe(*digits, seed=0, l2_strengths=strengths).metrics["l2_strength"] == 1.0


def test_of_equally_good_strengths_the_largest_is_taken():
    features = np.array([[-1.0], [1.0]] * 20)
    labels = np.array([0, 1] * 20)
    metrics = fit_probe(
        features, labels, features, labels, seed=0, l2_strengths=(0.1, 1.0, 0.5)
    ).metrics
    assert metrics["l2_strength"] == 1.0
    assert metrics["lp_acc1"] == 1.0


def test_equal_seeds_give_equal_results(digits):
    first = fit_probe(*digits, seed=3, l2_strengths=(0.1, 10.0)).metrics
    assert fit_probe(*digits, seed=3, l2_strengths=(0.1, 10.0)).metrics == first


def test_renaming_the_classes_changes_nothing(digits):
    train, train_labels, test, test_labels = digits
    expected = fit_probe(*digits, seed=0, l2_strengths=(1.0,)).metrics
    new = np.array([90, 7, 1000, 3, 55, 21, 8, 13, 2, 400])
    got = fit_probe(
        train, new[train_labels], test, new[test_labels], seed=0, l2_strengths=(1.0,)
    ).metrics
    assert got["lp_acc1"] == pytest.approx(expected["lp_acc1"], abs=0.01)


def test_random_labels_sit_at_chance():
    rng = np.random.default_rng(0)
    metrics = fit_probe(
        rng.normal(size=(300, 8)),
        rng.integers(0, 10, 300),
        rng.normal(size=(2000, 8)),
        rng.integers(0, 10, 2000),
        seed=0,
        l2_strengths=(1e2,),
    ).metrics
    assert abs(metrics["lp_acc1"] - 0.1) < 0.03
    assert "validation_acc1" not in metrics


def test_two_classes_and_features_without_information():
    features, labels = np.zeros((40, 3)), np.array([0, 1] * 20)
    metrics = fit_probe(features, labels, features, labels, seed=0).metrics
    assert metrics["lp_acc1"] <= 0.5
    assert "lp_acc5" not in metrics


def test_clips_sweep_refines_around_the_best_and_never_does_worse(digits):
    coarse = fit_probe(*digits, seed=0)
    fine = fit_probe(*digits, seed=0, sweep="clip")
    assert set(coarse.validation_scores) == set(CLIP_L2_STRENGTHS)
    assert set(fine.validation_scores) > set(CLIP_L2_STRENGTHS)
    assert len(fine.validation_scores) <= 15
    assert fine.metrics["validation_acc1"] >= coarse.metrics["validation_acc1"]
    assert fine.metrics["validation_acc1"] == max(fine.validation_scores.values())


def test_a_given_validation_set_chooses_and_is_then_trained_on(digits):
    train, train_labels, test, test_labels = digits
    given = {"validation_features": train[300:], "validation_labels": train_labels[300:]}
    parts = (train[:300], train_labels[:300], test, test_labels)
    probe = fit_probe(*parts, seed=0, **given)
    # The seed only splits, and nothing is split.
    assert fit_probe(*parts, seed=1, **given).metrics == probe.metrics
    whole = fit_probe(*digits, seed=0, l2_strengths=(probe.metrics["l2_strength"],)).metrics
    assert probe.metrics["lp_acc1"] == pytest.approx(whole["lp_acc1"], abs=1.1 / 300)
    left_out = fit_probe(*parts, seed=0, refit_on_validation=False, **given)
    model = LogisticRegression(C=1 / probe.metrics["l2_strength"], max_iter=1000, tol=1e-6)
    expected = model.fit(*parts[:2]).score(test, test_labels)
    assert left_out.metrics["lp_acc1"] == pytest.approx(expected, abs=1.1 / 300)


def test_the_probe_hands_out_the_scores_that_its_numbers_come_from(digits):
    probe = fit_probe(*digits, seed=0, l2_strengths=(1.0,))
    test, test_labels = digits[2:]
    assert probe.converged
    assert np.allclose(probe.scores, test @ probe.weights + probe.bias)
    right = probe.classes[probe.scores.argmax(axis=1)] == test_labels
    assert right.mean() == pytest.approx(probe.metrics["lp_acc1"])
    recalls = [right[test_labels == label].mean() for label in range(10)]
    assert np.mean(recalls) == pytest.approx(probe.metrics["lp_mean_per_class_recall"])


def test_the_strength_can_be_chosen_by_the_mean_over_classes():
    # A rare class: accuracy is best served by leaving it out, its own recall is not.
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [190, 10])
    features = rng.normal(size=(200, 2)) + np.stack([labels * 1.5, labels * 0], axis=1)
    parts = (features, labels, features, labels)
    chosen = {
        name: fit_probe(*parts, seed=0, selection_metric=name).metrics
        for name in ("acc1", "mean_per_class_recall")
    }
    for name, metrics in chosen.items():
        assert f"validation_{name}" in metrics
    by_recall, by_accuracy = chosen["mean_per_class_recall"], chosen["acc1"]
    assert by_recall["lp_mean_per_class_recall"] >= by_accuracy["lp_mean_per_class_recall"]


def test_the_strength_can_be_chosen_by_the_area_under_the_curve_and_by_two_accuracies():
    rng = np.random.default_rng(1)
    labels = np.tile(np.arange(2), 60)
    features = rng.normal(size=(120, 3)) + labels[:, None]
    found = fit_probe(
        features, labels, features, labels, seed=0, selection_metric="roc_auc"
    ).metrics
    assert found["lp_roc_auc"] >= found["lp_acc1"] > 0.7
    assert "validation_roc_auc" in found
    many = np.tile(np.arange(6), 30)
    apart = rng.normal(size=(180, 6)) + 2 * np.eye(6)[many]
    found = fit_probe(apart, many, apart, many, seed=0, selection_metric="mean_acc1_acc5").metrics
    assert found["lp_mean_acc1_acc5"] == (found["lp_acc1"] + found["lp_acc5"]) / 2
    with pytest.raises(ValueError, match="selection_metric is 'roc_auc', but this probe has acc1"):
        fit_probe(apart, many, apart, many, seed=0, selection_metric="roc_auc")


def test_split_is_a_partition_by_class():
    labels = np.array([0] * 50 + [1] * 10 + [2] * 2 + [3])
    fit, held_out = stratified_split(labels, 0.2, seed=1)
    assert sorted([*fit, *held_out]) == list(range(63))
    assert np.bincount(labels[held_out], minlength=4).tolist() == [10, 2, 1, 0]
    again = stratified_split(labels, 0.2, seed=1)
    assert np.array_equal(again[1], held_out)
    assert not np.array_equal(stratified_split(labels, 0.2, seed=2)[1], held_out)
    assert set(labels[stratified_split(labels, 0.99, seed=1)[0]]) == {0, 1, 2, 3}


def test_wrong_input_is_refused_in_a_sentence(digits):
    train, train_labels, test, test_labels = digits

    def probe(a=train, b=train_labels, c=test, d=test_labels, **settings):
        return fit_probe(a, b, c, d, **{"seed": 0, **settings}).metrics

    with pytest.raises(ValueError, match=r"holds one class only \(4\), but a probe separates"):
        probe(b=np.full(400, 4))
    with pytest.raises(ValueError, match=r"1 classes that train_labels lacks \(first: 10\)"):
        probe(d=np.append(test_labels[:-1], 10))
    with pytest.raises(ValueError, match="test_features has NaN"):
        probe(c=np.full_like(test, np.nan))
    with pytest.raises(ValueError, match="64 columns and test_features 60: both must come from"):
        probe(c=test[:, :60])
    with pytest.raises(ValueError, match="there are 400 feature rows: give one label a row"):
        probe(b=train_labels[:-1])
    with pytest.raises(ValueError, match="validation_fraction is 1, but it must lie between"):
        probe(validation_fraction=1)
    with pytest.raises(ValueError, match="holds 0, but a strength is a positive"):
        probe(l2_strengths=(0, 1))
    with pytest.raises(ValueError, match="l2_strengths is empty"):
        probe(l2_strengths=())
    with pytest.raises(ValueError, match="sweep is 'fine', but it is 'clip' or 'grid'"):
        probe(sweep="fine")
    with pytest.raises(ValueError, match="l2_strengths is set and sweep is 'clip', which has"):
        probe(sweep="clip", l2_strengths=(1.0,))
    with pytest.raises(ValueError, match="validation_labels belong together: give both or neither"):
        probe(validation_features=test)
    with pytest.raises(ValueError, match="64 columns and validation_features 60: both must come"):
        probe(validation_features=test[:, :60], validation_labels=test_labels)
    with pytest.raises(ValueError, match=r"validation_labels holds 1 classes that train_labels"):
        probe(validation_features=test, validation_labels=np.append(test_labels[:-1], 10))
    with pytest.raises(ValueError, match="selection_metric is 'acc2', but this probe has acc1"):
        probe(selection_metric="acc2")
    with pytest.raises(ValueError, match="No training class has two samples"):
        probe(a=train[:2], b=np.array([0, 1]), d=np.zeros(300, dtype=int))
