"""Run the steps of a pipeline: skip what is done, keep what stands, publish a manifest."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from declip_shards import (
    DeclipError,
    Stage,
    Store,
    energon,
    layout,
    manifest,
    open_worker,
    rewrite,
)
from declip_shards.errors import did_you_mean
from declip_shards.manifest import Manifest, Receipt
from declip_shards.optout import PENDING
from pipelines import ray_runner
from pipelines.failure_table import ingest_advice, reasons_table, tasks_table
from pipelines.lock import Hold, workspace_lock
from pipelines.other_data import require_other_data
from pipelines.pipeline import Pipeline, Step
from pipelines.progress import Progress
from pipelines.states import input_digests, pipeline_states, why_stale
from pipelines.stopping import stop_on_signals
from pipelines.task_end import FULL_DISK, TaskEnd, describe, free_bytes, size_text

TaskResult = tuple[str, Receipt | None, str]
"""(task, its receipt or None, first cause of its failure)."""
RUNNERS = ("ray", "local")
"""Where tasks run: on Ray (a cluster, or one started here), or in this process in turn."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What the terminal says of a step."""

    step: str
    skipped: bool
    num_in: int
    num_out: int
    seconds: float
    figures: str = ""
    """What a step of one task measured, such as an index's recall."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Why samples did not come through -> how many."""
    num_tasks: int = 1
    """0 where settings or data ask nothing of the step."""


def tasks_here(
    root: str, step: str, stage: Stage, tasks: Sequence[str], digest: str
) -> Iterator[TaskEnd]:
    """Tasks one after the other in this process; a task that raises does not stop the others.

    Unless it says that they would fail alike, as on a full disk. Receipts are not written.
    """
    store = Store(root)
    with open_worker(stage) as work:
        for task in tasks:
            try:
                receipt = manifest.make_receipt(store, task, digest, work(task))
            except Exception as error:  # a defect in one task must not lose the others' work
                cause, is_hopeless = describe(error, store)
                yield TaskEnd(task=task, cause=cause, is_hopeless=is_hopeless)
                if is_hopeless:
                    return
            else:
                yield TaskEnd(task=task, receipt=receipt)


def run_here(
    root: str, step: str, stage: Stage, tasks: Sequence[str], digest: str
) -> Iterator[TaskResult]:
    """Run tasks in this process and write the receipt of each."""
    store = Store(root)
    for end in tasks_here(root, step, stage, tasks, digest):
        if end.receipt is not None:
            manifest.write_receipt(store, step, end.receipt)
        yield end.task, end.receipt, end.cause


def remove_outputs(store: Store, step: str) -> None:
    """Delete what earlier runs of this step left, by their receipts and nothing else."""
    receipts = manifest.read_receipts(store, step)
    store.remove(layout.manifest_path(step))
    for task, receipt in receipts.items():
        for path in [*(f.path for f in receipt.files), *receipt.volatile_files]:
            store.remove(path)
        store.remove(layout.receipt_path(step, task))


def forget_outputs(store: Store, step: str) -> None:
    """Leave what earlier runs of this step made where it is, as nobody's."""
    store.remove(layout.manifest_path(step))
    for task in manifest.read_receipts(store, step):
        store.remove(layout.receipt_path(step, task))


def is_renamed(store: Store, step: Step) -> bool:
    """Whether the last finished run of a step wrote under another name than it will now."""
    last = manifest.read_manifest(store, step.name)
    name = getattr(step.stage, "name", None)
    return last is not None and name is not None and last.settings.get("name", name) != name


