"""The ledger: what was attempted for every row, and what came of it.

The shard's parquet says what a row is; the ledger says how hard it was tried: attempts, time, host
and answer. It holds times, so it is never hashed. Refetch and the doctor read it.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

from declip_shards import DeclipError, Store, layout, sidecars

FOLDER = "ledger/ingest"
"""A parquet a shard lies here, sorted by key."""
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("host", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("http_status", pa.int32()),
        ("attempts", pa.int32()),
        ("milliseconds", pa.int64()),
        ("num_bytes", pa.int64()),
        ("attempted_at", pa.string()),
    ]
)
"""Columns of a ledger file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerRow:
    """What is known of one row's attempts."""

    key: str
    """The sample's key."""
    url: str | None
    """As the list has it; None where the list has none, or somebody asked for its removal."""
    host: str = ""
    """Host (and port, where the URL names one) of the URL, lower case."""
    status: str = "success"
    """img2dataset's: success, failed_to_download or failed_to_resize."""
    reason: str = ""
    """A name of :mod:`declip_ingest.failures`; empty for success."""
    detail: str = ""
    """A short stable word more, or empty."""
    http_status: int | None = None
    """Of the last answer; None where none came."""
    attempts: int = 0
    """Requests made in all runs together; 0 for a row that was never asked for."""
    milliseconds: int = 0
    """What the last run spent on it, the decoder included."""
    num_bytes: int | None = None
    """Size of the last body; None where none came."""
    attempted_at: str = ""
    """When the last run ended with it: UTC, ISO 8601."""


def utc_now() -> str:
    """This moment as the ledger writes it: ``2026-01-31T12:00:00Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _without_names(row: LedgerRow) -> LedgerRow:
    """Of a row that somebody asked to remove, nothing is kept that says where it was."""
    return dataclasses.replace(row, url=None, host="") if row.reason == "opt_out_list" else row


def ledger_table(rows: Iterable[LedgerRow]) -> pa.Table:
    """Rows in order of their keys, with :data:`SCHEMA`'s columns; removed ones without URL."""
    ordered = [_without_names(row) for row in sorted(rows, key=lambda row: row.key)]
    return pa.table(
        {name: [getattr(row, name) for row in ordered] for name in SCHEMA.names}, schema=SCHEMA
    )


def write_ledger(store: Store, shard: str, rows: Iterable[LedgerRow]) -> str:
    """Write a shard's ledger, atomically.

    Returns:
        Its path; it belongs among a task's ``volatile_files``.
    """
    path = layout.ledger_path(shard)
    sidecars.write_table(store, path, ledger_table(rows))
    return path


def list_ledgers(store: Store) -> list[str]:
    """Shards that have a ledger."""
    return [name.removesuffix(".parquet") for name in store.list(FOLDER, ".parquet")]


def read_ledger(
    store: Store, shard: str | None = None, *, columns: Sequence[str] | None = None
) -> pa.Table:
    """One shard's ledger, or all of them in one table, in order of the keys.

    Raises:
        DeclipError: there is none, or one is damaged.
    """
    if shard is not None:
        wanted = list(columns) if columns is not None else SCHEMA.names
        return sidecars.read_table(store, layout.ledger_path(shard), wanted)
    tables = [table for _, table in iter_ledgers(store, columns=columns)]
    if not tables:
        raise no_ledger(store)
    return pa.concat_tables(tables)


def iter_ledgers(
    store: Store, *, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, pa.Table]]:
    """(shard, ledger) one after the other: never more than one shard's rows in memory."""
    for shard in list_ledgers(store):
        yield shard, read_ledger(store, shard, columns=columns)


def read_ledger_rows(store: Store, shard: str) -> dict[str, LedgerRow]:
    """One shard's ledger by key.

    Raises:
        DeclipError: there is none, or it is damaged.
    """
    return {row["key"]: LedgerRow(**row) for row in read_ledger(store, shard).to_pylist()}


def no_ledger(store: Store) -> DeclipError:
    """The sentence for a dataset without a ledger."""
    return DeclipError(
        f"{store.url!r} has no ledger ({FOLDER}/ is empty or missing): no shard has ended there "
        "yet, or a version that kept none has made it; run declip run first, or name the right "
        "folder with --out."
    )


def merge_row(old: LedgerRow | None, new: LedgerRow) -> LedgerRow:
    """The new attempt's row, with the attempts of both added up.

    Raises:
        ValueError: rows of two keys.
    """
    if old is None:
        return new
    if old.key != new.key:
        raise ValueError(f"rows of two keys, {old.key!r} and {new.key!r}, are not one row's")
    return dataclasses.replace(new, attempts=old.attempts + new.attempts)


def merge_rows(old: Mapping[str, LedgerRow], new: Iterable[LedgerRow]) -> list[LedgerRow]:
    """A shard's ledger after some of its rows were tried again; the others stay as they are."""
    merged = dict(old)
    for row in new:
        merged[row.key] = merge_row(merged.get(row.key), row)
    return sorted(merged.values(), key=lambda row: row.key)
