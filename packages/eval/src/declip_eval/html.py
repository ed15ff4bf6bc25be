"""Building blocks of one self-contained HTML report: no network, no script, light and dark.

Text that a caller passes as `str` is data and is escaped; what these functions return is `Markup`
and is taken as it is. So a caption with `<script>` in it is shown, never run. The page also forbids
itself, by its content security policy, to load or run anything.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from PIL import Image, UnidentifiedImageError


class Markup(str):
    """A piece of HTML that is safe to put into the page as it is."""

    __slots__ = ()


Content = str | Markup
"""Plain text (gets escaped) or a piece made by this module."""

Tone = Literal["neutral", "good", "bad", "warn"]

_TONES: dict[str, tuple[str, str]] = {
    # Tone -> (sign, word): color alone must not carry the meaning.
    "neutral": ("", ""),
    "good": ("✓", "right"),
    "bad": ("✕", "wrong"),
    "warn": ("!", "attention"),
}

_MIME_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}

# What HTML cannot hold even escaped: control characters and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True)
class Card:
    """A picture with its caption and a note; the unit of grids and neighbor rows."""

    image: Markup | None
    """From `image()`; None shows the caption alone."""

    caption: str
    """The text that belongs to the picture."""

    note: str = ""
    """Small print: key, drop reason, source."""

    tone: Tone = "neutral"
    """`good` and `bad` mark right and wrong answers, by color and by sign."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page with a heading and an entry in the navigation."""

    title: str
    anchor: str
    body: Markup


