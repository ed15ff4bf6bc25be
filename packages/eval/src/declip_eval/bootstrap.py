"""Bootstrap confidence intervals of every metric, from outcomes (Efron and Tibshirani 1993).

A resample draws as many queries as there are, with replacement; the interval holds the middle
`level` of the metric's values over all resamples (the percentile interval). What is drawn:

- accuracies, `mean_acc1_acc5`, retrieval's recalls at k: queries (in retrieval, of one direction).
  The number of right ones in a resample is binomial (with half points: multinomial), so it is drawn
  itself: the same distribution without drawing queries.
- `mean_per_class_recall`: queries within their class, so that no class is ever left without any,
  with the variance that classes of few queries would lack put back (see `class_means`).
- `roc_auc`: positives and negatives apart, for the same reason.
- mean average precisions: queries. A class that a resample leaves without positives has no
  precision there, and the resample's mean is over the other classes. Average precision is too high
  on average where positives are few, and again so in resamples of them; over many classes that adds
  up to more than the interval's width. So its interval is the basic one (Davison and Hinkley 1997,
  section 5.2): the percentile interval mirrored in the value, which takes such a shift off.

Where all answers are right, or all wrong, no resample differs and the interval of a share would
have no width; Wilson's interval then stands in. An area or a mean average precision of exactly 1
keeps an interval without width: its resamples are all perfect.

Queries count as independent. Captions of one picture are not fully so, hence intervals of retrieval
with several captions a picture are a little narrow.

Metrics have random streams of their own: an interval depends on the outcomes and the seed, not on
which other metrics are asked for.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_eval.intervals import wilson_interval
from declip_eval.metrics import PrecisionCurve, RocCurve, curves
from declip_eval.outcomes import Outcomes, drop_overlap, metrics_of, plain_metric, retrieval_rows
from declip_eval.ranking import FloatArray, IntArray

NUM_RESAMPLES = 2000
LEVEL = 0.95

_BLOCK_CELLS = 2**21
"""Counts (queries times resamples) that are held at once."""


def bootstrap_intervals(
    outcomes: Outcomes,
    metrics: Iterable[str],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    without_overlap: bool = False,
) -> dict[str, tuple[float, float]]:
    """Return the bootstrap interval of each metric: the percentile interval, of mean average
    precisions the basic one.

    Args:
        outcomes: of any kind.
        metrics: names as for `outcomes.metrics_of`.
        seed: of the resamples, from 0 on.
        num_resamples: at least 100; 2,000 move the ends of a 95% interval by a few percent of its
            width from seed to seed.
        level: share of the resamples inside, between 0 and 1.
        without_overlap: leave out the samples that the training data holds.

    Returns:
        Metric -> (low, high), fractions of 1.

    Raises:
        ValueError: a metric that these outcomes lack, a setting out of range, or no outcomes.
    """
    check_settings(seed, num_resamples, level)
    if without_overlap:
        outcomes = drop_overlap(outcomes)
    intervals: dict[str, tuple[float, float]] = {}
    for name in metrics:
        plain = plain_metric(outcomes, name)
        points = points_of(outcomes, "acc1" if plain == "mean_per_class_recall" else plain)
        if points is not None and (points == points[0]).all() and points[0] in (0, 1):
            intervals[name] = wilson_interval(float(points[0]), len(points), confidence=level)
            continue
        values = resampled_metric(outcomes, plain, seed=seed, num_resamples=num_resamples)
        intervals[name] = percentile_interval(values, level)
        if outcomes.kind == "multilabel":
            value = metrics_of(outcomes, [plain])[plain]
            intervals[name] = _mirrored(intervals[name], value)
    return intervals


def _mirrored(interval: tuple[float, float], value: float) -> tuple[float, float]:
    """The basic bootstrap interval within 0 to 1, wide enough for the value itself."""
    low, high = 2 * value - interval[1], 2 * value - interval[0]
    return max(0.0, min(low, value)), min(1.0, max(high, value))


def percentile_interval(values: FloatArray, level: float) -> tuple[float, float]:
    """Return the (low, high) that holds the middle `level` of the values, NaN left out.

    Raises:
        ValueError: no value is a number.
    """
    known = values[~np.isnan(values)]
    if not known.size:
        raise ValueError("No resample has the metric: evaluate more samples.")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def check_settings(seed: int, num_resamples: int, level: float) -> None:
    """Refuse settings of a bootstrap that are out of range.

    Raises:
        ValueError: with the value and the limit.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed!r}, but it must be a whole number from 0 on.")
    if num_resamples < 100:
        raise ValueError(
            f"num_resamples is {num_resamples!r}, but an interval needs at least 100 resamples: "
            f"{NUM_RESAMPLES} are usual."
        )
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, but it must lie between 0 and 1, such as 0.95.")


