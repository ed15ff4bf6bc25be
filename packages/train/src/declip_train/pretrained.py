"""Weights that training starts from: files of open_clip, exports of this project, and folders in
Hugging Face's CLIPModel layout.

Nothing is downloaded, and no file's own code is run: pickled files are read with `weights_only`.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from declip_shards import DeclipError
from declip_train.export import CONFIG_NAME, HEADS_NAME, SAFE_NAME, WEIGHTS_NAME
from declip_train.hf_clip import read_open_clip_config
from declip_train.hf_export import HF_CONFIG, HF_WEIGHTS, from_hugging_face, read_hf_config
from declip_train.model_config import ModelConfig
from declip_train.module import TrainModule
from declip_train.settings import TrainSettings
from declip_train.towers import CLIP, TwoTowers

__all__ = [
    "PretrainedWeights",
    "fit_towers",
    "load_pretrained",
    "pretrained_digest",
    "read_pretrained",
]

# In open_clip's own order of preference.
_WEIGHT_NAMES = (
    SAFE_NAME,
    WEIGHTS_NAME,
    HF_WEIGHTS,
    "pytorch_model.bin",
)
_WRAPPER = "module."
# Of OpenAI's TorchScript archives: sizes, not weights.
_SIZES = ("input_resolution", "context_length", "vocab_size")
_NUM_NAMED = 3
_VISUAL_POSITIONS = "visual.positional_embedding"


@dataclass(frozen=True, kw_only=True)
class PretrainedWeights:
    """What a file or folder of weights holds, under the names of our towers."""

    path: Path
    """File of the towers' weights."""
    towers: dict[str, Tensor]
    heads: dict[str, Tensor] = field(default_factory=dict)
    """State of a method's heads; only exports of this project have any."""
    config: ModelConfig | None = None
    """Sizes, where a configuration stands beside the weights."""


def load_pretrained(
    module: TrainModule, settings: TrainSettings, say: Callable[[str], None] | None = None
) -> None:
    """Put the weights of ``settings.pretrained`` in place of those that were drawn; does nothing
    where it is unset.

    Positions are interpolated as open_clip does where the model has another image size or context
    length. Heads are taken where the weights have them, else they stay as drawn. Every process
    that calls this gets the same weights; none of it is random.

    Args:
        module: towers and heads, before DeepSpeed casts or splits them.
        settings: of the run.
        say: takes lines about what was and was not taken.

    Raises:
        DeclipError: the file is missing or damaged, or does not fit the model; the parameters that
            do not are named, with both shapes.
    """
    if settings.pretrained is None:
        return
    tell = say or (lambda line: None)
    found = read_pretrained(settings.pretrained)
    _require_same_arithmetic(found, module.clip, settings)
    state, changes = fit_towers(found.towers, module.clip, f"pretrained {settings.pretrained!r}")
    module.clip.load_state_dict(state)
    for line in changes:
        tell(line)
    taken, drawn = _load_heads(module, found)
    text = f"starting from the weights in {str(found.path)!r}"
    if taken:
        text += f", heads {', '.join(taken)} too"
    if drawn:
        text += f"; heads {', '.join(drawn)} are not in it and start as drawn"
    tell(text)


def pretrained_digest(settings: TrainSettings) -> str:
    """sha256 over the files of ``settings.pretrained``; empty where it is unset.

    Raises:
        DeclipError: there is no such file or folder.
    """
    if settings.pretrained is None:
        return ""
    digest = hashlib.sha256()
    for path in _files(Path(settings.pretrained)):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_pretrained(place: str | Path) -> PretrainedWeights:
    """Read weights of open_clip, of this project or of Hugging Face's CLIPModel.

    Args:
        place: a file (.pt, .pth, .bin, .safetensors), or a folder of an export.

    Raises:
        DeclipError: there is no such file or folder, or it holds no weights of two towers.
    """
    files = _files(Path(place))
    path = files[0]
    content = _read_file(path)
    state, heads = _split(content, path)
    config = None
    folder = path.parent if Path(place).is_dir() else None
    if folder is not None:
        if (folder / HEADS_NAME) in files:
            heads = _read_file(folder / HEADS_NAME)
        if (folder / CONFIG_NAME).is_file():
            config = _read_open_clip_config(folder / CONFIG_NAME)
        elif (folder / HF_CONFIG).is_file():
            config = read_hf_config(folder / HF_CONFIG)
    if any(name.startswith("vision_model.") for name in state):
        state = from_hugging_face(state, str(path))
    return PretrainedWeights(path=path, towers=state, heads=heads, config=config)


