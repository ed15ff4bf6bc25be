"""What has been done, what would rerun, and why, in words."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from declip_shards import Store, manifest
from declip_shards.manifest import Manifest
from declip_train.dataset_files import open_dataset
from pipelines.pipeline import Pipeline, Step


@dataclass(frozen=True, kw_only=True)
class StepState:
    """State of a step on disk."""

    step: str
    state: str
    """``done``, ``stale``, ``partial`` or ``new``."""
    why: str
    """Why it would run again; empty when done."""
    last: Manifest | None
    """Manifest of the last finished run, if any."""


def input_digests(store: Store, step: Step) -> dict[str, str]:
    """sha256 of each manifest that the step reads; empty string for one that is not there.

    And of the files of each folder that it watches.
    """
    source = open_dataset(step.data_root) if step.data_root else store
    digests = {name: manifest.manifest_digest(source, name) or "" for name in step.reads}
    for folder in step.watches:
        files = {name: store.sha256(f"{folder}/{name}") for name in store.list(folder)}
        digests[folder] = hashlib.sha256(manifest.canonical_json(files)).hexdigest()
    return digests


def _setting_changes(old: Mapping[str, object], new: Mapping[str, object], step: str) -> str:
    for name in sorted(set(old) | set(new)):
        if old.get(name) != new.get(name):
            return (
                f"{step}.{name.replace('_', '-')} changed from {old.get(name)} to {new.get(name)}"
            )
    return ""


def why_stale(store: Store, step: Step, last: Manifest) -> str:
    """Why a finished step no longer counts; empty when it does."""
    inputs = input_digests(store, step)
    settings = manifest.settings_of(step.stage, hashed_only=True)
    if change := _setting_changes(last.settings, settings, step.settings_of or step.name):
        return change
    if last.stage != type(step.stage).__name__:
        return f"it was made by {last.stage}, the recipe now has {type(step.stage).__name__}"
    if last.code_version != step.code_version:
        return f"code version changed from {last.code_version} to {step.code_version}"
    for name, digest in inputs.items():
        if last.inputs.get(name) != digest:
            return f"what it reads from {name} changed"
    if last.fingerprint != manifest.fingerprint(step.stage, step.code_version, inputs):
        return "its fingerprint changed"
    damaged = manifest.damaged_files(store, last)
    if damaged:
        return f"{damaged[0]} is missing or has another size"
    # What holds times is not hashed, and logs may be deleted; but where nothing else came of the
    # step, or its stage says so (the report's page), it is the result.
    results: Sequence[str] = getattr(step.stage, "VOLATILE_RESULTS", ())
    for path in last.volatile_files:
        if (not last.files or path in results) and not store.exists(path):
            return f"{path} is missing"
    return ""


def step_state(store: Store, step: Step, rerunning: Mapping[str, str]) -> StepState:
    """State of one step.

    Args:
        rerunning: earlier steps that are not done -> their state.
    """
    last = manifest.read_manifest(store, step.name)
    waits_for = [name for name in step.reads if name in rerunning]
    if last is None:
        num_done = len(manifest.read_receipts(store, step.name))
        if num_done:
            why = f"interrupted: {num_done} tasks are done and are kept"
            return StepState(step=step.name, state="partial", why=why, last=None)
        return StepState(step=step.name, state="new", why="never finished", last=None)
    why = why_stale(store, step, last)
    if not why and waits_for:
        why = f"reads {waits_for[0]}, which is {rerunning[waits_for[0]]}"
    return StepState(step=step.name, state="stale" if why else "done", why=why, last=last)


def pipeline_states(pipeline: Pipeline) -> list[StepState]:
    """State of every step, in order. Reads manifests only: no table, no shard."""
    store = Store(pipeline.root)
    rerunning: dict[str, str] = {}
    states = []
    for step in pipeline.steps:
        state = step_state(store, step, rerunning)
        if state.state != "done":
            rerunning[step.name] = {"stale": "out of date", "partial": "unfinished"}.get(
                state.state, "not done"
            )
        states.append(state)
    return states
