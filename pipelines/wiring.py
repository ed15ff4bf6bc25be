"""Steps that recipes share, and the settings of several steps that must agree."""

import dataclasses
import functools
import glob
import os
from collections.abc import Collection
from typing import Any

from declip_filter import (
    BuildGraph,
    BuildIndex,
    BuildNeighbors,
    ClusterImages,
    EmbedPairs,
    FillIndex,
    FilterPairs,
    FindDuplicates,
    MeasureImages,
    PlanFilter,
    ScorePairs,
    TrainIndex,
)
from declip_filter.scorers import COLUMNS, HEAD_SUFFIXES
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
    settings = {"drop_duplicates": ("bytes",), **filters}
    steps = [
        Step(
            name="ingest",
            stage=ingest,
            summary="download and shard the pairs of the URL table",
        ),
        Step(
            name="measure",
            stage=MeasureImages(root=root),
            reads=("ingest",),
            summary="measure every picture and caption",
        ),
        Step(
            name="embed_all",
            stage=EmbedPairs(root=root, **IDLE["embed_all"]),
            reads=("ingest",),
            summary="embed every pair, for what is judged by embeddings",
        ),
        Step(
            name="score",
            stage=ScorePairs(root=root, **IDLE["score"]),
            reads=("ingest", "embed_all"),
            summary="score every pair",
        ),
        Step(
            name="cluster",
            stage=ClusterImages(root=root, **IDLE["cluster"]),
            reads=("ingest", "embed_all"),
            summary="part the pictures' vectors into clusters, near references or not",
        ),
        Step(
            name="duplicates",
            stage=FindDuplicates(root=root),
            reads=("measure", "embed_all"),
            summary="find duplicates, rung by rung",
        ),
        Step(
            name="plan",
            stage=PlanFilter(root=root, **settings),
            reads=("measure", "score", "cluster", "duplicates"),
            summary="count what every rule would drop",
            settings_of="filter",
        ),
        Step(
            name="filter",
            stage=FilterPairs(root=root, **settings),
            reads=("measure", "score", "cluster", "duplicates", "plan"),
            summary="keep or drop, with a named reason",
        ),
        Step(
            name="embed",
            stage=EmbedPairs(root=root),
            reads=("ingest", "filter"),
            summary="embed the kept captions",
        ),
        Step(
            name="train_index",
            stage=TrainIndex(root=root),
            reads=("embed",),
            summary="choose the kind of FAISS index and train it on a sample",
            settings_of="index",
        ),
        Step(
            name="fill_index",
            stage=FillIndex(root=root),
            reads=("embed", "train_index"),
            summary="add the embeddings, in parts",
            settings_of="index",
        ),
        Step(
            name="index",
            stage=BuildIndex(root=root),
            reads=("embed", "train_index", "fill_index"),
            summary="put the FAISS index together and measure its recall",
        ),
        Step(
            name="graph",
            stage=BuildGraph(root=root),
            reads=("measure", "embed", "index"),
            summary="find the nearest of all samples at once",
            settings_of="neighbors",
        ),
        Step(
            name="neighbors",
            stage=BuildNeighbors(root=root),
            reads=("measure", "embed", "index", "graph"),
            summary="write each pair's nearest other captions",
        ),
    ]
    return [dataclasses.replace(step, on_ray=True) for step in steps]


NAMES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("measure", "name", (("duplicates", "signals"), ("neighbors", "signals"))),
    ("embed_all", "name", (("score", "embeddings"), ("cluster", "embeddings"))),
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
    for name in {"embed", "embed_all"} & stages.keys():
        embed = stages[name]
        if embed.encoder.startswith("checkpoint:") and not embed.encoder_factory:
            # Worker processes know this kind by its dotted path alone.
            stages[name] = dataclasses.replace(embed, encoder_factory=FACTORY)
    if "filter" in stages and stages["filter"].signals == FilterPairs.signals:
        asked = {
            "score": "score" in stages and bool(stages["score"].scorer),
            "cluster": "cluster" in stages and bool(stages["cluster"].references),
        }
        sets = [name for name in ("measure", "duplicates", "score", "cluster") if name in stages]
        found = tuple(stages[name].name for name in sets if asked.get(name, True))
        stages["filter"] = dataclasses.replace(stages["filter"], signals=found)
    return _without_idle(_watching(_replace(pipeline, **stages)))


def _watching(pipeline: Pipeline) -> Pipeline:
    """Let signals that no step of ours writes count as what they hold."""
    stages: dict[str, Any] = {step.name: step.stage for step in pipeline.steps}
    writers = ("measure", "duplicates", "score", "cluster")
    ours = {stages[name].name for name in writers if name in stages}
    foreign = tuple(f"signals/{s}" for s in stages["filter"].signals if s not in ours)
    steps = [
        dataclasses.replace(step, watches=foreign) if step.name in ("plan", "filter") else step
        for step in pipeline.steps
    ]
    return dataclasses.replace(pipeline, steps=steps)


