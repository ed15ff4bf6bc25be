"""A trained model as open_clip reads it: of a finished run, or out of a checkpoint of one that is
still going on.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from declip_shards import DeclipError
from declip_train.augment import IMAGE_MEAN, IMAGE_STD
from declip_train.checkpoint import MANIFEST, check_checkpoint, step_of
from declip_train.export import CONFIG_NAME, PreprocessSettings, Scalar, export_open_clip
from declip_train.module import TrainModule
from declip_train.settings import TrainSettings, read_settings
from declip_train.towers import TwoTowers

WEIGHTS = "mp_rank_00_model_states.pt"
"""DeepSpeed's file of a checkpoint's weights, in its stages 0 to 2."""
_PREFIX = "module."
_OF_A_MANIFEST = ("files", "format_version", "step")
"""Entries of a checkpoint's manifest that are not the run's identity."""


@dataclass(frozen=True, kw_only=True)
class CheckpointPlace:
    """A checkpoint that is whole."""

    folder: Path
    run: str
    """Name of its run."""
    step: int
    """Optimizer steps behind it."""


def export_model(
    clip: TwoTowers,
    heads: nn.Module | None,
    folder: Path,
    settings: TrainSettings,
    provenance: Mapping[str, Scalar],
    *,
    run: str,
    step: int,
) -> tuple[Path, ...]:
    """Write the towers and heads, and where they come from; returns the files' paths.

    Args:
        clip: the towers.
        heads: what the method trains beside them.
        folder: to write to.
        settings: of the run.
        provenance: what the run's result depends on.
        run: name of the run.
        step: optimizer steps behind the weights.

    Raises:
        DeclipError: see ``export_open_clip``.
    """
    return export_open_clip(
        clip,
        heads,
        folder,
        PreprocessSettings(
            mean=IMAGE_MEAN, std=IMAGE_STD, interpolation="bicubic", resize_mode="shortest"
        ),
        {
            "model": settings.model,
            "steps": step,
            "samples_seen": step * settings.global_batch_size,
            "seed": settings.seed,
            "run": run,
            **provenance,
        },
    )


def find_checkpoint(folder: Path) -> CheckpointPlace | None:
    """The checkpoint in ``folder``, or the newest whole one of the runs or checkpoints in it.

    None where the folder holds no checkpoints at all (an export, for instance).

    Raises:
        DeclipError: it holds checkpoints, and none of them is whole.
    """
    candidates = [folder] if step_of(folder) is not None else []
    for pattern in ("step_*", "*/step_*"):
        candidates = candidates or [p for p in folder.glob(pattern) if step_of(p) is not None]
    if not candidates:
        return None
    faults = []
    for path in sorted(candidates, key=_age, reverse=True):
        fault = check_checkpoint(path, {})
        if fault is None:
            return CheckpointPlace(folder=path, run=path.parent.name, step=step_of(path) or 0)
        faults.append(f"{path.name}: {fault}")
    raise DeclipError(
        f"{str(folder)!r} holds no whole checkpoint ({faults[0]}); wait for training to write one, "
        "or name another folder."
    )


def _age(path: Path) -> tuple[float, int]:
    """For sorting: when a checkpoint was finished, then its step; unfinished ones are oldest."""
    try:
        return (path / MANIFEST).stat().st_mtime, step_of(path) or 0
    except FileNotFoundError:
        return 0.0, 0


def export_checkpoint(place: CheckpointPlace, config: Path, target: Path) -> tuple[Path, ...]:
    """Export the model of a checkpoint while its run goes on; returns the files' paths.

    The same checkpoint always gives the same bytes; an export that stands is left as it is.

    Args:
        place: of :func:`find_checkpoint`.
        config: the run's configuration file (``train/config.json``).
        target: folder to write to.

    Raises:
        DeclipError: the configuration is of another run, or the checkpoint was pruned or cannot be
            read.
    """
    if (target / CONFIG_NAME).is_file():
        return tuple(sorted(target.iterdir()))
    settings = read_settings(config)
    try:
        manifest: dict[str, Any] = json.loads((place.folder / MANIFEST).read_bytes())
        content = torch.load(
            place.folder / WEIGHTS, map_location="cpu", weights_only=True, mmap=True
        )
    except FileNotFoundError as error:
        raise DeclipError(
            f"{str(place.folder)!r} was removed while it was read (a run keeps its newest "
            "checkpoints alone); run the same command again."
        ) from error
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DeclipError(
            f"{str(place.folder / WEIGHTS)!r} cannot be read ({reason}); name another checkpoint."
        ) from error
    if manifest.get("settings") != settings.digest():
        raise DeclipError(
            f"{str(place.folder)!r} is a checkpoint of other settings than {str(config)!r} has; "
            "name a checkpoint of that run."
        )
    module = TrainModule(settings)
    state = {name.removeprefix(_PREFIX): value for name, value in content["module"].items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise DeclipError(
            f"the weights in {str(place.folder)!r} do not fit the configuration "
            f"({str(error).splitlines()[-1].strip()}); name a checkpoint of that run."
        ) from error
    identity = {name: value for name, value in manifest.items() if name not in _OF_A_MANIFEST}
    return export_model(
        module.clip, module.heads, target, settings, identity, run=place.run, step=place.step
    )
