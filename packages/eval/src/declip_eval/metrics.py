"""Metrics of ranks and scores, exact with ties, in numpy.

**Ties.** Between classes they count as wrong: every accuracy here is computed from ranks, and a
rank counts the wrong classes that score at least as high as the right one (see `ranking`).
CLIP_benchmark takes torch's `topk`, which breaks ties by position, so a model that gives all
classes one score gets whatever stands first right there and nothing here. Between samples (average
precision, ROC AUC) samples of one score pass a threshold together, as in scikit-learn: the order
of the samples never matters, and a model of one score for all is at chance. CLIP_benchmark sorts
samples of one score in no fixed order, so there the average precision of tied scores may change
from run to run. Without ties all three agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_eval.ranking import FloatArray, IntArray

_RECALL_LEVELS = 10
"""PASCAL VOC's recall levels are 0, 1/10, ... 10/10."""


class PrecisionCurve:
    """Precision at every recall of one class, for any weighting of the samples.

    The samples are sorted once; a weighting (a bootstrap resample is one) costs a sum per segment.
    """

    def __init__(self, scores: NDArray[Any], is_positive: NDArray[Any]) -> None:
        """Sort the samples.

        Args:
            scores: (num_samples,), higher is more surely positive; infinities are fine.
            is_positive: (num_samples,) bool or 0 and 1.

        Raises:
            ValueError: shapes that differ, no sample, NaN, or labels other than 0 and 1.
        """
        values, positive = _check_binary(scores, is_positive)
        order = np.argsort(-values, kind="stable")
        ends_group = np.append(values[order][1:] != values[order][:-1], True)
        group = np.cumsum(ends_group) - ends_group
        sorted_positive = positive[order]
        group_of_positives = group[sorted_positive]
        new_group = np.append(True, group_of_positives[1:] != group_of_positives[:-1])
        self.num_samples = len(values)
        self._positives = order[sorted_positive]
        self._positive_starts = np.flatnonzero(new_group[: len(group_of_positives)])
        # Segment k holds all samples after segment k - 1 up to the end of the k-th group of equal
        # scores that has a positive; precision can only peak at those ends.
        ends = np.flatnonzero(ends_group)[group_of_positives[self._positive_starts]] + 1
        self._samples = order[: int(ends[-1])] if ends.size else order[:0]
        self._sample_starts = np.append(0, ends[:-1]).astype(np.int64)

    def average_precision(self, weights: NDArray[Any] | None = None) -> FloatArray:
        """Return the sum over thresholds of precision times the gain in recall.

        scikit-learn's `average_precision_score`, and CLIP_benchmark's definition where no two
        scores are equal (the mean, over the positives, of the precision at each).

        Args:
            weights: (num_samples, num_weightings) whole numbers; None: each sample once.

        Returns:
            (num_weightings,) float64, NaN where no positive has a weight.
        """
        gained, _, precision, total = self._precision(weights)
        if not len(gained):
            return np.full(len(total), np.nan)
        with np.errstate(invalid="ignore"):
            return np.asarray((gained * precision).sum(axis=0) / total, dtype=np.float64)

    def eleven_point(self, weights: NDArray[Any] | None = None) -> FloatArray:
        """Return PASCAL VOC 2007's interpolated average precision.

        The mean over the recalls 0, 0.1, ... 1 of the highest precision at that recall or more
        (Everingham et al. 2010, section 4.2).

        Args:
            weights: (num_samples, num_weightings) whole numbers; None: each sample once.

        Returns:
            (num_weightings,) float64, NaN where no positive has a weight.
        """
        gained, recalled, precision, total = self._precision(weights)
        if not len(gained):
            return np.full(len(total), np.nan)
        best_from_here = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        columns = np.arange(len(total))
        summed = np.zeros(len(total))
        for level in range(_RECALL_LEVELS + 1):
            # In whole numbers: 3 of 10 positives are a recall of 0.3, not a little less or more.
            first = np.count_nonzero(_RECALL_LEVELS * recalled < level * total, axis=0)
            summed += best_from_here[np.minimum(first, len(gained) - 1), columns]
        return np.where(total > 0, summed / (_RECALL_LEVELS + 1), np.nan)

    def _precision(
        self, weights: NDArray[Any] | None
    ) -> tuple[NDArray[Any], NDArray[Any], FloatArray, NDArray[Any]]:
        """Positives gained and recalled, precision (num_segments, num_weightings), and all
        positives (num_weightings,)."""
        if weights is None:
            weights = np.ones((self.num_samples, 1), dtype=np.int32)
        if not self._positives.size:
            nothing = np.zeros((0, weights.shape[1]), dtype=np.int64)
            return nothing, nothing, nothing.astype(np.float64), nothing.sum(axis=0)
        gained = np.add.reduceat(weights[self._positives], self._positive_starts, axis=0)
        retrieved = np.add.reduceat(weights[self._samples], self._sample_starts, axis=0)
        recalled = np.cumsum(gained, axis=0, dtype=np.int64)
        precision = recalled / np.maximum(np.cumsum(retrieved, axis=0, dtype=np.int64), 1)
        return gained, recalled, precision, recalled[-1]


