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


def newcombe_interval(
    num_both: int,
    num_only_first: int,
    num_only_second: int,
    num_neither: int,
    *,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the interval of a difference of two paired shares, first minus second.

    Newcombe (1998, Statistics in Medicine 17, 2635-2650), method 10: Wilson's intervals of the two
    shares, put together with their correlation. It stays inside [-1, 1] and has a width even where
    the two never differ.

    Args:
        num_both: trials that both won.
        num_only_first: trials that the first alone won.
        num_only_second: trials that the second alone won.
        num_neither: trials that neither won.
        confidence: 0 to 1, exclusive.

    Returns:
        (low, high) with low <= difference <= high.

    Raises:
        ValueError: a count below 0, no trial, or a confidence out of range.
    """
    counts = (num_both, num_only_first, num_only_second, num_neither)
    total = sum(counts)
    if min(counts) < 0 or total < 1:
        raise ValueError(f"The counts are {counts}, but none may be below 0 and one must be above.")
    first, second = (num_both + num_only_first) / total, (num_both + num_only_second) / total
    first_low, first_high = wilson_interval(first, total, confidence=confidence)
    second_low, second_high = wilson_interval(second, total, confidence=confidence)
    correlation = _paired_correlation(*counts)
    down = _joined(first - first_low, second_high - second, correlation)
    up = _joined(first_high - first, second - second_low, correlation)
    return max(-1.0, first - second - down), min(1.0, first - second + up)


def _paired_correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Pearson's phi of two paired answers, with Newcombe's correction for continuity."""
    margins = (
        (both + only_first)
        * (only_second + neither)
        * (both + only_second)
        * (only_first + neither)
    )
    if not margins:
        return 0.0
    cross = float(both * neither - only_first * only_second)
    if cross > 0:
        cross = max(cross - (both + only_first + only_second + neither) / 2, 0.0)
    return cross / math.sqrt(margins)


def _joined(first: float, second: float, correlation: float) -> float:
    """Length of the difference of two correlated deviations."""
    return math.sqrt(max(first**2 - 2 * correlation * first * second + second**2, 0.0))


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
