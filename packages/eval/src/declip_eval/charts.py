"""Charts as inline SVG, for `declip_eval.html`: no library, no script, no network.

Line charts, bars and histograms are drawn twice, for a wide and for a narrow screen, and the style
sheet shows one: scaling one drawing down to a phone would leave its text unreadable. Colors are the
style sheet's, so that a chart follows light and dark; lines differ by dashes as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_eval.axes import Axis, linear_ticks, log_ticks, nice_step, short_number, tick_labels
from declip_eval.html import Markup
from declip_eval.svg import (
    CHARACTER,
    DASHES,
    WIDE,
    clip,
    legend,
    line_element,
    pixels,
    rect_element,
    responsive,
    text_element,
)

MAX_SERIES = 8
"""As many lines as there are colors that can be told apart."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: y over x, both (num_points,), x ascending."""

    name: str
    x: Sequence[float] | NDArray[Any]
    y: Sequence[float] | NDArray[Any]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    running_mean: int = 1,
    reference: tuple[str, float] | None = None,
) -> Markup:
    """Draw one line a series over common axes.

    Args:
        series: up to `MAX_SERIES`; a NaN or infinite y is a gap in the line.
        title: what the chart shows.
        x_label: quantity and unit of x.
        y_label: quantity and unit of y.
        log_y: logarithmic y axis; every y must be positive.
        running_mean: points before and including each that a line averages over; above 1 the
            measured values stand behind it, faint.
        reference: (name, y) of a horizontal line, such as chance.

    Raises:
        ValueError: no series or too many, x and y of different lengths, x not ascending, no finite
            value, a value that has no logarithm, or a running mean below 1.
    """
    lines = _check_series(series, log_y, running_mean)
    values = np.concatenate([y[np.isfinite(y)] for _, y in lines])
    if reference is not None:
        values = np.append(values, _finite(reference[1], "The reference line"))
    ends = np.concatenate([x for x, _ in lines])
    ticks_of = log_ticks if log_y else linear_ticks
    y_ticks = ticks_of(float(values.min()), float(values.max()))

    def draw(width: int) -> Iterator[str]:
        height = 320 if width == WIDE else 230
        left = 14 + CHARACTER * max(len(label) for label in tick_labels(y_ticks))
        x_axis = _x_axis(float(ends.min()), float(ends.max()), left, width - 12)
        y_axis = Axis(low=y_ticks[0], high=y_ticks[-1], start=height - 40, end=12, log=log_y)
        yield str(height)
        yield from _y_grid(y_axis, y_ticks, left, width - 12)
        x_ticks = [
            tick
            for tick in linear_ticks(x_axis.low, x_axis.high, 8 if width == WIDE else 4)
            if x_axis.low <= tick <= x_axis.high
        ]
        yield from _x_ticks(x_axis, x_ticks, height - 40)
        yield text_element(left, height - 4, x_label)
        for index, (x, y) in enumerate(lines):
            if running_mean > 1:
                yield from _paths(x, y, x_axis, y_axis, index, "series raw")
            smooth = _running_mean(y, running_mean)
            yield from _paths(x, smooth, x_axis, y_axis, index, "series")
        if reference is not None:
            yield from _horizontal_reference(reference, y_axis, left, width - 12)

    notes = [y_label]
    if log_y:
        notes.append("logarithmic axis")
    if running_mean > 1:
        notes.append(f"mean of {running_mean} points, measured values faint")
    gaps = sum(int((~np.isfinite(y)).sum()) for _, y in lines)
    if gaps:
        notes.append(f"{gaps} values are not finite: gaps")
    summaries = "; ".join(
        f"{item.name} from {short_number(y[np.isfinite(y)][0])} to "
        f"{short_number(y[np.isfinite(y)][-1])}"
        for item, (_, y) in zip(series, lines, strict=True)
    )
    key = legend([item.name for item in series]) if len(series) > 1 else ""
    return responsive(title, ", ".join(notes), summaries, draw, key)


