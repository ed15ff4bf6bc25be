"""FILIP's token-wise late interaction: images and texts compared token by token.

The similarity of an image with a text is the mean over the image's tokens of the largest product
with a token of the text; that of a text with an image the mean over the text's real tokens of the
largest product with a token of the image. They are two different matrices, and FILIP's loss is the
symmetric cross-entropy of both. Padding takes no part in either: it is dropped before anything is
multiplied, which is exact, and is most of the arithmetic where captions are short.

With several processes only the text tokens travel, without their padding. Each process compares its
images with all texts, which gives both similarities at once, and hands every other process the
columns of that process's texts: half the arithmetic and a fraction of the traffic of gathering both
sides.

Source: FILIP (arXiv 2111.07783), section 3.1, equations 3-5.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from declip_train import distributed, tokenwise_blocked, tokenwise_triton
from declip_train.tokenwise_blocked import BLOCK_ELEMENTS, Similarity, TextLayout

__all__ = ["Kernel", "tokenwise_info_nce", "tokenwise_similarity"]

Kernel = Literal["blocked", "triton"]
"""What computes the similarities: "blocked" is torch alone, on any device; "triton" a fused kernel
for CUDA (see `tokenwise_triton` for what is known of it)."""


class _Similarity(torch.autograd.Function):
    """Both similarities (B, N) of images (B, P, d) with packed texts (M, d)."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, layout: TextLayout, kernel: Kernel, block: int
    ) -> tuple[Tensor, Tensor]:
        keep = any(ctx.needs_input_grad[:2])
        with torch.autocast(images.device.type, enabled=False):
            if kernel == "triton":
                found = tokenwise_triton.similarity(images, texts, layout, keep=keep)
            else:
                found = tokenwise_blocked.similarity(images, texts, layout, block=block, keep=keep)
        ctx.save_for_backward(images, texts, *found.winners)
        ctx.layout, ctx.kernel, ctx.block = layout, kernel, block
        return found.image_to_text, found.text_to_image

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_text: Tensor, to_image: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, *winners = ctx.saved_tensors
        # Gradients of a large batch's similarities are small; half precision would lose them.
        half = images.dtype in (torch.float16, torch.bfloat16)
        unit = _largest(to_text, to_image) if half else to_text.new_ones(())
        found = Similarity(to_text / unit, to_image / unit, tuple(winners))
        with torch.autocast(images.device.type, enabled=False):
            if ctx.kernel == "triton":
                own, other = tokenwise_triton.gradients(images, texts, ctx.layout, found)
            else:
                own, other = tokenwise_blocked.gradients(
                    images,
                    texts,
                    ctx.layout,
                    found,
                    block=ctx.block,
                    dense=images.device.type != "cpu",
                )
        return (own * unit).to(images.dtype), (other * unit).to(texts.dtype), None, None, None


def _largest(*tensors: Tensor) -> Tensor:
    """The largest magnitude, as a scalar that may be divided by."""
    largest = torch.stack([tensor.abs().amax() for tensor in tensors]).amax()
    return torch.where(largest == 0, torch.ones_like(largest), largest)


