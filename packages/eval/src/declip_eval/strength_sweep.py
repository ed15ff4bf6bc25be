"""Which L2 strengths a linear probe tries: a fixed list, or CLIP's sweep.

CLIP's sweep (Radford et al. 2021, arXiv 2103.00020, appendix A.3) lies on a grid of eight steps a
decade from 1e-6 to 1e6. It starts with seven strengths two decades apart and then halves the
distance around the best one until neighbors on the grid are reached: 15 fits at most, not 97.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

STEPS_PER_DECADE = 8
"""Resolution of CLIP's grid."""

DECADES = 6
"""CLIP's grid reaches from 10**-DECADES to 10**DECADES."""

FIRST_STEP = 2 * STEPS_PER_DECADE
"""Distance of the first strengths on the grid: two decades."""

CLIP_L2_STRENGTHS: tuple[float, ...] = tuple(10.0**decade for decade in range(-6, 7, 2))
"""Where CLIP's sweep starts; it refines around the best."""

ScoreStrengths = Callable[[Sequence[float]], Sequence[float]]
"""Fits a model for each of some strengths and returns each one's validation score."""


class Sweep(NamedTuple):
    """What a sweep tried: `scores` by strength, in the order they were tried, and the best."""

    best: float
    score: float
    scores: dict[float, float]


def grid_strength(position: int) -> float:
    """Return the strength at a position of CLIP's grid; 0 is 1, and 8 is 10."""
    return float(10.0 ** (position / STEPS_PER_DECADE))


def sweep_grid(score_strengths: ScoreStrengths, strengths: Sequence[float]) -> Sweep:
    """Try every strength of a list.

    Args:
        score_strengths: gets the strengths once, largest first.
        strengths: positive numbers; of equal scores the largest strength is best, hence the
            simplest model.

    Raises:
        ValueError: no strengths, or not one score for each.
    """
    if not len(strengths):
        raise ValueError("strengths is empty: give at least one positive number.")
    ordered = sorted(set(strengths), reverse=True)
    scores = dict(zip(ordered, score_strengths(ordered), strict=True))
    return _best_of(scores)


def sweep_like_clip(score_strengths: ScoreStrengths) -> Sweep:
    """Try CLIP's seven strengths, then halve the distance around the best down to the grid.

    Args:
        score_strengths: gets the seven first strengths, largest first, and after each halving the
            one or two new ones around the best so far; never one twice.

    Returns:
        The best of all that were tried; of equal scores the largest strength.
    """
    limit = DECADES * STEPS_PER_DECADE
    positions = list(range(limit, -limit - 1, -FIRST_STEP))
    scores: dict[int, float] = {}
    step = FIRST_STEP
    while True:
        new = [p for p in positions if -limit <= p <= limit and p not in scores]
        if new:
            found = score_strengths([grid_strength(p) for p in new])
            scores |= dict(zip(new, found, strict=True))
        if step == 1:
            return _best_of({grid_strength(p): score for p, score in scores.items()})
        best = max(scores, key=lambda p: (scores[p], p))
        step //= 2
        positions = [best + step, best - step]


def _best_of(scores: dict[float, float]) -> Sweep:
    best = max(scores, key=lambda strength: (scores[strength], strength))
    return Sweep(best, scores[best], scores)
