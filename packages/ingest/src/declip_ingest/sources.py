"""Reading lists as a stage: known lists of the field, or any with named columns, to one table."""

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from declip_ingest.list_columns import CANONICAL, KINDS, ColumnNames
from declip_ingest.list_files import find_files, location_digest
from declip_ingest.list_kinds import ListKind, agree, compare_counts, recognize
from declip_ingest.list_lines import look_up_hashes, read_hashes
from declip_ingest.list_progress import ListProgress
from declip_ingest.list_readers import ListOptions, open_list, recognize_all
from declip_ingest.list_rows import (
    DROP_REASONS,
    FAULTS,
    ListReader,
    Rows,
    check_pairs,
)
from declip_ingest.list_tables import TableList, join_types
from declip_ingest.source_output import publish_table
from declip_ingest.url_digests import DigestSet, DigestTable, digest_texts
from declip_ingest.yfcc import CaptionRule
from declip_shards import DeclipError, Store, TaskStats

PAIRS_PATH = "source/pairs.parquet"
"""The table that ingest reads."""
DROPPED_PATH = "source/dropped.parquet"
"""Rows that did not reach it: list (name of the file), row (the first is 0), reason."""
DROPPED_SCHEMA = pa.schema([("list", pa.string()), ("row", pa.int64()), ("reason", pa.string())])
TASK = "all"
FIRST_ROWS = 1000
"""Rows that are looked at before a column is taken for the wrong one."""
NOT_HASHED = {"fingerprint": False}


