"""Fetch failed rows again, by reason, into the same dataset: keys stay, good rows stay.

A worker fetches a shard's asked rows, packs the shard anew and lays its files aside; the driver
alone decides that they count (a worker may outlive a killed run), and moves them into place as one.
A killed refetch leaves whole shards, some of them mended, and finishes when it is run again.
"""

import dataclasses
import hashlib
import io
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from declip_ingest.digests import host_of
from declip_ingest.download import (
    RESULT_COLUMNS,
    Row,
    RowOutcome,
    ShardDownloader,
    finished_files,
    ledger_row,
    reason_name,
    result_fields,
    shard_stats,
)
from declip_ingest.failures import FetchError, RowFailureError, is_asked, match_reasons
from declip_ingest.image_policy import DecodedImage
from declip_ingest.ledger import LedgerRow, ledger_table, merge_rows, read_ledger_rows
from declip_ingest.stages import DownloadShards
from declip_shards import DeclipError, Store, TaskStats, energon, layout, manifest, rewrite
from declip_shards.manifest import FileRecord, Receipt, canonical_json
from declip_shards.reader import read_samples
from declip_shards.sidecars import pack_table, read_rows

REPEATED = "repeated_image"
"""Rows whose picture came from too many URLs; the detail is its digest."""
REMOVED = "opt_out_list"
"""Rows that somebody asked to remove are never fetched again."""
INGEST = "ingest"
"""The step whose dataset is mended."""
PATIENCE = (
    "timeout_seconds",
    "connect_timeout_seconds",
    "first_byte_timeout_seconds",
    "retries",
    "min_bytes_per_second",
    "max_retry_after_seconds",
    "max_dns_failure_share",
    "host_connections",
    "host_requests_per_second",
    "thread_count",
    "decode_timeout_seconds",
    "decode_memory_bytes",
)
"""Settings that decide how long we try, not what a picture becomes: a refetch may change them."""
RESULT_NAMES = tuple(name for name, _ in RESULT_COLUMNS if name != "key")


@dataclass(frozen=True, kw_only=True)
class RefetchShards:
    """As a stage: one task fetches the asked rows of one shard and lays its new files aside."""

    root: str
    """Folder of the dataset: a path or any fsspec URL."""
    ingest: DownloadShards
    """What ingest ran with, made more patient where the user wants it."""
    reasons: tuple[str, ...]
    """Names of reasons or of families (:func:`declip_ingest.failures.match_reasons`)."""

    def __post_init__(self) -> None:
        self.asked()
        if REMOVED in self.reasons:
            raise DeclipError(
                f"rows of reason {REMOVED!r} were removed because somebody asked for it, and are "
                "not fetched again; leave it out."
            )

    def asked(self) -> Callable[[str], bool]:
        """Whether a row of this reason is fetched again."""
        matched = match_reasons(self.reasons)
        return lambda reason: reason != REMOVED and is_asked(reason, matched)

    @property
    def num_cpus(self) -> float:
        """As ingest's."""
        return self.ingest.num_cpus

    @property
    def num_gpus(self) -> float:
        """As ingest's."""
        return self.ingest.num_gpus

    @property
    def memory_bytes(self) -> int:
        """As ingest's."""
        return self.ingest.memory_bytes

    @property
    def task_seconds(self) -> float:
        """As ingest's."""
        return self.ingest.task_seconds

    def tasks(self) -> Sequence[str]:
        """Shards with rows that failed for such a reason, by their receipts: no table is read."""
        return sorted(self.asked_rows())

    def asked_rows(self) -> dict[str, dict[str, int]]:
        """Shard -> asked reason -> rows, of the shards that have such rows."""
        asked = self.asked()
        receipts = manifest.read_receipts(Store(self.root), INGEST)
        counts = {
            task: {reason: n for reason, n in receipt.reasons.items() if n and asked(reason)}
            for task, receipt in receipts.items()
        }
        return {task: found for task, found in counts.items() if found}

    def is_done(self, task: str) -> bool:
        """Whether none of the shard's rows failed for such a reason."""
        return not any(map(self.asked(), _receipt_of(Store(self.root), task).reasons))

    def worker(self) -> Callable[[str], TaskStats]:
        """Open the table, the connections and the decoders."""
        return _ShardRefetcher(self)


