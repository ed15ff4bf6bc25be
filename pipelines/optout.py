"""Take samples out of a dataset that is built, and prove that they are gone.

The order of the writes: the list and the plan (from then on every later ingest honors the list); a
transaction a shard (tar, parquet, stats, ledger, signals, selection, embeddings, neighbors); one
for what is of the whole dataset (index, receipts, manifests, results that showed a sample); the
proof, with which the plan goes. Killed anywhere and run again, it ends with the same bytes.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from declip_filter import optout as filter_optout
from declip_filter.neighbor_graph import drop_from_graph
from declip_filter.repack_state import is_repacked
from declip_shards import Store, energon, layout, rewrite, sidecars
from declip_shards import optout as shards_optout
from declip_shards.manifest import Manifest, canonical_json
from declip_shards.optout import LIST, PENDING, OptOut, load_optout, make_optout
from pipelines.lock import workspace_lock
from pipelines.optout_list import Entry
from pipelines.optout_plan import (
    FORMAT_VERSION,
    Plan,
    count_rows,
    make_plan,
    read_plan,
)
from pipelines.optout_proof import Proof, make_search, search_dataset
from pipelines.rechain import check_whole, rechain, record_changes, whole_receipts

REPACKED = "repacked"
"""Folder of the datasets that were repacked from this one."""
SIZES = "shards/sizes.json"
SHOWING = ("eval", "report")
"""Folders of results: a file that shows a removed sample goes, and its step runs again."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an opt-out came to."""

    report: dict[str, Any]
    """As in ``optout/report-DIGEST.json``."""
    path: str
    """Of the report in the dataset."""
    is_changed: bool
    """Whether a file of the dataset was changed."""
    was_cut_short: bool = False
    """Whether an earlier opt-out that was killed was brought to its end first."""
    repacked: tuple[str, ...] = ()
    """Proofs of the datasets that were repacked from this one, which lie inside it."""


def report_path(given: OptOut) -> str:
    """Where the proof of a list's removal lies: the same for every order of the list."""
    return f"{shards_optout.FOLDER}/report-{given.name()[:16]}.json"


def plan_only(store: Store, entries: Sequence[Entry]) -> Plan:
    """What :func:`opt_out` would do; nothing is written."""
    return make_plan(store, make_optout(entries))


def opt_out(store: Store, entries: Sequence[Entry]) -> Outcome:
    """Remove the samples that the list names, everywhere, and write the proof.

    Args:
        store: the dataset.
        entries: URLs, keys and hashes, in any order.

    Raises:
        DeclipError: another run holds the folder, there is no shard, or a file that would change
            is damaged; nothing has been changed then.
    """
    # Copies go first: the proof searches them, too.
    copies, num_changed = _opt_out_of_copies(store, entries)
    outcome = _opt_out_here(store, make_optout(entries))
    return dataclasses.replace(
        outcome, is_changed=outcome.is_changed or bool(num_changed), repacked=copies
    )


def _opt_out_of_copies(store: Store, entries: Sequence[Entry]) -> tuple[tuple[str, ...], int]:
    """Remove the samples from what was repacked out of this dataset; one that was not finished
    goes as a whole, for it is made again from what remains.

    Returns:
        Paths of the proofs, and how many datasets were changed.
    """
    proofs, num_changed = [], 0
    for name in store.list_folders(REPACKED):
        folder = f"{REPACKED}/{name}"
        copy = Store(f"{store.url.rstrip('/')}/{folder}")
        if not is_repacked(copy):
            with workspace_lock(store):
                store.remove_folder(folder)
            num_changed += 1
            continue
        outcome = opt_out(copy, entries)
        proofs.append(f"{folder}/{outcome.path}")
        num_changed += outcome.is_changed
    return tuple(proofs), num_changed


def _opt_out_here(store: Store, given: OptOut) -> Outcome:
    """:func:`opt_out` of the dataset itself."""
    path = report_path(given)
    with workspace_lock(store):
        rewrite.recover(store)
        was_cut_short = finish_pending(store)
        plan = make_plan(store, given)
        listed = load_optout(store)
        is_known = (listed | given | plan.added).lasting() == listed
        if is_known and not plan.removed and not plan.quarantined and store.exists(path):
            report = json.loads(store.read_bytes(path))
            return Outcome(
                report=report, path=path, is_changed=was_cut_short, was_cut_short=was_cut_short
            )
        check_whole(store, _edited_tasks(store, plan))
        begin(store, plan)
        report = finish(store, plan)
    return Outcome(report=report, path=path, is_changed=True, was_cut_short=was_cut_short)


def finish_pending(store: Store) -> bool:
    """Bring an opt-out to its end that was cut short; call it under the lock, after recovery.

    Returns:
        Whether there was one.
    """
    plan = read_plan(store)
    if plan is not None:
        finish(store, plan)
    return plan is not None


def begin(store: Store, plan: Plan) -> None:
    """Publish the list, for every later ingest, and the plan, for whoever finishes this."""
    listed = load_optout(store) | plan.given | plan.added
    _replace(store, "optout-begin", {LIST: listed.pack(), PENDING: plan.pack()})


