"""Axes of charts: sensible ticks, short numbers, and the way from a value to a pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps values onto pixels along one direction."""

    low: float
    """Value at `start`."""

    high: float
    """Value at `end`, above `low`."""

    start: float
    """Pixel of `low`."""

    end: float
    """Pixel of `high`; below `start` for an axis that points up."""

    log: bool = False
    """Logarithmic to base 10."""

    def __call__(self, value: float) -> float:
        """Return the pixel of `value`."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def nice_step(span: float, num_steps: int) -> float:
    """Return the smallest of 1, 2 or 5 times a power of ten that covers `span` in `num_steps`."""
    if not (span > 0 and math.isfinite(span)):
        raise ValueError(f"span is {span}, but an axis needs a positive, finite span.")
    raw = span / max(1, num_steps)
    power = 10.0 ** math.floor(math.log10(raw))
    for factor in (1.0, 2.0, 5.0):
        if raw <= factor * power * (1 + 1e-9):
            return factor * power
    return 10.0 * power


def linear_ticks(low: float, high: float, num_steps: int = 5) -> list[float]:
    """Return round, evenly spaced numbers whose first and last enclose [low, high].

    Values that differ by rounding alone are one value, which then stands in the middle.
    """
    size = max(abs(low), abs(high))
    if high - low <= max(1e-12 * size, 1e-200):
        pad = 0.1 * size if size > 1e-200 else 1.0
        low, high = low - pad, high + pad
    step = nice_step(high - low, num_steps)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Dividing by a whole number gives 0.3 where multiplying by 0.1 gives 0.30000000000000004.
    inverse = round(1 / step) if step < 1 else 0
    return [i / inverse if inverse else i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float, num_steps: int = 5) -> list[float]:
    """Return powers of ten that enclose [low, high]; 1, 2 and 5 times them on a short range.

    Raises:
        ValueError: a value of zero or less has no logarithm.
    """
    if low <= 0:
        raise ValueError(
            f"The smallest value is {low}, but a logarithmic axis needs positive values: use a "
            "linear axis."
        )
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if first == last:
        last += 1
    stride = max(1, math.ceil((last - first) / max(1, num_steps)))
    if last - first > 2:
        last = first + math.ceil((last - first) / stride) * stride
        return [10.0**power for power in range(first, last + 1, stride)]
    ticks = [f * 10.0**power for power in range(first, last + 1) for f in (1, 2, 5)]
    below = max((tick for tick in ticks if tick <= low * (1 + 1e-9)), default=ticks[0])
    above = min((tick for tick in ticks if tick >= high * (1 - 1e-9)), default=ticks[-1])
    if below == above:
        above = ticks[ticks.index(below) + 1]
    return [tick for tick in ticks if below <= tick <= above]


def short_number(value: float) -> str:
    """Write a number in few characters: 0.25, 1,200, 25k, 3M, 2e-05.

    Keeps three significant digits at least; whole numbers under ten thousand stay whole.
    """
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if limit * 0.9995 <= size < 1e12:
            unit = 1e3 if letter == "k" else limit
            return f"{value / unit:.3g}".replace("e+03", "000") + letter
    if size >= 1e12 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 999.5:  # What three digits would round to 1e+03.
        return f"{value:,.0f}"
    return f"{value:.3g}"


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Write ticks so that neighbors differ, with no more digits than that takes."""
    labels = [short_number(tick) for tick in ticks]
    if len(set(labels)) == len(labels):
        return labels
    for digits in range(4, 16):
        labels = [f"{tick:.{digits}g}" for tick in ticks]
        if len(set(labels)) == len(labels):
            return labels
    return labels
