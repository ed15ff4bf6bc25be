"""What a method adds to the towers: DeCLIP's heads, SLIP's projector, FILIP's token projections.

They live outside `CLIP`, so the towers' state has open_clip's names and nothing else. The mask
token is a vector here and no 49,409th vocabulary entry: the standard token ids stay what they are,
and exports stay readable by open_clip.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_train.batch_norm import BatchNorm1d
from declip_train.model_config import ModelConfig

__all__ = ["DeCLIPHeads", "SimCLRHead", "TokenHeads"]

INITIAL_LOG_SCALE = math.log(1 / 0.07)
MAX_LOG_SCALE = math.log(100)


def _refuse_size(name: str, value: int) -> None:
    if value < 1:
        raise DeclipError(f"{name} is {value}, but it must be at least 1: choose a larger size.")


@torch.no_grad()
def _draw_linear_layers(module: nn.Module, generator: torch.Generator | None) -> None:
    """Weights and biases of linear layers in +-fan_in^-0.5: torch's rule, from `generator`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = 1.0 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)


class DeCLIPHeads(nn.Module):
    """SimSiam's projector and predictor, the masked-language head, and the mask token's embedding.

    - `projector`: embed_dim -> d -> d -> d, BatchNorm after every layer (the last one too), ReLU
      after the first two. 2,630,656 parameters for embed_dim 512 and d = 1024.
    - `predictor`: d -> h -> d, BatchNorm and ReLU after the hidden layer only. 1,051,136 parameters
      for the defaults.
    - `mlm_head`: one linear layer from the states (M, text width) at masked positions to the
      vocabulary, not tied to the token embedding: 25,346,304 parameters for width 512 and the
      49,408 standard ids (DeCLIP's own count, 25,346,817, has one id more).
    - `mask_embedding`: (text width,), drawn like a token embedding.

    BatchNorm sees the local batch of one process, as in the published models, unless it is
    synchronized.

    Args:
        config: the towers that these heads sit on.
        projector_dim: d, size of SimSiam's projections.
        predictor_hidden_dim: h, size of the predictor's bottleneck.
        generator: source of the weights; None draws from torch's global generator.
        synchronized: whether BatchNorm sees the rows of all processes, see `batch_norm`.

    Raises:
        DeclipError: a size below 1.

    Sources: DeCLIP (arXiv 2110.05208), self-supervision within each modality; SimSiam (arXiv
    2011.10566), section 3, whose own projector is wider, free of biases, and has no affine last
    BatchNorm.
    """

    def __init__(
        self,
        config: ModelConfig,
        projector_dim: int = 1024,
        predictor_hidden_dim: int = 512,
        generator: torch.Generator | None = None,
        *,
        synchronized: bool = False,
    ) -> None:
        _refuse_size("projector_dim", projector_dim)
        _refuse_size("predictor_hidden_dim", predictor_hidden_dim)
        with torch.random.fork_rng(devices=[]):
            super().__init__()
            self.projector = nn.Sequential(
                OrderedDict(
                    linear_1=nn.Linear(config.embed_dim, projector_dim),
                    bn_1=BatchNorm1d(projector_dim, synchronized),
                    relu_1=nn.ReLU(),
                    linear_2=nn.Linear(projector_dim, projector_dim),
                    bn_2=BatchNorm1d(projector_dim, synchronized),
                    relu_2=nn.ReLU(),
                    linear_3=nn.Linear(projector_dim, projector_dim),
                    bn_3=BatchNorm1d(projector_dim, synchronized),
                )
            )
            self.predictor = nn.Sequential(
                OrderedDict(
                    linear_1=nn.Linear(projector_dim, predictor_hidden_dim),
                    bn_1=BatchNorm1d(predictor_hidden_dim, synchronized),
                    relu_1=nn.ReLU(),
                    linear_2=nn.Linear(predictor_hidden_dim, projector_dim),
                )
            )
            self.mlm_head = nn.Linear(config.text.width, config.text.vocab_size)
            self.mask_embedding = nn.Parameter(torch.empty(config.text.width))
        self.initialize(generator)

    def project(self, image_features: Tensor) -> tuple[Tensor, Tensor]:
        """SimSiam's projection z and prediction p of one view.

        Args:
            image_features: (batch, embed_dim), projected by the image tower, not normalized.

        Returns:
            z and p, both (batch, projector_dim).

        Raises:
            DeclipError: one sample in training (on all processes, if synchronized), for which
                BatchNorm has no spread to divide by.
        """
        projection = cast(Tensor, self.projector(image_features))
        return projection, cast(Tensor, self.predictor(projection))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw the weights: linear layers in +-fan_in^-0.5, torch's rule; the mask at 0.02."""
        _draw_linear_layers(self, generator)
        self.mask_embedding.normal_(std=0.02, generator=generator)


