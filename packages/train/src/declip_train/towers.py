"""Image and text transformers whose parameters carry open_clip's names and shapes.

Only the arithmetic is ours: attention always goes through `scaled_dot_product_attention` (causal by
flag, never by a dense mask), captions are cut to the longest of the batch, and the last block of a
tower works on the pooled token alone where nobody asks for the others. None of it changes a feature
by more than rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from declip_shards import DeclipError
from declip_train.model_config import ModelConfig, TextConfig, VisionConfig

__all__ = ["CLIP", "ImageOutput", "TextOutput", "TextTransformer", "VisionTransformer"]

MAX_LOGIT_SCALE = math.log(100.0)
"""Upper bound of the logarithm of the logit scale (CLIP, arXiv 2103.00020, section 2.5)."""
INITIAL_LOGIT_SCALE = math.log(1.0 / 0.07)
"""Logarithm of the logit scale before training (CLIP, arXiv 2103.00020, section 2.5)."""


class ImageOutput(NamedTuple):
    """What the image tower gives for (batch, 3, size, size)."""

    pooled: Tensor
    """(batch, width): class token after the last LayerNorm, unprojected; linear probes read it."""
    features: Tensor
    """(batch, embed_dim): projected, not normalized."""
    tokens: Tensor | None
    """(batch, num_patches, width): patch tokens of the last block; None unless asked for."""


class TextOutput(NamedTuple):
    """What the text tower gives for (batch, length) token ids."""

    features: Tensor
    """(batch, embed_dim): projected, not normalized."""
    hidden: Tensor | None
    """(batch, trimmed length, width): states after the last LayerNorm; None unless asked for."""


QUICK_GELU_SLOPE = 1.702
"""OpenAI's activation is x * sigmoid(1.702 x)."""


class Perceptron(nn.Module):
    """Two linear maps with an activation between, four times as wide inside."""

    def __init__(self, width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.quick_gelu = quick_gelu
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape.

        x * sigmoid(a x) is silu(a x) / a. The two factors go into the weights, which are far
        smaller than the activations: on a CPU that is a tenth of a small tower's time.
        """
        if not self.quick_gelu:
            return cast(Tensor, self.c_proj(F.gelu(self.c_fc(x))))
        a = QUICK_GELU_SLOPE
        inner = F.silu(F.linear(x, self.c_fc.weight * a, self.c_fc.bias * a))
        return F.linear(inner, self.c_proj.weight * (1.0 / a), self.c_proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(batch, length, width) to the same shape; `causal` hides what comes after a token."""
        batch, length, width = x.shape
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = packed.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return cast(Tensor, self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width)))

    def attend_from(self, x: Tensor, positions: Tensor, causal: bool) -> Tensor:
        """One row of `forward` a sample: (batch, length, width), (batch,) to (batch, 1, width)."""
        batch, length, width = x.shape
        asking = x[torch.arange(batch, device=x.device), positions].unsqueeze(1)
        query = F.linear(asking, self.in_proj_weight[:width], self.in_proj_bias[:width])
        packed = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:])
        query = query.view(batch, 1, self.heads, -1).transpose(1, 2)
        key, value = packed.view(batch, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        visible: Tensor | None = None
        if causal:
            visible = torch.arange(length, device=x.device) <= positions.unsqueeze(1)
            visible = visible.view(batch, 1, 1, length)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return cast(Tensor, self.out_proj(mixed.transpose(1, 2).reshape(batch, 1, width)))


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

    def forward_pooled(self, x: Tensor, positions: Tensor, causal: bool) -> Tensor:
        """One row of `forward` a sample: (batch, length, width), (batch,) to (batch, width)."""
        batch = torch.arange(x.shape[0], device=x.device)
        pooled = x[batch, positions] + self.attn.attend_from(self.ln_1(x), positions, causal)[:, 0]
        return cast(Tensor, pooled + self.mlp(self.ln_2(pooled)))


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

    def _run(self, block: ResidualAttentionBlock, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, x, self.causal, use_reentrant=False))
        return cast(Tensor, block(x, self.causal))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same shape."""
        for block in self._blocks():
            x = self._run(block, x)
        return x

    def forward_pooled(self, x: Tensor, positions: Tensor) -> Tensor:
        """One row of `forward` a sample: (batch, length, width), (batch,) to (batch, width).

        Keys and values of the last block need every token, its queries and perceptron only the
        pooled one.
        """
        *body, last = self._blocks()
        for block in body:
            x = self._run(block, x)
        return last.forward_pooled(x, positions, self.causal)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw the weights: scales of DeCLIP's and OpenAI's towers, biases zero."""
        input_std = self.width**-0.5
        output_std = input_std * (2 * len(self.resblocks)) ** -0.5
        for block in self._blocks():
            _initialize_linear(block.attn.out_proj, output_std, generator)
            _initialize_linear(block.mlp.c_fc, (2 * self.width) ** -0.5, generator)
            _initialize_linear(block.mlp.c_proj, output_std, generator)
            block.attn.in_proj_weight.normal_(std=input_std, generator=generator)
            block.attn.in_proj_bias.zero_()


