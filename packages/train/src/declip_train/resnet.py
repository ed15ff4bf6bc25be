"""CLIP's modified ResNet with attention pooling; parameters carry open_clip's names and shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from declip_train import distributed
from declip_train.batch_norm import BatchNorm2d, frozen_statistics, synchronize_batch_norm
from declip_train.model_config import ResNetConfig
from declip_train.transformer import attend_once, initialize_linear
from declip_train.vision import ImageOutput, require_images

__all__ = ["ModifiedResNet", "RunningBatchNorm2d"]

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
EXPANSION = 4
"""A bottleneck block gives this many times the channels that it works in."""


class RunningBatchNorm2d(BatchNorm2d):
    """Batch norm whose running statistics stay in float32 when the model is cast to 16 bits.

    A step moves them by a tenth of a difference, most of which bfloat16's 8 bits would round away.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningBatchNorm2d:
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, variance = self.running_mean, self.running_var
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.running_mean.dtype in _SIXTEEN_BITS:
            self.running_mean = mean.to(self.running_mean.device, torch.float32)
            self.running_var = variance.to(self.running_var.device, torch.float32)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same shape and dtype."""
        is_common = self.training and self.synchronized and distributed.world_size() > 1
        has_spread = input.numel() // input.shape[1] > 1
        if self.weight.dtype not in _SIXTEEN_BITS or is_common or not has_spread:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        mean, variance = self.running_mean, self.running_var
        if self.training and self._frozen:
            mean, variance = mean.clone(), variance.clone()
        elif self.training:
            self.num_batches_tracked.add_(1)
        # Torch's kernels take 16-bit maps with float32 for everything else, and with nothing mixed.
        weight, bias = self.weight.float(), self.bias.float()
        momentum = cast(float, self.momentum)
        return F.batch_norm(input, mean, variance, weight, bias, self.training, momentum, self.eps)


def _halve(stride: int) -> nn.Module:
    return nn.AvgPool2d(stride) if stride > 1 else nn.Identity()


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a short cut; strides are average poolings."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        channels_out = EXPANSION * channels
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = RunningBatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = RunningBatchNorm2d(channels)
        self.pool = _halve(stride)
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.bn3 = RunningBatchNorm2d(channels_out)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or channels_in != channels_out:
            # open_clip's keys: "-1" is the pooling, which has no parameters.
            self.downsample = nn.Sequential(
                OrderedDict(
                    {
                        "-1": _halve(stride),
                        "0": nn.Conv2d(channels_in, channels_out, 1, bias=False),
                        "1": RunningBatchNorm2d(channels_out),
                    }
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels_in, h, w) to (batch, 4 channels, h / stride, w / stride)."""
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        inner = F.relu(self.bn2(self.conv2(inner)), inplace=True)
        inner = self.bn3(self.conv3(self.pool(inner)))
        inner = inner + (x if self.downsample is None else self.downsample(x))
        return F.relu(inner, inplace=True)


class AttentionPool(nn.Module):
    """One round of multi-head attention whose only query is the mean of the map."""

    def __init__(self, num_places: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(num_places + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, places, width) to (batch, width), before the output projection."""
        x = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        query = self.q_proj(x[:, 0]).unflatten(1, (self.heads, -1))
        mixed = attend_once(query, x, self.k_proj.weight, self.v_proj.weight, None)
        # The key's bias shifts all scores alike and so has no effect; times zero, it still gets the
        # (zero) gradient that DeepSpeed and DDP wait for.
        return mixed + self.v_proj.bias + 0.0 * self.k_proj.bias


class ModifiedResNet(nn.Module):
    """ResNet with a three-convolution stem, anti-aliased strides and attention pooling.

    CLIP, arXiv 2103.00020, section 2.4. Batch norm sees the batch of one process unless
    `synchronize_batch_norm` is called.
    """

    def __init__(self, config: ResNetConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = RunningBatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = RunningBatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = RunningBatchNorm2d(width)
        channels = width
        for stage, blocks in enumerate(config.layers):
            inner = width * 2**stage
            layer = nn.Sequential()
            for block in range(blocks):
                layer.append(Bottleneck(channels, inner, 2 if stage > 0 and block == 0 else 1))
                channels = EXPANSION * inner
            self.add_module(f"layer{stage + 1}", layer)
        self.attnpool = AttentionPool(
            config.num_patches, config.pooled_width, config.heads, embed_dim
        )

    def blocks(self) -> list[Bottleneck]:
        """All blocks of the four stages, first to last."""
        stages = [cast(nn.Sequential, self.get_submodule(f"layer{i}")) for i in (1, 2, 3, 4)]
        return [cast(Bottleneck, block) for stage in stages for block in stage]

    def _stem(self, images: Tensor) -> Tensor:
        require_images(images, self.config)
        x = images.to(self.conv1.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        return F.avg_pool2d(x, 2)

    def _run(self, block: Bottleneck, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return cast(Tensor, block(x))

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            # A batch enters the running statistics once, not again when it is recomputed.
            return nullcontext(), frozen_statistics(block)

        return cast(Tensor, checkpoint(block, x, use_reentrant=False, context_fn=contexts))

    def forward(
        self, images: Tensor, need_tokens: bool = False, num_with_tokens: int | None = None
    ) -> ImageOutput:
        """Run the tower on (batch, 3, size, size).

        The tokens are free, and given if asked for, of the first `num_with_tokens` images.
        """
        x = self._stem(images)
        for block in self.blocks():
            x = self._run(block, x)
        tokens = x.flatten(2).transpose(1, 2)
        pooled = self.attnpool(tokens)
        return ImageOutput(
            pooled=pooled,
            features=self.attnpool.c_proj(pooled),
            tokens=tokens[:num_with_tokens] if need_tokens else None,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    def synchronize_batch_norm(self) -> None:
        """From now on, batch norm's statistics are those of all processes' batches."""
        synchronize_batch_norm(self)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw the weights.

        Convolutions: torch's own rule, uniform in +-fan_in^-0.5. Batch norm: gain 1, bias 0, but a
        gain of 0 at each block's end, so that every block starts as its short cut. Attention
        pooling: positions and weights with standard deviation width^-0.5, biases by torch's rule.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                bound = (module.in_channels * module.kernel_size[0] ** 2) ** -0.5
                module.weight.uniform_(-bound, bound, generator=generator)
        for block in self.blocks():
            block.bn3.weight.zero_()
        pool = self.attnpool
        std = self.config.pooled_width**-0.5
        pool.positional_embedding.normal_(std=std, generator=generator)
        for linear in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
            initialize_linear(linear, std, generator)
            linear.bias.uniform_(-std, std, generator=generator)
