"""A histogram of counts that are already binned, with what is kept and the thresholds drawn in."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from declip_eval.axes import Axis, linear_ticks, short_number, tick_labels
from declip_eval.html import Markup
from declip_eval.svg import (
    CHARACTER,
    WIDE,
    line_element,
    rect_element,
    responsive,
    text_element,
)

ALL_OPACITY = 0.35
"""Of the bars of all samples, behind those of the kept ones."""
LABEL_HEIGHT = 14
"""Pixels of a line of text above the bars."""
MANY_WIDTHS = 3.0
"""Times the usual width that make a first or last bin a tail, drawn apart."""
BOX_GAP = 12.0
"""Pixels between such a tail and the axis."""
LEAST_WIDTH = 2.0
"""Pixels of a bar whose bin is too narrow to be seen."""


@dataclass(frozen=True)
class Limit:
    """A threshold."""

    label: str
    """What it is, such as ``too_few_words <``."""
    value: float


class _Scale:
    """A linear axis, with a box of its own for a first or last bin much wider than the others.

    Such a bin gathers a tail; on one scale with the others it would leave them no room.
    """

    def __init__(self, edges: Sequence[float], left: float, right: float, box: float) -> None:
        self.edges, self.left, self.right = edges, left, right
        widths = np.diff(edges)
        usual = float(np.median(widths)) * MANY_WIDTHS
        self.has_left = len(widths) > 2 and float(widths[0]) > usual
        self.has_right = len(widths) > 2 and float(widths[-1]) > usual
        inner = edges[int(self.has_left) : len(edges) - int(self.has_right)]
        room = box + BOX_GAP
        self.axis = Axis(
            low=inner[0],
            high=inner[-1],
            start=left + room * self.has_left,
            end=right - room * self.has_right,
        )
        self._box = box

    def bin(self, number: int) -> tuple[float, float]:
        """Pixels where a bin begins and ends."""
        if number == 0 and self.has_left:
            return self.left, self.left + self._box
        if number == len(self.edges) - 2 and self.has_right:
            return self.right - self._box, self.right
        return self.axis(self.edges[number]), self.axis(self.edges[number + 1])

    def value(self, value: float) -> float:
        """Pixel of a value; beyond the ends it is that of the end."""
        last = len(self.edges) - 2
        number = min(max(bisect_right(self.edges, value) - 1, 0), last)
        low, high = self.edges[number : number + 2]
        start, end = self.bin(number)
        return start + (end - start) * min(max((value - low) / (high - low), 0.0), 1.0)


def binned_histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    title: str,
    note: str = "",
    kept: Sequence[int] | None = None,
    limits: Sequence[Limit] = (),
    is_closed: bool = False,
) -> Markup:
    """Draw counts over a linear axis; a long tail at either end gets a box of its own.

    Args:
        edges: ascending, one more than bins.
        counts: samples of each bin.
        title: what the chart shows.
        note: behind the title, such as how many samples have no value.
        kept: samples of each bin that were kept, drawn in full color before the others.
        limits: thresholds, drawn as lines; those outside the edges stand at the end.
        is_closed: the last bin holds its upper edge, too.

    Raises:
        ValueError: no bin, or lengths that do not fit each other.
    """
    if len(edges) < 2 or len(counts) != len(edges) - 1 or len(kept or counts) != len(counts):
        raise ValueError(
            f"{len(edges)} edges, {len(counts)} counts and {len(kept or counts)} kept do not fit: "
            "give one edge more than counts."
        )
    ticks = [tick for tick in linear_ticks(0, max(1, *counts)) if tick % 1 == 0]
    if len(ticks) < 2:
        ticks = [0.0, float(max(1, *counts))]
    left = 14 + CHARACTER * max(len(label) for label in tick_labels(ticks))

    def draw(width: int) -> Iterator[str]:
        head = 12 + LABEL_HEIGHT * len(limits)
        bottom = head + (200 if width == WIDE else 160)
        scale = _Scale(edges, left, width - 14, 40 if width == WIDE else 22)
        axis = Axis(low=0, high=ticks[-1], start=bottom, end=head)
        yield str(bottom + 26)
        for tick, label in zip(ticks, tick_labels(ticks), strict=True):
            yield line_element(left, axis(tick), width - 14, axis(tick), "grid-line")
            yield text_element(left - 7, axis(tick) + 4, label, "end")
        layers = [(counts, 1.0)] if kept is None else [(counts, ALL_OPACITY), (kept, 1.0)]
        for values, opacity in layers:
            yield from _bars(scale, axis, values, counts, kept, opacity)
        yield from _value_ticks(scale, bottom, 10 if width == WIDE else 4)
        yield from _limit_lines(scale, limits, bottom, width)

    total = sum(counts)
    below = "" if is_closed else "below "
    first, last = (short_number(edge) for edge in (edges[0], edges[-1]))
    summary = f"{total:,} samples from {first} to {below}{last}"
    if kept is not None:
        summary += f", {sum(kept):,} kept"
    return responsive(title, "; ".join(part for part in (summary, note) if part), summary, draw)


def _bars(
    scale: _Scale,
    axis: Axis,
    values: Sequence[int],
    counts: Sequence[int],
    kept: Sequence[int] | None,
    opacity: float,
) -> Iterator[str]:
    for number, value in enumerate(values):
        if not value:
            continue
        (x, right), y = scale.bin(number), axis(value)
        start, end = (short_number(edge) for edge in scale.edges[number : number + 2])
        told = f"{start} to {end}: {counts[number]:,}"
        if kept is not None:
            told += f", {kept[number]:,} kept"
        room = max(right - x - 1, LEAST_WIDTH)
        yield rect_element(x + 0.5, y, room, axis.start - y, "bar", told, opacity)


def _value_ticks(scale: _Scale, bottom: float, most: int) -> Iterator[str]:
    """Round values along the axis, and under each tail the value where it ends."""
    axis = scale.axis
    yield line_element(axis.start, bottom, axis.end, bottom, "axis-line")
    taken = []
    for is_there, number, end in ((scale.has_left, 0, 0), (scale.has_right, -2, -1)):
        if is_there:
            left, right = scale.bin(number % len(scale.edges))
            label = ("from " if end == 0 else "to ") + short_number(scale.edges[end])
            # Past the chart's edge it would be cut off.
            half = len(label) * CHARACTER / 2
            x = min(max((left + right) / 2, half), scale.right + 12 - half)
            yield line_element(left, bottom, right, bottom, "axis-line")
            yield text_element(x, bottom + 18, label, "middle")
            taken.append((x - half, x + half))
    ticks = linear_ticks(axis.low, axis.high, most)
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        x, half = axis(tick), len(label) * CHARACTER / 2
        if not axis.low <= tick <= axis.high:
            continue
        yield line_element(x, bottom, x, bottom + 4, "axis-line")
        if all(x + half + 6 < low or x - half - 6 > high for low, high in taken):
            at = min(x, scale.right + 12 - half)
            yield text_element(at, bottom + 18, label, "middle")


def _limit_lines(
    scale: _Scale, limits: Sequence[Limit], bottom: float, width: int
) -> Iterator[str]:
    """Each with its label on a line of its own, so that labels never lie on one another."""
    for number, limit in enumerate(limits):
        x, y = scale.value(limit.value), LABEL_HEIGHT * (number + 1)
        name = f"{limit.label} {short_number(limit.value)}"
        fits = x + len(name) * CHARACTER + 6 < width
        yield line_element(x, y - 8, x, bottom, "reference")
        anchor = "start" if fits else "end"
        yield text_element(x + (6 if fits else -6), y, name, anchor, "reference-label")
