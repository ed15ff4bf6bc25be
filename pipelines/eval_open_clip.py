"""Models of open_clip as evaluation uses them.

Plain ViTs and ResNets run in our own towers, which compute the same and skip padding; for all
others (timm, CoCa, SigLIP, ...) open_clip's own model does the work. open_clip is imported only
where it must be: it needs torchvision.
"""

import difflib
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_filter.encoders import weights_digest
from declip_shards import DeclipError
from declip_train.export import CONFIG_NAME, load_export
from declip_train.model_config import ModelConfig
from declip_train.pretrained import fit_towers, read_pretrained
from declip_train.towers import CLIP
from pipelines.eval_models import (
    Array,
    EvalModel,
    GlobalScores,
    ImageFeatures,
    TokenFeatures,
    TowersModel,
    as_array,
    encode_parts,
    normalized,
    preparation_of,
    read_preparation,
    require_size,
    run_parts,
)
from pipelines.eval_prompts import encode_distinct
from pipelines.eval_views import Preparation, Views

_LOCAL, _HUB = "local-dir:", "hf-hub:"
_TEXTS_AT_ONCE = 64
_REASON_LENGTH = 300


class OpenClipModel(GlobalScores):
    """open_clip's own model.

    Args:
        model: of open_clip, in evaluation mode.
        tokenize: texts -> (n, length) ids.
        preparation: of pictures.
        config: what shapes follow from, for the digest.
        name: of the architecture.
        pretrained: of the weights.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        num_threads: parts at work at once, on the CPU; they change no bit.

    Raises:
        DeclipError: the preparation does not fit the image tower.
    """

    scoring = "global"
    probe_features = "projected, of unit length"

    def __init__(
        self,
        model: nn.Module,
        tokenize: Any,
        preparation: Preparation,
        *,
        config: Any,
        name: str,
        pretrained: str,
        device: str,
        num_threads: int,
    ) -> None:
        sides = getattr(model.visual, "image_size", preparation.size)
        self.image_size = int(sides[0] if isinstance(sides, list | tuple) else sides)
        require_size(preparation, self.image_size, f"{name}/{pretrained}")
        self.name, self.pretrained = name, pretrained
        self.preparation, self.preprocessing = preparation, preparation.text
        about = json.dumps(config, sort_keys=True, default=str)
        self.digest = hashlib.sha256(f"{about} {weights_digest(model)}".encode()).hexdigest()
        self._model: Any = model.to(device).eval()
        self._tokenize, self._device, self._num_threads = tokenize, device, num_threads

    def prepare(self, images: Sequence[bytes | str]) -> tuple[Views, list[str | None]]:
        """See `EvalModel`."""
        return self.preparation.make(images, self._num_threads)

    def encode(self, prepared: Views) -> ImageFeatures | TokenFeatures:
        """See `EvalModel`. The probe reads the features themselves, as CLIP_benchmark's does: not
        every model has something in front of its projection."""

        def one(part: Views) -> tuple[Array, Array]:
            pixels = normalized(part, self.preparation, self._device)
            features = as_array(F.normalize(self._model.encode_image(pixels).float(), dim=-1))
            return features, features

        return ImageFeatures(*encode_parts(one, prepared, self._device, self._num_threads))

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """See `EvalModel`; with padding, as open_clip's towers may want it."""
        return encode_distinct(self._encode_distinct, texts)

    def _encode_distinct(self, texts: Sequence[str]) -> Array:
        ids: Tensor = self._tokenize(list(texts) or [""])

        def one(part: Tensor) -> Array:
            found = self._model.encode_text(part.to(self._device))
            return as_array(F.normalize(found.float(), dim=-1))

        rows = [ids[start : start + _TEXTS_AT_ONCE] for start in range(0, len(ids), _TEXTS_AT_ONCE)]
        parts = run_parts(one, rows, self._device, self._num_threads)
        return np.concatenate(parts)[: len(texts)]


