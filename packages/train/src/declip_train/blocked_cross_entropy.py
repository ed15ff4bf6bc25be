"""Cross-entropies of several query views against several key views, tile by tile.

The soft-max, label smoothing, hard-negative weighting and masks of the contrastive losses, with a
backward pass that is written out; `losses` gives them their names. The logits l[i, j] are scale
times the product of query i and key j; every query i has one match, its own key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
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

__all__ = ["Comparison", "blocked_cross_entropy"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared with what, and how the comparison becomes a loss."""

    own_columns: tuple[int, ...]
    """For each query view: the column of row 0's match. Row i's is i columns further."""
    excluded_columns: tuple[int, ...] | None = None
    """For each query view: the column that row 0 is not compared with (itself). Row i's is i
    columns further."""
    absent: Tensor | None = None
    """(W, N) bool: keys of each view that are no possible answer, but to their own query."""
    row_weights: Tensor | None = None
    """(W, B): what each row's loss counts with each key view. None: 1 / B, the mean."""
    both_directions: bool = False
    """Also the keys ask and the queries answer, and the two losses are averaged; for B = N."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all columns."""
    hard_negative_beta: float = 0.0
    """Concentration of the negatives' weights on those with large logits; 0 weighs all alike."""
    tile_edge: int | None = None
    """Rows and columns of a tile; None: what suits the device. It changes memory and speed only."""


class _Statistics(NamedTuple):
    """What is kept of the logits, in one direction: n is B for rows and N for columns."""

    log_sums: Tensor
    """(num exponents, n): log of the sum of exp(exponent x logit), see `_exponents`."""
    own: Tensor
    """(n,): logit of the match."""
    totals: Tensor
    """(n,): sum of the logits."""


class _Slopes(NamedTuple):
    """The derivative by the logit in one direction: the sum over exponents e of
    factor x exp(e x logit - log_sum), minus a constant; at the match, something is added, or it is
    something else altogether."""

    log_sums: Tensor
    factors: tuple[Tensor, ...] | None
    constant: float
    own: Tensor
    own_is_all: bool


def _exponents(beta: float) -> tuple[float, ...]:
    """Without beta: the soft-max over all columns. With beta: the two sums, over negatives alone,
    whose quotient is the weighted mean of exp(logit)."""
    return (1.0 + beta, beta) if beta else (1.0,)


class _Objective:
    """Loss and derivative of a row (or column) from what is kept of its logits."""

    def __init__(self, comparison: Comparison, count: int) -> None:
        self.smoothing = comparison.label_smoothing
        # A match alone has no negatives to weigh.
        self.beta = comparison.hard_negative_beta if count > 1 else 0.0
        self.count = count
        self.exponents = _exponents(self.beta)

    def _normalizers(self, statistics: _Statistics) -> Tensor:
        if not self.beta:
            return statistics.log_sums[0]
        powered, weights = statistics.log_sums
        return torch.logaddexp(statistics.own, powered - weights + math.log(self.count - 1))

    def losses(self, statistics: _Statistics) -> Tensor:
        """(n,)."""
        own, beta, others = statistics.own, self.beta, self.count - 1
        losses = self._normalizers(statistics) - own
        if not self.smoothing:
            return losses
        totals = statistics.totals
        if beta:
            # The logits plus the logarithms of their weights.
            totals = own + (1 + beta) * (totals - own)
            totals = totals + others * (math.log(others) - statistics.log_sums[1])
        return losses + self.smoothing * (own - totals / self.count)

    def slopes(self, statistics: _Statistics) -> _Slopes:
        """Derivatives of `losses` by the logits."""
        own, even = statistics.own, self.smoothing / self.count
        if not self.beta:
            lowered = torch.full_like(own, self.smoothing - 1.0)
            return _Slopes(statistics.log_sums, None, even, lowered, own_is_all=False)
        match = (own - self._normalizers(statistics)).exp()
        others = 1.0 - match
        factors = (
            others * (1 + self.beta),
            self.beta * (even * (self.count - 1) - others),
        )
        constant = even * (1 + self.beta)
        at_match = -others + (self.smoothing - even)
        return _Slopes(statistics.log_sums, factors, constant, at_match, own_is_all=True)

    def tile_gradient(
        self, logits: Tensor, slopes: _Slopes, span: slice, dim: int, *, consume: bool
    ) -> Tensor:
        """Derivatives by the logits of a tile, but for the matches.

        Args:
            logits: (rows, columns).
            slopes: of this direction.
            span: rows (if `dim` is 1) or columns (if 0) of the tile.
            dim: along which the soft-max is taken.
            consume: whether the memory of `logits` may be used.
        """
        gradient: Tensor | None = None
        for index, exponent in enumerate(self.exponents):
            reuse = consume and index == len(self.exponents) - 1
            shifts = slopes.log_sums[index, span].unsqueeze(dim)
            if exponent == 1.0:
                part = logits.sub_(shifts) if reuse else logits - shifts
            else:
                part = (logits.mul_(exponent) if reuse else logits * exponent).sub_(shifts)
            part.exp_()
            if slopes.factors is not None:
                part.mul_(slopes.factors[index][span].unsqueeze(dim))
            gradient = part if gradient is None else gradient.add_(part)
        assert gradient is not None
        return gradient.sub_(slopes.constant) if slopes.constant else gradient


