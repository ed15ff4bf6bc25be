"""One shard: many downloads at a time, pictures decoded in child processes, one set of bytes.

One asyncio loop a process. What is written depends on the outcomes of the rows alone: not on the
order in which they came, nor on the time they took; times go to the ledger.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import decimal
import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from declip_ingest.decoder_pool import DecoderPool
from declip_ingest.digests import check_hash, host_of, is_listed, is_placeholder_url, read_digests
from declip_ingest.failures import DecodeError, FetchError, RowFailureError
from declip_ingest.fetch import Fetched, Fetcher
from declip_ingest.image_policy import DecodedImage
from declip_ingest.ledger import LedgerRow, write_ledger
from declip_ingest.robots import RobotsCache
from declip_shards import DeclipError, Sample, Store, TaskStats, layout
from declip_shards.optout import load_optout
from declip_shards.writer import shard_files

if TYPE_CHECKING:
    from declip_ingest.stages import DownloadShards

Row = dict[str, Any]
"""A row of the table: ``key``, ``url``, ``caption`` and the carried columns."""
RESULT_COLUMNS = (
    ("key", pa.string()),
    ("status", pa.string()),
    ("error_message", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("original_width", pa.int32()),
    ("original_height", pa.int32()),
    ("sha256", pa.string()),
)
"""img2dataset's columns beside those of the table; ``exif`` is left out, for it holds places."""
ENOUGH_ROWS = 20
"""Fewer bad rows, or hosts, than this never condemn a whole shard."""
HASH_ALARM_SHARE = 0.5
"""Share of rows with other bytes than the list says, above which the column must be wrong."""
KILLED_DECODER = ("decoder_crash", "decoder_timeout", "decoder_memory")


@dataclass(frozen=True, kw_only=True)
class RowOutcome:
    """What became of one row."""

    result: DecodedImage | RowFailureError
    """The stored picture, or why there is none."""
    fetched: Fetched | None
    """What the network did; None where it was not asked."""
    num_bytes: int | None = None
    """Length of the file that came."""
    is_verified: bool = False
    """Whether the bytes were compared with a digest of the list."""

    @property
    def failure(self) -> RowFailureError | None:
        """Why there is no picture."""
        return self.result if isinstance(self.result, RowFailureError) else None


class HostQueue:
    """Rows in an order in which no host holds more than its share of the downloads.

    A host whose rows are all slow would otherwise take every place and leave the others waiting.
    """

    def __init__(self, rows: Sequence[Row], per_host: int) -> None:
        self._rows: dict[str, deque[Row]] = {}
        for row in rows:
            self._rows.setdefault(host_of(row["url"] or ""), deque()).append(row)
        self._ready = deque(self._rows)
        self._active: Counter[str] = Counter()
        self._per_host = per_host
        self._num_left = len(rows)
        self._changed = asyncio.Event()

    async def next(self) -> Row | None:
        """The next row whose host has a place free; None when all are taken."""
        while self._num_left:
            if self._ready:
                host = self._ready.popleft()
                row = self._rows[host].popleft()
                self._num_left -= 1
                self._active[host] += 1
                self._offer(host)
                if not self._num_left:
                    self._changed.set()  # those that wait have nothing more to wait for
                return row
            self._changed.clear()
            await self._changed.wait()
        return None

    def done(self, row: Row) -> None:
        """A row of this host is finished: its place is free."""
        host = host_of(row["url"] or "")
        was_full = self._active[host] >= self._per_host
        self._active[host] -= 1
        if was_full:
            self._offer(host)

    def _offer(self, host: str) -> None:
        if self._rows[host] and self._active[host] < self._per_host:
            self._ready.append(host)
            self._changed.set()


