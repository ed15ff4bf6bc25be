"""Steps that recipes share, and the settings of several steps that must agree."""

import dataclasses
import functools
import os
from typing import Any

from declip_filter import (
    BuildIndex,
    BuildNeighbors,
    EmbedPairs,
    FilterPairs,
    MeasureImages,
)
from declip_ingest.stages import DownloadShards
from declip_ingest.table import table_digest
from declip_shards import DeclipError
from declip_shards.manifest import settings_of
from declip_train.stages import TrainModel
from pipelines.evaluate import FACTORY
from pipelines.pipeline import Pipeline, Step


def read_steps(root: str, ingest: DownloadShards, **filters: Any) -> list[Step]:
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


def derive_pairs(pipeline: Pipeline, *, needs_table: bool = True) -> Pipeline:
    """Find the table from where the command is given, and let its content count, not its place.

    Args:
        pipeline: after the user's settings.
        needs_table: whether a table that does not exist is refused; else it is left as it is named.

    Raises:
        DeclipError: the table does not exist.
    """
    pipeline = carry_names(pipeline)
    ingest: Any = pipeline.step("ingest").stage
    is_here = True
    if "://" not in ingest.table:
        ingest = dataclasses.replace(ingest, table=os.path.abspath(ingest.table))
        is_here = os.path.exists(ingest.table)
        if needs_table and not is_here:
            raise DeclipError(
                f"table {ingest.table!r} does not exist; name yours with --ingest.table FILE."
            )
    pinned = pin_table(ingest) if is_here else ingest
    steps = [
        dataclasses.replace(step, stage=pinned) if step.name == "ingest" else step
        for step in pipeline.steps
    ]
    return dataclasses.replace(pipeline, steps=steps)


NEIGHBOR_STEPS = ("embed", "index", "neighbors")
"""What is run for the sake of the neighbor table alone."""


def derive_training(pipeline: Pipeline, *, needs_table: bool = True) -> Pipeline:
    """As :func:`derive_pairs`, without the steps that make a neighbor table which nobody reads.

    Raises:
        DeclipError: the table does not exist, or a step that is left out was given settings.
    """
    train = pipeline.step("train").stage
    assert isinstance(train, TrainModel)
    if train.uses_index:
        return derive_pairs(pipeline, needs_table=needs_table)
    for name in NEIGHBOR_STEPS:
        stage: Any = pipeline.step(name).stage
        for setting, value in settings_of(stage, hashed_only=False).items():
            standard = settings_of(type(stage)(root=pipeline.root), hashed_only=False)[setting]
            if value != standard:
                flag = f"--{name}.{setting.replace('_', '-')}"
                raise DeclipError(
                    f"{flag} is {value}, but training reads no neighbor table (method "
                    f"{train.method}, neighbor_source {train.neighbor_source}); leave it out, or "
                    "choose --train.neighbor-source index with a method that has neighbors."
                )
    pipeline = derive_pairs(pipeline, needs_table=needs_table)
    steps = [
        dataclasses.replace(
            step, reads=tuple(name for name in step.reads if name not in NEIGHBOR_STEPS)
        )
        for step in pipeline.steps
        if step.name not in NEIGHBOR_STEPS
    ]
    return dataclasses.replace(pipeline, steps=steps)


def allow_missing_table(pipeline: Pipeline) -> Pipeline:
    """The same pipeline, which may be derived before its URL table is there (to look at it)."""
    derive = pipeline.derive
    if derive not in (derive_pairs, derive_training):
        return pipeline
    return dataclasses.replace(pipeline, derive=functools.partial(derive, needs_table=False))


def pin_table(ingest: DownloadShards) -> DownloadShards:
    """Put the table's digest into the fingerprint, so that another list is another run.

    A digest that the user gives is left, and the stage refuses a table of another one.
    """
    if ingest.table_sha256:
        return ingest
    return dataclasses.replace(ingest, table_sha256=table_digest(ingest.table_location()))