class _Pair:
    """One query view against one key view."""

    def __init__(
        self, comparison: Comparison, places: tuple[int, int], views: tuple[Tensor, Tensor]
    ) -> None:
        self.comparison = comparison
        self.own_column = comparison.own_columns[places[0]]
        excluded = comparison.excluded_columns
        self.excluded_column = None if excluded is None else excluded[places[0]]
        self.absent = None if comparison.absent is None else comparison.absent[places[1]]
        weights = comparison.row_weights
        self.weights = None if weights is None else weights[places[1]]
        self.queries, self.keys = views
        self.num_rows, self.num_columns = self.queries.shape[0], self.keys.shape[0]
        self.edge = comparison.tile_edge or default_tile_edge(self.queries.device)
        self.objective = _Objective(comparison, self.num_columns)

    def logits(self, tile: Tile, scale: Tensor) -> Tensor:
        """(rows, columns), minus infinity where no comparison is wanted."""
        logits = scaled_logits(self.queries[tile.rows], self.keys[tile.columns], scale)
        if self.absent is not None:
            own, _, _ = tile.diagonal(logits, self.own_column)
            kept = own.clone()
            logits.masked_fill_(self.absent[tile.columns], -torch.inf)
            own.copy_(kept)
        if self.excluded_column is not None:
            tile.diagonal(logits, self.excluded_column)[0].fill_(-torch.inf)
        return logits

    def statistics(self, scale: Tensor) -> tuple[_Statistics, _Statistics | None]:
        """One pass over the tiles: what is kept of rows and, if they ask too, of columns."""
        objective, both = self.objective, self.comparison.both_directions
        rows = self._empty(self.num_rows, scale)
        columns = self._empty(self.num_columns, scale) if both else None
        for _, band in tiles(self.num_rows, self.num_columns, self.edge):
            for tile in band:
                logits = self.logits(tile, scale)
                own, own_rows, own_columns = tile.diagonal(logits, self.own_column)
                rows.own[own_rows] = own
                if columns is not None:
                    columns.own[own_columns] = own
                if objective.smoothing:
                    rows.totals[tile.rows] += logits.sum(dim=1)
                    if columns is not None:
                        columns.totals[tile.columns] += logits.sum(dim=0)
                if objective.beta:
                    own.fill_(-torch.inf)
                for index, exponent in enumerate(objective.exponents):
                    powered = logits if exponent == 1.0 else logits * exponent
                    _add_log_sums(rows.log_sums[index, tile.rows], powered, 1)
                    if columns is not None:
                        _add_log_sums(columns.log_sums[index, tile.columns], powered, 0)
        return rows, columns

    def _empty(self, num: int, like: Tensor) -> _Statistics:
        log_sums = like.new_full((len(self.objective.exponents), num), -torch.inf)
        return _Statistics(log_sums, like.new_empty(num), like.new_zeros(num))

    def loss(self, rows: _Statistics, columns: _Statistics | None) -> Tensor:
        """Scalar."""
        losses = self.objective.losses(rows)
        if self.weights is not None:
            return (losses * self.weights).sum()
        if columns is None:
            return losses.mean()
        return (losses.mean() + self.objective.losses(columns).mean()) / 2

    def add_gradients(
        self,
        gradients: PairGradients,
        rows: _Statistics,
        columns: _Statistics | None,
        of_loss: Tensor,
    ) -> None:
        """Add the derivatives of `loss` times `of_loss`, a scalar."""
        factor = of_loss
        if self.weights is None:
            factor = of_loss / (self.num_rows * (1 if columns is None else 2))
        by_row = self.objective.slopes(rows)
        by_column = None if columns is None else self.objective.slopes(columns)
        for band_rows, band in tiles(self.num_rows, self.num_columns, self.edge):
            parts = self._band_gradients(band, by_row, by_column, gradients.scale)
            gradients.add_band(band_rows, parts, factor)

    def _band_gradients(
        self, band: Sequence[Tile], by_row: _Slopes, by_column: _Slopes | None, scale: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        for tile in band:
            logits = self.logits(tile, scale)
            gradient = self.objective.tile_gradient(
                logits, by_row, tile.rows, 1, consume=by_column is None
            )
            if by_column is not None:
                gradient += self.objective.tile_gradient(
                    logits, by_column, tile.columns, 0, consume=True
                )
            own, own_rows, own_columns = tile.diagonal(gradient, self.own_column)
            if by_row.own_is_all:
                own.zero_()
            own += by_row.own[own_rows]
            if by_column is not None:
                own += by_column.own[own_columns]
            if self.weights is not None:
                gradient *= self.weights[tile.rows].unsqueeze(1)
            yield tile.columns, gradient


def _add_log_sums(log_sums: Tensor, logits: Tensor, dim: int) -> None:
    torch.logaddexp(log_sums, logits.logsumexp(dim), out=log_sums)


def _pairs(
    comparison: Comparison, views: Sequence[Tensor], num_query_views: int
) -> Iterator[tuple[int, int, _Pair]]:
    queries, keys = views[:num_query_views], views[num_query_views:]
    for v, query in enumerate(queries):
        for w, key in enumerate(keys):
            yield v, w, _Pair(comparison, (v, w), (query, key))


class _BlockedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, comparison: Comparison, num_query_views: int, scale: Tensor, *views: Tensor
    ) -> Tensor:
        precise = full_precision(views[0][:0]).dtype
        exact_scale = scale.detach().to(precise).reshape(())
        losses: list[Tensor] = []
        kept: list[Tensor] = []
        with without_autocast(views[0].device):
            for _, _, pair in _pairs(comparison, views, num_query_views):
                statistics = pair.statistics(exact_scale)
                losses.append(pair.loss(*statistics))
                for direction in statistics:
                    if direction is not None:
                        kept.extend(direction)
        ctx.comparison, ctx.num_query_views = comparison, num_query_views
        ctx.save_for_backward(scale, *views, *kept)
        num_key_views = len(views) - num_query_views
        return torch.stack(losses).view(num_query_views, num_key_views)

    @staticmethod
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        scale, *saved = ctx.saved_tensors
        comparison, num_query_views = ctx.comparison, ctx.num_query_views
        needed = ctx.needs_input_grad[3:]
        views, statistics = saved[: len(needed)], iter(saved[len(needed) :])
        exact_scale = scale.to(of_losses.dtype).reshape(())
        found = [
            accumulator(view, exact_scale.dtype) if need else None
            for view, need in zip(views, needed, strict=True)
        ]
        of_scale = torch.zeros_like(exact_scale)
        for v, w, pair in _pairs(comparison, views, num_query_views):
            rows = _Statistics(next(statistics), next(statistics), next(statistics))
            columns = None
            if comparison.both_directions:
                columns = _Statistics(next(statistics), next(statistics), next(statistics))
            gradients = PairGradients(
                pair.queries,
                pair.keys,
                exact_scale,
                for_queries=found[v],
                for_keys=found[num_query_views + w],
            )
            pair.add_gradients(gradients, rows, columns, of_losses[v, w])
            of_scale += gradients.for_scale
        return (
            None,
            None,
            of_scale.to(scale.dtype).view_as(scale) if ctx.needs_input_grad[2] else None,
            *(
                None if gradient is None else gradient.to(view.dtype)
                for gradient, view in zip(found, views, strict=True)
            ),
        )


