"""Batch norm over the rows of all processes, as a switch on torch's own layers.

torch's `SyncBatchNorm` refuses tensors on CPUs, so a run on a laptop could not be compared with one
on GPUs, and it is a class of its own, so a model would have to be converted. Here it is one
attribute of the layer: its state has the names of torch's `BatchNorm1d` and `BatchNorm2d`, and
without the switch, in one process, or in evaluation it is torch's layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from declip_shards import DeclipError
from declip_train import distributed

__all__ = ["BatchNorm1d", "BatchNorm2d", "frozen_statistics", "synchronize_batch_norm"]


def _full_precision(values: Tensor) -> Tensor:
    """Sums over a batch are taken in float32 at least; float64 stays what it is."""
    return values if values.dtype == torch.float64 else values.float()


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """A vector (C,) in the shape that broadcasts over `like` (rows, C, ...)."""
    return vector.view(1, -1, *[1] * (like.ndim - 2))


def _refuse_one_value(values: int, where: str, remedy: str) -> None:
    raise DeclipError(
        f"Batch norm was given a batch of {values} {where}, but it needs at least 2 in training: "
        f"raise global_batch_size{remedy}."
    )


def _global_statistics(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count () of `values` (rows, C, ...) of all processes.

    Each process sums squares around its own mean, and the parts are combined as Chan, Golub and
    LeVeque do (Updating formulae and a pairwise algorithm for computing sample variances, 1979), so
    a mean that is large beside the spread costs no digits, and one collective suffices. All
    processes combine the same numbers in the same order, so their results have the same bits.
    """
    channels = values.shape[1]
    rows = values.numel() // channels
    if rows:
        dims = [d for d in range(values.ndim) if d != 1]
        variance, mean = torch.var_mean(values, dims, correction=0)
    else:
        # A process without rows takes part in the collective all the same.
        variance = mean = values.new_zeros(channels)
    own = torch.cat([mean, variance * rows, values.new_full((1,), rows)])
    gathered = own.new_empty(distributed.world_size() * own.numel())
    dist.all_gather_into_tensor(gathered, own)
    parts = gathered.view(-1, own.numel()).double()
    means, squares, counts = torch.split(parts, [channels, channels, 1], dim=1)
    count = counts.sum()
    # Only a process with fewer than two rows can be part of a batch with fewer than two, so the
    # usual batch never waits for the device here.
    if rows < 2 and count < 2:
        _refuse_one_value(int(count), "on all processes together", "")
    global_mean = (means * counts).sum(dim=0) / count
    deviation = (means - global_mean).square()
    global_variance = (squares.sum(dim=0) + (deviation * counts).sum(dim=0)) / count
    dtype = values.dtype
    return global_mean.to(dtype), global_variance.to(dtype), count.to(dtype)


