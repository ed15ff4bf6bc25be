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
from torch import Tensor, nn

from declip_filter.encoders import Features, one_thread, weights_digest
from declip_shards import DeclipError, Store
from declip_train.augment import eval_images
from declip_train.export import LoadedExport, load_export
from declip_train.heads import TokenHeads
from declip_train.methods import METHODS
from declip_train.tokenizer import Tokenizer

TOKENS = "tokens."
"""What names of the token projections' parameters begin with in an export."""


class CheckpointEncoder:
    """The two towers of an export folder, on the CPU or a GPU.

    A model that was trained token by token alone (FILIP) has global embeddings as they were drawn:
    it supports neither texts nor images as single vectors, and is asked for `token_similarity`.
    """

    def __init__(self, folder: Path, name: str, device: str = "cpu") -> None:
        """Load the export.

        Raises:
            DeclipError: the folder holds no export, or a damaged one, or one of FILIP without its
                token projections.
        """
        loaded = load_export(folder)
        self.name = name
        self.model = loaded.model.to(device).eval()
        self.provenance = loaded.provenance
        self.device = device
        self.image_size = self.model.config.vision.image_size
        self.dim = self.model.config.embed_dim
        self.method = str(loaded.provenance.get("method", ""))
        heads = _token_heads(loaded, folder)
        self.token_heads = heads.to(device).eval() if heads is not None else None
        if heads is None and not self.has_global_features:
            raise DeclipError(
                f"the export in {folder} is of method {self.method!r} but has no token projections "
                f"({TOKENS}*): export the model again."
            )

    @property
    def has_global_features(self) -> bool:
        """Whether the single vectors of images and texts were trained; False for FILIP."""
        return self.method not in METHODS or METHODS[self.method].has("contrastive")

    @property
    def supports_text(self) -> bool:
        """Whether :meth:`encode_text` works."""
        return self.has_global_features

    @property
    def supports_image(self) -> bool:
        """Whether :meth:`encode_image` works."""
        return self.has_global_features

    @cached_property
    def digest(self) -> str:
        """Of the weights that evaluation reads."""
        if self.token_heads is None:
            return weights_digest(self.model)
        return weights_digest(nn.ModuleDict({"towers": self.model, "tokens": self.token_heads}))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self.model.make_tokenizer()

    def encode_text(self, texts: Sequence[str]) -> Features:
        """float32 (len(texts), dim), unit length.

        Raises:
            DeclipError: the model has no trained global embeddings.
        """
        self._refuse_untrained()
        with one_thread(), torch.inference_mode():
            ids = torch.from_numpy(self._tokenizer(list(texts), trim=True)).to(self.device)
            return self._array(self.model.encode_text(ids, normalize=True))

    def encode_image(self, images: Sequence[bytes]) -> Features:
        """float32 (len(images), dim), unit length, from encoded pictures."""
        return self.encode_image_both(images)[0]

    def encode_image_both(self, images: Sequence[bytes]) -> tuple[Features, Features]:
        """Unit-length features (n, dim), and what the towers hold before the projection (n, width).

        The second is what CLIP's linear probe reads (arXiv 2103.00020, section 3.2).

        Raises:
            DeclipError: the model has no trained global embeddings.
        """
        self._refuse_untrained()
        with one_thread(), torch.inference_mode():
            output = self.model.forward_image(eval_images(images, self.image_size).to(self.device))
            features = torch.nn.functional.normalize(output.features, dim=-1)
            return self._array(features), self._array(output.pooled)

    @property
    def probe_features(self) -> str:
        """What :meth:`encode_probe` reads, in words."""
        return "before the projection" if self.has_global_features else "mean of patch tokens"

    def encode_probe(self, images: Sequence[bytes]) -> Features:
        """Frozen features (n, width) for a linear probe, float32, of any length.

        What the towers hold before the projection (CLIP, arXiv 2103.00020, section 3.2); for FILIP
        the mean of the patch tokens, unprojected and without the class token (FILIP, arXiv
        2111.07783, on its linear probe).
        """
        if self.has_global_features:
            return self.encode_image_both(images)[1]
        with one_thread(), torch.inference_mode():
            return self._array(self._patch_tokens(images).mean(dim=1))

    def encode_image_tokens(self, images: Sequence[bytes]) -> Tensor:
        """Projected patch tokens (n, num_patches, token_dim), unit length, on the device.

        Raises:
            DeclipError: the export has no token projections.
        """
        heads = self._heads()
        with one_thread(), torch.inference_mode():
            return heads.project_image(self._patch_tokens(images)).float()

    def encode_text_tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Projected tokens (n, L, token_dim), unit length, and which are real: (n, L) bool.

        L is the longest text's number of tokens, start and end token included; behind a text's end
        token is padding.

        Raises:
            DeclipError: the export has no token projections.
        """
        heads = self._heads()
        with one_thread(), torch.inference_mode():
            ids = torch.from_numpy(self._tokenizer(list(texts), trim=True)).to(self.device)
            hidden = self.model.forward_text(ids, need_hidden=True).hidden
            assert hidden is not None
            mask = self.model.caption_mask(ids)[:, : hidden.shape[1]]
            return heads.project_text(hidden).float(), mask

    def token_similarity(
        self, image_tokens: Tensor, texts: Sequence[str]
    ) -> tuple[Features, Features]:
        """Similarities of images with texts, token by token, in both directions.

        Args:
            image_tokens: (n, num_patches, token_dim) of :meth:`encode_image_tokens`.
            texts: t texts; their tokens are held at once, the products of tokens in blocks.

        Returns:
            Image to text (n, t): mean over the patches of the best real token of the text. Text to
            image (t, n): mean over the text's real tokens of the best patch. float32, within
            [-1, 1]. Source: FILIP (arXiv 2111.07783), cross-modal late interaction.
        """
        from declip_train.tokenwise import tokenwise_similarity

        text_tokens, mask = self.encode_text_tokens(texts)
        with one_thread(), torch.inference_mode():
            image_to_text, text_to_image = tokenwise_similarity(image_tokens, text_tokens, mask)
        return self._array(image_to_text), self._array(text_to_image)

    def _patch_tokens(self, images: Sequence[bytes]) -> Tensor:
        pixels = eval_images(images, self.image_size).to(self.device)
        tokens = self.model.forward_image(pixels, need_tokens=True).tokens
        assert tokens is not None
        return tokens

    def _heads(self) -> TokenHeads:
        if self.token_heads is None:
            raise DeclipError(
                f"encoder {self.name!r} is of method {self.method or 'unknown'!r} and has no token "
                "projections to compare tokens with: use its global embeddings, or a model of "
                "method filip or defilip."
            )
        return self.token_heads

    def _refuse_untrained(self) -> None:
        if not self.has_global_features:
            raise DeclipError(
                f"encoder {self.name!r} is of method {self.method!r}, which trains no global "
                "embeddings: compare token by token, or choose a model of another method."
            )

    @staticmethod
    def _array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
        return np.asarray(tensor.float().cpu().numpy(), dtype=np.float32)


def _token_heads(loaded: LoadedExport, folder: Path) -> TokenHeads | None:
    """The token projections of an export; None where it has none."""
    state = {
        name.removeprefix(TOKENS): tensor
        for name, tensor in loaded.aux_state_dict.items()
        if name.startswith(TOKENS)
    }
    if not state:
        return None
    weight = state.get("image_projection.weight")
    try:
        heads = TokenHeads(loaded.model.config, 1 if weight is None else weight.shape[0])
        heads.load_state_dict(state)
    except RuntimeError as error:
        raise DeclipError(
            f"The token projections in {folder} do not fit its configuration "
            f"({str(error).splitlines()[-1].strip()}): export the model again."
        ) from error
    return heads


def checkpoint_encoder(model: str, *, root: str, device: str) -> CheckpointEncoder:
    """Factory for names ``checkpoint:FOLDER``; FOLDER is relative to the dataset, or absolute."""
    folder = Path(model) if Path(model).is_absolute() else Store(root).local_path(model)
    return CheckpointEncoder(folder, f"checkpoint:{model}", device)
