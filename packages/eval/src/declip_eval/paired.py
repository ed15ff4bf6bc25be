"""Is one model better than another? Paired tests on the same queries, from two outcomes.

Two intervals that overlap settle nothing: most queries are easy or hard for both models, and only
those on which they differ tell them apart. So both are compared query by query.

- Metrics that are a share of right answers (accuracies, recalls at k): McNemar's exact test on the
  queries that one model alone got right (McNemar 1947; binomial, two-sided), and Newcombe's
  interval for the difference of paired shares (1998, method 10), which has a width even where the
  models never differ.
- All other metrics: the paired bootstrap. Both models are measured on the same resamples; the
  interval holds the middle of the differences, and p is twice the smaller share of resamples on
  either side of 0, counting the data themselves as one more on each side (so p is never below
  2 / (num_resamples + 1)).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from declip_eval.bootstrap import (
    LEVEL,
    NUM_RESAMPLES,
    check_settings,
    class_means,
    mean_precision,
    percentile_interval,
    points_of,
    resample,
    resampled_means,
    roc_area,
    stream,
)
from declip_eval.intervals import newcombe_interval
from declip_eval.outcome_columns import query_names
from declip_eval.outcomes import Outcomes, drop_overlap, metrics_of, plain_metric
from declip_eval.ranking import FloatArray


@dataclass(frozen=True, kw_only=True)
class PairedResult:
    """Two models on the same queries by one metric."""

    metric: str
    """Its name."""

    value_a: float
    """Of the first model, a fraction of 1."""

    value_b: float
    """Of the second model."""

    difference: float
    """value_b minus value_a: above 0 the second is better."""

    interval: tuple[float, float]
    """(low, high) of the difference."""

    p_value: float
    """Chance of a difference at least this large were there none, two-sided."""

    num_queries: int
    """Queries that the metric is about."""

    num_only_a: int | None
    """Queries that the first model alone got right; None where the metric has no right or wrong."""

    num_only_b: int | None
    """Queries that the second model alone got right."""

    method: str
    """The test, in words."""


def paired_test(
    a: Outcomes,
    b: Outcomes,
    metric: str,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    without_overlap: bool = False,
) -> PairedResult:
    """Compare two models on the same queries.

    Args:
        a: the first model's outcomes.
        b: the second's, of the same queries in any order.
        metric: a name as for `outcomes.metrics_of`.
        seed: of the bootstrap, from 0 on; of no effect on exact tests.
        num_resamples: of the bootstrap, at least 100.
        level: of the interval, between 0 and 1.
        without_overlap: leave out the queries that either model's training data holds.

    Raises:
        ValueError: outcomes of different kinds, keys or labels (the first such is named), a metric
            that they lack, or a setting out of range.
    """
    check_settings(seed, num_resamples, level)
    a, b = align(a, b)
    if without_overlap:
        a, b = _without_either_overlap(a, b)
    plain = plain_metric(a, metric)
    value_a, value_b = (metrics_of(outcomes, [metric])[metric] for outcomes in (a, b))
    right_a, right_b = (_right(outcomes, plain) for outcomes in (a, b))
    only_a = only_b = None
    if right_a is not None and right_b is not None:
        only_a = int(np.count_nonzero(right_a & ~right_b))
        only_b = int(np.count_nonzero(right_b & ~right_a))
    if right_a is not None and right_b is not None and _is_share(plain):
        counts = [
            int(np.count_nonzero(x & y)) for x in (right_b, ~right_b) for y in (right_a, ~right_a)
        ]
        interval = newcombe_interval(*counts, confidence=level)
        p_value = mcnemar_p_value(counts[1], counts[2])
        method = "exact McNemar test; Newcombe's interval"
    else:
        differences = _resampled_differences(a, b, plain, seed, num_resamples)
        interval = percentile_interval(differences, level)
        p_value = bootstrap_p_value(differences)
        method = f"paired bootstrap, {num_resamples} resamples"
    return PairedResult(
        metric=metric,
        value_a=value_a,
        value_b=value_b,
        difference=value_b - value_a,
        interval=interval,
        p_value=p_value,
        num_queries=len(a) if right_a is None else len(right_a),
        num_only_a=only_a,
        num_only_b=only_b,
        method=method,
    )


def _is_share(plain: str) -> bool:
    """Whether a metric is the share of queries that were answered right."""
    return plain not in ("mean_per_class_recall", "mean_acc1_acc5")


def _right(outcomes: Outcomes, plain: str) -> NDArray[np.bool_] | None:
    """Which queries were answered right; of means of several shares by the top answer; None where
    the metric has no right or wrong."""
    if outcomes.kind == "multilabel" or plain == "roc_auc":
        return None
    points = points_of(outcomes, plain if _is_share(plain) else "acc1")
    return None if points is None else points == 1


def mcnemar_p_value(num_only_a: int, num_only_b: int) -> float:
    """Return the exact two-sided p-value: if neither model were better, each query that they
    differ on would be a fair coin's throw.

    Args:
        num_only_a: queries that the first model alone got right, from 0 on.
        num_only_b: queries that the second model alone got right.
    """
    if min(num_only_a, num_only_b) < 0:
        raise ValueError(f"Counts are {num_only_a} and {num_only_b}, but they start at 0.")
    from scipy.stats import binom

    num_differing = num_only_a + num_only_b
    return min(1.0, 2 * float(binom.cdf(min(num_only_a, num_only_b), num_differing, 0.5)))


def bootstrap_p_value(differences: FloatArray) -> float:
    """Return the two-sided p-value of resampled differences (num_resamples,), NaN left out."""
    known = differences[~np.isnan(differences)]
    below, above = np.count_nonzero(known <= 0), np.count_nonzero(known >= 0)
    return min(1.0, 2 * (min(int(below), int(above)) + 1) / (len(known) + 1))


def align(a: Outcomes, b: Outcomes) -> tuple[Outcomes, Outcomes]:
    """Return both with the queries in the first one's order.

    Raises:
        ValueError: they are not of the same kind, classes, queries and labels; the first
            difference is named.
    """
    if (a.kind, a.num_classes) != (b.kind, b.num_classes):
        raise ValueError(
            f"The first outcomes are of {a.kind} with {a.num_classes} classes and the second of "
            f"{b.kind} with {b.num_classes}: compare results of one task on one dataset."
        )
    names_a, names_b = (query_names(o.kind, o.keys, o.columns) for o in (a, b))
    if names_a != names_b:
        row_of = {name: row for row, name in enumerate(names_b)}
        lacking = next((name for name in names_a if name not in row_of), None)
        if lacking is not None or len(names_a) != len(names_b):
            known = set(names_a)
            name = lacking or next(name for name in names_b if name not in known)
            raise ValueError(
                f"The sample {name[1]!r} is in the {'first' if lacking else 'second'} outcomes "
                f"only ({len(names_a)} and {len(names_b)} samples): evaluate both models on the "
                "same data."
            )
        b = b.take(np.asarray([row_of[name] for name in names_a]))
    _refuse_other_labels(a, b)
    return a, b


def _refuse_other_labels(a: Outcomes, b: Outcomes) -> None:
    for column in ("label", "labels"):
        if column not in a.columns:
            continue
        differs = a.columns[column] != b.columns[column]
        rows = np.flatnonzero(differs if differs.ndim == 1 else differs.any(axis=1))
        if rows.size:
            first = int(rows[0])
            labels = [
                o.columns[column][first]
                if column == "label"
                else np.flatnonzero(o.columns[column][first]).tolist()
                for o in (a, b)
            ]
            raise ValueError(
                f"The sample {a.keys[first]!r} has the label {labels[0]} in the first outcomes and "
                f"{labels[1]} in the second ({rows.size} such samples): evaluate both models "
                "on the same data."
            )


def _without_either_overlap(a: Outcomes, b: Outcomes) -> tuple[Outcomes, Outcomes]:
    masks = [o.columns["overlap"] for o in (a, b) if "overlap" in o.columns]
    either = np.logical_or.reduce(masks) if masks else None
    if either is None:
        drop_overlap(a)  # Says what is missing.
    else:
        a, b = (drop_overlap(o.with_overlap(either)) for o in (a, b))
    return a, b


def _resampled_differences(
    a: Outcomes, b: Outcomes, plain: str, seed: int, num_resamples: int
) -> FloatArray:
    """The second model's metric minus the first's on every resample, (num_resamples,)."""
    rng = stream(seed, plain)
    if plain == "mean_acc1_acc5":
        points = [points_of(o, plain) for o in (a, b)]
        stacked = np.stack([part for part in points if part is not None])
        measured = resampled_means(rng, stacked, num_resamples)
    elif plain == "mean_per_class_recall":
        right = np.stack([o.columns["rank"] == 0 for o in (a, b)]).astype(np.float64)
        measured = class_means(rng, right, a.columns["label"], num_resamples)
    else:
        is_area = plain == "roc_auc"
        of_a, of_b = (roc_area(o) if is_area else mean_precision(o, plain) for o in (a, b))
        strata = [np.arange(len(a))]
        if is_area:
            strata = [np.flatnonzero(a.columns["label"] == label) for label in (0, 1)]
        measured = resample(rng, strata, num_resamples, lambda counts: [of_a(counts), of_b(counts)])
    return np.asarray(measured[1] - measured[0], dtype=np.float64)
