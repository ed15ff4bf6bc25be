"""A batch whose loss was not finite, kept so that its step can be computed again.

    train/bad_batches/step_00000123_rank_00000.json          what was wrong, keys, settings
    train/bad_batches/step_00000123_rank_00000.safetensors   the batch, and torch's generators
    train/bad_batches/step_00000123_weights.safetensors      the weights that the step began with

Each process keeps its own share of the batch, process 0 also the weights. A run that fails at the
same step again writes the same files anew. :mod:`declip_train.replay` reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_shards.store import atomic_write
from declip_train.batch import Batch
from declip_train.device_views import ColorBatch
from declip_train.settings import TrainSettings, parse_settings

__all__ = [
    "FOLDER",
    "BatchRecord",
    "GeneratorStates",
    "newest_step",
    "read_records",
    "read_weights",
    "write_record",
    "write_weights",
]

FOLDER = "bad_batches"
FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{8})_rank_(\d{5})\.json")
_BATCH, _GENERATORS = "batch.", "generator."
_COLORS, _LENGTHS = "colors.", "lengths."


class GeneratorStates(NamedTuple):
    """torch's generators at one moment: a model's dropout is drawn from them."""

    cpu: Tensor
    """uint8, as ``torch.get_rng_state`` gives it."""
    device: Tensor | None
    """The same of the GPU; None on a CPU."""

    @classmethod
    def take(cls, device: torch.device) -> GeneratorStates:
        """The states of this moment."""
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), on_device)

    def put_back(self, device: torch.device) -> None:
        """Make the generators go on from these states."""
        torch.set_rng_state(self.cpu)
        if self.device is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.device, device)


@dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """One process's share of a batch, and what was wrong with it."""

    step: int
    """Steps done before this one."""
    rank: int
    world_size: int
    fault: str
    """What training said of it."""
    terms: Mapping[str, str]
    """Every loss term of this process as it was computed, in words (``nan`` is no JSON)."""
    keys: Sequence[str]
    """Of the batch's samples, in its order."""
    bad_keys: Sequence[str]
    """Of the samples whose features were not finite."""
    bad_parameter: str | None
    """First parameter that was not finite before the step; None: all were."""
    previous_keys: Sequence[str]
    """Where a parameter was not finite: the samples of the step before, whose gradient it was."""
    settings: TrainSettings
    """Of the run; ``root`` is empty."""
    batch: Batch
    """As the loader gave it, on the CPU."""
    generators: GeneratorStates
    """As they were before the step."""


def _name(step: int, rank: int) -> str:
    return f"step_{step:08d}_rank_{rank:05d}"


def _batch_tensors(batch: Batch) -> dict[str, Tensor]:
    """A batch's tensors by flat names; the inverse of :func:`_batch_of`."""
    tensors = {n: v for n, v in vars(batch).items() if isinstance(v, Tensor)}
    tensors |= {_LENGTHS + name: value for name, value in batch.lengths.items()}
    if batch.colors is not None:
        tensors |= {_COLORS + name: value for name, value in vars(batch.colors).items()}
    return tensors


