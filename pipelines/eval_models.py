"""Models as evaluation uses them: our exports and runs, and those of open_clip, alike.

Work is cut into parts of a fixed number of rows, and each part runs on one thread of torch; several
threads take parts side by side. So every result has the same bits whatever the number of threads.
"""

import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from declip_filter.encoders import check_device_name, one_thread, weights_digest
from declip_shards import DeclipError
from declip_train.export import CONFIG_NAME
from declip_train.heads import TokenHeads
from declip_train.hf_clip import HFTextCLIP, text_model_files
from declip_train.token_cache import QuickTokenizer
from declip_train.towers import CLIP, TwoTowers
from pipelines.eval_packed import pack_linears
from pipelines.eval_prefixes import LEAST_SHARING, Group, encode_group, make_groups
from pipelines.eval_prompts import ClassNames, PromptTable, encode_distinct
from pipelines.eval_views import Preparation, Views

Array = npt.NDArray[np.float32]
_Part = TypeVar("_Part")
_Result = TypeVar("_Result")
OPEN_CLIP = "open_clip:"
"""What names of open_clip's models begin with."""
_EXPORT = "export"
_IMAGES_AT_ONCE = 16
_TEXTS_AT_ONCE = 256
_IMAGES_AT_ONCE_ON_GPU = 256


class ImageFeatures(NamedTuple):
    """What a model with global embeddings gives for n pictures."""

    features: Array
    """(n, dim), of unit length."""
    probe: Array
    """(n, width), what a linear probe reads; any length."""


class TokenFeatures(NamedTuple):
    """What a model that compares token by token gives for n pictures."""

    tokens: Array
    """(n, num_patches, token_dim), of unit length."""
    probe: Array
    """(n, width), what a linear probe reads; any length."""


class EvalModel(Protocol):
    """What evaluation asks of a model. Equal calls give equal bits; no row of a result depends on
    the others but by rounding."""

    name: str
    """For results: the architecture, as open_clip names it, or the model's own."""
    pretrained: str
    """For results: which weights."""
    digest: str
    """sha256 of weights and shapes: equal models have equal ones, whatever file they are from."""
    preprocessing: str
    """What becomes of a picture before the tower; enters the keys of caches."""
    preparation: Preparation
    """The same, as settings."""
    scoring: str
    """``global`` or ``token-wise``."""
    image_size: int
    """Side of the tower's input, pixels."""
    probe_features: str
    """What ``probe`` holds, in words."""

    def prepare(self, images: Sequence[bytes | str]) -> tuple[Views, list[str | None]]:
        """uint8 (n, S, S, 3), black where there is no picture; and None, or why not, for each."""

    def encode(self, prepared: Views) -> ImageFeatures | TokenFeatures:
        """Features of prepared pictures: of the kind that `scoring` says."""

    def classifier(self, class_names: ClassNames, templates: Sequence[str]) -> Array:
        """(dim, num_classes), columns of unit length; for global scoring."""

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """(n, dim), of unit length; for global scoring."""

    def score_classes(
        self,
        images: ImageFeatures | TokenFeatures,
        class_names: ClassNames,
        templates: Sequence[str],
    ) -> Array:
        """(n, num_classes) similarities of pictures with classes, by either scoring."""

    def score_texts(
        self, images: ImageFeatures | TokenFeatures, texts: Sequence[str]
    ) -> tuple[Array, Array]:
        """Similarities of pictures with texts, (n, t), and of texts with pictures, (t, n), by
        either scoring; with global embeddings the second is the first, transposed."""