@dataclass(frozen=True, kw_only=True)
class ReadPairs:
    """Read lists of URLs and captions into ``source/pairs.parquet``."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    root: str = field(default="", metadata=NOT_HASHED)
    """Folder of the dataset: a path or any fsspec URL."""
    # Where lists lie cannot change a byte; what they say is known by list_digests.
    lists: tuple[str, ...] = field(default=(), metadata=NOT_HASHED)
    """The lists, in their order: files, folders or globs; paths or fsspec URLs."""
    kind: ListKind = "auto"
    """What they are; auto tells by the content, anything else must agree with it."""
    metadata: tuple[str, ...] = field(default=(), metadata=NOT_HASHED)
    """YFCC100M's metadata files, to which YFCC15M V1's photo ids are joined."""
    hashes: tuple[str, ...] = field(default=(), metadata=NOT_HASHED)
    """Files of URLs and their sha256 or md5 (CC12M's), joined by URL."""
    list_digests: tuple[str, ...] = ()
    """sha256 of each of lists, metadata and hashes when the run was planned; others are refused."""
    url_column: str = ""
    """Column of URLs; empty goes by the usual names."""
    caption_column: str = ""
    """Column of captions; empty goes by the usual names."""
    hash_column: str = ""
    """Column of the pictures' md5, sha256 or sha512 in hex; empty: by its name; none."""
    license_column: str = ""
    """Column of licenses; empty goes by the usual names; none: there is none."""
    author_column: str = ""
    """Column of authors; empty goes by the usual names; none: there is none."""
    id_column: str = ""
    """Column of the list's own ids; empty goes by the usual names; none: there is none."""
    boxes_column: str = ""
    """Column of boxes to blur (left, top, right, bottom in 0 to 1); empty: by its name; none."""
    extra_columns: tuple[str, ...] = ("*",)
    """Further columns carried along; * for all of them."""
    caption_rule: CaptionRule = "title_description"
    """How YFCC's title and description become a caption."""
    dedup: Literal["url", "none"] = "url"
    """url: of rows with the same URL the first is kept; none: all are."""
    max_rows: int | None = None
    """Rows read of each list, the first so many; none for all."""

    def __post_init__(self) -> None:
        if self.max_rows is not None and self.max_rows < 1:
            raise DeclipError(f"max_rows is {self.max_rows} but must be at least 1, or none.")
        for digest in self.list_digests:
            if len(digest) != 64:
                raise DeclipError(
                    f"list_digests has {digest!r}, not a sha256 of 64 hex digits; leave it out."
                )
        if self.list_digests and len(self.list_digests) != len(self.locations()):
            raise DeclipError(
                f"list_digests has {len(self.list_digests)} digests for {len(self.locations())} "
                "lists, metadata and hashes; leave it out."
            )

    def locations(self) -> tuple[str, ...]:
        """All that is read, in the order of :attr:`list_digests`."""
        return (*self.lists, *self.metadata, *self.hashes)

    def options(self) -> ListOptions:
        """How the lists are read."""
        columns = ColumnNames(
            url=self.url_column,
            caption=self.caption_column,
            expected_hash=self.hash_column,
            license=self.license_column,
            author=self.author_column,
            source_id=self.id_column,
            boxes=self.boxes_column,
            extra=self.extra_columns,
        )
        return ListOptions(
            kind=self.kind,
            metadata=self.metadata,
            caption_rule=self.caption_rule,
            columns=columns,
        )

    def tasks(self) -> Sequence[str]:
        """One task: rows of all lists are held against one another.

        Raises:
            DeclipError: no list is named, or settings would be ignored.
        """
        if not self.lists:
            raise DeclipError("no list is named; name one or more with lists.")
        return (TASK,)

    def is_done(self, task: str) -> bool:
        """Whether both tables stand."""
        store = Store(self.root)
        return store.exists(PAIRS_PATH) and store.exists(DROPPED_PATH)

    def worker(self) -> Callable[[str], TaskStats]:
        """A function that reads all lists."""
        return lambda task: _Reading(self).run()


def pin_lists(stage: ReadPairs) -> ReadPairs:
    """The stage with full paths and the digests of what it reads, so that another list is another
    run. Digests that the user gives are left, and the stage refuses lists of others.

    Raises:
        DeclipError: a list does not exist.
    """
    stage = dataclasses.replace(
        stage,
        lists=tuple(map(full_location, stage.lists)),
        metadata=tuple(map(full_location, stage.metadata)),
        hashes=tuple(map(full_location, stage.hashes)),
    )
    if stage.list_digests:
        return stage
    digests = tuple(location_digest(location) for location in stage.locations())
    return dataclasses.replace(stage, list_digests=digests)


def full_location(location: str) -> str:
    """A local path made absolute; a URL as it is."""
    return location if "://" in location else os.path.abspath(os.path.expanduser(location))


@dataclass(kw_only=True)
class _Tally:
    """What became of one list's rows."""

    kind: str
    num_rows: int = 0
    num_kept: int = 0


class _Reading:
    """One run over all lists."""

    def __init__(self, stage: ReadPairs) -> None:
        self._stage = stage
        self._seen = DigestSet() if stage.dedup == "url" else None
        self._reasons: Counter[str] = Counter()
        self._hashes: tuple[DigestTable, str] | None = None
        self._num_hashes_found = 0

    def run(self) -> TaskStats:
        stage = self._stage
        states = self._check_digests()
        self._check_settings()
        readers = [open_list(location, stage.options()) for location in stage.lists]
        if stage.hashes:
            files = [file for name in stage.hashes for file in find_files(name)]
            self._hashes = read_hashes(files, recognize_all(files))
        schema = joint_schema(list(zip(stage.lists, readers)), with_hashes=bool(stage.hashes))
        store = Store(stage.root)
        tallies = []
        with (
            publish_table(store, PAIRS_PATH, schema) as pairs,
            publish_table(store, DROPPED_PATH, DROPPED_SCHEMA) as dropped,
        ):
            for location, reader in zip(stage.lists, readers, strict=True):
                tally = _Tally(kind=reader.kind)
                tallies.append(tally)
                for rows in self._checked(location, reader):
                    is_kept = rows.faults == 0
                    tally.num_rows += len(is_kept)
                    tally.num_kept += int(is_kept.sum())
                    pairs.write(rows.table if is_kept.all() else rows.take(is_kept).table)
                    if not is_kept.all():
                        dropped.write(self._drop(rows.take(~is_kept)))
                if not tally.num_rows:
                    raise DeclipError(f"list {location!r} has no rows; give it at least one.")
            self._check_states(states)
            if not pairs.num_rows:
                most = self._reasons.most_common(1)[0][0]
                raise DeclipError(
                    f"of {sum(t.num_rows for t in tallies):,} rows none has a URL and a caption "
                    f"(most often: {most}, {DROP_REASONS[most]}); check the lists and their kind."
                )
        return self._stats(tallies, readers)

    def _check_digests(self) -> list[list[tuple[str, ...]]]:
        """Refuse lists that changed since the run was planned; their state before reading."""
        states = [[f.state() for f in find_files(place)] for place in self._stage.locations()]
        for location, planned in zip(self._stage.locations(), self._stage.list_digests):
            digest = location_digest(location)
            if digest != planned:
                raise DeclipError(
                    f"list {location!r} has changed since the run was planned (digest "
                    f"{digest[:12]}..., planned {planned[:12]}...); give the same command again, "
                    "without list_digests, to plan for the list as it is."
                )
        return states

    def _check_states(self, before: list[list[tuple[str, ...]]]) -> None:
        for location, state in zip(self._stage.locations(), before, strict=True):
            if [file.state() for file in find_files(location)] != state:
                raise DeclipError(
                    f"list {location!r} changed while it was read; give the same command again."
                )

    def _check_settings(self) -> None:
        """Refuse a setting that no list would obey."""
        stage = self._stage
        files = [find_files(location)[0] for location in stage.lists]
        kinds = {agree(f.location, stage.kind, recognize(f)).kind for f in files}
        if stage.metadata and "yfcc15m_v1" not in kinds:
            raise DeclipError(
                "metadata is set, but no list is YFCC15M V1's subset; name the metadata files "
                "with lists to read all of YFCC100M, or leave metadata out."
            )
        is_yfcc = kinds & {"yfcc15m_v1", "yfcc100m"}
        if stage.caption_rule != ReadPairs.caption_rule and not is_yfcc:
            raise DeclipError(
                f"caption_rule is {stage.caption_rule!r}, but no list has titles and descriptions "
                "(YFCC100M, YFCC15M V1); leave it out."
            )

    def _checked(self, location: str, reader: ListReader) -> Iterator[Rows]:
        """A list's rows with their faults, duplicates among them."""
        judge = ColumnJudge(location)
        with ListProgress("sources", reader.num_bytes) as progress:
            for rows in reader.read(progress.add_bytes, self._stage.max_rows):
                progress.add_rows(len(rows.faults))
                if not len(rows.faults):
                    continue
                rows = check_pairs(rows)
                judge.look(rows)
                if self._hashes is not None:
                    rows = self._with_hashes(rows, *self._hashes)
                yield self._without_duplicates(rows)
        judge.judge()

    def _with_hashes(self, rows: Rows, table: DigestTable, algorithm: str) -> Rows:
        found = look_up_hashes(table, algorithm, rows.table["url"].combine_chunks())
        self._num_hashes_found += len(found) - found.null_count
        if "expected_hash" in rows.table.column_names:
            at = rows.table.column_names.index("expected_hash")
            both = pc.coalesce(rows.table["expected_hash"], found)
            table_with = rows.table.set_column(at, "expected_hash", both)
        else:
            table_with = rows.table.append_column("expected_hash", found)
        return dataclasses.replace(rows, table=table_with)

    def _without_duplicates(self, rows: Rows) -> Rows:
        if self._seen is None:
            return rows
        good = np.flatnonzero(rows.faults == 0)
        urls = rows.table["url"]
        if len(good) < len(rows.faults):
            urls = urls.take(pa.array(good))
        is_first = self._seen.add(digest_texts(urls))
        again = np.zeros(len(rows.faults), bool)
        again[good[~is_first]] = True
        return rows.with_fault("duplicate_url", again)

    def _drop(self, rows: Rows) -> pa.Table:
        counts = np.bincount(rows.faults, minlength=len(FAULTS))
        self._reasons.update({FAULTS[c]: int(n) for c, n in enumerate(counts) if n})
        return pa.table(
            [
                pa.array([rows.name] * len(rows.faults), pa.string()),
                pa.array(rows.numbers, pa.int64()),
                _reason_names(rows.faults),
            ],
            schema=DROPPED_SCHEMA,
        )

    def _stats(self, tallies: Sequence[_Tally], readers: Sequence[ListReader]) -> TaskStats:
        lists: list[dict[str, Any]] = []
        for tally, location in zip(tallies, self._stage.lists, strict=True):
            about: dict[str, Any] = {
                "kind": tally.kind,
                "num_rows": tally.num_rows,
                "num_kept": tally.num_kept,
            }
            compared = compare_counts(tally.kind, tally.num_rows)
            if compared and self._stage.max_rows is None:
                known, line = compared
                about["published"] = {"what": known.what, "num_rows": known.num_rows}
                print(f"  sources: {location}: {line}", file=sys.stderr, flush=True)
            lists.append(about)
        extra: dict[str, Any] = {"lists": lists}
        num_bad = sum(r.hash_count.num_bad for r in readers if isinstance(r, TableList))
        if num_bad:
            extra["num_bad_hashes"] = num_bad
        if self._hashes is not None:
            extra["num_hashes"] = len(self._hashes[0])
            extra["num_hashes_found"] = self._num_hashes_found
        num_kept = sum(tally.num_kept for tally in tallies)
        return TaskStats(
            num_in=sum(tally.num_rows for tally in tallies),
            num_out=num_kept,
            reasons=dict(sorted(self._reasons.items())),
            files=(PAIRS_PATH, DROPPED_PATH),
            extra=extra,
        )


def _reason_names(faults: npt.NDArray[np.uint8]) -> pa.Array:
    codes = pa.DictionaryArray.from_arrays(
        pa.array(faults.astype(np.int32)), pa.array(FAULTS, pa.string())
    )
    return codes.cast(pa.string())


class ColumnJudge:
    """Looks at a list's first rows, and refuses one whose columns will be the wrong ones."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._num_rows = self._num_urls = 0
        self._faults: Counter[str] = Counter()
        self._first_url = ""
        self._is_done = False

    def look(self, rows: Rows) -> None:
        """Rows after :func:`declip_ingest.list_rows.check_pairs`; judged from the 1000th on.

        Raises:
            DeclipError: as :meth:`judge`.
        """
        if self._is_done:
            return
        self._num_rows += len(rows.faults)
        self._faults.update(FAULTS[code] for code in rows.faults)
        urls = rows.table["url"].drop_null()
        self._num_urls += int(pc.sum(pc.match_substring(urls, ":")).as_py() or 0)
        if len(urls) and not self._first_url:
            self._first_url = urls[0].as_py()
        if self._num_rows >= FIRST_ROWS:
            self.judge()

    def judge(self) -> None:
        """Call it at the list's end, for those that are short.

        Raises:
            DeclipError: no URL, or no text for a caption, naming the list and what stands there.
        """
        if self._is_done or not self._num_rows:
            return
        self._is_done = True
        for reason, column in (("bad_url", "url"), ("bad_caption", "caption")):
            if self._faults[reason] == self._num_rows:
                raise DeclipError(
                    f"list {self._location!r} has no text in the {column} of any of its first "
                    f"{self._num_rows:,} rows; name another column with {column}_column."
                )
        if self._first_url and not self._num_urls:
            raise DeclipError(
                f"list {self._location!r} has no URL among its first {self._num_rows:,} rows: the "
                f"first value is {self._first_url[:60]!r}; name the column of URLs with "
                "url_column, or the list's kind."
            )


def joint_schema(
    readers: Sequence[tuple[str, ListReader]], *, with_hashes: bool = False
) -> pa.Schema:
    """The columns of several lists in one table: ours first, the others as they come.

    Raises:
        DeclipError: a column holds two kinds of values.
    """
    types: dict[str, pa.DataType] = {}
    for location, reader in readers:
        for column in reader.schema:
            types[column.name] = join_types(
                location, column.name, types.get(column.name), column.type
            )
    if with_hashes:
        types["expected_hash"] = KINDS["expected_hash"]
    names = [name for name in CANONICAL if name in types]
    names += [name for name in types if name not in CANONICAL]
    return pa.schema([(name, types[name]) for name in names])
