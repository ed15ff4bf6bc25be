"""Ingest as a stage: one task downloads one shard."""

import dataclasses
import datetime
import decimal
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow as pa

from declip_ingest.decode import DecodedImage, ImageNormalizer, ImagePolicy
from declip_ingest.failures import FetchError, RowFailureError
from declip_ingest.fetch import Fetcher, FetchPolicy
from declip_ingest.table import PairTable, open_pairs, plan_shards, table_digest
from declip_shards import DeclipError, Sample, Store, TaskStats, layout, write_shard

NOT_HASHED = {"fingerprint": False}
"""Of settings that cannot change a byte of the output."""
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


@dataclass(frozen=True, kw_only=True)
class DownloadShards:
    """Download a table's pictures into shards of img2dataset's layout, a shard a task."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    root: str = field(default="", metadata=NOT_HASHED)
    """Folder of the dataset: a path or any fsspec URL."""
    # Where the list lies cannot change a byte; what it says is known by table_sha256, or by the
    # manifest of the step that wrote it.
    table: str = field(default="source/pairs.parquet", metadata=NOT_HASHED)
    """Table of URLs and captions: a path within the dataset, an absolute path, or a URL."""
    table_format: Literal["auto", "parquet", "csv", "tsv", "json", "jsonl"] = "auto"
    """What the table is; auto goes by the ending of its name."""
    table_sha256: str = ""
    """Digest of the table's file that the run was planned for; another one is refused."""
    url_column: str = "url"
    """The table's column of URLs."""
    caption_column: str = "caption"
    """The table's column of captions."""
    extra_columns: tuple[str, ...] = ("*",)
    """Further columns carried into the shards; * for all of them."""
    shard_size: int = 1000
    """Rows of a shard, failed ones included."""
    image_size: int = 256
    """Pixels of the stored pictures' side or sides, as resize_mode says."""
    resize_mode: Literal["border", "keep_ratio", "keep_ratio_largest", "center_crop", "no"] = (
        "border"
    )
    """img2dataset's modes: pad to a square, shorter side, longer side, crop a square, leave."""
    resize_only_if_bigger: bool = False
    """Leave pictures that are already small enough at their size."""
    encode_quality: int = 90
    """JPEG quality of the stored pictures, 1 to 100."""
    min_image_size: int = 0
    """Pixels that the shorter side must have at least."""
    max_aspect_ratio: float | None = None
    """Longer side over shorter side at most; none is no limit."""
    max_pixels: int = 64_000_000
    """Width times height at most, judged before decoding."""
    formats: tuple[str, ...] = ("jpeg", "png", "webp", "gif")
    """Picture formats taken (avif and bmp can be added); of an animation the first frame."""
    thread_count: int = field(default=32, metadata=NOT_HASHED)
    """Downloads at the same time in one task."""
    timeout_seconds: float = 10.0
    """For one URL in all: look-up, connections, redirects, retries, pauses and body."""
    connect_timeout_seconds: float = 5.0
    """For one connection to be made."""
    first_byte_timeout_seconds: float = 10.0
    """For one request until its headers are there."""
    retries: int = 2
    """Further attempts after a passing failure, while timeout_seconds lasts."""
    max_body_bytes: int = 20_000_000
    """Bytes of a picture's file at most."""
    min_bytes_per_second: int = 1024
    """A body slower than this after two seconds counts as a timeout; 0 is no limit."""
    allow_addresses: tuple[str, ...] = ()
    """host:port that may be reached though not public or of another port than 80 and 443."""
    user_agent_contact: str = field(default="", metadata=NOT_HASHED)
    """Your e-mail address or URL, told to every web server in the User-Agent header."""
    disallowed_header_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """X-Robots-Tag directives that forbid a picture's use."""

    def __post_init__(self) -> None:
        # The policies' own checks: a wrong setting is refused before anything is fetched.
        self.fetch_policy()
        self.image_policy()
        plan_shards(0, self.shard_size)
        if not 1 <= self.thread_count <= 1024:
            raise DeclipError(
                f"thread_count is {self.thread_count} but must lie between 1 and 1024; try 32."
            )
        if self.table_sha256 and len(self.table_sha256) != 64:
            raise DeclipError(
                f"table_sha256 is {self.table_sha256!r}, not a sha256 of 64 hex digits; leave it "
                "out or take it from sha256sum."
            )

    def fetch_policy(self) -> FetchPolicy:
        """The limits of a fetch."""
        return FetchPolicy(**self._shared_with(FetchPolicy))

    def image_policy(self) -> ImagePolicy:
        """What pictures are taken and how they are stored."""
        return ImagePolicy(**self._shared_with(ImagePolicy))

    def _shared_with(self, policy: type[Any]) -> dict[str, Any]:
        """A policy's settings bear the same names here; a test holds that none is left out."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(policy)}

    def table_location(self) -> str:
        """The table's full path or URL."""
        if "://" in self.table or self.table.startswith("/"):
            return self.table
        store = Store(self.root)
        try:
            path = store.path(self.table)
        except ValueError as error:
            raise DeclipError(
                f"table {self.table!r} is taken from the dataset's folder {self.root!r} and leaves "
                "it; give an absolute path."
            ) from error
        return path if store.is_local else str(store.fs.unstrip_protocol(path))

    def open_table(self) -> PairTable:
        """Open and check the table.

        Raises:
            DeclipError: as :func:`declip_ingest.table.open_pairs`; or the file has changed.
        """
        location = self.table_location()
        if self.table_sha256:
            digest = table_digest(location)
            if digest != self.table_sha256.lower():
                raise DeclipError(
                    f"table {location!r} has changed: its sha256 is {digest[:12]}... but this run "
                    f"was planned for {self.table_sha256[:12]}...; restore it or start a new run."
                )
        return open_pairs(
            location,
            table_format=self.table_format,
            url_column=self.url_column,
            caption_column=self.caption_column,
            extra_columns=self.extra_columns,
        )

    def tasks(self) -> Sequence[str]:
        """Shard numbers; the table is checked on the way, before anything is fetched."""
        return plan_shards(self.open_table().num_rows, self.shard_size)

    def is_done(self, task: str) -> bool:
        """Whether the shard's three files stand; its stats file is written last."""
        store = Store(self.root)
        paths = (layout.shard_stats_path(task), layout.tar_path(task))
        return all(store.exists(p) for p in (*paths, layout.shard_parquet_path(task)))

    def worker(self) -> Callable[[str], TaskStats]:
        """Open the table, make the connections' pool and load the resizer."""
        return _ShardDownloader(self)


