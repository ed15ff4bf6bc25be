"""Trained towers as files that open_clip loads unchanged, our heads beside them under a key of
their own.

    FOLDER/open_clip_config.json         {"model_cfg": ..., "preprocess_cfg": ...,
    "opendeclip": provenance}
    FOLDER/open_clip_pytorch_model.bin   {"state_dict": towers, "aux_state_dict": heads,
    "provenance": scalars}
    FOLDER/open_clip_model.safetensors   the towers once more, which open_clip reads first
    FOLDER/aux_model.safetensors         the heads once more, where there are any

Either kind of weights is enough for open_clip and for `load_export`. Beside a text tower of
transformers lie its config.json and its tokenizer's files, where open_clip looks for them.

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save
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
    "HEADS_NAME",
    "SAFE_NAME",
    "WEIGHTS_NAME",
    "LoadedExport",
    "PreprocessSettings",
    "Scalar",
    "export_open_clip",
    "load_export",
    "plain_state",
    "refuse_unhealthy",
    "safe_bytes",
]

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_pytorch_model.bin"
SAFE_NAME = "open_clip_model.safetensors"
HEADS_NAME = "aux_model.safetensors"
_PROVENANCE = "opendeclip"
"""Entry of the configuration, which open_clip does not read."""

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


def plain_state(owner: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's state as contiguous CPU tensors of their own, floating point in float32.

    Views and shared storages would drag along bytes that are no part of the weights; training in
    bfloat16 must not decide what an export looks like.

    Args:
        owner: a module, or its state.
    """
    given = owner.state_dict() if isinstance(owner, nn.Module) else owner
    state: dict[str, Tensor] = {}
    for name, tensor in given.items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        state[name] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())
    return state


def safe_bytes(state: dict[str, Tensor]) -> bytes:
    """A state as a safetensors file; equal states make equal bytes."""
    # One entry alone: the library writes several in an order of chance.
    return save(state, metadata={"format": "pt"})


def refuse_unhealthy(states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse to write numbers that are not finite.

    Args:
        states: by owner, for the sentence.

    Raises:
        DeclipError: naming the first such parameter.
    """
    for owner, state in states.items():
        for name, tensor in state.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DeclipError(
                    f"{owner} has numbers in {name} that are not finite, so the model is useless: "
                    "go back to an earlier checkpoint, and lower the learning rate."
                )


def export_open_clip(
    model: TwoTowers,
    heads: nn.Module | Mapping[str, Tensor] | None,
    folder: Path | str,
    preprocess: PreprocessSettings,
    provenance: Mapping[str, Scalar],
    *,
    pickled: bool = True,
) -> tuple[Path, ...]:
    """Write a model as open_clip reads it.

    Args:
        model: the towers.
        heads: extra parameters to keep under "aux_state_dict", or their state; None for methods
            that have none.
        folder: created if absent.
        preprocess: how images are to be prepared for these towers.
        provenance: where the weights come from; text, numbers, booleans and None under text keys,
            and nothing that changes from run to run if the bytes are to be the same.
        pickled: whether to write the .bin, or safetensors alone.

    Returns:
        Paths of the configuration, of the weights as .bin (where asked for) and as safetensors;
        then those of the heads, where there are any, and of a text model's files.

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
        "state_dict": plain_state(model),
        "aux_state_dict": plain_state(heads) if heads is not None else {},
    }
    refuse_unhealthy(states)
    beside = text_model_files(model.text.config) if isinstance(model, HFTextCLIP) else {}
    origin = dict(sorted(provenance.items()))
    config = {
        "model_cfg": model.to_open_clip(),
        "preprocess_cfg": asdict(preprocess),
        _PROVENANCE: origin,
    }
    files: dict[str, bytes | memoryview] = {}
    if pickled:
        # torch.save names the archive's folder after the file; through a buffer, the bytes do not
        # depend on it.
        buffer = io.BytesIO()
        torch.save({**states, "provenance": origin}, buffer)
        files[WEIGHTS_NAME] = buffer.getbuffer()
    files[SAFE_NAME] = safe_bytes(states["state_dict"])
    if states["aux_state_dict"]:
        files[HEADS_NAME] = safe_bytes(states["aux_state_dict"])
    target = Path(folder)
    for name, content in {**beside, **files}.items():
        atomic_write(target / name, content)
    for name in {WEIGHTS_NAME, HEADS_NAME} - files.keys():
        # Of an export that stood here before.
        (target / name).unlink(missing_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    atomic_write(target / CONFIG_NAME, text.encode("utf-8"))
    return tuple(target / name for name in (CONFIG_NAME, *files, *beside))


class _Config(NamedTuple):
    """What an export's configuration says."""

    model: ModelConfig
    text: HFTextConfig | None
    preprocess: PreprocessSettings
    provenance: dict[str, Scalar]


def _read_config(path: Path) -> _Config:
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
    return _Config(model, text, PreprocessSettings(**known), dict(config.get(_PROVENANCE, {})))


def _read_weights(folder: Path) -> dict[str, Any]:
    """The .bin's content, or as much of safetensors where there is no .bin."""
    path = folder / WEIGHTS_NAME
    if not path.is_file() and (folder / SAFE_NAME).is_file():
        path = folder / SAFE_NAME
    try:
        if path.name == SAFE_NAME:
            heads = folder / HEADS_NAME
            return {
                "state_dict": load_file(path),
                "aux_state_dict": load_file(heads) if heads.is_file() else {},
            }
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DeclipError(
            f"{folder} has no {WEIGHTS_NAME}: give the folder of an export."
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
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
    config, text, preprocess, provenance = _read_config(Path(folder) / CONFIG_NAME)
    content = _read_weights(Path(folder))
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
        provenance=content.get("provenance", provenance),
    )
