"""A histogram of counts that are already binned, with what is kept and the thresholds drawn in."""

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


@dataclass(frozen=True)
class Limit:
    """A threshold."""

    label: str
    """What it is, such as ``too_few_words <``."""
    value: float


@dataclass(frozen=True)
class _Scale:
    """Bins side by side, each as wide as the others whatever its edges."""

    edges: Sequence[float]
    left: float
    right: float

    def edge(self, number: float) -> float:
        """Pixel of the left edge of a bin (of its number, which may lie between two)."""
        return self.left + (self.right - self.left) * number / (len(self.edges) - 1)

    def value(self, value: float) -> float:
        """Pixel of a value; beyond the ends it is that of the end."""
        return self.edge(float(np.interp(value, self.edges, np.arange(len(self.edges)))))


def binned_histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    title: str,
    note: str = "",
    kept: Sequence[int] | None = None,
    limits: Sequence[Limit] = (),
) -> Markup:
    """Draw counts over bins of one width on the page.

    Args:
        edges: ascending, one more than bins.
        counts: samples of each bin.
        title: what the chart shows.
        note: behind the title, such as how many samples have no value.
        kept: samples of each bin that were kept, drawn in full color before the others.
        limits: thresholds, drawn as lines; those outside the edges stand at the end.

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
        scale = _Scale(edges, left, width - 14)
        axis = Axis(low=0, high=ticks[-1], start=bottom, end=head)
        yield str(bottom + 26)
        for tick, label in zip(ticks, tick_labels(ticks), strict=True):
            yield line_element(left, axis(tick), width - 14, axis(tick), "grid-line")
            yield text_element(left - 7, axis(tick) + 4, label, "end")
        layers = [(counts, 1.0)] if kept is None else [(counts, ALL_OPACITY), (kept, 1.0)]
        for values, opacity in layers:
            yield from _bars(scale, axis, values, counts, kept, opacity)
        yield from _edge_labels(scale, bottom, 10 if width == WIDE else 4)
        yield from _limit_lines(scale, limits, bottom, width)

    total = sum(counts)
    summary = f"{total:,} samples from {short_number(edges[0])} to {short_number(edges[-1])}"
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
        x, y = scale.edge(number), axis(value)
        start, end = (short_number(edge) for edge in scale.edges[number : number + 2])
        told = f"{start} to {end}: {counts[number]:,}"
        if kept is not None:
            told += f", {kept[number]:,} kept"
        room = max(scale.edge(number + 1) - x - 1, 0.5)
        yield rect_element(x + 0.5, y, room, axis.start - y, "bar", told, opacity)


def _edge_labels(scale: _Scale, bottom: float, most: int) -> Iterator[str]:
    yield line_element(scale.left, bottom, scale.right, bottom, "axis-line")
    stride = max(1, -(-(len(scale.edges) - 1) // most))
    for number in range(0, len(scale.edges), stride):
        x, label = scale.edge(number), short_number(scale.edges[number])
        half = len(label) * CHARACTER / 2
        yield line_element(x, bottom, x, bottom + 4, "axis-line")
        yield text_element(min(x, scale.right + 12 - half), bottom + 18, label, "middle")


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
