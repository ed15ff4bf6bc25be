"""Recipes on CC3M and CC12M: published settings where there are some, else the table's."""

import dataclasses

from declip_train.methods import METHODS
from declip_train.stages import TrainModel
from pipelines.conceptual_recipes import CONCEPTUAL_RECIPES
from pipelines.training_recipes import TRAINING_RECIPES


def train_of(name: str) -> TrainModel:
    stage = TRAINING_RECIPES[name]("somewhere").step("train").stage
    assert isinstance(stage, TrainModel)
    return stage


def test_they_are_those_of_the_two_lists() -> None:
    names = {name for name in TRAINING_RECIPES if name.startswith("cc")}
    assert {recipe("x").recipe for recipe in CONCEPTUAL_RECIPES} == names


def test_the_five_methods_differ_from_the_table_in_length_alone() -> None:
    for pairs in ("cc3m", "cc12m"):
        for method in METHODS:
            name = f"{method}-vit-b-32"
            here, there = train_of(f"{pairs}-{name}"), train_of(f"yfcc15m-v2-{name}")
            assert here.max_steps is None
            assert dataclasses.replace(here, max_steps=there.max_steps) == there


def test_declips_ablation_runs_for_its_epochs_with_the_papers_weights() -> None:
    declip, clip = train_of("cc3m-declip-rn50"), train_of("cc3m-clip-rn50")
    assert (declip.epochs, declip.max_steps, declip.weighting) == (32.0, None, "paper")
    assert dict(declip.method_parts.terms[declip.weighting])["contrastive"] == 0.4
    assert (clip.epochs, clip.max_steps, clip.model) == (32.0, None, declip.model)