class _ShardRefetcher:
    """``shard -> stats``, whose ``extra`` holds the moves that the driver is to make."""

    def __init__(self, stage: RefetchShards) -> None:
        self.store = Store(stage.root)
        self.asked = stage.asked()
        stage.ingest.check_lists()
        self.downloader = ShardDownloader(stage.ingest)

    def __call__(self, task: str) -> TaskStats:
        start_time = time.time()
        receipt = _receipt_of(self.store, task)
        table, rows = self.downloader.read_rows(task)
        _check_whole(self.store, receipt)
        _restore_results(self.store, task, rows)
        before = {row["key"]: _results(row) for row in rows}
        was = {row["key"]: reason_name(row) for row in rows}
        by_key = {row["key"]: row for row in rows}
        todo = [row for row in rows if was[row["key"]] and self.asked(was[row["key"]])]
        outcomes = self.downloader.download_rows(todo)
        for key, result in self._changes(task, rows, outcomes).items():
            by_key[key].update(result_fields(result))
        changed = [row for row in rows if _results(row) != before[row["key"]]]

        files: dict[str, bytes | None] = {}
        if changed:
            images = self._images(task, rows, outcomes)
            files |= finished_files(task, table, rows, images, start_time)
            files |= self._receipt_file(task, receipt, rows, files)
            files |= self._index_file(task, files)
        ledger = _new_ledger(self.store, task, rows, outcomes)
        files[layout.ledger_path(task)] = pack_table(ledger_table(ledger))
        moves = stage_files(self.store, f"refetch-{task}-{uuid.uuid4().hex[:12]}", files)
        still = Counter(reason_name(row) for row in todo if row["status"] != "success")
        mended = Counter(was[row["key"]] for row in todo if row["status"] == "success")
        return TaskStats(
            num_in=len(todo),
            num_out=len(todo) - still.total(),
            reasons=still,
            extra={"moves": moves, "mended": dict(mended), "changed": len(changed)},
        )

    def close(self) -> None:
        """End connections and decoders."""
        self.downloader.close()

    def _changes(
        self, task: str, rows: Sequence[Row], outcomes: Mapping[str, RowOutcome]
    ) -> dict[str, DecodedImage | RowFailureError]:
        """Results by key of the rows that were tried, and of those that fail because of them.

        Raises:
            DeclipError: more names fail than before: that is this machine's fault, not the web's.
        """
        kept = {row["key"]: _kept_outcome(row) for row in rows}
        merged = {**kept, **outcomes}
        if _num_dns_failures(merged.values()) > _num_dns_failures(kept.values()):
            self.downloader.check_shard(task, rows, merged)
        # The rule of repeated pictures sees the whole shard, old successes and new ones alike; one
        # that other rows have failed for before needs no further repeats.
        known = {
            failure.detail
            for outcome in merged.values()
            if (failure := outcome.failure) and failure.reason == REPEATED and failure.detail
        }
        judged = self.downloader.without_repeats(rows, merged)
        changes: dict[str, DecodedImage | RowFailureError] = {}
        for key, outcome in judged.items():
            result = outcome.result
            if isinstance(result, DecodedImage) and result.sha256 in known:
                changes[key] = FetchError(REPEATED, result.sha256)
            elif key in outcomes or outcome is not kept[key]:
                changes[key] = result
        return changes

    def _images(
        self, task: str, rows: Sequence[Row], outcomes: Mapping[str, RowOutcome]
    ) -> dict[str, bytes]:
        """The successes' stored pictures: the new ones, and those of the tar."""
        images = {sample.key: sample.image for sample in read_samples(self.store, task)}
        for key, outcome in outcomes.items():
            if isinstance(outcome.result, DecodedImage):
                images[key] = outcome.result.image
        lost = [r["key"] for r in rows if r["status"] == "success" and r["key"] not in images]
        if lost:
            raise DeclipError(
                f"{layout.tar_path(task)!r} lacks the picture of {lost[0]!r}, which its parquet "
                "says it has; delete the three files of this shard and rerun ingest."
            )
        return images

    def _receipt_file(
        self, task: str, old: Receipt, rows: Sequence[Row], files: Mapping[str, bytes | None]
    ) -> dict[str, bytes | None]:
        """Ingest's receipt of the new shard, and the removal of what it no longer lists."""
        stats = shard_stats(task, rows, self.downloader.quarantined(rows))
        receipt = Receipt(
            task=task,
            fingerprint=old.fingerprint,
            num_in=stats.num_in,
            num_out=stats.num_out,
            reasons=dict(sorted(stats.reasons.items())),
            files=[_record(path, files[path] or b"") for path in sorted(stats.files)],
            volatile_files=sorted(stats.volatile_files),
            extra=dict(stats.extra),
        )
        gone = {path: None for path in old.volatile_files if path not in receipt.volatile_files}
        content = canonical_json(dataclasses.asdict(receipt))
        return {**gone, layout.receipt_path(INGEST, task): content}

    def _index_file(self, task: str, files: Mapping[str, bytes | None]) -> dict[str, bytes | None]:
        """The new tar's index for Energon, where the old one has one."""
        path, tar = energon.index_path(task), layout.tar_path(task)
        if not self.store.exists(path):
            return {}
        return {path: energon.read_index(io.BytesIO(files[tar] or b""), tar)}


