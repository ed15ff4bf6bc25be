"""How a model's images and texts are compared: by one vector each, or token by token.

`GlobalScoring` is CLIP's: cosines of global embeddings. `TokenwiseScoring` is FILIP's, whose global
embeddings are untrained: the similarity of an image with a text is a mean over the tokens of one of
them of the best cosine with a token of the other, so the two directions differ, and an ensemble of
prompts averages similarities.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from declip_eval.outcomes import Outcomes
from declip_eval.ranking import top_matches, top_scores
from declip_eval.retrieval import retrieval, retrieval_from_scores
from declip_eval.score_outcomes import (
    classification_outcomes,
    classification_outcomes_of_features,
    retrieval_outcomes,
    retrieval_outcomes_of_scores,
)
from declip_eval.zeroshot import (
    build_classifier,
    prompt_ensemble_scores,
    zeroshot_classification,
    zeroshot_from_scores,
)
from declip_shards import DeclipError, Store, read_samples
from pipelines.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.encoders import CheckpointEncoder

TOKEN_BYTES = 256 * 2**20
"""Memory that the token features of images may take, in bytes: more images come in turns."""
TEXTS_AT_ONCE = 256
"""Texts whose token features are held at once."""


class Answers(NamedTuple):
    """What a task gives."""

    metrics: dict[str, float]
    best: npt.NDArray[np.int64]
    """(num_queries, k): candidates, best first."""
    scores: npt.NDArray[np.float64]
    """(num_queries, k): their similarities."""
    outcomes: Outcomes
    """Each query's answer by itself; images go by their keys, texts by themselves."""


class Scoring(Protocol):
    """What the tasks ask of a model; rows are of the held-out data."""

    @property
    def name(self) -> str:
        """``global`` or ``token-wise``, as results have it."""

    def classify(
        self,
        rows: Sequence[int],
        labels: npt.NDArray[Any],
        classes: Sequence[str],
        templates: Sequence[str],
        top_k: int,
    ) -> Answers:
        """Zero-shot classification of images; the queries are the images, in the order of rows."""

    def retrieve(
        self,
        rows: Sequence[int],
        texts: Sequence[str],
        positives: Sequence[Sequence[int]],
        recall_k: Sequence[int],
        top_k: int,
    ) -> Answers:
        """Retrieval in both directions; the queries of ``best`` are the texts, its candidates
        places in rows."""


class GlobalScoring:
    """Cosines of global embeddings.

    Args:
        encoder: of the texts.
        images: (num_rows, dim), features of all rows.
        keys: sample key of every row.
    """

    name = "global"

    def __init__(
        self, encoder: "CheckpointEncoder", images: npt.NDArray[np.float32], keys: Sequence[str]
    ) -> None:
        self._encoder, self._images, self._keys = encoder, images, keys

    def classify(
        self,
        rows: Sequence[int],
        labels: npt.NDArray[Any],
        classes: Sequence[str],
        templates: Sequence[str],
        top_k: int,
    ) -> Answers:
        """See `Scoring`."""
        images = self._images[rows]
        classifier = build_classifier(self._encoder.encode_text, classes, templates)
        metrics, _ = zeroshot_classification(images, classifier, labels)
        keys = [self._keys[row] for row in rows]
        outcomes = classification_outcomes_of_features(keys, images, classifier, labels)
        return Answers(metrics, *top_matches(images, classifier.T, top_k), outcomes)

    def retrieve(
        self,
        rows: Sequence[int],
        texts: Sequence[str],
        positives: Sequence[Sequence[int]],
        recall_k: Sequence[int],
        top_k: int,
    ) -> Answers:
        """See `Scoring`."""
        images, text_features = self._images[rows], self._encoder.encode_text(texts)
        metrics = retrieval(images, text_features, positives, recall_k=recall_k)
        keys = [self._keys[row] for row in rows]
        outcomes = retrieval_outcomes(keys, texts, images, text_features, positives)
        return Answers(metrics, *top_matches(text_features, images, top_k), outcomes)


