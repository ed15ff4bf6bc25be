"""Cutting a batch, and finishing its views."""

import pytest
import torch

from declip_train.batch import Batch
from declip_train.device_views import draw_color_batch, photometric
from declip_train.views import AUGMENTATIONS


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2 * 12, 53, generator=generator, dtype=torch.float64).numpy()
    return Batch(
        step=3,
        epoch=1,
        images=torch.randint(256, (2, 12, 16, 16, 3), generator=generator, dtype=torch.uint8),
        colors=draw_color_batch(draws, AUGMENTATIONS["moco_v2"], 16),
        token_ids=torch.arange(12 * 5).view(12, 5),
        sample_ids=torch.arange(12),
        caption_ids=torch.arange(12) // 2,
        lengths={"token_ids": torch.full((12,), 5)},
    )


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_parts_have_the_colors_of_their_views(batch, parts):
    """Cutting and finishing may come in any order."""
    assert batch.colors is not None
    pieces = batch.split(parts)
    for number, piece in enumerate(pieces):
        rows = slice(number * 12 // parts, (number + 1) * 12 // parts)
        assert piece.colors is not None
        for name in ("order", "factors", "jitter", "gray", "sigma"):
            whole = getattr(batch.colors, name).view(2, 12, -1)[:, rows].flatten()
            assert torch.equal(getattr(piece.colors, name).flatten(), whole), name
        assert torch.equal(piece.lengths["token_ids"], batch.lengths["token_ids"][rows])
    cpu = torch.device("cpu")
    finished = torch.cat([piece.to(cpu).images for piece in pieces], dim=1)
    torch.testing.assert_close(finished, batch.to(cpu).images, rtol=0, atol=1e-5)


def test_finishing_changes_colors_once_and_nothing_else(batch):
    finished = batch.to(torch.device("cpu"))
    assert finished.colors is None
    expected = photometric(batch.images.flatten(0, 1), batch.colors)
    assert torch.equal(finished.images.flatten(0, 1), expected)
    assert finished.images.shape == (2, 12, 3, 16, 16)
    assert finished.token_ids is batch.token_ids
    assert finished.to(torch.device("cpu")).images is finished.images


@pytest.mark.parametrize("parts", [0, 5, 24])
def test_uneven_cuts_are_refused(batch, parts):
    with pytest.raises(ValueError, match=f"12 rows cannot be cut evenly into {parts} parts"):
        batch.split(parts)
