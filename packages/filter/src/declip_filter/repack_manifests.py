"""Manifests of a repacked dataset, so that what was carried over counts as done there.

A step's manifest is taken over, with its files and figures as they are now, where its work was
carried over and was up to date. In place of ingest stands :data:`STEP`, which lists no file: what a
step lists goes when its settings change, and shards that were copied cannot be downloaded again.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import declip_shards
from declip_filter import optout
from declip_filter.embeddings import part_path, partition_name, read_part
from declip_filter.index_files import index_path, info_path, rows_path
from declip_filter.repack_state import STEP, mark_path
from declip_filter.repack_state import is_repacked as is_repacked
from declip_shards import Store, TaskStats, layout, manifest, neighbor_tables, sidecars
from declip_shards.manifest import Manifest, Receipt, canonical_json

STAGE = "CheckRepacked"
"""Its stage."""
INGEST = "DownloadShards"

FOLLOWERS = ("PlanFilter", "TrainIndex", "FillIndex", "BuildGraph")
"""Stages that work for another one alone, which has used what they left: nothing is carried."""
TABLES: Mapping[str, Callable[[str, str], str]] = {
    "MeasureImages": layout.signals_path,
    "ScorePairs": layout.signals_path,
    "FilterPairs": layout.selection_path,
    "BuildNeighbors": layout.neighbors_path,
}
"""Stages with a task and a table a shard."""

Files = dict[str, bytes]


def manifest_files(store: Store, target: Store, outputs: Sequence[str]) -> Files:
    """Receipts and manifests of the steps that need not run in the target; that of
    :data:`STEP` comes last.

    Args:
        store: the input.
        target: the repacked dataset, all other files written.
        outputs: its shards.
    """
    own = _step_manifest(target, outputs)
    digests = {STEP: hashlib.sha256(own).hexdigest()}
    files: Files = {}
    for last in _finished_steps(store):
        inputs = _inputs_now(store, last, digests)
        tasks = None if inputs is None else _tasks_of(target, last, outputs)
        if inputs is None or tasks is None:
            continue
        made = dataclasses.replace(last, inputs=inputs)
        digest = _fingerprint(made)
        receipts = [
            manifest.make_receipt(target, task, digest, stats) for task, stats in tasks.items()
        ]
        for receipt in receipts:
            path = layout.receipt_path(last.step, receipt.task)
            files[path] = canonical_json(dataclasses.asdict(receipt))
        summed = canonical_json(dataclasses.asdict(_summed(made, digest, receipts)))
        files[layout.manifest_path(last.step)] = summed
        digests[last.step] = hashlib.sha256(summed).hexdigest()
    return files | {mark_path(): own}


def _step_manifest(target: Store, outputs: Sequence[str]) -> bytes:
    """The manifest that :class:`declip_filter.repack.CheckRepacked` would leave."""
    import declip_filter

    num = sum(sidecars.num_rows(target, layout.shard_parquet_path(output)) for output in outputs)
    rooms = {"declip_shards": declip_shards, "declip_filter": declip_filter}
    made = Manifest(
        step=STEP,
        stage=STAGE,
        fingerprint="",
        code_version=", ".join(f"{name} {room.__version__}" for name, room in rooms.items()),
        settings={},
        inputs={},
        num_tasks=1,
        num_in=num,
        num_out=num,
        reasons={},
        files=[],
        volatile_files=[],
        extra={},
    )
    return canonical_json(
        dataclasses.asdict(dataclasses.replace(made, fingerprint=_fingerprint(made)))
    )


def _finished_steps(store: Store) -> list[Manifest]:
    """The input's manifests, a step after those that it reads."""
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
    return list(ordered.values())


def _inputs_now(store: Store, last: Manifest, digests: Mapping[str, str]) -> dict[str, str] | None:
    """What the step reads in the target; None where it was out of date, or lacks one of them."""
    if last.stage in (INGEST, STAGE):
        return None
    inputs = {}
    for step, digest in last.inputs.items():
        if manifest.manifest_digest(store, step) != digest:
            return None
        before = manifest.read_manifest(store, step)
        now = STEP if before is not None and before.stage in (INGEST, STAGE) else step
        if now not in digests:
            return None
        inputs[now] = digests[now]
    return inputs


def _tasks_of(target: Store, last: Manifest, outputs: Sequence[str]) -> dict[str, TaskStats] | None:
    """The tasks of a step as they are now; None where its work was not carried over."""
    files = _files_of(target, last, outputs)
    if files is None or not all(target.exists(path) for path in chain(*files.values())):
        return None
    tasks = {}
    for task, paths in files.items():
        figures = optout.recount(target, last.stage, last.settings, task, {}, {})
        if figures is None:
            tables = [path for path in paths if path.endswith(".parquet")]
            num = sum(sidecars.num_rows(target, path) for path in tables)
            figures = {"num_in": num, "num_out": num}
        tasks[task] = TaskStats(**figures, files=paths)
    return tasks


def _files_of(target: Store, last: Manifest, outputs: Sequence[str]) -> dict[str, list[str]] | None:
    """What each task of a step has left in the target, if it was carried over; None for a step
    that has nothing to do with it, such as a training."""
    name = str(last.settings.get("name", ""))
    if last.stage in FOLLOWERS:
        return {}
    if last.stage == "BuildIndex":
        return {"all": [index_path(name), rows_path(name), info_path(name)]}
    if last.stage == "FindDuplicates":
        return {"all": [layout.signals_path(name, output) for output in outputs]}
    if last.stage == "EmbedPairs":
        return {output: _embedding_files(target, name, output, outputs) for output in outputs}
    if last.stage not in TABLES:
        return None
    files = {output: [TABLES[last.stage](name, output)] for output in outputs}
    described = neighbor_tables.description_path(name)
    if last.stage == "BuildNeighbors" and target.exists(described):
        files[outputs[0]].append(described)  # as the stage itself lists it
    return files


def _embedding_files(target: Store, name: str, output: str, outputs: Sequence[str]) -> list[str]:
    path = part_path(name, output)
    if not target.exists(path):
        return [path]
    part = read_part(target, name, output)
    kinds = [*part.kinds, "metadata"] if part.num_rows else []
    partition = partition_name(output, outputs)
    return [*(layout.embedding_path(name, kind, partition) for kind in kinds), path]


def _fingerprint(made: Manifest) -> str:
    """As :func:`declip_shards.manifest.fingerprint`, of a stage known by its manifest."""
    content = {
        "stage": made.stage,
        "settings": made.settings,
        "code_version": made.code_version,
        "inputs": dict(made.inputs),
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _summed(made: Manifest, digest: str, receipts: Sequence[Receipt]) -> Manifest:
    """The manifest of these receipts."""
    ordered = sorted(receipts, key=lambda receipt: receipt.task)
    reasons: dict[str, int] = {}
    for receipt in ordered:
        for reason, count in receipt.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return dataclasses.replace(
        made,
        fingerprint=digest,
        num_tasks=len(ordered),
        num_in=sum(receipt.num_in for receipt in ordered),
        num_out=sum(receipt.num_out for receipt in ordered),
        reasons=dict(sorted(reasons.items())),
        files=sorted((f for r in ordered for f in r.files), key=lambda record: record.path),
        volatile_files=[],
        extra={},
    )
