"""Our own checkpoints as an encoder for `EmbedPairs` and for evaluation.

`filter` and `train` meet on disk only, so the encoder that reads an export of the trainer lives
here and is named by its dotted path, ``pipelines.encoders:checkpoint_encoder``.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from declip_filter.encoders import Features, one_thread, weights_digest
from declip_shards import Store
from declip_train.augment import eval_images
from declip_train.export import load_export
from declip_train.tokenizer import CaptionTokenizer


class CheckpointEncoder:
    """The two towers of an export folder, on the CPU or a GPU."""

    supports_text = True
    supports_image = True

    def __init__(self, folder: Path, name: str, device: str = "cpu") -> None:
        """Load the export.

        Raises:
            DeclipError: the folder holds no export, or a damaged one.
        """
        loaded = load_export(folder)
        self.name = name
        self.model = loaded.model.to(device).eval()
        self.provenance = loaded.provenance
        self.device = device
        self.image_size = self.model.config.vision.image_size
        self.dim = self.model.config.embed_dim

    @cached_property
    def digest(self) -> str:
        """Of the weights."""
        return weights_digest(self.model)

    @cached_property
    def _tokenizer(self) -> CaptionTokenizer:
        return CaptionTokenizer(self.model.config.text.context_length)

    def encode_text(self, texts: Sequence[str]) -> Features:
        """float32 (len(texts), dim), unit length."""
        with one_thread(), torch.inference_mode():
            ids = torch.from_numpy(self._tokenizer(list(texts), trim=True)).to(self.device)
            return self._array(self.model.encode_text(ids, normalize=True))

    def encode_image(self, images: Sequence[bytes]) -> Features:
        """float32 (len(images), dim), unit length, from encoded pictures."""
        return self.encode_image_both(images)[0]

    def encode_image_both(self, images: Sequence[bytes]) -> tuple[Features, Features]:
        """Unit-length features (n, dim), and what the towers hold before the projection (n, width).

        The second is what CLIP's linear probe reads (arXiv 2103.00020, section 3.2).
        """
        with one_thread(), torch.inference_mode():
            output = self.model.forward_image(eval_images(images, self.image_size).to(self.device))
            features = torch.nn.functional.normalize(output.features, dim=-1)
            return self._array(features), self._array(output.pooled)

    @staticmethod
    def _array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
        return np.asarray(tensor.float().cpu().numpy(), dtype=np.float32)


def checkpoint_encoder(model: str, *, root: str, device: str) -> CheckpointEncoder:
    """Factory for names ``checkpoint:FOLDER``; FOLDER is relative to the dataset, or absolute."""
    folder = Path(model) if Path(model).is_absolute() else Store(root).local_path(model)
    return CheckpointEncoder(folder, f"checkpoint:{model}", device)
