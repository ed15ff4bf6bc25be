"""The modified ResNet: its map, its pooling by loops, its batch norms, its initial weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from declip_train.batch_norm import BatchNorm2d
from declip_train.model_config import ResNetConfig, get_model_config
from declip_train.resnet import AttentionPool, ModifiedResNet, RunningBatchNorm2d
from declip_train.towers import CLIP


def make_tower(dtype: torch.dtype = torch.float64) -> ModifiedResNet:
    """A small tower with every parameter off its initial value."""
    config = get_model_config("test-rn").vision
    assert isinstance(config, ResNetConfig)
    generator = torch.Generator().manual_seed(0)
    tower = ModifiedResNet(config, embed_dim=16)
    tower.initialize(generator)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tower.to(dtype)


@pytest.fixture
def tower() -> ModifiedResNet:
    return make_tower()


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64)


def test_outputs_are_what_their_names_say(tower: ModifiedResNet, images: Tensor) -> None:
    output = tower(images, need_tokens=True)
    config = tower.config
    assert output.pooled.shape == (4, config.pooled_width)
    assert output.tokens is not None
    assert output.tokens.shape == (4, config.num_patches, config.token_width)
    assert (output.tokens >= 0).all(), "a stage ends with a ReLU"
    torch.testing.assert_close(output.pooled, tower.attnpool(output.tokens))
    torch.testing.assert_close(output.features, tower.attnpool.c_proj(output.pooled))
    assert tower(images).tokens is None


def test_tokens_stand_in_the_order_of_their_places(tower: ModifiedResNet, images: Tensor) -> None:
    """A map is 2 by 2 here: flipping the image swaps rows and columns of tokens, once all filters
    are symmetric; so a filter's weights are averaged with their mirror image."""
    with torch.no_grad():
        for module in tower.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
                module.weight.copy_((module.weight + module.weight.flip(3)) / 2)
        tower.conv1.weight[..., 0] = tower.conv1.weight[..., 2] = 0  # Stride 2 sees one side more.
    tower.eval()
    straight = tower(images, need_tokens=True).tokens
    assert straight is not None
    # With a stride of 2 the even columns are read: shifting by one after flipping keeps them.
    mirrored = tower(images.flip(3).roll(-1, dims=3), need_tokens=True).tokens
    assert mirrored is not None
    assert straight.shape[1] == 4
    swapped = straight[:, [1, 0, 3, 2]]
    torch.testing.assert_close(mirrored, swapped)
    assert not torch.allclose(mirrored, straight)


def test_attention_pooling_is_the_formula(images: Tensor) -> None:
    places, width, heads = 5, 8, 2
    generator = torch.Generator().manual_seed(2)
    pool = AttentionPool(places, width, heads, embed_dim=3).double()
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    tokens = torch.randn(2, places, width, generator=generator, dtype=torch.float64)
    size = width // heads
    for row in range(2):
        x = torch.cat([tokens[row].mean(dim=0, keepdim=True), tokens[row]])
        x = x + pool.positional_embedding
        query, key, value = (f(x).detach() for f in (pool.q_proj, pool.k_proj, pool.v_proj))
        expected = torch.zeros(width, dtype=torch.float64)
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            weights = [math.exp(float(query[0, own] @ k[own]) / math.sqrt(size)) for k in key]
            for weight, v in zip(weights, value, strict=True):
                expected[own] += weight / sum(weights) * v[own]
        torch.testing.assert_close(pool(tokens)[row], expected)


def test_every_parameter_gets_a_gradient(tower: ModifiedResNet, images: Tensor) -> None:
    tower(images).features.sin().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
    assert tower.attnpool.k_proj.bias.grad is not None
    assert not tower.attnpool.k_proj.bias.grad.any()


def test_weights_are_drawn_as_published() -> None:
    model = CLIP(get_model_config("RN50"), torch.Generator().manual_seed(0))
    assert isinstance(model.visual, ModifiedResNet)
    pool = model.visual.attnpool
    for weight in (pool.q_proj.weight, pool.c_proj.weight, pool.positional_embedding):
        assert weight.std().item() == pytest.approx(2048**-0.5, rel=0.03)
    blocks = model.visual.blocks()
    assert len(blocks) == 16
    for block in blocks:
        assert not block.bn3.weight.any()
        assert (block.bn1.weight == 1).all()
    bound = (64 * 9) ** -0.5
    conv = blocks[0].conv2.weight
    assert conv.abs().max().item() <= bound
    assert conv.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_blocks_start_as_their_short_cuts() -> None:
    config = get_model_config("test-rn").vision
    assert isinstance(config, ResNetConfig)
    tower = ModifiedResNet(config, embed_dim=16)
    tower.initialize(torch.Generator().manual_seed(0))
    second = tower.blocks()[2]
    assert second.downsample is None
    x = torch.rand(2, second.conv1.in_channels, 4, 4)
    torch.testing.assert_close(second(x), x)


def statistics(tower: ModifiedResNet) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in tower.named_buffers()}


def test_recomputing_blocks_changes_no_gradient_and_counts_a_batch_once(images: Tensor) -> None:
    found = []
    for recompute in (False, True):
        tower = make_tower()
        tower.set_grad_checkpointing(recompute)
        before = statistics(tower)
        tower(images, need_tokens=True).features.sin().sum().backward()
        found.append(({n: p.grad for n, p in tower.named_parameters()}, statistics(tower)))
        assert not torch.equal(before["bn1.running_mean"], found[-1][1]["bn1.running_mean"])
    for plain, recomputed in zip(*found, strict=True):
        assert plain.keys() == recomputed.keys()
        for name, value in plain.items():
            torch.testing.assert_close(recomputed[name], value, rtol=0, atol=1e-12)
    assert found[1][1]["layer2.0.bn2.num_batches_tracked"] == 1


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16])
def test_running_statistics_stay_exact_in_sixteen_bits(
    cast: Callable[[nn.Module], nn.Module], images: Tensor
) -> None:
    tower = make_tower(torch.float32)
    expected = make_tower(torch.float32)
    cast(tower)
    assert tower.conv1.weight.element_size() == 2
    for _ in range(3):
        tower(images)
        expected(images.float())
    for name, buffer in tower.named_buffers():
        if "num" in name:
            assert buffer == 3
        else:
            assert buffer.dtype == torch.float32
            torch.testing.assert_close(
                buffer, expected.get_buffer(name), rtol=0.05, atol=0.02, msg=name
            )
    tower.eval()
    assert torch.isfinite(tower(images).features).all()
    # Casting up again is exact for the statistics, and the model computes as ever.
    tower.float()
    assert tower(images.float()).features.dtype == torch.float32


def test_batch_norm_is_torchs_in_full_precision(images: Tensor) -> None:
    ours, theirs = RunningBatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    for _ in range(2):
        torch.testing.assert_close(ours(images), theirs(images))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_batch_norm_can_be_synchronized(tower: ModifiedResNet, images: Tensor) -> None:
    """In one process nothing changes; tests/train/test_batch_norm.py has several."""
    before = tower.state_dict().keys()
    expected = make_tower()(images).features
    tower.synchronize_batch_norm()
    layers = [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]
    assert layers
    assert all(isinstance(layer, BatchNorm2d) and layer.synchronized for layer in layers)
    assert tower.state_dict().keys() == before
    torch.testing.assert_close(tower(images).features, expected)


def test_other_shapes_are_refused(tower: ModifiedResNet) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\), but this tower takes .* 64, 64\)"):
        tower(torch.zeros(2, 3, 32, 32))
