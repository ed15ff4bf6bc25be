"""Similarities of samples that are sets of tokens, and their gradients, block by block.

What `tokenwise` computes with, on any device. The product of all image tokens with all text tokens
is never held whole: a block of it is reduced to maxima both ways and forgotten. What is kept for
the backward pass is which token won, one byte each, because the gradient of a maximum goes to its
winner alone: each image token receives from one token of each text, and each text token from one
patch of each image. At 49 patches and 77 text tokens that is a thirtieth of the dense product's
arithmetic.

Texts are packed: their real tokens only, one after the other, in order of length. Texts of one
length then form a rectangle, so that there is no padding to compute or to mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BLOCK_ELEMENTS", "Similarity", "TextLayout", "best_matches", "gradients", "similarity"]

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Entries of a block of the product: on a CPU what its cache holds, on a GPU half a gigabyte."""


class TextLayout:
    """Where the tokens of N texts stand in the packed matrix: texts in order of length.

    Attributes:
        lengths: number of tokens of each text, in packed order.
        starts: (N,) int64, each text's first row in the packed matrix.
        text_of_token: (M,) int64, the text (in packed order) of each row.
        num_tokens: M, the sum of the lengths.
        order: (N,) int64, the original row of each packed text.
        position: (N,) int64, its inverse: where each original row went.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        given = torch.tensor(lengths, dtype=torch.int64)
        order = torch.argsort(given, stable=True)
        ordered = given[order]
        starts = torch.cumsum(ordered, 0) - ordered
        text_of_token = torch.repeat_interleave(torch.arange(len(lengths)), ordered)
        self.lengths: list[int] = ordered.tolist()
        self.num_tokens = int(ordered.sum())
        self._token = torch.arange(self.num_tokens) - starts[text_of_token]
        self._row = order[text_of_token]
        self.order = order.to(device)
        self.position = torch.argsort(order).to(device)
        self.starts = starts.to(device)
        self.text_of_token = text_of_token.to(device)

    def pack(self, tokens: Tensor, token_order: Tensor | None = None) -> Tensor:
        """Take the real tokens (M, d) out of padded ones (N, L, d), with gradient.

        Args:
            tokens: (N, L, d).
            token_order: (N, at least the longest) int64, where each text's tokens stand in its row;
                None: at its beginning, in order.
        """
        rows, places = self._row.to(tokens.device), self._token.to(tokens.device)
        if token_order is not None:
            places = token_order[rows, places]
        return tokens.flatten(0, 1).index_select(0, rows * tokens.shape[1] + places)

    def rectangles(self, max_tokens: int) -> Iterator[tuple[slice, slice, int]]:
        """Runs of texts of one length, as (texts, tokens, length).

        Args:
            max_tokens: how many tokens a run may have; one text is always a run.
        """
        first = token = 0
        for length, run in groupby(self.lengths):
            last = first + sum(1 for _ in run)
            step = max(1, max_tokens // length)
            for begin in range(first, last, step):
                end = min(last, begin + step)
                size = (end - begin) * length
                yield slice(begin, end), slice(token, token + size), length
                token += size
            first = last


class Similarity(NamedTuple):
    """Both late-interaction similarities of B images with N texts, as (B, N)."""

    image_to_text: Tensor
    """Mean over the image's tokens of the largest product with a token of the text."""
    text_to_image: Tensor
    """Mean over the text's tokens of the largest product with a token of the image."""
    winners: tuple[Tensor, ...]
    """What `gradients` needs: (B, P, N), the winning token in each text, and (M, B), the winning
    patch of each image. Empty if not kept."""


