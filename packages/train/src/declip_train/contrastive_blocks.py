"""Tiles of a matrix of logits that is never whole: what the contrastive losses are computed with.

The logits of B queries against N keys are B x N numbers; a soft-max over them needs only one
number a row (and, for the other direction, one a column). So the matrix is computed tile by tile,
the tile is reduced and forgotten, and the backward pass of a soft-max computes it again. Memory is
a few tiles and the gradients, whatever B and N are, for one product more than the plain way; where
both directions of the loss are taken from one matrix, two products are saved.

Products are in the dtype of the features (under autocast, in its dtype), everything after them in
float32, or in float64 where the features have it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "PairGradients",
    "Tile",
    "accumulator",
    "compute_dtype",
    "default_tile_edge",
    "full_precision",
    "refuse_second_derivative",
    "scaled_logits",
    "tiles",
    "without_autocast",
]

# Measured on a CPU core at D = 512, B = 1,024 and 4,096: edges of 256 to 1,024 are equally fast to
# 7 per cent, 2,048 is slower by 15; a tile of 1,024 in float32 is 4 MB. A GPU needs larger products
# to be busy: 64 MB.
_TILE_EDGE = {"cpu": 1024}
_TILE_EDGE_ELSEWHERE = 4096


class Tile(NamedTuple):
    """Rows and columns of the matrix of logits that are computed together."""

    rows: slice
    columns: slice

    def diagonal(self, logits: Tensor, offset: int) -> tuple[Tensor, slice, slice]:
        """The entries of row i and column i + `offset` that lie in this tile.

        Args:
            logits: (rows, columns), the tile.
            offset: column, in the whole matrix, of the entry of row 0.

        Returns:
            A view into `logits` (num,), and the rows and columns of the whole matrix that the
            entries belong to; all empty if the tile has none.
        """
        shift = self.rows.start + offset - self.columns.start
        entries = logits.diagonal(shift)
        first = self.rows.start + max(0, -shift)
        rows = slice(first, first + entries.numel())
        return entries, rows, slice(rows.start + offset, rows.stop + offset)


def default_tile_edge(device: torch.device) -> int:
    """Rows and columns of a tile on this kind of device, if the caller names none."""
    return _TILE_EDGE.get(device.type, _TILE_EDGE_ELSEWHERE)


def tiles(num_rows: int, num_columns: int, edge: int) -> Iterator[tuple[slice, list[Tile]]]:
    """Cover a matrix, band of rows by band of rows: yields each band with its tiles."""
    for top in range(0, num_rows, edge):
        rows = slice(top, min(top + edge, num_rows))
        yield (
            rows,
            [
                Tile(rows, slice(left, min(left + edge, num_columns)))
                for left in range(0, num_columns, edge)
            ],
        )


def compute_dtype(features: Tensor) -> torch.dtype:
    """The dtype in which torch would multiply these features here: autocast's, where it is on.

    A backward pass runs outside of autocast, and must compute the logits that the forward pass
    computed; so the losses read the dtype once and convert by hand.
    """
    kind = features.device.type
    if features.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return features.dtype


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which a product has the dtype of its operands."""
    return torch.autocast(device.type, enabled=False)


def full_precision(tensor: Tensor) -> Tensor:
    """Half precision is too coarse for a soft-max over a large batch; float64 stays what it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def refuse_second_derivative() -> None:
    """Called at the start of a backward pass: torch would go on with gradients that are constants,
    and second derivatives that depend on them would be wrong without a word.

    Raises:
        RuntimeError: this backward pass is itself to be differentiated.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "A contrastive loss was differentiated with create_graph=True, but its backward pass "
            "has no derivative: differentiate it once, without create_graph."
        )


def scaled_logits(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """Scale times the products of all queries with all keys, in full precision.

    Args:
        queries: (rows, D).
        keys: (columns, D), the same dtype.
        scale: scalar, in full precision.

    Returns:
        (rows, columns), new memory that the caller may overwrite.
    """
    if queries.dtype == scale.dtype:
        # D numbers a row are scaled, not N.
        return (queries * scale) @ keys.T
    return (queries @ keys.T).to(scale.dtype).mul_(scale)


def accumulator(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in the shape of the features, whose rows may be parts of longer ones in memory."""
    return torch.zeros_like(features, dtype=dtype, memory_format=torch.contiguous_format)


class PairGradients:
    """Gradients of one matrix of queries, one of keys and the scale, summed up tile by tile.

    The gradient that is added is that of the logits; `factor`, which all of it has in common, stays
    out of it until after the product, so that half precision does not lose 1 / batch size.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        *,
        for_queries: Tensor | None,
        for_keys: Tensor | None,
    ) -> None:
        """Add to the given tensors, see `accumulator`; None where no gradient is wanted."""
        self.queries, self.keys, self.scale = queries, keys, scale
        self.for_queries, self.for_keys = for_queries, for_keys
        self.for_scale = torch.zeros_like(scale)

    def add_band(self, rows: slice, parts: Iterator[tuple[slice, Tensor]], factor: Tensor) -> None:
        """Add the gradients of one band of rows.

        Args:
            rows: the band.
            parts: columns of each tile and the gradient (rows, columns) of its logits, without
                `factor`, in full precision.
            factor: scalar.
        """
        queries = self.queries[rows]
        half = queries.dtype != self.scale.dtype
        slope = self.scale * factor
        sloped = queries if half else queries * slope
        towards = torch.zeros_like(queries, dtype=self.scale.dtype)
        for columns, gradient in parts:
            if half:
                coarse = gradient.to(queries.dtype)
                towards += coarse @ self.keys[columns]
                if self.for_keys is not None:
                    self.for_keys[columns] += (coarse.T @ queries).to(slope.dtype).mul_(slope)
            else:
                towards.addmm_(gradient, self.keys[columns])
                if self.for_keys is not None:
                    self.for_keys[columns].addmm_(gradient.T, sloped)
        # The scale's gradient is the sum over gradient times cosine, which needs no tile again.
        self.for_scale += (towards * queries).sum() * factor
        if self.for_queries is not None:
            self.for_queries[rows] += towards * slope