class GlobalScores(ABC):
    """What follows from one vector a text: classifiers and similarities."""

    _last: tuple[tuple[Any, ...], Array] | None = None

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> Array:
        """See `EvalModel`."""

    def classifier(self, class_names: ClassNames, templates: Sequence[str]) -> Array:
        """See `EvalModel`; the last one is remembered.

        Raises:
            DeclipError: no classes, an empty name, or a template without {}.
        """
        key = tuple(map(tuple, class_names)), tuple(templates)
        if self._last is None or self._last[0] != key:
            table = PromptTable.make(class_names, templates)
            self._last = key, table.class_weights(self.encode_texts(table.texts))
        return self._last[1]

    def score_classes(
        self,
        images: ImageFeatures | TokenFeatures,
        class_names: ClassNames,
        templates: Sequence[str],
    ) -> Array:
        """See `EvalModel`."""
        assert isinstance(images, ImageFeatures)
        return images.features @ self.classifier(class_names, templates)

    def score_texts(
        self, images: ImageFeatures | TokenFeatures, texts: Sequence[str]
    ) -> tuple[Array, Array]:
        """See `EvalModel`."""
        assert isinstance(images, ImageFeatures)
        scores = images.features @ self.encode_texts(texts).T
        return scores, np.ascontiguousarray(scores.T)


class OwnTowers:
    """Two towers of this project, whatever file the weights are from, and how they are fed.

    Args:
        towers: both.
        preparation: of pictures.
        heads: projections of tokens, of a model that is compared token by token.
        name: of the architecture.
        pretrained: of the weights.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        num_threads: parts at work at once, on the CPU; they change no bit.

    Raises:
        DeclipError: the preparation does not fit the image tower.
    """

    def __init__(
        self,
        towers: TwoTowers,
        preparation: Preparation,
        *,
        heads: TokenHeads | None = None,
        name: str,
        pretrained: str,
        device: str = "cpu",
        num_threads: int = 1,
    ) -> None:
        self.image_size = towers.config.vision.image_size
        require_size(preparation, self.image_size, pretrained)
        self.name, self.pretrained = name, pretrained
        self.preparation, self.preprocessing = preparation, preparation.text
        self.digest = digest_of(towers, heads)
        self._towers = towers.to(device).eval()
        pack_linears(self._towers, device)
        self._device, self._num_threads = device, num_threads
        self._tokenizer = towers.make_tokenizer()
        self._quick = QuickTokenizer(self._tokenizer)

    def prepare(self, images: Sequence[bytes | str]) -> tuple[Views, list[str | None]]:
        """See `EvalModel`."""
        return self.preparation.make(images, self._num_threads)


class TowersModel(OwnTowers, GlobalScores):
    """`OwnTowers` by their global embeddings."""

    scoring = "global"
    probe_features = "before the projection"

    def encode(self, prepared: Views) -> ImageFeatures | TokenFeatures:
        """See `EvalModel`."""

        def one(part: Views) -> tuple[Array, Array]:
            pixels = normalized(part, self.preparation, self._device)
            output = self._towers.forward_image(pixels)
            unit = F.normalize(output.features.float(), dim=-1)
            return as_array(unit), as_array(output.pooled)

        return ImageFeatures(*encode_parts(one, prepared, self._device, self._num_threads))

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """See `EvalModel`; what texts begin with in common is computed once."""
        return encode_distinct(self._encode_distinct, texts)

    def _encode_distinct(self, texts: Sequence[str]) -> Array:
        towers = self._towers
        features = np.empty((len(texts), towers.config.embed_dim), np.float32)
        if not len(texts):
            return features
        ids = self._quick(texts)
        # A text tower of transformers looks both ways, so a beginning depends on what follows.
        least = LEAST_SHARING if isinstance(towers, CLIP) else len(texts) + 1
        groups = make_groups(ids, self._tokenizer.lengths(ids), _TEXTS_AT_ONCE, least)

        def one(group: Group) -> Array:
            found = encode_group(towers, group, self._device)
            return as_array(F.normalize(found.float(), dim=-1))

        parts = run_parts(one, groups, self._device, self._num_threads)
        for group, part in zip(groups, parts, strict=True):
            features[group.rows] = part
        return features


