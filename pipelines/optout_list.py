"""Read a list of what is to be removed: URLs, keys or hashes, as people have them."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean
from declip_shards.optout import KINDS, Kind

Entry = tuple[Kind, str]
_FORMS: Mapping[Kind, re.Pattern[str]] = {
    "url": re.compile(r"\S(?:.*\S)?", re.DOTALL),
    "key": re.compile(r"\d{6,20}"),
    "sha256": re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})"),
    "md5": re.compile(r"(?:md5:)?([0-9a-fA-F]{32})"),
}
_IS_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
_SHOWN = 60


def read_list(location: str, *, kind: str = "auto", column: str | None = None) -> list[Entry]:
    """The entries of a list, each once, sorted.

    Text has one entry a line; empty lines and those that begin with ``#`` say nothing. CSV, TSV
    (known by a header that names a column), JSON lines and parquet have the columns ``url``,
    ``key``, ``sha256`` or ``md5``, all of which count, or the one that ``column`` names.

    Args:
        location: a path, an fsspec URL, or ``-`` for standard input.
        kind: what the entries are; ``auto`` tells each by its form.
        column: column of a table, where it has another name than its kind.

    Raises:
        DeclipError: the list cannot be read, is empty, or an entry is none of the kind.
    """
    if kind != "auto" and kind not in KINDS:
        raise DeclipError(f"--kind is {kind!r}.{did_you_mean(kind, ('auto', *KINDS))}")
    data = _read(location)
    rows = _parquet_rows(data) if data[:4] == b"PAR1" else _text_rows(data, location, column)
    entries = set()
    column = None if column is None else column.strip()
    for number, row in enumerate(rows, 1):
        for given, value in _wanted(row, kind, column, location):
            entries.add(_entry(given, value, number, location))
    if not entries:
        raise DeclipError(f"the list {location!r} has no entry; nothing is removed.")
    return sorted(entries)


def _read(location: str) -> bytes:
    if location == "-":
        return sys.stdin.buffer.read()
    try:
        with fsspec.open(location, "rb", compression="infer") as f:
            data: bytes = f.read()
            return data
    except (OSError, ValueError, ImportError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"fails: {error}"
        raise DeclipError(
            f"the list {location!r} {reason}; give its path or URL, or - for standard input."
        ) from error


def _parquet_rows(data: bytes) -> Iterator[dict[str, Any]]:
    try:
        table = pq.read_table(pa.BufferReader(data))
        table = table.rename_columns([name.strip() for name in table.column_names])
    except pa.ArrowInvalid as error:
        raise DeclipError(f"the list is no readable parquet file: {error}") from error
    for batch in table.to_batches(10_000):
        yield from batch.to_pylist()


def _text_rows(data: bytes, location: str, column: str | None) -> Iterator[dict[str, Any]]:
    """Rows of JSON lines or of a table with a header; else one row ``{"": line}`` a line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DeclipError(f"the list {location!r} is not UTF-8 text ({error}).") from error
    # Not splitlines, which breaks a URL or a JSON text at U+2028 and other rare characters.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
    if lines and lines[0].lstrip().startswith("{"):
        for number, line in enumerate(lines, 1):
            yield _json_row(line, number, location)
        return
    names = {column.strip()} if column is not None else set(KINDS)
    separator = "\t" if lines and "\t" in lines[0] else ","
    header = [name.strip() for name in next(csv.reader(lines[:1], delimiter=separator), [])]
    if names & set(header):
        body = io.StringIO("\n".join(lines[1:]))
        yield from csv.DictReader(body, fieldnames=header, delimiter=separator)
    elif column is not None:
        raise DeclipError(
            f"the list {location!r} has no header that names --column {column!r}; its first line "
            f"is {lines[0][:_SHOWN] if lines else ''!r}."
        )
    else:
        yield from ({"": line.strip()} for line in lines)


def _json_row(line: str, number: int, location: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DeclipError(f"row {number} of {location!r} is no JSON ({error}).") from error
    if not isinstance(row, dict):
        raise DeclipError(f"row {number} of {location!r} is no JSON object; one a line is due.")
    return {name.strip(): value for name, value in row.items()}


def _wanted(
    row: Mapping[str, Any], kind: str, column: str | None, location: str
) -> Iterator[tuple[str, str]]:
    """(kind or ``auto``, value) of the entries that a row names."""
    if row.keys() == {""}:
        yield kind, str(row[""])
        return
    names = [column] if column else [name for name in KINDS if name in row]
    if kind != "auto" and not column:
        names = [kind]
    missing = next((name for name in names if name not in row), None)
    if missing is not None or not names:
        wanted = missing or "url"
        raise DeclipError(
            f"the list {location!r} has no column {wanted!r}; name yours with --column."
            f"{did_you_mean(wanted, [name for name in row if name])}"
        )
    for name in names:
        value = row[name]
        if value is not None and str(value).strip():
            yield (name if kind == "auto" and not column else kind), str(value).strip()


def _entry(kind: str, value: str, number: int, location: str) -> Entry:
    known = _guess(value) if kind == "auto" else cast(Kind, kind)
    match = _FORMS[known].fullmatch(value) if known else None
    if match is None or known is None:
        what = "no URL, key, sha256 or md5" if kind == "auto" else f"no {kind}"
        raise DeclipError(
            f"row {number} of {location!r} is {value[:_SHOWN]!r}, which is {what}; mend it, or say "
            "what the entries are with --kind url, key, sha256 or md5."
        )
    return known, match[1].lower() if match.groups() else value


def _guess(value: str) -> Kind | None:
    if _IS_URL.fullmatch(value):
        return "url"
    others: tuple[Kind, ...] = ("sha256", "md5", "key")
    return next((kind for kind in others if _FORMS[kind].fullmatch(value)), None)
