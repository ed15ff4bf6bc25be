"""Trained towers as files that open_clip loads unchanged, our heads beside them under a key of
their own.

    FOLDER/open_clip_config.json         {"model_cfg": ..., "preprocess_cfg": ...}
    FOLDER/open_clip_pytorch_model.bin   {"state_dict": towers, "aux_state_dict": heads,
    "provenance": scalars}

Beside a text tower of transformers lie its config.json and its tokenizer's files, where open_clip
looks for them.

`open_clip.create_model_and_transforms("local-dir:FOLDER")` reads them. The same weights, settings
and provenance always give the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_shards.store import atomic_write
from declip_train.hf_clip import HFTextCLIP, read_open_clip_config, text_model_files
from declip_train.hf_text import HFTextConfig
from declip_train.model_config import ModelConfig
from declip_train.towers import CLIP, TwoTowers

Scalar = str | int | float | bool | None
"""What `torch.load(weights_only=True)` reads besides tensors."""

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "LoadedExport",
    "PreprocessSettings",
    "Scalar",
    "export_open_clip",
    "load_export",
]

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_pytorch_model.bin"

_INTERPOLATIONS = ("bicubic", "bilinear")
_RESIZE_MODES = ("shortest", "longest", "squash")


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """How an image becomes the towers' input at evaluation; names and meanings are open_clip's."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each channel, red, green, blue, in units of full brightness."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of each channel, in units of full brightness."""
    interpolation: str = "bicubic"
    """bicubic or bilinear."""
    resize_mode: str = "shortest"
    """shortest (then a center crop), longest (then padding) or squash."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = tuple(getattr(self, name))
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise DeclipError(
                    f"preprocess {name} is {values}, but must be three finite numbers."
                )
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise DeclipError(f"preprocess std is {self.std}, but each must be above 0.")
        for name, known in (("interpolation", _INTERPOLATIONS), ("resize_mode", _RESIZE_MODES)):
            if getattr(self, name) not in known:
                raise DeclipError(
                    f"preprocess {name} is {getattr(self, name)!r}, but must be one of "
                    f"{', '.join(known)}."
                )


class LoadedExport(NamedTuple):
    """What an export holds."""

    model: TwoTowers
    """The towers, in evaluation mode, on the CPU."""
    aux_state_dict: dict[str, Tensor]
    """State of the heads; empty when the export has none."""
    preprocess: PreprocessSettings
    provenance: dict[str, Scalar]


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state as contiguous CPU tensors of their own, floating point in float32.

    Views and shared storages would drag along bytes that are no part of the weights; training in
    bfloat16 must not decide what an export looks like.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        state[name] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())
    return state


def _refuse_unhealthy(states: Mapping[str, Mapping[str, Tensor]]) -> None:
    for owner, state in states.items():
        for name, tensor in state.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DeclipError(
                    f"{owner} has numbers in {name} that are not finite, so the model is useless: "
                    "go back to an earlier checkpoint, and lower the learning rate."
                )


def export_open_clip(
    model: TwoTowers,
    heads: nn.Module | None,
    folder: Path | str,
    preprocess: PreprocessSettings,
    provenance: Mapping[str, Scalar],
) -> tuple[Path, ...]:
    """Write a model as open_clip reads it.

    Args:
        model: the towers.
        heads: extra parameters to keep under "aux_state_dict"; None for methods that have none.
        folder: created if absent.
        preprocess: how images are to be prepared for these towers.
        provenance: where the weights come from; text, numbers, booleans and None under text keys,
            and nothing that changes from run to run if the bytes are to be the same.

    Returns:
        Paths of the configuration and of the weights; then those of a text model's files.

    Raises:
        DeclipError: weights that are not finite, or provenance that is no plain scalar (open_clip
            loads with `weights_only`). Nothing is written.
    """
    for key, value in provenance.items():
        # Exact types: a subclass, as numpy's float64 is one, does not load with weights_only.
        if type(key) is not str or type(value) not in (str, int, float, bool, type(None)):
            raise DeclipError(
                f"The provenance has {key!r}: {value!r} of type {type(value).__name__}, but takes "
                "only text, numbers, booleans and None: convert it."
            )
    states = {
        "state_dict": _plain_state(model),
        "aux_state_dict": _plain_state(heads) if heads is not None else {},
    }
    _refuse_unhealthy(states)
    beside = text_model_files(model.text.config) if isinstance(model, HFTextCLIP) else {}
    config = {"model_cfg": model.to_open_clip(), "preprocess_cfg": asdict(preprocess)}
    # torch.save names the archive's folder after the file; through a buffer, the bytes do not
    # depend on it.
    buffer = io.BytesIO()
    torch.save({**states, "provenance": dict(sorted(provenance.items()))}, buffer)
    target = Path(folder)
    config_path, weights_path = target / CONFIG_NAME, target / WEIGHTS_NAME
    for name, content in beside.items():
        atomic_write(target / name, content)
    atomic_write(weights_path, buffer.getvalue())
    atomic_write(config_path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("utf-8"))
    return (config_path, weights_path, *(target / name for name in beside))


def _read_config(path: Path) -> tuple[ModelConfig, HFTextConfig | None, PreprocessSettings]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DeclipError(
            f"{path.parent} has no {CONFIG_NAME}: give the folder of an export."
        ) from error
    except ValueError as error:
        raise DeclipError(f"{path} is not JSON ({error}): export the model again.") from error
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise DeclipError(f"{path} has no 'model_cfg': give the folder of an export.")
    given = dict(config.get("preprocess_cfg", {}))
    known = {name: given[name] for name in asdict(PreprocessSettings()) if name in given}
    model, text = read_open_clip_config(config["model_cfg"], path.parent)
    return model, text, PreprocessSettings(**known)


def _read_weights(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DeclipError(
            f"{path.parent} has no {WEIGHTS_NAME}: give the folder of an export."
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DeclipError(f"{path} cannot be read ({reason}): export the model again.") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise DeclipError(f"{path} has no 'state_dict': give the folder of an export.")
    return content


def load_export(folder: Path | str) -> LoadedExport:
    """Read an export back; the inverse of `export_open_clip`. No code in the file is run.

    Raises:
        DeclipError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    config, text, preprocess = _read_config(Path(folder) / CONFIG_NAME)
    content = _read_weights(Path(folder) / WEIGHTS_NAME)
    generator = torch.Generator().manual_seed(0)
    model: TwoTowers
    if text is None:
        model = CLIP(config, generator=generator)
    else:
        model = HFTextCLIP(config, text, generator)
    try:
        model.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise DeclipError(
            f"The weights in {folder} do not fit its configuration "
            f"({str(error).splitlines()[-1].strip()}): export the model again."
        ) from error
    return LoadedExport(
        model=model.eval(),
        aux_state_dict=content.get("aux_state_dict", {}),
        preprocess=preprocess,
        provenance=content.get("provenance", {}),
    )