class RocCurve:
    """The order of positives and negatives by one score, for any weighting of the samples."""

    def __init__(self, scores: NDArray[Any], is_positive: NDArray[Any]) -> None:
        """Sort the samples.

        Args:
            scores: (num_samples,), higher is more surely positive; infinities are fine.
            is_positive: (num_samples,) bool or 0 and 1.

        Raises:
            ValueError: shapes that differ, no sample, NaN, labels other than 0 and 1, or only one
                of the two classes.
        """
        values, positive = _check_binary(scores, is_positive)
        if positive.all() or not positive.any():
            raise ValueError(
                f"All {len(positive)} samples are {'positive' if positive.all() else 'negative'}, "
                "but a ROC curve needs both: evaluate a split that has both classes."
            )
        order = np.argsort(values, kind="stable")
        self.num_samples = len(values)
        self._starts = np.flatnonzero(np.append(True, values[order][1:] != values[order][:-1]))
        self._order = order
        self._is_positive = positive[order][:, None]

    def area(self, weights: NDArray[Any] | None = None) -> FloatArray:
        """Return the area under the curve: the share of (positive, negative) pairs in right order,
        pairs of one score counting half (Hanley and McNeil 1982).

        Args:
            weights: (num_samples, num_weightings) whole numbers; None: each sample once.

        Returns:
            (num_weightings,) float64, NaN where one of the classes has no weight.
        """
        if weights is None:
            weights = np.ones((self.num_samples, 1), dtype=np.int64)
        ordered = weights[self._order].astype(np.int64)
        positives = np.add.reduceat(ordered * self._is_positive, self._starts, axis=0)
        negatives = np.add.reduceat(ordered * ~self._is_positive, self._starts, axis=0)
        twice_below = 2 * np.cumsum(negatives, axis=0) - negatives
        pairs = positives.sum(axis=0) * negatives.sum(axis=0)
        with np.errstate(invalid="ignore"):
            return np.asarray((positives * twice_below).sum(axis=0) / (2 * pairs), np.float64)


def average_precision(scores: NDArray[Any], is_positive: NDArray[Any]) -> FloatArray:
    """Return each class's average precision, as scikit-learn and CLIP_benchmark define it.

    Args:
        scores: (num_samples, num_classes).
        is_positive: (num_samples, num_classes) bool or 0 and 1.

    Returns:
        (num_classes,) float64 in 0 to 1; NaN for a class without positives, which has no precision
        (CLIP_benchmark and scikit-learn say 0 there, which lowers their mean).

    Raises:
        ValueError: shapes that differ or hold nothing, NaN, or labels other than 0 and 1.
    """
    return np.concatenate([curve.average_precision() for curve in curves(scores, is_positive)])