def points_of(outcomes: Outcomes, plain: str) -> FloatArray | None:
    """Return each query's share (0, 0.5 or 1) in a metric that is a plain mean over queries, in
    order; None for other metrics.

    Raises:
        ValueError: there are no such queries.
    """
    if not len(outcomes):
        raise ValueError("There are no outcomes to resample: evaluate some samples.")
    if outcomes.kind == "multilabel" or plain in ("mean_per_class_recall", "roc_auc"):
        return None
    ranks = outcomes.columns["rank"]
    if outcomes.kind == "retrieval":
        rows, k = retrieval_rows(outcomes, plain)
        return (ranks[rows] < k).astype(np.float64)
    if plain == "mean_acc1_acc5":
        return ((ranks < 1).astype(np.float64) + (ranks < 5)) / 2
    return (ranks < int(plain.removeprefix("acc"))).astype(np.float64)


def resampled_metric(
    outcomes: Outcomes, plain: str, *, seed: int, num_resamples: int
) -> FloatArray:
    """Return the metric of every resample, (num_resamples,) float64; NaN where it has none.

    Args:
        outcomes: of which queries are drawn.
        plain: the metric's name without a probe's prefix.
        seed: of the resamples.
        num_resamples: how many.
    """
    rng = stream(seed, plain)
    points = points_of(outcomes, plain)
    if points is not None:
        return resampled_means(rng, points[None, :], num_resamples).ravel()
    if plain == "mean_per_class_recall":
        right = (outcomes.columns["rank"] == 0).astype(np.float64)
        return class_means(rng, right[None, :], outcomes.columns["label"], num_resamples).ravel()
    if plain == "roc_auc":
        area = roc_area(outcomes)
        strata = [np.flatnonzero(outcomes.columns["label"] == label) for label in (0, 1)]
        return resample(rng, strata, num_resamples, lambda counts: [area(counts)]).ravel()
    score = mean_precision(outcomes, plain)
    rows = [np.arange(len(outcomes))]
    return resample(rng, rows, num_resamples, lambda counts: [score(counts)]).ravel()


