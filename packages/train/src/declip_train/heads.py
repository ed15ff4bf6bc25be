"""DeCLIP's extra parameters: they train the towers, and no evaluation reads them.

They live outside `CLIP`, so the towers' state has open_clip's names and nothing else. The mask
token is a vector here and no 49,409th vocabulary entry: the standard token ids stay what they are,
and exports stay readable by open_clip.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_train.model_config import ModelConfig

__all__ = ["DeCLIPHeads"]


def _refuse_size(name: str, value: int) -> None:
    if value < 1:
        raise DeclipError(f"{name} is {value}, but it must be at least 1: choose a larger size.")


class DeCLIPHeads(nn.Module):
    """SimSiam's projector and predictor, the masked-language head, and the mask token's embedding.

    - `projector`: embed_dim -> d -> d -> d, BatchNorm after every layer (the last one too), ReLU
      after the first two. 2,630,656 parameters for embed_dim 512 and d = 1024.
    - `predictor`: d -> h -> d, BatchNorm and ReLU after the hidden layer only. 1,051,136 parameters
      for the defaults.
    - `mlm_head`: one linear layer from the text width to the vocabulary, not tied to the token
      embedding: 25,346,304 parameters for width 512 and the 49,408 standard ids (DeCLIP's own
      count, 25,346,817, has one id more).
    - `mask_embedding`: (text width,), drawn like a token embedding.

    BatchNorm sees the local batch of one process, as in the published models.

    Args:
        config: the towers that these heads sit on.
        projector_dim: d, size of SimSiam's projections.
        predictor_hidden_dim: h, size of the predictor's bottleneck.
        generator: source of the weights; None draws from torch's global generator.

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
    ) -> None:
        _refuse_size("projector_dim", projector_dim)
        _refuse_size("predictor_hidden_dim", predictor_hidden_dim)
        with torch.random.fork_rng(devices=[]):
            super().__init__()
            self.projector = nn.Sequential(
                OrderedDict(
                    linear_1=nn.Linear(config.embed_dim, projector_dim),
                    bn_1=nn.BatchNorm1d(projector_dim),
                    relu_1=nn.ReLU(),
                    linear_2=nn.Linear(projector_dim, projector_dim),
                    bn_2=nn.BatchNorm1d(projector_dim),
                    relu_2=nn.ReLU(),
                    linear_3=nn.Linear(projector_dim, projector_dim),
                    bn_3=nn.BatchNorm1d(projector_dim),
                )
            )
            self.predictor = nn.Sequential(
                OrderedDict(
                    linear_1=nn.Linear(projector_dim, predictor_hidden_dim),
                    bn_1=nn.BatchNorm1d(predictor_hidden_dim),
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
            ValueError: one sample in training, for which BatchNorm has no spread to divide by.
        """
        if self.training and image_features.shape[0] < 2:
            raise ValueError(
                f"SimSiam's BatchNorm was given a batch of {image_features.shape[0]} on this "
                "process, but it needs at least 2: raise micro_batch_size."
            )
        projection = cast(Tensor, self.projector(image_features))
        return projection, cast(Tensor, self.predictor(projection))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw the weights: linear layers in +-fan_in^-0.5, torch's rule; the mask at 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 1.0 / math.sqrt(module.in_features)
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
        self.mask_embedding.normal_(std=0.02, generator=generator)
