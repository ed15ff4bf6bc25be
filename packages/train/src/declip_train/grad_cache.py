"""A batch in parts whose samples still see all negatives: gradients are cached at the features.

The towers encode each part without gradient; heads and losses take the features of all parts at
once; the loss's gradient stops at the features; then each part is encoded again, with gradient, and
carries its share of it into the towers (GradCache, arXiv 2101.06983, section 3.2). Of activations,
those of one part at a time are in memory, of features all; the towers' forward pass is paid twice.

The parameters' gradient is that of the whole batch at once, as long as a row of `encode` depends on
its own sample alone. Batch norm in ResNet towers breaks that, as it does under every other
accumulation: its statistics are of a part (of all processes, where synchronized).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from declip_train.batch_norm import frozen_statistics
from declip_train.loader import Batch
from declip_train.module import TrainModule

__all__ = ["EncodedParts", "PartialGradients", "encode_parts", "term_gradients"]

CONSTANT = "neighbor_features"
"""What of `TrainModule.encode` no gradient goes through."""


@dataclass(frozen=True)
class _RandomState:
    """Of torch's generators on the CPU and on the device."""

    cpu: Tensor
    device: torch.device
    on_device: Tensor | None

    @classmethod
    def take(cls, device: torch.device) -> _RandomState:
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(cpu=torch.get_rng_state(), device=device, on_device=on_device)

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)


@dataclass(frozen=True)
class EncodedParts:
    """Features of a batch, encoded in parts without gradient."""

    parts: Sequence[Batch]
    features: Mapping[str, Tensor]
    """What `TrainModule.encode` gives, of the whole batch; leaves that take a gradient."""
    rows: Mapping[str, Sequence[int]]
    """How many of them are each part's: its samples, or its masked tokens."""
    random_states: Sequence[_RandomState]
    """Before each part."""


def _join(name: str, tensors: Sequence[Tensor]) -> Tensor:
    joined = torch.cat(list(tensors)).detach()
    return joined.requires_grad_(name != CONSTANT and joined.is_floating_point())


def encode_parts(module: TrainModule, batch: Batch, num_parts: int) -> EncodedParts:
    """Encode a batch in ``num_parts`` parts, keeping features and no activations.

    Running statistics of batch norm do not move: the second pass moves them, once.
    """
    parts = batch.split(num_parts)
    found: list[dict[str, Tensor]] = []
    states: list[_RandomState] = []
    with torch.no_grad(), frozen_statistics(module.clip):
        for part in parts:
            states.append(_RandomState.take(part.images.device))
            found.append(module.encode(part))
    return EncodedParts(
        parts=parts,
        features={name: _join(name, [one[name] for one in found]) for name in found[0]},
        rows={name: [len(one[name]) for one in found] for name in found[0]},
        random_states=states,
    )


@dataclass(frozen=True)
class PartialGradients:
    """Gradients of the loss at the features and at the parameters behind them."""

    encoded: EncodedParts
    features: Mapping[str, Tensor]
    """Of `EncodedParts.features`, by name; float32 at least."""
    parameters: Sequence[tuple[nn.Parameter, Tensor]]
    """Of heads and logit scales, which meet the whole batch."""

    def surrogates(self, module: TrainModule) -> Iterator[Tensor]:
        """For each part, a scalar whose gradient is the part's share of the loss's gradient.

        Consume each (backward) before the next is asked for, so that one part's activations are
        in memory at a time. The last one carries the heads, too. torch's generators give each part
        what they gave it in the first pass, and are as they were in the end.
        """
        before = _RandomState.take(self.encoded.parts[0].images.device)
        pieces = {n: torch.split(g, list(self.encoded.rows[n])) for n, g in self.features.items()}
        for number, part in enumerate(self.encoded.parts):
            self.encoded.random_states[number].put_back()
            # Neighbors take no gradient: their captions need no second pass.
            again = module.encode(replace(part, neighbor_token_ids=None, neighbor_features=None))
            products = [
                (piece[number] * again[name].to(piece[number].dtype)).sum()
                for name, piece in pieces.items()
            ]
            if number + 1 == len(self.encoded.parts):
                before.put_back()
                products += [(g * p.to(g.dtype)).sum() for p, g in self.parameters]
            yield torch.stack(products).sum()


def term_gradients(
    total: Tensor, encoded: EncodedParts, module: nn.Module, loss_scale: float = 1.0
) -> PartialGradients:
    """Gradients of ``total`` at the features and at the parameters that its graph reaches.

    Args:
        total: the weighted loss, computed from ``encoded.features``.
        encoded: see there.
        module: whose parameters the heads are among.
        loss_scale: factor under which the gradients are computed (float16 has no small numbers);
            it is taken out again, in float32.
    """
    names = [name for name, tensor in encoded.features.items() if tensor.requires_grad]
    parameters = [p for p in module.parameters() if p.requires_grad]
    leaves: list[Tensor] = [*(encoded.features[name] for name in names), *parameters]
    scaled = total * loss_scale if loss_scale != 1.0 else total
    found = cast(Sequence[Tensor | None], torch.autograd.grad(scaled, leaves, allow_unused=True))

    def exact(gradient: Tensor) -> Tensor:
        gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
        return gradient / loss_scale if loss_scale != 1.0 else gradient

    of_features = {
        name: exact(gradient)
        for name, gradient in zip(names, found[: len(names)], strict=True)
        if gradient is not None
    }
    of_parameters = [
        (parameter, exact(gradient))
        for parameter, gradient in zip(parameters, found[len(names) :], strict=True)
        if gradient is not None
    ]
    return PartialGradients(encoded=encoded, features=of_features, parameters=of_parameters)
