"""Tables of URLs and captions: read, checked, and cut into shards.

Ingest reads ``source/pairs.parquet`` and small tables made by hand through this. parquet is read
piece by piece; csv, tsv, json and jsonl are held in memory, so lists of millions of rows go through
:mod:`declip_ingest.sources` first, which reads any of them in bounded memory.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from declip_ingest.parquet_files import check_footer
from declip_shards import DeclipError, layout
from declip_shards.errors import did_you_mean

TableFormat = Literal["auto", "parquet", "csv", "tsv", "json", "jsonl"]
ALL_COLUMNS = "*"
"""In ``extra_columns``: carry every column that is neither URL nor caption."""
RESERVED_COLUMNS = (
    "url",
    "caption",
    "key",
    "status",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
    "exif",
    "md5",
    "sha256",
    "sha512",
)
"""Columns that img2dataset's layout gives a meaning of its own."""
_EXTENSIONS = {
    "parquet": "parquet",
    "csv": "csv",
    "tsv": "tsv",
    "json": "json",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
}
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, kw_only=True)
class PairTable:
    """A table that was opened and checked."""

    num_rows: int
    schema: pa.Schema
    """``url`` and ``caption`` (strings), then the carried columns in the table's order."""
    read: Callable[[int, int], pa.Table]
    """``read(start, stop)``: these rows, with columns as in ``schema``."""


