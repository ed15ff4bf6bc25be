"""Rows of a list on their way to ``source/pairs.parquet``, each with its fate."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

KEPT = ""
DROP_REASONS: dict[str, str] = {
    "missing_url": "the row has no URL",
    "missing_caption": "the row has no caption, or one of spaces alone",
    "bad_url": "a URL that is no UTF-8 text",
    "bad_caption": "a caption that is no UTF-8 text, such as half a surrogate pair, or no text",
    "bad_row": "a row of another number of fields, or with a value that no file can hold",
    "video": "a row of YFCC100M that is a video",
    "not_in_metadata": "a photo id of YFCC15M V1 that the metadata files do not have",
    "duplicate_id": "a photo id that the same list had before",
    "duplicate_url": "a URL that an earlier row had; the first stays",
}
"""Why a row of a list does not reach ``source/pairs.parquet``: a closed vocabulary."""
FAULTS: tuple[str, ...] = (KEPT, *DROP_REASONS)
"""A row's fate is an index into this."""
CODES: dict[str, int] = {reason: code for code, reason in enumerate(FAULTS)}

Codes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
OnBytes = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """n rows that follow one another in a list."""

    name: str
    """Name of the file."""
    numbers: npt.NDArray[np.int64]
    """(n,) which row of the file each is; the first is 0, a header is none."""
    table: pa.Table
    """n rows: ``url``, ``caption`` (strings) and carried columns."""
    faults: Codes
    """(n,) indices into :data:`FAULTS`; 0 is no fault so far."""

    def with_fault(self, reason: str, where: Mask) -> "Rows":
        """Give the rows in ``where`` a reason, unless they already have one."""
        faults = np.where((self.faults == 0) & where, np.uint8(CODES[reason]), self.faults)
        return replace(self, faults=faults.astype(np.uint8))

    def with_lost_rows(self, numbers: npt.NDArray[np.int64]) -> "Rows":
        """Put in rows of which only the number is known, each at its place, as ``bad_row``."""
        if not len(numbers):
            return self
        schema = self.table.schema
        nulls = pa.table([pa.nulls(len(numbers), kind) for kind in schema.types], schema=schema)
        order = np.argsort(np.concatenate([self.numbers, numbers]), kind="stable")
        codes = np.full(len(numbers), CODES["bad_row"], np.uint8)
        return Rows(
            name=self.name,
            numbers=np.concatenate([self.numbers, numbers])[order],
            table=pa.concat_tables([self.table, nulls]).take(pa.array(order)),
            faults=np.concatenate([self.faults, codes])[order],
        )

    def take(self, where: Mask) -> "Rows":
        """The rows in ``where``."""
        return Rows(
            name=self.name,
            numbers=self.numbers[where],
            table=self.table.filter(pa.array(where)),
            faults=self.faults[where],
        )


class ListReader(Protocol):
    """What every kind of list is read through."""

    @property
    def kind(self) -> str:
        """What the list was taken for."""

    @property
    def schema(self) -> pa.Schema:
        """Of the rows' tables."""

    @property
    def num_bytes(self) -> int:
        """Stored bytes that reading will go through; 0 where it is not known."""

    def read(self, on_bytes: OnBytes, max_rows: int | None = None) -> Iterator[Rows]:
        """All rows in the list's order, bounded in memory.

        Args:
            on_bytes: is told of stored bytes as they are read.
            max_rows: of the list's rows, the first so many.
        """


def to_mask(values: pa.Array | pa.ChunkedArray) -> Mask:
    """A boolean column as numpy has it; null is False."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    mask: Mask = np.asarray(values.fill_null(False).to_numpy(zero_copy_only=False), bool)
    return mask


def to_text(values: pa.Array | pa.ChunkedArray) -> tuple[pa.Array, Mask]:
    """Bytes or text of any of Arrow's kinds as strings; what is no UTF-8 is null and marked.

    Returns:
        Strings (n,), and (n,) whether the bytes there are no UTF-8.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    raw = values
    if pa.types.is_dictionary(raw.type):
        raw = raw.cast(raw.type.value_type)
    if not pa.types.is_binary(raw.type):
        raw = raw.cast(pa.binary())
    try:
        return raw.cast(pa.string()), np.zeros(len(raw), bool)
    except pa.ArrowInvalid:
        pass
    items = raw.to_pylist()
    texts = [None if item is None else _decoded(item) for item in items]
    bad = np.array(
        [text is None and item is not None for text, item in zip(texts, items, strict=True)], bool
    )
    return pa.array(texts, pa.string()), bad


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def strings_of(values: list[object]) -> tuple[pa.Array, Mask]:
    """Python values as strings; what is neither text nor None, or no UTF-8, is null and marked."""
    try:
        return pa.array(values, pa.string()), np.zeros(len(values), bool)
    except (pa.ArrowException, UnicodeEncodeError, TypeError):
        pass
    texts = [value if _is_text(value) else None for value in values]
    bad = np.array(
        [text is None and value is not None for text, value in zip(texts, values, strict=True)],
        bool,
    )
    return pa.array(texts, pa.string()), bad


def _is_text(value: object) -> bool:
    """False for what is no text, and for half a surrogate pair, which no file can hold."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_pairs(rows: Rows) -> Rows:
    """Trim the URLs' ends, and find the rows without a URL or a caption. Captions stay as is."""
    table = rows.table
    if "url" in table.column_names:
        urls = pc.utf8_trim_whitespace(table["url"])
        table = table.set_column(table.column_names.index("url"), "url", urls)
        rows = replace(rows, table=table).with_fault("missing_url", is_blank(urls))
    if "caption" in table.column_names:
        rows = rows.with_fault("missing_caption", is_blank(table["caption"]))
    return rows


def is_blank(texts: pa.Array | pa.ChunkedArray) -> Mask:
    """(n,) whether each is null, empty, or spaces alone."""
    # Most captions begin with a letter, so the trimmed copy is made only where it may matter.
    if to_mask(pc.match_substring_regex(texts, r"^\S")).all() and not texts.null_count:
        return np.zeros(len(texts), bool)
    empty = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(texts)), 0)
    return to_mask(pc.fill_null(empty, True))


def first_rows(rows: Rows, count: int) -> Rows:
    """The first rows of some."""
    return rows.take(np.arange(len(rows.faults)) < count)
