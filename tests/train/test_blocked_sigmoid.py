"""Blocked sigmoid loss: tiles change nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from declip_train.blocked_sigmoid import blocked_sigmoid


def inputs(rows: int, columns: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, 4, generator=generator, dtype=torch.float64).requires_grad_(),
        torch.randn(columns, 4, generator=generator, dtype=torch.float64).requires_grad_(),
        torch.tensor(7.0, dtype=torch.float64, requires_grad=True),
        torch.tensor(-4.0, dtype=torch.float64, requires_grad=True),
    ]


@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 8), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_every_size_of_tiles_equals_the_plain_way(
    rows: int, own_column: int, edge: int, seed: int
) -> None:
    queries, keys, scale, bias = given_inputs = inputs(rows, rows + own_column, seed)
    signs = torch.full((rows, rows + own_column), -1.0, dtype=torch.float64)
    signs.diagonal(own_column).fill_(1.0)
    plain = -F.logsigmoid(signs * (scale * queries @ keys.T + bias)).sum() / rows
    blocked = blocked_sigmoid(*given_inputs, own_column=own_column, tile_edge=edge)
    torch.testing.assert_close(blocked, plain, rtol=1e-10, atol=1e-10)
    for found, wanted in zip(
        torch.autograd.grad(blocked, given_inputs),
        torch.autograd.grad(plain, given_inputs),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_only_what_needs_a_gradient_gets_one() -> None:
    queries, keys, scale, bias = inputs(3, 3, 0)
    for tensor in (keys, scale, bias):
        tensor.requires_grad_(False)
    blocked_sigmoid(queries, keys, scale, bias, own_column=0).backward()
    assert queries.grad is not None
    assert keys.grad is None


def test_sure_answers_keep_their_small_losses() -> None:
    # 1 / (1 + exp(40)) is lost where it is taken from a number near one.
    query = torch.tensor([[1.0]])
    scale, bias = torch.tensor(40.0), torch.tensor(0.0)
    loss = blocked_sigmoid(query, query, scale, bias, own_column=0)
    torch.testing.assert_close(loss, torch.tensor(-40.0).exp())
