"""The order and the choice of L2 strengths."""

from __future__ import annotations

import math

import pytest

from declip_eval.strength_sweep import (
    CLIP_L2_STRENGTHS,
    grid_strength,
    sweep_grid,
    sweep_like_clip,
)


class Peak:
    """Scores that fall with the distance from a peak, in decades; remembers what it was asked."""

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self.batches: list[list[float]] = []

    def __call__(self, strengths):
        self.batches.append(list(strengths))
        return [-abs(math.log10(s) - math.log10(self.peak)) for s in strengths]


@pytest.mark.parametrize("position", [-48, -47, -17, -5, 0, 3, 31, 48])
def test_clips_sweep_finds_every_peak_of_its_grid_in_15_fits(position):
    peak = Peak(grid_strength(position))
    sweep = sweep_like_clip(peak)
    assert sweep.best == peak.peak
    assert sweep.score == pytest.approx(0)
    asked = [s for batch in peak.batches for s in batch]
    assert len(asked) == len(set(asked)) == len(sweep.scores) <= 15
    assert peak.batches[0] == sorted(CLIP_L2_STRENGTHS, reverse=True)
    assert all(1e-6 <= s <= 1e6 for s in asked)


def test_the_grid_has_eight_steps_a_decade_and_clips_ends():
    assert [grid_strength(p) for p in range(-48, 49, 16)] == list(CLIP_L2_STRENGTHS)
    assert grid_strength(8) == 10 * grid_strength(0)


@pytest.mark.parametrize("sweep", [sweep_like_clip, lambda f: sweep_grid(f, CLIP_L2_STRENGTHS)])
def test_of_equal_scores_the_largest_strength_is_best(sweep):
    assert sweep(lambda strengths: [0.5] * len(strengths)).best == 1e6


def test_a_list_is_tried_once_in_one_batch_in_any_order():
    peak = Peak(1.0)
    found = sweep_grid(peak, (0.1, 10.0, 1.0, 0.1))
    assert peak.batches == [[10.0, 1.0, 0.1]]
    assert found == sweep_grid(Peak(1.0), (1.0, 0.1, 10.0))
    assert found.best == 1.0


def test_no_strengths_and_missing_scores_are_refused():
    with pytest.raises(ValueError, match="strengths is empty: give at least one"):
        sweep_grid(Peak(1.0), ())
    with pytest.raises(ValueError, match="shorter"):
        sweep_grid(lambda strengths: [1.0], (1.0, 2.0))
