"""Estimates against the models themselves, and the laws that memory obeys."""

import dataclasses
import math

import pytest
import torch

from declip_train import flops
from declip_train.bank import NeighborBank
from declip_train.methods import METHODS
from declip_train.module import TrainModule
from declip_train.optimizer import build_optimizer
from declip_train.settings import TrainSettings
from pipelines.train_estimate import (
    head_parameters,
    memory_bytes,
    num_frozen,
    parameters,
    recomputed_flops,
)

SMALL = {
    "global_batch_size": 64,
    "bank_size": 128,
    "projector_dim": 24,
    "predictor_hidden_dim": 8,
    "simclr_hidden_dim": 40,
    "simclr_dim": 12,
    "token_dim": 20,
}


def module_of(settings: TrainSettings) -> TrainModule:
    module = TrainModule(settings)
    if settings.freeze_patch_embedding:
        module.clip.freeze_patch_embedding()
    return module


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["test", "RN50"])
@pytest.mark.parametrize("source", ["index", "bank"])
def test_parameters_are_the_models(method: str, model: str, source: str) -> None:
    settings = TrainSettings(
        method=method,
        model=model,
        neighbor_source=source,  # type: ignore[arg-type]
        freeze_patch_embedding=model != "RN50",
        **SMALL,  # type: ignore[arg-type]
    )
    # On no device: sizes are all that is asked for.
    with torch.device("meta"):
        module = module_of(settings)
    every = list(module.parameters())
    assert sum(parameters(settings).values()) == sum(p.numel() for p in every)
    frozen = sum(p.numel() for p in every if not p.requires_grad)
    assert num_frozen(settings) == frozen
    heads = sum(p.numel() for p in module.heads.parameters())
    assert sum(head_parameters(settings).values()) == heads


def test_published_counts() -> None:
    settings = TrainSettings(method="declip", freeze_patch_embedding=True)
    counts = parameters(settings)
    assert (counts["image tower"], counts["text tower"]) == (87_849_216, 63_428_096)
    assert counts["SimSiam projector"] == 2_630_656
    assert counts["SimSiam predictor"] == 1_051_136
    assert num_frozen(settings) == 2_359_296
    tokens = head_parameters(TrainSettings(method="filip"))
    assert tokens == {"token projections and scale": 196_864 + 131_328 + 1}
    sigmoid = parameters(TrainSettings(method="clip", contrastive_loss="sigmoid"))
    assert sigmoid["logit scale and bias"] == 2


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "sgd"])
def test_optimizer_state_is_what_the_optimizer_holds(optimizer: str) -> None:
    settings = TrainSettings(
        method="clip",
        model="test",
        optimizer=optimizer,  # type: ignore[arg-type]
        zero_stage=0,
        global_batch_size=4,
    )
    module = module_of(settings)
    built = build_optimizer(module, settings)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    # The count of steps is a scalar a parameter.
    held = sum(
        value.numel() * value.element_size()
        for state in built.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name != "step"
    )
    assert memory_bytes(settings)["optimizer state"] == held


def test_zero_splits_what_it_says_and_the_bank_is_its_buffers() -> None:
    def memory(**changes: object) -> dict[str, float]:
        settings = TrainSettings(method="declip", neighbor_source="bank", num_ranks=8)
        return memory_bytes(dataclasses.replace(settings, **changes))  # type: ignore[arg-type]

    zero, one, two = (memory(zero_stage=stage) for stage in (0, 1, 2))
    assert one["optimizer state"] == zero["optimizer state"] / 8
    assert one["gradients"] == zero["gradients"]
    assert two["gradients"] == zero["gradients"] / 8
    assert zero["float32 copies of weights"] == 0 < one["float32 copies of weights"]
    for stage in (0, 1, 2):
        full, half = (memory(zero_stage=stage, precision=p) for p in ("fp32", "bf16"))
        assert half["weights"] == full["weights"] / 2
        assert half["optimizer state"] == full["optimizer state"]
        assert half["float32 copies of weights"] >= full["float32 copies of weights"]
    with torch.device("meta"):
        bank = NeighborBank(65_536, 512)
    buffers = sum(b.numel() * b.element_size() for b in bank.buffers()) - 8  # the cursor
    assert zero["neighbor bank"] == buffers
    assert memory(neighbor_source="index")["neighbor bank"] == 0


def test_activations_shrink_with_the_parts_and_features_do_not() -> None:
    whole = TrainSettings(method="defilip", num_ranks=2)
    parts = dataclasses.replace(whole, accumulation_steps=8)
    one, eight = memory_bytes(whole), memory_bytes(parts)
    name = "activations of a part of a step"
    assert eight[name] == one[name] / 8
    assert {n: v for n, v in one.items() if n != name} == {
        n: v for n, v in eight.items() if n != name
    }
    assert memory_bytes(dataclasses.replace(whole, grad_checkpointing=True))[name] < one[name]


def test_what_is_computed_again() -> None:
    plain = TrainSettings(method="clip")
    assert recomputed_flops(plain, 77) == 0
    parts = dataclasses.replace(plain, accumulation_steps=2)
    both = dataclasses.replace(parts, grad_checkpointing=True)
    once = flops.image_flops(plain.model_config) + flops.text_flops(plain.model_config, 77)
    assert math.isclose(recomputed_flops(parts, 77), once)
    assert math.isclose(recomputed_flops(both, 77), 2 * once)
