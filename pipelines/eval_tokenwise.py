"""FILIP as evaluation uses it: pictures and texts compared token by token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from declip_shards import DeclipError
from declip_train.heads import TokenHeads
from declip_train.tokenwise import tokenwise_similarity
from declip_train.towers import TwoTowers
from pipelines.eval_models import (
    Array,
    ImageFeatures,
    OwnTowers,
    TokenFeatures,
    as_array,
    encode_parts,
    normalized,
    run_parts,
)
from pipelines.eval_prompts import ClassNames, PromptTable, length_groups
from pipelines.eval_views import Preparation, Views

TOKEN_BYTES = 2**30
"""Token features of texts that a model remembers between two calls, in bytes."""
_TEXTS_AT_ONCE = 64


class TokenwiseModel(OwnTowers):
    """Two towers and FILIP's projections (arXiv 2111.07783); global embeddings are untrained.

    Token features of texts are remembered up to `TOKEN_BYTES`, so that chunk after chunk of
    pictures is compared with the same prompts at no more cost than the comparison.

    Args:
        heads: the projections of tokens.
        more: as for `OwnTowers`.

    Raises:
        DeclipError: the preparation does not fit the image tower.
    """

    scoring = "token-wise"
    probe_features = "mean of patch tokens"

    def __init__(
        self, towers: TwoTowers, heads: TokenHeads, preparation: Preparation, **more: Any
    ) -> None:
        super().__init__(towers, preparation, heads=heads, **more)
        self._heads = heads.to(self._device).eval()
        self._remembered: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._remembered_bytes = 0

    def encode(self, prepared: Views) -> ImageFeatures | TokenFeatures:
        """See `EvalModel`. What the probe reads is the mean of the patch tokens, unprojected and
        without the class token (FILIP, on its linear probe)."""

        def one(part: Views) -> tuple[Array, Array]:
            pixels = normalized(part, self.preparation, self._device)
            tokens = self._towers.forward_image(pixels, need_tokens=True).tokens
            assert tokens is not None
            projected = self._heads.project_image(tokens)
            return as_array(projected), as_array(tokens.mean(dim=1))

        return TokenFeatures(*encode_parts(one, prepared, self._device, self._num_threads))

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """Refuses: there is no trained single vector.

        Raises:
            DeclipError: always.
        """
        raise DeclipError(
            f"model {self.pretrained!r} compares token by token and has no one vector a text: "
            "take its scores (score_classes, score_texts), or a model with global embeddings."
        )

    def classifier(self, class_names: ClassNames, templates: Sequence[str]) -> Array:
        """Refuses, as `encode_texts` does.

        Raises:
            DeclipError: always.
        """
        return self.encode_texts(())

    def score_classes(
        self,
        images: ImageFeatures | TokenFeatures,
        class_names: ClassNames,
        templates: Sequence[str],
    ) -> Array:
        """See `EvalModel`; an ensemble of prompts averages similarities, not tokens."""
        table = PromptTable.make(class_names, templates)
        return table.class_means(self.score_texts(images, table.texts)[0])

    def score_texts(
        self, images: ImageFeatures | TokenFeatures, texts: Sequence[str]
    ) -> tuple[Array, Array]:
        """See `EvalModel`. Source: FILIP (arXiv 2111.07783), equations 3 and 4."""
        assert isinstance(images, TokenFeatures)
        number = len(images.tokens)
        to_text = np.empty((number, len(texts)), np.float32)
        to_image = np.empty((len(texts), number), np.float32)
        if not to_text.size:
            return to_text, to_image
        ids = self._quick(texts)
        groups = list(length_groups(self._tokenizer.lengths(ids), _TEXTS_AT_ONCE))
        on_device = torch.from_numpy(images.tokens).to(self._device)

        def one(rows: npt.NDArray[np.int64]) -> tuple[Array, Array]:
            tokens, mask = self._text_tokens(ids[rows], tuple(texts[row] for row in rows))
            found = tokenwise_similarity(on_device, tokens, mask)
            return as_array(found[0]), as_array(found[1])

        parts = run_parts(one, groups, self._device, self._num_threads)
        for rows, part in zip(groups, parts, strict=True):
            to_text[:, rows], to_image[rows] = part
        return to_text, to_image

    def _text_tokens(
        self, ids: npt.NDArray[np.int64], texts: tuple[str, ...]
    ) -> tuple[Tensor, Tensor]:
        """Projected tokens (t, L, d) of texts of one length, and which are real (t, L)."""
        known = self._remembered.get(texts)
        if known is not None:
            return known
        cut = ids[:, : int(self._tokenizer.lengths(ids[:1])[0])]
        rows = torch.from_numpy(np.ascontiguousarray(cut)).to(self._device)
        hidden = self._towers.forward_text(rows, need_hidden=True).hidden
        assert hidden is not None
        found = self._heads.project_text(hidden).float(), self._towers.caption_mask(rows)
        size = found[0].numel() * found[0].element_size()
        if self._remembered_bytes + size <= TOKEN_BYTES:
            self._remembered_bytes += size
            self._remembered[texts] = found
        return found
