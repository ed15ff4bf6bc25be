"""DeCLIP's heads: the published sizes, and BatchNorm's needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from declip_shards import DeclipError
from declip_train.heads import DeCLIPHeads
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


def test_own_generator_decides_the_weights_and_leaves_the_global_one_alone() -> None:
    config = get_model_config("test")
    before = torch.random.get_rng_state()
    states = [
        DeCLIPHeads(config, 8, 4, torch.Generator().manual_seed(seed)).state_dict()
        for seed in (3, 3, 4)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["mask_embedding"], states[2]["mask_embedding"])


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
    with pytest.raises(ValueError, match=r"batch of 1 on this process, but it needs at least 2"):
        heads.project(torch.randn(1, 16))
    assert heads.eval().project(torch.randn(1, 16))[0].shape == (1, 8)
    with pytest.raises(DeclipError, match="projector_dim is 0, but it must be at least 1"):
        DeCLIPHeads(get_model_config("test"), projector_dim=0)
