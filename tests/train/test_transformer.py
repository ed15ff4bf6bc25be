"""The transformer: plain attention by loops, and last blocks that leave out what nobody reads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from declip_train.transformer import Attention, Perceptron, Transformer, attend_once, quick_gelu

WIDTH, HEADS, LENGTH, ROWS = 12, 3, 7, 4


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make_transformer(causal: bool, generator: torch.Generator, layers: int = 2) -> Transformer:
    """In float64, with every parameter off its initial value."""
    transformer = Transformer(WIDTH, layers, HEADS, quick_gelu=True, causal=causal).double()
    transformer.initialize(generator)
    with torch.no_grad():
        for parameter in transformer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return transformer


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, generator=generator, dtype=torch.float64)


def attention_by_loops(attention: Attention, x: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention (arXiv 1706.03762, section 3.2), number by number."""
    size = WIDTH // HEADS
    packed = x @ attention.in_proj_weight.T + attention.in_proj_bias
    mixed = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for head in range(HEADS):
            of_head = slice(head * size, (head + 1) * size)
            query, key, value = (part[row][:, of_head] for part in packed.split(WIDTH, dim=-1))
            for i in range(LENGTH):
                seen = range(i + 1 if causal else LENGTH)
                weights = [math.exp(float(query[i] @ key[j]) / math.sqrt(size)) for j in seen]
                for j, weight in zip(seen, weights, strict=True):
                    mixed[row, i, of_head] += weight / sum(weights) * value[j]
    return torch.nn.functional.linear(mixed, attention.out_proj.weight, attention.out_proj.bias)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_formula(causal: bool, x: Tensor, generator: torch.Generator) -> None:
    attention = make_transformer(causal, generator).resblocks[0].get_submodule("attn")
    assert isinstance(attention, Attention)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, causal), attention_by_loops(attention, x, causal))


def test_one_query_needs_no_keys(x: Tensor, generator: torch.Generator) -> None:
    """The same query, key and value matrices through torch's own attention."""
    weights = torch.randn(2, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    query = torch.randn(ROWS, HEADS, WIDTH // HEADS, generator=generator, dtype=torch.float64)
    visible = torch.rand(ROWS, LENGTH, generator=generator) < 0.5
    visible[:, 0] = True
    for seen in (None, visible):
        found = attend_once(query, x, weights[0], weights[1], seen)
        key, value = ((x @ w.T).view(ROWS, LENGTH, HEADS, -1).transpose(1, 2) for w in weights)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.unsqueeze(2), key, value, attn_mask=None if seen is None else seen[:, None, None]
        )
        torch.testing.assert_close(found, expected.flatten(1))


def test_quick_gelu_and_its_gradient_are_the_formula(generator: torch.Generator) -> None:
    x = 5 * torch.randn(200, generator=generator, dtype=torch.float64)
    x = torch.cat([x, torch.tensor([0.0, 40.0, -40.0], dtype=torch.float64)]).requires_grad_()
    torch.testing.assert_close(quick_gelu(x), x * torch.sigmoid(1.702 * x))
    assert torch.autograd.gradcheck(quick_gelu, (x,))


def test_exact_gelu_is_another_function(x: Tensor, generator: torch.Generator) -> None:
    exact, quick = (Perceptron(WIDTH, choice).double() for choice in (False, True))
    quick.load_state_dict(exact.state_dict())
    expected = exact.c_proj(torch.nn.functional.gelu(exact.c_fc(x)))
    torch.testing.assert_close(exact(x), expected)
    assert not torch.allclose(quick(x), expected)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_short_last_blocks_are_rows_of_the_whole(
    layers: int, recompute: bool, x: Tensor, generator: torch.Generator
) -> None:
    plain, causal = (make_transformer(choice, generator, layers) for choice in (False, True))
    plain.grad_checkpointing = causal.grad_checkpointing = recompute
    torch.testing.assert_close(plain.forward_first(x), plain(x)[:, 0])
    positions = torch.tensor([0, 6, 3, 2])
    whole = causal(x)
    rows = torch.arange(ROWS)
    torch.testing.assert_close(causal.forward_pooled(x, positions), whole[rows, positions])
    several = torch.tensor([[0, 0], [6, 1], [3, 5], [2, 2]])
    kept = torch.tensor([2, 3, 7, 0, 4])
    expected = whole[rows.unsqueeze(1), several].flatten(0, 1)[kept]
    torch.testing.assert_close(causal.forward_at(x, several, kept), expected)


def test_short_last_blocks_have_the_whole_ones_gradients(
    x: Tensor, generator: torch.Generator
) -> None:
    causal = make_transformer(True, generator)
    positions = torch.tensor([[1, 6], [6, 0], [3, 5], [2, 2]])
    kept = torch.arange(7)
    found = []
    for short in (True, False):
        causal.zero_grad()
        at = x.clone().requires_grad_()
        if short:
            rows = causal.forward_at(at, positions, kept)
        else:
            rows = causal(at)[torch.arange(ROWS).unsqueeze(1), positions].flatten(0, 1)[kept]
        rows.sin().sum().backward()
        found.append([at.grad, *(p.grad for p in causal.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_every_parameter_gets_a_gradient(x: Tensor, generator: torch.Generator) -> None:
    """DeepSpeed and DDP wait for all of them; the pooled token's key bias has a gradient of 0."""
    plain = make_transformer(False, generator, layers=1)
    plain.forward_first(x).sin().sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())
    bias = plain.resblocks[0].get_parameter("attn.in_proj_bias").grad
    assert bias is not None
    assert not bias[WIDTH : 2 * WIDTH].any()
    assert bias[:WIDTH].any()