def require_size(preparation: Preparation, image_size: int, owner: str) -> None:
    """Refuse pictures of another size than the image tower takes.

    Raises:
        DeclipError: with both sizes.
    """
    if preparation.size != image_size:
        raise DeclipError(
            f"model {owner!r} prepares pictures of {preparation.size} pixels, but its image tower "
            f"takes {image_size}; correct 'size' in its preprocess_cfg, or export the model again."
        )


def run_parts(
    work: Callable[[_Part], _Result], parts: Sequence[_Part], device: str, num_threads: int
) -> list[_Result]:
    """``work`` of every part, each on one thread of torch, without gradients."""

    def one(part: _Part) -> _Result:
        with torch.inference_mode():
            return work(part)

    with contextlib.ExitStack() as stack:
        stack.enter_context(one_thread())
        if device != "cpu":
            # Else convolutions are rounded to 10 bits and may take another way at each call.
            exact = torch.backends.cudnn.flags(deterministic=True, allow_tf32=False)
            stack.enter_context(exact)
        if num_threads < 2 or len(parts) < 2 or device != "cpu":
            return [one(part) for part in parts]
        with ThreadPoolExecutor(
            min(num_threads, len(parts)),
            "encode",
            # Threads have numbers of their own.
            initializer=torch.set_num_threads,
            initargs=(1,),
        ) as threads:
            return list(threads.map(one, parts))


def encode_parts(
    encode: Callable[[Views], tuple[Array, Array]], prepared: Views, device: str, num_threads: int
) -> tuple[Array, Array]:
    """Both arrays that ``encode`` gives, of all pictures; with no picture, of no row."""
    step = _IMAGES_AT_ONCE if device == "cpu" else _IMAGES_AT_ONCE_ON_GPU
    parts = [prepared[start : start + step] for start in range(0, len(prepared), step)]
    # Of one picture that is not there, for the widths.
    empty = not parts
    parts = parts or [np.zeros((1, *prepared.shape[1:]), np.uint8)]
    found = run_parts(encode, parts, device, num_threads)
    first, second = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return (first[:0], second[:0]) if empty else (first, second)


def as_array(tensor: Tensor) -> Array:
    """float32, on the host."""
    return np.asarray(tensor.float().cpu().numpy(), dtype=np.float32)


def normalized(prepared: Views, preparation: Preparation, device: str) -> Tensor:
    """(n, size, size, 3) uint8 -> float32 (n, 3, size, size) on the device."""
    # A copy: views may be mapped from a file that must not be written to.
    pixels = torch.tensor(prepared).to(device)
    planes = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None]
        for values in (preparation.mean, preparation.std)
    )
    return planes.div_(255).sub_(mean).div_(std)


def digest_of(towers: TwoTowers, heads: TokenHeads | None) -> str:
    """sha256 of weights, shapes and what tokens follow from."""
    digest = hashlib.sha256()
    digest.update(json.dumps(towers.config.to_open_clip(), sort_keys=True).encode())
    digest.update(weights_digest(towers).encode())
    if heads is not None:
        digest.update(weights_digest(heads).encode())
    if isinstance(towers, HFTextCLIP):
        for name, content in sorted(text_model_files(towers.text.config).items()):
            digest.update(f"{name} {hashlib.sha256(content).hexdigest()}".encode())
    return digest.hexdigest()


