"""FILIP's loss: equal to plain loops, in blocks, without padding, and over several processes."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from declip_train.tokenwise import tokenwise_info_nce, tokenwise_similarity

if TYPE_CHECKING:
    from tests.train import tokenwise_workers
    from tests.train.several_processes import run_processes
else:
    # The name under which other processes find it, whatever pytest calls this module.
    import tokenwise_workers
    from several_processes import run_processes

case, with_gradients = tokenwise_workers.case, tokenwise_workers.with_gradients


@pytest.mark.parametrize(("rows", "patches", "length"), [(6, 5, 9), (3, 1, 4), (4, 7, 1)])
def test_values_and_gradients_are_those_of_plain_loops(
    rows: int, patches: int, length: int
) -> None:
    double = case(rows, patches, length)
    expected = with_gradients(tokenwise_workers.loop_loss, double)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected[1:3])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        images, texts, mask, scale = double
        tokens = (images.to(dtype), texts.to(dtype), mask, scale.to(dtype))
        found = with_gradients(tokenwise_info_nce, tokens)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)


def test_similarities_are_those_of_plain_loops_for_any_numbers_of_images_and_texts() -> None:
    images, texts, mask, _ = case()
    for num_images, num_texts in ((8, 3), (1, 8)):
        given = (images[:num_images], texts[:num_texts], mask[:num_texts])
        to_text, to_image = tokenwise_similarity(*given)
        expected = tokenwise_workers.loop_similarities(*given)
        torch.testing.assert_close(to_text, expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(to_image, expected[1], rtol=0, atol=1e-12)
        assert to_image.shape == (num_texts, num_images)


@pytest.mark.parametrize("block_elements", [1, 50, 400, 10_000])
def test_the_block_changes_nothing(block_elements: int) -> None:
    def blocked(images: Tensor, texts: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        return tokenwise_info_nce(images, texts, mask, scale, block_elements=block_elements)

    expected = with_gradients(tokenwise_info_nce, case())
    for ours, theirs in zip(with_gradients(blocked, case()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


class _LargestTensor(TorchDispatchMode):
    """Remembers the number of entries of the largest tensor that any operation made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return made


def test_memory_grows_with_the_block_and_not_with_the_product_of_all_tokens() -> None:
    largest = []
    for rows in (8, 32):
        images, texts, mask, scale = case(rows, patches=16, length=16, dim=4)
        leaves = (images.requires_grad_(), texts.requires_grad_())
        with _LargestTensor() as seen:
            loss = tokenwise_info_nce(images, texts, mask, scale, block_elements=4096)
            torch.autograd.grad(loss, leaves)
        largest.append(seen.entries)
        # Winners: one byte each, for every token of one side with every sample of the other.
        assert seen.entries <= max(4096, rows * rows * 16)
    assert largest[1] < 32 * 32 * 16 * 16 / 8


def test_padding_changes_nothing_wherever_it_stands_and_whatever_it_holds() -> None:
    images, texts, mask, scale = case()
    value, _, of_texts, _ = with_gradients(tokenwise_info_nce, (images, texts, mask, scale))
    padding = torch.full((len(texts), 4, texts.shape[-1]), 1e3, dtype=texts.dtype)
    for longer, place in ((torch.cat([texts, padding], 1), 0), (torch.cat([padding, texts], 1), 4)):
        real = torch.zeros(longer.shape[:2], dtype=torch.bool)
        real[:, place : place + mask.shape[1]] = mask
        again = with_gradients(tokenwise_info_nce, (images, longer, real, scale))
        assert torch.equal(again[0], value)
        assert torch.equal(again[2][real], of_texts[mask])
        assert again[2][~real].abs().max() == 0


def test_order_of_pairs_and_of_tokens_carries_no_meaning() -> None:
    images, texts, mask, scale = case()
    value, of_images, of_texts, _ = with_gradients(tokenwise_info_nce, (images, texts, mask, scale))
    generator = torch.Generator().manual_seed(5)
    pairs = torch.randperm(len(images), generator=generator)
    patches = torch.randperm(images.shape[1], generator=generator)
    tokens = torch.randperm(texts.shape[1], generator=generator)
    again = with_gradients(
        tokenwise_info_nce,
        (images[pairs][:, patches], texts[pairs][:, tokens], mask[pairs][:, tokens], scale),
    )
    torch.testing.assert_close(again[0], value, rtol=0, atol=1e-13)
    torch.testing.assert_close(again[1], of_images[pairs][:, patches], rtol=0, atol=1e-13)
    torch.testing.assert_close(again[2], of_texts[pairs][:, tokens], rtol=0, atol=1e-13)


