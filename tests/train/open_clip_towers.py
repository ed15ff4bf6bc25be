"""open_clip's towers beside ours: a script for a process of its own, as the stand-in for
torchvision must not leak into other tests. Reads a request as JSON, prints the answer as JSON, both
with two parts:

    shapes: {name: model_cfg} -> {name: {"state": {key: shape}, "parameters": [key]}}
    parity: [{"config": model_cfg, "dtype": name, "rows": n}] -> [largest differences]
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
import torchvision_stand_in
from torch import Tensor

from declip_train.model_config import ModelConfig
from declip_train.towers import CLIP

torchvision_stand_in.install()
import open_clip  # noqa: E402


def shapes(model_cfg: dict[str, Any]) -> dict[str, Any]:
    with torch.device("meta"):
        model = open_clip.CLIP(**model_cfg)
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    return {"state": state, "parameters": [key for key, _ in model.named_parameters()]}


def make_ours(config: ModelConfig, dtype: torch.dtype, generator: torch.Generator) -> CLIP:
    """A model whose every parameter has been moved off its initial value."""
    model = CLIP(config, generator).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.02 if parameter.ndim > 1 else 0.1
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


def make_captions(rows: int, generator: torch.Generator) -> Tensor:
    token_ids = torch.zeros(rows, 77, dtype=torch.long)
    for row in range(rows):
        length = 2 + 5 * row
        token_ids[row, 0], token_ids[row, length - 1] = 49406, 49407
        token_ids[row, 1 : length - 1] = torch.randint(1, 40000, (length - 2,), generator=generator)
    return token_ids


def run(model: Any, images: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Any, Any]:
    """Unit features, and the gradients of a contrastive loss, in training mode."""
    model.train()
    features = F.normalize(model.encode_image(images), dim=-1)
    texts = F.normalize(model.encode_text(token_ids), dim=-1)
    logits = model.logit_scale.exp() * features @ texts.T
    if model.logit_bias is not None:
        logits = logits + model.logit_bias
    labels = torch.arange(len(images))
    loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels) + logits[0, 0]
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    return features, texts, gradients, dict(model.named_buffers())


def difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours.double() - theirs.double()).abs().max().item()


def parity(config: dict[str, Any], dtype: str, rows: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ours = make_ours(ModelConfig.from_open_clip(config), getattr(torch, dtype), generator)
    theirs = open_clip.CLIP(**config).to(getattr(torch, dtype))
    theirs.load_state_dict(ours.state_dict())
    size = config["vision_cfg"]["image_size"]
    images = torch.randn(rows, 3, size, size, generator=generator).to(getattr(torch, dtype))
    token_ids = make_captions(rows, generator)
    images_a, texts_a, gradients_a, buffers_a = run(ours, images, token_ids)
    images_b, texts_b, gradients_b, buffers_b = run(theirs, images, token_ids)
    # The gradient of a softmax's shift is zero, and what autograd leaves of it is rounding.
    compared = [key for key in gradients_b if not key.endswith("attnpool.k_proj.bias")]
    return {
        "missing": [key for key in gradients_b if gradients_a[key] is None],
        "images": difference(images_a, images_b),
        "texts": difference(texts_a, texts_b),
        "gradients": {
            key: difference(gradients_a[key], gradients_b[key])
            / gradients_b[key].abs().max().item()
            for key in compared
        },
        "statistics": max([0.0, *(difference(buffers_a[k], buffers_b[k]) for k in buffers_a)]),
    }


if __name__ == "__main__":
    request = json.load(sys.stdin)
    answer = {
        "shapes": {name: shapes(config) for name, config in request["shapes"].items()},
        "parity": [parity(**case) for case in request["parity"]],
    }
    json.dump(answer, sys.stdout)