def eleven_point_ap(scores: NDArray[Any], is_positive: NDArray[Any]) -> FloatArray:
    """Return each class's 11-point average precision; see `PrecisionCurve.eleven_point`.

    Args:
        scores: (num_samples, num_classes).
        is_positive: (num_samples, num_classes) bool or 0 and 1.

    Returns:
        (num_classes,) float64 in 0 to 1; NaN for a class without positives.

    Raises:
        ValueError: shapes that differ or hold nothing, NaN, or labels other than 0 and 1.
    """
    return np.concatenate([curve.eleven_point() for curve in curves(scores, is_positive)])


def curves(scores: NDArray[Any], is_positive: NDArray[Any]) -> list[PrecisionCurve]:
    """Return one `PrecisionCurve` a class; arguments and errors as in `average_precision`."""
    table, positive = np.asarray(scores), np.asarray(is_positive)
    if table.ndim != 2 or table.shape != positive.shape or not table.size:
        raise ValueError(
            f"scores has shape {table.shape} and is_positive {positive.shape}, but both need shape "
            "(num_samples, num_classes) with at least one of each."
        )
    return [PrecisionCurve(table[:, c], positive[:, c]) for c in range(table.shape[1])]


def mean_over_classes(per_class: FloatArray) -> float:
    """Return the mean of (num_classes,) values over the classes that have one (are not NaN).

    Raises:
        ValueError: no class has a value.
    """
    known = per_class[~np.isnan(per_class)]
    if not known.size:
        raise ValueError("No class has a positive sample, so there is no mean average precision.")
    return float(known.mean())


def roc_auc(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the area under the ROC curve, ties counting half; see `RocCurve`.

    Args:
        scores: (num_samples,), higher is more surely class 1, such as score 1 minus score 0.
        labels: (num_samples,) 0 and 1.

    Raises:
        ValueError: shapes that differ, NaN, labels other than 0 and 1, or one class only.
    """
    return float(RocCurve(scores, labels).area()[0])


def accuracy_at(ranks: IntArray, k: int) -> float:
    """Return the share of samples with fewer than `k` wrong classes at or above the right one.

    Args:
        ranks: (num_samples,) as `ranking.rank_of_label` counts them.
        k: 1 for top-1 accuracy.
    """
    return float((np.asarray(ranks) < k).mean())


def mean_acc1_acc5(ranks: IntArray) -> float:
    """Return the mean of top-1 and top-5 accuracy, Kinetics-700's metric in CLIP's table (Radford
    et al. 2021, appendix A); ranks (num_samples,) as `ranking.rank_of_label` counts them."""
    return (accuracy_at(ranks, 1) + accuracy_at(ranks, 5)) / 2


def mean_per_class_recall(ranks: IntArray, labels: IntArray) -> float:
    """Return the mean over the classes of the share of their samples that were named right.

    A class without samples has no recall and is left out, as in scikit-learn's
    `balanced_accuracy_score`.

    Args:
        ranks: (num_samples,) as `ranking.rank_of_label` counts them.
        labels: (num_samples,) the right class of each.
    """
    classes, rows = np.unique(labels, return_inverse=True)
    right = np.bincount(rows, weights=np.asarray(ranks) == 0, minlength=len(classes))
    return float((right / np.bincount(rows, minlength=len(classes))).mean())


def _check_binary(
    scores: NDArray[Any], is_positive: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    values, labels = np.asarray(scores), np.asarray(is_positive)
    if values.ndim != 1 or values.shape != labels.shape or not values.size:
        raise ValueError(
            f"scores has shape {values.shape} and labels {labels.shape}, but both need shape "
            "(num_samples,) with at least one sample."
        )
    if values.dtype.kind not in "fiu" or np.isnan(values).any():
        raise ValueError("scores holds NaN or no numbers at all: every sample needs a score.")
    if labels.dtype.kind not in "biu" or not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 and 1 (or False and True): positive is 1.")
    # Minus of an unsigned or a boolean would wrap around where samples are sorted.
    return values.astype(np.float64), labels.astype(bool)
