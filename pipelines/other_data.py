"""A recipe whose training reads a dataset that lies elsewhere: its own steps made it there."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from declip_filter.repack_state import STEP as REPACKED
from declip_filter.repack_state import is_repacked
from declip_shards import DeclipError, layout
from declip_train.dataset_files import open_dataset
from declip_train.stages import TrainModel
from pipelines.pipeline import Pipeline, Step
from pipelines.repack_recipe import FETCHING

TRAIN = "train"


def reads_other_data(pipeline: Pipeline) -> bool:
    """Whether the step that trains is told another dataset than the pipeline's own."""
    stages = [step.stage for step in pipeline.steps if step.name == TRAIN]
    return any(isinstance(stage, TrainModel) and stage.data_root is not None for stage in stages)


def on_other_data(pipeline: Pipeline, changes: Mapping[str, Mapping[str, Any]]) -> Pipeline:
    """The step that trains alone, reading the manifests of the dataset's own steps.

    So the same dataset at two URLs is the same input, and a dataset that changed is another. Steps
    before it have nothing to do here; those after it read the shards of their own folder.

    Args:
        pipeline: of any recipe that trains, after the user's settings.
        changes: these settings, by step.

    Raises:
        DeclipError: a step that is left out was given a setting, or the dataset cannot be opened.
    """
    step = pipeline.step(TRAIN)
    stage = step.stage
    assert isinstance(stage, TrainModel)
    assert stage.data_root is not None
    for name, fields in changes.items():
        if name != TRAIN:
            flag = f"--{name}.{next(iter(fields))}".replace("_", "-")
            raise DeclipError(
                f"{flag} is given, but training reads the dataset {stage.data_root!r} "
                f"(--train.data-root), and of recipe {pipeline.recipe!r} stage {TRAIN!r} alone "
                "runs here; leave it out, or run that stage where the dataset lies."
            )
    unread = {"neighbors"} if not stage.uses_index else set()
    unread |= {"filter"} if not stage.selection else set()
    repacked = is_repacked(open_dataset(stage.data_root))
    reads = dict.fromkeys(
        REPACKED if repacked and name in FETCHING else name
        for name in step.reads
        if name not in unread
    )
    step = dataclasses.replace(step, reads=tuple(reads), data_root=stage.data_root)
    return dataclasses.replace(pipeline, steps=[step], derive=None)


def require_other_data(step: Step) -> None:
    """Refuse a dataset whose own steps were not finished.

    Raises:
        DeclipError: one was not, or the dataset cannot be reached.
    """
    store = open_dataset(step.data_root)
    for name in step.reads:
        path = layout.manifest_path(name)
        if not store.exists(path):
            raise DeclipError(
                f"stage {step.name!r} reads {name!r} of the dataset {step.data_root!r}, which has "
                f"no {path}: run that stage there to its end, correct --train.data-root, or train "
                "without manifests: declip train --train.data-root."
            )
