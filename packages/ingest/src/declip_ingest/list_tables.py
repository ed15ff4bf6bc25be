"""Lists whose columns have names: parquet, CSV and TSV with a header, JSON and JSON lines."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from declip_ingest.json_rows import Objects, read_objects
from declip_ingest.list_columns import (
    CANONICAL,
    KINDS,
    ColumnNames,
    ColumnPlan,
    HashCount,
    plain_type,
    plan_columns,
    tag_hashes,
    to_boxes,
)
from declip_ingest.list_files import ListFile, damaged, open_stream, reading
from declip_ingest.list_kinds import Found
from declip_ingest.list_rows import Mask, OnBytes, Rows, strings_of, to_text
from declip_ingest.parquet_files import open_parquet, read_batches
from declip_shards import DeclipError

BLOCK_BYTES = 4 << 20
"""Bytes of text parsed at a time; a row may not be longer."""
Raw = tuple[pa.Table, dict[str, Mask]]
"""Rows under the list's names, and for some columns where the value cannot be stored."""


class TableList:
    """Files of one list whose columns have names."""

    def __init__(
        self, location: str, files: Sequence[ListFile], found: Found, wanted: ColumnNames
    ) -> None:
        """Args:
        location: what the user named.
        files: all of one form.
        found: what the first one was taken for.
        wanted: the user's names of the columns.

        Raises:
            DeclipError: a column is missing, bears two names, or mixes kinds of values.
        """
        self.kind = found.kind
        self._form = found.form
        self._location, self._files = location, list(files)
        self._types: dict[str, pa.DataType] = {}
        self._num_rows = 0
        self._plan = self._make_plan(wanted)
        self.hash_count = HashCount()
        """Values of the hash column read so far."""
        self.schema = pa.schema(
            [
                (ours, KINDS[ours] if ours in CANONICAL else self._types[theirs])
                for ours, theirs in self._plan.sources.items()
            ]
        )

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self._files)

    def _make_plan(self, wanted: ColumnNames) -> ColumnPlan:
        if self._form in ("json", "jsonl"):
            return self._plan_json(wanted)
        types: dict[str, pa.DataType] = {}
        for file in self._files:
            schema = _schema_of(file, self._form)
            plan = plan_columns(file.location, schema.names, wanted)
            if self._form == "parquet":
                _check_text(file, schema, plan)
            for theirs in plan.sources.values():
                kind = plain_type(file.location, theirs, schema.field(theirs).type)
                types[theirs] = join_types(file.location, theirs, types.get(theirs), kind)
        self._types = {name: _stored(kind) for name, kind in types.items()}
        return plan_columns(self._location, list(types), wanted)

    def _plan_json(self, wanted: ColumnNames) -> ColumnPlan:
        """JSON has no schema, so one pass looks at every object's keys and kinds of values."""
        if self.kind == "yfcc15m_v2" and wanted == ColumnNames():
            self._types = dict.fromkeys(("caption", "filename", "url"), pa.string())
            return plan_columns(self._location, ["caption", "filename", "url"], wanted)
        types: dict[str, pa.DataType] = {}
        for file in self._files:
            for _, objects in read_objects(file, is_lines=self._form == "jsonl", on_bytes=_no_one):
                for name in dict.fromkeys(key for row in objects for key in row):
                    _look_at(file.location, name, objects, types)
        plan = plan_columns(self._location, list(types), wanted)
        self._types = {
            theirs: _stored(_joined(self._location, theirs, types[theirs], ours))
            for ours, theirs in plan.sources.items()
        }
        return plan

    def read(self, on_bytes: OnBytes, max_rows: int | None = None) -> Iterator[Rows]:
        """The rows of all files in turn; ``max_rows`` of them in all."""
        for file, left in self._shares(max_rows):
            start = 0
            with contextlib.closing(self._raw(file, on_bytes, left)) as batches:
                for table, bad in batches:
                    if left is not None and start + table.num_rows > left:
                        table = table.slice(0, left - start)
                        bad = {name: mask[: left - start] for name, mask in bad.items()}
                    self._num_rows += table.num_rows
                    if table.num_rows:
                        yield self._rows(file, start, table, bad)
                    start += table.num_rows
                    if start == left:
                        break
        self.hash_count.judge(self._location, self._plan.hash_name)

    def _shares(self, max_rows: int | None) -> Iterator[tuple[ListFile, int | None]]:
        """Each file with the rows that may still be read of it."""
        self._num_rows = 0
        for file in self._files:
            left = None if max_rows is None else max_rows - self._num_rows
            if left == 0:
                return
            yield file, left

    def _raw(
        self, file: ListFile, on_bytes: OnBytes, left: int | None
    ) -> Generator[Raw, None, None]:
        columns = list(self._plan.sources.values())
        if self._form == "parquet":
            here = _schema_of(file, "parquet").names
            known = [name for name in columns if name in here]
            for size, table in read_batches(file, known, max_rows=left):
                on_bytes(size)
                yield table, {}
        elif self._form in ("json", "jsonl"):
            for _, objects in read_objects(file, is_lines=self._form == "jsonl", on_bytes=on_bytes):
                yield self._json_table(objects)
        else:
            for table in read_text(file, self._form, on_bytes):
                yield table, {}

    def _json_table(self, objects: Objects) -> Raw:
        arrays, bad = {}, {}
        for ours, theirs in self._plan.sources.items():
            values = [row.get(theirs) for row in objects]
            if ours == "caption" and self.kind == "yfcc15m_v2":
                values = [first_of(value) for value in values]
            if ours in ("url", "caption"):
                # NaN stands for nothing: pandas writes it so.
                values = [None if value != value else value for value in values]
            arrays[theirs], bad[theirs] = _typed(values, self._types[theirs])
        return pa.table(arrays), bad

    def _rows(self, file: ListFile, start: int, raw: pa.Table, bad: dict[str, Mask]) -> Rows:
        count = raw.num_rows
        rows = Rows(
            name=file.name,
            numbers=np.arange(start, start + count, dtype=np.int64),
            table=raw,
            faults=np.zeros(count, np.uint8),
        )
        arrays = []
        for ours, theirs in self._plan.sources.items():
            kind = self.schema.field(ours).type
            if theirs not in raw.column_names:
                arrays.append(pa.nulls(count, kind))
                continue
            values = raw[theirs].combine_chunks()
            array, mask = self._convert(file, ours, theirs, values, kind)
            if theirs in bad:
                mask = mask | bad[theirs]
            reason = {"url": "bad_url", "caption": "bad_caption"}.get(ours, "bad_row")
            rows = rows.with_fault(reason, mask)
            arrays.append(array)
        return Rows(
            name=rows.name,
            numbers=rows.numbers,
            table=pa.table(arrays, schema=self.schema),
            faults=rows.faults,
        )

    def _convert(
        self, file: ListFile, ours: str, theirs: str, values: pa.Array, kind: pa.DataType
    ) -> tuple[pa.Array, Mask]:
        good = np.zeros(len(values), bool)
        if ours == "expected_hash":
            tagged = tag_hashes(values, theirs)
            self.hash_count.add(tagged, values)
            return tagged, good
        if ours == "boxes":
            return to_boxes(values, file.location, theirs), good
        if pa.types.is_string(kind):
            return to_text(values if _is_textual(values.type) else values.cast(pa.string()))
        try:
            values.validate(full=True)
            return values.cast(kind), good
        except pa.ArrowException as error:
            raise damaged(file.location, f"column {theirs!r}: {error}") from error