def _files(place: Path) -> list[Path]:
    """The file of weights that ``place`` names or holds, and what else is read with it.

    Raises:
        DeclipError: there is none.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise DeclipError(
            f"pretrained {str(place)!r} is no file and no folder; give the path of an open_clip "
            "checkpoint (.pt, .bin, .safetensors) or of an export's folder: nothing is downloaded."
        )
    found = [place / name for name in _WEIGHT_NAMES if (place / name).is_file()]
    if not found:
        raise DeclipError(
            f"pretrained {str(place)!r} holds none of {', '.join(_WEIGHT_NAMES)}; give the folder "
            "of an export, or the path of the file itself."
        )
    beside = [place / name for name in (HEADS_NAME, CONFIG_NAME, HF_CONFIG)]
    return [found[0], *(path for path in beside if path.is_file())]


def _read_file(path: Path) -> dict[str, Any]:
    """A dictionary of tensors, or one that holds one; told by content, not by the file's name."""
    try:
        with path.open("rb") as stream:
            head = stream.read(9)
        if head[8:9] == b"{" and head[:2] != b"PK":
            return load_file(path)
        with warnings.catch_warnings():
            # Of TorchScript archives, which are refused below.
            warnings.simplefilter("ignore")
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=head[:2] == b"PK"
            )
    except (RuntimeError, EOFError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            # torch's own words advise to load it with its code: not from a stranger.
            reason = "it is no file of tensors, or holds more than tensors, which is not loaded"
        if "TorchScript" in str(error):
            raise DeclipError(
                f"{str(path)!r} is a TorchScript archive, which is a program and is not run; save "
                "its state_dict() with torch.save or as safetensors, and give that."
            ) from error
        raise DeclipError(
            f"{str(path)!r} cannot be read as weights ({reason}); give an open_clip checkpoint "
            "(.pt, .bin) or a .safetensors file that is whole."
        ) from error
    if not isinstance(content, dict):
        raise DeclipError(
            f"{str(path)!r} holds a {type(content).__name__}, but must hold named tensors; give an "
            "open_clip checkpoint."
        )
    return content


def _split(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Towers under plain names, and heads, of a checkpoint or of a bare state."""
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise DeclipError(f"{str(path)!r} has a 'state_dict' that is none; give another file.")
    if state and all(name.startswith(_WRAPPER) for name in state):
        state = {name.removeprefix(_WRAPPER): value for name, value in state.items()}
    towers = {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and name not in _SIZES
    }
    if not any(name.startswith(("visual.", "vision_model.")) for name in towers):
        raise DeclipError(
            f"{str(path)!r} holds no image tower (no parameter's name begins with visual.); give "
            "an open_clip checkpoint or an export."
        )
    heads = content.get("aux_state_dict", {})
    return towers, dict(heads) if isinstance(heads, Mapping) else {}


def _read_open_clip_config(path: Path) -> ModelConfig | None:
    try:
        model_cfg = json.loads(path.read_bytes())["model_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise DeclipError(
            f"{str(path)!r} is not open_clip's configuration ({error}); export the model again, or "
            "give the path of the weights' file alone."
        ) from error
    return read_open_clip_config(model_cfg, path.parent)[0]


def _require_same_arithmetic(
    found: PretrainedWeights, clip: TwoTowers, settings: TrainSettings
) -> None:
    """Refuse what the shapes would not tell: another activation, heads of another width."""
    if found.config is None:
        return
    theirs, ours = found.config, clip.config
    pairs = {
        "quick_gelu": (theirs.quick_gelu, ours.quick_gelu),
        "vision_cfg.head_width": (theirs.vision.head_width, ours.vision.head_width),
        "text_cfg.heads": (theirs.text.heads, ours.text.heads),
    }
    for name, (their, our) in pairs.items():
        if their != our:
            raise DeclipError(
                f"pretrained {settings.pretrained!r} was trained with {name} {their}, but model "
                f"{settings.model!r} has {our}, so its features would be others; choose a model "
                "whose configuration has the same."
            )


def fit_towers(
    towers: Mapping[str, Tensor], clip: TwoTowers, owner: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights as ``clip.load_state_dict`` takes them, and a line for each change.

    Names of open_clip's two forms (text tower at the top, or under ``text.``) are brought to the
    model's; positions of image and text are interpolated as open_clip does (bicubic with
    antialiasing, and linear); a scale of one element becomes a scalar.

    Args:
        towers: by name.
        clip: the model.
        owner: what the weights are, for errors.

    Raises:
        DeclipError: parameters are missing, unknown or of another shape.
    """
    wanted = clip.state_dict()
    state = _rename_text(towers, isinstance(clip, CLIP))
    lines: list[str] = []
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in wanted and state[name].numel() == 1:
            state[name] = state[name].reshape(wanted[name].shape)
    if "logit_bias" in wanted and "logit_bias" not in state:
        # As open_clip starts SigLIP's training from weights without a bias.
        state["logit_bias"] = torch.zeros_like(wanted["logit_bias"])
        lines.append("the weights have no logit_bias, which starts from 0")
    for name, interpolate in (
        (_VISUAL_POSITIONS, _interpolate_grid),
        ("positional_embedding", _interpolate_line),
    ):
        old, new = state.get(name), wanted.get(name)
        if old is None or new is None or old.ndim != 2 or len(old) == len(new):
            continue
        if old.shape[1] == new.shape[1]:
            state[name] = interpolate(old.float(), len(new))
            lines.append(f"{name} was interpolated from {len(old)} to {len(new)} positions")
    _require_fit(state, wanted, owner)
    return state, lines


def _rename_text(towers: Mapping[str, Tensor], at_top: bool) -> dict[str, Tensor]:
    has_text = any(name.startswith("text.") for name in towers)
    if at_top and has_text:
        return {name.removeprefix("text."): value for name, value in towers.items()}
    return dict(towers)


def _interpolate_grid(old: Tensor, num_new: int) -> Tensor:
    """(1 + a * a, width) positions of a class token and a square of patches to (num_new, width)."""
    side_old, side_new = math.isqrt(len(old) - 1), math.isqrt(num_new - 1)
    if side_old**2 + 1 != len(old) or side_new**2 + 1 != num_new:
        return old
    grid = old[1:].reshape(1, side_old, side_old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side_new, side_new), mode="bicubic", antialias=True)
    return torch.cat([old[:1], grid.permute(0, 2, 3, 1).reshape(num_new - 1, -1)])


def _interpolate_line(old: Tensor, num_new: int) -> Tensor:
    """(length, width) positions of tokens to (num_new, width)."""
    return F.interpolate(old.T.unsqueeze(0), size=num_new, mode="linear")[0].T


def _require_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], owner: str) -> None:
    missing = sorted(wanted.keys() - state.keys())
    unknown = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    faults = [
        f"{len(names)} {what} ({', '.join(names[:_NUM_NAMED])}{', ...' * (len(names) > 3)})"
        for what, names in (
            ("parameters are missing", missing),
            ("are unknown", unknown),
            ("have another shape", shapes),
        )
        if names
    ]
    if faults:
        remedy = "choose the model that the weights are of"
        if unknown == ["logit_bias"] and not missing and not shapes:
            remedy = "set contrastive_loss to sigmoid, which has a bias"
        raise DeclipError(f"{owner} does not fit the model: {'; '.join(faults)}; {remedy}.")


def _load_heads(module: TrainModule, found: PretrainedWeights) -> tuple[list[str], list[str]]:
    """Fill the heads that the weights have; names of those, and of those that stay as drawn.

    Raises:
        DeclipError: a head is there in part, or with other sizes.
    """
    taken, drawn = [], []
    for name, head in module.heads.items():
        own = f"{name}."
        state = {
            key.removeprefix(own): value
            for key, value in found.heads.items()
            if key.startswith(own)
        }
        if not state:
            drawn.append(name)
            continue
        _require_fit(state, head.state_dict(), f"head {name!r} in {str(found.path)!r}")
        head.load_state_dict(state)
        taken.append(name)
    return taken, drawn
