"""Recipes: functions that return a pipeline; the docstring holds command and expectations."""

import dataclasses
import inspect
import os
from collections.abc import Callable
from typing import Any

from declip_filter import (
    BuildIndex,
    BuildNeighbors,
    EmbedPairs,
    Encoder,
    FilterPairs,
    MeasureImages,
    register_encoder,
)
from declip_ingest.stages import DownloadShards
from declip_ingest.table import table_digest
from declip_shards import DeclipError, Store
from declip_shards.errors import did_you_mean
from declip_train.stages import TrainModel
from pipelines.demo_server import DemoServer
from pipelines.evaluate import FACTORY, EvaluateModel
from pipelines.pipeline import Pipeline, Step
from pipelines.prepare import FOLDER, PrepareDemo
from pipelines.report import WriteReport


def _read_steps(root: str, ingest: DownloadShards, **filters: Any) -> list[Step]:
    """From a URL table to a neighbor table; every step may run on a cluster."""
    return [
        Step(
            name="ingest",
            stage=ingest,
            on_ray=True,
            summary="download and shard the pairs of the URL table",
        ),
        Step(
            name="measure",
            stage=MeasureImages(root=root),
            reads=("ingest",),
            on_ray=True,
            summary="measure every picture and caption",
        ),
        Step(
            name="filter",
            stage=FilterPairs(root=root, **filters),
            reads=("measure",),
            on_ray=True,
            summary="keep or drop, with a named reason",
        ),
        Step(
            name="embed",
            stage=EmbedPairs(root=root),
            reads=("ingest", "filter"),
            on_ray=True,
            summary="embed the kept captions",
        ),
        Step(
            name="index",
            stage=BuildIndex(root=root),
            reads=("embed",),
            on_ray=True,
            summary="build the FAISS index and measure its recall",
        ),
        Step(
            name="neighbors",
            stage=BuildNeighbors(root=root),
            reads=("embed", "index"),
            on_ray=True,
            summary="look up each pair's nearest other captions",
        ),
    ]


def demo(root: str) -> Pipeline:
    """The whole job on real data, on one machine, in about a quarter of an hour.

    Command: declip run demo (or make demo).
    Data: emoji drawn by nine vendors, grocery photos, museum pictures and wallpapers out of PyPI
    and npm packages; one vendor and 175 concepts are held out; 180 rows fail or should be dropped.
    Model: DeCLIP with all of its terms on a ViT of 48 pixels, two processes, ZeRO-1.
    Expect: zero-shot top-1 and retrieval recall@5 many times chance; a table and an HTML report.
    """
    steps = [
        Step(
            name="prepare",
            stage=PrepareDemo(root=root),
            summary="fetch packages, draw pictures, write the URL table",
        ),
        *_read_steps(
            root,
            DownloadShards(root=root, image_size=64, timeout_seconds=3.0),
            min_words=1,
            min_chars=2,
        ),
        Step(
            name="train",
            stage=TrainModel(root=root, **DEMO_TRAINING),
            reads=("ingest", "filter", "neighbors"),
            summary="train DeCLIP under the deepspeed launcher",
        ),
        Step(
            name="eval",
            # Weaker regularization takes L-BFGS a minute and is never chosen on this data.
            stage=EvaluateModel(root=root, probe_l2_strengths=(0.1, 1.0, 10.0, 100.0)),
            reads=("ingest", "filter", "train"),
            summary="zero-shot, linear probe and retrieval on what was held out",
        ),
        Step(
            name="report",
            stage=WriteReport(root=root),
            reads=("prepare", "ingest", "measure", "filter", "index", "neighbors", "train", "eval"),
            summary="draw the result",
        ),
    ]
    steps[1] = dataclasses.replace(steps[1], reads=("prepare",))
    return Pipeline(recipe="demo", root=root, steps=steps, derive=_derive_demo)


DEMO_TRAINING: dict[str, Any] = {
    "model": "ViT-Ti-8-48",
    "augmentation": "demo",
    "num_ranks": 2,
    "zero_stage": 1,
    "global_batch_size": 256,
    "epochs": 8.0,
    "warmup_steps": 40,
    "projector_dim": 256,
    "predictor_hidden_dim": 64,
    "checkpoint_every_seconds": 60.0,
    "log_every_steps": 5,
}
"""What the demo's training changes; everything else is DeCLIP's published recipe."""


NAMES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("measure", "name", (("filter", "signals"),)),
    ("filter", "name", (("embed", "selection"), ("train", "selection"), ("report", "selection"))),
    ("embed", "name", (("index", "embeddings"),)),
    ("index", "name", (("neighbors", "index"),)),
    ("neighbors", "name", (("train", "neighbors"), ("report", "neighbors"))),
    ("train", "model", (("eval", "model"),)),
)
"""Where a name is set, and the settings of later steps that must be the same."""


