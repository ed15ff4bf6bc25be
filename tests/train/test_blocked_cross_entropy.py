"""Blocked cross-entropies: tiles change nothing, and masks do what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from declip_train.blocked_cross_entropy import Comparison, blocked_cross_entropy

SCALE = torch.tensor(9.0, dtype=torch.float64)


def views(num: int, rows: int, seed: int, dim: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, dim, generator=generator, dtype=torch.float64) for _ in range(num)]


def results(
    queries: list[Tensor], keys: list[Tensor], comparison: Comparison, scale: Tensor = SCALE
) -> list[Tensor]:
    """Losses of all pairs, and the gradients of their weighted sum."""
    inputs = [each.clone().requires_grad_() for each in (*queries, *keys, scale)]
    losses = blocked_cross_entropy(
        inputs[: len(queries)], inputs[len(queries) : -1], inputs[-1], comparison
    )
    weights = torch.arange(1.0, losses.numel() + 1, dtype=losses.dtype).view_as(losses)
    return [losses.detach(), *torch.autograd.grad((losses * weights).sum(), inputs)]


@given(
    rows=st.integers(1, 7),
    more_columns=st.integers(0, 6),
    edge=st.integers(1, 9),
    num_queries=st.integers(1, 2),
    num_keys=st.integers(1, 3),
    smoothing=st.sampled_from([0.0, 0.2]),
    beta=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_the_size_of_tiles_changes_nothing(
    rows: int,
    more_columns: int,
    edge: int,
    num_queries: int,
    num_keys: int,
    smoothing: float,
    beta: float,
    seed: int,
) -> None:
    queries = views(num_queries, rows, seed)
    keys = views(num_keys, rows + more_columns, seed + 1)

    def with_edge(tile_edge: int) -> list[Tensor]:
        comparison = Comparison(
            # The last place of the local rows among the columns.
            own_columns=(more_columns,) * num_queries,
            both_directions=more_columns == 0,
            label_smoothing=smoothing,
            hard_negative_beta=beta,
            tile_edge=tile_edge,
        )
        return results(queries, keys, comparison)

    for blocked, whole in zip(with_edge(edge), with_edge(1000), strict=True):
        torch.testing.assert_close(blocked, whole, rtol=1e-10, atol=1e-10)


@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_masks_equal_the_plain_way_at_every_tile(edge: int, offset: int, seed: int) -> None:
    rows, columns = 5, 9
    generator = torch.Generator().manual_seed(seed)
    queries, keys = views(2, rows, seed), views(2, columns, seed + 1)
    absent = torch.rand(2, columns, generator=generator) < 0.4
    weights = torch.rand(2, rows, generator=generator, dtype=torch.float64)
    excluded = (offset + 1) % (columns - rows + 1)
    comparison = Comparison(
        own_columns=(offset, offset),
        excluded_columns=(excluded, excluded),
        absent=absent,
        row_weights=weights,
        tile_edge=edge,
    )
    index = torch.arange(rows)

    def plain(inputs: list[Tensor]) -> Tensor:
        losses = []
        for query in inputs[:2]:
            for key, gone, weight in zip(inputs[2:4], absent, weights, strict=True):
                logits = inputs[4] * query @ key.T
                left_out = gone.expand(rows, -1).clone()
                left_out[index, index + offset] = False
                left_out[index, index + excluded] = True
                logits = logits.masked_fill(left_out, -torch.inf)
                each = F.cross_entropy(logits, index + offset, reduction="none")
                losses.append((each * weight).sum())
        return torch.stack(losses).view(2, 2)

    inputs = [each.clone().requires_grad_() for each in (*queries, *keys, SCALE)]
    losses = plain(inputs)
    factors = torch.arange(1.0, 5.0, dtype=torch.float64).view(2, 2)
    expected = [losses.detach(), *torch.autograd.grad((losses * factors).sum(), inputs)]
    if offset == excluded:
        return
    for found, wanted in zip(results(queries, keys, comparison), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_both_directions_are_the_mean_of_one_and_the_other() -> None:
    (queries,), (keys,) = views(1, 7, 0), views(1, 7, 1)
    plain = Comparison(own_columns=(0,), tile_edge=3)
    for one in (
        plain,
        replace(plain, label_smoothing=0.1),
        replace(plain, hard_negative_beta=0.5),
    ):
        both = replace(one, both_directions=True)
        there, back = results([queries], [keys], one), results([keys], [queries], one)
        back[1:3] = reversed(back[1:3])
        for found, *halves in zip(results([queries], [keys], both), there, back, strict=True):
            torch.testing.assert_close(found, (halves[0] + halves[1]) / 2)


def test_only_what_needs_a_gradient_gets_one() -> None:
    (queries,), (keys,) = views(1, 3, 0), views(1, 3, 1)
    queries.requires_grad_()
    blocked_cross_entropy([queries], [keys], SCALE, Comparison(own_columns=(0,))).sum().backward()
    assert queries.grad is not None
    assert keys.grad is None
    constant = blocked_cross_entropy([keys], [keys], SCALE, Comparison(own_columns=(0,)))
    assert not constant.requires_grad


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    scale = torch.tensor(1e4)
    queries = torch.eye(4).repeat(2, 1)[:6]
    for beta in (0.0, 1.0):
        comparison = Comparison(
            own_columns=(0,), both_directions=True, hard_negative_beta=beta, tile_edge=4
        )
        for each in results([queries], [queries.flip(0)], comparison, scale):
            assert each.isfinite().all()


def test_masks_go_without_options() -> None:
    (queries,) = views(1, 3, 0)
    plain = Comparison(own_columns=(0,), excluded_columns=(1,))
    for comparison in (replace(plain, label_smoothing=0.1), replace(plain, hard_negative_beta=1.0)):
        with pytest.raises(ValueError, match="some columns are left out: use 0 for both"):
            blocked_cross_entropy([queries], [queries], SCALE, comparison)