def _reads_vectors(score: ScorePairs) -> bool:
    """Whether a scorer compares stored vectors; those of pictures read the tars."""
    for name in score.scorer:
        kind, _, model = name.partition(":")
        if kind not in COLUMNS or kind in ("clip", "aesthetics"):
            return True
        if os.path.splitext(model)[1] in HEAD_SUFFIXES:
            return True
    return False


def _without_idle(pipeline: Pipeline) -> Pipeline:
    """Without the steps that nothing asked for: scores where no scorer is named, and vectors of
    every pair where neither scores nor the semantic rung read them.

    Raises:
        DeclipError: a step that is left out was given settings.
    """
    stages: dict[str, Any] = {step.name: step.stage for step in pipeline.steps}
    idle: dict[str, str] = {}
    if "score" in stages and not stages["score"].scorer:
        idle["score"] = "--score.scorer names no model"
    if "cluster" in stages and not stages["cluster"].references:
        idle["cluster"] = "--cluster.references names no file"
    if "embed_all" in stages:
        vectors = stages["embed_all"].name
        readers = [stages["duplicates"].semantic_embeddings] if "duplicates" in stages else []
        score: Any = stages.get("score")
        if score is not None and _reads_vectors(score) and not score.encoder:
            readers.append(score.embeddings)
            if score.embeddings == vectors and not stages["embed_all"].images:
                raise DeclipError(
                    f"--score.scorer {','.join(score.scorer)} compares vectors of pictures, and "
                    "--embed-all.images is false; set it to true with an --embed-all.encoder that "
                    "reads pictures, or name such a one by --score.encoder."
                )
        if "cluster" in stages and "cluster" not in idle:
            readers.append(stages["cluster"].embeddings)
        if vectors not in readers:
            idle["embed_all"] = (
                "neither --score.scorer nor --cluster.references nor "
                f"--duplicates.semantic-embeddings {vectors} asks for it"
            )
    if "duplicates" in stages and not _asks_for_duplicates(pipeline):
        idle["duplicates"] = "no rule of the filter reads it"
    for name, why in idle.items():
        if name != "duplicates":
            _refuse_settings(pipeline, name, IDLE[name], f"stage {name!r} is left out, for {why}")
    return _leave_out(pipeline, idle.keys())


def _asks_for_duplicates(pipeline: Pipeline) -> bool:
    """Whether a rule of the filter reads what is found, or the user has settings for it."""
    stage: Any = pipeline.step("duplicates").stage
    filter_pairs: Any = pipeline.step("filter").stage
    own = {"signals": stage.signals, "name": stage.name}
    is_set = settings_of(stage, hashed_only=False) != settings_of(
        type(stage)(root=pipeline.root, **own), hashed_only=False
    )
    rules = " ".join(filter_pairs.resolved_rules)
    return is_set or "duplicate_" in rules or "contaminated" in rules


IDLE: dict[str, dict[str, Any]] = {
    "embed_all": {"name": "all", "selection": ""},
    "score": {"embeddings": "all"},
    "cluster": {"embeddings": "all"},
}
"""What recipes set in steps that may be left out."""


def _refuse_settings(pipeline: Pipeline, name: str, own: dict[str, Any], why: str) -> None:
    """Refuse a setting of a step that will not run.

    Args:
        name: of the step.
        own: what the recipe itself sets there.
        why: why the step is left out.
    """
    stage: Any = pipeline.step(name).stage
    standard = settings_of(type(stage)(root=pipeline.root, **own), hashed_only=False)
    for setting, value in settings_of(stage, hashed_only=False).items():
        if value != standard[setting] and setting != "encoder_factory":
            flag = f"--{name}.{setting}".replace("_", "-")
            raise DeclipError(f"{flag} is {value}, but {why}; leave it out, or ask for that.")


def _leave_out(pipeline: Pipeline, names: Collection[str]) -> Pipeline:
    """The pipeline without these steps, and without anybody's reading them."""
    steps = [
        dataclasses.replace(step, reads=tuple(name for name in step.reads if name not in names))
        for step in pipeline.steps
        if step.name not in names
    ]
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
    return _leave_out(pipeline, ["sources"])


def _is_there(location: str) -> bool:
    return "://" in location or bool(glob.glob(os.path.expanduser(location)))


def _replace(pipeline: Pipeline, **stages: Any) -> Pipeline:
    """The pipeline with other stages in the steps of these names."""
    steps = [
        dataclasses.replace(step, stage=stages.get(step.name, step.stage))
        for step in pipeline.steps
    ]
    return dataclasses.replace(pipeline, steps=steps)


NEIGHBOR_STEPS = ("embed", "train_index", "fill_index", "index", "graph", "neighbors")
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
    why = (
        f"training reads no neighbor table (method {train.method}, neighbor_source "
        f"{train.neighbor_source}): choose --train.neighbor-source index with a method that has "
        "neighbors"
    )
    for name in NEIGHBOR_STEPS:
        if not pipeline.step(name).settings_of:
            _refuse_settings(pipeline, name, {}, why)
    return _leave_out(derive_pairs(pipeline, needs_table=needs_table), NEIGHBOR_STEPS)


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