def plan_shards(num_rows: int, shard_size: int) -> list[str]:
    """Names of the shards that ``num_rows`` rows fill: row r goes to shard r // shard_size."""
    if shard_size < 1:
        raise DeclipError(f"shard_size is {shard_size} but must be at least 1; try 1000.")
    return [layout.shard_name(i) for i in range(-(-num_rows // shard_size))]


def table_digest(location: str) -> str:
    """sha256 of the table's file, hex: how a run names the list it was planned for."""
    digest = hashlib.sha256()
    fs, path = fsspec.core.url_to_fs(location)
    try:
        with fs.open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise _unreadable(location, error) from error
    return digest.hexdigest()


def open_pairs(
    location: str,
    *,
    table_format: TableFormat = "auto",
    url_column: str = "url",
    caption_column: str = "caption",
    extra_columns: Sequence[str] = (ALL_COLUMNS,),
) -> PairTable:
    """Open a table of URLs and captions and check what can be checked before a fetch.

    Args:
        location: path or fsspec URL of a .parquet, .csv, .tsv, .json (a list of objects) or .jsonl
            file; the text formats also with .gz.
        table_format: what the file is, where its name does not say.
        url_column: becomes ``url``.
        caption_column: becomes ``caption``.
        extra_columns: carried along under their names; ``("*",)`` for all the others.

    Raises:
        DeclipError: missing, empty, unreadable, without one of the columns, or with a URL or
            caption that is not text.
    """
    kind = _format_of(location, table_format)
    source: _ParquetSource | _TextSource
    try:
        source = _ParquetSource(location) if kind == "parquet" else _TextSource(location, kind)
    except OSError as error:
        raise _unreadable(location, error) from error
    if source.num_rows == 0:
        raise DeclipError(f"table {location!r} has no rows; give it at least one.")
    carried = _select(location, source.schema, url_column, caption_column, extra_columns)
    source.check_text(url_column)
    source.check_text(caption_column)

    columns = [url_column, caption_column, *carried]
    names = ["url", "caption", *carried]
    kinds = [pa.string(), pa.string(), *(source.schema.field(c).type for c in carried)]
    schema = pa.schema(list(zip(names, kinds)))

    def read(start: int, stop: int) -> pa.Table:
        rows = source.read(start, stop, columns)
        return rows.rename_columns(names).cast(schema)

    return PairTable(num_rows=source.num_rows, schema=schema, read=read)


def _unreadable(location: str, error: OSError) -> DeclipError:
    if isinstance(error, FileNotFoundError):
        return DeclipError(f"table {location!r} does not exist; check its path.")
    if isinstance(error, IsADirectoryError):
        return DeclipError(f"table {location!r} is a folder; give the file itself.")
    reason = error.strerror or error
    return DeclipError(f"table {location!r} cannot be read ({reason}); mend or write it again.")


def _damaged(location: str, what: str, error: Exception) -> DeclipError:
    first_line = str(error).strip().split("\n")[0].rstrip(".")
    return DeclipError(
        f"table {location!r} is no whole {what} file ({first_line}); write it again, or name its "
        "format with table_format."
    )


def _format_of(location: str, table_format: str) -> str:
    if table_format not in get_args(TableFormat):
        raise DeclipError(
            f"table_format is {table_format!r}.{did_you_mean(table_format, get_args(TableFormat))}"
        )
    if table_format != "auto":
        return table_format
    extension = location.lower().removesuffix(".gz").rpartition(".")[2]
    if extension not in _EXTENSIONS:
        raise DeclipError(
            f"table {location!r} does not say by its ending what it is; name the format with "
            f"table_format: {', '.join(get_args(TableFormat)[1:])}."
        )
    return _EXTENSIONS[extension]


def _select(
    location: str, schema: pa.Schema, url: str, caption: str, extra: Sequence[str]
) -> list[str]:
    """Names of the carried columns, after all names were checked."""
    for option, column in (("url_column", url), ("caption_column", caption)):
        if column not in schema.names:
            raise DeclipError(
                f"table {location!r} has no column {column!r} (set by {option})."
                f"{did_you_mean(column, schema.names)}"
            )
    if url == caption:
        raise DeclipError(
            f"url_column and caption_column are both {url!r}; name two different columns."
        )
    wanted = list(extra)
    if ALL_COLUMNS in extra:
        wanted = [c for c in schema.names if c not in (url, caption)]
    check_repeats(f"table {location!r}", schema.names, (url, caption, *wanted))
    for column in wanted:
        if column not in schema.names:
            raise DeclipError(
                f"table {location!r} has no column {column!r} (set by extra_columns)."
                f"{did_you_mean(column, schema.names)}"
            )
        if column in RESERVED_COLUMNS:
            raise DeclipError(
                f"table {location!r} has a column {column!r}, a name that the shards use "
                "themselves; rename it, or list the columns to carry in extra_columns."
            )
        if _holds_bytes(schema.field(column).type):
            raise DeclipError(
                f"column {column!r} of table {location!r} holds {schema.field(column).type}, which "
                "a sample's JSON cannot; leave it out of extra_columns."
            )
    return wanted


def check_repeats(place: str, names: Sequence[str], used: Iterable[str]) -> None:
    """Refuse a file in which a column that is read bears the name of another.

    Args:
        place: what kind of file it is, and where, for the message.
        names: of all columns of the file.
        used: of the columns that are read; the others may bear any name.

    Raises:
        DeclipError: naming the first such column.
    """
    for column in used:
        if (count := names.count(column)) > 1:
            raise DeclipError(
                f"{place} has {count} columns named {column!r}, and nothing says which is meant; "
                "rename all but one of them, or leave that name out of extra_columns if it is a "
                "further column."
            )


def _holds_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _not_text(location: str, column: str, row: int, value: object) -> DeclipError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return DeclipError(
        f"column {column!r} of table {location!r} must hold text, but row {row} (the first is 0) "
        f"holds {shown}; turn it into text or drop the row."
    )


class _ParquetSource:
    """Reads only the row groups that a shard lies in."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._fs, self._path = fsspec.core.url_to_fs(location)
        self._check_not_empty()
        with self._fs.open(self._path, "rb") as f:
            check_footer(f, location)
        with self._open() as file:
            self.schema = file.schema_arrow
            metadata = file.metadata
            self.num_rows = int(metadata.num_rows)
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))] + [self.num_rows]

    def _check_not_empty(self) -> None:
        if self._fs.isdir(self._path):
            raise IsADirectoryError(self.location)
        if self._fs.size(self._path) == 0:
            raise DeclipError(f"table {self.location!r} is empty (0 bytes); write it again.")

    def _open(self) -> "pq.ParquetFile":
        try:
            # Pages without a checksum are read as they are; those with one must match.
            return pq.ParquetFile(self._path, filesystem=self._fs, page_checksum_verification=True)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise _damaged(self.location, "parquet", error) from error

    def check_text(self, column: str) -> None:
        kind = self.schema.field(column).type
        if _is_text(kind):
            return
        with self._open() as file:
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                values = batch.column(0).to_pylist()
                for row, value in enumerate(values):
                    if value is not None:
                        raise _not_text(self.location, column, row, value)
                break
        raise _not_text(self.location, column, 0, None)

    def read(self, start: int, stop: int, columns: list[str]) -> pa.Table:
        groups = [
            i
            for i in range(len(self._starts) - 1)
            if self._starts[i] < stop and self._starts[i + 1] > start
        ]
        parts = []
        with self._open() as file:
            for group in groups:
                first = self._starts[group]
                try:
                    rows = file.read_row_group(group, columns=columns).select(columns)
                    rows = rows.slice(max(0, start - first), stop - max(start, first))
                    rows.validate(full=True)
                except (pa.ArrowInvalid, OSError) as error:
                    what = f"parquet (row group {group})"
                    raise _damaged(self.location, what, error) from error
                parts.append(rows)
        return pa.concat_tables(parts)


class _TextSource:
    """A csv, tsv, json or jsonl file, read whole."""

    def __init__(self, location: str, kind: str) -> None:
        self.location = location
        fs, path = fsspec.core.url_to_fs(location)
        if fs.isdir(path):
            raise IsADirectoryError(location)
        data: bytes = fs.cat_file(path)
        if data.startswith(_GZIP_MAGIC):
            data = _gunzip(location, data)
        if not data.strip():
            raise DeclipError(f"table {location!r} is empty (0 bytes); write it again.")
        if kind in ("csv", "tsv"):
            self._table = _read_csv(location, kind, data)
        else:
            self._table = _read_json(location, kind, data)
        self.schema = self._table.schema
        self.num_rows = int(self._table.num_rows)

    def check_text(self, column: str) -> None:
        field = self.schema.field(column)
        if not _is_text(field.type):
            values = self._table[column].to_pylist()
            row = next((i for i, v in enumerate(values) if v is not None), 0)
            raise _not_text(self.location, column, row, values[row])

    def read(self, start: int, stop: int, columns: list[str]) -> pa.Table:
        return self._table.slice(start, stop - start).select(columns)


def _gunzip(location: str, data: bytes) -> bytes:
    try:
        unpacker = zlib.decompressobj(wbits=31)
        text = unpacker.decompress(data)
    except zlib.error as error:
        raise _damaged(location, "gzip", error) from error
    if not unpacker.eof:
        raise _damaged(location, "gzip", EOFError("it ends early"))
    return text


def _read_csv(location: str, kind: str, data: bytes) -> pa.Table:
    """Every column as text: a caption '1984' or an id '007' stays what it is."""
    parse = pa.csv.ParseOptions(
        delimiter="," if kind == "csv" else "\t", newlines_in_values=True, double_quote=True
    )
    try:
        names = pa.csv.open_csv(io.BytesIO(data), parse_options=parse).schema.names
        convert = pa.csv.ConvertOptions(
            column_types={name: pa.string() for name in names}, strings_can_be_null=False
        )
        return pa.csv.read_csv(io.BytesIO(data), parse_options=parse, convert_options=convert)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise _damaged(location, kind, error) from error


def _read_json(location: str, kind: str, data: bytes) -> pa.Table:
    """A list of objects, or an object a line; a key that a row lacks is null there."""
    try:
        text = data.decode("utf-8-sig")
        if kind == "jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except ValueError as error:
        raise _damaged(location, kind, error) from error
    if not isinstance(rows, list):
        raise DeclipError(
            f"table {location!r} holds {type(rows).__name__} instead of a list of objects; write "
            '[{"url": ..., "caption": ...}, ...] or one object a line as .jsonl.'
        )
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DeclipError(
                f"table {location!r}: row {index} (the first is 0) is {row!r:.60}, not an object; "
                "mend or drop it."
            )
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _json_column(location, name, rows) for name in names})


def _json_column(location: str, name: str, rows: list[dict[str, Any]]) -> pa.Array:
    """One column; where most rows hold text, the one that does not is named."""
    values = [row.get(name) for row in rows]
    if any(isinstance(v, str) for v in values):
        for index, value in enumerate(values):
            if value is not None and not isinstance(value, str):
                raise _not_text(location, name, index, value)
            if isinstance(value, str) and not _is_unicode(value):
                raise _not_text(location, name, index, value)
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DeclipError(
            f"column {name!r} of table {location!r} mixes kinds of values ({error}); make them one "
            "kind, or drop the column."
        ) from error


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