class SimCLRHead(nn.Sequential):
    """SLIP's projector: width -> h -> h -> k, BatchNorm and ReLU after the first two layers.

    20,996,352 parameters for ViT-B/32's pooled width of 768 and the defaults. It maps the image
    tower's pooled states before the projection, (batch, width) with the vision configuration's
    `pooled_width`, to (batch, k), not normalized.

    Run it once for each view: BatchNorm's statistics are then of one view, as in the published
    model, and not of a mixture. One sample in training (on all processes, if synchronized) is
    refused with a DeclipError.

    Args:
        config: the towers that this head sits on.
        hidden_dim: h, size of both hidden layers.
        output_dim: k, size of the projections that NT-Xent compares.
        generator: source of the weights; None draws from torch's global generator.
        synchronized: whether BatchNorm sees the rows of all processes, as SLIP's does; see
            `batch_norm`.

    Raises:
        DeclipError: a size below 1.

    Source: SLIP (arXiv 2112.12750), section 3; SimCLR (arXiv 2002.05709), section 2.1.
    """

    def __init__(
        self,
        config: ModelConfig,
        hidden_dim: int = 4096,
        output_dim: int = 256,
        generator: torch.Generator | None = None,
        *,
        synchronized: bool = False,
    ) -> None:
        _refuse_size("simclr_hidden_dim", hidden_dim)
        _refuse_size("simclr_dim", output_dim)
        with torch.random.fork_rng(devices=[]):
            super().__init__(
                OrderedDict(
                    linear_1=nn.Linear(config.vision.pooled_width, hidden_dim),
                    bn_1=BatchNorm1d(hidden_dim, synchronized),
                    relu_1=nn.ReLU(),
                    linear_2=nn.Linear(hidden_dim, hidden_dim),
                    bn_2=BatchNorm1d(hidden_dim, synchronized),
                    relu_2=nn.ReLU(),
                    linear_3=nn.Linear(hidden_dim, output_dim),
                )
            )
        _draw_linear_layers(self, generator)


class TokenHeads(nn.Module):
    """FILIP's projections of image and text tokens into one space, and the scale of its logits.

    - `image_projection`: linear with bias, 768 -> 256 for ViT-B/32: 196,864 parameters; 2048 -> 256
      for ResNet-50.
    - `text_projection`: linear with bias, 512 -> 256: 131,328 parameters.
    - `logit_scale`: the logarithm of the factor on similarities, a scalar of its own beside CLIP's,
      ln(1/0.07) at first.

    Args:
        config: the towers that these heads sit on; an image token has the vision configuration's
            `token_width`, a text state the text tower's width.
        token_dim: d, size of the token features.
        generator: source of the weights; None draws from torch's global generator.

    Raises:
        DeclipError: a size below 1.

    Source: FILIP (arXiv 2111.07783), section 3.1; the biases and the scale of its own as in the
        code released with CLIP-Benchmark (arXiv 2203.05796).
    """

    def __init__(
        self,
        config: ModelConfig,
        token_dim: int = 256,
        generator: torch.Generator | None = None,
    ) -> None:
        _refuse_size("token_dim", token_dim)
        with torch.random.fork_rng(devices=[]):
            super().__init__()
            self.image_projection = nn.Linear(config.vision.token_width, token_dim)
            self.text_projection = nn.Linear(config.text.width, token_dim)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        _draw_linear_layers(self, generator)

    def project_image(self, tokens: Tensor) -> Tensor:
        """Patch tokens (..., token_width) to (..., d), unit length up to their dtype's rounding."""
        return _unit(cast(Tensor, self.image_projection(tokens)))

    def project_text(self, states: Tensor) -> Tensor:
        """Text states (..., text width) to (..., d), unit length up to their dtype's rounding."""
        return _unit(cast(Tensor, self.text_projection(states)))

    @torch.no_grad()
    def clamp_logit_scale(self, minimum: float = 0.0, maximum: float = MAX_LOG_SCALE) -> None:
        """Keep the log of the logit scale in [minimum, maximum], after each optimizer step.

        The default is that of CLIP's scale, a factor of 1 to 100; the code released with
        CLIP-Benchmark has 3 to 6.

        Raises:
            DeclipError: the interval is empty.
        """
        if minimum > maximum:
            raise DeclipError(
                f"The token-wise logit scale cannot be kept between {minimum} and {maximum}: give "
                "a minimum below the maximum."
            )
        self.logit_scale.clamp_(minimum, maximum)


def _unit(tokens: Tensor) -> Tensor:
    """Scale to unit length, with lengths in float32 for half-precision tokens."""
    full = tokens if tokens.dtype == torch.float64 else tokens.float()
    return F.normalize(full, dim=-1).to(tokens.dtype)