def carry_names(pipeline: Pipeline) -> Pipeline:
    """Let a name that is set once reach the steps that read what it names.

    A setting that the user gave another value than its own default is left as it is.
    """
    stages: dict[str, Any] = {step.name: step.stage for step in pipeline.steps}
    for source, setting, readers in NAMES:
        for reader, field in readers:
            if source not in stages or reader not in stages:
                continue
            stage, value = stages[reader], getattr(stages[source], setting)
            if getattr(stage, field) == getattr(type(stage), field):
                stages[reader] = dataclasses.replace(stage, **{field: value})
    embed = stages["embed"]
    if embed.encoder.startswith("checkpoint:") and not embed.encoder_factory:
        # Worker processes know this kind by its dotted path alone.
        stages["embed"] = dataclasses.replace(embed, encoder_factory=FACTORY)
    steps = [dataclasses.replace(step, stage=stages[step.name]) for step in pipeline.steps]
    return dataclasses.replace(pipeline, steps=steps)


def _derive_demo(pipeline: Pipeline) -> Pipeline:
    """Let the port and all names, set once, reach the steps that must agree on them."""
    pipeline = carry_names(pipeline)
    prepare = pipeline.step("prepare").stage
    assert isinstance(prepare, PrepareDemo)
    port, folder = prepare.port, FOLDER
    steps = []
    for step in pipeline.steps:
        stage: Any = step.stage
        if step.name == "ingest":
            allowed = stage.allow_addresses or (f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}")
            stage = dataclasses.replace(stage, allow_addresses=allowed)
            if stage.table != DownloadShards.table:
                stage = _pin_table(stage)  # not the one whose manifest this step reads
            step = dataclasses.replace(
                step,
                stage=stage,
                service=lambda: DemoServer(Store(pipeline.root).local_path(folder), port),
            )
        steps.append(step)
    return dataclasses.replace(pipeline, steps=steps)


def pairs(root: str) -> Pipeline:
    """Your own URL table, from shards to a DeCLIP ViT-B/32.

    Command: declip run pairs --ingest.table FILE --ingest.user-agent-contact YOU
    Data: any parquet, CSV, TSV or JSON lines with the columns url and caption (other names:
    --ingest.url-column, --ingest.caption-column).
    Model: DeCLIP by its published recipe, batch 4,096 (it wants GPUs); start with
    --train.model ViT-Ti-8-48 on a laptop.
    Expect: shards/, selection/, index/, neighbors/ and train/export/, which open_clip loads.
    """
    steps = [
        *_read_steps(root, DownloadShards(root=root, table="pairs.parquet"), keep_splits=()),
        Step(
            name="train",
            stage=TrainModel(root=root),
            reads=("ingest", "filter", "neighbors"),
            summary="train under the deepspeed launcher",
        ),
    ]
    return Pipeline(recipe="pairs", root=root, steps=steps, derive=_derive_pairs)


def _derive_pairs(pipeline: Pipeline) -> Pipeline:
    """Find the table from where the command is given, and let its content count, not its place."""
    pipeline = carry_names(pipeline)
    ingest: Any = pipeline.step("ingest").stage
    if "://" not in ingest.table:
        ingest = dataclasses.replace(ingest, table=os.path.abspath(ingest.table))
        if not os.path.exists(ingest.table):
            raise DeclipError(
                f"table {ingest.table!r} does not exist; name yours with --ingest.table FILE."
            )
    pinned = _pin_table(ingest)
    steps = [
        dataclasses.replace(step, stage=pinned) if step.name == "ingest" else step
        for step in pipeline.steps
    ]
    return dataclasses.replace(pipeline, steps=steps)


def _pin_table(ingest: DownloadShards) -> DownloadShards:
    """Put the table's digest into the fingerprint, so that another list is another run.

    A digest that the user gives is left, and the stage refuses a table of another one.
    """
    if ingest.table_sha256:
        return ingest
    return dataclasses.replace(ingest, table_sha256=table_digest(ingest.table_location()))


def _lazy_checkpoint_encoder(model: str, *, root: str, device: str) -> Encoder:
    """The encoder of our own exports; torch is loaded when one is asked for."""
    from pipelines.encoders import checkpoint_encoder

    return checkpoint_encoder(model, root=root, device=device)


register_encoder("checkpoint", _lazy_checkpoint_encoder)

RECIPES: dict[str, Callable[[str], Pipeline]] = {"demo": demo, "pairs": pairs}
"""Every recipe by its name."""


def build(name: str, root: str) -> Pipeline:
    """The recipe's pipeline, before overrides.

    Raises:
        DeclipError: no such recipe; the nearest name is offered.
    """
    if name not in RECIPES:
        raise DeclipError(f"there is no recipe {name!r}.{did_you_mean(name, RECIPES)}")
    return RECIPES[name](root)


def describe(name: str) -> str:
    """A recipe's docstring."""
    build(name, "runs")
    return inspect.cleandoc(RECIPES[name].__doc__ or "")


def listing() -> str:
    """A line a recipe."""
    return "\n".join(f"  {name:<10}{describe(name).splitlines()[0]}" for name in RECIPES)


def finish(pipeline: Pipeline) -> None:
    """Print what a run is for: the table of results and the path of the report."""
    store = Store(pipeline.root)
    if store.exists("eval/table.txt"):
        print("\n" + store.read_bytes("eval/table.txt").decode().rstrip())
    if store.exists("report/report.html"):
        print(f"\nReport: {store.path('report/report.html')}")
