"""Sheets of pictures to look at: rows of cells, as one HTML file that fetches nothing."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from declip_eval import html
from declip_shards import DeclipError, Store, layout, read_samples, sidecars
from declip_shards.layout import SHARD_DIGITS

PICTURE_SIDE = 128
"""Longest side of a thumbnail in pixels: it fills a card of the report's grid."""
FOOTER = "Written by opendeclip. Everything is inside this file; nothing is fetched."
NO_PICTURE = "no longer in the dataset"
UNREADABLE = "this picture cannot be read"
_CARD_REM = 9
"""Width of a card with its gap, in the page's unit (report.css gives a card 8.5rem at least)."""


@dataclass(frozen=True)
class Cell:
    """A sample of a sheet."""

    image: bytes | None
    """A JPEG, PNG, WebP or GIF file; None shows the caption alone."""
    caption: str
    """The text that belongs to the picture."""
    note: str = ""
    """Small print: key, score, reason."""


def card(cell: Cell, *, tone: html.Tone = "neutral") -> html.Card:
    """The cell with its thumbnail. Bytes that are no picture are said to be so, never fatal."""
    note, picture = cell.note, None
    if cell.image is not None:
        try:
            picture = html.image(cell.image, alt=cell.caption, max_side=PICTURE_SIDE)
        except ValueError:
            note = f"{note}: {UNREADABLE}" if note else UNREADABLE
    return html.Card(image=picture, caption=cell.caption, note=note, tone=tone)


def sheet(rows: Sequence[Sequence[Cell]], *, row_titles: Sequence[str] = ()) -> html.Markup:
    """Rows of cells for a section of a page; narrow rows stand side by side.

    Args:
        rows: cells in order; rows may differ in length.
        row_titles: a line above each row, as many as rows, or none at all.

    Raises:
        ValueError: the number of titles is not the number of rows.
    """
    if row_titles and len(row_titles) != len(rows):
        raise ValueError(f"{len(row_titles)} row_titles for {len(rows)} rows: give one a row.")
    titles = row_titles or [""] * len(rows)
    figures = html.join(
        html.image_grid([card(cell) for cell in row], caption=title)
        for row, title in zip(rows, titles, strict=True)
    )
    width = _CARD_REM * max((len(row) for row in rows), default=1)
    columns = f"repeat(auto-fill,minmax(min(100%,{width}rem),1fr))"
    return html.Markup(
        f'<div style="display:grid;grid-template-columns:{columns};column-gap:1.5rem">'
        f"{figures}</div>"
    )


def sheet_html(
    title: str,
    rows: Sequence[Sequence[Cell]],
    *,
    summary: Sequence[str] = (),
    row_titles: Sequence[str] = (),
) -> bytes:
    """A whole page: heading, lines of text, rows of cells.

    Args:
        title: heading and name of the window.
        rows: cells in order, such as a query and what was found for it.
        summary: paragraphs under the heading.
        row_titles: a line above each row, as many as rows, or none at all.

    Returns:
        UTF-8 bytes of the HTML file. Every text is escaped; pictures are inside, scaled down.

    Raises:
        ValueError: the number of titles is not the number of rows.
    """
    body = sheet(rows, row_titles=row_titles) if rows else html.callout("There is nothing to show.")
    section = html.section("Samples", *summary, body)
    return html.page(title, [section], footer=FOOTER).encode()


def pictures_of(
    store: Store, keys_by_shard: Mapping[str, Iterable[str]]
) -> dict[str, tuple[bytes, str]]:
    """Picture bytes and caption of the wanted samples, by one pass over each tar.

    Args:
        store: the dataset.
        keys_by_shard: shard, such as ``00007`` -> keys of samples in its tar. Shards without keys
            are not opened, and a tar is read no further than its last wanted sample.

    Returns:
        Key -> (bytes of the picture's file, caption).

    Raises:
        DeclipError: a tar is missing, cut or damaged, or has no such sample.
    """
    found: dict[str, tuple[bytes, str]] = {}
    for shard, keys in sorted(keys_by_shard.items()):
        wanted = set(keys)
        if not wanted:
            continue
        path = layout.tar_path(shard)
        if not store.exists(path):
            raise DeclipError(f"{path!r} is missing; rerun ingest.")
        for sample in read_samples(store, shard):
            if sample.key in wanted:
                wanted.remove(sample.key)
                found[sample.key] = (sample.image, sample.caption)
                if not wanted:
                    break
        if wanted:
            raise DeclipError(
                f"{path!r} has no sample {min(wanted)!r}: what names it was made of other "
                "shards; rerun the stage that wrote it."
            )
    return found


def shards_of(store: Store, keys: Iterable[str]) -> dict[str, str]:
    """The shard of each sample.

    A key begins with the number of the shard that it was downloaded into, which is looked into
    first; samples of a repacked dataset lie elsewhere, and then the tables are read in turn.

    Args:
        store: the dataset.
        keys: of samples.

    Returns:
        Key -> shard; a key that no shard has is left out.
    """
    wanted, found = set(keys), dict[str, str]()
    shards = layout.list_shards(store)
    likely: dict[str, None] = {}
    for key in sorted(wanted):
        likely |= dict.fromkeys(shard for shard in (key[:SHARD_DIGITS],) if shard in shards)
    for shard in [*likely, *(shard for shard in shards if shard not in likely)]:
        if not wanted:
            break
        table = sidecars.read_table(store, layout.shard_parquet_path(shard), ["key", "status"])
        here = table.filter(
            pc.and_(
                pc.is_in(table.column("key"), value_set=pa.array(sorted(wanted), pa.string())),
                pc.equal(table.column("status"), "success"),
            )
        )
        for key in here.column("key").to_pylist():
            found[key] = shard
            wanted.remove(key)
    return found


def pictures_of_keys(store: Store, keys: Iterable[str]) -> dict[str, tuple[bytes, str]]:
    """As :func:`pictures_of`, of samples whose shards are looked up; unknown keys are left out."""
    by_shard: dict[str, list[str]] = {}
    for key, shard in shards_of(store, keys).items():
        by_shard.setdefault(shard, []).append(key)
    return pictures_of(store, by_shard)


def cell_of(pictures: Mapping[str, tuple[bytes, str]], key: str, note: str = "") -> Cell:
    """The cell of a sample; one that is not among ``pictures`` is said to be gone."""
    if key not in pictures:
        return Cell(None, f"{key}: {NO_PICTURE}", note)
    return Cell(*pictures[key], note=note or key)


def flat_entries(
    value: Any, name: str = "", *, without: Collection[str] = ()
) -> list[tuple[str, str]]:
    """The leaves of nested JSON for a table: dotted names, and values as text, a dash for none.

    Args:
        value: the JSON.
        name: what it is called, before the names in it.
        without: entries of this name are left out wherever they stand.
    """
    if isinstance(value, Mapping):
        return [
            pair
            for key, inner in value.items()
            if key not in without
            for pair in flat_entries(inner, f"{name}.{key}" if name else str(key), without=without)
        ]
    if isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        return [
            pair
            for number, inner in enumerate(value)
            for pair in flat_entries(inner, f"{name}.{number}", without=without)
        ]
    told = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return [(name, "-" if value is None else told or "-")]