def _index_dtype(size: int) -> torch.dtype:
    """The smallest type that holds 0 to size - 1: winners are what grows with the batch squared."""
    if size <= 1 << 8:
        return torch.uint8
    return torch.int16 if size <= 1 << 15 else torch.int32


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in float32 for half precisions: a maximum of rounded products is no maximum."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def similarity(
    images: Tensor, texts: Tensor, layout: TextLayout, *, block: int, keep: bool
) -> Similarity:
    """Similarities both ways from one product a block.

    Args:
        images: (B, P, d).
        texts: (M, d), packed by `layout`.
        layout: of N texts; columns of the result are in its order.
        block: entries of the product that may be held at once; never less than those of one image
            with one text.
        keep: keep the winners for `gradients`.

    Returns:
        float32, or float64 from float64. NaN in a token is NaN in every similarity it has part in.
    """
    batch, patches, _ = images.shape
    num_texts = len(layout.lengths)
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    to_text = images.new_empty(batch, num_texts, dtype=dtype)
    to_image = images.new_empty(batch, num_texts, dtype=dtype)
    winners: tuple[Tensor, ...] = ()
    if keep:
        longest = max(layout.lengths)
        winners = (
            images.new_empty(batch, patches, num_texts, dtype=_index_dtype(longest)),
            images.new_empty(layout.num_tokens, batch, dtype=_index_dtype(patches)),
        )
    # A few images with many texts: a wide product, whose rows are still long enough to vectorize.
    images_a_block = max(1, min(batch, block // (patches * max(layout.lengths) * 8)))
    for first in range(0, batch, images_a_block):
        some = slice(first, min(batch, first + images_a_block))
        own = images[some].flatten(0, 1)
        count = some.stop - some.start
        for columns, tokens, length in layout.rectangles(block // (count * patches)):
            product = _product(own, texts[tokens].T).view(count, patches, -1, length)
            if not keep:
                to_text[some, columns] = product.amax(dim=3).mean(dim=1)
                to_image[some, columns] = product.amax(dim=1).mean(dim=2)
                continue
            value, index = product.max(dim=3)
            to_text[some, columns] = value.mean(dim=1)
            winners[0][some, :, columns] = index
            value, index = product.max(dim=1)
            to_image[some, columns] = value.mean(dim=2)
            winners[1][tokens, some] = index.flatten(1).T
    return Similarity(to_text, to_image, winners)


def best_matches(
    images: Tensor, texts: Tensor, layout: TextLayout, *, block: int
) -> tuple[Tensor, Tensor]:
    """Each token's largest product with any token of any sample of the other kind.

    Args:
        images: (B, P, d).
        texts: (M, d), packed by `layout`.
        layout: of the texts; only the number of tokens is read.
        block: as in `similarity`.

    Returns:
        (B, P) of the image tokens and (M,) of the text tokens, float32 or float64.
    """
    own = images.flatten(0, 1)
    rows = max(1, block // max(1, layout.num_tokens))
    of_images, of_texts = [], None
    for first in range(0, own.shape[0], rows):
        product = _product(own[first : first + rows], texts.T)
        of_images.append(product.amax(dim=1))
        best = product.amax(dim=0)
        of_texts = best if of_texts is None else torch.maximum(of_texts, best)
    assert of_texts is not None
    return torch.cat(of_images).view(images.shape[:2]), of_texts


@dataclass(frozen=True)
class _Side:
    """One kind of samples as the gradient sees it: tokens, and where each sample's stand."""

    tokens: Tensor
    """(T, d)."""
    starts: Tensor
    """(S,) int64, each sample's first token."""
    sample_of_token: Tensor
    """(T,) int64."""
    bounds: list[int]
    """S + 1 numbers: as `starts`, and T."""
    winners: Tensor
    """(T, S of the other side): which of the other sample's tokens won for each of these tokens."""
    weights: Tensor
    """(S, S of the other side): gradient of each of a sample's maxima with another sample."""


def _sides(
    images: Tensor, texts: Tensor, layout: TextLayout, found: Similarity
) -> tuple[_Side, _Side]:
    """Images and texts; `found` holds the gradients of the similarities in their places."""
    batch, patches, _ = images.shape
    samples = torch.arange(batch, device=images.device)
    lengths = torch.tensor(layout.lengths, device=images.device, dtype=found.text_to_image.dtype)
    image_side = _Side(
        tokens=images.flatten(0, 1),
        starts=samples * patches,
        sample_of_token=samples.repeat_interleave(patches),
        bounds=[sample * patches for sample in range(batch + 1)],
        winners=found.winners[0].flatten(0, 1),
        weights=found.image_to_text / patches,
    )
    bounds = [0]
    for length in layout.lengths:
        bounds.append(bounds[-1] + length)
    text_side = _Side(
        tokens=texts,
        starts=layout.starts,
        sample_of_token=layout.text_of_token,
        bounds=bounds,
        winners=found.winners[1],
        weights=(found.text_to_image / lengths).T,
    )
    return image_side, text_side


def gradients(
    images: Tensor,
    texts: Tensor,
    layout: TextLayout,
    found: Similarity,
    *,
    block: int,
    dense: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens.

    Args:
        images: (B, P, d).
        texts: (M, d), packed by `layout`.
        layout: of the texts.
        found: gradients (B, N) of the two similarities, in their places, and the winners.
        block: entries of the sparse product that may be held at once; never less than one sample's.
        dense: write each block of the sparse matrix out and multiply, which is what a GPU is fast
            at, instead of summing winners, which is what a CPU is fast at.

    Returns:
        (B, P, d) and (M, d), in the dtype of the similarities' gradients. The order of each sum is
        fixed, so equal inputs give equal bytes.
    """
    image_side, text_side = _sides(images, texts, layout, found)
    if dense:
        own, other = _gradients_by_products(image_side, text_side, block)
    else:
        own = _gradient_by_sums(image_side, text_side, block)
        other = _gradient_by_sums(text_side, image_side, block)
    return own.view(images.shape), other


def _gradient_by_sums(own: _Side, other: _Side, block: int) -> Tensor:
    """Gradient of one side's tokens as weighted sums of the other side's."""
    result = torch.empty_like(own.tokens, dtype=own.weights.dtype)
    table = other.tokens.to(own.weights.dtype)
    starts = other.starts.int()
    num_others, num_other_tokens = len(other.bounds) - 1, other.bounds[-1]
    num_samples = len(own.bounds) - 1
    first = 0
    while first < num_samples:
        last = first + 1
        begin = own.bounds[first]
        while last < num_samples and (
            (own.bounds[last + 1] - begin) * num_others + (last + 1 - first) * num_other_tokens
            <= block
        ):
            last += 1
        rows = slice(begin, own.bounds[last])
        # What the own tokens' maxima send back: row by row, one token of each other sample.
        result[rows] = F.embedding_bag(
            own.winners[rows] + starts,
            table,
            mode="sum",
            per_sample_weights=own.weights[own.sample_of_token[rows]],
        )
        # What the other tokens' maxima send here: sorted by the token of this block that won.
        winners = other.winners[:, first:last] + (own.starts[first:last] - begin).int()
        weights = other.weights[:, first:last][other.sample_of_token]
        result[rows] += _sums_by_winner(winners, weights, table, rows.stop - rows.start)
        first = last
    return result


def _sums_by_winner(winners: Tensor, weights: Tensor, table: Tensor, num_winners: int) -> Tensor:
    """Sum over (t, s) of weights[t, s] table[t] into row winners[t, s]: (num_winners, d).

    Sorting first turns scattered additions, which torch does one at a time on a CPU, into sums of
    runs, which are vectorized. A stable sort keeps the order of every sum the same.
    """
    flat = winners.flatten()
    order = torch.argsort(flat, stable=True)
    ends = torch.cumsum(torch.bincount(flat, minlength=num_winners), 0)
    return F.embedding_bag(
        (order // winners.shape[1]).int(),
        table,
        F.pad(ends, (1, 0)).int(),
        mode="sum",
        per_sample_weights=weights.flatten()[order],
        include_last_offset=True,
    )


def _gradients_by_products(
    image_side: _Side, text_side: _Side, block: int
) -> tuple[Tensor, Tensor]:
    """Gradients of both sides from the sparse matrix written out, some images at a time."""
    num_images, num_tokens = len(image_side.bounds) - 1, text_side.bounds[-1]
    patches = image_side.bounds[1]
    images, texts = image_side.tokens, text_side.tokens
    of_images = torch.empty_like(images, dtype=image_side.weights.dtype)
    of_texts = torch.zeros_like(texts, dtype=image_side.weights.dtype)
    images_a_block = max(1, block // (patches * num_tokens))
    for first in range(0, num_images, images_a_block):
        last = min(num_images, first + images_a_block)
        rows = slice(first * patches, last * patches)
        matrix = images.new_zeros(rows.stop - rows.start, num_tokens)
        samples = image_side.sample_of_token[rows]
        matrix.scatter_(
            1,
            image_side.winners[rows] + text_side.starts,
            image_side.weights[samples].to(matrix.dtype),
        )
        # One entry for each pair of a text token and an image, so no two additions meet.
        winners = text_side.winners[:, first:last] + image_side.starts[: last - first]
        weights = text_side.weights[:, first:last][text_side.sample_of_token]
        matrix.scatter_add_(0, winners.T, weights.T.to(matrix.dtype))
        of_images[rows] = _product(matrix, texts)
        of_texts += _product(matrix.T, images[rows])
    return of_images, of_texts
