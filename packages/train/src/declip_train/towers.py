"""The text tower, and the pair of towers under open_clip's parameter names.

Captions are cut to the longest of the batch, and the last block works only on the tokens that are
read: the end token, and those that somebody asks for. Neither changes a result by more than
rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_train.model_config import ModelConfig, ResNetConfig, TextConfig
from declip_train.resnet import ModifiedResNet
from declip_train.tokenizer import CaptionTokenizer, Tokenizer
from declip_train.transformer import Transformer
from declip_train.vision import ImageOutput, VisionTransformer

__all__ = [
    "CLIP",
    "ImageOutput",
    "ModifiedResNet",
    "TextOutput",
    "TextTransformer",
    "TwoTowers",
    "VisionTransformer",
    "require_text_shapes",
]

MAX_LOGIT_SCALE = math.log(100.0)
"""Upper bound of the logarithm of the logit scale (CLIP, arXiv 2103.00020, section 2.5)."""


class TextOutput(NamedTuple):
    """What the text tower gives for (batch, length) token ids."""

    features: Tensor
    """(batch, embed_dim): projected, not normalized."""
    hidden: Tensor | None = None
    """(batch, trimmed length, width): states after the last LayerNorm; None unless asked for."""
    states: Tensor | None = None
    """(num_asked, width): those at the asked positions, row by row; None unless asked for."""


_NO_END = (
    "A caption has no end token (all of it is padding, or it was cut off), so there is no place to "
    "read its feature at: leave such samples out, or tokenize them again."
)


def _measure(
    ends: Tensor, state_positions: Tensor | None, trim: bool, length: int
) -> tuple[int, int]:
    """Length to cut captions to, and the largest number of asked positions in a row.

    All numbers that the host must know come over in one transfer.
    """
    if not len(ends):
        return length, 0
    if not trim and state_positions is None:
        # The largest id of a caption stands behind its start token.
        torch._assert_async((ends > 0).all(), _NO_END)
        return length, 0
    numbers = [ends.amin(), ends.amax()]
    if state_positions is not None:
        places = torch.arange(length, device=ends.device)
        numbers += [(state_positions * places).amax(), state_positions.sum(dim=1).amax()]
    first, last, *asked = torch.stack(numbers).tolist()
    if first == 0:
        raise ValueError(_NO_END)
    if not asked:
        return last + 1, 0
    return (max(last, asked[0]) + 1 if trim else length), asked[1]


def _asked_rows(asked: Tensor, ends: Tensor, most_asked: int) -> tuple[Tensor, Tensor]:
    """The asked positions of each row and its end, as `Transformer.forward_at` takes them.

    Args:
        asked: (batch, length) bool.
        ends: (batch,) int64.
        most_asked: largest number of asked positions in a row.

    Returns:
        positions (batch, most_asked + 1), the end last; and indexes into its flattened form, first
        of all asked positions in row-major order, then of all ends.
    """
    # A stable sort of "is not asked" brings the asked positions to the front, in their order.
    front = (~asked).to(torch.uint8).argsort(dim=1, stable=True)[:, :most_asked]
    positions = torch.cat([front, ends.unsqueeze(1)], dim=1)
    columns = torch.arange(most_asked + 1, device=asked.device)
    is_asked = columns < asked.sum(dim=1, keepdim=True)
    last = torch.arange(1, len(ends) + 1, device=asked.device) * (most_asked + 1) - 1
    return positions, torch.cat([is_asked.flatten().nonzero().squeeze(1), last])


def require_text_shapes(
    context_length: int,
    token_ids: Tensor,
    state_positions: Tensor | None,
    mask_positions: Tensor | None,
) -> None:
    """Refuse what no text tower takes.

    Args:
        context_length: most tokens of a caption.
        token_ids: must be (batch, length), length from 1 to `context_length`.
        state_positions: must be None, or bool in the shape of the token ids.
        mask_positions: likewise.

    Raises:
        ValueError: one of them is not.
    """
    if token_ids.ndim != 2 or not 1 <= token_ids.shape[1] <= context_length:
        raise ValueError(
            f"Token ids have shape {tuple(token_ids.shape)}, but this tower takes (batch, at "
            f"most {context_length}): tokenize with that context length."
        )
    for name, given in (("state", state_positions), ("mask", mask_positions)):
        if given is not None and (given.shape != token_ids.shape or given.dtype != torch.bool):
            raise ValueError(
                f"{name}_positions has shape {tuple(given.shape)} and {given.dtype}, but must "
                f"be torch.bool in the shape of the token ids, {tuple(token_ids.shape)}."
            )


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

    def caption_mask(self, token_ids: Tensor) -> Tensor:
        """Which of (batch, length) token ids are caption, start and end token included."""
        places = torch.arange(token_ids.shape[1], device=token_ids.device)
        return places <= token_ids.argmax(dim=1, keepdim=True)

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
        state_positions: Tensor | None = None,
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
            need_hidden: also return the states of all positions, which token-wise losses read.
            state_positions: (batch, length) bool; also return the states at these positions, which
                masked language modeling reads. The last block then works on them and on the end
                tokens only (on all, if `need_hidden`).
            mask_positions: (batch, length) bool, where `mask_embedding` stands in for the token's
                own embedding. The ids stay in their vocabulary, so the end token is found as
                always.
            mask_embedding: (width,), given together with `mask_positions`.
            trim: cut the batch to its longest caption, whose length a GPU is waited for; False
                keeps the given length, and waits for nothing unless `state_positions` is given.

        Raises:
            ValueError: captions longer than `context_length`, a row without an end token, or
                arguments that do not fit each other.
            RuntimeError: a row without an end token, where `trim` is off; on a GPU with the next
                operation that waits for it.
        """
        require_text_shapes(self.context_length, token_ids, state_positions, mask_positions)
        if (mask_positions is None) != (mask_embedding is None):
            raise ValueError(
                "mask_positions and mask_embedding belong together: give both, or none."
            )
        ends = token_ids.argmax(dim=-1)
        length, most_asked = _measure(ends, state_positions, trim, token_ids.shape[1])
        token_ids = token_ids[:, :length]
        x = self._embed(token_ids, mask_positions, mask_embedding)
        hidden: Tensor | None = None
        states: Tensor | None = None
        if need_hidden:
            hidden = cast(Tensor, self.ln_final(self.transformer(x)))
            pooled = hidden[torch.arange(x.shape[0], device=x.device), ends]
            if state_positions is not None:
                states = hidden[state_positions[:, :length]]
        elif state_positions is not None:
            positions, kept = _asked_rows(state_positions[:, :length], ends, most_asked)
            rows = self.ln_final(self.transformer.forward_at(x, positions, kept))
            states, pooled = rows.split((len(kept) - len(ends), len(ends)))
        else:
            pooled = self.ln_final(self.transformer.forward_pooled(x, ends))
        features = pooled @ self.text_projection.to(pooled.dtype)
        return TextOutput(features=features, hidden=hidden, states=states)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw the weights; see `CLIP`."""
        self.token_embedding.weight.normal_(std=0.02, generator=generator)
        self.positional_embedding.normal_(std=0.01, generator=generator)
        self.transformer.initialize(generator)
        self.text_projection.normal_(std=self.transformer.width**-0.5, generator=generator)


class TwoTowers(nn.Module, ABC):
    """The image tower, the learned logit scale, and what any text tower beside them must do.

    A subclass calls `_add_image_side` on construction, and brings the text tower: the abstract
    methods are its.
    """

    config: ModelConfig
    """Sizes of both towers."""
    visual: VisionTransformer | ModifiedResNet
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    """SigLIP's, where the configuration has `init_logit_bias`; otherwise None."""

    def _add_image_side(self, config: ModelConfig) -> None:
        """Register the image tower, whose weights are still to be drawn, and the scale."""
        self.config = config
        if isinstance(config.vision, ResNetConfig):
            self.visual = ModifiedResNet(config.vision, config.embed_dim)
        else:
            self.visual = VisionTransformer(config.vision, config.embed_dim, config.quick_gelu)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.init_logit_scale)))
        self.logit_bias = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.init_logit_bias)))

    def forward_image(
        self, images: Tensor, need_tokens: bool = False, num_with_tokens: int | None = None
    ) -> ImageOutput:
        """Run the image tower on (batch, 3, size, size); see the towers' `forward`."""
        return cast(ImageOutput, self.visual(images, need_tokens, num_with_tokens))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Features (batch, embed_dim) of (batch, 3, size, size), of unit length if `normalize`."""
        features = self.forward_image(images).features
        return F.normalize(features, dim=-1) if normalize else features

    @abstractmethod
    def forward_text(
        self,
        token_ids: Tensor,
        *,
        need_hidden: bool = False,
        state_positions: Tensor | None = None,
        mask_positions: Tensor | None = None,
        mask_embedding: Tensor | None = None,
        trim: bool = True,
    ) -> TextOutput:
        """Run the text tower; see `TextTransformer.forward_text`."""

    def encode_text(self, token_ids: Tensor, normalize: bool = False) -> Tensor:
        """Features (batch, embed_dim) of (batch, length) ids, of unit length if `normalize`."""
        features = self.forward_text(token_ids).features
        return F.normalize(features, dim=-1) if normalize else features

    @abstractmethod
    def caption_mask(self, token_ids: Tensor) -> Tensor:
        """Which of (batch, length) token ids are caption, first and last token included."""

    @abstractmethod
    def make_tokenizer(self) -> Tokenizer:
        """The text tower's."""

    def to_open_clip(self) -> dict[str, Any]:
        """open_clip's `model_cfg`."""
        return self.config.to_open_clip()

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
        """Recompute the image tower's blocks in the backward pass; subclasses add the text's."""
        self.visual.set_grad_checkpointing(enable)

    def freeze_patch_embedding(self) -> None:
        """Keep the patch convolution as it was drawn (MoCo v3, arXiv 2104.02057, section 4.1).

        Raises:
            DeclipError: the image tower is a ResNet.
        """
        if isinstance(self.visual, ModifiedResNet):
            raise DeclipError(
                "The patch embedding is to be frozen, but the image tower is a ResNet, which has "
                "none: choose a ViT, or leave this option off."
            )
        self.visual.conv1.weight.requires_grad_(False)

    def synchronize_batch_norm(self) -> None:
        """From now on, a ResNet's batch norm sees all processes' batches; ViTs have none."""
        if isinstance(self.visual, ModifiedResNet):
            self.visual.synchronize_batch_norm()


class CLIP(TextTransformer, TwoTowers):
    """Two towers and a learned logit scale (CLIP, arXiv 2103.00020, section 2).

    With `init_logit_bias` in its configuration it also has SigLIP's `logit_bias`; otherwise that is
    None.

    open_clip keeps the text tower's parameters at the top level of the model and the image tower
    under `visual`; to have the same names in `state_dict()` and `named_parameters()` alike, this
    class is the text tower with an image tower in it.

    Weights are drawn on construction: patch, class, projection and attention input weights with
    standard deviation width^-0.5, image positions 0.01, tokens 0.02, text positions 0.01, block
    outputs width^-0.5 (2 layers)^-0.5, perceptron inputs (2 width)^-0.5, biases 0, LayerNorm gains
    1; a ResNet's as `ModifiedResNet.initialize` says.

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
            self._add_image_side(config)
        self.visual.initialize(generator)
        self.initialize(generator)

    def make_tokenizer(self) -> CaptionTokenizer:
        """The standard one."""
        return CaptionTokenizer(self.context_length)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass: less memory, about a third more time."""
        super().set_grad_checkpointing(enable)
        self.transformer.grad_checkpointing = enable
