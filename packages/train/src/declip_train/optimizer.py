"""What of the model is trained, by which rule, and how fast at each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from declip_train.lamb import Lamb
from declip_train.settings import TrainSettings

__all__ = ["build_optimizer", "learning_rate", "parameter_groups"]

_SCALES = ("logit_scale", "logit_bias")
_LAYERS_WITH_BIAS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


def learning_rate(settings: TrainSettings, step: int, num_steps: int) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up, then a cosine.

    With W warm-up steps of T: step 0 has ``start_lr``, step W - 1 ``peak_lr``, with a line between
    them; from there half a cosine falls to ``end_lr``, which the last step, T - 1, has exactly.
    Without a warm-up (W of 0 or 1), step 0 has the peak. Counted from 1, as DeCLIP's released
    schedule counts (arXiv 2110.05208), step s has start + (peak - start) (s - 1) / (W - 1) up to W
    and end + (peak - end) / 2 (1 + cos(pi (s - W) / (T - W))) from there on.
    """
    peak_at = max(settings.warmup_steps, 1)
    if step + 1 < peak_at:
        share = step / (peak_at - 1)
        return settings.start_lr + (settings.peak_lr - settings.start_lr) * share
    progress = (step + 1 - peak_at) / max(1, num_steps - peak_at)
    fall = (1 + math.cos(math.pi * progress)) / 2
    return settings.end_lr + (settings.peak_lr - settings.end_lr) * fall


def _exempt_names(module: nn.Module, decay_exempt: str) -> set[str]:
    names: set[str] = set()
    for prefix, owner in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        own = dict(owner.named_parameters(recurse=False))
        if isinstance(owner, _NORMS):
            names.update(dot + name for name in own)
        elif isinstance(owner, _LAYERS_WITH_BIAS) and owner.bias is not None:
            names.add(f"{dot}bias")
        elif isinstance(owner, nn.Embedding) and decay_exempt == "embeddings":
            names.update(dot + name for name in own)
    for name, parameter in module.named_parameters():
        last = name.rpartition(".")[2]
        vector = decay_exempt != "modules" and parameter.ndim < 2
        embedding = decay_exempt == "embeddings" and last.endswith("embedding")
        if vector or embedding or last in _SCALES:
            names.add(name)
    return names


def parameter_groups(
    module: nn.Module, weight_decay: float, decay_exempt: str = "modules"
) -> list[dict[str, Any]]:
    """The optimizer's two groups: with decay, and without. Frozen parameters are in neither.

    Args:
        module: towers and heads.
        weight_decay: of the first group.
        decay_exempt: what the second group holds. ``modules``: biases of linear layers and
            convolutions, gains and biases of norms, and the logit scale and bias; packed attention
            biases, positions, classes, embeddings and projections do decay (DeCLIP's released
            configurations). ``vectors``: those and everything of fewer than two dimensions (SLIP;
            open_clip). ``embeddings``: those and the embeddings of tokens and positions (FILIP,
            arXiv 2111.07783, appendix).
    """
    exempt = _exempt_names(module, decay_exempt)
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if name not in exempt], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name in exempt], "weight_decay": 0.0},
    ]


def build_optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer of ``settings`` over the parameters that are trained.

    Its learning rate is 0: `TrainEngine` sets that of every step, and DeepSpeed takes a step of its
    own at construction (stage 0 in half precision), which must not move anything.
    """
    groups = parameter_groups(module, settings.weight_decay, settings.decay_exempt)
    groups = [group for group in groups if group["params"]]
    betas = (settings.beta1, settings.beta2)
    if settings.optimizer == "lamb":
        return Lamb(groups, lr=0.0, betas=betas, eps=settings.eps)
    if settings.optimizer == "sgd":
        momentum = settings.beta1
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=settings.eps, fused=True)
