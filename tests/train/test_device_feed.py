"""Batches sent ahead are the batches."""

import pytest
import torch

from declip_train.batch import Batch
from declip_train.device_feed import DeviceFeed
from declip_train.device_views import draw_color_batch
from declip_train.views import AUGMENTATIONS


def batch_of(step, colored=False):
    generator = torch.Generator().manual_seed(step)
    colors = None
    images = torch.rand(2, 4, 3, 16, 16, generator=generator)
    if colored:
        images = torch.randint(256, (2, 4, 16, 16, 3), generator=generator, dtype=torch.uint8)
        draws = torch.rand(8, 53, generator=generator, dtype=torch.float64).numpy()
        colors = draw_color_batch(draws, AUGMENTATIONS["moco_v2"], 16)
    return Batch(
        step=step,
        epoch=0,
        images=images,
        colors=colors,
        token_ids=torch.full((4, 3), step),
        sample_ids=torch.arange(4),
        caption_ids=torch.arange(4),
    )


def test_on_the_host_batches_pass_as_they_are():
    feed = DeviceFeed(torch.device("cpu"))
    assert feed.is_empty
    assert not feed.works_ahead
    first = batch_of(0)
    feed.send(first)
    with pytest.raises(ValueError, match="on its way already"):
        feed.send(batch_of(1))
    assert feed.take() is first
    with pytest.raises(ValueError, match="no batch is on its way"):
        feed.take()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("colored", [False, True])
def test_on_a_gpu_batches_arrive_whole_and_finished(colored):
    device = torch.device("cuda:0")
    feed = DeviceFeed(device)
    assert feed.works_ahead
    feed.send(batch_of(0, colored).pin_memory())
    busy = torch.rand(2048, 2048, device=device)
    for step in range(20):
        found = feed.take()
        feed.send(batch_of(step + 1, colored).pin_memory())
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        expected = batch_of(step, colored).to(device)
        assert found.colors is None
        assert found.images.device == device
        torch.testing.assert_close(found.images, expected.images, rtol=0, atol=0)
        assert torch.equal(found.token_ids, expected.token_ids)
