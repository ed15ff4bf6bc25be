"""The driver of a refetch: it decides what counts, and sums up the dataset anew."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from declip_ingest.refetch import INGEST, RefetchShards
from declip_ingest.stages import DownloadShards
from declip_shards import Store, energon, layout, manifest, rewrite
from declip_shards.manifest import FileRecord, Manifest, Receipt, canonical_json

STEP = "refetch"
"""What the run is called while it runs; it leaves no receipts of its own."""
KEPT_MANIFEST = f"{rewrite.FOLDER}/{INGEST}.json"
"""Ingest's manifest while shards are being replaced: none is in place that lists other bytes."""


class TaskEnd(Protocol):
    """How a task ended, as the pipelines' runners yield it."""

    @property
    def task(self) -> str:
        """Its name."""

    @property
    def receipt(self) -> Receipt | None:
        """Its stats; None where it failed."""

    @property
    def cause(self) -> str:
        """First cause of its failure."""


Runner = Callable[[str, str, Any, Sequence[str], str], Iterable[TaskEnd]]
"""``run(root, step, stage, tasks, digest)``: run_tasks or tasks_here of the pipelines."""


def commit_files(store: Store, moves: Sequence[Mapping[str, str | None]]) -> None:
    """Decide that staged files count, and move them: the driver's half."""
    transaction = next(m["from"] for m in moves if m["from"] is not None).split("/")[1]
    listing = f"{rewrite.FOLDER}/{transaction}/{rewrite.COMMIT}"
    store.write_bytes(listing, canonical_json(list(moves)))
    rewrite.commit(store, transaction)


@dataclass(frozen=True, kw_only=True)
class RefetchReport:
    """What a refetch did."""

    asked: Mapping[str, int]
    """Rows that were tried again, by the reason that they had failed for."""
    mended: Mapping[str, int]
    """Those that are pictures now, by the reason that they had failed for."""
    still: Mapping[str, int]
    """Those that failed again, by today's reason."""
    num_changed: int
    """Rows whose outcome is another one, repeated pictures that were dropped included."""
    failures: Mapping[str, str]
    """Shard -> first cause, of those that could not be done; they are as they were."""


def find_base(store: Store) -> Manifest | None:
    """Ingest's manifest, or the one that a killed refetch put away; None before ingest ended."""
    current = manifest.read_manifest(store, INGEST)
    if current is not None:
        return current
    try:
        value = json.loads(store.read_bytes(KEPT_MANIFEST))
        value["files"] = [FileRecord(**f) for f in value["files"]]
        kept = Manifest(**value)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    # Since then, another ingest may have begun: its receipts bear another fingerprint.
    receipts = manifest.read_receipts(store, INGEST).values()
    is_same = len(receipts) == kept.num_tasks and all(
        receipt.fingerprint == kept.fingerprint for receipt in receipts
    )
    return kept if is_same else None


def is_unfinished(store: Store) -> bool:
    """Whether a killed run has left something to finish in the dataset."""
    return bool(store.list_folders(rewrite.FOLDER)) or store.exists(KEPT_MANIFEST)


def finish(store: Store, base: Manifest | None) -> None:
    """Sum up ingest's receipts anew, under ingest's own fingerprint; forget the run's traces."""
    rewrite.recover(store)
    if base is not None:
        receipts = list(manifest.read_receipts(store, INGEST).values())
        summed = manifest.build_manifest(
            step=INGEST, stage=DownloadShards(), code_version="", inputs={}, receipts=receipts
        )
        same = {
            name: getattr(base, name)
            for name in ("stage", "fingerprint", "code_version", "settings", "inputs")
        }
        manifest.write_manifest(store, dataclasses.replace(summed, **same))
    # What Energon reads beside the tars counts all shards; their indexes were moved with them.
    for path, data in energon.refreshed(store, (), ()).items():
        if data is not None:
            store.write_bytes(path, data)
    store.remove(KEPT_MANIFEST)


def refetch(
    stage: RefetchShards,
    run: Runner,
    *,
    on_task: Callable[[int, int], None] = lambda num_asked, num_mended: None,
    check: Callable[[], None] = lambda: None,
) -> RefetchReport:
    """Fetch the asked rows again. Call it under the workspace's lock.

    Args:
        stage: which rows, of which dataset, how patiently.
        run: runs tasks; their stats come back as receipts.
        on_task: told of each shard's end, of its asked and its mended rows, for a progress bar.
        check: raises where the lock is lost; asked before anything is published.

    Raises:
        DeclipError: a transaction cannot be finished, or Ray cannot be started.
    """
    store = Store(stage.root)
    base = find_base(store)
    rewrite.recover(store)
    before = stage.asked_rows()
    tasks = sorted(before)
    asked: Counter[str] = Counter()
    still: Counter[str] = Counter()
    mended: Counter[str] = Counter()
    failures: dict[str, str] = {}
    num_changed, left = 0, set(tasks)
    if base is not None and tasks:
        data = canonical_json(dataclasses.asdict(base))
        store.write_bytes(KEPT_MANIFEST, data)
        store.remove(layout.manifest_path(INGEST))
    try:
        digest = hashlib.sha256(repr(stage).encode()).hexdigest()
        for end in run(stage.root, STEP, stage, tasks, digest) if tasks else ():
            check()
            receipt = end.receipt
            if receipt is None:
                failures[end.task] = end.cause
                on_task(0, 0)
                continue
            commit_files(store, receipt.extra["moves"])
            asked.update(before[end.task])
            still.update(receipt.reasons)
            mended.update(receipt.extra["mended"])
            num_changed += receipt.extra["changed"]
            on_task(receipt.num_in, receipt.num_out)
            left.discard(end.task)
        # After a full disk no further task is begun.
        failures |= {t: "it was not begun" for t in sorted(left) if t not in failures}
    finally:
        finish(store, base)
    return RefetchReport(
        asked=asked, mended=mended, still=still, num_changed=num_changed, failures=failures
    )