def pending_tasks(store: Store, step: Step, digest: str) -> tuple[list[str], dict[str, Receipt]]:
    """Tasks still to do, and the receipts of those that stand.

    A receipt counts when it carries today's fingerprint and its files are there; those of another
    fingerprint are removed with their files first, so that results are never mixed. Tasks are
    asked for before: a stage that refuses its input leaves earlier results as they were.
    """
    tasks = step.stage.tasks()
    receipts = manifest.read_receipts(store, step.name)
    if any(receipt.fingerprint != digest for receipt in receipts.values()):
        if is_renamed(store, step):
            # Another name is another thing beside the first, which its user keeps.
            forget_outputs(store, step.name)
        else:
            remove_outputs(store, step.name)
        receipts = {}
    kept, pending = {}, []
    for task in tasks:
        receipt = receipts.get(task)
        if receipt and step.stage.is_done(task) and _files_stand(store, receipt):
            kept[task] = receipt
        else:
            pending.append(task)
    return pending, kept


def _files_stand(store: Store, receipt: Receipt) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return all(store.size(f.path) == f.size for f in receipt.files)
    return False


def run_step(pipeline: Pipeline, step: Step, *, runner: str, hold: Hold) -> StepReport:
    """Run one step if anything it reads or its settings have changed.

    Args:
        pipeline: the pipeline.
        step: one of its steps.
        runner: where tasks run, one of :data:`RUNNERS`.
        hold: the right to write; asked for before anything is published.

    Raises:
        DeclipError: tasks failed (all named, with their first causes), or the hold is lost.
    """
    store = Store(pipeline.root)
    last = manifest.read_manifest(store, step.name)
    why = why_stale(store, step, last) if last is not None else ""
    if last is not None and not why:
        return StepReport(
            step=step.name,
            skipped=True,
            num_in=last.num_in,
            num_out=last.num_out,
            seconds=0.0,
            num_tasks=last.num_tasks,
        )
    start = time.monotonic()
    inputs = input_digests(store, step)
    digest = manifest.fingerprint(step.stage, step.code_version, inputs)
    # The service before anything is removed: where its port is taken, earlier results stay.
    with step.service() if step.service else contextlib.nullcontext():
        hold.check()
        pending, receipts = pending_tasks(store, step, digest)
        if pending and step.name == "ingest":
            energon.forget(store)  # an index of tars that are written anew would lead astray
        num_all = len(pending) + len(receipts)
        store.remove(layout.manifest_path(step.name))
        _announce(step, len(pending), len(receipts), why)
        with _full_disk_in_words(store, receipts, len(pending)):
            failed = _run_pending(pipeline, step, pending, receipts, digest, runner, hold)
    if failed:
        num_unstarted = num_all - len(receipts) - len(failed)
        raise DeclipError(_failure_text(store, step.name, failed, receipts, num_unstarted))
    result = manifest.build_manifest(
        step=step.name,
        stage=step.stage,
        code_version=step.code_version,
        inputs=inputs,
        receipts=list(receipts.values()),
    )
    hold.check()
    seconds = time.monotonic() - start
    with _full_disk_in_words(store, receipts, 0):
        getattr(step.stage, "sweep", lambda tasks: None)(sorted(receipts))
        manifest.write_manifest(store, result)
        where = runner if step.on_ray else "local"
        write_run_record(store, result, seconds=seconds, runner=where)
    return StepReport(
        step=step.name,
        skipped=False,
        num_in=result.num_in,
        num_out=result.num_out,
        seconds=seconds,
        figures=_figures(result),
        reasons=result.reasons,
        num_tasks=result.num_tasks,
    )


def _figures(done: Manifest) -> str:
    """The plain figures of a step that has one task."""
    if done.num_tasks != 1:
        return ""
    (extra,) = list(done.extra.values()) or [{}]
    return ", ".join(f"{k} {v}" for k, v in extra.items() if isinstance(v, str | int | float))


def _announce(step: Step, num_pending: int, num_kept: int, why: str) -> None:
    if not num_pending and not num_kept:
        return  # the settings, or the size of the dataset, ask for nothing here
    if why:
        print(f"{step.name}: runs again: {why}")
    kept = f" ({num_kept} already done)" if num_kept else ""
    noun = "task" if num_pending == 1 else "tasks"
    print(f"{step.name}: {step.summary or type(step.stage).__name__}: {num_pending} {noun}{kept}")
    sys.stdout.flush()


