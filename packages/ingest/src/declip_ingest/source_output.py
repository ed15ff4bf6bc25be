"""Long tables written piece by piece, and published whole or not at all."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from declip_shards import Store
from declip_shards.store import TEMPORARY_MARK, sync_folder

GROUP_ROWS = 10_000
"""Rows of a row group: what a reader of a range of rows must unpack at least."""


class TableWriter:
    """Appends tables of one schema to a parquet file in row groups of :data:`GROUP_ROWS`.

    The bytes depend on the rows alone, not on how they were cut into tables.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(
            path, schema, compression="zstd", write_page_checksum=True, store_schema=False
        )
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self.num_rows = 0

    def write(self, table: pa.Table) -> None:
        """Append rows; columns that the table lacks are null."""
        if not table.num_rows:
            return
        self._waiting.append(_fitted(table, self._schema))
        self._num_waiting += table.num_rows
        self.num_rows += table.num_rows
        if self._num_waiting >= GROUP_ROWS:
            whole = self._num_waiting // GROUP_ROWS * GROUP_ROWS
            rows = pa.concat_tables(self._waiting)
            for start in range(0, whole, GROUP_ROWS):
                self._write_group(rows.slice(start, GROUP_ROWS))
            # A slice would keep all of the rows alive.
            rest = rows.slice(whole).combine_chunks()
            self._waiting, self._num_waiting = [rest], rest.num_rows

    def _write_group(self, rows: pa.Table) -> None:
        # Pages end where a chunk does, so chunks must not show how the rows arrived.
        self._writer.write_table(rows.combine_chunks(), row_group_size=GROUP_ROWS)

    def close(self) -> None:
        """Write what is left and the footer."""
        if self._num_waiting:
            self._write_group(pa.concat_tables(self._waiting))
        self._waiting, self._num_waiting = [], 0
        self._writer.close()


def _fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.chunked_array([pa.nulls(table.num_rows, field.type)])
        for field in schema
    ]
    return pa.table(columns, schema=schema)


@contextlib.contextmanager
def publish_table(store: Store, path: str, schema: pa.Schema) -> Iterator[TableWriter]:
    """A writer whose table appears under its name when the block ends well, and else not.

    On a local disk the rows go to a temporary name beside it, which is flushed and renamed;
    elsewhere to a local file, which is put as one object.
    """
    with contextlib.ExitStack() as stack:
        if store.is_local:
            target = store.local_path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            unique = f"{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}"
            temporary = target.with_name(target.name + unique)
            stack.callback(temporary.unlink, missing_ok=True)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            temporary = Path(folder) / "table.parquet"
        writer = TableWriter(temporary, schema)
        try:
            yield writer
        finally:
            writer.close()
        if store.is_local:
            _sync(temporary)
            temporary.replace(target)
            sync_folder(target.parent)
        else:
            full = store.path(path)
            store.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            store.fs.put_file(str(temporary), full)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
