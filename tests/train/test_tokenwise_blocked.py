"""Packing loses nothing, and both ways to a gradient are one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_train.tokenwise_blocked import (
    Similarity,
    TextLayout,
    best_matches,
    gradients,
    similarity,
)

CPU = torch.device("cpu")
lengths_of_texts = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@given(lengths_of_texts)
@settings(deadline=None)
def test_packing_keeps_every_real_token_once(lengths: list[int]) -> None:
    layout = TextLayout(lengths, CPU)
    tokens = torch.arange(len(lengths) * 12).view(len(lengths), 12, 1)
    packed = layout.pack(tokens)
    assert packed.shape == (sum(lengths), 1)
    for text, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        row = int(layout.order[text])
        assert length == lengths[row]
        assert torch.equal(packed[start : start + length], tokens[row, :length])
        assert (layout.text_of_token[start : start + length] == text).all()
    assert torch.equal(layout.order[layout.position], torch.arange(len(lengths)))


@given(lengths_of_texts, st.integers(1, 60))
@settings(deadline=None)
def test_rectangles_cover_all_texts_in_order(lengths: list[int], limit: int) -> None:
    layout = TextLayout(lengths, CPU)
    text = token = 0
    for texts, tokens, length in layout.rectangles(limit):
        assert (texts.start, tokens.start) == (text, token)
        assert layout.lengths[texts] == [length] * (texts.stop - texts.start)
        assert tokens.stop - tokens.start == length * (texts.stop - texts.start)
        assert tokens.stop - tokens.start <= limit or texts.stop - texts.start == 1
        text, token = texts.stop, tokens.stop
    assert (text, token) == (len(lengths), sum(lengths))


def _case(patches: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, TextLayout]:
    generator = torch.Generator().manual_seed(patches)
    layout = TextLayout(lengths, CPU)
    images = torch.randn(7, patches, 3, generator=generator, dtype=torch.float64)
    return images, torch.randn(sum(lengths), 3, generator=generator, dtype=torch.float64), layout


@pytest.mark.parametrize("patches", [1, 4, 300])
@pytest.mark.parametrize("block", [1, 700, 1 << 20])
def test_written_out_and_summed_gradients_are_autograds(patches: int, block: int) -> None:
    images, texts, layout = _case(patches, [3, 1, 5, 300, 3])
    found = similarity(images, texts, layout, block=block, keep=True)
    generator = torch.Generator().manual_seed(9)
    sent = [torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    leaves = [images.clone().requires_grad_(), texts.clone().requires_grad_()]
    columns = []
    for start, length in zip(layout.starts.tolist(), layout.lengths, strict=True):
        products = leaves[0] @ leaves[1][start : start + length].T
        columns.append((products.amax(2).mean(1), products.amax(1).mean(1)))
    expected = [torch.stack(side, dim=1) for side in zip(*columns, strict=True)]
    torch.testing.assert_close(found.image_to_text, expected[0].detach())
    torch.testing.assert_close(found.text_to_image, expected[1].detach())
    wanted = torch.autograd.grad(expected, leaves, sent)
    received = Similarity(sent[0], sent[1], found.winners)
    for dense in (False, True):
        ours = gradients(images, texts, layout, received, block=block, dense=dense)
        for mine, theirs in zip(ours, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_winners_take_the_smallest_type_that_holds_them() -> None:
    found = [
        similarity(*_case(patches, [2, length]), block=1 << 20, keep=True).winners
        for patches, length in ((256, 257), (257, 256))
    ]
    assert [winner.dtype for winner in found[0]] == [torch.int16, torch.uint8]
    assert [winner.dtype for winner in found[1]] == [torch.uint8, torch.int16]
    assert similarity(*_case(2, [2]), block=8, keep=False).winners == ()


@pytest.mark.parametrize("block", [1, 30, 1 << 20])
def test_best_matches_are_the_maxima_of_the_whole_product(block: int) -> None:
    images, texts, layout = _case(4, [3, 1, 5])
    product = images @ texts.T
    of_images, of_texts = best_matches(images, texts, layout, block=block)
    assert torch.equal(of_images, product.amax(dim=2))
    assert torch.equal(of_texts, product.amax(dim=(0, 1)))