class ShardDownloader:
    """``shard -> stats``: one for a process; connections and decoders outlive a shard."""

    def __init__(self, stage: "DownloadShards") -> None:
        self.stage = stage
        self.store = Store(stage.root)
        self.pairs = stage.open_table()
        self.optout = load_optout(self.store)
        self.blocked = read_digests(stage.blocklists, "blocklists")
        self.placeholders = read_digests(stage.placeholders, "placeholders")
        self._hash_column = stage.find_hash_column(self.pairs.schema.names)
        self._boxes_column = stage.find_boxes_column(self.pairs.schema.names)
        self._runner = asyncio.Runner()
        self._open: contextlib.AsyncExitStack | None = None

    def __call__(self, task: str) -> TaskStats:
        start_time = time.time()
        table, rows = self.read_rows(task)
        outcomes = self.download_rows(rows)
        for row in rows:
            row.update(result_fields(outcomes[row["key"]].result))
        # First of all, for whoever asks why the shard was refused.
        write_ledger(self.store, task, [ledger_row(row, outcomes[row["key"]]) for row in rows])
        self.check_shard(task, rows, outcomes)
        images = {
            key: outcome.result.image
            for key, outcome in outcomes.items()
            if isinstance(outcome.result, DecodedImage)
        }
        files = finished_files(task, table, rows, images, start_time)
        for path, data in files.items():
            self.store.write_bytes(path, data)
        return shard_stats(task, rows, self.quarantined(rows))

    def close(self) -> None:
        """End connections and decoders."""
        if self._open is not None:
            self._runner.run(self._close(self._open))
        self._runner.close()

    async def _close(self, services: contextlib.AsyncExitStack) -> None:
        """First what a signal has left in the middle, which would find its connections gone."""
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await services.aclose()

    def read_rows(self, task: str) -> tuple[pa.Table, list[Row]]:
        """A shard's part of the list: as a table, and as rows that carry their keys."""
        size = self.stage.shard_size
        first = int(task) * size
        table = self.pairs.read(first, min(first + size, self.pairs.num_rows))
        rows: list[Row] = table.to_pylist()
        for index, row in enumerate(rows):
            row["key"] = layout.sample_key(int(task), index, size)
        return table, rows

    def download_rows(self, rows: Sequence[Row]) -> dict[str, RowOutcome]:
        """Fetch and decode these rows; their outcomes by key."""
        outcomes = self._runner.run(self._download(rows))
        return self.without_repeats(rows, outcomes)

    async def _download(self, rows: Sequence[Row]) -> dict[str, RowOutcome]:
        fetcher, pool = await self._services()
        queue = HostQueue(rows, self.stage.host_connections)
        outcomes: dict[str, RowOutcome] = {}

        async def work() -> None:
            while (row := await queue.next()) is not None:
                try:
                    outcomes[row["key"]] = await self._one(row, fetcher, pool)
                finally:
                    queue.done(row)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.stage.thread_count, len(rows))):
                    group.create_task(work())
        except ExceptionGroup as errors:
            # One fault of this machine stops all; its first sentence says it.
            raise errors.exceptions[0] from errors
        return outcomes

    async def _services(self) -> tuple[Fetcher, DecoderPool]:
        """Connections and decoders, opened at the first shard of this process."""
        if self._open is None:
            stage, stack = self.stage, contextlib.AsyncExitStack()
            self._fetcher = await stack.enter_async_context(
                Fetcher(
                    stage.fetch_policy(),
                    max_connections=stage.thread_count,
                    robots_cache=RobotsCache(self.store) if stage.robots == "obey" else None,
                )
            )
            self._pool = await stack.enter_async_context(
                DecoderPool(
                    stage.image_policy(),
                    num_processes=stage.decode_processes,
                    timeout_seconds=stage.decode_timeout_seconds,
                    memory_bytes=stage.decode_memory_bytes,
                )
            )
            self._open = stack
        return self._fetcher, self._pool

    async def _one(self, row: Row, fetcher: Fetcher, pool: DecoderPool) -> RowOutcome:
        fetched: Fetched | None = None
        num_bytes, is_verified = None, False
        result: DecodedImage | RowFailureError
        try:
            self._check_row(row)
            fetched = await fetcher.fetch(row["url"])
            if fetched.failure is not None:
                raise fetched.failure
            body = fetched.body
            assert body is not None
            num_bytes = len(body)
            if is_placeholder_url(fetched.final_url):
                raise FetchError("placeholder", "url")
            if self._hash_column:
                # A wrong hash is noted as verified too: check_shard judges by their share.
                is_verified = bool(row[self._hash_column])
                check_hash(body, row[self._hash_column])
            result = await self._decode(row, body, pool)
            self._check_content(body)
        except RowFailureError as failure:
            result = failure
        return RowOutcome(
            result=result,
            # The file itself is not needed any more, and a shard's are too many to keep.
            fetched=None if fetched is None else dataclasses.replace(fetched, body=None),
            num_bytes=num_bytes,
            is_verified=is_verified,
        )

    def _check_row(self, row: Row) -> None:
        # First of all: nothing of a removed row stays, not even that its caption was missing.
        if self.optout.blocks_url(row["url"]):
            raise FetchError("opt_out_list")
        if row["url"] is None:
            raise FetchError("missing_url")
        if row["caption"] is None:
            raise FetchError("missing_caption")

    async def _decode(self, row: Row, body: bytes, pool: DecoderPool) -> DecodedImage:
        column = self._boxes_column
        try:
            boxes = [tuple(box) for box in row[column] or ()] if column else []
        except TypeError:
            raise DecodeError("bad_boxes") from None
        try:
            return await pool.decode(body, boxes)
        except DecodeError as failure:
            if failure.reason in KILLED_DECODER and not self._is_blocked(body):
                self.store.write_bytes(layout.quarantine_path(row["key"]), body)
            raise

    def _is_blocked(self, body: bytes) -> bool:
        return is_listed(body, self.blocked) or self.optout.blocks_bytes(body)

    def _check_content(self, body: bytes) -> None:
        """By digests made here: what comes from a decoder is not believed in this."""
        if self.optout.blocks_bytes(body):
            raise FetchError("opt_out_list")
        if is_listed(body, self.blocked):
            raise FetchError("blocked")
        if is_listed(body, self.placeholders):
            raise FetchError("placeholder")

    def without_repeats(
        self, rows: Sequence[Row], outcomes: dict[str, RowOutcome]
    ) -> dict[str, RowOutcome]:
        """Fail the pictures that came from too many URLs of this shard: a notice, not photos."""
        limit = self.stage.placeholder_repeats
        urls: dict[str, set[str]] = {}
        for row in rows:
            result = outcomes[row["key"]].result
            if isinstance(result, DecodedImage):
                urls.setdefault(result.sha256, set()).add(row["url"])
        repeated = {digest for digest, seen in urls.items() if limit and len(seen) >= limit}
        return {
            # With the digest, so that a later attempt at other rows can count these along.
            key: dataclasses.replace(
                outcome, result=FetchError("repeated_image", outcome.result.sha256)
            )
            if isinstance(outcome.result, DecodedImage) and outcome.result.sha256 in repeated
            else outcome
            for key, outcome in outcomes.items()
        }

    def check_shard(
        self, task: str, rows: Sequence[Row], outcomes: Mapping[str, RowOutcome]
    ) -> None:
        """Refuse a shard whose failures tell of this machine or of the settings, not of the web.

        Raises:
            DeclipError: the resolver fails, or the column of hashes is no column of hashes.
        """
        # By host and not by row: one name that is gone may have half of the rows.
        hosts = {row["key"]: host_of(row["url"] or "") for row in rows}
        lost = {hosts[key] for key, outcome in outcomes.items() if _is_lost(outcome)}
        num_hosts, limit = len(set(hosts.values())), self.stage.max_dns_failure_share
        if len(lost) >= ENOUGH_ROWS and len(lost) > limit * num_hosts:
            raise DeclipError(
                f"{len(lost)} of {num_hosts} host names did not resolve (max_dns_failure_share is "
                f"{limit:g}): the resolver is overloaded or there is no network. No picture of "
                f"shard {task} is kept; try declip doctor ingest, lower --ingest.thread-count, or "
                "run a caching resolver, then run the same command again."
            )
        num_verified = sum(outcome.is_verified for outcome in outcomes.values())
        reasons = Counter(o.failure.reason for o in outcomes.values() if o.failure)
        num_other = reasons["hash_mismatch"]
        if num_other >= ENOUGH_ROWS and num_other > HASH_ALARM_SHARE * num_verified:
            raise DeclipError(
                f"{num_other} of {num_verified} pictures have other bytes than column "
                f"{self._hash_column!r} says: it is probably no hash of the picture's file. Name "
                "the right one with --ingest.hash-column, or switch off --ingest.verify-hash."
            )

    def quarantined(self, rows: Sequence[Row]) -> list[str]:
        """Files of this shard's rows in quarantine."""
        return [
            layout.quarantine_path(row["key"])
            for row in rows
            if reason_name(row) in KILLED_DECODER
            and self.store.exists(layout.quarantine_path(row["key"]))
        ]


