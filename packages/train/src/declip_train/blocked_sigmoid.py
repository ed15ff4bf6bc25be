"""Sigmoid loss of all pairs of queries and keys, tile by tile: every pair is a yes or a no."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from declip_train.contrastive_blocks import (
    PairGradients,
    Tile,
    accumulator,
    default_tile_edge,
    full_precision,
    refuse_second_derivative,
    scaled_logits,
    tiles,
    without_autocast,
)

__all__ = ["blocked_sigmoid"]


def _signed_logits(
    queries: Tensor, keys: Tensor, tile: Tile, own_column: int, scale: Tensor, bias: Tensor
) -> Tensor:
    """(rows, columns): the logits, negated where the answer is yes; large is wrong everywhere."""
    logits = scaled_logits(queries[tile.rows], keys[tile.columns], scale).add_(bias)
    tile.diagonal(logits, own_column)[0].neg_()
    return logits


class _BlockedSigmoid(torch.autograd.Function):
    """Every logit's derivative depends on that logit alone, so the forward pass, which has it, sums
    the gradients up on the way, and no tile is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        own_column: int,
        edge: int,
        with_gradients: bool,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        bias: Tensor,
    ) -> Tensor:
        precise = full_precision(queries[:0]).dtype
        exact_scale, exact_bias = (each.to(precise).reshape(()) for each in (scale, bias))
        total, of_bias = exact_scale.new_zeros(()), exact_scale.new_zeros(())
        need_queries, need_keys = ctx.needs_input_grad[3:5]
        gradients = PairGradients(
            queries,
            keys,
            exact_scale,
            for_queries=accumulator(queries, precise) if need_queries else None,
            for_keys=accumulator(keys, precise) if need_keys else None,
        )

        def parts(band: Sequence[Tile]) -> Iterator[tuple[slice, Tensor]]:
            for tile in band:
                signed = _signed_logits(queries, keys, tile, own_column, exact_scale, exact_bias)
                total.add_(F.softplus(signed).sum())
                if with_gradients:
                    gradient = signed.sigmoid_()
                    tile.diagonal(gradient, own_column)[0].neg_()
                    of_bias.add_(gradient.sum())
                    yield tile.columns, gradient

        share = exact_scale.new_tensor(1 / queries.shape[0])
        with without_autocast(queries.device):
            for rows, band in tiles(queries.shape[0], keys.shape[0], edge):
                gradients.add_band(rows, parts(band), share)
        found = (gradients.for_queries, gradients.for_keys, gradients.for_scale, of_bias * share)
        ctx.shapes = [(each.dtype, each.shape) for each in (queries, keys, scale, bias)]
        ctx.save_for_backward(*found)
        return total * share

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        needed = ctx.needs_input_grad[3:]
        found = zip(ctx.saved_tensors, ctx.shapes, needed, strict=True)
        return (
            None,
            None,
            None,
            *(
                (gradient * of_loss).to(dtype).view(shape) if need else None
                for gradient, (dtype, shape), need in found
            ),
        )


def blocked_sigmoid(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    own_column: int,
    tile_edge: int | None = None,
) -> Tensor:
    """Mean over rows of the sum over columns of -log sigmoid(z (scale q k + bias)), where z is 1
    for a row's own key and -1 for the others.

    Args:
        queries: (B, D).
        keys: (N, D) of the same dtype.
        scale: scalar factor on the products.
        bias: scalar added to all logits.
        own_column: column of row 0's match; row i's is i columns further.
        tile_edge: rows and columns of a tile; None: what suits the device.

    Returns:
        Scalar in float32 or float64. Differentiable once by all four tensors.
    """
    # torch ships `Function.apply` without types.
    apply = cast(Any, _BlockedSigmoid).apply
    edge = tile_edge or default_tile_edge(queries.device)
    return cast(
        Tensor, apply(own_column, edge, torch.is_grad_enabled(), queries, keys, scale, bias)
    )
