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

from declip_filter.encoders import Features, TokenIds, Tokens, one_thread, weights_digest
from declip_shards import DeclipError, Store
from declip_train.augment import IMAGE_MEAN, IMAGE_STD, eval_images, eval_view
from declip_train.export import LoadedExport, load_export
from declip_train.heads import TokenHeads
from declip_train.methods import METHODS
from declip_train.tokenizer import PAD_ID, CaptionTokenizer, Tokenizer

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
        return self.encode_tokens(self.tokenize(texts).ids)

    @property
    def reads_tokens(self) -> bool:
        """Whether :meth:`encode_tokens` works."""
        return self.has_global_features

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids of each text without padding, and whether it was longer than the model reads.

        Where a tokenizer does not tell a text's own length, one that fills all places counts as
        longer.
        """
        rows = self._tokenizer(list(texts), trim=True)
        lengths = self._tokenizer.lengths(rows).tolist()
        limit = self._tokenizer.context_length
        is_cut = [length >= limit for length in lengths]
        if isinstance(self._tokenizer, CaptionTokenizer):
            for number in np.flatnonzero(is_cut).tolist():
                is_cut[number] = len(self._tokenizer.encode(texts[number])) + 2 > limit
        ids: list[TokenIds] = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        return Tokens(ids=ids, is_cut=is_cut)

    def encode_tokens(self, ids: Sequence[TokenIds]) -> Features:
        """float32 (len(ids), dim), unit length: of texts as :meth:`tokenize` gives them.

        Raises:
            DeclipError: the model has no trained global embeddings.
        """
        self._refuse_untrained()
        padding = getattr(self._tokenizer, "pad_id", PAD_ID)
        rows = np.full((len(ids), max(map(len, ids), default=2)), padding, dtype=np.int64)
        for row, numbers in zip(rows, ids, strict=True):
            row[: len(numbers)] = numbers
        with one_thread(), torch.inference_mode():
            tokens = torch.from_numpy(rows).to(self.device)
            return self._array(self.model.encode_text(tokens, normalize=True))

    def encode_image(self, images: Sequence[bytes]) -> Features:
        """float32 (len(images), dim), unit length, from encoded pictures."""
        return self.encode_image_both(images)[0]

    def prepare_image(self, image: bytes) -> npt.NDArray[np.uint8]:
        """The picture as evaluation sees it: (size, size, 3) uint8.

        Raises:
            DeclipError: the bytes are no image.
        """
        return eval_view(image, self.image_size)

    def encode_prepared(self, prepared: npt.NDArray[np.uint8]) -> Features:
        """float32 (len(prepared), dim), unit length, of (n, size, size, 3) uint8.

        Pixels are normalized on the device: a quarter of the bytes travels there.

        Raises:
            DeclipError: the model has no trained global embeddings.
        """
        self._refuse_untrained()
        with one_thread(), torch.inference_mode():
            pixels = _normalized(torch.from_numpy(prepared).to(self.device))
            return self._array(self.model.encode_image(pixels, normalize=True))

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


def _normalized(pixels: Tensor) -> Tensor:
    """(n, size, size, 3) uint8 -> float32 (n, 3, size, size), as `eval_images` gives them."""
    planes = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(v, device=pixels.device) for v in (IMAGE_MEAN, IMAGE_STD))
    return planes.div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


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
