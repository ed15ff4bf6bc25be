"""Linear probe: logistic regression on frozen features (Radford et al. 2021, appendix A.3)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_eval.ranking import FloatArray, IntArray, check_features, check_labels, rank_of_label
from declip_eval.zeroshot import classification_metrics, confusion_matrix, predict_against_ties

CLIP_L2_STRENGTHS: tuple[float, ...] = (1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6)
"""Where CLIP's sweep starts; it refines around the best, for which pass a finer grid."""

MAX_ITERATIONS = 1000
"""L-BFGS iterations, CLIP's limit."""


def linear_probe(
    train_features: NDArray[Any],
    train_labels: NDArray[Any],
    test_features: NDArray[Any],
    test_labels: NDArray[Any],
    *,
    seed: int,
    l2_strengths: Sequence[float] = CLIP_L2_STRENGTHS,
    validation_fraction: float = 0.2,
) -> dict[str, float]:
    """Fit a linear classifier on frozen features and score it on the test set.

    The L2 strength is the one of best accuracy on a validation part of the training set (of equal
    ones the largest, hence the simplest model); the classifier is then fitted again on the whole
    training set. CLIP takes image features before the projection, as they come.

    Args:
        train_features: (num_train, dim), any real dtype.
        train_labels: (num_train,) integers; the numbers need not be contiguous.
        test_features: (num_test, dim).
        test_labels: (num_test,) integers, all of them among the training labels.
        seed: of the validation split.
        l2_strengths: weights of half the squared norm of the coefficients against the summed loss
            (scikit-learn's C is 1 over it). With one entry there is nothing to choose, and no
            validation split.
        validation_fraction: share of each class held out while choosing, rounded, but at least
            one sample of a class of two or more and never all of it.

    Returns:
        `lp_acc1`, `lp_acc5` (from 5 classes on) and `lp_mean_per_class_recall` as fractions of 1;
        `l2_strength` chosen, `validation_acc1` at it (absent with one strength), and
        `num_iterations` of the last fit: `MAX_ITERATIONS` means it did not converge.

    Raises:
        ValueError: shapes that do not fit, NaN, one class only, a class of the test set that the
            training set lacks, or a setting out of range.
    """
    train = check_features(train_features, "train_features").astype(np.float64)
    test = check_features(test_features, "test_features").astype(np.float64)
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"train_features has {train.shape[1]} columns and test_features {test.shape[1]}: both "
            "must come from the same layer of the same model."
        )
    classes, train_rows, test_rows = _check_classes(
        check_labels(train_labels, len(train), "train_labels"),
        check_labels(test_labels, len(test), "test_labels"),
    )
    strengths = _check_strengths(l2_strengths)
    results: dict[str, float] = {}
    if len(strengths) > 1:
        strength, accuracy = _choose_strength(
            train, train_rows, strengths, validation_fraction, seed
        )
        results["validation_acc1"] = accuracy
    else:
        strength = strengths[0]
    scores, num_iterations = _fit_and_score(train, train_rows, test, strength)
    # Scores of a regression have no natural scale, so only exact equality is a tie here.
    ranks = rank_of_label(scores, test_rows, tolerance=0.0)
    predicted = predict_against_ties(scores, test_rows, ranks)
    metrics = classification_metrics(ranks, confusion_matrix(test_rows, predicted, len(classes)))
    return {
        **{f"lp_{name}": value for name, value in metrics.items()},
        "l2_strength": strength,
        **results,
        "num_iterations": float(num_iterations),
    }


def stratified_split(
    labels: IntArray, validation_fraction: float, seed: int
) -> tuple[IntArray, IntArray]:
    """Split row numbers into (fit, validation), each class by the same share.

    A class of one sample goes to fit, so that every class can be learned.

    Raises:
        ValueError: a fraction outside (0, 1), or no class with two samples.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}, but it must lie between 0 and 1, such "
            "as 0.2."
        )
    rng = np.random.default_rng(seed)
    validation: list[IntArray] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(round(validation_fraction * len(rows)), 1), len(rows) - 1)
        validation.append(rng.permutation(rows)[:count])
    held_out = np.sort(np.concatenate(validation))
    if not held_out.size:
        raise ValueError(
            "No training class has two samples, so none can be held out to choose the L2 strength: "
            "add samples, or pass a single strength."
        )
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _choose_strength(
    features: FloatArray,
    labels: IntArray,
    strengths: Sequence[float],
    validation_fraction: float,
    seed: int,
) -> tuple[float, float]:
    fit, held_out = stratified_split(labels, validation_fraction, seed)
    best_strength, best_accuracy = 0.0, -1.0
    for strength in sorted(strengths, reverse=True):
        scores, _ = _fit_and_score(features[fit], labels[fit], features[held_out], strength)
        accuracy = float((rank_of_label(scores, labels[held_out], tolerance=0.0) == 0).mean())
        if accuracy > best_accuracy:
            best_strength, best_accuracy = strength, accuracy
    return best_strength, best_accuracy


def _fit_and_score(
    features: FloatArray, labels: IntArray, test_features: FloatArray, strength: float
) -> tuple[FloatArray, int]:
    """Return the test rows' scores (num_test, num_classes) and the iterations that were used."""
    # scikit-learn takes a second to import, which those who only read CLIP_L2_STRENGTHS are spared.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / strength, solver="lbfgs", max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        # Weak regularization on separable classes never converges; num_iterations reports it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels)
    scores = np.asarray(model.decision_function(test_features), dtype=np.float64)
    if scores.ndim == 1:  # Two classes: scikit-learn gives the second one's score alone.
        scores = np.stack([-scores, scores], axis=1)
    return scores, int(np.max(model.n_iter_))


def _check_classes(
    train_labels: IntArray, test_labels: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Return the classes and both label arrays as positions among them."""
    classes = np.unique(train_labels)
    if len(classes) < 2:
        raise ValueError(
            f"train_labels holds one class only ({classes[0]}), but a probe separates at least two."
        )
    unseen = np.setdiff1d(test_labels, classes)
    if unseen.size:
        raise ValueError(
            f"test_labels holds {unseen.size} classes that train_labels lacks (first: "
            f"{unseen[0]}): a probe cannot name them; drop those samples or split by sample, not "
            "by class."
        )
    return classes, np.searchsorted(classes, train_labels), np.searchsorted(classes, test_labels)


def _check_strengths(l2_strengths: Sequence[float]) -> tuple[float, ...]:
    if not len(l2_strengths):
        raise ValueError("l2_strengths is empty: give at least one positive number.")
    for strength in l2_strengths:
        if not (np.isfinite(strength) and strength > 0):
            raise ValueError(
                f"l2_strengths holds {strength}, but a strength is a positive, finite number; for "
                "almost none take 1e-6."
            )
    return tuple(float(strength) for strength in l2_strengths)
