"""Heat map of a confusion matrix as inline SVG; see `declip_eval.charts`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_eval.axes import short_number
from declip_eval.html import Markup, escape
from declip_eval.svg import CHARACTER, caption, clip, drawing, pixels, rect_element, text_element

MAX_HEAT_CLASSES = 60
"""Beyond this the labels of a heat map touch."""


def heat_map(
    matrix: NDArray[Any],
    labels: Sequence[str],
    *,
    title: str,
    row_label: str = "true class",
    column_label: str = "predicted class",
) -> Markup:
    """Draw a confusion matrix: each row's share of its own sum, darker for more.

    Args:
        matrix: (num_classes, num_classes) counts, rows are true classes.
        labels: (num_classes,) names.
        title: what the map shows.
        row_label: what the rows are.
        column_label: what the columns are.

    Raises:
        ValueError: not square, labels that do not fit, negative counts, or too many classes to
            read (`group_confusion` adds them up).
    """
    counts = _check_counts(matrix, labels)
    num_classes = len(labels)
    sums = counts.sum(axis=1, keepdims=True)
    shares = counts / np.where(sums > 0, sums, 1)
    cell = 44 if num_classes <= 12 else 24 if num_classes <= 24 else 16
    longest = min(max(len(label) for label in labels), 24)
    left = 30 + longest * CHARACTER
    head = 34 + longest * CHARACTER * 0.72
    # The last slanted label leans out to the right of its column.
    width = left + cell * num_classes + longest * CHARACTER * 0.72 + 10
    height = head + cell * num_classes + 10
    parts = list(_heat_cells(counts, shares, labels, left, head, cell))
    parts += _labels(labels, left, head, cell)
    parts.append(text_element(left, 12, f"{column_label} →"))
    side = head + cell * num_classes / 2
    parts.append(
        f'<g transform="translate(11 {pixels(side)}) rotate(-90)">'
        f"{text_element(0, 0, f'← {row_label}', 'middle')}</g>"
    )
    parts.append(
        f'<rect class="frame" x="{pixels(left)}" y="{pixels(head)}" width="{cell * num_classes}" '
        f'height="{cell * num_classes}"/>'
    )
    total = counts.sum()
    diagonal = float(counts.diagonal().sum() / total) if total else 0.0
    summary = (
        f"{num_classes} classes, {short_number(float(total))} samples, "
        f"{diagonal:.1%} on the diagonal"
    )
    note = f"share of each row; {summary}; hover over a cell for its counts"
    svg = drawing(title, summary, width, height, "".join(parts), "")
    sized = svg.replace("<svg ", f'<svg style="width:{pixels(width)}px" ', 1)
    return Markup(
        f'<figure class="chart">{caption(title, note)}<div class="box" role="region" '
        f'aria-label="{escape(title)}" tabindex="0">{sized}</div></figure>'
    )


def _heat_cells(
    counts: NDArray[Any],
    shares: NDArray[Any],
    labels: Sequence[str],
    left: float,
    head: float,
    cell: int,
) -> Iterator[str]:
    for row, column in np.argwhere(counts > 0):
        share, x, y = float(shares[row, column]), left + cell * column, head + cell * row
        number = short_number(float(counts[row, column]))
        hover = f"{labels[row]} → {labels[column]}: {number} ({share:.0%})"
        yield rect_element(x, y, cell, cell, "heat", hover, opacity=max(share, 0.03))
        if cell >= 40 and share >= 0.005:
            # Where the shade swallows the text depends on light or dark: the style sheet decides.
            kind = "strong" + " over-60" * (share > 0.6) + " over-80" * (share > 0.8)
            yield text_element(x + cell / 2, y + cell / 2 + 4, f"{share:.0%}", "middle", kind)


def _labels(labels: Sequence[str], left: float, head: float, cell: int) -> Iterator[str]:
    """Write each label beside its row and, slanted, above its column."""
    kind = "strong" if cell > 16 else "strong small"
    for index, label in enumerate(labels):
        middle = cell * index + cell / 2
        shown = clip(label, 24)
        yield text_element(left - 8, head + middle + 4, shown, "end", kind, full=label)
        yield (
            f'<g transform="translate({pixels(left + middle + 3)} {pixels(head - 7)}) rotate(-45)">'
            f"{text_element(0, 0, shown, 'start', kind, full=label)}</g>"
        )


def _check_counts(matrix: NDArray[Any], labels: Sequence[str]) -> NDArray[Any]:
    counts = np.asarray(matrix)
    num_classes = len(labels)
    if counts.shape != (num_classes, num_classes) or num_classes == 0:
        raise ValueError(
            f"matrix has shape {counts.shape} for {num_classes} labels: it must be square, one row "
            "and one column a label."
        )
    if num_classes > MAX_HEAT_CLASSES:
        raise ValueError(
            f"{num_classes} classes are too many to read in a heat map (limit {MAX_HEAT_CLASSES}): "
            "add them up with zeroshot.group_confusion, or show the most frequent."
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("matrix holds negative or non-finite numbers, but its cells are counts.")
    return counts