def load_eval_model(spec: str, *, device: str = "cpu", num_threads: int = 1) -> EvalModel:
    """Load a model for evaluation.

    Args:
        spec: a folder (an export, or a run or dataset that holds one), or one of open_clip's:
            ``open_clip:MODEL/PRETRAINED``, PRETRAINED being a tag or a file,
            ``open_clip:local-dir:FOLDER`` or ``open_clip:hf-hub:OWNER/NAME``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        num_threads: at work at once on the CPU; they change no bit of any result.

    Raises:
        DeclipError: there is no such model, it is damaged, or its preprocessing does not fit it.
    """
    check_device_name(device)
    if num_threads < 1:
        raise DeclipError(f"num_threads is {num_threads}, but at least 1 thread is at work.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeclipError(f"device is {device!r}, but torch finds no GPU; set it to cpu.")
    if spec.startswith(OPEN_CLIP):
        from pipelines.eval_open_clip import load_open_clip

        return load_open_clip(spec.removeprefix(OPEN_CLIP), device=device, num_threads=num_threads)
    return _load_own(Path(spec), spec, device, num_threads)


def _load_own(folder: Path, spec: str, device: str, num_threads: int) -> EvalModel:
    """An export, or the model of a run."""
    from pipelines.encoders import CheckpointEncoder
    from pipelines.eval_tokenwise import TokenwiseModel

    export = find_export(folder)
    preparation = read_preparation(export / CONFIG_NAME)
    encoder = CheckpointEncoder(export, spec)
    more: dict[str, Any] = {
        "name": str(encoder.provenance.get("model") or "custom"),
        "pretrained": spec,
        "device": device,
        "num_threads": num_threads,
    }
    if encoder.has_global_features:
        return TowersModel(encoder.model, preparation, **more)
    assert encoder.token_heads is not None
    return TokenwiseModel(encoder.model, encoder.token_heads, preparation, **more)


def find_export(folder: Path) -> Path:
    """The export that a folder is, or holds as a run or a dataset.

    Raises:
        DeclipError: there is none.
    """
    for place in (folder, folder / _EXPORT, folder / "train" / _EXPORT):
        if (place / CONFIG_NAME).is_file():
            return place
    raise DeclipError(
        f"{os.fspath(folder)!r} is no model: it holds no {CONFIG_NAME}, export or train/export; "
        "give the folder of an export (declip export writes one of an unfinished run), or "
        "open_clip:MODEL/PRETRAINED."
    )


def read_preparation(config: Path) -> Preparation:
    """How pictures are prepared for the model of ``open_clip_config.json``.

    Raises:
        DeclipError: the file is damaged, or ``preprocess_cfg`` holds something that no picture can
            be prepared by.
    """
    try:
        content = json.loads(config.read_bytes())
        image_size = content["model_cfg"]["vision_cfg"]["image_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeclipError(
            f"{str(config)!r} is not open_clip's configuration of a model "
            f"({type(error).__name__}: {error}); export the model again."
        ) from error
    return preparation_of(content.get("preprocess_cfg") or {}, image_size)


def preparation_of(given: Any, image_size: int) -> Preparation:
    """`Preparation` from open_clip's ``preprocess_cfg``; absent entries take open_clip's defaults.

    Raises:
        DeclipError: an entry that is wrong.
    """
    from declip_train.augment import IMAGE_MEAN, IMAGE_STD

    if not isinstance(given, Mapping):
        raise DeclipError(f"preprocess_cfg is {given!r}, but must be a table; see open_clip's.")
    size = given.get("size", image_size)
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1 or not all(isinstance(side, int) for side in sides):
        raise DeclipError(f"preprocess size is {size!r}, but views are square: give one number.")

    return Preparation(
        size=int(sides.pop()),
        mean=_channels("mean", given.get("mean"), IMAGE_MEAN),
        std=_channels("std", given.get("std"), IMAGE_STD),
        interpolation=_interpolation(given.get("interpolation")),
        resize_mode=given.get("resize_mode") or "shortest",
        fill_color=int(given.get("fill_color") or 0),
    )


def _interpolation(given: Any) -> str:
    """open_clip draws one at random in training only; to evaluate it takes bicubic then."""
    return str(given) if given and given != "random" else "bicubic"


def _channels(name: str, given: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    """Three numbers; none stands for open_clip's default."""
    if given is None:
        return default
    if not isinstance(given, list | tuple) or not all(isinstance(v, int | float) for v in given):
        raise DeclipError(
            f"preprocess {name} is {given!r}, but must be a list of three numbers, of red, green "
            "and blue."
        )
    return tuple(given)