def load_open_clip(spec: str, *, device: str, num_threads: int) -> EvalModel:
    """Load ``MODEL/PRETRAINED``, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.

    Args:
        spec: MODEL as open_clip names it; PRETRAINED a tag of open_clip's, whose weights it fetches
            into its own cache, or the path of a checkpoint.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        num_threads: at work at once on the CPU.

    Raises:
        DeclipError: no such model or weights, weights of another model or image size, an
            activation that is not that of training, or open_clip cannot be imported.
    """
    more = {"device": device, "num_threads": num_threads}
    if spec.startswith(_LOCAL):
        return _load_folder(Path(spec.removeprefix(_LOCAL)), more)
    if spec.startswith(_HUB):
        return _load_by_open_clip(spec, None, spec.removeprefix(_HUB), more)
    name, slash, pretrained = spec.partition("/")
    if not slash or not name or not pretrained:
        raise DeclipError(
            f"{spec!r} names no weights; give open_clip:MODEL/PRETRAINED, PRETRAINED being a tag "
            "(openai, laion2b_s34b_b79k, ...) or the path of a checkpoint."
        )
    config = _model_config(name)
    path = Path(pretrained)
    if path.is_file():
        return _load_file(name, config, path, more)
    if path.suffix or path.is_absolute():
        raise DeclipError(
            f"there is no checkpoint {pretrained!r}; give the path of one, or a tag of {name}."
        )
    return _load_by_open_clip(name, config, pretrained, more)


def _model_config(name: str) -> dict[str, Any]:
    """open_clip's own JSON of a model, without importing it.

    Raises:
        DeclipError: open_clip is not installed, or has no such model.
    """
    known = _known_models()
    if not known:
        raise DeclipError("open_clip's models are unknown here: install open_clip_torch.")
    if name not in known:
        raise DeclipError(f"open_clip has no model {name!r}; {_nearest(name, known)}.")
    config: dict[str, Any] = json.loads(known[name].read_bytes())
    return config


def _known_models() -> dict[str, Path]:
    """Where open_clip has the JSON of each of its models."""
    spec = importlib.util.find_spec("open_clip")
    places = (spec.submodule_search_locations if spec else None) or []
    return {file.stem: file for place in places for file in Path(place, "model_configs").glob("*")}


