"""Publish manifests again after files were changed in place, so that what still holds stays done.

A stage's fingerprint covers the manifests that it reads. Where samples are taken out of the files
of a stage and of those after it alike, all of them agree again, and nothing needs to run; but each
manifest must name the new files, and each fingerprint the new manifests. A step that was out of
date before stays out of date.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from declip_filter import optout as filter_optout
from declip_shards import DeclipError, Store, layout, manifest, sidecars
from declip_shards.manifest import FileRecord, Manifest, Receipt, canonical_json

Changes = Mapping[str, bytes | None]
"""Relative path -> bytes that are about to be written; None for a file that is about to go."""


def read_manifests(store: Store) -> dict[str, Manifest]:
    """Every finished step's manifest, a step after those that it reads."""
    found: dict[str, Manifest] = {}
    for name in store.list("manifests", ".json"):
        step = name.removesuffix(".json")
        done = None if step.endswith(".run") else manifest.read_manifest(store, step)
        if done is not None:
            found[step] = done
    ordered: dict[str, Manifest] = {}

    def visit(step: str) -> None:
        if step in found and step not in ordered:
            for name in found[step].inputs:
                visit(name)
            ordered[step] = found[step]

    for step in sorted(found):
        visit(step)
    return ordered


def rechain(
    store: Store,
    *,
    tasks: Collection[str],
    changes: Changes,
    still_holds: Callable[[Manifest], bool],
) -> dict[str, bytes | None]:
    """New bytes of the receipts and manifests whose steps still hold after a change in place.

    Nothing is hashed that lies there: a file's record is that of the bytes in ``changes``, or the
    receipt's own (see :func:`record_changes`), so damage on the disk is never signed as sound.

    Args:
        store: the dataset, its shards and tables already changed.
        tasks: those (shards, usually) whose files have changed.
        changes: files that are written together with what is returned.
        still_holds: whether a step that reads what has changed has nothing to do because of it
            (a training that did not see the samples); the stages up to the neighbor table always
            hold, for their own files were changed in step.

    Returns:
        relative path -> bytes; nothing for a step that has to run again.
    """
    manifests = read_manifests(store)
    old = {step: manifest.manifest_digest(store, step) or "" for step in manifests}
    new = dict(old)
    result: dict[str, bytes | None] = {}
    for step, last in manifests.items():
        inputs = {n: new.get(n, d) if d == old.get(n) else d for n, d in last.inputs.items()}
        is_edited = last.stage == INGEST or last.stage in EDITED
        if not is_edited and (inputs == last.inputs or not still_holds(last)):
            continue
        receipts = manifest.read_receipts(store, step)
        if not _is_whole(last, receipts.values()):
            continue
        digest = _fingerprint(last, inputs)
        fresh = []
        for receipt in receipts.values():
            if is_edited and (receipt.task in tasks or last.stage in WHOLE_STAGES):
                receipt = _counted_again(store, last, receipt, changes)
            receipt = dataclasses.replace(receipt, fingerprint=digest)
            fresh.append(receipt)
            data = canonical_json(dataclasses.asdict(receipt))
            result[layout.receipt_path(step, receipt.task)] = data
        summed = canonical_json(dataclasses.asdict(_summed(last, inputs, digest, fresh)))
        result[layout.manifest_path(step)] = summed
        new[step] = hashlib.sha256(summed).hexdigest()
    return result


INGEST = "DownloadShards"
WHOLE_STAGES = (
    "ClusterImages",
    "FindDuplicates",
    "PlanFilter",
    "TrainIndex",
    "FillIndex",
    "BuildIndex",
    "BuildGraph",
)
"""Stages whose tasks are not shards: one of their files may hold samples of any."""
EDITED = (
    "MeasureImages",
    "ScorePairs",
    "FilterPairs",
    "EmbedPairs",
    "BuildNeighbors",
    *WHOLE_STAGES,
)
"""Stages whose files lose the samples without being run again."""