def test_two_runs_are_equal_to_the_last_bit() -> None:
    tokens = case(dtype=torch.float32)
    first, second = (with_gradients(tokenwise_info_nce, tokens) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_batch_of_one_has_no_loss_and_equal_samples_have_that_of_a_guess() -> None:
    found = with_gradients(tokenwise_info_nce, case(1))
    assert all(tensor.abs().max() == 0 for tensor in found)
    images, texts, _, scale = case()
    same = (images[:1].expand_as(images), texts[:1].expand_as(texts))
    everything = torch.ones(texts.shape[:2], dtype=torch.bool)
    guess = tokenwise_info_nce(*same, everything, scale)
    assert guess.item() == pytest.approx(math.log(len(images)), abs=1e-12)


def test_one_token_a_side_is_info_nce() -> None:
    images, texts, _, scale = case(patches=1, length=1)
    real = torch.ones(len(texts), 1, dtype=torch.bool)
    logits = scale * images[:, 0] @ texts[:, 0].T
    matches = torch.arange(len(images))
    expected = (
        torch.nn.functional.cross_entropy(logits, matches)
        + torch.nn.functional.cross_entropy(logits.T, matches)
    ) / 2
    torch.testing.assert_close(tokenwise_info_nce(images, texts, real, scale), expected)


@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_a_token_is_nan_in_the_loss_and_its_gradient(side: int) -> None:
    tokens = case()
    row, place = 5, int(tokens[2][5].nonzero()[0])
    tokens[side][row, place if side else 2, 1] = torch.nan
    value, of_images, of_texts, _ = with_gradients(tokenwise_info_nce, tokens)
    assert value.isnan()
    assert of_images.isnan().any()
    assert of_texts.isnan().any()


def test_nan_in_padding_is_never_read() -> None:
    images, texts, mask, scale = case()
    expected = tokenwise_info_nce(images, texts, mask, scale)
    texts[~mask] = torch.nan
    assert torch.equal(tokenwise_info_nce(images, texts, mask, scale), expected)


def test_half_precision_is_close_to_its_own_values_in_full_precision() -> None:
    images, texts, mask, scale = case(dtype=torch.float32)
    halves = (images.bfloat16(), texts.bfloat16(), mask, scale)
    found = with_gradients(tokenwise_info_nce, halves)
    full = (halves[0].float(), halves[1].float(), mask, scale)
    expected = with_gradients(tokenwise_info_nce, full)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0])
    for ours, theirs in zip(found[1:3], expected[1:3], strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs.bfloat16())


