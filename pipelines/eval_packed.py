"""Linear layers on the CPU with weights laid out for oneDNN, where torch has it.

torch multiplies float32 matrices by MKL, which on processors of other makers than its own leaves
their wide registers unused: on an AMD EPYC oneDNN is 2.4 times as fast (benchmarks/zeroshot.py
profits). Weights are laid out once, which pays for models that only compute.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_train.resnet import AttentionPool
from declip_train.transformer import Attention

_ROWS = 800
"""Rows that the layout is chosen for; any number of them works."""
_TOLERANCE = 1e-3


class PackedLinear(nn.Module):
    """`nn.Linear` for evaluation, up to rounding.

    Args:
        linear: float32, on the CPU.

    Raises:
        RuntimeError, AttributeError, TypeError: this torch has no such way.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._num_out = linear.out_features
        self.bias = linear.bias
        # torch's own compiler calls these; it has no public name for them.
        weight = linear.weight.detach()
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self._multiply = torch.ops.mkldnn._linear_pointwise

    def forward(self, x: Tensor) -> Tensor:
        """(..., num_in) float32 to (..., num_out)."""
        rows = x.reshape(-1, x.shape[-1])
        found = self._multiply(rows, self._weight, self.bias, "none", [], "")
        return cast(Tensor, found).view(*x.shape[:-1], self._num_out)


class PackedAttention(Attention):
    """`Attention` for evaluation, up to rounding, whose input projection is packed.

    Args:
        attention: float32, on the CPU.
        project: its input projection.
    """

    def __init__(self, attention: Attention, project: PackedLinear) -> None:
        nn.Module.__init__(self)
        self.heads, self.head_width = attention.heads, attention.head_width
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj
        self.project = project

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(batch, length, width) to the same shape; `causal` hides what comes after a token."""
        query, key, value = project_heads(self, x)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return cast(Tensor, self.out_proj(mixed.transpose(1, 2).flatten(2)))


def project_heads(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (n, heads, length, head width) of (n, length, width)."""
    if isinstance(attention, PackedAttention):
        packed: Tensor = attention.project(x)
    else:
        packed = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    packed = packed.view(*x.shape[:2], 3, attention.heads, attention.head_width)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    return query, key, value


def pack_linears(module: nn.Module, device: str) -> int:
    """Replace linear layers in ``module``, and attention's input projections, by packed ones, each
    after a look that it computes the same; returns how many were replaced, 0 where torch or the
    device has no such way.

    The module's parameters are fewer afterwards: take its digest before.
    """
    if device != "cpu":
        return 0
    number = 0
    for name, layer in list(module.named_children()):
        if isinstance(layer, AttentionPool):
            # A ResNet's: it multiplies by the weights of its layers itself.
            continue
        linear = _linear_of(layer)
        packed = None if linear is None else _packed(linear)
        child: nn.Module = layer
        if packed is not None:
            number += 1
            child = PackedAttention(layer, packed) if isinstance(layer, Attention) else packed
            setattr(module, name, child)
        number += pack_linears(child, device)
    return number


def _linear_of(layer: nn.Module) -> nn.Linear | None:
    """A layer that is linear, or the input projection of an attention."""
    if type(layer) is nn.Linear:
        return layer if layer.weight.dtype == torch.float32 else None
    if type(layer) is not Attention or layer.in_proj_weight.dtype != torch.float32:
        return None
    rows, width = layer.in_proj_weight.shape
    with torch.device("meta"):
        linear = nn.Linear(width, rows)
    linear.weight, linear.bias = layer.in_proj_weight, layer.in_proj_bias
    return linear


def _packed(layer: nn.Linear) -> PackedLinear | None:
    """The layer, packed; None where that cannot be done or computes something else."""
    rows = torch.linspace(-1, 1, 3 * layer.in_features).view(3, -1)
    try:
        packed = PackedLinear(layer)
        with torch.inference_mode():
            found, expected = packed(rows), F.linear(rows, layer.weight, layer.bias)
    except (RuntimeError, AttributeError, TypeError):
        return None
    scale = max(1.0, float(expected.abs().max()))
    return packed if float((found - expected).abs().max()) <= _TOLERANCE * scale else None
