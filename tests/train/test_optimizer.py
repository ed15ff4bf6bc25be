"""Parameter groups by name, the schedule's named points, optimizers by their settings."""

import dataclasses
from typing import Any

import pytest
import torch

from declip_train.lamb import Lamb
from declip_train.module import TrainModule
from declip_train.optimizer import build_optimizer, learning_rate, parameter_groups
from declip_train.settings import TrainSettings

SETTINGS = TrainSettings(
    model="test", global_batch_size=24, max_steps=40, warmup_steps=2, method="defilip"
)


@pytest.fixture(scope="module")
def module():
    return TrainModule(SETTINGS)


@pytest.fixture(scope="module")
def resnet():
    return TrainModule(dataclasses.replace(SETTINGS, model="test-rn", method="declip"))


def exempt_names(module, decay_exempt):
    decayed, plain = parameter_groups(module, 0.1, decay_exempt)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0)
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    exempt = {names[id(p)] for p in plain["params"]}
    assert len(exempt) + len(decayed["params"]) == len(names)
    return exempt


ALWAYS = (
    "clip.logit_scale",
    "heads.tokens.logit_scale",
    "clip.visual.ln_pre.weight",
    "clip.ln_final.bias",
    "clip.transformer.resblocks.0.mlp.c_fc.bias",
    "clip.transformer.resblocks.0.attn.out_proj.bias",
    "heads.declip.mlm_head.bias",
    "heads.declip.projector.bn_1.weight",
    "heads.declip.projector.bn_3.bias",
    "heads.tokens.image_projection.bias",
)
VECTORS = (
    "clip.transformer.resblocks.0.attn.in_proj_bias",
    "clip.visual.class_embedding",
    "heads.declip.mask_embedding",
)
EMBEDDINGS = (
    "clip.token_embedding.weight",
    "clip.positional_embedding",
    "clip.visual.positional_embedding",
)
NEVER = (
    "clip.transformer.resblocks.0.attn.in_proj_weight",
    "clip.text_projection",
    "clip.visual.proj",
    "clip.visual.conv1.weight",
    "heads.declip.mlm_head.weight",
)
EXEMPT = {
    "modules": (ALWAYS, VECTORS + EMBEDDINGS + NEVER),
    "vectors": (ALWAYS + VECTORS, EMBEDDINGS + NEVER),
    "embeddings": (ALWAYS + VECTORS + EMBEDDINGS, NEVER),
}


@pytest.mark.parametrize("decay_exempt", EXEMPT)
def test_what_does_not_decay(module, decay_exempt):
    inside, outside = EXEMPT[decay_exempt]
    exempt = exempt_names(module, decay_exempt)
    assert exempt.issuperset(inside)
    assert exempt.isdisjoint(outside)


@pytest.mark.parametrize("decay_exempt", EXEMPT)
def test_gains_and_biases_of_a_resnets_batch_norms_never_decay(resnet, decay_exempt):
    exempt = exempt_names(resnet, decay_exempt)
    norms = [name for name, _ in resnet.named_parameters() if ".bn" in name]
    assert len(norms) > 10
    assert exempt.issuperset(norms)
    assert {"clip.visual.attnpool.q_proj.bias", "clip.visual.attnpool.c_proj.bias"} <= exempt
    assert ("clip.visual.attnpool.positional_embedding" in exempt) == (decay_exempt == "embeddings")
    assert "clip.visual.conv1.weight" not in exempt


def test_frozen_parameters_are_in_no_group(module):
    filip = TrainModule(dataclasses.replace(SETTINGS, method="filip"))
    frozen = [p for p in filip.parameters() if not p.requires_grad]
    assert filip.clip.text_projection in {*frozen}
    held = {id(p) for group in parameter_groups(filip, 0.1) for p in group["params"]}
    assert held == {id(p) for p in filip.parameters() if p.requires_grad}


def test_the_optimizer_is_as_the_settings_say(module):
    plain = dataclasses.replace(
        SETTINGS, beta1=0.8, beta2=0.9, eps=1e-5, weight_decay=0.3, zero_stage=0
    )
    kinds = {"adamw": torch.optim.AdamW, "lamb": Lamb, "sgd": torch.optim.SGD}
    for name, kind in kinds.items():
        changed: dict[str, Any] = {"optimizer": name}
        settings = dataclasses.replace(plain, **changed)
        optimizer = build_optimizer(module, settings)
        assert type(optimizer) is kind
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0]
        for group in optimizer.param_groups:
            assert group["lr"] == 0, "the engine gives every step its own"
            if name == "sgd":
                assert (group["momentum"], group["nesterov"]) == (0.8, True)
            else:
                assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-5)


def test_the_schedule_has_its_named_points():
    settings = TrainSettings(
        warmup_steps=5, start_lr=0.1, peak_lr=1.0, end_lr=0.2, max_steps=105, model="test"
    )
    rates = [learning_rate(settings, step, 105) for step in range(105)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[2] == pytest.approx(0.55), "half way of the line"
    assert rates[4] == max(rates) == pytest.approx(1.0)
    assert rates[54] == pytest.approx(0.6), "half way of the cosine"
    assert rates[104] == pytest.approx(0.2)
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert len(set(rates[4:])) == 101


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_without_warmup_the_first_step_has_the_peak(warmup_steps):
    settings = TrainSettings(warmup_steps=warmup_steps, max_steps=10, model="test", end_lr=1e-5)
    rates = [learning_rate(settings, step, 10) for step in range(10)]
    assert rates[0] == max(rates) == settings.peak_lr
    assert rates[9] == pytest.approx(1e-5)


def test_it_is_the_released_schedule():
    """Step s from 1, W = 2500, T = 128001 (DeCLIP's released configurations)."""
    import math

    settings = TrainSettings(max_steps=128_001)
    for s in (1, 2, 1234, 2499, 2500, 2501, 60_000, 128_000, 128_001):
        warm = 1e-4 + (1e-3 - 1e-4) * (s - 1) / 2499
        cosine = 1e-3 / 2 * (1 + math.cos(math.pi * (s - 2500) / (128_001 - 2500)))
        expected = warm if s < 2500 else cosine
        assert learning_rate(settings, s - 1, 128_001) == pytest.approx(expected, abs=1e-15)
