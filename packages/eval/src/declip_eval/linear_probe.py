"""Linear probe: logistic regression on frozen features (Radford et al. 2021, appendix A.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from declip_eval.logistic import MAX_ITERATIONS, LogisticProblem
from declip_eval.metrics import mean_acc1_acc5, roc_auc
from declip_eval.multilabel_probe import (
    MULTILABEL_METRICS,
    check_every_class_is_both,
    check_positives,
    multilabel_metrics,
    multilabel_split,
)
from declip_eval.ranking import FloatArray, IntArray, check_features, check_labels, rank_of_label
from declip_eval.strength_sweep import CLIP_L2_STRENGTHS, Sweep, sweep_grid, sweep_like_clip
from declip_eval.zeroshot import classification_metrics, confusion_matrix, predict_against_ties

__all__ = [
    "CLIP_L2_STRENGTHS",
    "MAX_ITERATIONS",
    "Probe",
    "fit_probe",
    "stratified_split",
]


@dataclass(frozen=True)
class Probe:
    """A probe's numbers, and what they can be checked against."""

    metrics: dict[str, float]
    """`lp_...` metrics as fractions of 1, and how they came about; see `fit_probe`."""
    scores: FloatArray
    """(num_test, num_classes): the classifier's scores of the test set."""
    classes: IntArray
    """(num_classes,): the label that each column of `scores` stands for."""
    weights: FloatArray
    """(dim, num_classes)."""
    bias: FloatArray
    """(num_classes,)."""
    validation_scores: dict[float, float]
    """Validation metric of each L2 strength that was tried, in that order."""
    converged: bool
    """Whether the last fit met both of `logistic`'s rules; else it spent its iterations, or even
    float64's rounding ended it."""


class _Set(NamedTuple):
    features: NDArray[Any]
    targets: NDArray[Any]
    """(num,) positions among the classes, or (num, num_classes) bool."""

    def take(self, rows: IntArray) -> _Set:
        return _Set(self.features[rows], self.targets[rows])


