"""Repacking as a pipeline, and any recipe on a dataset that was repacked."""

import dataclasses
import functools

from declip_filter.repack import CarryWhole, CheckRepacked, RepackShards
from declip_filter.repack_plan import inputs_digest
from declip_filter.repack_state import STEP, require_finished
from declip_shards import DeclipError, Store, layout
from declip_shards.manifest import settings_of
from pipelines.pipeline import Pipeline, Step
from pipelines.wiring import allow_missing_table

FETCHING = ("prepare", "sources", "ingest")
"""Steps that a repacked dataset has no use for: its samples are there."""


def repack(root: str) -> Pipeline:
    """Copy the kept samples of a finished folder into balanced shards: a dataset of its own.

    Command: declip run repack --out FOLDER, where FOLDER is of another recipe's run.
    Data: that folder's shards and the selection of --repack.selection; nothing in it is changed.
    Expect: repacked/selected/ with shards, sizes.json, and by key signals, embeddings, index and
    neighbor tables. Every recipe runs there: declip run RECIPE --out FOLDER/repacked/selected
    finds done what was carried over.
    """
    steps = [
        Step(
            name="repack",
            stage=RepackShards(root=root),
            on_ray=True,
            summary="copy the kept samples into balanced shards",
        ),
        Step(
            name="finish",
            stage=CarryWhole(root=root),
            reads=("repack",),
            settings_of="repack",
            summary="write sizes, index and manifests of the repacked dataset",
        ),
    ]
    return Pipeline(recipe="repack", root=root, steps=steps, derive=derive_repack)


def derive_repack(pipeline: Pipeline) -> Pipeline:
    """Put what is read into the fingerprint: another selection is another run.

    A digest that the user gives is left, and the stage refuses a dataset of another one.
    """
    stage = pipeline.step("repack").stage
    assert isinstance(stage, RepackShards)
    store = Store(pipeline.root)
    if stage.inputs_sha256 or not layout.list_shards(store):
        return pipeline
    digest = inputs_digest(store, stage.selection, stage.carry)
    steps = [
        dataclasses.replace(step, stage=dataclasses.replace(stage, inputs_sha256=digest))
        if step.name == "repack"
        else step
        for step in pipeline.steps
    ]
    return dataclasses.replace(pipeline, steps=steps)


def on_repacked(pipeline: Pipeline) -> Pipeline:
    """A recipe's pipeline for a repacked dataset: without the steps that fetch.

    In their place stands one that vouches for the shards. The settings of the steps that are left
    out are taken, for a recipe's other settings may be found from them, but must be the recipe's
    own, for nothing would obey them.

    Args:
        pipeline: of any recipe that downloads, its root the repacked dataset, before overrides.

    Raises:
        DeclipError: the repack was not finished, or has other shards than it wrote; whatever the
            manifest of the step that checks them says.
    """
    require_finished(Store(pipeline.root))
    return dataclasses.replace(
        pipeline, derive=functools.partial(_without_fetching, recipe=pipeline)
    )


def _without_fetching(pipeline: Pipeline, *, recipe: Pipeline) -> Pipeline:
    """The pipeline, after the user's settings, as it runs in a repacked dataset.

    Raises:
        DeclipError: a step that is left out was given a setting.
    """
    for step in (step for step in recipe.steps if step.name in FETCHING):
        standard = settings_of(step.stage, hashed_only=False)
        for setting, value in settings_of(
            pipeline.step(step.name).stage, hashed_only=False
        ).items():
            if value != standard[setting]:
                raise DeclipError(
                    f"--{step.name}.{setting.replace('_', '-')} is {value}, but {pipeline.root!r} "
                    "is a repacked dataset, into which nothing is downloaded; leave it out, or "
                    "give the folder that it was repacked from."
                )
    derive = allow_missing_table(recipe).derive
    derived = pipeline if derive is None else derive(pipeline)
    names = [*FETCHING, STEP]
    steps = [
        Step(
            name=STEP,
            stage=CheckRepacked(root=pipeline.root),
            summary="check the shards that were copied here",
        )
    ]
    for step in derived.steps:
        if step.name in FETCHING:
            continue
        reads = dict.fromkeys(STEP if name in names else name for name in step.reads)
        steps.append(dataclasses.replace(step, reads=tuple(reads)))
    return dataclasses.replace(derived, steps=steps)
