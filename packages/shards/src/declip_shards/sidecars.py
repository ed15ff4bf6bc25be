"""Tables beside the shards: parquet, the same bytes for the same rows, checksummed pages."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from declip_shards.errors import DeclipError
from declip_shards.store import Store


def pack_table(table: pa.Table) -> bytes:
    """``table`` as parquet. Page checksums let a reader notice a flipped bit."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, store_schema=False)
    return sink.getvalue()


def write_table(store: Store, path: str, table: pa.Table) -> None:
    """Write ``table`` atomically."""
    store.write_bytes(path, pack_table(table))


def read_table(store: Store, path: str, columns: list[str] | None = None) -> pa.Table:
    """Read a table written by :func:`write_table` (or any parquet), verifying checksums.

    Raises:
        DeclipError: the file is missing, damaged, or lacks one of ``columns``.
    """
    try:
        with store.open(path) as f:
            parquet = pq.ParquetFile(f, page_checksum_verification=True)
            missing = sorted(set(columns or []) - set(parquet.schema_arrow.names))
            if missing:
                raise DeclipError(
                    f"{path!r} has no column {missing[0]!r}; it has: "
                    f"{', '.join(parquet.schema_arrow.names)}."
                )
            return parquet.read(columns=columns)
    except FileNotFoundError as error:
        raise DeclipError(f"{path!r} is missing; rerun the stage that writes it.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DeclipError(
            f"{path!r} is damaged ({error}); delete it and rerun the stage that writes it."
        ) from error


def read_rows(store: Store, path: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """:func:`read_table` as a list of dictionaries."""
    rows: list[dict[str, Any]] = read_table(store, path, columns).to_pylist()
    return rows


def num_rows(store: Store, path: str) -> int:
    """Rows of a parquet file, from its footer."""
    with store.open(path) as f:
        return int(pq.ParquetFile(f).metadata.num_rows)