class TokenwiseScoring:
    """FILIP's similarities (arXiv 2111.07783), computed where they are asked for.

    Token features of images are made anew for each task, as many at a time as `TOKEN_BYTES` hold,
    and texts `TEXTS_AT_ONCE` at a time, again for every such group of images: encoding a text costs
    far less than comparing it with thousands of images.

    Args:
        encoder: an export with token projections.
        store: the dataset.
        keys: sample key of every row.
        shards: shard of every row.
        batch_size: images that go through the tower at once.
    """

    name = "token-wise"

    def __init__(
        self,
        encoder: "CheckpointEncoder",
        store: Store,
        keys: Sequence[str],
        shards: Sequence[str],
        batch_size: int,
    ) -> None:
        self._encoder, self._store, self._batch_size = encoder, store, batch_size
        self._keys, self._shards = keys, shards

    def classify(
        self,
        rows: Sequence[int],
        labels: npt.NDArray[Any],
        classes: Sequence[str],
        templates: Sequence[str],
        top_k: int,
    ) -> Answers:
        """See `Scoring`."""
        scores = np.empty((len(rows), len(classes)), dtype=np.float32)
        for places, tokens in self._groups(rows):

            def score(prompts: list[str], tokens: "Tensor" = tokens) -> npt.NDArray[np.float32]:
                return self._encoder.token_similarity(tokens, prompts)[0]

            scores[places] = prompt_ensemble_scores(
                score, classes, templates, batch_size=TEXTS_AT_ONCE
            )
        metrics, _ = zeroshot_from_scores(scores, labels)
        outcomes = classification_outcomes([self._keys[row] for row in rows], scores, labels)
        return Answers(metrics, *top_scores(scores, top_k), outcomes)

    def retrieve(
        self,
        rows: Sequence[int],
        texts: Sequence[str],
        positives: Sequence[Sequence[int]],
        recall_k: Sequence[int],
        top_k: int,
    ) -> Answers:
        """See `Scoring`."""
        image_to_text = np.empty((len(rows), len(texts)), dtype=np.float32)
        text_to_image = np.empty((len(texts), len(rows)), dtype=np.float32)
        for places, tokens in self._groups(rows):
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                some = slice(start, start + TEXTS_AT_ONCE)
                to_text, to_image = self._encoder.token_similarity(tokens, texts[some])
                image_to_text[places, some] = to_text
                text_to_image[some, places] = to_image
        metrics = retrieval_from_scores(image_to_text, text_to_image, positives, recall_k=recall_k)
        outcomes = retrieval_outcomes_of_scores(
            [self._keys[row] for row in rows], texts, image_to_text, text_to_image, positives
        )
        return Answers(metrics, *top_scores(text_to_image, top_k), outcomes)

    def _groups(self, rows: Sequence[int]) -> Iterator[tuple[npt.NDArray[np.int64], "Tensor"]]:
        """Yield places in rows and the token features (n, num_patches, token_dim) of those images,
        until every row has come once."""
        import torch

        place_of = {self._keys[row]: place for place, row in enumerate(rows)}
        shards = sorted({self._shards[row] for row in rows})
        places: list[int] = []
        tokens: list[Tensor] = []
        size = 0
        with Progress("eval: tokens", len(shards)) as bar:
            for shard in shards:
                num_images = 0
                for keys, images in picture_batches(self._store, shard, place_of, self._batch_size):
                    features = self._encoder.encode_image_tokens(images)
                    places += [place_of[key] for key in keys]
                    tokens.append(features)
                    num_images += len(images)
                    size += features.numel() * features.element_size()
                    if size >= TOKEN_BYTES:
                        yield np.array(places), torch.cat(tokens)
                        places, tokens, size = [], [], 0
                bar.advance(num_images)
            if places:
                yield np.array(places), torch.cat(tokens)


def picture_batches(
    store: Store, shard: str, keys: Mapping[str, object] | set[str], batch_size: int
) -> Iterator[tuple[list[str], list[bytes]]]:
    """Yield keys and encoded pictures of a shard's samples that are in ``keys``, a batch at a
    time."""
    found: list[str] = []
    images: list[bytes] = []
    for sample in read_samples(store, shard):
        if sample.key in keys:
            found.append(sample.key)
            images.append(sample.image)
        if len(found) == batch_size:
            yield found, images
            found, images = [], []
    if found:
        yield found, images


def choose_scoring(asked: str, encoder: "CheckpointEncoder") -> str:
    """The name of the scoring that a model is evaluated by: what is ``asked`` for, and for ``auto``
    ``token-wise`` if the model trains no global embeddings, else ``global``.

    Raises:
        DeclipError: ``asked`` is one that the model was not trained for.
    """
    if asked == "auto":
        return "global" if encoder.has_global_features else "token-wise"
    if asked == "global" and not encoder.has_global_features:
        raise DeclipError(
            f"scoring is 'global', but method {encoder.method!r} trains no global embeddings; set "
            "it to auto or token-wise."
        )
    if asked == "token-wise" and encoder.token_heads is None:
        raise DeclipError(
            f"scoring is 'token-wise', but method {encoder.method or 'unknown'!r} has no token "
            "projections; set it to auto or global."
        )
    return asked