def _initialize_linear(linear: nn.Linear, std: float, generator: torch.Generator | None) -> None:
    linear.weight.normal_(std=std, generator=generator)
    linear.bias.zero_()


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
        expected = (3, self.config.image_size, self.config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"Images have shape {tuple(images.shape)}, but this tower takes (batch, "
                f"{expected[0]}, {expected[1]}, {expected[2]}): resize them, or choose a model of "
                "that image size."
            )
        patches = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        classes = self.class_embedding.to(patches.dtype).expand(images.shape[0], 1, -1)
        x = torch.cat([classes, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        return cast(Tensor, self.ln_pre(x))

    def forward(self, images: Tensor, need_tokens: bool = False) -> ImageOutput:
        """Run the tower on (batch, 3, size, size); patch tokens cost extra: ask for them."""
        x = self._embed(images)
        tokens: Tensor | None = None
        if need_tokens:
            x = self.transformer(x)
            tokens, x = x[:, 1:], x[:, 0]
        else:
            first = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
            x = self.transformer.forward_pooled(x, first)
        pooled = self.ln_post(x)
        return ImageOutput(
            pooled=pooled, features=pooled @ self.proj.to(pooled.dtype), tokens=tokens
        )

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw the weights; see `CLIP`."""
        std = self.config.width**-0.5
        self.conv1.weight.normal_(std=std, generator=generator)
        self.class_embedding.normal_(std=std, generator=generator)
        self.positional_embedding.normal_(std=0.01, generator=generator)
        self.transformer.initialize(generator)
        self.proj.normal_(std=std, generator=generator)


class TextTransformer(nn.Module):
    """A causal transformer pooled at the end token (CLIP, section 2.4); open_clip's names."""

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        self.context_length = config.context_length
        self.vocab_size = config.vocab_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(
            config.width, config.layers, config.heads, quick_gelu, causal=True
        )
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))

    def _embed(
        self, token_ids: Tensor, mask_positions: Tensor | None, mask_embedding: Tensor | None
    ) -> Tensor:
        x: Tensor = self.token_embedding(token_ids)
        if mask_positions is not None and mask_embedding is not None:
            masked = mask_positions[:, : token_ids.shape[1]].unsqueeze(-1)
            x = torch.where(masked, mask_embedding.to(x.dtype), x)
        return x + self.positional_embedding[: token_ids.shape[1]].to(x.dtype)

    def forward_text(
        self,
        token_ids: Tensor,
        *,
        need_hidden: bool = False,
        mask_positions: Tensor | None = None,
        mask_embedding: Tensor | None = None,
        trim: bool = True,
    ) -> TextOutput:
        """Run the text tower.

        The feature is read at the end token, found as the largest id of the row. Attention is
        causal, so what stands behind the end token cannot reach it, and cutting the batch to its
        longest caption is exact.

        Args:
            token_ids: (batch, length) int64, length at most `context_length`, padded with 0 behind
                the end token.
            need_hidden: also return the states of all positions, which masked language modeling
                reads.
            mask_positions: (batch, length) bool, where `mask_embedding` stands in for the token's
                own embedding. The ids stay in their vocabulary, so the end token is found as
                always.
            mask_embedding: (width,), given together with `mask_positions`.
            trim: cut the batch to its longest caption; False keeps the given length (for fixed
                shapes).

        Raises:
            ValueError: captions longer than `context_length`, or one of the two mask arguments
                without the other.
        """
        if token_ids.ndim != 2 or token_ids.shape[1] > self.context_length:
            raise ValueError(
                f"Token ids have shape {tuple(token_ids.shape)}, but this tower takes (batch, at "
                f"most {self.context_length}): tokenize with that context length."
            )
        if (mask_positions is None) != (mask_embedding is None):
            raise ValueError(
                "mask_positions and mask_embedding belong together: give both, or none."
            )
        ends = token_ids.argmax(dim=-1)
        if trim and token_ids.shape[0]:
            token_ids = token_ids[:, : int(ends.max()) + 1]
        x = self._embed(token_ids, mask_positions, mask_embedding)
        hidden: Tensor | None = None
        if need_hidden:
            hidden = cast(Tensor, self.ln_final(self.transformer(x)))
            pooled = hidden[torch.arange(x.shape[0], device=x.device), ends]
        else:
            pooled = self.ln_final(self.transformer.forward_pooled(x, ends))
        features = pooled @ self.text_projection.to(pooled.dtype)
        return TextOutput(features=features, hidden=hidden)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw the weights; see `CLIP`."""
        self.token_embedding.weight.normal_(std=0.02, generator=generator)
        self.positional_embedding.normal_(std=0.01, generator=generator)
        self.transformer.initialize(generator)
        self.text_projection.normal_(std=self.transformer.width**-0.5, generator=generator)


class CLIP(TextTransformer):
    """Two towers and a learned logit scale (CLIP, arXiv 2103.00020, section 2).

    open_clip keeps the text tower's parameters at the top level of the model and the image tower
    under `visual`; to have the same names in `state_dict()` and `named_parameters()` alike, this
    class is the text tower with an image tower in it.

    Weights are drawn on construction: patch, class, projection and attention input weights with
    standard deviation width^-0.5, image positions 0.01, tokens 0.02, text positions 0.01, block
    outputs width^-0.5 (2 layers)^-0.5, perceptron inputs (2 width)^-0.5, biases 0, LayerNorm gains
    1, logarithm of the logit scale ln(1 / 0.07).

    Args:
        config: sizes of both towers.
        generator: source of the weights; None draws from torch's global generator.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        # The stock layers draw weights of their own on construction. They are overwritten, so the
        # global generator is put back: a model given its own generator must not move anybody else's
        # random numbers.
        with torch.random.fork_rng(devices=[]):
            super().__init__(config.text, config.embed_dim, config.quick_gelu)
            self.config = config
            self.visual = VisionTransformer(config.vision, config.embed_dim, config.quick_gelu)
            self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.visual.initialize(generator)
        self.initialize(generator)

    def forward_image(self, images: Tensor, need_tokens: bool = False) -> ImageOutput:
        """Run the image tower on (batch, 3, size, size); see `VisionTransformer.forward`."""
        return cast(ImageOutput, self.visual(images, need_tokens))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Features (batch, embed_dim) of (batch, 3, size, size), of unit length if `normalize`."""
        features = self.forward_image(images).features
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, token_ids: Tensor, normalize: bool = False) -> Tensor:
        """Features (batch, embed_dim) of (batch, length) ids, of unit length if `normalize`."""
        features = self.forward_text(token_ids).features
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image and text features of unit length, and the logit scale as a factor."""
        image_features = self.encode_image(images, normalize=True)
        text_features = self.encode_text(token_ids, normalize=True)
        return image_features, text_features, self.logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self, minimum: float = 0.0, maximum: float = MAX_LOGIT_SCALE) -> None:
        """Keep the log of the logit scale in [minimum, maximum], after each optimizer step.

        The default is open_clip's (a factor of 1 to 100); DeCLIP's released configurations use a
        minimum of 3.

        Raises:
            DeclipError: the interval is empty.
        """
        if minimum > maximum:
            raise DeclipError(
                f"The logit scale cannot be kept between {minimum} and {maximum}: give a minimum "
                "below the maximum."
            )
        self.logit_scale.clamp_(minimum, maximum)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass: less memory, about a third more time."""
        self.transformer.grad_checkpointing = enable
        self.visual.transformer.grad_checkpointing = enable
