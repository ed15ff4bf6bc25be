"""LAMB: Adam's direction, whose length in each weight tensor is the tensor's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from declip_shards import DeclipError

__all__ = ["Lamb"]


class Lamb(torch.optim.Optimizer):
    """Algorithm 2 of LAMB (arXiv 1904.00962), with phi the identity.

    For each parameter tensor x ("layer") with gradient g, at its t-th step:

        m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        u = r + weight_decay x                   x = x - lr |x| / |u| u

    The decay is inside the update, and so inside the norm. Where |x| or |u| is 0 (a bias that was
    drawn as zeros), the ratio is 1, as it would otherwise never leave 0. The paper's algorithm has
    no clipping of the gradient's norm, and there is none here. Norms are of whole tensors, so the
    tensors must be whole: ZeRO's stages 1 and 2 hand an optimizer flat pieces, and refuse to be
    combined with it (``settings``).

    State is float32 for float32 parameters: two tensors of the parameter's size and a count.

    Args:
        params: parameters or groups of them.
        lr: learning rate, at least 0.
        betas: decay of the mean gradient and of the mean squared gradient, each in [0, 1).
        eps: added to the root, above 0 (FILIP: 1e-4).
        weight_decay: lambda, at least 0.

    Raises:
        DeclipError: a number out of its range; in `step`, a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise DeclipError(f"{name} of LAMB is {value}, but must be at least 0; correct it.")
        if not eps > 0:
            raise DeclipError(f"eps of LAMB is {eps}, but must be above 0; correct it.")
        if not all(0 <= beta < 1 for beta in betas):
            raise DeclipError(f"betas of LAMB are {betas}, but must be from 0 to below 1.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns what a given closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise DeclipError("LAMB needs dense gradients; choose another optimizer.")
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                kind = (state["step"], parameter.device, parameter.dtype)
                by_step.setdefault(kind, []).append(parameter)
            for (count, _, _), parameters in by_step.items():
                self._update(parameters, count, group)
        return loss

    def _update(self, parameters: list[Tensor], count: int, group: dict[str, Any]) -> None:
        """One step of parameters that share device, dtype and count, all tensors in one launch."""
        beta1, beta2 = group["betas"]
        gradients = [p.grad for p in parameters if p.grad is not None]
        mean = [self.state[p]["exp_avg"] for p in parameters]
        square = [self.state[p]["exp_avg_sq"] for p in parameters]
        torch._foreach_lerp_(mean, gradients, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, gradients, gradients, value=1 - beta2)
        roots = torch._foreach_div(square, 1 - beta2**count)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        update = torch._foreach_div(mean, 1 - beta1**count)
        torch._foreach_div_(update, roots)
        if group["weight_decay"]:
            torch._foreach_add_(update, parameters, alpha=group["weight_decay"])
        # The ratios stay on the device: no parameter waits for the host.
        lengths = torch.stack(torch._foreach_norm(parameters))
        strides = torch.stack(torch._foreach_norm(update))
        usual = (lengths > 0) & (strides > 0)
        ratios = torch.where(usual, lengths / strides, torch.ones_like(lengths))
        torch._foreach_mul_(update, list((-group["lr"] * ratios).unbind()))
        torch._foreach_add_(parameters, update)
