"""The kernels of `tokenwise_triton`, which says what is known of them. Importing this needs triton.

Tensors are contiguous. In what follows image i has `num_patches` tokens of `dim` entries; text j
has `lengths[j]` tokens from row `starts[j]` of the packed matrix. Offsets are 64-bit: the winners
of a large batch are more than 2^31.
"""

# Capitals are what is compiled in, as is Triton's custom.
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["image_gradient_kernel", "similarity_kernel", "text_gradient_kernel"]


def _similarity(
    images: tl.tensor,
    texts: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    to_text: tl.tensor,
    to_image: tl.tensor,
    best_text: tl.tensor,
    best_patch: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    num_texts: tl.tensor,
    num_tokens: tl.tensor,
    num_patches: tl.tensor,
    dim: tl.tensor,
    KEEP: tl.constexpr,
    TEXTS: tl.constexpr,
    PATCHES: tl.constexpr,
    LENGTH: tl.constexpr,
    DIMS: tl.constexpr,
) -> None:
    """Image `program_id(0)` with TEXTS texts of at most LENGTH tokens: both means, both winners."""
    i = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, LENGTH)
    for t in range(TEXTS):
        j = first + tl.program_id(1) * TEXTS + t
        if j < last:
            pair = i * num_texts + j
            start = tl.load(starts + j)
            length = tl.load(lengths + j).to(tl.int32)
            real = token < length
            total = 0.0
            top = tl.full((LENGTH,), float("-inf"), tl.float32)
            top_patch = tl.zeros((LENGTH,), tl.int32)
            for patch0 in range(0, num_patches, PATCHES):
                patch = patch0 + tl.arange(0, PATCHES)
                inside = patch < num_patches
                product = tl.zeros((PATCHES, LENGTH), tl.float32)
                for dim0 in range(0, dim, DIMS):
                    entry = dim0 + tl.arange(0, DIMS)
                    own = tl.load(
                        images + (i * num_patches + patch)[:, None] * dim + entry[None, :],
                        mask=inside[:, None] & (entry < dim)[None, :],
                        other=0.0,
                    )
                    other = tl.load(
                        texts + (start + token)[:, None] * dim + entry[None, :],
                        mask=real[:, None] & (entry < dim)[None, :],
                        other=0.0,
                    )
                    product = tl.dot(own, tl.trans(other), product, input_precision="ieee")
                # tl.max passes over NaN; what is added is 0 where there is none.
                poison = tl.where(product == product, 0.0, product)
                masked = tl.where(real[None, :], product, float("-inf"))
                best, best_index = tl.max(masked, axis=1, return_indices=True)
                best += tl.sum(poison, axis=1)
                total += tl.sum(tl.where(inside, best, 0.0))
                if KEEP:
                    tl.store(
                        best_text + pair * num_patches + patch,
                        best_index.to(best_text.dtype.element_ty),
                        mask=inside,
                    )
                masked = tl.where(inside[:, None], product, float("-inf"))
                best, best_index = tl.max(masked, axis=0, return_indices=True)
                best += tl.sum(poison, axis=0)
                better = (best > top) | (best != best)
                top_patch = tl.where(better, best_index.to(tl.int32) + patch0, top_patch)
                top = tl.where(better, best, top)
            tl.store(to_text + pair, total / num_patches)
            tl.store(to_image + pair, tl.sum(tl.where(real, top, 0.0)) / length)
            if KEEP:
                tl.store(
                    best_patch + i * num_tokens + start + token,
                    top_patch.to(best_patch.dtype.element_ty),
                    mask=real,
                )


