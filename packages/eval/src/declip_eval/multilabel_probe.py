"""Probes of samples with several labels each, as Pascal VOC 2007: one classifier a class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_eval.ranking import IntArray

BoolArray = NDArray[np.bool_]

MULTILABEL_METRICS = ("mean_average_precision_11", "mean_average_precision")
"""What a multi-label probe reports; the first chooses its strength."""


def check_positives(labels: NDArray[Any], num_rows: int, name: str) -> BoolArray:
    """Return `labels` as booleans of shape (num_rows, num_classes), or refuse them.

    Raises:
        ValueError: another shape, or values besides 0 and 1.
    """
    array = np.asarray(labels)
    if array.ndim != 2 or array.shape[0] != num_rows or not array.shape[1]:
        raise ValueError(
            f"{name} has shape {array.shape}, but there are {num_rows} feature rows: several "
            f"labels a sample need shape ({num_rows}, num_classes), true for the classes it has."
        )
    if array.dtype.kind not in "biu" or array.min() < 0 or array.max() > 1:
        raise ValueError(
            f"{name} holds other values than 0 and 1 (dtype {array.dtype}): drop samples marked "
            "difficult, or count them as 0."
        )
    return array.astype(np.bool_)


def check_every_class_is_both(positives: BoolArray, name: str) -> None:
    """Refuse a class that no sample has, or that every sample has: nothing separates it.

    Raises:
        ValueError: with the first such class's number.
    """
    counts = positives.sum(axis=0)
    for count, what in ((0, "no sample"), (len(positives), "every sample")):
        found = np.flatnonzero(counts == count)
        if found.size:
            raise ValueError(
                f"{name} has {found.size} classes that {what} has (first: {found[0]}): a "
                "one-against-rest probe needs both; drop the class or add samples."
            )


def multilabel_metrics(scores: NDArray[Any], positives: BoolArray) -> dict[str, float]:
    """Average precision of each class, meaned over the classes that have a positive.

    Args:
        scores: (num_rows, num_classes).
        positives: the same shape.

    Returns:
        `mean_average_precision_11`: Pascal VOC 2007's, the mean over recall 0, 0.1, ..., 1 of the
        best precision at that recall or beyond; `mean_average_precision`: the area under the
        steps, scikit-learn's.
    """
    from declip_eval.metrics import average_precision, eleven_point_ap

    seen = positives.any(axis=0)
    scores, positives = np.asarray(scores)[:, seen], positives[:, seen]
    values = (eleven_point_ap(scores, positives), average_precision(scores, positives))
    return {
        name: float(np.mean(value)) for name, value in zip(MULTILABEL_METRICS, values, strict=True)
    }


def multilabel_split(
    positives: BoolArray, validation_fraction: float, seed: int
) -> tuple[IntArray, IntArray]:
    """Split row numbers into (fit, validation) with about the same share of every class.

    Rarest class first, the rows that are still free are dealt out by the share (the idea of
    Sechidis, Tsoumakas and Vlahavas 2011); the last row of a class always goes to fit.

    Raises:
        ValueError: a fraction outside (0, 1), or so few rows that none can be held out.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}, but it must lie between 0 and 1, such "
            "as 0.2."
        )
    rng = np.random.default_rng(seed)
    free = np.ones(len(positives), dtype=np.bool_)
    held_out: list[IntArray] = []
    rarest_first = np.argsort(positives.sum(axis=0), kind="stable")
    for column in [*(positives[:, c] for c in rarest_first), np.ones(len(positives), np.bool_)]:
        rows = np.flatnonzero(free & column)
        count = max(min(round(validation_fraction * len(rows)), len(rows) - 1), 0)
        held_out.append(rng.permutation(rows)[:count])
        free[rows] = False
    validation = np.sort(np.concatenate(held_out))
    if not validation.size:
        raise ValueError(
            "No class has samples enough to hold one out and choose the L2 strength: add samples, "
            "raise validation_fraction, or pass a single strength."
        )
    return np.setdiff1d(np.arange(len(positives)), validation), validation
