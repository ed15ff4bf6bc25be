"""Charts of several models over several datasets: radar and points with intervals.

Both are inline SVG drawn for a wide and a narrow screen, as in `declip_eval.charts`, and both keep
what is missing apart from what is zero: a radar's outline is broken there, a row of points says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from declip_eval.axes import Axis, linear_ticks, short_number, tick_labels
from declip_eval.charts import MAX_SERIES
from declip_eval.html import Markup, escape
from declip_eval.svg import (
    CHARACTER,
    DASHES,
    WIDE,
    clip,
    legend,
    line_element,
    pixels,
    responsive,
    text_element,
)

MIN_AXES = 3
"""Fewer make no area."""
MAX_AXES = 40
"""More labels than that touch."""
_LABEL = 18
"""Characters shown of an axis's name."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One model's values over the axes of a chart."""

    name: str
    """Of the model."""
    values: Sequence[float | None]
    """(num_axes,), one an axis; None where it was not measured."""
    intervals: Sequence[tuple[float, float] | None] = ()
    """(low, high) of each value, or nothing at all."""


def radar_chart(
    axes: Sequence[str], profiles: Sequence[Profile], *, title: str, unit: str
) -> Markup:
    """Draw each model's values as an outline around a common center, which is zero.

    All axes have the same scale, so areas compare honestly within one chart.

    Args:
        axes: names, clockwise from the top; `MIN_AXES` to `MAX_AXES`.
        profiles: up to `charts.MAX_SERIES`; values finite and not negative.
        title: what the chart shows.
        unit: quantity and unit of the values.

    Raises:
        ValueError: too few or too many axes or profiles, not one value an axis, a negative or
            non-finite value, or no value at all.
    """
    if not MIN_AXES <= len(axes) <= MAX_AXES:
        raise ValueError(
            f"A radar holds {MIN_AXES} to {MAX_AXES} axes, not {len(axes)}: draw points instead."
        )
    _check_profiles(axes, profiles, lowest=0.0)
    top_ticks = linear_ticks(0.0, max(v for p in profiles for v in p.values if v is not None), 4)

    def draw(width: int) -> Iterator[str]:
        longest = min(max(len(axis) for axis in axes), _LABEL) * CHARACTER
        radius = 190.0 if width == WIDE else max((width - 2 * longest) / 2 - 16, 70.0)
        middle, center = width / 2, radius + 34
        lowest = max(_direction(number, len(axes))[1] for number in range(len(axes)))
        yield str(center + radius * lowest + 34)
        yield from _spokes(axes, middle, center, radius, top_ticks, width == WIDE)
        for index, profile in enumerate(profiles):
            yield from _outline(profile, axes, index, middle, center, radius / top_ticks[-1])

    missing = sum(value is None for profile in profiles for value in profile.values)
    notes = [unit, "the center is 0"] + [f"{missing} values missing: the outline breaks"] * (
        missing > 0
    )
    return responsive(title, ", ".join(notes), _summary(axes, profiles), draw, _legend(profiles))


def point_chart(
    rows: Sequence[str],
    profiles: Sequence[Profile],
    *,
    title: str,
    unit: str,
    reference: tuple[str, float] | None = None,
) -> Markup:
    """Draw a row a dataset, with one point and its interval a model.

    Args:
        rows: names, from top to bottom.
        profiles: up to `charts.MAX_SERIES`; values finite, of either sign.
        title: what the chart shows.
        unit: quantity and unit of the values.
        reference: (name, value) of a vertical line, such as no difference.

    Raises:
        ValueError: no row, no profile or too many, not one value a row, a non-finite value, no
            value at all, or an interval that is none.
    """
    if not rows:
        raise ValueError("rows is empty: give at least one name.")
    _check_profiles(rows, profiles, lowest=-math.inf)
    ends = [0.0] if reference is None else [reference[1]]
    for profile in profiles:
        ends += [value for value in profile.values if value is not None]
        ends += [end for pair in profile.intervals if pair is not None for end in pair]
    ticks = linear_ticks(min(ends), max(ends), 6)

    def draw(width: int) -> Iterator[str]:
        is_wide = width == WIDE
        longest = max(len(row) for row in rows)
        left = min(longest * CHARACTER + 16, 340.0) if is_wide else 6.0
        head, step = 26.0, 15.0 * len(profiles) + (14 if is_wide else 30)
        bottom = head + step * len(rows)
        axis = Axis(low=ticks[0], high=ticks[-1], start=left + 8, end=width - 24)
        yield str(bottom + 28)
        yield from _scale(axis, ticks, head, bottom, reference, width)
        for number, row in enumerate(rows):
            top = head + step * number
            yield line_element(0, top, width, top, "grid-line")
            limit = int((left if is_wide else width) / CHARACTER) - 1
            y = top + step / 2 + 4 if is_wide else top + 15
            x, anchor = (left - 8, "end") if is_wide else (2.0, "start")
            yield text_element(x, y, clip(row, limit), anchor, "strong", full=row)
            first = top + (14 if is_wide else 29)
            for index, profile in enumerate(profiles):
                yield from _point(profile, row, number, index, first + 15 * index, axis)

    note = f"{unit}; in each row from top to bottom as listed" if len(profiles) > 1 else unit
    return responsive(title, note, _summary(rows, profiles), draw, _legend(profiles))


def _legend(profiles: Sequence[Profile]) -> str:
    return legend([profile.name for profile in profiles]) if len(profiles) > 1 else ""


def _summary(names: Sequence[str], profiles: Sequence[Profile]) -> str:
    return "; ".join(
        f"{profile.name}: "
        + ", ".join(
            f"{name} {'missing' if value is None else short_number(value)}"
            for name, value in zip(names, profile.values, strict=True)
        )
        for profile in profiles
    )


def _check_profiles(names: Sequence[str], profiles: Sequence[Profile], lowest: float) -> None:
    if not 1 <= len(profiles) <= MAX_SERIES:
        raise ValueError(
            f"A chart holds 1 to {MAX_SERIES} models, not {len(profiles)}: split it into several."
        )
    for profile in profiles:
        if len(profile.values) != len(names):
            raise ValueError(
                f"{profile.name!r} has {len(profile.values)} values for {len(names)} names: give "
                "one each, None where there is none."
            )
        if profile.intervals and len(profile.intervals) != len(names):
            raise ValueError(
                f"{profile.name!r} has {len(profile.intervals)} intervals for {len(names)} names: "
                "give one each, or none at all."
            )
        for name, value in zip(names, profile.values, strict=True):
            if value is not None and not (math.isfinite(value) and value >= lowest):
                raise ValueError(
                    f"{profile.name!r} has {value} on {name!r}, but the chart needs a finite "
                    f"number{' from 0 on' if lowest == 0 else ''}."
                )
        for value, pair in zip(profile.values, profile.intervals, strict=False):
            # The value may lie outside: a bootstrap's percentiles need not hold it.
            if pair is not None and (
                value is None or not (all(map(math.isfinite, pair)) and pair[0] <= pair[1])
            ):
                raise ValueError(
                    f"{profile.name!r} has the interval {pair} of {value}, but it needs a value, "
                    "and two finite ends in their order."
                )
    if all(value is None for profile in profiles for value in profile.values):
        raise ValueError("Every value is missing: there is nothing to draw.")


def _direction(number: int, num_axes: int) -> tuple[float, float]:
    """Unit vector of an axis, clockwise from the top, y downwards."""
    angle = 2 * math.pi * number / num_axes
    return math.sin(angle), -math.cos(angle)


def _spokes(
    axes: Sequence[str],
    middle: float,
    center: float,
    radius: float,
    ticks: Sequence[float],
    has_room: bool,
) -> Iterator[str]:
    for tick in ticks[1:]:
        size = radius * tick / ticks[-1]
        corners = " ".join(
            f"{pixels(middle + size * x)},{pixels(center + size * y)}"
            for x, y in (_direction(number, len(axes)) for number in range(len(axes)))
        )
        yield f'<polygon class="grid-line" style="fill:none" points="{corners}"/>'
    for number, name in enumerate(axes):
        x, y = _direction(number, len(axes))
        end_x, end_y = middle + radius * x, center + radius * y
        yield line_element(middle, center, end_x, end_y, "grid-line")
        anchor = "middle" if abs(x) < 0.2 else "start" if x > 0 else "end"
        shown = clip(name, _LABEL)
        at = (end_x + 9 * x, end_y + 9 * y + (4 + 6 * y))
        yield text_element(*at, shown, anchor, "strong", full=name)
    labels = list(zip(ticks[1:], tick_labels(ticks)[1:], strict=True))
    for tick, label in labels if has_room else labels[-1:]:
        yield text_element(middle + 4, center - radius * tick / ticks[-1] + 12, label)


def _outline(
    profile: Profile,
    axes: Sequence[str],
    index: int,
    middle: float,
    center: float,
    scale: float,
) -> Iterator[str]:
    """The outline, broken where a value is missing, and a point on every axis."""
    points: list[tuple[float, float] | None] = []
    for number, value in enumerate(profile.values):
        x, y = _direction(number, len(axes))
        here = None if value is None else (middle + scale * value * x, center + scale * value * y)
        points.append(here)
    color = f"stroke:var(--s{index + 1})"
    dash = f' stroke-dasharray="{DASHES[index]}"' if DASHES[index] else ""
    pieces = [
        f"M{pixels(a[0])} {pixels(a[1])}L{pixels(b[0])} {pixels(b[1])}"
        for a, b in zip(points, [*points[1:], points[0]], strict=True)
        if a is not None and b is not None
    ]
    if pieces and None not in points:  # One closed path, so that dashes run on around corners.
        corners = "L".join(f"{pixels(p[0])} {pixels(p[1])}" for p in points if p is not None)
        pieces = [f"M{corners}Z"]
    if pieces:
        yield f'<path class="series" style="{color}"{dash} d="{"".join(pieces)}"/>'
    for name, value, point in zip(axes, profile.values, points, strict=True):
        if point is not None and value is not None:
            hover = escape(f"{profile.name}, {name}: {short_number(value)}")
            yield (
                f'<circle cx="{pixels(point[0])}" cy="{pixels(point[1])}" r="3.2" '
                f'style="fill:var(--s{index + 1})"><title>{hover}</title></circle>'
            )


def _point(
    profile: Profile, row: str, number: int, index: int, y: float, axis: Axis
) -> Iterator[str]:
    value = profile.values[number]
    if value is None:
        room = int((axis.end - axis.start) / CHARACTER) - len(": missing")
        yield text_element(axis.start, y + 4, f"{clip(profile.name, room)}: missing")
        return
    interval = profile.intervals[number] if profile.intervals else None
    color, told = f"stroke:var(--s{index + 1})", short_number(value)
    if interval is not None:
        low, high = (axis(end) for end in interval)
        told += f" ({short_number(interval[0])} to {short_number(interval[1])})"
        strokes = f"M{pixels(low)} {pixels(y)}H{pixels(high)}"
        strokes += "".join(f"M{pixels(x)} {pixels(y - 4)}V{pixels(y + 4)}" for x in (low, high))
        yield f'<path class="series" style="{color};stroke-width:1.5" d="{strokes}"/>'
    hover = escape(f"{profile.name}, {row}: {told}")
    yield (
        f'<circle cx="{pixels(axis(value))}" cy="{pixels(y)}" r="4" '
        f'style="fill:var(--s{index + 1})"><title>{hover}</title></circle>'
    )


def _scale(
    axis: Axis,
    ticks: Sequence[float],
    head: float,
    bottom: float,
    reference: tuple[str, float] | None,
    width: int,
) -> Iterator[str]:
    """The ticks' lines from top to bottom, and the reference with its name above."""
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        yield line_element(axis(tick), head, axis(tick), bottom, "grid-line")
        yield text_element(axis(tick), bottom + 18, label, "middle")
    if reference is not None:
        x = axis(reference[1])
        yield line_element(x, head - 6, x, bottom, "reference")
        fits = x + len(reference[0]) * CHARACTER < width
        anchor = "start" if fits else "end"
        yield text_element(x, head - 11, reference[0], anchor, "reference-label")