def bar_chart(
    bars: Sequence[tuple[str, float]],
    *,
    title: str,
    unit: str,
    reference: tuple[str, float] | None = None,
    decimals: int | None = None,
    spreads: Sequence[float] | None = None,
) -> Markup:
    """Draw horizontal bars from zero, each with its label and value.

    Args:
        bars: (label, value) from top to bottom; values finite and not negative.
        title: what the chart shows.
        unit: quantity and unit of the values.
        reference: (name, value) of a line across the bars, such as chance.
        decimals: digits behind the point of the values; short numbers by default.
        spreads: for each bar how far a line goes to both sides of its end, such as a standard
            deviation; the unit should name it.

    Raises:
        ValueError: no bar, a negative or non-finite value or spread, or not one spread a bar.
    """
    if not bars:
        raise ValueError("bars is empty: give at least one (label, value).")
    for label, value in bars:
        if _finite(value, f"The bar {label!r}") < 0:
            raise ValueError(f"The bar {label!r} is {value}, but bars start at 0 and go right.")
    if reference is not None and _finite(reference[1], "The reference line") < 0:
        raise ValueError(f"The reference line is at {reference[1]}, left of where bars start.")
    around = _check_spreads(spreads, [label for label, _ in bars])

    def number(value: float) -> str:
        return short_number(value) if decimals is None else f"{value:,.{decimals}f}"

    texts = [number(value) for _, value in bars]
    if spreads is not None:
        texts = [f"{text} ± {number(s)}" for text, s in zip(texts, around, strict=True)]
    ends = [value + spread for (_, value), spread in zip(bars, around, strict=True)]
    top = max(ends + ([reference[1]] if reference else [])) or 1.0

    def draw(width: int) -> Iterator[str]:
        beside = width == WIDE
        row = 28 if beside else 40
        labels = max(len(label) for label, _ in bars) * CHARACTER + 14
        left = min(labels, 280.0) if beside else 0.0
        room = max(len(text) for text in texts) * 7.0 + 12
        axis = Axis(low=0, high=top, start=left, end=width - room)
        head = 22 if reference else 4
        bottom = head + row * len(bars)
        yield str(bottom + 4)
        for index, ((label, value), text) in enumerate(zip(bars, texts, strict=True)):
            y = head + row * index
            limit = int((left if beside else width) / CHARACTER) - 1
            shown = clip(label, limit)
            bar_y = y + 5 if beside else y + 18
            x, anchor = (left - 10, "end") if beside else (0.0, "start")
            yield text_element(x, y + (18 if beside else 13), shown, anchor, "strong", full=label)
            length = max(axis(value) - left, 0.0)
            yield rect_element(left, bar_y, length, 17, "bar", f"{label}: {text}")
            if around[index]:
                yield from _whisker(axis, value, around[index], bar_y + 8.5)
            yield text_element(axis(ends[index]) + 7, bar_y + 13, text, "start", "strong")
        if reference is not None:
            x = axis(reference[1])
            # Labels above the bars would be crossed out by one line from top to bottom.
            spans = (
                [(head - 4, bottom)]
                if beside
                else [
                    (head + row * index + 16, head + row * index + 38) for index in range(len(bars))
                ]
            )
            for top_y, bottom_y in spans:
                yield line_element(x, top_y, x, bottom_y, "reference")
            name = f"{reference[0]} {short_number(reference[1])}"
            fits = x + len(name) * CHARACTER < width
            yield text_element(x, head - 9, name, "start" if fits else "end", "reference-label")

    summary = "; ".join(f"{label}: {text}" for (label, _), text in zip(bars, texts, strict=True))
    return responsive(title, unit, summary, draw)


