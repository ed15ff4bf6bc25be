"""The transformer of both towers; parameters carry open_clip's names and shapes.

Only the arithmetic is ours: attention always goes through `scaled_dot_product_attention` (causal by
flag, never by a dense mask), and the last block works only on the tokens that somebody reads. None
of it changes a result by more than rounding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "Attention",
    "Perceptron",
    "ResidualAttentionBlock",
    "Transformer",
    "attend_once",
    "initialize_linear",
    "quick_gelu",
]

QUICK_GELU_SLOPE = 1.702
"""OpenAI's activation is x * sigmoid(1.702 x)."""


def attend_once(
    query: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, visible: Tensor | None
) -> Tensor:
    """Multi-head attention of one query a sample, without computing keys and values.

    With K = X W and one query q, q K^T is (q W^T) X^T: W meets one row instead of all of X, and
    likewise for the values. For a ViT-B/32's last block that is 2 % of the work. Key biases shift
    all scores of a query alike, so the softmax drops them; value biases come through as they are,
    since the shares sum to 1: the caller adds them.

    Args:
        query: (batch, heads, head width), with its bias.
        tokens: (batch, length, width) that the keys and values are made of.
        key_weight: (heads * head width, width).
        value_weight: (heads * head width, width).
        visible: (batch, length) bool, the tokens that a sample's query may see; None: all.

    Returns:
        (batch, heads * head width).
    """
    batch, heads, head_width = query.shape
    width = tokens.shape[2]
    queries = query.transpose(0, 1) * head_width**-0.5
    lifted = torch.bmm(queries, key_weight.view(heads, head_width, width))
    scores = torch.bmm(lifted.transpose(0, 1), tokens.transpose(1, 2))
    if visible is not None:
        scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    shares = scores.softmax(dim=-1).to(tokens.dtype)
    mixed = torch.bmm(shares, tokens).transpose(0, 1)
    values = torch.bmm(mixed, value_weight.view(heads, head_width, width).transpose(1, 2))
    return values.transpose(0, 1).reshape(batch, heads * head_width)


class _QuickGELU(torch.autograd.Function):
    """x * sigmoid(a x), computed as silu(a x) / a, whose derivative is that of silu at a x.

    One tensor is kept for the backward pass, which is one fused operation; autograd would keep
    three tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(...) to the same shape."""
        scaled = x * QUICK_GELU_SLOPE
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1.0 / QUICK_GELU_SLOPE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Gradient of x from the gradient of the result."""
        (scaled,) = ctx.saved_tensors
        return cast(Tensor, torch.ops.aten.silu_backward(grads[0], scaled))


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), in the shape and dtype of x."""
    # A compiler fuses the formula by itself, and cannot trace the function for unknown shapes.
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)
    return cast(Tensor, _QuickGELU.apply(x))  # type: ignore[no-untyped-call]