def _fingerprint(last: Manifest, inputs: Mapping[str, str]) -> str:
    """As :func:`declip_shards.manifest.fingerprint`, of a stage known by its manifest."""
    content = {
        "stage": last.stage,
        "settings": last.settings,
        "code_version": last.code_version,
        "inputs": dict(inputs),
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _is_whole(last: Manifest, receipts: Collection[Receipt]) -> bool:
    """Whether manifest and receipts are of one run; others are left to be run again."""
    return (
        last.fingerprint == _fingerprint(last, last.inputs)
        and len(receipts) == last.num_tasks
        and all(receipt.fingerprint == last.fingerprint for receipt in receipts)
    )


def _counted_again(store: Store, last: Manifest, receipt: Receipt, changes: Changes) -> Receipt:
    """A receipt of what the task's files are now."""
    figures = (
        _recount_ingest(store, receipt)
        if last.stage == INGEST
        else filter_optout.recount(
            store, last.stage, last.settings, receipt.task, receipt.extra, changes
        )
    )
    gone = {path for path, data in changes.items() if data is None}
    volatile = [p for p in receipt.volatile_files if p not in gone and store.exists(p)]
    return dataclasses.replace(
        receipt,
        files=_records(receipt, changes),
        volatile_files=volatile,
        **(figures or {}),
    )


def _record(old: FileRecord, changes: Changes) -> FileRecord | None:
    """Size and hash of a file as it is about to be; None where it is about to go."""
    if old.path not in changes:
        return old
    data = changes[old.path]
    if data is None:
        return None
    return FileRecord(path=old.path, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _records(receipt: Receipt, changes: Changes) -> list[FileRecord]:
    records = (_record(old, changes) for old in receipt.files)
    return [record for record in records if record is not None]


def whole_receipts(store: Store) -> dict[str, tuple[Manifest, dict[str, Receipt]]]:
    """Step -> its manifest and receipts by task, of the steps whose files are edited in place and
    that :func:`rechain` will publish again."""
    found = {}
    for step, last in read_manifests(store).items():
        if last.stage == INGEST or last.stage in EDITED:
            receipts = manifest.read_receipts(store, step)
            if _is_whole(last, receipts.values()):
                found[step] = last, receipts
    return found


def check_whole(store: Store, tasks: Collection[str]) -> None:
    """Refuse to build on damaged files: their damage would be published as sound.

    Files of the tasks (shards) that will change are compared with their receipts, and all files of
    the embeddings and of tasks that are no shards: an index names the digest of every vector.

    Raises:
        DeclipError: a file is not the one of its receipt.
    """
    steps = whole_receipts(store)
    is_indexed = any(last.stage == "BuildIndex" for last, _ in steps.values())
    for step, (last, receipts) in steps.items():
        is_all = last.stage in WHOLE_STAGES or (is_indexed and last.stage == "EmbedPairs")
        for task, receipt in receipts.items():
            for record in receipt.files if is_all or task in tasks else ():
                _check_file(store, step, record)


def _check_file(store: Store, step: str, record: FileRecord) -> None:
    if store.exists(record.path) and store.sha256(record.path) == record.sha256:
        return
    raise DeclipError(
        f"{record.path!r} in {store.url!r} is missing, damaged or was changed since step {step!r} "
        "wrote it; nothing was removed: delete that file, make it again with declip run, then "
        "give the list again."
    )


def record_changes(
    steps: Mapping[str, tuple[Manifest, dict[str, Receipt]]], changes: Changes
) -> dict[str, bytes | None]:
    """New bytes of the receipts that list files of ``changes``, to be replaced with them.

    Only the files are recorded; :func:`rechain` counts anew and signs. A kill between the two then
    leaves nothing to be hashed from the disk.

    Args:
        steps: of :func:`whole_receipts`; the new receipts take the old ones' place in it, for the
            next shard may have files of the same task.
        changes: files that are about to be written.
    """
    result: dict[str, bytes | None] = {}
    for step, (_, receipts) in steps.items():
        for task, receipt in receipts.items():
            if any(record.path in changes for record in receipt.files):
                receipts[task] = dataclasses.replace(receipt, files=_records(receipt, changes))
                content = canonical_json(dataclasses.asdict(receipts[task]))
                result[layout.receipt_path(step, task)] = content
    return result


def _recount_ingest(store: Store, receipt: Receipt) -> dict[str, Any]:
    """Figures of a shard from its rows, as ingest counts them."""
    rows = sidecars.read_rows(
        store, layout.shard_parquet_path(receipt.task), ["status", "error_message"]
    )
    reasons = Counter(
        (row["error_message"] or "").partition(":")[0] for row in rows if row["status"] != "success"
    )
    return {
        "num_in": len(rows),
        "num_out": len(rows) - reasons.total(),
        "reasons": dict(sorted(reasons.items())),
    }


def _summed(
    last: Manifest, inputs: Mapping[str, str], digest: str, receipts: Sequence[Receipt]
) -> Manifest:
    """As :func:`declip_shards.manifest.build_manifest` sums receipts up."""
    ordered = sorted(receipts, key=lambda r: r.task)
    reasons: Counter[str] = Counter()
    for receipt in ordered:
        reasons.update(receipt.reasons)
    return dataclasses.replace(
        last,
        fingerprint=digest,
        inputs=dict(sorted(inputs.items())),
        num_in=sum(r.num_in for r in ordered),
        num_out=sum(r.num_out for r in ordered),
        reasons=dict(sorted(reasons.items())),
        files=sorted((f for r in ordered for f in r.files), key=lambda f: f.path),
        volatile_files=sorted(p for r in ordered for p in r.volatile_files),
        extra={r.task: dict(r.extra) for r in ordered if r.extra},
    )