def histogram(
    values: Sequence[float] | NDArray[Any],
    *,
    title: str,
    x_label: str,
    num_bins: int = 30,
    log_y: bool = False,
    reference: tuple[str, float] | None = None,
) -> Markup:
    """Draw how often values fall into equal bins whose edges are round numbers.

    Args:
        values: finite numbers, at least one.
        title: what the chart shows.
        x_label: quantity and unit of the values.
        num_bins: upper limit on the bins over the values' range.
        log_y: logarithmic counts; empty bins then show nothing, as a count of 1 has height.
        reference: (name, x) of a vertical line, such as a threshold.

    Raises:
        ValueError: no value, a value that is not finite, or fewer than 2 bins.
    """
    numbers = _check_numbers(values, num_bins)
    edges = _bin_edges(float(numbers.min()), float(numbers.max()), num_bins)
    counts, _ = np.histogram(numbers, edges)
    most = int(counts.max())
    y_ticks = (
        log_ticks(1, max(most, 2)) if log_y else [t for t in linear_ticks(0, most) if t % 1 == 0]
    )
    floor = y_ticks[0] / 2 if log_y else 0.0
    low, high = float(edges[0]), float(edges[-1])
    if reference is not None:
        at = _finite(reference[1], "The reference line")
        low, high = min(low, at), max(high, at)

    def draw(width: int) -> Iterator[str]:
        height = 260 if width == WIDE else 220
        left = 14 + CHARACTER * max(len(label) for label in tick_labels(y_ticks))
        head = 26 if reference else 12
        x_axis = Axis(low=low, high=high, start=left, end=width - 14)
        y_axis = Axis(low=floor, high=y_ticks[-1], start=height - 40, end=head, log=log_y)
        yield str(height)
        yield from _y_grid(y_axis, y_ticks, left, width - 14)
        for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
            if count:
                x, y = x_axis(start), y_axis(count)
                yield rect_element(
                    x + 0.5,
                    y,
                    max(x_axis(end) - x - 1, 0.5),
                    height - 40 - y,
                    "bar",
                    f"{short_number(start)} to {short_number(end)}: {count:,}",
                )
        x_ticks = linear_ticks(low, high, 8 if width == WIDE else 4)
        yield from _x_ticks(x_axis, [t for t in x_ticks if low <= t <= high], height - 40)
        yield text_element(left, height - 4, x_label)
        if reference is not None:
            x = x_axis(reference[1])
            name = f"{reference[0]} {short_number(reference[1])}"
            yield line_element(x, head - 8, x, height - 40, "reference")
            fits = x + len(name) * CHARACTER + 6 < width
            yield text_element(
                x + (6 if fits else -6),
                head - 10,
                name,
                "start" if fits else "end",
                "reference-label",
            )

    summary = (
        f"{numbers.size:,} values from {short_number(numbers.min())} to "
        f"{short_number(numbers.max())}, median {short_number(float(np.median(numbers)))}"
    )
    scale = "count, logarithmic axis" if log_y else "count"
    return responsive(title, f"{scale}; {summary}", summary, draw)


def _check_spreads(spreads: Sequence[float] | None, labels: Sequence[str]) -> list[float]:
    """One spread a bar, 0 where none is asked for."""
    if spreads is None:
        return [0.0] * len(labels)
    if len(spreads) != len(labels):
        raise ValueError(
            f"spreads has {len(spreads)} values for {len(labels)} bars: give one each."
        )
    for label, spread in zip(labels, spreads, strict=True):
        if _finite(spread, f"The spread of {label!r}") < 0:
            raise ValueError(
                f"The spread of {label!r} is {spread}, but it is a distance: 0 or more."
            )
    return list(spreads)


def _whisker(axis: Axis, value: float, spread: float, y: float) -> Iterator[str]:
    """A line from value - spread (or zero) to value + spread, with a stroke across each end."""
    first, last = axis(max(value - spread, axis.low)), axis(value + spread)
    yield line_element(first, y, last, y, "spread")
    for x in (first, last):
        yield line_element(x, y - 4, x, y + 4, "spread")


def _check_series(
    series: Sequence[Series], log_y: bool, running_mean: int
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    if not 1 <= len(series) <= MAX_SERIES:
        raise ValueError(
            f"A line chart holds 1 to {MAX_SERIES} series, not {len(series)}: split it into "
            "several."
        )
    if running_mean < 1:
        raise ValueError(f"running_mean is {running_mean}, but a mean takes at least 1 point.")
    lines = []
    for item in series:
        x, y = np.asarray(item.x, dtype=np.float64), np.asarray(item.y, dtype=np.float64)
        if x.ndim != 1 or x.shape != y.shape:
            raise ValueError(
                f"Series {item.name!r} has x of shape {x.shape} and y of shape {y.shape}: give one "
                "y an x."
            )
        if not np.isfinite(x).all() or (np.diff(x) < 0).any():
            raise ValueError(f"Series {item.name!r} has x that are not finite and ascending.")
        finite = y[np.isfinite(y)]
        if not finite.size:
            raise ValueError(f"Series {item.name!r} has no finite value: leave it out.")
        if log_y and finite.min() <= 0:
            raise ValueError(
                f"Series {item.name!r} goes down to {finite.min()}, which has no logarithm: use a "
                "linear axis."
            )
        lines.append((x, y))
    return lines


def _check_numbers(values: Sequence[float] | NDArray[Any], num_bins: int) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64).ravel()
    if not numbers.size:
        raise ValueError("values is empty: a histogram needs at least one number.")
    if not np.isfinite(numbers).all():
        raise ValueError("values holds NaN or infinity: drop those and say how many they were.")
    if num_bins < 2:
        raise ValueError(f"num_bins is {num_bins}, but a histogram needs at least 2.")
    return numbers


