"""Confidence intervals for metrics that are shares of independent trials."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from statistics import NormalDist

_IS_SHARE = re.compile(r"(lp_)?acc\d+|(image|text)_retrieval_recall@\d+")


def wilson_interval(
    share: float, num_trials: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Return Wilson's score interval of a share (Wilson 1927; Brown, Cai and DasGupta 2001).

    It stays inside [0, 1], holds at shares of 0 and 1, and needs no random numbers.

    Args:
        share: successes over trials, 0 to 1.
        num_trials: independent trials, at least 1.
        confidence: 0 to 1, exclusive.

    Returns:
        (low, high) with low <= share <= high.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, but a share lies between 0 and 1.")
    if num_trials < 1:
        raise ValueError(f"num_trials is {num_trials}, but an interval needs at least 1 trial.")
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence is {confidence}, but it must lie between 0 and 1, such as 0.95."
        )
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    shrink = 1 + z * z / num_trials
    middle = (share + z * z / (2 * num_trials)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    return min(max(0.0, middle - half), share), max(min(1.0, middle + half), share)


def metric_intervals(
    metrics: Mapping[str, float], num_trials: int | Mapping[str, int]
) -> dict[str, tuple[float, float]]:
    """Give the metrics that are shares of trials their 95% Wilson interval.

    Those are accuracies and recalls at k; a mean of per-class recalls is no share and gets none.
    Queries that share an image are not fully independent, so intervals of retrieval with several
    captions an image are a little narrow.

    Args:
        metrics: name -> value.
        num_trials: for all metrics, or by metric's name (retrieval has as many trials for images
            as there are texts, and the other way round).

    Raises:
        ValueError: a share without a number of trials.
    """
    intervals: dict[str, tuple[float, float]] = {}
    for name, value in metrics.items():
        if not _IS_SHARE.fullmatch(name):
            continue
        trials = num_trials if isinstance(num_trials, int) else num_trials.get(name)
        if trials is None:
            raise ValueError(f"num_trials has no entry for {name!r}: add its number of queries.")
        intervals[name] = wilson_interval(value, trials)
    return intervals