def blocked_cross_entropy(
    queries: Sequence[Tensor], keys: Sequence[Tensor], scale: Tensor, comparison: Comparison
) -> Tensor:
    """Cross-entropy of every query view against every key view.

    With logits l[i, j], match y and N columns, the loss of row i is

        log(exp(l[i, y]) + sum over j != y of w[i, j] exp(l[i, j])) - l[i, y],
        w[i, j] = (N - 1) exp(beta l[i, j]) / sum over k != y of exp(beta l[i, k]),

    where beta 0 makes every weight 1. The weights' mean is 1, and gradients flow through them.
    Label smoothing is that of `torch.nn.functional.cross_entropy`, on l + log w.

    Args:
        queries: V matrices (B, D).
        keys: W matrices (N, D) of the same dtype.
        scale: scalar factor on the products.
        comparison: see there; masks go without smoothing and without beta.

    Returns:
        (V, W), in float32 or float64. Differentiable once by queries, keys and scale.
    """
    masked = comparison.absent is not None or comparison.excluded_columns is not None
    if masked and (comparison.label_smoothing or comparison.hard_negative_beta):
        raise ValueError(
            "Label smoothing and hard-negative weighting are for comparisons with every column, "
            "but some columns are left out: use 0 for both."
        )
    # torch ships `Function.apply` without types.
    apply = cast(Any, _BlockedCrossEntropy).apply
    return cast(Tensor, apply(comparison, len(queries), scale, *queries, *keys))