class Perceptron(nn.Module):
    """Two linear maps with an activation between, four times as wide inside."""

    def __init__(self, width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.quick_gelu = quick_gelu
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        inner = self.c_fc(x)
        inner = quick_gelu(inner) if self.quick_gelu else F.gelu(inner)
        return cast(Tensor, self.c_proj(inner))


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(batch, length, width) to the same shape; `causal` hides what comes after a token."""
        shape = (*x.shape[:2], self.heads, self.head_width)
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = packed.view(*shape[:2], 3, *shape[2:]).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return cast(Tensor, self.out_proj(mixed.transpose(1, 2).flatten(2)))

    def mix_one(self, asking: Tensor, x: Tensor, visible: Tensor | None) -> Tensor:
        """What `out_proj` is given in `forward`, for one token a sample.

        Args:
            asking: (batch, width), the tokens whose rows of the result are wanted.
            x: (batch, length, width), the tokens that they look at.
            visible: (batch, length) bool, what each may see; None: everything.

        Returns:
            (batch, width).
        """
        to_query, to_key, to_value = self.in_proj_weight.chunk(3)
        # The key's bias changes nothing, so its gradient is zero.
        query_bias, _, value_bias = self.in_proj_bias.chunk(3)
        query = F.linear(asking, to_query, query_bias)
        query = query.view(len(asking), self.heads, self.head_width)
        return attend_once(query, x, to_key, to_value, visible) + value_bias

    def mix_some(self, asking: Tensor, x: Tensor, visible: Tensor) -> Tensor:
        """What `out_proj` is given in `forward`, for some tokens of a sample.

        Args:
            asking: (batch, asked, width), the tokens whose rows of the result are wanted.
            x: (batch, length, width), the tokens that they look at.
            visible: (batch, asked, length) bool, what each may see.

        Returns:
            (batch, asked, width).
        """
        width = x.shape[2]
        query = F.linear(asking, self.in_proj_weight[:width], self.in_proj_bias[:width])
        packed = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:])
        query = query.view(*asking.shape[:2], self.heads, self.head_width).transpose(1, 2)
        packed = packed.view(*x.shape[:2], 2, self.heads, self.head_width)
        key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible.unsqueeze(1))
        return mixed.transpose(1, 2).flatten(2)


class ResidualAttentionBlock(nn.Module):
    """Pre-LayerNorm transformer block with a perceptron four times as wide."""

    def __init__(self, width: int, heads: int, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Perceptron(width, quick_gelu)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(batch, length, width) to the same shape."""
        x = x + self.attn(self.ln_1(x), causal)
        return cast(Tensor, x + self.mlp(self.ln_2(x)))

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.attn.out_proj(mixed)
        return cast(Tensor, x + self.mlp(self.ln_2(x)))

    def forward_first(self, x: Tensor) -> Tensor:
        """The first row of `forward` without causality: (batch, length, width), (batch, width)."""
        normed = self.ln_1(x)
        return self._finish(x[:, 0], self.attn.mix_one(normed[:, 0], normed, None))

    def forward_pooled(self, x: Tensor, positions: Tensor) -> Tensor:
        """One row of causal `forward` a sample.

        Args:
            x: (batch, length, width).
            positions: (batch,) int64.

        Returns:
            (batch, width).
        """
        rows = torch.arange(x.shape[0], device=x.device)
        visible = torch.arange(x.shape[1], device=x.device) <= positions.unsqueeze(1)
        normed = self.ln_1(x)
        mixed = self.attn.mix_one(normed[rows, positions], normed, visible)
        return self._finish(x[rows, positions], mixed)

    def forward_at(self, x: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
        """Some rows of causal `forward`.

        Args:
            x: (batch, length, width).
            positions: (batch, asked) int64; may repeat itself where a sample has fewer.
            kept: (num_kept,) int64 indexes into the flattened `positions`: the wanted rows.

        Returns:
            (num_kept, width), in the order of `kept`.
        """
        index = positions.unsqueeze(-1).expand(-1, -1, x.shape[2])
        visible = torch.arange(x.shape[1], device=x.device) <= positions.unsqueeze(-1)
        normed = self.ln_1(x)
        mixed = self.attn.mix_some(normed.gather(1, index), normed, visible)
        asking = x.gather(1, index).flatten(0, 1)
        return self._finish(asking.index_select(0, kept), mixed.flatten(0, 1).index_select(0, kept))


class Transformer(nn.Module):
    """A stack of residual blocks."""

    def __init__(self, width: int, layers: int, heads: int, quick_gelu: bool, causal: bool) -> None:
        super().__init__()
        self.width = width
        self.causal = causal
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, quick_gelu) for _ in range(layers)
        )

    def _blocks(self) -> list[ResidualAttentionBlock]:
        return [cast(ResidualAttentionBlock, block) for block in self.resblocks]

    def _run(self, function: object, x: Tensor, *arguments: object) -> Tensor:
        assert callable(function)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(function, x, *arguments, use_reentrant=False))
        return cast(Tensor, function(x, *arguments))

    def _run_body(self, x: Tensor) -> tuple[Tensor, ResidualAttentionBlock]:
        *body, last = self._blocks()
        for block in body:
            x = self._run(block, x, self.causal)
        return x, last

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same shape."""
        x, last = self._run_body(x)
        return self._run(last, x, self.causal)

    def forward_first(self, x: Tensor) -> Tensor:
        """The first row of `forward` a sample, without causality: (batch, width)."""
        x, last = self._run_body(x)
        return self._run(last.forward_first, x)

    def forward_mixed(self, x: Tensor, num_whole: int) -> tuple[Tensor, Tensor]:
        """`forward` of the first `num_whole` samples, `forward_first` of the others."""
        x, last = self._run_body(x)
        whole = self._run(last, x[:num_whole], self.causal)
        return whole, self._run(last.forward_first, x[num_whole:])

    def forward_pooled(self, x: Tensor, positions: Tensor) -> Tensor:
        """One row of causal `forward` a sample; see `ResidualAttentionBlock.forward_pooled`."""
        x, last = self._run_body(x)
        return self._run(last.forward_pooled, x, positions)

    def forward_at(self, x: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
        """Some rows of causal `forward`; see `ResidualAttentionBlock.forward_at`."""
        x, last = self._run_body(x)
        return self._run(last.forward_at, x, positions, kept)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw the weights: scales of DeCLIP's and OpenAI's towers, biases zero."""
        input_std = self.width**-0.5
        output_std = input_std * (2 * len(self.resblocks)) ** -0.5
        for block in self._blocks():
            initialize_linear(block.attn.out_proj, output_std, generator)
            initialize_linear(block.mlp.c_fc, (2 * self.width) ** -0.5, generator)
            initialize_linear(block.mlp.c_proj, output_std, generator)
            block.attn.in_proj_weight.normal_(std=input_std, generator=generator)
            block.attn.in_proj_bias.zero_()


@torch.no_grad()
def initialize_linear(linear: nn.Linear, std: float, generator: torch.Generator | None) -> None:
    """Normal weights of this standard deviation, biases zero."""
    linear.weight.normal_(std=std, generator=generator)
    linear.bias.zero_()
