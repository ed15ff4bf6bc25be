"""Run the steps of a pipeline: skip what is done, keep what stands, publish a manifest."""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from declip_shards import DeclipError, Stage, Store, TaskStats, layout, manifest
from declip_shards.errors import did_you_mean
from declip_shards.manifest import Manifest, Receipt
from pipelines import ray_runner
from pipelines.lock import workspace_lock
from pipelines.pipeline import Pipeline, Step
from pipelines.progress import Progress
from pipelines.states import input_digests, pipeline_states, why_stale

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


def run_task(
    store: Store, step: str, task: str, digest: str, work: Callable[[str], TaskStats]
) -> Receipt:
    """Do one task in this process and write its receipt last."""
    receipt = manifest.make_receipt(store, task, digest, work(task))
    manifest.write_receipt(store, step, receipt)
    return receipt


def run_here(
    root: str, step: str, stage: Stage, tasks: Sequence[str], digest: str
) -> Iterator[TaskResult]:
    """Tasks one after the other in this process; a task that raises does not stop the others."""
    store, work = Store(root), stage.worker()
    for task in tasks:
        try:
            yield task, run_task(store, step, task, digest, work), ""
        except DeclipError as error:
            yield task, None, str(error)
        except OSError as error:
            yield task, None, f"{type(error).__name__}: {error}"
        except Exception:  # a defect in one task must not lose the others' work
            yield task, None, traceback.format_exc()


def remove_outputs(store: Store, step: str) -> None:
    """Delete what earlier runs of this step left, by their receipts and nothing else."""
    receipts = manifest.read_receipts(store, step)
    store.remove(layout.manifest_path(step))
    for task, receipt in receipts.items():
        for path in [*(f.path for f in receipt.files), *receipt.volatile_files]:
            store.remove(path)
        store.remove(layout.receipt_path(step, task))


def pending_tasks(store: Store, step: Step, digest: str) -> tuple[list[str], dict[str, Receipt]]:
    """Tasks still to do, and the receipts of those that stand.

    A receipt counts when it carries today's fingerprint and its files are there; those of another
    fingerprint are removed with their files first, so that results are never mixed. Tasks are
    asked for before: a stage that refuses its input leaves earlier results as they were.
    """
    tasks = step.stage.tasks()
    receipts = manifest.read_receipts(store, step.name)
    if any(receipt.fingerprint != digest for receipt in receipts.values()):
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


def run_step(pipeline: Pipeline, step: Step, *, runner: str) -> StepReport:
    """Run one step if anything it reads or its settings have changed.

    Raises:
        DeclipError: tasks failed (all named, with their first causes).
    """
    store = Store(pipeline.root)
    last = manifest.read_manifest(store, step.name)
    why = why_stale(store, step, last) if last is not None else ""
    if last is not None and not why:
        return StepReport(
            step=step.name, skipped=True, num_in=last.num_in, num_out=last.num_out, seconds=0.0
        )
    start = time.monotonic()
    inputs = input_digests(store, step)
    digest = manifest.fingerprint(step.stage, step.code_version, inputs)
    # The service before anything is removed: where its port is taken, earlier results stay.
    with step.service() if step.service else contextlib.nullcontext():
        pending, receipts = pending_tasks(store, step, digest)
        store.remove(layout.manifest_path(step.name))
        _announce(step, len(pending), len(receipts), why)
        failures = _run_pending(pipeline, step, pending, receipts, digest, runner)
    if failures:
        raise DeclipError(_failure_text(step.name, failures, len(receipts)))
    result = manifest.build_manifest(
        step=step.name,
        stage=step.stage,
        code_version=step.code_version,
        inputs=inputs,
        receipts=list(receipts.values()),
    )
    manifest.write_manifest(store, result)
    seconds = time.monotonic() - start
    where = runner if step.on_ray else "local"
    write_run_record(store, result, seconds=seconds, runner=where)
    return StepReport(
        step=step.name,
        skipped=False,
        num_in=result.num_in,
        num_out=result.num_out,
        seconds=seconds,
        figures=_figures(result),
    )


def _figures(done: Manifest) -> str:
    """The plain figures of a step that has one task."""
    if done.num_tasks != 1:
        return ""
    (extra,) = list(done.extra.values()) or [{}]
    return ", ".join(f"{k} {v}" for k, v in extra.items() if isinstance(v, str | int | float))


def _announce(step: Step, num_pending: int, num_kept: int, why: str) -> None:
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
) -> dict[str, str]:
    """Run tasks into ``receipts``; return the failed ones with their first cause."""
    failures: dict[str, str] = {}
    if not pending:
        return failures
    run = ray_runner.run_on_ray if runner == "ray" and step.on_ray else run_here
    with Progress(step.name, len(pending) + len(receipts), len(receipts)) as bar:
        for task, receipt, cause in run(pipeline.root, step.name, step.stage, pending, digest):
            if receipt is None:
                failures[task] = cause
                bar.advance(0)
            else:
                receipts[task] = receipt
                bar.advance(receipt.num_in)
    return failures


def _failure_text(step: str, failures: Mapping[str, str], num_done: int) -> str:
    lines = [f"{len(failures)} of {len(failures) + num_done} tasks of {step!r} failed:"]
    lines += [f"  {task}: {cause.strip()}" for task, cause in sorted(failures.items())[:20]]
    if len(failures) > 20:
        lines.append(f"  ... and {len(failures) - 20} more")
    if num_done:
        lines.append("What is done is kept: run the same command again after mending it.")
    return "\n".join(lines)


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
    check_root(pipeline)
    check_upstream(pipeline, steps)
    reports = []
    with workspace_lock(Store(pipeline.root)), ray_runner.shut_down_after():
        for step in steps:
            report = run_step(pipeline, step, runner=runner)
            reports.append(report)
            _print_report(report)
    return reports


def _print_report(report: StepReport) -> None:
    if report.skipped:
        print(f"{report.step}: nothing to do ({report.num_in:,} in, {report.num_out:,} out)")
    else:
        figures = f" ({report.figures})" if report.figures else ""
        print(
            f"{report.step}: {report.num_in:,} in, {report.num_out:,} out, "
            f"{report.seconds:.1f} s{figures}",
            flush=True,
        )
