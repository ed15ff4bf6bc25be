"""What the losses need to know of other processes: how many there are, which one this is, and their
features.

Everything here is the identity when `torch.distributed` has not been started, so one process needs
no special case.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_features", "rank", "world_size"]


def world_size() -> int:
    """Number of processes that train together; 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; 0 without `torch.distributed`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _all_gather(local: Tensor) -> Tensor:
    """Concatenate `local` (batch, dim) of all ranks in rank order: (world * batch, dim)."""
    gathered = local.new_empty((world_size() * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local.contiguous())
    return gathered


class _GatherWithGradient(torch.autograd.Function):
    """All-gather whose backward sums the gradient over ranks and keeps the own slice.

    With each rank's loss taken over its local rows, and parameter gradients averaged over ranks (as
    DDP and DeepSpeed do), the result is the exact gradient of the mean-over-ranks loss, that is of
    the big batch.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.batch = local.shape[0]
        return _all_gather(local)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        if dist.get_backend() == "nccl":
            own = gradient.new_empty((ctx.batch, *gradient.shape[1:]))
            dist.reduce_scatter_tensor(own, gradient)
            return own
        # Gloo has no dependable reduce-scatter; all-reduce moves more bytes and gives the same sum.
        # The clone keeps autograd's own buffer as it was, which may be shared with another branch
        # of the graph.
        summed = gradient.clone()
        dist.all_reduce(summed)
        return summed[rank() * ctx.batch : (rank() + 1) * ctx.batch]


def _gather_with_gradient(local: Tensor) -> Tensor:
    # torch ships `Function.apply` without types.
    return cast(Tensor, cast(Any, _GatherWithGradient).apply(local))


def gather_features(*features: Tensor) -> tuple[Tensor, ...]:
    """Gather feature matrices of every process, in rank order, with gradient.

    All matrices travel in one collective, so a step pays the latency once however many views it
    has. Without a matrix that needs a gradient there is no traffic in the backward pass.

    Args:
        features: one or more matrices (batch, dim_i) with the same batch, dtype and device; the
            batch must be the same on every rank (the loader drops the last incomplete batch for
            this reason).

    Returns:
        As many matrices (world * batch, dim_i). With one process they are the given tensors
        themselves.

    Raises:
        ValueError: nothing was given, or the matrices do not share a batch.

    Source: DeCLIP (arXiv 2110.05208) and OpenAI CLIP train on the global batch; open_clip calls
        this
    `gather_with_grad`.
    """
    if not features:
        raise ValueError("gather_features was given no features: give at least one matrix.")
    if len({matrix.shape[0] for matrix in features}) > 1 or any(m.ndim != 2 for m in features):
        shapes = ", ".join(str(tuple(matrix.shape)) for matrix in features)
        raise ValueError(
            f"gather_features was given shapes {shapes}: all must be matrices with the same number "
            "of rows."
        )
    if world_size() == 1:
        return features
    packed = torch.cat(features, dim=1)
    gathered = _gather_with_gradient(packed) if packed.requires_grad else _all_gather(packed)
    return torch.split(gathered, [matrix.shape[1] for matrix in features], dim=1)