def _batch_of(tensors: Mapping[str, Tensor], step: int, epoch: int) -> Batch:
    def group(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    known = {field.name for field in fields(Batch)}
    plain: dict[str, Any] = {name: v for name, v in tensors.items() if name in known}
    colors = group(_COLORS)
    return Batch(
        step=step,
        epoch=epoch,
        lengths=group(_LENGTHS),
        colors=ColorBatch(**colors) if colors else None,
        **plain,
    )


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """As safetensors, each with memory of its own: names may share it in a batch or a model."""
    own = {n: v.detach().to("cpu", copy=True).contiguous() for n, v in tensors.items()}
    return safetensors.torch.save(own)


def write_record(folder: Path, record: BatchRecord) -> Path:
    """Keep a batch; returns the path of its JSON file, which is written last.

    Args:
        folder: created.
        record: what to keep.

    Raises:
        OSError: the disk does not take it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_BATCH + n: v for n, v in _batch_tensors(record.batch).items()}
    tensors |= {_GENERATORS + n: v for n, v in record.generators._asdict().items() if v is not None}
    path = folder / f"{_name(record.step, record.rank)}.json"
    # What an earlier attempt left must not be taken for this one's.
    path.unlink(missing_ok=True)
    atomic_write(path.with_suffix(".safetensors"), _to_bytes(tensors))
    facts = {
        "format_version": FORMAT_VERSION,
        "epoch": record.batch.epoch,
        **{
            name: value
            for name, value in vars(record).items()
            if name not in ("settings", "batch", "generators")
        },
        "settings": {**json.loads(record.settings.to_json()), "root": ""},
    }
    atomic_write(path, json.dumps(facts, indent=1, sort_keys=True).encode() + b"\n")
    return path


def write_weights(folder: Path, step: int, module: nn.Module) -> Path:
    """Keep the weights that a step began with, as they are.

    Buffers are kept, too; those of batch norms have seen the step's batch by now, and are not read
    in training.

    Raises:
        OSError: the disk does not take them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}_weights.safetensors"
    atomic_write(path, _to_bytes(module.state_dict()))
    return path


def newest_step(folder: Path) -> int | None:
    """The last step of which a batch was kept; None where there is none."""
    found = (_NAME.fullmatch(path.name) for path in folder.glob("step_*.json"))
    return max((int(match.group(1)) for match in found if match), default=None)


def read_records(folder: Path, step: int) -> list[BatchRecord]:
    """The batch of a step, a record a process, in their order; the inverse of
    :func:`write_record`.

    Raises:
        DeclipError: there is none, a process's share is missing, or a file is damaged.
    """
    paths = sorted(folder.glob(f"step_{step:08d}_rank_*.json"))
    if not paths:
        raise DeclipError(
            f"{str(folder)!r} holds no batch of step {step}; training keeps one there when a loss "
            "is not finite."
        )
    records = [_read_record(path) for path in paths]
    found = [record.rank for record in records]
    if found != list(range(records[0].world_size)):
        raise DeclipError(
            f"{str(folder)!r} holds the shares of processes {found} of step {step}, but "
            f"{records[0].world_size} processes trained; the others could not write theirs: run "
            "the training again, it fails at the same step."
        )
    return records


def _read_record(path: Path) -> BatchRecord:
    try:
        facts = json.loads(path.read_bytes())
        if facts["format_version"] != FORMAT_VERSION:
            raise DeclipError(
                f"{str(path)!r} has format {facts['format_version']}, not {FORMAT_VERSION}; read "
                "it with the version that wrote it."
            )
        tensors = safetensors.torch.load_file(path.with_suffix(".safetensors"))
        batch = {n.removeprefix(_BATCH): v for n, v in tensors.items() if n.startswith(_BATCH)}
        return BatchRecord(
            batch=_batch_of(batch, facts["step"], facts["epoch"]),
            generators=GeneratorStates(
                tensors[f"{_GENERATORS}cpu"], tensors.get(f"{_GENERATORS}device")
            ),
            settings=parse_settings(facts["settings"], str(path)),
            **{
                field.name: facts[field.name]
                for field in fields(BatchRecord)
                if field.name not in ("settings", "batch", "generators")
            },
        )
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise DeclipError(
            f"{str(path)!r} cannot be read ({error}); run the training again, it fails at the same "
            "step."
        ) from error


def read_weights(folder: Path, step: int) -> dict[str, Tensor] | None:
    """What :func:`write_weights` kept; None where nothing was.

    Raises:
        DeclipError: the file is damaged.
    """
    path = folder / f"step_{step:08d}_weights.safetensors"
    if not path.is_file():
        return None
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise DeclipError(
            f"{str(path)!r} cannot be read ({error}); delete it, and the checkpoint before the "
            "step is taken in its place."
        ) from error