def _image_gradient(
    images: tl.tensor,
    texts: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    text_weights: tl.tensor,
    image_weights: tl.tensor,
    best_text: tl.tensor,
    best_patch: tl.tensor,
    gradient: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    batch: tl.tensor,
    num_texts: tl.tensor,
    num_tokens: tl.tensor,
    num_patches: tl.tensor,
    dim: tl.tensor,
    PATCHES: tl.constexpr,
    LENGTH: tl.constexpr,
    DIMS: tl.constexpr,
) -> None:
    """Add to PATCHES tokens of one image what texts `first` to `last` send them."""
    i = tl.program_id(0).to(tl.int64)
    patch = tl.program_id(1) * PATCHES + tl.arange(0, PATCHES)
    entry = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    token = tl.arange(0, LENGTH)
    inside = patch < num_patches
    places = gradient + (i * num_patches + patch)[:, None] * dim + entry[None, :]
    held = inside[:, None] & (entry < dim)[None, :]
    total = tl.load(places, mask=held, other=0.0)
    for j in range(first, last):
        pair = i * num_texts + j
        start = tl.load(starts + j)
        real = token < tl.load(lengths + j).to(tl.int32)
        winner = tl.load(best_text + pair * num_patches + patch, mask=inside, other=0)
        back = tl.load(best_patch + i * num_tokens + start + token, mask=real, other=0)
        # Patches the winner of a text token, and text tokens the winner of a patch.
        chosen = (winner.to(tl.int32)[:, None] == token[None, :]) & inside[:, None]
        choosing = (back.to(tl.int32)[None, :] == patch[:, None]) & real[None, :]
        tile = tl.where(chosen, tl.load(text_weights + pair), 0.0)
        tile += tl.where(choosing, tl.load(image_weights + pair), 0.0)
        other = tl.load(
            texts + (start + token)[:, None] * dim + entry[None, :],
            mask=real[:, None] & (entry < dim)[None, :],
            other=0.0,
        )
        total = tl.dot(tile.to(other.dtype), other, total, input_precision="ieee")
    tl.store(places, total, mask=held)


def _text_gradient(
    images: tl.tensor,
    texts: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    text_weights: tl.tensor,
    image_weights: tl.tensor,
    best_text: tl.tensor,
    best_patch: tl.tensor,
    gradient: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    batch: tl.tensor,
    num_texts: tl.tensor,
    num_tokens: tl.tensor,
    num_patches: tl.tensor,
    dim: tl.tensor,
    PATCHES: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
) -> None:
    """Write to ROWS tokens of one text what all images send them."""
    j = first + tl.program_id(0)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    entry = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    start = tl.load(starts + j)
    real = token < tl.load(lengths + j).to(tl.int32)
    total = tl.zeros((ROWS, DIMS), tl.float32)
    for image in range(batch):
        i = tl.cast(image, tl.int64)
        pair = i * num_texts + j
        back = tl.load(best_patch + i * num_tokens + start + token, mask=real, other=0)
        text_weight = tl.load(text_weights + pair)
        image_weight = tl.load(image_weights + pair)
        for patch0 in range(0, num_patches, PATCHES):
            patch = patch0 + tl.arange(0, PATCHES)
            inside = patch < num_patches
            winner = tl.load(best_text + pair * num_patches + patch, mask=inside, other=0)
            chosen = (winner.to(tl.int32)[None, :] == token[:, None]) & inside[None, :]
            choosing = (back.to(tl.int32)[:, None] == patch[None, :]) & real[:, None]
            tile = tl.where(chosen, text_weight, 0.0) + tl.where(choosing, image_weight, 0.0)
            own = tl.load(
                images + (i * num_patches + patch)[:, None] * dim + entry[None, :],
                mask=inside[:, None] & (entry < dim)[None, :],
                other=0.0,
            )
            total = tl.dot(tile.to(own.dtype), own, total, input_precision="ieee")
    places = gradient + (start + token)[:, None] * dim + entry[None, :]
    tl.store(places, total, mask=real[:, None] & (entry < dim)[None, :])


# These differ from step to step; without this, each that is 1 or divisible by 16 is compiled apart.
_VARYING = ("first", "last", "batch", "num_texts", "num_tokens")
# Not decorators: those of a package without types would take the types of what they decorate.
similarity_kernel = triton.jit(_similarity, do_not_specialize=_VARYING[:2] + _VARYING[3:])
image_gradient_kernel = triton.jit(_image_gradient, do_not_specialize=_VARYING)
text_gradient_kernel = triton.jit(_text_gradient, do_not_specialize=_VARYING)