def _is_lost(outcome: RowOutcome) -> bool:
    return outcome.failure is not None and outcome.failure.reason == "dns_failure"


def reason_name(row: Row) -> str:
    """A finished row's reason; empty for a success."""
    return (row["error_message"] or "").partition(":")[0]


def result_fields(result: DecodedImage | RowFailureError) -> Row:
    """What a row becomes: img2dataset's result columns; a removed one loses all else too."""
    if isinstance(result, RowFailureError):
        fields = dict.fromkeys(name for name, _ in RESULT_COLUMNS if name != "key")
        return {**fields, "status": result.status, "error_message": result.message}
    return {
        "status": "success",
        "error_message": None,
        "width": result.width,
        "height": result.height,
        "original_width": result.original_width,
        "original_height": result.original_height,
        "sha256": result.sha256,
    }


def finished_files(
    task: str,
    table: pa.Table,
    rows: Sequence[Row],
    images: Mapping[str, bytes],
    start_time: float,
) -> dict[str, bytes]:
    """A shard's files by path, the stats file, which marks it as done, last.

    Args:
        task: the shard.
        table: the list's columns of these rows.
        rows: as the table's, in its order, with their results.
        images: JPEG by key, of every success.
        start_time: seconds since 1970, for the stats file alone.
    """
    samples = [
        Sample(
            key=row["key"],
            image=images[row["key"]],
            caption=row["caption"],
            metadata={name: json_value(value) for name, value in row.items()},
        )
        for row in rows
        if row["status"] == "success"
    ]
    return shard_files(task, samples, _rows_table(table, rows), _stats(rows, start_time))


