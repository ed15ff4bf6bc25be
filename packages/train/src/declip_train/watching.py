"""Numbers of a training step that nothing in training depends on, and what is kept when one is not
finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from declip_train.batch import Batch
from declip_train.batch_record import FOLDER, BatchRecord, write_record, write_weights

__all__ = [
    "feature_spreads",
    "keep_and_tell",
    "parameter_not_finite",
    "rows_not_finite",
    "shared_numbers",
    "squared_gradient_norm",
]

_NAMED = 5
"""Keys that a sentence names; the file has all."""
_OF_MASKED_TOKENS = "masked_states"
"""What of `TrainModule.encode` has no row a sample."""

_NOT_FINITE = ("nan", "inf", "-inf")


class _Share(NamedTuple):
    """What a process tells the others of its share of a bad batch."""

    rank: int
    keys: list[str]
    bad_keys: list[str]
    is_bad: bool
    """Whether one of its own loss terms is not finite."""
    fault: str | None
    """Why it could not keep its batch."""


def spread(features: Tensor) -> Tensor:
    """How far unit vectors lie apart: the square root of the sum of their variances.

    1 where they point everywhere, 0 where they are all the same: the standard deviation of each
    number of a unit vector times the root of how many there are (SimSiam, arXiv 2011.10566, section
    4.1).

    Args:
        features: (n, D), of any length.
    """
    unit = F.normalize(features.detach().float(), dim=-1)
    return (1 - unit.mean(0).square().sum()).clamp(min=0).sqrt()


def feature_spreads(encoded: Mapping[str, Tensor], caption_mask: Tensor) -> dict[str, Tensor]:
    """Spreads of this process's image and text features, of their first views, by name.

    Of methods without global features, the means of each sample's token features are looked at.

    Args:
        encoded: of `TrainModule.encode`.
        caption_mask: (n, L) bool, the real tokens of the captions.

    Returns:
        ``image_feature_spread`` and ``text_feature_spread``, scalars; nothing where the process
        has one sample alone, which no spread can be told of.
    """
    with torch.no_grad():
        if "image_features" in encoded:
            images, texts = encoded["image_features"][:, 0], encoded["text_features"][:, 0]
        else:
            images = encoded["image_tokens"].float().mean(1)
            words = encoded["text_tokens"].float()
            texts = (words * caption_mask[:, : words.shape[1], None]).sum(1)
        if len(images) < 2:
            return {}
        return {"image_feature_spread": spread(images), "text_feature_spread": spread(texts)}


def squared_gradient_norm(parameters: Iterable[nn.Parameter], optimizer: Any) -> Tensor:
    """This process's share of the squared L2 norm of the step's gradient, before its step.

    The shares of all processes add up to the norm. Loss scales are taken out. ZeRO keeps gradients
    of its own part of the weights alone; in stage 0 every process has all, and a share is the norm
    divided by their number.

    Args:
        parameters: of the model.
        optimizer: DeepSpeed's, after its backward pass.
    """
    parts = getattr(optimizer, "averaged_gradients", None)
    if parts is None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        share = 1 / dist.get_world_size()
    else:
        gradients = [part for group in parts.values() for part in group or ()]
        share = 1.0
    if not gradients:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(g.detach(), dtype=torch.float32) for g in gradients]
    scale = float(getattr(optimizer, "loss_scale", 1.0))
    return torch.stack(norms).div_(scale).square_().sum() * share


def shared_numbers(
    spreads: Mapping[str, Tensor], squared_norm: Tensor
) -> Callable[[], dict[str, float]]:
    """Numbers of all processes, in a reduction of their own, so that no other number's sum is
    taken in another order; a collective operation.

    Args:
        spreads: of :func:`feature_spreads`; their mean over processes counts.
        squared_norm: of :func:`squared_gradient_norm`.

    Returns:
        Waits for them: the spreads and ``gradient_norm``.
    """
    values = [value / dist.get_world_size() for value in spreads.values()]
    numbers, event = torch.stack([*values, squared_norm]), None
    dist.all_reduce(numbers)
    if numbers.device.type == "cuda":
        pinned = torch.empty(numbers.shape, pin_memory=True)
        numbers = pinned.copy_(numbers, non_blocking=True)
        event = torch.Event("cuda")
        event.record()

    def arrive() -> dict[str, float]:
        if event is not None:
            event.synchronize()
        *means, squared = numbers.tolist()
        return {**dict(zip(spreads, means, strict=True)), "gradient_norm": squared**0.5}

    return arrive


def rows_not_finite(encoded: Mapping[str, Tensor], batch: Batch) -> list[int]:
    """Rows of a batch that some feature of is not finite; of masked words, their captions."""
    found: set[int] = set()
    for name, value in encoded.items():
        if not value.is_floating_point():
            continue
        wrong = ~torch.isfinite(value).flatten(1).all(1).cpu()
        if name == _OF_MASKED_TOKENS and batch.mask_positions is not None:
            owners = batch.mask_positions.cpu().nonzero()[:, 0]
            found.update(owners[wrong].tolist())
        else:
            found.update(wrong.nonzero()[:, 0].tolist())
    return sorted(found)


def parameter_not_finite(module: nn.Module) -> str | None:
    """Name of the first parameter that is not finite; None where all are."""
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            return name
    return None


def _list(keys: list[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(map(repr, keys[:_NAMED])) + more


def keep_and_tell(record: BatchRecord, folder: Path | None, module: nn.Module) -> str:
    """Keep a batch on every process, and say the same on all; a collective operation.

    Args:
        record: this process's.
        folder: of the run; None: nothing is written.
        module: whose weights process 0 keeps.

    Returns:
        One sentence: term, step, process, keys, where the batch is, and the remedy.
    """
    fault = None
    if folder is not None:
        try:
            write_record(folder / FOLDER, record)
            if record.rank == 0:
                write_weights(folder / FOLDER, record.step, module)
        except OSError as error:
            fault = f"process {record.rank} could not keep its batch: {error.strerror or error}"
    own = _Share(
        record.rank,
        list(record.keys),
        list(record.bad_keys),
        any(text in _NOT_FINITE for text in record.terms.values()),
        fault,
    )
    everyone = [own] * record.world_size
    dist.all_gather_object(everyone, own)
    # A loss over gathered features is bad on all processes at once: features tell more.
    guilty = min(everyone, key=lambda one: (not one.bad_keys, not one.is_bad, one.rank))
    if record.bad_parameter is not None:
        before = f", whose samples were {_list(list(record.previous_keys))}"
        why = (
            f"the weights were not finite before it, {record.bad_parameter!r} first: the gradient "
            f"of the step before spoilt them{before if record.previous_keys else ''}"
        )
    elif guilty.bad_keys:
        why = f"the features of its samples {_list(guilty.bad_keys)} are not finite"
    else:
        why = f"its samples are {_list(guilty.keys)}"
    kept = ""
    if folder is not None:
        told = [one.fault for one in everyone if one.fault]
        kept = (
            f" {told[0]}."
            if told
            else f" The batch is kept in {str(folder / FOLDER)!r}: `declip replay` with that "
            "folder computes it again."
        )
    return (
        f"{record.fault} at step {record.step} on process {guilty.rank}: {why}; lower peak_lr or "
        f"raise warmup_steps; the last checkpoint is from before that.{kept}"
    )
