"""Few-shot probes: the linear probe on a handful of samples a class, over several draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from declip_eval.intervals import wilson_interval
from declip_eval.linear_probe import CLIP_L2_STRENGTHS, Probe, fit_probe
from declip_eval.ranking import (
    FloatArray,
    IntArray,
    check_features,
    check_labels,
    rank_of_label,
)

DEFAULT_SHOTS: tuple[int, ...] = (1, 2, 4, 8, 16)
"""Samples a class, as in CLIP's figure 6."""

DEFAULT_SEEDS: tuple[int, ...] = (0, 1, 2, 3, 4)
"""One draw of the training samples each."""

DEFAULT_L2_STRENGTH = 1.0
"""The strength where there is nothing to choose it on: scikit-learn's default."""


@dataclass(frozen=True)
class FewShot:
    """The few-shot probe of one `k`, over all seeds."""

    k: int
    metrics: dict[str, float]
    """Mean over the seeds of `lp_acc1`, `lp_acc5`, `lp_mean_per_class_recall`, fractions of 1."""
    intervals: dict[str, tuple[float, float]]
    """Interval of each of them over the draws of training samples and over the test samples."""
    by_seed: dict[int, dict[str, float]]
    """What each seed's probe reported, its `l2_strength` included."""
    probes: dict[int, Probe]
    """Each seed's probe, with its test scores."""


def few_shot(
    train_features: NDArray[Any],
    train_labels: NDArray[Any],
    test_features: NDArray[Any],
    test_labels: NDArray[Any],
    *,
    k: int,
    seeds: Sequence[int] = DEFAULT_SEEDS,
    l2_strengths: Sequence[float] = (DEFAULT_L2_STRENGTH,),
    sweep: Literal["clip", "grid"] = "grid",
    validation_features: NDArray[Any] | None = None,
    validation_labels: NDArray[Any] | None = None,
    confidence: float = 0.95,
    device: str = "cpu",
) -> FewShot:
    """Fit the linear probe on `k` samples a class, once a seed, and score each on the test set.

    A seed's draws are nested: its 2 samples of a class are among its 4 (see `draw_shots`). The
    validation set only chooses the strength and is never trained on; without one there is nothing
    to choose on, since holding out of `k` samples would train on fewer than `k`.

    Args:
        train_features: (num_train, dim), the pool that samples are drawn from, any real dtype.
        train_labels: (num_train,) integers, at least `k` of each class.
        test_features: (num_test, dim).
        test_labels: (num_test,) integers, all of them among the training labels.
        k: samples a class.
        seeds: one draw each; from two on the interval holds the spread between draws.
        l2_strengths: as in `fit_probe`; more than one needs a validation set.
        sweep: as in `fit_probe`; "clip" needs a validation set, and `l2_strengths` is then
            left at its default.
        validation_features: (num_validation, dim), or None.
        validation_labels: its labels.
        confidence: of the intervals, 0 to 1, exclusive.
        device: "cpu" or a torch device, as in `fit_probe`.

    Returns:
        Means, intervals and each seed's numbers. An interval joins the spread between draws
        (Student's t over the seeds) with that of the test samples, which all draws share
        (Wilson, with as many trials as the variance of each sample's mean over seeds says).

    Raises:
        ValueError: what `fit_probe` refuses, a class with fewer than `k` samples, equal seeds,
            or several strengths without a validation set.
    """
    seeds = _check_seeds(seeds)
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence is {confidence}, but it must lie between 0 and 1, such as 0.95."
        )
    l2_strengths = _strengths(l2_strengths, sweep, validation_features is not None)
    pool = check_features(train_features, "train_features")
    labels = check_labels(train_labels, len(pool), "train_labels")
    probes: dict[int, Probe] = {}
    for seed in seeds:
        rows = draw_shots(labels, k, seed)
        probes[seed] = fit_probe(
            pool[rows],
            labels[rows],
            test_features,
            test_labels,
            seed=seed,
            l2_strengths=l2_strengths,
            validation_features=validation_features,
            validation_labels=validation_labels,
            sweep=sweep,
            device=device,
            refit_on_validation=False,
        )
    by_seed = {seed: probe.metrics for seed, probe in probes.items()}
    means = {
        name: float(np.mean([metrics[name] for metrics in by_seed.values()]))
        for name in by_seed[seeds[0]]
        if name.startswith("lp_")
    }
    intervals = _intervals(list(probes.values()), np.asarray(test_labels), confidence)
    return FewShot(k, means, intervals, by_seed, probes)