def fit_probe(
    train_features: NDArray[Any],
    train_labels: NDArray[Any],
    test_features: NDArray[Any],
    test_labels: NDArray[Any],
    *,
    seed: int,
    l2_strengths: Sequence[float] = CLIP_L2_STRENGTHS,
    validation_fraction: float = 0.2,
    validation_features: NDArray[Any] | None = None,
    validation_labels: NDArray[Any] | None = None,
    sweep: Literal["clip", "grid"] = "grid",
    device: str = "cpu",
    multilabel: bool = False,
    selection_metric: str | None = None,
    refit_on_validation: bool = True,
) -> Probe:
    """Fit a linear classifier on frozen features and score it on the test set.

    The L2 strength is the one of best validation metric (of equal ones the largest, hence the
    simplest model); the classifier is then fitted again on training and validation set together.
    CLIP takes image features before the projection, as they come.

    Args:
        train_features: (num_train, dim), any real dtype.
        train_labels: (num_train,) integers; the numbers need not be contiguous. With `multilabel`
            (num_train, num_classes) booleans.
        test_features: (num_test, dim).
        test_labels: as the training labels, and every class among those.
        seed: of the validation split; not used where a validation set is given.
        l2_strengths: weights of half the squared norm of the coefficients against the summed loss
            (scikit-learn's C is 1 over it). With one entry there is nothing to choose, and no
            validation split.
        validation_fraction: share of each class held out while choosing, rounded, but at least
            one sample of a class of two or more and never all of it. Not used where a validation
            set is given.
        validation_features: (num_validation, dim), the dataset's own validation split, or None.
        validation_labels: its labels.
        sweep: "grid" tries every one of `l2_strengths`; "clip" starts with CLIP's seven and
            halves the distance around the best, see `strength_sweep.sweep_like_clip`.
        device: "cpu", or a torch device such as "cuda", where all strengths are fitted together.
        multilabel: a sample may belong to several classes: one classifier a class against the
            rest, and mean average precision.
        selection_metric: the metric of the result that chooses the strength, without its `lp_`;
            by default `acc1`, or with `multilabel` `mean_average_precision_11`. Also
            `mean_acc1_acc5` (from 5 classes on) and `roc_auc` (of two).
        refit_on_validation: whether a given validation set is trained on once the strength is
            chosen; few-shot probes must not.

    Returns:
        The classifier, its test scores, and its `metrics`: `lp_acc1`, `lp_acc5` (from 5 classes
        on) and `lp_mean_per_class_recall` as fractions of 1; with `multilabel`
        `lp_mean_average_precision_11` and `lp_mean_average_precision`. `l2_strength` chosen,
        `validation_acc1` at it (or the metric that chose; absent with one strength), and
        `num_iterations` of the last fit, at most `MAX_ITERATIONS`.

    Raises:
        ValueError: shapes that do not fit, NaN, one class only, a class of the test or validation
            set that the training set lacks, or a setting out of range.
    """
    parts = {"train": (train_features, train_labels), "test": (test_features, test_labels)}
    if (validation_features is None) != (validation_labels is None):
        raise ValueError(
            "validation_features and validation_labels belong together: give both or neither."
        )
    if validation_features is not None and validation_labels is not None:
        parts["validation"] = (validation_features, validation_labels)
    sets, classes = _check_sets(parts, multilabel)
    strengths = _check_strengths(l2_strengths, sweep)
    score = _scorer(multilabel, len(classes), selection_metric)
    train, results, tried = sets["train"], dict[str, float](), dict[float, float]()
    strength = strengths[0]
    if len(strengths) > 1:
        fit, held_out = train, sets.get("validation")
        if held_out is None:
            split = multilabel_split if multilabel else stratified_split
            fit_rows, held_out_rows = split(train.targets, validation_fraction, seed)
            fit, held_out = train.take(fit_rows), train.take(held_out_rows)
        chosen = _choose_strength(fit, held_out, len(classes), strengths, sweep, device, score)
        strength, tried = chosen.best, chosen.scores
        results[f"validation_{score.metric}"] = chosen.score
    if "validation" in sets and refit_on_validation:
        train = _join(train, sets["validation"])
    model = _problem(train, len(classes), device).fit([strength])[0]
    scores = model.scores(sets["test"].features)
    metrics = {
        **{f"lp_{k}": v for k, v in score.metrics(scores, sets["test"].targets).items()},
        "l2_strength": strength,
        **results,
        "num_iterations": float(model.num_iterations),
    }
    return Probe(metrics, scores, classes, model.weights, model.bias, tried, model.converged)


class _Scorer(NamedTuple):
    metric: str
    metrics: Callable[[FloatArray, NDArray[Any]], dict[str, float]]


def _scorer(multilabel: bool, num_classes: int, metric: str | None) -> _Scorer:
    def single(scores: FloatArray, labels: IntArray) -> dict[str, float]:
        # Scores of a regression have no natural scale, so only exact equality is a tie here.
        ranks = rank_of_label(scores, labels, tolerance=0.0)
        predicted = predict_against_ties(scores, labels, ranks)
        found = classification_metrics(ranks, confusion_matrix(labels, predicted, num_classes))
        if metric == "mean_acc1_acc5":
            found[metric] = mean_acc1_acc5(ranks)
        if metric == "roc_auc":
            found[metric] = roc_auc(scores[:, 1] - scores[:, 0], labels)
        return found

    names: tuple[str, ...] = MULTILABEL_METRICS
    if not multilabel:
        names = ("acc1", "mean_per_class_recall")
        names += ("acc5", "mean_acc1_acc5") if num_classes >= 5 else ()
        names += ("roc_auc",) if num_classes == 2 else ()
    if metric is not None and metric not in names:
        raise ValueError(
            f"selection_metric is {metric!r}, but this probe has {', '.join(names)}: take one of "
            "those, or leave it out for the first."
        )
    return _Scorer(metric or names[0], multilabel_metrics if multilabel else single)