def escape(text: Content) -> Markup:
    """Escape plain text for element content and quoted attributes; leave `Markup` as it is."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(_UNPRINTABLE.sub("\ufffd", text), quote=True))


def join(pieces: Iterable[Content]) -> Markup:
    """Put pieces behind one another, escaping those that are plain text."""
    return Markup("".join(escape(piece) for piece in pieces))


def page(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    summary: Iterable[Content] = (),
    footer: str = "",
    language: str = "en",
) -> str:
    """Put a whole HTML document together.

    Args:
        title: heading and name of the window.
        sections: in order; each gets an entry in the navigation.
        subtitle: a line under the heading.
        summary: pieces between the heading and the first section, such as `stat_tiles`.
        footer: a line at the end, such as version and fingerprint.
        language: of the page's own words.

    Raises:
        ValueError: two sections with one anchor.
    """
    anchors = [section.anchor for section in sections]
    for anchor in anchors:
        if anchors.count(anchor) > 1:
            raise ValueError(
                f"Two sections have the anchor {anchor!r}: give one of them another, or another "
                "title."
            )
    links = join(
        Markup(f'<li><a href="#{escape(part.anchor)}">{escape(part.title)}</a></li>')
        for part in sections
    )
    navigation = Markup(f'<nav aria-label="Sections"><ul>{links}</ul></nav>') if sections else ""
    return "".join(
        [
            f'<!DOCTYPE html>\n<html lang="{escape(language)}">\n<head>\n<meta charset="utf-8">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">\n",
            '<meta name="color-scheme" content="light dark">\n',
            f"<title>{escape(title)}</title>\n<style>\n{_style_sheet()}</style>\n</head>\n<body>\n",
            f"<header><h1>{escape(title)}</h1>",
            f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else "",
            f"</header>\n{navigation}\n<main>\n",
            join(summary),
            *(part.body for part in sections),
            "</main>\n",
            f"<footer><p>{escape(footer)}</p></footer>\n" if footer else "",
            "</body>\n</html>\n",
        ]
    )


def section(title: str, *content: Content, lead: str = "", anchor: str = "") -> Section:
    """Make a section.

    Args:
        title: its heading.
        content: pieces in order; plain text becomes a paragraph.
        lead: one or two sentences on what is to be seen here.
        anchor: name in links; by default made from the title.
    """
    anchor = anchor or re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
    body = join(piece if isinstance(piece, Markup) else paragraph(piece) for piece in content)
    opening = Markup(f'<p class="lead">{escape(lead)}</p>') if lead else ""
    return Section(
        title=title,
        anchor=anchor,
        body=Markup(
            f'<section id="{escape(anchor)}"><h2>{escape(title)}</h2>{opening}{body}</section>\n'
        ),
    )


def paragraph(text: Content) -> Markup:
    """Make a paragraph."""
    return Markup(f"<p>{escape(text)}</p>")


def heading(text: str) -> Markup:
    """Make a heading inside a section."""
    return Markup(f"<h3>{escape(text)}</h3>")


def code(text: str) -> Markup:
    """Show a command or a file word for word; long lines scroll inside their box."""
    return Markup(f'<pre tabindex="0"><code>{escape(text)}</code></pre>')


def details(summary: str, *content: Content) -> Markup:
    """Fold content away under a line to click on."""
    return Markup(
        f"<details><summary>{escape(summary)}</summary><div>{join(content)}</div></details>"
    )


def callout(text: Content, *, tone: Tone = "neutral", title: str = "") -> Markup:
    """Set a remark off from the text."""
    _check_tone(tone)
    head = f"<strong>{escape(title)}</strong> " if title else ""
    return Markup(f'<aside class="callout {tone}"><p>{head}{escape(text)}</p></aside>')


def stat_tiles(tiles: Iterable[tuple[str, str, str]]) -> Markup:
    """Show headline numbers as tiles: (label, value, note) each."""
    cells = join(
        Markup(
            f'<div class="tile"><dt>{escape(label)}</dt><dd><span class="value">{escape(value)}'
            f'</span><span class="note">{escape(note)}</span></dd></div>'
        )
        for label, value, note in tiles
    )
    return Markup(f'<dl class="tiles">{cells}</dl>')


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Content]],
    *,
    caption: str = "",
    text_columns: Collection[int] = (0,),
) -> Markup:
    """Make a table that scrolls inside its own box when the page is too narrow for it.

    Args:
        columns: headings.
        rows: one cell a column each.
        caption: a line above the table, also its name for screen readers.
        text_columns: positions of the columns that hold text; the others hold numbers and are
            aligned to the right.

    Raises:
        ValueError: a row whose number of cells is not the number of columns.
    """
    styles = ["" if i in text_columns else ' class="number"' for i in range(len(columns))]
    head = "".join(
        f'<th scope="col"{style}>{escape(name)}</th>'
        for name, style in zip(columns, styles, strict=True)
    )
    body = []
    for index, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(
                f"Row {index} has {len(row)} cells, but the table has {len(columns)} columns."
            )
        cells = (f"<td{style}>{escape(cell)}</td>" for cell, style in zip(row, styles, strict=True))
        body.append(f"<tr>{''.join(cells)}</tr>")
    name = f"<caption>{escape(caption)}</caption>" if caption else ""
    label = escape(caption or "Table")
    return Markup(
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>{name}<thead>'
        f"<tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def image(
    source: Image.Image | bytes, *, alt: str, max_side: int = 160, quality: int = 85
) -> Markup:
    """Embed a picture as a data URI.

    Args:
        source: an opened picture, or the bytes of a JPEG, PNG, WebP or GIF file. Bytes of a picture
            that is small enough are embedded as they are.
        alt: what it shows, for those who do not see it.
        max_side: longer side in pixels; a larger picture is scaled down, a smaller one is kept.
        quality: of JPEG, 1 to 95. Pictures with transparency become PNG.

    Raises:
        ValueError: bytes that are no picture, or a setting out of range.
    """
    if max_side < 1:
        raise ValueError(f"max_side is {max_side}, but a picture has at least 1 pixel.")
    if not 1 <= quality <= 95:
        raise ValueError(f"quality is {quality}, but JPEG's goes from 1 to 95.")
    data, mime_type, (width, height) = _encode(source, max_side, quality)
    alt = alt if alt.strip() else "a picture without a caption"
    uri = f"data:{mime_type};base64,{base64.b64encode(data).decode('ascii')}"
    return Markup(
        f'<img src="{uri}" alt="{escape(alt)}" width="{width}" height="{height}" loading="lazy">'
    )


def pair_card(card: Card) -> Markup:
    """Show a picture with its caption and note."""
    _check_tone(card.tone)
    sign, word = _TONES[card.tone]
    badge = f'<span class="badge" title="{word}" aria-label="{word}">{sign}</span>' if sign else ""
    picture = f'<div class="picture">{card.image}</div>' if card.image is not None else ""
    note = f'<span class="note">{escape(card.note)}</span>' if card.note else ""
    # Captions come in any script: each finds its own direction.
    caption = f'<span class="caption" dir="auto">{escape(card.caption)}</span>'
    if not card.caption.strip():
        caption = '<span class="note">no caption</span>'
    return Markup(
        f'<div class="card {card.tone}">{picture}{badge}<div class="words">'
        f"{caption}{note}</div></div>"
    )


def image_grid(cards: Iterable[Card], *, caption: str = "") -> Markup:
    """Show cards side by side, as many as fit."""
    items = join(pair_card(card) for card in cards)
    title = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Markup(f'<figure>{title}<div class="grid">{items}</div></figure>')


def neighbor_row(query: Card, neighbors: Iterable[tuple[Card, float]], *, score: str) -> Markup:
    """Show a query and what was found for it, each with its score.

    Args:
        query: the sample that was asked for.
        neighbors: (card, score), best first.
        score: what the number is, such as "cosine".
    """
    found = join(
        Markup(
            f'<li>{pair_card(card)}<span class="score" title="{escape(score)}">{value:.3f}'
            "</span></li>"
        )
        for card, value in neighbors
    )
    return Markup(
        f'<div class="neighbors"><div class="query">{pair_card(query)}</div>'
        f'<ol aria-label="Found, with {escape(score)}">{found}</ol></div>'
    )


def _check_tone(tone: str) -> None:
    if tone not in _TONES:
        raise ValueError(f"tone is {tone!r}, but must be one of {', '.join(_TONES)}.")


def _style_sheet() -> str:
    return resources.files("declip_eval").joinpath("report.css").read_text(encoding="utf-8")


def _encode(
    source: Image.Image | bytes, max_side: int, quality: int
) -> tuple[bytes, str, tuple[int, int]]:
    """Return the file's bytes, its type and the picture's (width, height) in pixels."""
    picture = _open(source) if isinstance(source, bytes) else source
    if isinstance(source, bytes) and max(picture.size) <= max_side:
        return source, _MIME_TYPES[str(picture.format)], picture.size
    is_transparent = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
    picture = picture.convert("RGBA" if is_transparent else "RGB")
    # Image.thumbnail() would change a caller's picture; convert() has made a copy.
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if is_transparent:
        picture.save(file, "PNG", optimize=True)
        return file.getvalue(), "image/png", picture.size
    picture.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue(), "image/jpeg", picture.size


def _open(data: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data), formats=tuple(_MIME_TYPES))
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{len(data)} bytes are no readable JPEG, PNG, WebP or GIF picture ({error}): show "
            "the sample without its picture."
        ) from error
    return picture