class _Exchange(torch.autograd.Function):
    """Hand slice r of dim 0 to process r and get slice r of the result from it: its own inverse."""

    @staticmethod
    def forward(ctx: Any, slices: Tensor) -> Tensor:
        return _all_to_all(slices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _all_to_all(gradients[0])


def _all_to_all(slices: Tensor) -> Tensor:
    received = torch.empty_like(slices, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, slices.contiguous())
    return received


def _rows_of_own_texts(text_to_image: Tensor) -> Tensor:
    """From own images by all texts (B, N) to own texts by all images (B, N)."""
    world = distributed.world_size()
    batch = text_to_image.shape[0]
    blocks = text_to_image.view(batch, world, -1).permute(1, 2, 0)
    if world > 1:
        # torch ships `Function.apply` without types.
        blocks = cast(Tensor, cast(Any, _Exchange).apply(blocks))
    return blocks.transpose(0, 1).reshape(-1, world * batch)


class _Texts(NamedTuple):
    """Texts to compare with: their packed tokens (M, d) and where each stands."""

    tokens: Tensor
    layout: TextLayout


def _working_dtype(tokens: Tensor) -> torch.dtype:
    """The dtype products are taken in: autocast's on a GPU; float32 on a CPU, slow at half ones."""
    if tokens.dtype == torch.float64:
        return torch.float64
    device = tokens.device.type
    if device == "cpu":
        return torch.float32
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


def _refuse_unfit(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor) -> None:
    fits = (
        image_tokens.ndim == text_tokens.ndim == 3
        and text_mask.shape == text_tokens.shape[:2]
        and image_tokens.shape[-1] == text_tokens.shape[-1]
        and image_tokens.numel() > 0
        and text_tokens.numel() > 0
    )
    if not fits or text_mask.dtype != torch.bool:
        raise ValueError(
            f"The token-wise loss was given image tokens {tuple(image_tokens.shape)}, text tokens "
            f"{tuple(text_tokens.shape)} and a {text_mask.dtype} text mask "
            f"{tuple(text_mask.shape)}: they must be (B, P, d), (B, L, d) and bool (B, L), with at "
            "least one row and one token."
        )


def _block_elements(device: torch.device, block_elements: int | None) -> int:
    if block_elements is None:
        return BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"])
    if block_elements < 1:
        raise ValueError(f"block_elements is {block_elements}; it must be at least 1, or None.")
    return block_elements


def _token_counts(text_mask: Tensor, *, of_all_processes: bool) -> list[int]:
    """Number of real tokens of each text, on the host: the one place the host waits for the device.

    The shapes of what follows depend on it, so refusing a caption of padding costs nothing more.
    """
    counts = text_mask.sum(dim=1)
    if of_all_processes:
        counts = distributed.gather_features(counts.unsqueeze(1))[0].flatten()
    numbers: list[int] = counts.tolist()
    if 0 in numbers:
        process, row = divmod(numbers.index(0), text_mask.shape[0])
        where = f"row {row}" + (f" of process {process}" if distributed.world_size() > 1 else "")
        raise ValueError(
            f"The text mask's {where} has no real token: every caption needs at least one (the "
            "tokenizer always writes a start and an end)."
        )
    return numbers


def _kept(fraction: float, count: int) -> int:
    """How many of `count` tokens a fraction keeps: rounded up, so never none."""
    # The small number forgives 0.3 * 10 being a little more than 3.
    return max(1, math.ceil(fraction * count - 1e-9))


def _selected(
    image_tokens: Tensor,
    text_tokens: Tensor,
    token_order: Tensor,
    local_counts: list[int],
    fractions: tuple[float, float],
    block: int,
) -> tuple[Tensor, Tensor]:
    """The best image tokens (B, k, d) and an order of text tokens (B, L) with the best in front.

    Best is the largest product with any token of any text (image) of this process, as the paper
    ranks them. Ranking has no gradient; what is selected has.
    """
    with torch.no_grad():
        layout = TextLayout(local_counts, text_tokens.device)
        packed = layout.pack(text_tokens, token_order)
        of_images, of_texts = tokenwise_blocked.best_matches(
            image_tokens, packed, layout, block=block
        )
        if fractions[1] < 1:
            scores = torch.full_like(token_order, -torch.inf, dtype=of_texts.dtype)
            rows = layout.order[layout.text_of_token]
            places = torch.arange(layout.num_tokens, device=rows.device)
            scores[rows, places - layout.starts[layout.text_of_token]] = of_texts
            ranking = scores.argsort(dim=1, descending=True, stable=True)
            token_order = token_order.gather(1, ranking)
        best = of_images.argsort(dim=1, descending=True, stable=True)
    if fractions[0] < 1:
        best = best[:, : _kept(fractions[0], image_tokens.shape[1])].unsqueeze(-1)
        image_tokens = image_tokens.gather(1, best.expand(-1, -1, image_tokens.shape[-1]))
    return image_tokens, token_order


def _gathered_texts(text_tokens: Tensor, token_order: Tensor, counts: list[int]) -> _Texts:
    """The packed texts of all processes, with gradient; padding does not travel."""
    layout = TextLayout(counts, text_tokens.device)
    if distributed.world_size() == 1:
        return _Texts(layout.pack(text_tokens, token_order), layout)
    # Texts are brought to the length of the longest of all processes, whatever length each has.
    longest, dim = max(counts), text_tokens.shape[-1]
    order = F.pad(token_order, (0, max(0, longest - token_order.shape[1])))[:, :longest]
    compact = text_tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, dim))
    gathered = distributed.gather_features(compact.flatten(1))[0]
    return _Texts(layout.pack(gathered.view(-1, longest, dim)), layout)


def _similarities(
    image_tokens: Tensor, texts: _Texts, kernel: Kernel, block: int
) -> tuple[Tensor, Tensor]:
    """Both similarities (B, N), columns in the texts' original order."""
    to_text, to_image = cast(Any, _Similarity).apply(
        image_tokens.contiguous(), texts.tokens, texts.layout, kernel, block
    )
    return to_text[:, texts.layout.position], to_image[:, texts.layout.position]


