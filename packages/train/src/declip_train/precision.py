"""Arithmetic of a run: what DeepSpeed is told, what a device cannot do, and where the exact copies
of half-precision weights are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from declip_shards import DeclipError
from declip_train.settings import TrainSettings

__all__ = [
    "clamp_scale",
    "deepspeed_precision",
    "exact_batch_norm",
    "full_precision",
    "missing_loss_scale",
    "refuse_precision",
]

_HALF = (torch.bfloat16, torch.float16)


def refuse_precision(settings: TrainSettings) -> None:
    """Say before anything starts that the device cannot compute in this precision.

    Raises:
        DeclipError: it cannot.
    """
    accelerator = get_accelerator()
    supported = {
        "fp16": accelerator.is_fp16_supported(),
        "bf16": accelerator.is_bf16_supported(),
        "amp_bf16": accelerator.is_bf16_supported(),
    }
    if not supported.get(settings.precision, True):
        others = [name for name, good in supported.items() if good] + ["fp32"]
        raise DeclipError(
            f"precision {settings.precision} is not supported by this machine's "
            f"{accelerator.device_name()} device; set precision to {' or '.join(others)}."
        )


def deepspeed_precision(settings: TrainSettings) -> dict[str, Any]:
    """Sections of DeepSpeed's configuration that say how numbers are kept.

    fp32 and amp_bf16 keep float32 weights (the latter computes the towers under autocast, which is
    the module's own affair). bf16 and fp16 cast the weights, and DeepSpeed keeps float32 copies
    that the optimizer updates: whole in stage 0, a process's share in stages 1 and 2.
    """
    if settings.precision == "bf16":
        return {"bf16": {"enabled": True, "check_grad_overflow": True}}
    if settings.precision == "fp16":
        # Scaled so that small gradients are not lost: from 2^16, halved at an overflow (whose step
        # is skipped), doubled after 1000 steps without one.
        dynamic = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}
        return {"fp16": {"enabled": True, **dynamic, "hysteresis": 1, "min_loss_scale": 1}}
    return {}


def exact_batch_norm(module: nn.Module) -> None:
    """Let batch norms with half-precision weights compute in float32.

    DeepSpeed casts weights and leaves buffers, and torch refuses the mixture; running statistics
    in half precision would stop moving. The layers' rows come and go in their own precision.
    """
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(layer, _BatchNorm) and weight is not None and weight.dtype in _HALF:
            setattr(layer, "forward", _in_float32(layer))  # noqa: B010


def _in_float32(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    own = layer.forward

    def forward(values: Tensor) -> Tensor:
        parameters = dict(layer.named_parameters())
        if not any(parameter.dtype in _HALF for parameter in parameters.values()):
            return cast(Tensor, own(values))
        exact = {name: parameter.float() for name, parameter in parameters.items()}
        # Calls this function again, with the weights of `exact`.
        found = torch.func.functional_call(layer, exact, (values.float(),))
        return cast(Tensor, found).to(values.dtype)

    return forward


def missing_loss_scale(optimizer: object) -> float:
    """The factor that a loss must be given before ``deepspeed.backward``.

    DeepSpeed 0.19.8 scales the loss by itself in ZeRO's stages, but not in stage 0, whose optimizer
    divides the gradients by the scale all the same.
    """
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return float(optimizer.loss_scale)
    return 1.0


def full_precision(parameter: nn.Parameter, optimizer: object) -> Tensor | None:
    """DeepSpeed's own copy of a parameter, or the part of it that this process keeps.

    None where it keeps none: all of it is with another process, or the parameter itself is what the
    optimizer updates.
    """
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for ours, copies in pairs:
            for own, copy in zip(ours, copies, strict=True):
                if own is parameter:
                    assert isinstance(copy, Tensor)
                    return copy
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    fragment: Tensor = mapping.get_hp_fragment()
    return fragment


def _inside(bound: float, dtype: torch.dtype, toward: float) -> float:
    """The number of ``dtype`` nearest to ``bound`` that is not beyond it, seen from ``toward``."""
    rounded = torch.tensor(bound, dtype=torch.float64).to(dtype).to(torch.float64)
    beyond = rounded > bound if toward < bound else rounded < bound
    if beyond:
        step = abs(float(rounded)) * torch.finfo(dtype).eps
        away = float(rounded) + (step if toward > bound else -step)
        rounded = torch.tensor(away, dtype=torch.float64).to(dtype).to(torch.float64)
    return float(rounded)


@torch.no_grad()
def clamp_scale(parameter: nn.Parameter, copy: Tensor | None, low: float, high: float) -> None:
    """Keep a logit scale's logarithm in [low, high], in the module and in DeepSpeed's exact copy.

    ZeRO updates its copy and overwrites the module's, so a clamp of the module alone would be
    undone by the next step. Nothing waits for the device.

    Args:
        parameter: of the module, in the run's precision.
        copy: see :func:`full_precision`.
        low: least value.
        high: largest value.
    """
    if copy is not None:
        copy.clamp_(low, high)
    dtype = parameter.dtype
    parameter.clamp_(_inside(low, dtype, high), _inside(high, dtype, low))