def first_of(value: Any) -> Any:
    """A list of captions counts by its first (YFCC15M V2, method_facts 9.3)."""
    if isinstance(value, list):
        return value[0] if value else None
    return value


def _no_one(count: int) -> None:
    """Looking at the kinds of values is no progress."""


def _is_textual(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        return _is_textual(kind.value_type)
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
    )


def _check_text(file: ListFile, schema: pa.Schema, plan: ColumnPlan) -> None:
    for ours in ("url", "caption"):
        theirs = plan.sources[ours]
        kind = schema.field(theirs).type
        if not _is_textual(kind) and not pa.types.is_null(kind):
            raise DeclipError(
                f"column {theirs!r} of list {file.location!r} must hold text, but holds {kind}; "
                f"name another with {ours}_column."
            )


def _schema_of(file: ListFile, form: str) -> pa.Schema:
    if form == "parquet":
        with open_parquet(file) as parquet:
            return parquet.schema_arrow
    with open_stream(file) as stream, reading(file.location):
        return _open_text(file, form, stream, None).schema


def _open_text(file: ListFile, form: str, stream: Any, names: Sequence[str] | None) -> Any:
    parse = pa.csv.ParseOptions(
        delimiter="," if form == "csv" else "\t", newlines_in_values=True, double_quote=True
    )
    # Every column as it is written: a caption '1984' or an id '007' stays what it is.
    types = {name: pa.binary() for name in names or ()}
    convert = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
    read = pa.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
    try:
        opened = pa.csv.open_csv(
            stream, read_options=read, parse_options=parse, convert_options=convert
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise _text_damage(file, error) from error
    if names is None:
        fields = [pa.field(name, pa.string()) for name in opened.schema.names]
        opened.close()
        return _Header(pa.schema(fields))
    return opened


class _Header:
    """The columns of a text file, all of them text."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema


def read_text(file: ListFile, form: str, on_bytes: OnBytes) -> Iterator[pa.Table]:
    """A CSV or TSV with a header, in blocks; every column as bytes.

    Raises:
        DeclipError: a row of another number of fields, or longer than :data:`BLOCK_BYTES`.
    """
    names = _schema_of(file, form).names
    with open_stream(file, on_bytes) as stream:
        with reading(file.location):
            opened = _open_text(file, form, stream, names)
        while True:
            try:
                with reading(file.location):
                    batch = opened.read_next_batch()
            except StopIteration:
                return
            except pa.ArrowInvalid as error:
                raise _text_damage(file, error) from error
            yield pa.Table.from_batches([batch])


def _text_damage(file: ListFile, error: Exception) -> DeclipError:
    text = str(error)
    if "straddling" in text:
        return DeclipError(
            f"list {file.location!r} has a row longer than {BLOCK_BYTES >> 20} MiB, perhaps a "
            "quotation mark that is never closed; mend it, or write the list as parquet."
        )
    return DeclipError(
        f"list {file.location!r} does not have the same columns throughout "
        f"({text.strip().splitlines()[0][:200].rstrip('.')}); mend that row, or write the list as "
        "parquet."
    )


def join_types(
    location: str, column: str, old: pa.DataType | None, new: pa.DataType
) -> pa.DataType:
    """A type that holds both; null fits everything.

    Raises:
        DeclipError: there is none, naming column and list.
    """
    if old is None or pa.types.is_null(old) or old == new:
        return new
    if pa.types.is_null(new):
        return old
    try:
        schemas = [pa.schema([(column, kind)]) for kind in (old, new)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DeclipError(
            f"column {column!r} of list {location!r} holds {new}, but {old} before; make it one "
            "kind, or list the columns to carry in extra_columns."
        ) from error


def _stored(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_null(kind) else kind


_MIXED = pa.month_day_nano_interval()
"""Stands for kinds of values that do not go together; JSON has no such kind itself."""


def _look_at(location: str, name: str, objects: Objects, types: dict[str, pa.DataType]) -> None:
    values = [row.get(name) for row in objects]
    old = types.get(name)
    if old == _MIXED:
        return
    if any(isinstance(value, str) for value in values):
        is_text = all(value is None or isinstance(value, str) for value in values)
        new = pa.string() if is_text else _MIXED
    else:
        try:
            new = pa.array(values).type
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):
            new = _MIXED
    try:
        types[name] = new if new == _MIXED else join_types(location, name, old, new)
    except DeclipError:
        types[name] = _MIXED


def _joined(location: str, column: str, kind: pa.DataType, ours: str) -> pa.DataType:
    """The type of a JSON column; the URL and the caption are judged row by row."""
    if ours in ("url", "caption"):
        return pa.string()
    if kind == _MIXED:
        raise DeclipError(
            f"column {column!r} of list {location!r} mixes kinds of values; make them one kind, or "
            "list the columns to carry in extra_columns."
        )
    return kind


def _typed(values: list[Any], kind: pa.DataType) -> tuple[pa.Array, Mask]:
    if pa.types.is_string(kind):
        return strings_of(values)
    try:
        return pa.array(values, kind), np.zeros(len(values), bool)
    except (pa.ArrowException, UnicodeEncodeError, TypeError, OverflowError):
        pass
    bad = np.zeros(len(values), bool)
    kept: list[Any] = []
    for row, value in enumerate(values):
        try:
            pa.array([value], kind)
            kept.append(value)
        except (pa.ArrowException, UnicodeEncodeError, TypeError, OverflowError):
            kept.append(None)
            bad[row] = True
    return pa.array(kept, kind), bad