def _nearest(name: str, known: Iterable[str]) -> str:
    """Of hundreds of names those that may be meant."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.3)
    return f"the nearest are {', '.join(near)}" if near else "see open_clip.list_pretrained()"


def _own_config(model_cfg: dict[str, Any]) -> ModelConfig | None:
    """The configuration of our towers; None where they lack something that the model has."""
    try:
        return ModelConfig.from_open_clip(model_cfg)
    except DeclipError:
        return None


def _load_folder(folder: Path, more: dict[str, Any]) -> EvalModel:
    try:
        model_cfg = json.loads((folder / CONFIG_NAME).read_bytes())["model_cfg"]
    except (OSError, ValueError, KeyError) as error:
        raise DeclipError(
            f"{str(folder)!r} holds no {CONFIG_NAME} of open_clip; give the folder of an export."
        ) from error
    if _own_config(model_cfg) is None:
        return _load_by_open_clip(f"{_LOCAL}{folder}", None, str(folder), more, about=model_cfg)
    preparation = read_preparation(folder / CONFIG_NAME)
    loaded = load_export(folder)
    name = str(loaded.provenance.get("model") or "custom")
    return TowersModel(loaded.model, preparation, name=name, pretrained=str(folder), **more)


def _load_file(name: str, model_cfg: dict[str, Any], path: Path, more: dict[str, Any]) -> EvalModel:
    """A checkpoint on disk; a configuration beside it must be that of the model."""
    given: dict[str, Any] = {}
    beside = path.parent / CONFIG_NAME
    if beside.is_file():
        content = json.loads(beside.read_bytes())
        _require_same_model(name, model_cfg, content.get("model_cfg", {}), beside)
        given = content.get("preprocess_cfg", {})
    config = _own_config(model_cfg)
    if config is None:
        return _load_by_open_clip(name, model_cfg, str(path), more, given)
    towers = CLIP(config, generator=torch.Generator().manual_seed(0))
    state, changes = fit_towers(read_pretrained(path).towers, towers, f"checkpoint {str(path)!r}")
    if changes:
        raise DeclipError(
            f"checkpoint {str(path)!r} is not of model {name} as it is ({'; '.join(changes)}); "
            "evaluate it as the model that it was trained as."
        )
    towers.load_state_dict(state)
    preparation = preparation_of(given, config.vision.image_size)
    return TowersModel(towers, preparation, name=name, pretrained=str(path), **more)


def _require_same_model(
    name: str, model_cfg: dict[str, Any], theirs: dict[str, Any], beside: Path
) -> None:
    """Refuse a checkpoint whose own configuration says that it is of another model."""
    ours, other = _own_config(model_cfg), _own_config(theirs)
    if ours is not None and other is not None and ours != other:
        differ = [
            field
            for field in ("embed_dim", "quick_gelu", "vision", "text")
            if getattr(ours, field) != getattr(other, field)
        ]
        if differ:
            raise DeclipError(
                f"{str(beside)!r} says that its weights are of another model than {name} "
                f"({', '.join(differ)} differ), so their features would be others; give "
                f"open_clip:{_LOCAL}{beside.parent}, or the model that they are of."
            )


def _load_by_open_clip(
    name: str,
    model_cfg: dict[str, Any] | None,
    pretrained: str,
    more: dict[str, Any],
    preprocess: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
) -> EvalModel:
    """Weights that open_clip itself finds; in our towers where they compute the same.

    Args:
        name: of the model, or of the folder or repository that it is in.
        model_cfg: of a named model; None where open_clip reads it from there.
        pretrained: tag, file, or where the model is.
        more: arguments of the model.
        preprocess: of a configuration beside the weights.
        about: the configuration of a folder's model.
    """
    open_clip = _import_open_clip()
    if model_cfg is not None and not Path(pretrained).is_file():
        _check_tag(open_clip, name, model_cfg, pretrained)
    tag = pretrained if model_cfg is not None else None
    # First what is lighter: a tokenizer that cannot be had is told before weights are read.
    tokenize = _of_open_clip(
        lambda: open_clip.get_tokenizer(name),
        f"open_clip cannot make the tokenizer of {name!r}",
        "it lies in the Hub's cache of a machine that has loaded this model once (copy that "
        f"cache), or put its files into a folder with {CONFIG_NAME} and the weights and give "
        f"open_clip:{_LOCAL}FOLDER",
    )
    model = _of_open_clip(
        lambda: open_clip.create_model(name, pretrained=tag),
        f"open_clip cannot load {name!r} with {pretrained!r}",
        "give weights of this very model"
        if Path(pretrained).exists()
        else "fetch the weights on a machine with a network, and give their path as PRETRAINED",
    )
    given = {**model.visual.preprocess_cfg, **(preprocess or {})}
    config = _own_config(model_cfg or {})
    if config is not None:
        towers = CLIP(config, generator=torch.Generator().manual_seed(0))
        state, _ = fit_towers(model.state_dict(), towers, f"open_clip's {name}")
        towers.load_state_dict(state)
        preparation = preparation_of(given, config.vision.image_size)
        return TowersModel(towers, preparation, name=name, pretrained=pretrained, **more)
    size = getattr(model.visual, "image_size", 224)
    return OpenClipModel(
        model,
        tokenize,
        preparation_of(given, size if isinstance(size, int) else size[0]),
        config=model_cfg or about or name,
        name="custom" if about is not None else name,
        pretrained=pretrained,
        **more,
    )


def _of_open_clip(make: Callable[[], Any], failure: str, remedy: str) -> Any:
    """What open_clip makes.

    Raises:
        DeclipError: it cannot.
    """
    try:
        return make()
    # Of torch, timm, transformers and the network, each with errors of its own.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The first line of torch's report on a state says nothing but that there is one.
        reason = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
        reason = (reason or type(error).__name__)[:_REASON_LENGTH].rstrip(".")
        raise DeclipError(f"{failure}: {reason}; {remedy}.") from error


def _check_tag(
    open_clip: ModuleType, name: str, model_cfg: dict[str, Any], pretrained: str
) -> None:
    """Refuse a tag that the model does not have, or that was trained with another activation."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    about = open_clip.get_pretrained_cfg(name, pretrained)
    if not about:
        raise DeclipError(
            f"open_clip has no weights {pretrained!r} of {name}, and there is no such file; "
            f"{_nearest(pretrained, tags)}."
        )
    trained, now = bool(about.get("quick_gelu")), bool(model_cfg.get("quick_gelu"))
    other = name.removesuffix("-quickgelu") if now else f"{name}-quickgelu"
    # Where there is no such pair, the model is as it was trained (roberta-ViT-B-32).
    if trained != now and other != name and other in _known_models():
        raise DeclipError(
            f"the weights {pretrained!r} were trained with quick_gelu {trained}, but model {name} "
            f"has {now}, so its features would be wrong; give open_clip:{other}/{pretrained}."
        )


def _import_open_clip() -> ModuleType:
    try:
        import open_clip
    except ImportError as error:
        raise DeclipError(
            f"open_clip cannot be imported here ({error}), which this model needs: install "
            "open_clip_torch with torchvision; or give a plain ViT's or ResNet's checkpoint by its "
            "path, which needs neither."
        ) from error
    module: ModuleType = open_clip
    return module
