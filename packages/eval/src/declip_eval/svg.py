"""SVG's few elements that charts are drawn with, each as text, and the figure around a chart."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from declip_eval.html import Markup, escape

WIDE, NARROW = 1000, 350
"""Widths of the two drawings of a responsive chart, in pixels."""

CHARACTER = 6.6
"""Average width of a 12 px character of a sans-serif font, in pixels."""

DASHES: tuple[str, ...] = ("", "7 4", "2 4", "10 3 2 3", "", "7 4", "2 4", "10 3 2 3")
"""Dash pattern of each series, so that lines differ by more than their color."""


def legend(names: Sequence[str]) -> str:
    """List the series with a piece of their line each."""
    items = "".join(
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><path class="series" '
        f'style="stroke:var(--s{index + 1})" stroke-dasharray="{DASHES[index]}" d="M1 5H25"/>'
        "</svg>"
        f"{escape(name)}</li>"
        for index, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def responsive(
    title: str, note: str, summary: str, draw: Callable[[int], Iterator[str]], legend: str = ""
) -> Markup:
    """Draw for both widths. `draw` yields the drawing's height first, then its elements."""
    drawings = []
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        height, *parts = draw(width)
        drawings.append(drawing(title, summary, width, float(height), "".join(parts), kind))
    return Markup(
        f'<figure class="chart">{caption(title, note)}{legend}{"".join(drawings)}</figure>'
    )


def caption(title: str, note: str) -> str:
    """Write a chart's title, and its unit and notes behind it in plain weight."""
    unit = f' <span class="unit">{escape(note)}</span>' if note else ""
    return f"<figcaption>{escape(title)}{unit}</figcaption>"


def drawing(title: str, summary: str, width: float, height: float, body: str, kind: str) -> str:
    """Wrap elements into an SVG of the given size in pixels; `summary` is read to the blind."""
    return (
        f'<svg class="{kind}" viewBox="0 0 {pixels(width)} {pixels(height)}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(summary)}</desc>{body}</svg>"
    )


def text_element(
    x: float, y: float, text: str, anchor: str = "start", kind: str = "", full: str = ""
) -> str:
    """Write text; where `full` is longer than what is shown, it appears on hovering."""
    style = f' class="{kind}"' if kind else ""
    hover = f"<title>{escape(full)}</title>" if full and full != text else ""
    return (
        f'<text x="{pixels(x)}" y="{pixels(y)}" text-anchor="{anchor}"{style}>'
        f"{hover}{escape(text)}</text>"
    )


def line_element(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Draw a straight line of the style sheet's class `kind`."""
    ends = f'x1="{pixels(x1)}" y1="{pixels(y1)}" x2="{pixels(x2)}" y2="{pixels(y2)}"'
    return f'<line class="{kind}" {ends}/>'


def rect_element(
    x: float, y: float, width: float, height: float, kind: str, hover: str, opacity: float = 1.0
) -> str:
    """Fill a rectangle with the style sheet's class `kind`; `hover` appears on hovering."""
    place = f'x="{pixels(x)}" y="{pixels(y)}" width="{pixels(width)}" height="{pixels(height)}"'
    shade = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
    return f'<rect class="{kind}" {place}{shade}><title>{escape(hover)}</title></rect>'


def clip(text: str, num_characters: int) -> str:
    """Shorten text to the room of so many average characters, an ellipsis then being the last."""
    ends = list(accumulate(map(_room, text)))
    if not ends or ends[-1] <= num_characters:
        return text
    return text[: max(bisect_right(ends, num_characters - 1), 1)] + "…"


def _room(character: str) -> float:
    """Of a character, in average ones: widths are guessed, for the reader's fonts are unknown."""
    if unicodedata.east_asian_width(character) in "WF":
        return 1.9
    return 1.7 if character in "MW" else 1.0


def pixels(value: float) -> str:
    """Write a pixel coordinate to a tenth, without a superfluous point."""
    return f"{value:.1f}".removesuffix(".0")