class _ShardDownloader:
    """``shard -> stats``. Threads fetch; this thread decodes, for it is one core's work."""

    def __init__(self, stage: DownloadShards) -> None:
        self.stage = stage
        self.store = Store(stage.root)
        self.pairs = stage.open_table()
        self.fetcher = Fetcher(stage.fetch_policy(), stage.thread_count)
        self.normalize = ImageNormalizer(stage.image_policy())

    def __call__(self, task: str) -> TaskStats:
        start_time = time.time()
        size = self.stage.shard_size
        first = int(task) * size
        table = self.pairs.read(first, min(first + size, self.pairs.num_rows))
        rows = table.to_pylist()
        for index, row in enumerate(rows):
            row["key"] = layout.sample_key(int(task), index, size)
        images = self._download(rows)
        reasons = Counter(row["error_message"].partition(":")[0] for row in rows if _failed(row))
        samples = [
            Sample(
                key=row["key"],
                image=images[row["key"]],
                caption=row["caption"],
                metadata={name: _json_value(value) for name, value in row.items()},
            )
            for row in rows
            if not _failed(row)
        ]
        files = write_shard(
            self.store, task, samples, _rows_table(table, rows), _stats(rows, start_time)
        )
        return TaskStats(
            num_in=len(rows),
            num_out=len(samples),
            reasons=reasons,
            files=files,
            volatile_files=[layout.shard_stats_path(task)],
        )

    def _download(self, rows: list[dict[str, Any]]) -> dict[str, bytes]:
        """Fill in every row's outcome; the stored pictures by key."""
        images = {}
        for index, outcome in self._fetch_all(rows):
            result = self._decode(outcome)
            rows[index].update(_result_fields(result))
            if not isinstance(result, RowFailureError):
                images[rows[index]["key"]] = result.image
        return images

    def _decode(self, outcome: bytes | RowFailureError) -> DecodedImage | RowFailureError:
        if isinstance(outcome, RowFailureError):
            return outcome
        try:
            return self.normalize(outcome)
        except RowFailureError as failure:
            return failure

    def _fetch_all(
        self, rows: list[dict[str, Any]]
    ) -> Iterator[tuple[int, bytes | RowFailureError]]:
        """(row, body or failure) as they come.

        At most twice ``thread_count`` bodies are in memory: a slow decoder slows the downloads.
        """
        todo = iter(enumerate(rows))
        pending: dict[Future[bytes | RowFailureError], int] = {}
        with ThreadPoolExecutor(self.stage.thread_count, thread_name_prefix="fetch") as pool:
            try:
                while True:
                    while len(pending) < 2 * self.stage.thread_count and (row := next(todo, None)):
                        pending[pool.submit(self._fetch, row[1])] = row[0]
                    if not pending:
                        return
                    done, _ = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield pending.pop(future), future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, row: dict[str, Any]) -> bytes | RowFailureError:
        try:
            if row["url"] is None:
                raise FetchError("missing_url")
            if row["caption"] is None:
                raise FetchError("missing_caption")
            return self.fetcher.fetch(row["url"])
        except RowFailureError as failure:
            return failure


def _failed(row: dict[str, Any]) -> bool:
    return bool(row["status"] != "success")


def _result_fields(result: DecodedImage | RowFailureError) -> dict[str, Any]:
    """img2dataset's result columns of a row."""
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


def _rows_table(table: pa.Table, rows: list[dict[str, Any]]) -> pa.Table:
    """The table's own columns untouched, img2dataset's beside them."""
    for name, kind in RESULT_COLUMNS:
        table = table.append_column(name, pa.array([row[name] for row in rows], kind))
    return table


def _json_value(value: Any) -> Any:
    """A table's value as JSON has it: dates in ISO form, NaN and infinity as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    if isinstance(value, list | tuple):
        return [_json_value(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _json_value(v) for k, v in value.items()}
    return value


def _stats(rows: list[dict[str, Any]], start_time: float) -> dict[str, Any]:
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
