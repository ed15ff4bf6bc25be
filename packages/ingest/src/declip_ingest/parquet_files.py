"""Parquet from strangers: checked before Arrow sees the schema, read a row group at a time."""

import base64
import binascii
import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from declip_ingest.list_files import ListFile, open_raw, reading
from declip_shards import DeclipError

BATCH_BYTES = 32 << 20
"""Bytes of rows read at a time, about."""
MAX_BATCH_ROWS = 65_536
_SCHEMA_KEY, _EXTENSION_KEY = b"ARROW:schema", b"ARROW:extension:name"
_CANONICAL = re.compile(rb"arrow\.[a-z0-9_]+\x00")
_NAMES = re.compile(rb"(?:ray|pandas|extension|polars|geoarrow)[\w.<>:-]{2,60}")
_MAGIC = b"PAR1"


def check_footer(f: Any, location: str) -> None:
    """Refuse a file whose schema names Arrow extension types of anybody but Arrow itself.

    Types that a library registered (Ray's tensors and Python objects among them) are built by that
    library's code from bytes in the file as soon as Arrow opens it, in some versions by unpickling
    them. So the footer is looked at before.

    Args:
        f: the file, open and seekable; left at its start.
        location: for the sentence.

    Raises:
        DeclipError: no parquet file, or one with such a type.
    """
    size = f.seek(0, 2)
    if size < 12:
        raise _broken(location, "it is too short")
    f.seek(size - 8)
    tail = f.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length > size - 12:
        raise _broken(location, "it does not end as a parquet file does")
    f.seek(size - 8 - length)
    footer = f.read(length)
    f.seek(0)
    schema = _stored_schema(footer, location)
    num_extensions = schema.count(_EXTENSION_KEY)
    if num_extensions and num_extensions != len(_CANONICAL.findall(schema)):
        named = sorted({m.decode() for m in _NAMES.findall(schema)} - {_EXTENSION_KEY.decode()})
        raise DeclipError(
            f"list {location!r} has columns of extension types "
            f"({', '.join(named) or 'unknown'}), which may run code when they are read; write its "
            "URLs and captions as plain columns."
        )


def _stored_schema(footer: bytes, location: str) -> bytes:
    """The Arrow schema that the writer left in the footer's metadata; empty where there is none."""
    at = footer.find(_SCHEMA_KEY)
    if at < 0:
        return b""
    # Thrift's compact form: the value follows as field 2 of the same pair, text with its length.
    place = at + len(_SCHEMA_KEY)
    length, shift = 0, 0
    try:
        if footer[place] != 0x18:
            raise ValueError
        while True:
            place += 1
            length |= (footer[place] & 0x7F) << shift
            shift += 7
            if footer[place] < 0x80:
                break
        return base64.b64decode(footer[place + 1 : place + 1 + length], validate=True)
    except (IndexError, ValueError, binascii.Error) as error:
        raise _broken(location, "its stored schema cannot be read") from error


def _broken(location: str, why: object, group: int | None = None) -> DeclipError:
    where = "" if group is None else f" in row group {group}"
    first_line = str(why).strip().split("\n")[0].rstrip(".")
    return DeclipError(
        f"list {location!r} is no whole parquet file ({first_line}){where}; "
        "fetch or write it again."
    )


@contextlib.contextmanager
def open_parquet(file: ListFile) -> Iterator["pq.ParquetFile"]:
    """Open a checked file; its row groups are read piece by piece.

    Raises:
        DeclipError: damaged, or with types that may run code.
    """
    with open_raw(file, seekable=True) as f:
        try:
            check_footer(f, file.location)
        except ValueError as error:  # what fsspec raises where a server ignores Range headers
            raise DeclipError(
                f"the server of {file.location!r} cannot send parts of a file, which parquet "
                "needs; download the list first and give its path."
            ) from error
        try:
            # Pages without a checksum are read as they are; those with one must match.
            parquet = pq.ParquetFile(
                f, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20
            )
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise _broken(file.location, error) from error
        with parquet:
            yield parquet


def read_batches(
    file: ListFile, columns: list[str], *, max_rows: int | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """(bytes read, rows) in order, about :data:`BATCH_BYTES` at a time.

    Raises:
        DeclipError: a damaged row group, by number.
    """
    left = max_rows
    with open_parquet(file) as parquet:
        for group in range(parquet.metadata.num_row_groups):
            about = parquet.metadata.row_group(group)
            rows = max(about.num_rows, 1)
            each = max(about.total_byte_size // rows, 1)
            size = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // each))
            stored = sum(about.column(i).total_compressed_size for i in range(about.num_columns))
            for batch in _group_batches(parquet, group, columns, size, file.location):
                if left is not None:
                    batch = batch.slice(0, left)
                    left -= batch.num_rows
                yield stored * batch.num_rows // rows, batch
                if left == 0:
                    return


def _group_batches(
    parquet: "pq.ParquetFile", group: int, columns: list[str], size: int, location: str
) -> Iterator[pa.Table]:
    batches = parquet.iter_batches(batch_size=size, row_groups=[group], columns=columns)
    while True:
        try:
            with reading(location):
                batch = next(batches, None)
            if batch is None:
                return
            batch.validate()
        except (pa.ArrowException, OSError) as error:
            raise _broken(location, error, group) from error
        except DeclipError as error:
            cause = error.__cause__
            raise _broken(location, cause or error, group) from error
        yield pa.Table.from_batches([batch]).select(columns)