def _run_pending(
    pipeline: Pipeline,
    step: Step,
    pending: Sequence[str],
    receipts: dict[str, Receipt],
    digest: str,
    runner: str,
    hold: Hold,
) -> list[TaskEnd]:
    """Run tasks into ``receipts``; return those that failed."""
    failed: list[TaskEnd] = []
    if not pending:
        return failed
    store, kept = Store(pipeline.root), list(receipts.values())
    run = ray_runner.run_tasks if runner == "ray" and step.on_ray else tasks_here
    with Progress(
        step.name,
        len(pending) + len(kept),
        len(kept),
        num_in=sum(receipt.num_in for receipt in kept),
        num_out=sum(receipt.num_out for receipt in kept),
    ) as bar:
        for end in run(pipeline.root, step.name, step.stage, pending, digest):
            hold.check()
            if end.receipt is None:
                failed.append(end)
                bar.fail()
            else:
                # Here and not in the worker, which may outlive a killed run for a moment: what it
                # does then, for instance after the run's own HTTP server has gone, must not count.
                manifest.write_receipt(store, step.name, end.receipt)
                receipts[end.task] = end.receipt
                bar.advance(end.receipt.num_in, end.receipt.num_out)
    return failed


def _failure_text(
    store: Store,
    step: str,
    failed: Sequence[TaskEnd],
    receipts: Mapping[str, Receipt],
    num_unstarted: int,
) -> str:
    """Which tasks failed and why, and what it takes to go on."""
    num_all = len(receipts) + len(failed) + num_unstarted
    lines = [f"{len(failed)} of {num_all} tasks of {step!r} failed:", tasks_table(failed)]
    if num_unstarted:
        lines.append(f"{num_unstarted} more were not started: they would have failed alike.")
    if any(end.is_hopeless for end in failed):
        lines.append(_space_text(store, receipts, len(failed) + num_unstarted))
    if receipts:
        lines.append("What is done is kept: run the same command again after mending it.")
    return "\n".join(line for line in lines if line)


def _space_text(store: Store, receipts: Mapping[str, Receipt], num_left: int) -> str:
    """What the tasks that are left will write, going by those that are done, and what is free."""
    free = free_bytes(store)
    if not receipts or not num_left or free is None:
        return ""
    written = sum(record.size for receipt in receipts.values() for record in receipt.files)
    needed = size_text(written / len(receipts) * num_left)
    return (
        f"{size_text(free)} are free in {store.url!r}; the {num_left} tasks that are left need "
        f"about {needed}, going by those that are done."
    )


@contextlib.contextmanager
def _full_disk_in_words(
    store: Store, receipts: Mapping[str, Receipt], num_tasks: int
) -> Iterator[None]:
    """Say where there is no space, and how much it takes, when this process cannot write."""
    num_before = len(receipts)
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        num_left = num_before + num_tasks - len(receipts)
        more = _space_text(store, receipts, num_left)
        raise DeclipError(
            f"{describe(error, store)[0]}. {more} Make space and run the same command again: what "
            "is done is kept.".replace("  ", " ")
        ) from error


def write_run_record(store: Store, done: Manifest, *, seconds: float, runner: str) -> None:
    """Times of the last run: beside the manifest, never in it, so that manifests stay equal."""
    record = {
        "step": done.step,
        "seconds": round(seconds, 2),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "runner": runner,
    }
    store.write_bytes(f"manifests/{done.step}.run.json", json.dumps(record).encode())