def _rows_table(table: pa.Table, rows: Sequence[Row]) -> pa.Table:
    """The list's own columns untouched, img2dataset's beside them; nothing of a removed row."""
    removed = pa.array([row["error_message"] == "opt_out_list" for row in rows])
    for number, name in enumerate(table.column_names):
        column = table.column(name)
        if removed.true_count:
            kept = [None if gone else i for i, gone in enumerate(removed.to_pylist())]
            column = column.combine_chunks().take(pa.array(kept, pa.int64()))
        table = table.set_column(number, table.schema.field(name), column)
    for name, kind in RESULT_COLUMNS:
        table = table.append_column(name, pa.array([row[name] for row in rows], kind))
    return table


def json_value(value: Any) -> Any:
    """A table's value as JSON has it: dates in ISO form, NaN and infinity as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    if isinstance(value, list | tuple):
        return [json_value(v) for v in value]
    if isinstance(value, dict):
        return {str(k): json_value(v) for k, v in value.items()}
    return value


def _stats(rows: Sequence[Row], start_time: float) -> Row:
    """img2dataset's stats file; it holds times and is not hashed."""
    statuses = Counter(row["status"] for row in rows)
    end_time = time.time()
    return {
        "count": len(rows),
        "successes": statuses["success"],
        "failed_to_download": statuses["failed_to_download"],
        "failed_to_resize": statuses["failed_to_resize"],
        "duration": end_time - start_time,
        "start_time": start_time,
        "end_time": end_time,
        "status_dict": dict(Counter(row["error_message"] or row["status"] for row in rows)),
    }


def shard_stats(task: str, rows: Sequence[Row], quarantined: Sequence[str]) -> TaskStats:
    """A finished shard's figures, for its receipt."""
    reasons = Counter(reason_name(row) for row in rows if row["status"] != "success")
    return TaskStats(
        num_in=len(rows),
        num_out=len(rows) - reasons.total(),
        reasons=reasons,
        files=[layout.tar_path(task), layout.shard_parquet_path(task)],
        volatile_files=[layout.shard_stats_path(task), layout.ledger_path(task), *quarantined],
    )


def ledger_row(row: Row, outcome: RowOutcome) -> LedgerRow:
    """What the ledger says of a row."""
    fetched, failure = outcome.fetched, outcome.failure
    url = None if failure and failure.reason == "opt_out_list" else row["url"]
    return LedgerRow(
        key=row["key"],
        url=url,
        host=fetched.host if fetched else host_of(url or ""),
        status=row["status"],
        reason=failure.reason if failure else "",
        detail=failure.detail if failure else "",
        http_status=fetched.http_status if fetched else None,
        attempts=fetched.attempts if fetched else 0,
        milliseconds=fetched.milliseconds if fetched else 0,
        num_bytes=outcome.num_bytes,
        attempted_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
