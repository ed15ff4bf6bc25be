"""Receipts of tasks, manifests of stages, and the fingerprint that decides about a rerun."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from declip_shards import layout
from declip_shards.errors import DeclipError
from declip_shards.stage import TaskStats
from declip_shards.store import Store

FORMAT_VERSION = 1
"""Of manifests and receipts; a reader refuses a higher one."""
FINGERPRINT_KEY = "fingerprint"
"""Field metadata ``{"fingerprint": False}`` marks a setting that cannot change the output."""


def canonical_json(value: Any) -> bytes:
    """The one way we write JSON that is hashed: sorted keys, two-space indent, a final newline."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def settings_of(stage: Any, *, hashed_only: bool) -> dict[str, Any]:
    """A stage's fields as plain JSON values."""
    fields = (
        f
        for f in dataclasses.fields(stage)
        if f.metadata.get(FINGERPRINT_KEY, True) or not hashed_only
    )
    plain: dict[str, Any] = json.loads(
        json.dumps({f.name: getattr(stage, f.name) for f in fields}, default=dataclasses.asdict)
    )
    return plain


def fingerprint(stage: Any, code_version: str, inputs: Mapping[str, str]) -> str:
    """Hash of a stage's settings, its code version and the manifests it reads."""
    content = {
        "stage": type(stage).__name__,
        "settings": settings_of(stage, hashed_only=True),
        "code_version": code_version,
        "inputs": dict(inputs),
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of a manifest."""

    path: str
    """Relative to the dataset's root."""
    size: int
    """Bytes."""
    sha256: str
    """Hex digest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """That a task is done: its figures and its files, written after them."""

    task: str
    fingerprint: str
    num_in: int
    num_out: int
    reasons: Mapping[str, int]
    files: Sequence[FileRecord]
    volatile_files: Sequence[str]
    extra: Mapping[str, Any]
    format_version: int = FORMAT_VERSION


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished stage left on disk. The same for a clean run and a killed and rerun one."""

    step: str
    stage: str
    fingerprint: str
    code_version: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    num_tasks: int
    num_in: int
    num_out: int
    reasons: Mapping[str, int]
    files: Sequence[FileRecord]
    volatile_files: Sequence[str]
    extra: Mapping[str, Any]
    format_version: int = FORMAT_VERSION


def make_receipt(store: Store, task: str, stage_fingerprint: str, stats: TaskStats) -> Receipt:
    """Check a task's count, hash its files.

    Raises:
        DeclipError: ``num_in != num_out + sum(reasons)``: samples went missing without a reason.
    """
    accounted = stats.num_out + sum(stats.reasons.values())
    if stats.num_in != accounted:
        raise DeclipError(
            f"task {task!r} read {stats.num_in} samples but accounts for {accounted}: "
            "a defect of the stage; nothing of it is published."
        )
    return Receipt(
        task=task,
        fingerprint=stage_fingerprint,
        num_in=stats.num_in,
        num_out=stats.num_out,
        reasons=dict(sorted(stats.reasons.items())),
        files=[
            FileRecord(path=path, size=store.size(path), sha256=store.sha256(path))
            for path in sorted(stats.files)
        ],
        volatile_files=sorted(stats.volatile_files),
        extra=dict(stats.extra),
    )


def _parse(data: bytes, what: str) -> dict[str, Any] | None:
    """The JSON of a receipt or manifest; None for a torn one, an error for one from the future."""
    try:
        value = json.loads(data)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    if value.get("format_version", 0) > FORMAT_VERSION:
        raise DeclipError(
            f"{what} was written by a newer version (format {value['format_version']}, this one "
            f"reads up to {FORMAT_VERSION}); upgrade opendeclip."
        )
    value["files"] = [FileRecord(**f) for f in value.get("files", [])]
    return value


def write_receipt(store: Store, step: str, receipt: Receipt) -> None:
    store.write_bytes(
        layout.receipt_path(step, receipt.task), canonical_json(dataclasses.asdict(receipt))
    )


def read_receipts(store: Store, step: str) -> dict[str, Receipt]:
    """Receipts by task; a torn one counts as absent."""
    receipts = {}
    for name in store.list(f"manifests/{step}", ".json"):
        path = f"manifests/{step}/{name}"
        value = _parse(store.read_bytes(path), path)
        if value is not None:
            receipts[value["task"]] = Receipt(**value)
    return receipts


def build_manifest(
    *,
    step: str,
    stage: Any,
    code_version: str,
    inputs: Mapping[str, str],
    receipts: Sequence[Receipt],
) -> Manifest:
    """Sum up the receipts; neither the order of tasks nor their number of workers matters."""
    ordered = sorted(receipts, key=lambda r: r.task)
    reasons: Counter[str] = Counter()
    for receipt in ordered:
        reasons.update(receipt.reasons)
    return Manifest(
        step=step,
        stage=type(stage).__name__,
        fingerprint=fingerprint(stage, code_version, inputs),
        code_version=code_version,
        settings=settings_of(stage, hashed_only=True),
        inputs=dict(sorted(inputs.items())),
        num_tasks=len(ordered),
        num_in=sum(r.num_in for r in ordered),
        num_out=sum(r.num_out for r in ordered),
        reasons=dict(sorted(reasons.items())),
        files=sorted((f for r in ordered for f in r.files), key=lambda f: f.path),
        volatile_files=sorted(p for r in ordered for p in r.volatile_files),
        extra={r.task: dict(r.extra) for r in ordered if r.extra},
    )


def write_manifest(store: Store, manifest: Manifest) -> None:
    store.write_bytes(
        layout.manifest_path(manifest.step), canonical_json(dataclasses.asdict(manifest))
    )


def read_manifest(store: Store, step: str) -> Manifest | None:
    """The manifest of a finished stage; None where there is none, or only a torn one."""
    path = layout.manifest_path(step)
    try:
        value = _parse(store.read_bytes(path), path)
    except FileNotFoundError:
        return None
    return None if value is None else Manifest(**value)


def manifest_digest(store: Store, step: str) -> str | None:
    """sha256 of a manifest's bytes: how a later stage names what it reads."""
    path = layout.manifest_path(step)
    return store.sha256(path) if store.exists(path) else None


def damaged_files(store: Store, manifest: Manifest, *, deep: bool = False) -> list[str]:
    """Files of ``manifest`` that are gone or have another size (``deep``: another hash)."""
    damaged = []
    for record in manifest.files:
        try:
            same = store.size(record.path) == record.size
        except FileNotFoundError:
            same = False
        if not same or (deep and store.sha256(record.path) != record.sha256):
            damaged.append(record.path)
    return damaged