def _record(path: str, data: bytes) -> FileRecord:
    return FileRecord(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _receipt_of(store: Store, task: str) -> Receipt:
    """Ingest's receipt of one shard."""
    try:
        value = json.loads(store.read_bytes(layout.receipt_path(INGEST, task)))
        return Receipt(**{**value, "files": [FileRecord(**f) for f in value["files"]]})
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DeclipError(
            f"shard {task!r} in {store.url!r} has no whole receipt, so it is not known to be whole "
            "itself; run declip run first."
        ) from error


def _check_whole(store: Store, receipt: Receipt) -> None:
    """Refuse to build on a damaged shard: its damage would be published as sound.

    Raises:
        DeclipError: a file is not the one of the receipt.
    """
    for record in receipt.files:
        if not store.exists(record.path) or store.sha256(record.path) != record.sha256:
            raise DeclipError(
                f"{record.path!r} in {store.url!r} is missing, damaged or was changed since "
                "ingest; delete it, and declip run fetches this shard again."
            )


def _results(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in RESULT_NAMES)


def _restore_results(store: Store, task: str, rows: Sequence[Row]) -> None:
    """Give the list's rows what ingest found, from the shard's parquet.

    Raises:
        DeclipError: the shard was made of another list.
    """
    path = layout.shard_parquet_path(task)
    found = {row["key"]: row for row in read_rows(store, path, ["key", "url", *RESULT_NAMES])}
    for row in rows:
        old = found.pop(row["key"], None)
        # A removed row has no URL left in the shard.
        if old is None or old["url"] not in (row["url"], None):
            raise DeclipError(
                f"row {row['key']!r} of {path!r} is not the list's: the list was changed since "
                "ingest; restore it, or ingest again with declip run."
            )
        row.update({name: old[name] for name in RESULT_NAMES})
    if found:
        raise DeclipError(
            f"{path!r} has {len(found)} rows more than the list, which was changed since ingest; "
            "restore it, or ingest again with declip run."
        )


def _failure_of(row: Row) -> FetchError:
    reason, _, detail = row["error_message"].partition(": ")
    return FetchError(reason, detail)


def _kept_outcome(row: Row) -> RowOutcome:
    """An earlier outcome as one of this run, without the picture, for checks on whole shards."""
    if row["status"] != "success":
        return RowOutcome(result=_failure_of(row), fetched=None, is_verified=True)
    names = ("width", "height", "original_width", "original_height", "sha256")
    result = DecodedImage(image=b"", **{name: row[name] for name in names})
    return RowOutcome(result=result, fetched=None, is_verified=True)


def _num_dns_failures(outcomes: Iterable[RowOutcome]) -> int:
    return sum(o.failure is not None and o.failure.reason == "dns_failure" for o in outcomes)


def _new_ledger(
    store: Store,
    task: str,
    rows: Sequence[Row],
    outcomes: Mapping[str, RowOutcome],
) -> list[LedgerRow]:
    """The shard's ledger after these attempts; a lost one is made again from what is known."""
    try:
        old = read_ledger_rows(store, task)
    except DeclipError:
        old = {}
    for row in rows:
        if row["key"] not in old:
            host = host_of(row["url"] or "")
            old[row["key"]] = LedgerRow(key=row["key"], url=row["url"], host=host)
    tried = [ledger_row(row, outcomes[row["key"]]) for row in rows if row["key"] in outcomes]
    ledger = {row.key: row for row in merge_rows(old, tried)}
    for row in rows:
        # Also rows that were not tried: their picture may have become one too many.
        failure = _failure_of(row) if row["status"] != "success" else None
        ledger[row["key"]] = dataclasses.replace(
            ledger[row["key"]],
            status=row["status"],
            reason=failure.reason if failure else "",
            detail=failure.detail if failure else "",
        )
    return list(ledger.values())


def stage_files(
    store: Store, transaction: str, files: Mapping[str, bytes | None]
) -> list[dict[str, str | None]]:
    """Write new files aside and tell their moves; nothing is decided yet.

    The worker's half of :func:`declip_shards.rewrite.prepare`.
    """
    moves: list[dict[str, str | None]] = []
    for number, (path, data) in enumerate(sorted(files.items())):
        staged = digest = None
        if data is not None:
            staged = f"{rewrite.FOLDER}/{transaction}/{number:05d}"
            store.write_bytes(staged, data)
            digest = hashlib.sha256(data).hexdigest()
        moves.append({"to": path, "from": staged, "sha256": digest})
    return moves
