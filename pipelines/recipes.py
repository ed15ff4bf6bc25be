"""Recipes: functions that return a pipeline; the docstring holds command and expectations."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from declip_filter import Encoder, register_encoder
from declip_ingest.stages import DownloadShards
from declip_shards import DeclipError, Store
from declip_shards.errors import did_you_mean
from declip_train.stages import TrainModel
from pipelines.demo_server import DemoServer
from pipelines.evaluate import EvaluateModel
from pipelines.pipeline import Pipeline, Step
from pipelines.prepare import FOLDER, PrepareDemo
from pipelines.repack_recipe import repack
from pipelines.report import WriteReport
from pipelines.training_recipes import TRAINING_RECIPES
from pipelines.wiring import carry_names, derive_pairs, list_steps, pin_table, read_steps


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
        *read_steps(
            root,
            # Long strips are left for the filter to drop: that it does is part of the demo.
            DownloadShards(
                root=root,
                image_size=64,
                resize_mode="border",
                max_aspect_ratio=None,
                timeout_seconds=3.0,
            ),
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
                stage = pin_table(stage)  # not the one whose manifest this step reads
            step = dataclasses.replace(
                step,
                stage=stage,
                service=lambda: DemoServer(Store(pipeline.root).local_path(folder), port),
            )
        steps.append(step)
    return dataclasses.replace(pipeline, steps=steps)


def pairs(root: str) -> Pipeline:
    """Your own lists of URLs and captions, from shards to a DeCLIP ViT-B/32.

    Command: declip run pairs --sources.lists FILE --ingest.user-agent-contact YOU
    Data: CC3M, CC12M, YFCC100M, YFCC15M, LAION, DataComp or COYO as they are published, or any
    parquet, CSV, TSV, JSON or JSON lines (docs/sources.md). A table of url and caption that
    needs no reading can go to --ingest.table instead.
    Model: DeCLIP by its published recipe, batch 4,096 (it wants GPUs); start with
    --train.model ViT-Ti-8-48 on a laptop.
    Expect: shards/, selection/, index/, neighbors/ and train/export/, which open_clip loads.
    """
    steps = [
        *list_steps(root, DownloadShards(root=root), keep_splits=()),
        Step(
            name="train",
            stage=TrainModel(root=root),
            reads=("ingest", "filter", "neighbors"),
            summary="train under the deepspeed launcher",
        ),
    ]
    return Pipeline(recipe="pairs", root=root, steps=steps, derive=derive_pairs)


def _lazy_checkpoint_encoder(model: str, *, root: str, device: str) -> Encoder:
    """The encoder of our own exports; torch is loaded when one is asked for."""
    from pipelines.encoders import checkpoint_encoder

    return checkpoint_encoder(model, root=root, device=device)


register_encoder("checkpoint", _lazy_checkpoint_encoder)

RECIPES: dict[str, Callable[[str], Pipeline]] = {
    "demo": demo,
    "pairs": pairs,
    "repack": repack,
    **TRAINING_RECIPES,
}
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
    width = max(map(len, RECIPES)) + 2
    return "\n".join(f"  {name:<{width}}{describe(name).splitlines()[0]}" for name in RECIPES)


def finish(pipeline: Pipeline) -> None:
    """Print what a run is for: the table of results and the paths of report and model card."""
    store = Store(pipeline.root)
    if store.exists("eval/table.txt"):
        print("\n" + store.read_bytes("eval/table.txt").decode().rstrip())
    if store.exists("report/report.html"):
        print(f"\nReport: {store.path('report/report.html')}")
    if store.exists("report/model_card.md"):
        print(f"Model card: {store.path('report/model_card.md')}")
