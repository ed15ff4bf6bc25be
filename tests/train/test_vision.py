"""The vision transformer: patches by hand; the class token alone where nobody reads the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from declip_train.model_config import VisionConfig, get_model_config
from declip_train.vision import VisionTransformer, require_images


@pytest.fixture
def tower() -> VisionTransformer:
    config = get_model_config("test").vision
    assert isinstance(config, VisionConfig)
    tower = VisionTransformer(config, embed_dim=16, quick_gelu=True).double()
    tower.initialize(torch.Generator().manual_seed(0))
    return tower


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)


def test_outputs_are_what_their_names_say(tower: VisionTransformer, images: Tensor) -> None:
    output = tower(images, need_tokens=True)
    config = tower.config
    assert output.pooled.shape == (3, config.pooled_width)
    assert output.tokens is not None
    assert output.tokens.shape == (3, config.num_patches, config.token_width)
    torch.testing.assert_close(output.features, output.pooled @ tower.proj)
    short = tower(images)
    assert short.tokens is None
    torch.testing.assert_close(short.pooled, output.pooled)


def test_tokens_stand_in_the_order_of_their_patches(
    tower: VisionTransformer, images: Tensor
) -> None:
    """With blocks that add nothing, a token is its own patch's: row by row, left to right."""
    with torch.no_grad():
        for name, parameter in tower.transformer.named_parameters():
            if "out_proj" in name or "c_proj" in name:
                parameter.zero_()
    before = tower(images, need_tokens=True).tokens
    changed = images.clone()
    changed[:, :, 8:, :8] += 1.0
    after = tower(changed, need_tokens=True).tokens
    assert before is not None
    assert after is not None
    moved = (after - before).abs().amax(dim=(0, 2)) > 1e-9
    assert moved.tolist() == [False, False, True, False]


def test_images_do_not_depend_on_their_batch(tower: VisionTransformer, images: Tensor) -> None:
    alone = torch.cat([tower(image[None]).features for image in images])
    torch.testing.assert_close(tower(images).features, alone)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 16, 8), (2, 3, 32, 32)])
def test_other_shapes_are_refused(tower: VisionTransformer, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(batch, 3, 16, 16\): resize them, or choose"):
        require_images(torch.zeros(shape), tower.config)