def stream(seed: int, name: str) -> np.random.Generator:
    """Return the random stream of one metric under one seed."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def resampled_means(rng: np.random.Generator, points: FloatArray, num_resamples: int) -> FloatArray:
    """Return the mean points of every resample of the queries.

    Args:
        rng: the stream.
        points: (num_models, num_queries), each 0, 0.5 or 1. Few columns differ, and the number of
            each in a resample is multinomial.
        num_resamples: how many.

    Returns:
        (num_models, num_resamples).
    """
    num_models, num_queries = points.shape
    digits = (2 * points).astype(np.int64)
    code = 3 ** np.arange(num_models) @ digits
    _, first, counts = np.unique(code, return_index=True, return_counts=True)
    drawn = rng.multinomial(num_queries, counts / num_queries, size=num_resamples)
    # In half points and whole numbers, so that equal models differ by exactly 0.
    return np.asarray(digits[:, first] @ drawn.T / (2 * num_queries), dtype=np.float64)


def class_means(
    rng: np.random.Generator, points: FloatArray, labels: IntArray, num_resamples: int
) -> FloatArray:
    """Return the mean over the classes of each class's mean points, queries drawn within theirs.

    A class of few queries, drawn as it is, varies too little: of one query not at all, of n by
    (n - 1) / n of the variance. So each class is drawn with one query more, of all classes' mean,
    and its deviations are stretched by what is still lacking.

    Args:
        rng: the stream.
        points: (num_models, num_queries), see `resampled_means`.
        labels: (num_queries,) class numbers.
        num_resamples: how many.

    Returns:
        (num_models, num_resamples), within 0 to 1.
    """
    digits = (2 * points).astype(np.int64)
    _, first, column = np.unique(
        3 ** np.arange(len(points)) @ digits, return_index=True, return_inverse=True
    )
    classes, rows = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(classes), len(first)), dtype=np.int64)
    np.add.at(counts, (rows, column), 1)
    sizes = counts.sum(axis=1)
    typical = (counts / sizes[:, None]).mean(axis=0)
    kinds = digits[:, first]
    total = np.zeros((len(points), num_resamples))
    for count, size in zip(counts, sizes.tolist(), strict=True):
        shares = (count + typical) / (size + 1)
        shares /= shares.sum()
        drawn = kinds @ rng.multinomial(size, shares, size=num_resamples).T / size
        # With the added query the expected variance is this part of the queries' own.
        stretch = 1 / math.sqrt(1 - size / (size + 1) ** 2)
        # Row by row, so that equal models differ by exactly 0.
        middle, value = (kinds * shares).sum(axis=1), (kinds * count).sum(axis=1) / size
        total += value[:, None] + stretch * (drawn - middle[:, None])
    return np.clip(total / (2 * len(classes)), 0.0, 1.0)


Weighted = Callable[[NDArray[Any]], FloatArray]
"""Takes how often each query was drawn (num_queries, num_resamples), returns the metrics."""


def roc_area(outcomes: Outcomes) -> Weighted:
    """Return the ROC AUC as a function of how often each query was drawn."""
    return RocCurve(outcomes.columns["score"], outcomes.columns["label"]).area


def mean_precision(outcomes: Outcomes, plain: str) -> Weighted:
    """Return a mean average precision as a function of how often each query was drawn."""
    of_class = curves(outcomes.columns["scores"], outcomes.columns["labels"])
    formula = (
        PrecisionCurve.eleven_point if plain.endswith("_11") else PrecisionCurve.average_precision
    )

    def mean(counts: NDArray[Any]) -> FloatArray:
        total, known = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
        for curve in of_class:
            values = formula(curve, counts)
            has_value = ~np.isnan(values)
            total += np.where(has_value, values, 0)
            known += has_value
        with np.errstate(invalid="ignore"):
            return total / known

    return mean


def resample(
    rng: np.random.Generator,
    strata: list[IntArray],
    num_resamples: int,
    measure: Callable[[NDArray[Any]], list[FloatArray]],
) -> FloatArray:
    """Measure every resample, a block of them at a time.

    Args:
        rng: the stream.
        strata: rows that are drawn among themselves; together all rows.
        num_resamples: how many.
        measure: takes counts (num_queries, some resamples), returns rows of metrics.

    Returns:
        (metrics that `measure` returns, num_resamples).
    """
    measured = [
        np.stack(measure(counts)) for counts in _blocks_of_counts(rng, strata, num_resamples)
    ]
    return np.concatenate(measured, axis=1)


def _blocks_of_counts(
    rng: np.random.Generator, strata: list[IntArray], num_resamples: int
) -> Iterator[NDArray[np.int32]]:
    """Yield how often each row is drawn, (num_rows, block) int32."""
    num_rows = sum(len(rows) for rows in strata)
    order = np.concatenate(strata)
    block = max(1, min(num_resamples, _BLOCK_CELLS // num_rows))
    starts = np.cumsum([0, *(len(rows) for rows in strata[:-1])])
    for first in range(0, num_resamples, block):
        size = min(block, num_resamples - first)
        # One resample after the other, so that the size of a block changes no draw.
        drawn = np.empty((size, num_rows), dtype=np.int64)
        for row in range(size):
            for start, rows in zip(starts, strata, strict=True):
                drawn[row, start : start + len(rows)] = start + rng.integers(
                    0, len(rows), size=len(rows)
                )
        drawn *= size
        drawn += np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=num_rows * size)
        by_row = np.empty((num_rows, size), dtype=np.int32)
        by_row[order] = counts.reshape(num_rows, size)
        yield by_row
