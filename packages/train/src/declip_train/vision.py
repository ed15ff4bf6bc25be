"""The vision transformer, and what every image tower gives."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from declip_train.model_config import ResNetConfig, VisionConfig
from declip_train.transformer import Transformer

__all__ = ["ImageOutput", "VisionTransformer", "require_images"]


class ImageOutput(NamedTuple):
    """What an image tower gives for (batch, 3, size, size)."""

    pooled: Tensor
    """(batch, pooled_width): pooled and not yet projected, what linear probes and SLIP's head read.

    ViT: the class token after the last LayerNorm. ResNet: the attention pooling before its output
    projection `c_proj`, which is to it what `proj` is to a ViT. Published probes of CLIP's ResNets
    read the projected `features`; these are a linear function of `pooled`."""
    features: Tensor
    """(batch, embed_dim): projected, not normalized."""
    tokens: Tensor | None
    """(batch or num_with_tokens, num_patches, token_width): None unless asked for.

    ViT: patch tokens of the last block, without the last LayerNorm. ResNet: the last stage's map,
    row by row, before pooling."""


def require_images(images: Tensor, config: VisionConfig | ResNetConfig) -> None:
    """Refuse what is not (batch, 3, image_size, image_size).

    Raises:
        ValueError: another shape.
    """
    size = config.image_size
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
        raise ValueError(
            f"Images have shape {tuple(images.shape)}, but this tower takes (batch, 3, {size}, "
            f"{size}): resize them, or choose a model of that image size."
        )


class VisionTransformer(nn.Module):
    """A ViT with a class token (CLIP, arXiv 2103.00020, section 2.4); open_clip's names."""

    def __init__(self, config: VisionConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(
            3, config.width, kernel_size=config.patch_size, stride=config.patch_size, bias=False
        )
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.positional_embedding = nn.Parameter(torch.empty(config.num_patches + 1, config.width))
        self.ln_pre = nn.LayerNorm(config.width)
        self.transformer = Transformer(
            config.width, config.layers, config.heads, quick_gelu, causal=False
        )
        self.ln_post = nn.LayerNorm(config.width)
        self.proj = nn.Parameter(torch.empty(config.width, embed_dim))

    def _embed(self, images: Tensor) -> Tensor:
        require_images(images, self.config)
        patches = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        classes = self.class_embedding.to(patches.dtype).expand(images.shape[0], 1, -1)
        x = torch.cat([classes, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        return cast(Tensor, self.ln_pre(x))

    def forward(
        self, images: Tensor, need_tokens: bool = False, num_with_tokens: int | None = None
    ) -> ImageOutput:
        """Run the tower on (batch, 3, size, size).

        Patch tokens cost extra: ask for them, and only of the first `num_with_tokens` images where
        the others' are not read.
        """
        x = self._embed(images)
        tokens: Tensor | None = None
        if need_tokens and num_with_tokens is not None and num_with_tokens < len(x):
            whole, first = self.transformer.forward_mixed(x, num_with_tokens)
            tokens, x = whole[:, 1:], torch.cat([whole[:, 0], first])
        elif need_tokens:
            x = self.transformer(x)
            tokens, x = x[:, 1:], x[:, 0]
        else:
            x = self.transformer.forward_first(x)
        pooled = self.ln_post(x)
        return ImageOutput(
            pooled=pooled, features=pooled @ self.proj.to(pooled.dtype), tokens=tokens
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        self.transformer.grad_checkpointing = enable

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw the weights; see `declip_train.towers.CLIP`."""
        std = self.config.width**-0.5
        self.conv1.weight.normal_(std=std, generator=generator)
        self.class_embedding.normal_(std=std, generator=generator)
        self.positional_embedding.normal_(std=0.01, generator=generator)
        self.transformer.initialize(generator)
        self.proj.normal_(std=std, generator=generator)