def finish(store: Store, plan: Plan) -> dict[str, Any]:
    """Carry a published plan out; what is done already is not done again.

    Returns:
        The report, which is written last.
    """
    keys = plan.keys
    own: dict[str, set[str]] = {}
    for sample in plan.removed:
        own.setdefault(sample.shard, set()).add(sample.key)
    steps = whole_receipts(store)
    for shard in plan.touched:
        changes = shards_optout.drop_from_shard(store, shard, own.get(shard, set()))
        changes |= filter_optout.drop_from_sidecars(store, shard, keys)
        changes |= record_changes(steps, changes)
        _replace(store, f"optout-{shard}", changes)
    _replace(store, "optout-dataset", _dataset_changes(store, plan))
    report = make_report(store, plan)
    done = {report_path(plan.given): canonical_json(report), PENDING: None}
    _replace(store, "optout-proof", done)
    return report


def _replace(store: Store, transaction: str, changes: dict[str, bytes | None]) -> None:
    if changes:
        rewrite.prepare(store, transaction, changes)
        rewrite.commit(store, transaction)


def _dataset_changes(store: Store, plan: Plan) -> dict[str, bytes | None]:
    """New bytes of what is not a shard's: indexes, results, receipts and manifests."""
    changes: dict[str, bytes | None] = dict.fromkeys(plan.quarantined)
    if not plan.removed and not plan.quarantined:
        return changes
    shards = layout.list_shards(store)
    for name in store.list_folders("index"):
        changes |= filter_optout.drop_from_index(store, name, plan.keys, shards)
    for name in store.list_folders("neighbors"):
        changes |= drop_from_graph(store, name, plan.keys)
    search = make_search(plan.removed, plan.shared)
    shown = search_dataset(store, search, (), SHOWING)
    changes |= dict.fromkeys(hit.path for hit in shown.hits)
    changes |= energon.refreshed(store, plan.touched, plan.keys)
    changes |= _sizes(store, plan)
    changes |= rechain(
        store,
        tasks=_edited_tasks(store, plan),
        changes=changes,
        still_holds=lambda last: _still_holds(plan, last),
    )
    return changes


def _sizes(store: Store, plan: Plan) -> dict[str, bytes | None]:
    """The new ``sizes.json`` of a repacked dataset: how many samples each tar has."""
    if not store.exists(SIZES):
        return {}
    sizes = json.loads(store.read_bytes(SIZES))
    for shard in {sample.shard for sample in plan.removed}:
        statuses = sidecars.read_table(store, layout.shard_parquet_path(shard), ["status"])
        sizes[f"{shard}.tar"] = statuses.column(0).to_pylist().count("success")
    return {SIZES: canonical_json(sizes)}


def _edited_tasks(store: Store, plan: Plan) -> set[str]:
    """Shards with a file that changes or goes."""
    shards = layout.list_shards(store) if plan.quarantined else ()
    return {*plan.touched, *(_shard_of(path, shards) for path in plan.quarantined)}


def _shard_of(quarantined: str, shards: Sequence[str]) -> str:
    name = quarantined.rpartition("/")[2]
    return next((shard for shard in shards if name.startswith(shard)), "")


def _still_holds(plan: Plan, last: Manifest) -> bool:
    """Whether a finished training or evaluation had read nothing that was removed."""
    if last.stage == "TrainModel":
        (run,) = [run for run in plan.trainings if run.step == last.step]
        return not run.keys and not run.neighbor_keys
    if last.stage == "EvaluateModel":
        has_trained = any(run.keys or run.neighbor_keys for run in plan.trainings)
        return not has_trained and not any(sample.was_stored for sample in plan.removed)
    return False


def make_report(store: Store, plan: Plan) -> dict[str, Any]:
    """The proof: rows before and after, and a search of every file for what was removed."""
    search = make_search(plan.removed, plan.shared)
    digests = {d for sample in plan.removed for d in sample.digests} - set(plan.shared)
    proof = search_dataset(store, search, digests) if plan.removed else Proof()
    after = count_rows(store)
    unmatched = sorted(set(plan.given.pairs()) - set(plan.matched))
    return {
        "format_version": FORMAT_VERSION,
        "list": {
            "digest": plan.given.name(),
            "entries": dict(sorted(Counter(kind for kind, _ in plan.given.pairs()).items())),
            "matched": len(plan.matched),
            "unmatched": [{"kind": kind, "digest": digest} for kind, digest in unmatched],
        },
        "removed": {
            "rows": len(plan.removed),
            "samples": sum(sample.was_stored for sample in plan.removed),
            "keys": sorted(plan.keys),
        },
        "artefacts": {
            name: {what: [number, after.get(name, {}).get(what, 0)] for what, number in own.items()}
            for name, own in sorted(plan.before.items())
        },
        "search": {
            "needles": dict(sorted(Counter(search.labels.values()).items())),
            "shared": len(plan.shared),
            "files": proof.num_files,
            "bytes": proof.num_bytes,
            "emptied_rows_that_keep_their_key": proof.num_kept_keys,
            "hits": [dataclasses.asdict(hit) for hit in proof.hits],
        },
        "trainings": [dataclasses.asdict(run) for run in plan.trainings],
    }
