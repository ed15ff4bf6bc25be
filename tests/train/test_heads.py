"""The methods' heads: the published sizes and layers, their weights, and BatchNorm's needs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from declip_shards import DeclipError
from declip_train.heads import DeCLIPHeads, SimCLRHead, TokenHeads
from declip_train.model_config import get_model_config


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_of_the_published_heads() -> None:
    with torch.device("meta"):
        heads = DeCLIPHeads(get_model_config("ViT-B-32"))
    assert count(heads.projector) == 2_630_656
    assert count(heads.predictor) == 1_051_136
    # DeCLIP's own is 25,346,817: one more vocabulary entry, its mask token, of 512 weights and a
    # bias.
    assert count(heads.mlm_head) == 25_346_304 == 25_346_817 - 513
    assert heads.mask_embedding.shape == (512,)
    with torch.device("meta"):
        simclr = SimCLRHead(get_model_config("ViT-B-32"))
        tokens = TokenHeads(get_model_config("ViT-B-32"))
    linear = 768 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 256 + 256
    assert count(simclr) == linear + 2 * 2 * 4096 == 20_996_352
    assert count(tokens.image_projection) == 196_864
    assert count(tokens.text_projection) == 131_328
    assert count(tokens) == 196_864 + 131_328 + 1


@pytest.mark.parametrize("name", ["test", "test-rn"])
def test_heads_read_what_the_image_tower_gives(name: str) -> None:
    config = get_model_config(name)
    vision = config.vision
    pooled, tokens = torch.randn(3, vision.pooled_width), torch.randn(3, 7, vision.token_width)
    assert SimCLRHead(config, 12, 5)(pooled).shape == (3, 5)
    assert TokenHeads(config, 6).project_image(tokens).shape == (3, 7, 6)


def test_slips_head_has_no_last_norm() -> None:
    head = SimCLRHead(get_model_config("test"), 24, 8)
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    pooled = torch.randn(50, get_model_config("test").vision.pooled_width)
    projected = head(pooled)
    assert (projected.norm(dim=-1) - 1).abs().max() > 0.01
    # By hand, layer by layer.
    state = pooled
    for number in (1, 2):
        state = F.linear(
            state,
            head.get_parameter(f"linear_{number}.weight"),
            head.get_parameter(f"linear_{number}.bias"),
        )
        state = (state - state.mean(0)) / (state.var(0, correction=0) + 1e-5).sqrt()
        state = state.clamp(min=0)
    state = F.linear(
        state, head.get_parameter("linear_3.weight"), head.get_parameter("linear_3.bias")
    )
    torch.testing.assert_close(projected, state, rtol=1e-4, atol=1e-5)


def test_token_features_are_unit_vectors_in_the_dtype_of_the_projection() -> None:
    config = get_model_config("test")
    heads = TokenHeads(config, 6)
    tokens = torch.randn(2, 5, config.vision.token_width)
    states = torch.randn(2, 77, config.text.width)
    expected = F.normalize(heads.image_projection(tokens), dim=-1)
    assert torch.equal(heads.project_image(tokens), expected)
    expected = F.normalize(heads.text_projection(states), dim=-1)
    assert torch.equal(heads.project_text(states), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = heads.project_text(states)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float().norm(dim=-1), torch.ones(2, 77), rtol=0, atol=0.01)
    assert heads.double().project_text(states.double()).dtype == torch.float64


def test_the_token_scale_is_a_parameter_of_its_own_kept_in_its_interval() -> None:
    heads = TokenHeads(get_model_config("test"), 6)
    assert heads.logit_scale.shape == ()
    assert heads.logit_scale.requires_grad
    assert heads.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    heads.clamp_logit_scale(3.0, 6.0)
    assert heads.logit_scale.item() == 3.0
    heads.logit_scale.data.fill_(9.0)
    heads.clamp_logit_scale()
    assert heads.logit_scale.item() == pytest.approx(math.log(100))
    with pytest.raises(DeclipError, match=r"between 2\.0 and 1\.0: give a minimum below"):
        heads.clamp_logit_scale(2.0, 1.0)


def test_masked_states_of_any_number_meet_the_vocabulary() -> None:
    heads = DeCLIPHeads(get_model_config("test"), 8, 4)
    for number in (0, 1, 5):
        assert heads.mlm_head(torch.randn(number, 32)).shape == (number, 49_408)


@pytest.mark.parametrize("synchronized", [False, True])
def test_the_switch_reaches_every_batch_norm(synchronized: bool) -> None:
    config = get_model_config("test")
    for heads, layers in (
        (DeCLIPHeads(config, 8, 4, synchronized=synchronized), 4),
        (SimCLRHead(config, 8, 4, synchronized=synchronized), 2),
    ):
        norms = [layer for layer in heads.modules() if isinstance(layer, nn.BatchNorm1d)]
        assert [layer.__dict__["synchronized"] for layer in norms] == [synchronized] * layers


def test_sizes_scale_by_settings() -> None:
    heads = DeCLIPHeads(get_model_config("test"), projector_dim=24, predictor_hidden_dim=8)
    projection, prediction = heads.project(torch.randn(5, 16))
    assert projection.shape == prediction.shape == (5, 24)
    assert heads.predictor.get_parameter("linear_1.weight").shape == (8, 24)
    assert heads.mlm_head(torch.randn(3, 32)).shape == (3, 49_408)


def test_every_projector_layer_is_normalized_and_the_prediction_is_not() -> None:
    heads = DeCLIPHeads(get_model_config("test"), 64, 16, torch.Generator().manual_seed(0))
    projection, prediction = heads.project(7 + 3 * torch.randn(256, 16))
    torch.testing.assert_close(projection.mean(dim=0), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        projection.std(dim=0, correction=0), torch.ones(64), atol=1e-3, rtol=0
    )
    assert (projection < 0).any()
    assert (prediction.std(dim=0) - 1).abs().max() > 0.1
    kinds = [type(layer).__name__ for layer in heads.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    kinds = [type(layer).__name__ for layer in heads.predictor]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


@pytest.mark.parametrize("kind", [DeCLIPHeads, SimCLRHead, TokenHeads])
def test_own_generator_decides_the_weights_and_leaves_the_global_one_alone(
    kind: type[DeCLIPHeads] | type[SimCLRHead] | type[TokenHeads],
) -> None:
    config = get_model_config("test")
    before = torch.random.get_rng_state()
    states = [
        kind(config, 8, generator=torch.Generator().manual_seed(seed)).state_dict()
        for seed in (3, 3, 4)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    drawn = [name for name in states[0] if "mask_embedding" in name or "linear" in name]
    drawn += [name for name in states[0] if "projection" in name]
    assert drawn
    assert not any(torch.equal(states[0][name], states[2][name]) for name in drawn)
    for name in drawn:
        if name.endswith("weight"):
            bound = states[0][name].shape[1] ** -0.5
            assert 0.8 * bound < states[0][name].abs().max() <= bound


def test_names_do_not_meet_the_towers() -> None:
    heads = DeCLIPHeads(get_model_config("test"), 8, 4)
    assert {name.split(".")[0] for name in heads.state_dict()} == {
        "projector",
        "predictor",
        "mlm_head",
        "mask_embedding",
    }


def test_one_sample_and_wrong_sizes_are_refused_in_a_sentence() -> None:
    heads = DeCLIPHeads(get_model_config("test"), 8, 4)
    with pytest.raises(DeclipError, match=r"batch of 1 on this process, but it needs at least 2"):
        heads.project(torch.randn(1, 16))
    assert heads.eval().project(torch.randn(1, 16))[0].shape == (1, 8)
    with pytest.raises(DeclipError, match="projector_dim is 0, but it must be at least 1"):
        DeCLIPHeads(get_model_config("test"), projector_dim=0)
    simclr = SimCLRHead(get_model_config("test"), 8, 4)
    with pytest.raises(DeclipError, match="batch of 1 on this process"):
        simclr(torch.randn(1, 32))
    with pytest.raises(DeclipError, match="simclr_hidden_dim is 0, but it must be at least 1"):
        SimCLRHead(get_model_config("test"), 0)
    with pytest.raises(DeclipError, match="token_dim is -1, but it must be at least 1"):
        TokenHeads(get_model_config("test"), -1)