def draw_shots(labels: NDArray[Any], k: int, seed: int) -> IntArray:
    """Draw `k` rows of each class, without replacement; sorted row numbers.

    For one seed the draw of `k` rows is part of the draw of any larger number, and a class's draw
    does not depend on what other classes there are.

    Raises:
        ValueError: `k` below 1, or a class with fewer than `k` rows.
    """
    if k < 1:
        raise ValueError(f"k is {k}, but a few-shot probe needs at least 1 sample a class.")
    rows: list[IntArray] = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        if len(of_class) < k:
            raise ValueError(
                f"Class {label} has {len(of_class)} training samples, but k is {k}: take a "
                f"smaller k, or a training split with at least {k} samples a class."
            )
        rng = np.random.default_rng([seed, int(label)])
        rows.append(rng.permutation(of_class)[:k])
    return np.sort(np.concatenate(rows))


def _strengths(l2_strengths: Sequence[float], sweep: str, has_validation: bool) -> Sequence[float]:
    if sweep == "clip" and tuple(l2_strengths) == (DEFAULT_L2_STRENGTH,):
        l2_strengths = CLIP_L2_STRENGTHS
    if not has_validation and len(l2_strengths) > 1:
        raise ValueError(
            f"There are {len(l2_strengths)} L2 strengths to try, but without a validation set "
            f"there is nothing to choose on: give one, or a single strength such as "
            f"{DEFAULT_L2_STRENGTH}."
        )
    return l2_strengths


def _check_seeds(seeds: Sequence[int]) -> list[int]:
    if not len(seeds):
        raise ValueError("seeds is empty: give at least one, such as 0.")
    for seed in seeds:
        if seed < 0:
            raise ValueError(f"seeds holds {seed}, but a seed is 0 or more.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            f"seeds holds a seed twice ({', '.join(map(str, seeds))}): equal seeds draw equal "
            "samples; give different ones."
        )
    return [int(seed) for seed in seeds]


def _intervals(
    probes: Sequence[Probe], test_labels: IntArray, confidence: float
) -> dict[str, tuple[float, float]]:
    rows = np.searchsorted(probes[0].classes, test_labels)
    ranks = np.stack([rank_of_label(probe.scores, rows, tolerance=0.0) for probe in probes])
    counts = np.bincount(rows, minlength=len(probes[0].classes))
    seen = np.count_nonzero(counts)
    everything = np.zeros(len(rows), dtype=np.int64)
    shares = np.full(len(rows), 1 / len(rows))
    parts = {
        "lp_acc1": (ranks == 0, shares, everything),
        "lp_acc5": (ranks < 5, shares, everything),
        "lp_mean_per_class_recall": (ranks == 0, 1 / (seen * counts[rows]), rows),
    }
    return {
        name: _interval(right, weights, groups, confidence)
        for name, (right, weights, groups) in parts.items()
        if name in probes[0].metrics
    }


def _interval(
    right: NDArray[np.bool_], weights: FloatArray, groups: IntArray, confidence: float
) -> tuple[float, float]:
    """Interval of a weighted mean, over draws and over test samples.

    Args:
        right: (num_seeds, num_test), whether each draw's probe was right.
        weights: (num_test,), sums to 1.
        groups: (num_test,) group numbers, within which samples are exchangeable.
        confidence: of the interval.
    """
    by_seed = right @ weights
    mean = float(np.clip(by_seed.mean(), 0, 1))
    of_draws = 0.0
    if len(by_seed) > 1:
        # Imported late: scipy.stats takes half a second.
        from scipy.stats import t

        quantile = float(t.ppf((1 + confidence) / 2, len(by_seed) - 1))
        of_draws = quantile * float(by_seed.std(ddof=1)) / math.sqrt(len(by_seed))
    share = right.mean(axis=0)
    sizes = np.bincount(groups)
    center = np.bincount(groups, share) / np.maximum(sizes, 1)
    unbiased = sizes / np.maximum(sizes - 1, 1)
    variance = float(np.sum(weights**2 * (share - center[groups]) ** 2 * unbiased[groups]))
    # As many independent trials of the mean as would have this variance: Wilson's interval of
    # them stays inside 0 and 1, and is not empty where every sample is right.
    trials = max(1, round(mean * (1 - mean) / variance)) if variance else right.shape[1]
    low, high = wilson_interval(mean, trials, confidence=confidence)
    return (
        max(0.0, mean - math.hypot(mean - low, of_draws)),
        min(1.0, mean + math.hypot(high - mean, of_draws)),
    )


__all__ = ["DEFAULT_SEEDS", "DEFAULT_SHOTS", "FewShot", "draw_shots", "few_shot"]