def tokenwise_info_nce(
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_mask: Tensor,
    logit_scale: Tensor,
    *,
    image_fraction: float = 1.0,
    text_fraction: float = 1.0,
    kernel: Kernel = "blocked",
    block_elements: int | None = None,
) -> Tensor:
    """FILIP's loss: symmetric cross-entropy of the token-wise similarities, global negatives.

    1/2 of the cross-entropy over all texts given the image, of image-to-text similarities, plus 1/2
    of that over all images given the text, of text-to-image similarities. The mean over processes
    of what they return, and of their gradients, is that of one process with the whole batch.

    Maxima and means are taken in float32, or in float64 from float64. Products are taken in
    autocast's dtype on a GPU, where there is autocast, and text tokens travel in it, as in the
    paper; on a CPU in float32. Memory grows with `block_elements`; what grows with the batch
    squared is one byte for each image token with each text and each text token with each image
    (winners, kept for the backward pass: 1 GiB at batch 4,096, 49 patches and 13 tokens a caption;
    the product itself, with captions padded to 77, is 236 GiB in float32), and the two similarity
    matrices.

    Args:
        image_tokens: (B, P, d), unit length, this process's rows.
        text_tokens: (B, L, d), unit length; padded positions hold anything finite. L may differ
            between processes.
        text_mask: (B, L) bool, True where a real token is, anywhere in the row.
        logit_scale: scalar factor on the similarities (already exponentiated).
        image_fraction: part of each image's tokens that stand for it, above 0 to 1; k = ceil(f P).
            FILIP's paper: 0.25. Taken are those with the largest product with any token of any text
            of this process. 1: nothing is selected.
        text_fraction: the same for the real tokens of each text.
        kernel: "blocked", or "triton" for a fused kernel on CUDA.
        block_elements: entries of the product of all tokens to hold at once ("blocked" only); None:
            `tokenwise_blocked.BLOCK_ELEMENTS`. It does not change the result beyond rounding.

    Returns:
        Scalar, the mean over local rows. A batch of one gives 0; NaN in a token gives NaN.

    Raises:
        ValueError: shapes that do not fit, a caption without a real token (its row is named; on
            every process at once), a fraction out of range, or a kernel that can't run here.

    With selection, tokens are ranked within a process, as in the paper; so N processes equal one
    process with the whole batch whose tokens were ranked among the rows of the same process only,
    not one that ranks among all rows. The paper does not say whether a sample keeps its other
    tokens where it is a row; here the selected ones stand for it both as a row and as a column.

    Source: FILIP (arXiv 2111.07783), equations 3-5 and section 3.1 (selection).
    """
    _refuse_unfit(image_tokens, text_tokens, text_mask)
    if image_tokens.shape[0] != text_tokens.shape[0]:
        raise ValueError(
            f"The token-wise loss was given {image_tokens.shape[0]} images and "
            f"{text_tokens.shape[0]} texts: they must be pairs."
        )
    for name, fraction in (("image_fraction", image_fraction), ("text_fraction", text_fraction)):
        if not 0 < fraction <= 1:
            raise ValueError(f"{name} is {fraction}; it must be above 0 and at most 1.")
    block = _block_elements(image_tokens.device, block_elements)
    dtype = _working_dtype(image_tokens)
    _refuse_kernel(kernel, image_tokens.device, dtype)
    images, texts = image_tokens.to(dtype), text_tokens.to(dtype)
    counts = _token_counts(text_mask, of_all_processes=True)
    token_order = torch.argsort(~text_mask, dim=1, stable=True)
    batch, first = images.shape[0], images.shape[0] * distributed.rank()
    if min(image_fraction, text_fraction) < 1:
        local = counts[first : first + batch]
        fractions = (image_fraction, text_fraction)
        images, token_order = _selected(images, texts, token_order, local, fractions, block)
        counts = [_kept(text_fraction, count) for count in counts]
    to_text, to_image = _similarities(
        images, _gathered_texts(texts, token_order, counts), kernel, block
    )
    matches = torch.arange(first, first + batch, device=images.device)
    per_image = F.cross_entropy(logit_scale * to_text, matches)
    per_text = F.cross_entropy(logit_scale * _rows_of_own_texts(to_image), matches)
    return (per_image + per_text) / 2


def _refuse_kernel(kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    if kernel == "triton":
        tokenwise_triton.refuse_unless_usable(device, dtype)
    elif kernel != "blocked":
        raise ValueError(f'kernel {kernel!r} is not known; choose "blocked" or "triton".')


def tokenwise_similarity(
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_mask: Tensor,
    *,
    kernel: Kernel = "blocked",
    block_elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Token-wise similarities of any images with any texts, of this process, for evaluation.

    Args:
        image_tokens: (B_i, P, d), unit length.
        text_tokens: (B_t, L, d), unit length; padded positions hold anything finite.
        text_mask: (B_t, L) bool, True where a real token is.
        kernel: as in `tokenwise_info_nce`.
        block_elements: as in `tokenwise_info_nce`.

    Returns:
        Image-to-text (B_i, B_t) and text-to-image (B_t, B_i), float32, or float64 from float64;
        differentiable. To rank with an ensemble of prompts, average similarities, not tokens.

    Raises:
        ValueError: as `tokenwise_info_nce`.

    Source: FILIP (arXiv 2111.07783), equations 3-4, and appendix on prompt ensembles.
    """
    _refuse_unfit(image_tokens, text_tokens, text_mask)
    block = _block_elements(image_tokens.device, block_elements)
    dtype = _working_dtype(image_tokens)
    _refuse_kernel(kernel, image_tokens.device, dtype)
    counts = _token_counts(text_mask, of_all_processes=False)
    layout = TextLayout(counts, text_tokens.device)
    order = torch.argsort(~text_mask, dim=1, stable=True)
    texts = _Texts(layout.pack(text_tokens.to(dtype), order), layout)
    to_text, to_image = _similarities(image_tokens.to(dtype), texts, kernel, block)
    return to_text, to_image.T
