"""A trained model as open_clip reads it: of a finished run, or out of a checkpoint of one that is
still going on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from declip_shards import DeclipError
from declip_train.augment import IMAGE_MEAN, IMAGE_STD
from declip_train.checkpoint_files import (
    MANIFEST,
    UnreadableError,
    check_checkpoint,
    read_state,
    step_of,
)
from declip_train.export import CONFIG_NAME, PreprocessSettings, Scalar, export_open_clip
from declip_train.module import TrainModule
from declip_train.optimizer import parameter_groups
from declip_train.settings import TrainSettings, read_settings
from declip_train.towers import TwoTowers

WEIGHTS = "mp_rank_00_model_states.pt"
"""DeepSpeed's file of a checkpoint's weights, in its stages 0 to 2."""
_PREFIX = "module."
_OF_A_MANIFEST = ("files", "format_version", "step", "made_by")
"""Entries of a checkpoint's manifest that are not the run's identity."""
_HALF = ("bf16", "fp16")
"""Precisions whose exact weights are the optimizer's."""
PREPROCESS = PreprocessSettings(
    mean=IMAGE_MEAN, std=IMAGE_STD, interpolation="bicubic", resize_mode="shortest"
)
"""How images of the trainer's towers are prepared."""


@dataclass(frozen=True, kw_only=True)
class CheckpointPlace:
    """A checkpoint that is whole."""

    folder: Path
    run: str
    """Name of its run."""
    step: int
    """Optimizer steps behind it."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a checkpoint holds."""

    module: TrainModule
    """Towers and heads, float32, on the CPU."""
    settings: TrainSettings
    """Of the run."""
    identity: Mapping[str, Scalar]
    """What the run's result depends on."""


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
    origin = provenance_of(settings, provenance, run=run, step=step)
    return export_open_clip(clip, heads, folder, PREPROCESS, origin)


def provenance_of(
    settings: TrainSettings, identity: Mapping[str, Scalar], *, run: str, step: int
) -> dict[str, Scalar]:
    """Where weights come from, as an export says it; ``identity`` wins over names in common."""
    return {
        "model": settings.model,
        "steps": step,
        "samples_seen": step * settings.global_batch_size,
        "seed": settings.seed,
        "run": run,
        **identity,
    }


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


def read_checkpoint(place: CheckpointPlace, config: Path) -> TrainedModel:
    """The towers and heads of a checkpoint, in float32, whatever the run's precision, number of
    processes and ZeRO stage.

    Args:
        place: of :func:`find_checkpoint`.
        config: the run's configuration file (``train/config.json``).

    Raises:
        DeclipError: the configuration is of another run, or the checkpoint was pruned or cannot be
            read.
    """
    settings = read_settings(config)
    try:
        manifest: dict[str, Any] = json.loads((place.folder / MANIFEST).read_bytes())
        content = read_state(place.folder / WEIGHTS)
    except FileNotFoundError as error:
        raise DeclipError(
            f"{str(place.folder)!r} was removed while it was read (a run keeps its newest "
            "checkpoints alone); run the same command again."
        ) from error
    except (ValueError, UnreadableError) as error:
        raise DeclipError(
            f"{str(place.folder / WEIGHTS)!r} cannot be read ({error}); name another checkpoint."
        ) from error
    if manifest.get("settings") not in (settings.digest(), settings.elastic_digest()):
        raise DeclipError(
            f"{str(place.folder)!r} is a checkpoint of other settings than {str(config)!r} has; "
            "name a checkpoint of that run."
        )
    try:
        module = _module_of(settings, content["module"], place.folder)
    except RuntimeError as error:
        raise DeclipError(
            f"the weights in {str(place.folder)!r} do not fit the configuration "
            f"({str(error).splitlines()[-1].strip()}); name a checkpoint of that run."
        ) from error
    # Plain values of the identity; how many processes wrote it (made_by) changes no weight.
    identity = {
        name: value
        for name, value in manifest.items()
        if name not in _OF_A_MANIFEST and isinstance(value, str | int | float | bool)
    }
    return TrainedModel(module=module, settings=settings, identity=identity)


def exact_module(settings: TrainSettings, folder: Path) -> TrainModule:
    """Towers and heads in float32 out of a verified checkpoint of ``settings``: what a run in bf16
    or fp16 exports at its end.

    Raises:
        DeclipError: the checkpoint lacks some weights.
    """
    return _module_of(settings, read_state(folder / WEIGHTS)["module"], folder)


def _module_of(settings: TrainSettings, state: Mapping[str, Any], folder: Path) -> TrainModule:
    module = TrainModule(settings)
    module.load_state_dict({name.removeprefix(_PREFIX): value for name, value in state.items()})
    if settings.precision in _HALF:
        load_exact_weights(module, folder)
    return module


@torch.no_grad()
def load_exact_weights(module: TrainModule, folder: Path) -> None:
    """Put the optimizer's float32 weights of a checkpoint in place of the half-precision ones.

    Runs in bf16 and fp16 train those; what the module computes with is a rounded copy.

    Args:
        module: float32, of the checkpoint's settings, with its weights.
        folder: the checkpoint, verified.

    Raises:
        DeclipError: it lacks some of them.
    """
    # With it comes DeepSpeed.
    from declip_train.elastic import MASTER, read_states

    if module.settings.freeze_patch_embedding:
        # The optimizer's numbering knows trained parameters alone.
        module.clip.freeze_patch_embedding()
    own = {parameter: name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, module.settings.weight_decay, module.settings.decay_exempt)
    names = [[own[parameter] for parameter in group["params"]] for group in groups]
    states = read_states(folder, [[_PREFIX + name for name in group] for group in names if group])
    parameters = dict(module.named_parameters())
    for name in (name for group in names for name in group):
        parameter = parameters[name]
        exact = states.part(_PREFIX + name, MASTER, 0, parameter.numel())
        parameter.copy_(exact.view(parameter.shape))


def export_checkpoint(place: CheckpointPlace, config: Path, target: Path) -> tuple[Path, ...]:
    """Export the model of a checkpoint while its run goes on; returns the files' paths.

    The same checkpoint always gives the same bytes; an export that stands is left as it is.

    Args:
        place: of :func:`find_checkpoint`.
        config: the run's configuration file (``train/config.json``).
        target: folder to write to.

    Raises:
        DeclipError: see :func:`read_checkpoint`.
    """
    if (target / CONFIG_NAME).is_file():
        return tuple(sorted(target.iterdir()))
    found = read_checkpoint(place, config)
    return export_model(
        found.module.clip,
        found.module.heads,
        target,
        found.settings,
        found.identity,
        run=place.run,
        step=place.step,
    )