def _choose_strength(
    fit: _Set,
    held_out: _Set,
    num_classes: int,
    strengths: Sequence[float],
    sweep: str,
    device: str,
    score: _Scorer,
) -> Sweep:
    problem = _problem(fit, num_classes, device)

    def score_strengths(batch: Sequence[float]) -> list[float]:
        return [
            score.metrics(model.scores(held_out.features), held_out.targets)[score.metric]
            for model in problem.fit(batch)
        ]

    if sweep == "clip":
        return sweep_like_clip(score_strengths)
    return sweep_grid(score_strengths, strengths)


def _problem(data: _Set, num_classes: int, device: str) -> LogisticProblem:
    if device == "cpu":
        return LogisticProblem(data.features, data.targets, num_classes=num_classes)
    from declip_eval.logistic_torch import TorchLogisticProblem

    return TorchLogisticProblem(data.features, data.targets, num_classes=num_classes, device=device)


def _join(first: _Set, second: _Set) -> _Set:
    return _Set(
        np.concatenate([first.features, second.features]),
        np.concatenate([first.targets, second.targets]),
    )


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


def _check_sets(
    parts: dict[str, tuple[NDArray[Any], NDArray[Any]]], multilabel: bool
) -> tuple[dict[str, _Set], IntArray]:
    """Return the sets with labels as positions among the classes, and the classes."""
    sets: dict[str, _Set] = {}
    for name, (features, labels) in parts.items():
        checked = check_features(features, f"{name}_features")
        check = check_positives if multilabel else check_labels
        sets[name] = _Set(checked, check(labels, len(checked), f"{name}_labels"))
    train = sets["train"]
    for name, other in sets.items():
        if other.features.shape[1] != train.features.shape[1]:
            raise ValueError(
                f"train_features has {train.features.shape[1]} columns and {name}_features "
                f"{other.features.shape[1]}: both must come from the same layer of the same model."
            )
        if multilabel and other.targets.shape[1] != train.targets.shape[1]:
            raise ValueError(
                f"train_labels has {train.targets.shape[1]} classes and {name}_labels "
                f"{other.targets.shape[1]}: both must have the same classes in the same order."
            )
    if multilabel:
        check_every_class_is_both(train.targets, "train_labels")
        return sets, np.arange(train.targets.shape[1])
    classes = np.unique(train.targets)
    if len(classes) < 2:
        raise ValueError(
            f"train_labels holds one class only ({classes[0]}), but a probe separates at least two."
        )
    for name, other in sets.items():
        unseen = np.setdiff1d(other.targets, classes)
        if unseen.size:
            raise ValueError(
                f"{name}_labels holds {unseen.size} classes that train_labels lacks (first: "
                f"{unseen[0]}): a probe cannot name them; drop those samples or split by sample, "
                "not by class."
            )
    return {
        name: _Set(part.features, np.searchsorted(classes, part.targets))
        for name, part in sets.items()
    }, classes


def _check_strengths(l2_strengths: Sequence[float], sweep: str) -> tuple[float, ...]:
    if sweep not in ("clip", "grid"):
        raise ValueError(f"sweep is {sweep!r}, but it is 'clip' or 'grid'.")
    if sweep == "clip" and tuple(l2_strengths) != CLIP_L2_STRENGTHS:
        raise ValueError(
            "l2_strengths is set and sweep is 'clip', which has strengths of its own: leave "
            "l2_strengths out, or take sweep='grid'."
        )
    if not len(l2_strengths):
        raise ValueError("l2_strengths is empty: give at least one positive number.")
    for strength in l2_strengths:
        if not (np.isfinite(strength) and strength > 0):
            raise ValueError(
                f"l2_strengths holds {strength}, but a strength is a positive, finite number; for "
                "almost none take 1e-6."
            )
    return tuple(float(strength) for strength in l2_strengths)