def _best_by_loops(images: Tensor, texts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's largest product with any real token of the other side; padding the lowest."""
    real = [text[row, k] for text in [texts] for row, k in mask.nonzero().tolist()]
    patches = [patch for image in images for patch in image]
    of_images = torch.stack([max(torch.dot(patch, token) for token in real) for patch in patches])
    of_texts = torch.full(mask.shape, -torch.inf, dtype=texts.dtype)
    for row, k in mask.nonzero().tolist():
        of_texts[row, k] = max(torch.dot(patch, texts[row, k]) for patch in patches)
    return of_images.view(images.shape[:2]), of_texts


@pytest.mark.parametrize(
    "fractions", [pair for pair in itertools.product((0.25, 0.6, 1.0), repeat=2) if min(pair) < 1]
)
def test_selection_is_the_loss_of_the_best_tokens(fractions: tuple[float, float]) -> None:
    images, texts, mask, scale = case()
    of_images, of_texts = _best_by_loops(images, texts, mask)
    kept_patches = math.ceil(fractions[0] * images.shape[1])
    best = of_images.topk(kept_patches).indices.sort().values
    chosen = torch.zeros_like(mask)
    for row, real in enumerate(mask.sum(dim=1).tolist()):
        chosen[row, of_texts[row].topk(math.ceil(fractions[1] * real)).indices] = True

    def reference(images: Tensor, texts: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        kept = torch.stack([image[index] for image, index in zip(images, best, strict=True)])
        return tokenwise_workers.loop_loss(kept, texts, chosen, scale)

    def selected(images: Tensor, texts: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        return tokenwise_info_nce(
            images, texts, mask, scale, image_fraction=fractions[0], text_fraction=fractions[1]
        )

    expected = with_gradients(reference, (images, texts, mask, scale))
    found = with_gradients(selected, (images, texts, mask, scale))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    images, texts, mask, scale = case()
    empty = mask.clone()
    empty[[3, 6]] = False
    with pytest.raises(ValueError, match="text mask's row 3 has no real token: every caption"):
        tokenwise_info_nce(images, texts, empty, scale)
    with pytest.raises(ValueError, match="text mask's row 3 has no real token"):
        tokenwise_similarity(images, texts, empty)
    with pytest.raises(ValueError, match=r"image tokens \(8, 5, 6\), text tokens \(8, 9, 6\) and"):
        tokenwise_info_nce(images, texts, mask[:, :5], scale)
    with pytest.raises(ValueError, match=r"a torch.float64 text mask .*: they must be .*bool"):
        tokenwise_info_nce(images, texts, mask.double(), scale)
    with pytest.raises(ValueError, match="4 images and 8 texts: they must be pairs"):
        tokenwise_info_nce(images[:4], texts, mask, scale)
    for fraction in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            tokenwise_info_nce(images, texts, mask, scale, image_fraction=fraction)
        with pytest.raises(ValueError, match="text_fraction is"):
            tokenwise_info_nce(images, texts, mask, scale, text_fraction=fraction)
    with pytest.raises(ValueError, match="block_elements is 0; it must be at least 1, or None"):
        tokenwise_info_nce(images, texts, mask, scale, block_elements=0)


PROCESSES = 2


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    run_processes(tokenwise_workers.run, PROCESSES, str(folder))
    return [torch.load(folder / f"{n}.pt", weights_only=True) for n in range(PROCESSES)]


@pytest.mark.distributed
def test_processes_have_the_loss_and_the_gradient_of_one(
    of_processes: list[dict[str, Any]],
) -> None:
    expected = tokenwise_workers.loss_of(slice(None), tokenwise_workers.LENGTH, (1.0, 1.0))
    assert all(gradient.abs().max() > 1e-3 for gradient in expected[1:])
    for results in of_processes:
        for ours, theirs in zip(results["all tokens"], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        # Every process refuses, also those whose own captions are sound: none waits for another.
        assert "row 3 of process 1 has no real token" in results["refusal"]


@pytest.mark.distributed
def test_with_selection_tokens_are_ranked_within_a_process(
    of_processes: list[dict[str, Any]],
) -> None:
    rows, fractions = tokenwise_workers.ROWS, tokenwise_workers.FRACTIONS["some tokens"]
    images, texts, mask, _ = case()
    parameters = tokenwise_workers.projections()
    own = torch.nn.functional.normalize(images @ parameters[0], dim=-1)
    other = torch.nn.functional.normalize(texts @ parameters[1], dim=-1)
    chosen, best = torch.zeros_like(mask), []
    for first in range(0, rows, rows // PROCESSES):
        some = slice(first, first + rows // PROCESSES)
        of_images, of_texts = _best_by_loops(own[some].detach(), other[some].detach(), mask[some])
        best.append(of_images.topk(math.ceil(fractions[0] * images.shape[1])).indices)
        for row in range(some.start, some.stop):
            count = math.ceil(fractions[1] * int(mask[row].sum()))
            chosen[row, of_texts[row - first].topk(count).indices] = True
    kept = torch.stack([image[index] for image, index in zip(own, torch.cat(best), strict=True)])
    value = tokenwise_workers.loop_loss(kept, other, chosen, parameters[2].exp())
    expected = [value.detach(), *torch.autograd.grad(value, parameters)]
    for results in of_processes:
        for ours, theirs in zip(results["some tokens"], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
