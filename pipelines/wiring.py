"""Steps that recipes share, and the settings of several steps that must agree."""

import dataclasses
import functools
import glob
import os
from typing import Any

from declip_filter import (
    BuildIndex,
    BuildNeighbors,
    EmbedPairs,
    FilterPairs,
    MeasureImages,
)
from declip_ingest.sources import ReadPairs, pin_lists
from declip_ingest.stages import DownloadShards
from declip_ingest.table import table_digest
from declip_shards import DeclipError
from declip_shards.manifest import settings_of
from declip_train.stages import TrainModel
from pipelines.evaluate import FACTORY
from pipelines.pipeline import Pipeline, Step


def list_steps(root: str, ingest: DownloadShards, **filters: Any) -> list[Step]:
    """From lists of URLs as the field has them to a neighbor table."""
    steps = read_steps(root, ingest, **filters)
    sources = Step(
        name="sources",
        stage=ReadPairs(root=root),
        summary="read, check and join the lists of URLs and captions",
    )
    return [sources, dataclasses.replace(steps[0], reads=("sources",)), *steps[1:]]


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
    """Find lists and tables from where the command is given, and let their content count, not
    their place. A table given to ingest itself takes the place of the step that reads lists.

    Args:
        pipeline: after the user's settings.
        needs_table: whether a list that does not exist is refused; else it is left as it is named.

    Raises:
        DeclipError: no list is named, one does not exist, or a list and a table are both named.
    """
    pipeline = carry_names(pipeline)
    sources: Any = pipeline.step("sources").stage
    ingest: Any = pipeline.step("ingest").stage
    if ingest.table != DownloadShards.table:
        return _with_own_table(pipeline, sources, ingest, needs_table=needs_table)
    if not sources.lists and needs_table:
        raise DeclipError(
            "no list is named; name yours with --sources.lists FILE (CC3M, CC12M, YFCC, LAION, "
            "DataComp, COYO, or any table with URLs and captions: docs/sources.md)."
        )
    if needs_table or all(_is_there(location) for location in sources.locations()):
        sources = pin_lists(sources)
    return _replace(pipeline, sources=sources, ingest=pin_digests(ingest, needs=needs_table))


def _with_own_table(
    pipeline: Pipeline, sources: ReadPairs, ingest: DownloadShards, *, needs_table: bool
) -> Pipeline:
    """Without the step that reads lists: ingest reads a table of the user's as it is."""
    for setting, value in settings_of(sources, hashed_only=False).items():
        if value != settings_of(ReadPairs(root=pipeline.root), hashed_only=False)[setting]:
            raise DeclipError(
                f"--sources.{setting.replace('_', '-')} and --ingest.table exclude each other: "
                "lists are read into a table of their own; leave one of them out."
            )
    is_here = True
    if "://" not in ingest.table:
        ingest = dataclasses.replace(ingest, table=os.path.abspath(ingest.table))
        is_here = os.path.exists(ingest.table)
        if needs_table and not is_here:
            raise DeclipError(
                f"table {ingest.table!r} does not exist; name yours with --ingest.table FILE."
            )
    ingest = pin_table(ingest) if is_here else ingest
    pipeline = _replace(pipeline, ingest=pin_digests(ingest, needs=needs_table))
    steps = [
        dataclasses.replace(step, reads=tuple(name for name in step.reads if name != "sources"))
        for step in pipeline.steps
        if step.name != "sources"
    ]
    return dataclasses.replace(pipeline, steps=steps)


def _is_there(location: str) -> bool:
    return "://" in location or bool(glob.glob(os.path.expanduser(location)))


def _replace(pipeline: Pipeline, **stages: Any) -> Pipeline:
    """The pipeline with other stages in the steps of these names."""
    steps = [
        dataclasses.replace(step, stage=stages.get(step.name, step.stage))
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


def pin_digests(ingest: DownloadShards, *, needs: bool = True) -> DownloadShards:
    """Put the digests of blocklists and placeholders into the fingerprint: others, another run.

    Raises:
        DeclipError: one of them is missing.
    """

    def full(files: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(file if "://" in file else os.path.abspath(file) for file in files)

    ingest = dataclasses.replace(
        ingest, blocklists=full(ingest.blocklists), placeholders=full(ingest.placeholders)
    )
    files = [*ingest.blocklists, *ingest.placeholders]
    if ingest.lists_sha256 or not files or (not needs and not all(map(_is_there, files))):
        return ingest
    ingest.check_lists()
    return dataclasses.replace(ingest, lists_sha256=ingest.digest_lists())


def pin_table(ingest: DownloadShards) -> DownloadShards:
    """Put the table's digest into the fingerprint, so that another list is another run.

    A digest that the user gives is left, and the stage refuses a table of another one.
    """
    if ingest.table_sha256:
        return ingest
    return dataclasses.replace(ingest, table_sha256=table_digest(ingest.table_location()))
