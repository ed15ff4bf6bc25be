"""The training loop."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist

import declip_train
from declip_shards import DeclipError
from declip_shards.manifest import canonical_json
from declip_shards.store import atomic_write
from declip_train.checkpoint import Checkpoints, file_digest, tag_of
from declip_train.checkpoint_export import exact_module, export_model
from declip_train.dataset_files import output_folder
from declip_train.engine import StepRecord, TrainEngine
from declip_train.epoch_tables import EpochTables
from declip_train.export import Scalar
from declip_train.failed_samples import PATH as FAILED_SAMPLES
from declip_train.failed_samples import FailedSample, failure_lines
from declip_train.heart import Heart
from declip_train.hf_clip import HFTextCLIP, text_model_digest
from declip_train.loader import Batch, BatchLoader
from declip_train.monitor import Meters, Monitor, require_wandb
from declip_train.online_eval import OnlineEvaluation
from declip_train.pretrained import pretrained_digest
from declip_train.samples import TrainingSamples, training_samples
from declip_train.settings import TrainSettings
from declip_train.supervision import StopSwitch, hold_file
from declip_train.wordnet import WordNet

FOLDER = "train"
EXPORT = f"{FOLDER}/export"
MARK = f"{FOLDER}/export.json"
"""Written after the export: what it is of, and its files' hashes."""


def say(line: str) -> None:
    """One line for the person who watches; they read standard error of process 0."""
    print(f"train: {line}", file=sys.stderr, flush=True)


def say_by_rank(line: str) -> None:
    """:func:`say` of any process: what all of them must agree on can be compared."""
    say(line if dist.get_rank() == 0 else f"process {dist.get_rank()}: {line}")


def run_identity(settings: TrainSettings, samples: TrainingSamples) -> dict[str, Any]:
    """What the result of a run depends on, but for the order of sums: not how many processes share
    it, nor the versions of libraries (a checkpoint's ``made_by`` has those)."""
    return {
        "method": settings.method,
        "settings": settings.elastic_digest(),
        "samples": samples.digest(),
        "wordnet": WordNet(settings.wordnet).digest() if settings.wordnet else "",
        "text_model": text_model_digest(settings),
        "pretrained": pretrained_digest(settings),
    }


def made_by() -> dict[str, Any]:
    """What else stands behind a result: a run may be continued under another of each."""
    return {
        "world_size": dist.get_world_size(),
        "backend": str(dist.get_backend()),
        "versions": f"declip_train {declip_train.__version__}, torch {version('torch')}, "
        f"deepspeed {version('deepspeed')}",
    }