def _running_mean(y: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Average each point with up to window - 1 finite points before it; gaps stay gaps."""
    if window == 1:
        return y
    finite = np.isfinite(y)
    sums = np.cumsum(np.where(finite, y, 0.0))
    counts = np.cumsum(finite)
    # The sum of a window is the difference of two running sums, the earlier one shifted.
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def _paths(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    x_axis: Axis,
    y_axis: Axis,
    index: int,
    kind: str,
) -> Iterator[str]:
    """Yield one path a run of finite values, thinned to what pixels can show."""
    pieces: list[str] = []
    finite = np.isfinite(y)
    starts = np.flatnonzero(finite & ~np.concatenate([[False], finite[:-1]]))
    for start in starts:
        length = np.argmin(finite[start:]) or len(y) - start
        run = slice(start, start + length)
        points = [(x_axis(a), y_axis(b)) for a, b in zip(x[run], y[run], strict=True)]
        thinned = _thin(points)
        if len(thinned) == 1:  # A path of one point shows only with a length of its own.
            thinned = [thinned[0], (thinned[0][0] + 0.1, thinned[0][1])]
        pieces.append("M" + "L".join(f"{pixels(a)} {pixels(b)}" for a, b in thinned))
    dash = f' stroke-dasharray="{DASHES[index]}"' if DASHES[index] and kind == "series" else ""
    yield f'<path class="{kind}" style="stroke:var(--s{index + 1})"{dash} d="{"".join(pieces)}"/>'


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep first, lowest, highest and last point of each pixel column: looks the same."""
    kept: list[tuple[float, float]] = []
    column: list[tuple[float, float]] = []
    for point in [*points, (math.inf, 0.0)]:
        if column and (math.isinf(point[0]) or int(point[0]) != int(column[0][0])):
            low = min(range(len(column)), key=lambda i: column[i][1])
            high = max(range(len(column)), key=lambda i: column[i][1])
            kept += [column[i] for i in sorted({0, low, high, len(column) - 1})]
            column = []
        column.append(point)
    return kept


def _x_axis(low: float, high: float, start: float, end: float) -> Axis:
    if low == high:
        low, high = low - 0.5, high + 0.5
    return Axis(low=low, high=high, start=start, end=end)


def _bin_edges(low: float, high: float, num_bins: int) -> NDArray[np.float64]:
    if low == high:
        high = low + (abs(low) or 1.0) * 0.1
        num_bins = 2
    step = nice_step(high - low, num_bins)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    edges = np.arange(first, last + 1, dtype=np.float64) * np.float64(step)
    # Rounding must not push the extreme values out of their bins.
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    return edges


def _y_grid(axis: Axis, ticks: Sequence[float], left: float, right: float) -> Iterator[str]:
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        y = axis(tick)
        yield line_element(left, y, right, y, "grid-line")
        yield text_element(left - 7, y + 4, label, "end")


def _x_ticks(axis: Axis, ticks: Sequence[float], y: float) -> Iterator[str]:
    yield line_element(axis.start, y, axis.end, y, "axis-line")
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        x = axis(tick)
        yield line_element(x, y, x, y + 4, "axis-line")
        # A label at the right end would hang over the edge of the drawing.
        half = len(label) * CHARACTER / 2
        yield text_element(min(x, axis.end + 12 - half), y + 18, label, "middle")


def _horizontal_reference(
    reference: tuple[str, float], axis: Axis, left: float, right: float
) -> Iterator[str]:
    y = axis(reference[1])
    yield line_element(left, y, right, y, "reference")
    name = f"{reference[0]} {short_number(reference[1])}"
    above = y - 5 if y > 24 else y + 14
    yield text_element(right, above, name, "end", "reference-label")


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}, but it needs a finite number.")
    return value