def read_run_record(store: Store, step: str) -> dict[str, object]:
    """Times of a step's last run; empty where it never finished."""
    try:
        record: dict[str, object] = json.loads(store.read_bytes(f"manifests/{step}.run.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return record


def check_location(root: str) -> None:
    """Refuse an output folder that can be none: no name, an unknown kind of URL, a file."""
    if not root:
        raise DeclipError("--out is empty; name a folder or an fsspec URL.")
    try:
        store = Store(root)
    except (ValueError, ImportError) as error:
        raise DeclipError(
            f"the output folder {root!r} is of a kind that fsspec cannot open here ({error}); "
            "choose another --out, or install the package that serves it (s3fs, gcsfs, ...)."
        ) from error
    above = store.root
    while store.is_local and not os.path.exists(above):
        above = os.path.dirname(above)
    if store.is_local and not os.path.isdir(above):
        what = "is" if above == store.root else f"lies in {above!r}, which is"
        raise DeclipError(f"the output folder {root!r} {what} a file; choose another --out.")


def check_root(pipeline: Pipeline) -> None:
    """Refuse an output folder that cannot be written, or that holds somebody else's files."""
    check_location(pipeline.root)
    store = Store(pipeline.root)
    if store.list("shards", ".tar") and not store.fs.isdir(store.path("manifests")):
        raise DeclipError(
            f"{pipeline.root!r} has shards that no recipe of ours made; they are left alone: "
            "choose another --out."
        )
    store.check_writable()


def check_upstream(pipeline: Pipeline, steps: Sequence[Step]) -> None:
    """Refuse to build on steps that are left out of this run and are not done as now set.

    Otherwise ``--only train --filter.min-words 5`` would train on yesterday's selection.
    """
    chosen = {step.name for step in steps}
    states = {state.step: state for state in pipeline_states(pipeline)}
    for step in steps:
        if step.data_root:
            require_other_data(step)
            continue
        for name in step.reads:
            if name not in chosen and states[name].state != "done":
                raise DeclipError(
                    f"stage {step.name!r} reads {name!r}, which is {states[name].state} "
                    f"({states[name].why}) and is not part of this run; "
                    f"run it too: declip run {pipeline.recipe} --from {name}."
                )


def run_pipeline(
    pipeline: Pipeline, steps: Sequence[Step], *, runner: str = "ray"
) -> list[StepReport]:
    """Run ``steps`` in order; stop at the first that fails."""
    if runner not in RUNNERS:
        raise DeclipError(f"--runner is {runner!r}.{did_you_mean(runner, RUNNERS)}")
    if runner == "ray" and any(step.on_ray for step in steps):
        ray_runner.check_shared_root(pipeline.root)
    for step in steps:
        # Before hours of work for a step that cannot write there.
        getattr(step.stage, "check_output", lambda: None)()
    check_root(pipeline)
    check_upstream(pipeline, steps)
    reports = []
    store = Store(pipeline.root)
    with stop_on_signals(), workspace_lock(store) as hold, ray_runner.shut_down_after():
        for change in rewrite.recover(store):
            print(f"finished a change of several files that was cut short: {change}")
        if store.exists(PENDING):
            # Else what it changed would count as stale, and be made anew at a great cost.
            from pipelines.optout import finish_pending

            finish_pending(store)
        for step in steps:
            report = run_step(pipeline, step, runner=runner, hold=hold)
            reports.append(report)
            _print_report(report, pipeline.root)
    return reports


def _print_report(report: StepReport, root: str) -> None:
    if not report.num_tasks:
        print(f"{report.step}: not needed")
        return
    if report.skipped:
        print(f"{report.step}: nothing to do ({report.num_in:,} in, {report.num_out:,} out)")
        return
    figures = f" ({report.figures})" if report.figures else ""
    lines = [
        f"{report.step}: {report.num_in:,} in, {report.num_out:,} out, "
        f"{report.seconds:.1f} s{figures}"
    ]
    if report.step == "ingest":
        lines.append(reasons_table(report.reasons, report.num_in))
        lines.append(ingest_advice(report.reasons, root))
    print("\n".join(line for line in lines if line), flush=True)