class _NormalizeTogether(torch.autograd.Function):
    """Normalize by the statistics of all processes; its backward sums over them, too.

    The gradient of an input is that of the sum of all processes' losses, so that averaging
    parameter gradients over processes gives the gradient of the mean loss, as with
    `distributed.gather_features`. The gradients of gain and bias are the own rows' share.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        full = _full_precision(values)
        mean, variance, count = _global_statistics(full)
        inverse = (variance + eps).rsqrt()
        out = (full - _per_channel(mean, full)) * _per_channel(inverse, full)
        if weight is not None:
            out = out * _per_channel(weight.to(out.dtype), full)
        if bias is not None:
            out = out + _per_channel(bias.to(out.dtype), full)
        ctx.save_for_backward(values, weight, bias, mean, inverse, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return out.to(values.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, bias, mean, inverse, count = ctx.saved_tensors
        gradient = _full_precision(gradients[0])
        full = _full_precision(values)
        normalized = (full - _per_channel(mean, full)) * _per_channel(inverse, full)
        dims = [d for d in range(full.ndim) if d != 1]
        sums = torch.stack([gradient.sum(dims), (gradient * normalized).sum(dims)])
        of_bias = sums[0].to(bias.dtype) if bias is not None else None
        of_weight = sums[1].to(weight.dtype) if weight is not None else None
        of_values: Tensor | None = None
        if ctx.needs_input_grad[0]:
            everyone = sums.clone()
            dist.all_reduce(everyone)
            means = everyone / count
            scale = inverse if weight is None else inverse * weight.to(inverse.dtype)
            centered = gradient - _per_channel(means[0], full)
            centered = centered - normalized * _per_channel(means[1], full)
            of_values = (centered * _per_channel(scale, full)).to(values.dtype)
        return of_values, of_weight, of_bias, None


class _SynchronizableBatchNorm(_BatchNorm):
    """torch's batch norm with a switch; see `BatchNorm1d`."""

    def __init__(
        self,
        num_features: int,
        synchronized: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_features < 1:
            raise DeclipError(
                f"num_features is {num_features}, but batch norm needs at least 1 channel: choose "
                "a larger size."
            )
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.synchronized = synchronized
        self._frozen = False

    def extra_repr(self) -> str:
        of_torch = cast(Any, super()).extra_repr()
        return f"{of_torch}, synchronized={self.synchronized}"

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (rows, C, ...) by the batch in training, else by the running statistics."""
        cast(Any, self)._check_input_dim(input)  # Torch ships it without types.
        if not self.training:
            return super().forward(input)
        if self.synchronized and distributed.world_size() > 1:
            return self._normalize_together(input)
        values = input.numel() // input.shape[1]
        if values < 2:
            # With one process there is nothing to synchronize with.
            alone = distributed.world_size() == 1
            remedy = "" if alone else ", or set batch_norm to synchronized"
            _refuse_one_value(values, "on this process", remedy)
        return self._normalize_frozen(input) if self._frozen else super().forward(input)

    def _normalize_frozen(self, values: Tensor) -> Tensor:
        """Move copies of the running statistics.

        Without any, torch would keep fewer tensors for the backward pass than in the pass that
        moves them, and activation checkpointing refuses passes that differ.
        """
        running = [
            None if buffer is None else buffer.clone()
            for buffer in (self.running_mean, self.running_var)
        ]
        momentum = 0.0 if self.momentum is None else self.momentum
        return F.batch_norm(
            values, running[0], running[1], self.weight, self.bias, True, momentum, self.eps
        )

    def _normalize_together(self, values: Tensor) -> Tensor:
        if values.shape[1] != self.num_features:
            raise ValueError(
                f"Batch norm over {self.num_features} channels was given {values.shape[1]}."
            )
        apply = cast(Any, _NormalizeTogether).apply  # torch ships `Function.apply` without types.
        out, mean, variance, count = apply(values, self.weight, self.bias, self.eps)
        if self.track_running_stats and not self._frozen:
            self._move_running_statistics(mean, variance, count)
        return cast(Tensor, out)

    @torch.no_grad()
    def _move_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Step towards the batch's mean and unbiased variance, as torch does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        unbiased = variance * (count / (count - 1))
        share: float | Tensor
        # Without a momentum, torch keeps the mean over all batches.
        number = self.num_batches_tracked.double()
        share = 1.0 / number if self.momentum is None else self.momentum
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_(running * (1 - share) + batch * share)


class BatchNorm1d(_SynchronizableBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for (rows, C) or (rows, C, length), over all processes if asked.

    With `synchronized`, a training batch is the rows of all processes: outputs, gradients (averaged
    over processes as DDP and DeepSpeed do) and running statistics are those of one process with all
    rows, and the running statistics have the same bits everywhere. It costs a collective of 2 C + 1
    numbers in the forward pass and one of 2 C in the backward pass, over gloo or nccl, on CPUs or
    GPUs; statistics are taken in float32 for half-precision inputs. Processes may bring different
    numbers of rows. The attribute may be changed at any time.

    The names in the state are torch's. It is a subclass of torch's layer, so code that looks for
    batch norms finds it.

    Args:
        num_features: C, number of channels.
        synchronized: whether the statistics are of all processes.
        eps: added to the variance.
        momentum: share of a batch in the running statistics; None takes the mean over all batches.
        affine: whether there are a gain and a bias.
        track_running_stats: whether there are running statistics; else evaluation also normalizes
            by the batch, each process by its own.
        device: where the parameters are.
        dtype: their type.

    Raises:
        DeclipError: no channel; in `forward`, in training, fewer than two values per channel (on
            this process, or with `synchronized` on all of them).

    Source: batch normalization, arXiv 1502.03167, algorithm 1; over devices, SLIP's (arXiv
        2112.12750) projection head.
    """


class BatchNorm2d(_SynchronizableBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for (rows, C, height, width); see `BatchNorm1d`."""


def synchronize_batch_norm(module: nn.Module, synchronized: bool = True) -> int:
    """Switch every batch norm of this file in `module` to the rows of all processes, or back.

    Returns:
        The number of layers.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _SynchronizableBatchNorm)]
    for layer in layers:
        layer.synchronized = synchronized
    return len(layers)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of every batch norm in `module` where they are.

    In training, layers normalize by the batch as always; only the running statistics and the count
    of batches do not move. For a pass that is computed twice, whose batch should count once: the
    first pass of cached gradients, or the second of activation checkpointing (as the second of the
    two contexts of `torch.utils.checkpoint.checkpoint`'s `context_fn`). Evaluation is not changed.
    Contexts may be nested. Layers of torch's own classes obey as well, but not under activation
    checkpointing.
    """
    before: list[tuple[_BatchNorm, str, bool]] = []
    for layer in module.modules():
        if isinstance(layer, _SynchronizableBatchNorm):
            before.append((layer, "_frozen", layer._frozen))
            layer._frozen = True
        elif isinstance(layer, _BatchNorm):
            # Torch then neither moves nor drops the buffers; in evaluation it still reads them.
            before.append((layer, "track_running_stats", layer.track_running_stats))
            layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, name, value in before:
            setattr(layer, name, value)
