"""The token-wise similarities and their gradients as fused Triton kernels, for CUDA.

**These kernels have never run on a GPU.** The tests run them in Triton's interpreter, on a CPU,
against `tokenwise_blocked`, and compile them for an H100 and H200 (compute capability 9.0): that
shows what they compute and that they fit the chip, not that the compiled ones are right or fast. So
they are off unless asked for (``kernel="triton"``); `tokenwise_blocked` is the reference and the
default.

Nothing of the product of all tokens reaches memory: a program takes one image and some texts, holds
their product on the chip, and writes the two means and which tokens won, one byte each. The
backward pass builds the sparse matrix of winners on the chip too, a tile at a time, and multiplies.
Every sum is in a fixed order: there are no atomic additions.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from declip_train.tokenwise_blocked import Similarity, TextLayout

__all__ = ["gradients", "refuse_unless_usable", "similarity"]

_PATCHES = 64
"""Image tokens a tile."""
_DIMS = 64
"""Entries of a token that the forward kernel multiplies at once."""
_WIDEST = 256
"""Entries of a token that a program of the backward pass sums."""
_ROWS = 64
"""Text tokens that a program of the backward pass sums."""
_TEXTS = 8
"""Texts a program of the forward pass compares its image with."""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuse_unless_usable(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError, saying why and what to do, where the kernels can't run."""
    remedy = 'use kernel="blocked", which computes the same'
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f'kernel "triton" needs the package triton: install it, or {remedy}.')
    if device.type != "cuda" and not _interpreted():
        raise ValueError(f'kernel "triton" runs on CUDA, but the tokens are on {device}: {remedy}.')
    if dtype == torch.float64:
        raise ValueError(f'kernel "triton" multiplies no float64: {remedy}.')


def _kernels() -> Any:
    """The compiled kernels; their module imports triton, which not every machine has."""
    from declip_train import tokenwise_kernels

    return tokenwise_kernels


def _classes(layout: TextLayout) -> Iterator[tuple[int, int, int]]:
    """Runs of texts that share a tile size, as (first, last, size): 16, 32, 64, ..."""
    first = 0
    while first < len(layout.lengths):
        size = _tile(layout.lengths[first])
        last = first
        while last < len(layout.lengths) and layout.lengths[last] <= size:
            last += 1
        yield first, last, size
        first = last


def _tile(size: int) -> int:
    """The smallest power of two that holds `size`; a matrix unit takes no less than 16."""
    return max(16, 1 << (size - 1).bit_length())


def _winner_dtype(size: int) -> torch.dtype:
    return torch.uint8 if size <= 1 << 8 else torch.int32


def similarity(images: Tensor, texts: Tensor, layout: TextLayout, *, keep: bool) -> Similarity:
    """As `tokenwise_blocked.similarity`; winners are (B, N, P) and (B, M)."""
    batch, patches, dim = images.shape
    num_texts = len(layout.lengths)
    to_text = images.new_empty(batch, num_texts, dtype=torch.float32)
    to_image = torch.empty_like(to_text)
    shapes = ((batch, num_texts, patches), (batch, layout.num_tokens)) if keep else ((1,), (1,))
    best_text = images.new_empty(shapes[0], dtype=_winner_dtype(max(layout.lengths)))
    best_patch = images.new_empty(shapes[1], dtype=_winner_dtype(patches))
    lengths = torch.tensor(layout.lengths, device=images.device)
    for first, last, size in _classes(layout):
        # The batch is the grid's first axis: the only one without a limit of 65,535.
        grid = (batch, -(-(last - first) // _TEXTS))
        _kernels().similarity_kernel[grid](
            images,
            texts,
            layout.starts,
            lengths,
            to_text,
            to_image,
            best_text,
            best_patch,
            first,
            last,
            num_texts,
            layout.num_tokens,
            patches,
            dim,
            KEEP=keep,
            TEXTS=_TEXTS,
            PATCHES=min(_PATCHES, _tile(patches)),
            LENGTH=size,
            DIMS=min(_DIMS, _tile(dim)),
            num_warps=4 if size <= 32 else 8,
        )
    return Similarity(to_text, to_image, (best_text, best_patch) if keep else ())


def gradients(
    images: Tensor, texts: Tensor, layout: TextLayout, found: Similarity
) -> tuple[Tensor, Tensor]:
    """As `tokenwise_blocked.gradients`, from the winners of this module's `similarity`."""
    batch, patches, dim = images.shape
    lengths = torch.tensor(layout.lengths, device=images.device)
    of_images = torch.zeros_like(images, dtype=torch.float32)
    of_texts = torch.empty_like(texts, dtype=torch.float32)
    weights = (
        (found.image_to_text / patches).contiguous(),
        (found.text_to_image / lengths).contiguous(),
    )
    dims = min(_WIDEST, _tile(dim))
    patch_tile = min(_PATCHES, _tile(patches))
    for first, last, size in _classes(layout):
        shared = (
            images,
            texts,
            layout.starts,
            lengths,
            *weights,
            *found.winners,
        )
        sizes = (first, last, batch, len(layout.lengths), layout.num_tokens, patches, dim)
        _kernels().image_gradient_kernel[(batch, -(-patches // patch_tile), -(-dim // dims))](
            *shared, of_images, *sizes, PATCHES=patch_tile, LENGTH=size, DIMS=dims, num_warps=8
        )
        rows = min(_ROWS, size)
        _kernels().text_gradient_kernel[(last - first, size // rows, -(-dim // dims))](
            *shared, of_texts, *sizes, PATCHES=patch_tile, ROWS=rows, DIMS=dims, num_warps=8
        )
    return of_images, of_texts