def run_name(identity: dict[str, Any]) -> str:
    """Short name of a run: the same for equal identities."""
    return hashlib.sha256(canonical_json(identity)).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is ready to train."""

    folder: Path
    loader: BatchLoader
    engine: TrainEngine
    checkpoints: Checkpoints
    identity: dict[str, Any]
    """What its result depends on."""
    tables: EpochTables | None
    """Which neighbor table each epoch reads; None where none is read."""
    lock: BinaryIO | None
    """Open as long as the run lasts (process 0)."""


def hold_folder(folder: Path) -> BinaryIO | None:
    """Keep other runs out of ``folder`` until this process ends; process 0 alone holds the lock.

    A run that was killed a moment ago may still be writing its last checkpoint: it gets the time
    that it takes to notice and stop. The lock is the kernel's, and goes with its process.

    Raises:
        DeclipError: another run is still there after that.
    """
    if dist.get_rank():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return hold_file(folder / "lock")


def prepare(settings: TrainSettings) -> Run:
    """Read the samples, build the model, open the folder of checkpoints."""
    require_wandb(settings)
    folder = output_folder(settings.root) / FOLDER
    lock = hold_folder(folder)
    samples = training_samples(settings)
    identity = run_identity(settings, samples)
    tables = None
    if settings.uses_index:
        tables = EpochTables(settings, samples, run=run_name(identity), say=say_by_rank)
    loader = BatchLoader(samples, settings, dist.get_rank(), dist.get_world_size(), tables=tables)
    checkpoints = Checkpoints(
        folder / "checkpoints" / run_name(identity),
        identity,
        keep=settings.keep_checkpoints,
        say=say,
        keep_every=settings.keep_every_steps,
        in_background=settings.async_save,
    )
    return Run(
        folder=folder,
        loader=loader,
        engine=TrainEngine(
            settings,
            loader.num_steps,
            folder=folder,
            keys_of=samples.keys_of,
            say=say if dist.get_rank() == 0 else None,
        ),
        checkpoints=checkpoints,
        identity=identity,
        tables=tables,
        lock=lock,
    )


def train(
    settings: TrainSettings,
    stop: StopSwitch,
    *,
    heart: Heart | None = None,
    show_progress: bool = True,
) -> bool:
    """Train from the newest whole checkpoint, or from nothing, to the end; then export.

    Every process calls this under an initialized process group.

    Returns:
        True when the run is complete, False when it stopped early because it was asked to; a rerun
        then goes on from the same step.
    """
    heart = heart or Heart()
    run = prepare(settings)
    loader, engine, num_steps = run.loader, run.engine, run.loader.num_steps
    evaluation = OnlineEvaluation.of_run(
        settings,
        num_steps=num_steps,
        device=engine.device,
        num_threads=loader.num_threads,
        say=say,
    )
    heart.beat(0, "restore")
    step = run.checkpoints.restore(engine.deepspeed)
    if run.tables is not None:
        run.tables.start(loader.epochs_of(step)[0], run.checkpoints.restored)
    monitor = open_monitor(run, step, show_progress) if dist.get_rank() == 0 else None
    try:
        step = take_steps(run, step, stop, heart, monitor, evaluation)
    except DeclipError:
        # Those since the last gathering: they may be why it ends.
        note_failures(run, loader.take_failures())
        raise
    heart.beat(step, "save")
    run.checkpoints.finish()
    heart.beat(step, "export")
    if monitor is not None:
        monitor.close()
    if dist.get_rank() == 0 and step == num_steps:
        run.checkpoints.prune(1)
        export(settings, engine, run, step)
    dist.barrier()
    return step == num_steps


def open_monitor(run: Run, step: int, show_progress: bool) -> Monitor:
    """The records of a run that goes on after ``step`` steps."""
    settings = run.loader.settings
    return Monitor(
        run.folder,
        num_steps=run.loader.num_steps,
        start_step=step,
        every=settings.log_every_steps,
        show=show_progress,
        settings=settings,
        run=run_name(run.identity),
        meters=Meters.of_run(
            settings,
            num_steps=run.loader.num_steps,
            device=run.engine.device,
            phases=run.engine.phases,
            clock=run.loader.clock,
            loader_threads=run.loader.num_threads,
        ),
    )


def take_steps(
    run: Run,
    step: int,
    stop: StopSwitch,
    heart: Heart,
    monitor: Monitor | None,
    evaluation: OnlineEvaluation | None,
) -> int:
    """Train from ``step`` to the end, or until somebody asks to stop; returns the steps done."""
    loader, engine, settings = run.loader, run.engine, run.loader.settings
    saved_at = time.monotonic()
    heart.beat(step, "wait")
    for batch in engine.phases.watched(loader.batches(step, engine.device)):
        heart.beat(step, "compute")
        if run.tables is not None:
            run.tables.begin(batch.epoch, step)
        late = 0 < settings.checkpoint_every_seconds <= time.monotonic() - saved_at
        record = engine.train_step(batch, stop_asked=stop.is_on, save_asked=late)
        step += 1
        is_last = step == loader.num_steps
        run.checkpoints.poll()
        accuracy: dict[str, float] = {}
        if evaluation is not None and evaluation.is_due(step):
            heart.beat(step, "evaluate")
            with engine.phases.phase("eval"):
                accuracy = evaluation.run(engine.module)
        if monitor is not None:
            monitor.step(
                step,
                {**step_numbers(run, batch, record, step), **accuracy},
                loader.wait_seconds,
                settings.global_batch_size,
                text_length=float(batch.lengths["token_ids"].float().mean()),
                always=bool(accuracy),
            )
        if is_last or step % settings.log_every_steps == 0:
            gather_failures(run)
        every = settings.checkpoint_every_steps
        due = every is not None and step % every == 0
        if due or record.save_asked or record.stop_asked or is_last:
            heart.beat(step, "save")
            save(run, batch, step)
            saved_at = time.monotonic()
        if record.stop_asked:
            break
        heart.beat(step, "wait")
    return step


def save(run: Run, batch: Batch, step: int) -> None:
    """Write a checkpoint after ``step`` steps, the last of them with ``batch``; a collective
    operation.

    Raises:
        DeclipError: a weight is not finite, or some process cannot write.
    """
    run.engine.require_finite_weights(step)
    more = None
    if run.tables is not None:
        more = run.tables.state(run.loader.epochs_of(batch.step)[-1])
    with run.engine.phases.phase("save"):
        run.checkpoints.save(run.engine.deepspeed, step, more)


def note_failures(run: Run, failures: list[FailedSample]) -> None:
    """Add samples to the list of those that failed."""
    if failures:
        with (run.folder / Path(FAILED_SAMPLES).name).open("ab") as file:
            file.write(failure_lines(failures))


def gather_failures(run: Run) -> None:
    """Write down which samples failed on any process, and hold their number against the budget; a
    collective operation.

    Raises:
        DeclipError: too many did; on every process.
    """
    own = run.loader.take_failures()
    everyone = [own]
    if dist.get_world_size() > 1:
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, own)
    failures = [failure for some in everyone for failure in some]
    if dist.get_rank() == 0:
        note_failures(run, failures)
    run.loader.count_failures(failures)


def step_numbers(run: Run, batch: Batch, record: StepRecord, step: int) -> dict[str, float | str]:
    """What the log says of a step; ``step`` counts it as done."""
    numbers: dict[str, float | str] = {
        **record.terms,
        **record.metrics,
        **record.watched,
        "logit_scale": record.logit_scale,
        "learning_rate": record.learning_rate,
        "epoch": step / run.loader.steps_per_epoch,
    }
    if run.loader.settings.precision in ("bf16", "fp16"):
        numbers["skipped"] = float(record.skipped)
    if run.tables is not None:
        numbers |= run.tables.record(batch.epoch, step)
    return numbers


def export(settings: TrainSettings, engine: TrainEngine, run: Run, step: int) -> None:
    """Write the trained model, then the mark that names its bytes."""
    identity = run.identity
    root = output_folder(settings.root)
    module = engine.module
    if settings.precision in ("bf16", "fp16"):
        # What was trained are the optimizer's float32 weights; the module has a rounded copy.
        module = exact_module(settings, run.checkpoints.folder / tag_of(step))
    clip = module.clip
    if isinstance(clip, HFTextCLIP) and not clip.open_clip_reads_it:
        say(
            f"the export is in open_clip's form, but open_clip itself builds no text tower of kind "
            f"{clip.text.kind}: it can be read by declip_train.export.load_export alone."
        )
    tables: dict[str, Scalar] = {}
    if run.tables is not None:
        tables["neighbor_tables"] = run.tables.history
    paths = export_model(
        clip,
        module.heads,
        root / EXPORT,
        settings,
        {**tables, **identity, **made_by()},
        run=run_name(identity),
        step=step,
    )
    files = {path.name: file_digest(path) for path in paths}
    atomic_write(root / MARK, canonical_json({**identity, "steps": step, "files": files}))
    # Runs of other settings that were never finished: kept as long as this one might have been
    # given up for them, of no use now.
    checkpoints = root / FOLDER / "checkpoints"
    for other in checkpoints.iterdir():
        if other.name != run_name(identity):
            shutil.rmtree(other)
