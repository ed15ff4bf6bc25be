"""What is told at once when training goes wrong: one line each, once for each stretch of it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping

from declip_train.settings import TrainSettings

__all__ = ["LOSS_WINDOW", "Alarms"]

LOSS_WINDOW = 128
"""Steps whose losses a spike stands out from."""
_LEAST_LOSSES = 32
_LEAST_SPREAD = 1e-3
"""Standard deviation of losses, as a share of their mean, below which it is taken for this."""
_NORM_WINDOW = 32
"""Records whose gradient norms an exploding one stands out from."""
_LEAST_NORMS = 8
_EXPLODED = 10.0
"""Times the median of those norms."""
_AT_BOUND = 0.01
"""Distance of a logit scale's logarithm from its bound that counts as none."""
_COLLAPSED = 0.02
"""Spread of features (1: all directions alike, 0: all features equal) below which they are one."""
_SPREADS = {"image_feature_spread": "images", "text_feature_spread": "texts"}


class Alarms:
    """Looks at the numbers of each step.

    An alarm sounds when its fault begins, and again only after the fault was gone for a step (or,
    for what is not measured in every step, a measurement).

    Args:
        settings: bounds of the logit scale, warm-up, and how large a spike is.
        num_steps: of the whole run.
    """

    def __init__(self, settings: TrainSettings, num_steps: int) -> None:
        self.settings, self.num_steps = settings, num_steps
        self._losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self._norms: deque[float] = deque(maxlen=_NORM_WINDOW)
        self._spike_lasts = 0
        self._no_rate = 0
        self._on: set[str] = set()

    def check(self, step: int, numbers: Mapping[str, object]) -> list[str]:
        """One sentence for each fault that begins at this step.

        Args:
            step: steps done, this one included.
            numbers: as the log has them: ``total``, ``logit_scale``, ``learning_rate``; at some
                steps also ``gradient_norm`` and the features' spreads.
        """
        values = {
            name: float(value) for name, value in numbers.items() if isinstance(value, int | float)
        }
        looks = (
            *self._spike(values),
            *self._temperature(values),
            *self._rate(step, values),
            *self._gradient(values),
            *self._collapse(step, values),
        )
        sentences = []
        for name, sentence in looks:
            if sentence is None:
                self._on.discard(name)
            elif name not in self._on:
                self._on.add(name)
                sentences.append(f"step {step}: {sentence}")
        return sentences

    def _spike(self, values: Mapping[str, float]) -> Iterator[tuple[str, str | None]]:
        limit, loss = self.settings.loss_spike, values.get("total")
        if loss is None or not limit:
            return
        sentence = None
        if len(self._losses) >= _LEAST_LOSSES:
            mean = statistics.fmean(self._losses)
            deviation = max(statistics.pstdev(self._losses, mean), _LEAST_SPREAD * abs(mean))
            if loss > mean + limit * deviation:
                sentence = (
                    f"the loss jumped to {loss:.4g}, from {mean:.4g} in the last "
                    f"{len(self._losses)} steps ({(loss - mean) / deviation:.1f} standard "
                    f"deviations, loss_spike {limit:g}); if it does not come back, lower peak_lr "
                    "or beta2, or go back to a checkpoint before it."
                )
        yield "spike", sentence
        self._spike_lasts = 0 if sentence is None else self._spike_lasts + 1
        if self._spike_lasts > LOSS_WINDOW:
            # The loss has not come back in a whole window: this is its level from now on.
            self._losses.clear()
            self._spike_lasts = 0
        if self._spike_lasts == 0:
            self._losses.append(loss)

    def _temperature(self, values: Mapping[str, float]) -> Iterator[tuple[str, str | None]]:
        low, high = self.settings.logit_scale_min, self.settings.logit_scale_max
        for name in ("logit_scale", "token_logit_scale"):
            scale = values.get(name)
            if scale is None or not scale > 0 or high - low <= 2 * _AT_BOUND:
                continue
            sentence = None
            if math.log(scale) >= high - _AT_BOUND:
                sentence = (
                    f"{name} is at its upper bound, {math.exp(high):.4g}: it learns no more; raise "
                    "logit_scale_max if it got there early, or lower peak_lr."
                )
            elif math.log(scale) <= low + _AT_BOUND:
                sentence = (
                    f"{name} fell to its lower bound, {math.exp(low):.4g}: pairs are hardly told "
                    "apart; check that captions belong to their pictures, or lower peak_lr."
                )
            yield name, sentence

    def _rate(self, step: int, values: Mapping[str, float]) -> Iterator[tuple[str, str | None]]:
        rate = values.get("learning_rate")
        if rate is None:
            return
        # One step without a rate is what a schedule may begin or end with.
        self._no_rate = self._no_rate + 1 if rate <= 0 else 0
        sentence = None
        if self._no_rate > 1 and step < self.num_steps:
            sentence = (
                f"the learning rate is {rate:g} and nothing is learned; set start_lr, peak_lr and "
                "end_lr."
            )
        yield "rate", sentence

    def _gradient(self, values: Mapping[str, float]) -> Iterator[tuple[str, str | None]]:
        norm = values.get("gradient_norm")
        if norm is None:
            return
        exploded: str | None = None
        if not math.isfinite(norm):
            exploded = f"the gradient's norm is {norm}, and the step was skipped; lower peak_lr."
        elif len(self._norms) >= _LEAST_NORMS:
            usual = statistics.median(self._norms)
            if norm > _EXPLODED * usual > 0:
                exploded = (
                    f"the gradient's norm is {norm:.4g}, {norm / usual:.0f} times the usual "
                    f"{usual:.4g}; if losses rise with it, lower peak_lr or raise warmup_steps."
                )
        yield "exploding", exploded
        yield (
            "vanishing",
            "the gradient's norm is 0: no weight is learned; check which parameters the method "
            "trains and that losses are not constant."
            if norm == 0
            else None,
        )
        if math.isfinite(norm):
            self._norms.append(norm)

    def _collapse(self, step: int, values: Mapping[str, float]) -> Iterator[tuple[str, str | None]]:
        if step <= self.settings.warmup_steps:
            return  # Towers as drawn give all inputs nearly the same feature.
        for name, what in _SPREADS.items():
            spread = values.get(name)
            if spread is None:
                continue
            sentence = None
            if spread < _COLLAPSED:
                sentence = (
                    f"the features of all {what} are nearly the same (spread {spread:.3f}, where 1 "
                    "is healthy and 0 is one point); lower peak_lr, raise warmup_steps, or go back "
                    "to a checkpoint before it."
                )
            yield name, sentence
