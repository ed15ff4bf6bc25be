"""Image-text retrieval with CLIP_benchmark's metric names and meaning, and its exact chance level.

`image_retrieval_recall@k` asks, for each text, whether **any** of its images is among the k best
images; `text_retrieval_recall@k` asks, for each image, whether any of its texts is among the k best
texts.

**Shared captions.** Where several images have the same caption, asking for "the" image of that
text has no right answer: the model cannot know which of the equal texts was meant. So equal
captions are one text with several positive images (`group_captions`), it is asked once, and chance
rises with the number of its images; `chance_retrieval` gives that level exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from declip_eval.ranking import (
    TIE_TOLERANCE,
    FloatArray,
    IntArray,
    blocks_of_rows,
    check_features,
    check_same_dim,
    check_scores,
    normalize_rows,
    rank_of_best_positive,
    score_blocks,
)

Positives = Sequence[Sequence[int]]
"""For each image, the rows of the texts that are right for it."""


class RetrievalRanks(NamedTuple):
    """How many wrong candidates score at least as high as the best right one."""

    of_texts: IntArray
    """(num_texts,): wrong images before the text's best image (image retrieval)."""

    of_images: IntArray
    """(num_images,): wrong texts before the image's best text (text retrieval)."""


def group_captions(captions: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Make one text of equal captions.

    Args:
        captions: one an image; equal means equal character by character.

    Returns:
        The distinct captions in order of first appearance, and for each image the row of its text.
    """
    row_of = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    return list(row_of), [[row_of[caption]] for caption in captions]


def retrieval(
    image_features: NDArray[Any],
    text_features: NDArray[Any],
    image_to_texts: Positives,
    *,
    recall_k: Sequence[int] = (1, 5, 10),
    chunk_rows: int | None = None,
) -> dict[str, float]:
    """Score retrieval in both directions by cosine. Ties count as misses (see `ranking`).

    Args:
        image_features: (num_images, dim), any length and real dtype.
        text_features: (num_texts, dim), one row a distinct caption.
        image_to_texts: for each image the rows of its texts; every image has a text and every
            text an image.
        recall_k: how many candidates are looked at, each at most the number of candidates.
        chunk_rows: queries a block of scores; about 64 MiB by default. Changes no result.

    Returns:
        `image_retrieval_recall@k` and `text_retrieval_recall@k` for every k, fractions of 1.

    Raises:
        ValueError: shapes that do not fit, NaN, a sample without a partner, or a k out of range.
    """
    ranks = retrieval_ranks(image_features, text_features, image_to_texts, chunk_rows=chunk_rows)
    return _recalls(ranks, recall_k)


def retrieval_from_scores(
    image_to_text: NDArray[Any],
    text_to_image: NDArray[Any],
    image_to_texts: Positives,
    *,
    recall_k: Sequence[int] = (1, 5, 10),
    chunk_rows: int | None = None,
) -> dict[str, float]:
    """Score retrieval of a model whose scores are no product of two features, such as FILIP, whose
    two directions have scores of their own (Yao et al. 2022, arXiv 2111.07783).

    Args:
        image_to_text: (num_images, num_texts), by which an image ranks texts: text retrieval.
            Similarities within [-1, 1]; closer ones than `ranking.TIE_TOLERANCE` tie, and ties
            count as misses.
        text_to_image: (num_texts, num_images), by which a text ranks images: image retrieval.
        image_to_texts, recall_k, chunk_rows: as in `retrieval`.

    Returns:
        What `retrieval` returns.

    Raises:
        ValueError: shapes that do not fit, NaN, a sample without a partner, or a k out of range.
    """
    of_images = check_scores(image_to_text, "image_to_text")
    of_texts = check_scores(text_to_image, "text_to_image")
    if of_texts.shape != of_images.shape[::-1]:
        raise ValueError(
            f"image_to_text has shape {of_images.shape} and text_to_image {of_texts.shape}: the "
            "second needs one row a text and one column an image."
        )
    image_of_pair, text_of_pair = pairs_of_images(image_to_texts, *of_images.shape)
    ranks = RetrievalRanks(
        of_texts=_ranks(blocks_of_rows(of_texts, chunk_rows), text_of_pair, image_of_pair),
        of_images=_ranks(blocks_of_rows(of_images, chunk_rows), image_of_pair, text_of_pair),
    )
    return _recalls(ranks, recall_k)


def _recalls(ranks: RetrievalRanks, recall_k: Sequence[int]) -> dict[str, float]:
    ks = _check_recall_k(recall_k, len(ranks.of_images), len(ranks.of_texts))
    metrics = {f"image_retrieval_recall@{k}": float((ranks.of_texts < k).mean()) for k in ks}
    metrics |= {f"text_retrieval_recall@{k}": float((ranks.of_images < k).mean()) for k in ks}
    return metrics


def retrieval_ranks(
    image_features: NDArray[Any],
    text_features: NDArray[Any],
    image_to_texts: Positives,
    *,
    chunk_rows: int | None = None,
) -> RetrievalRanks:
    """Rank every text's best image and every image's best text; arguments as in `retrieval`."""
    images = check_features(image_features, "image_features")
    texts = check_features(text_features, "text_features")
    check_same_dim(images, texts, "image_features", "text_features")
    image_of_pair, text_of_pair = pairs_of_images(image_to_texts, len(images), len(texts))
    images, texts = normalize_rows(images), normalize_rows(texts)
    return RetrievalRanks(
        of_texts=_ranks(score_blocks(texts, images, chunk_rows), text_of_pair, image_of_pair),
        of_images=_ranks(score_blocks(images, texts, chunk_rows), image_of_pair, text_of_pair),
    )


def chance_retrieval(
    image_to_texts: Positives, num_texts: int, *, recall_k: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Return the expected recall of a random ranking, exactly, under the metrics' own names.

    A query with m right ones among n candidates finds none of them in k drawn without replacement
    with the hypergeometric probability C(n - m, k) / C(n, k); chance is 1 minus that, averaged
    over the queries.

    Raises:
        ValueError: a sample without a partner, or a k out of range.
    """
    num_images = len(image_to_texts)
    if num_images == 0:
        raise ValueError("image_to_texts is empty: there is nothing to retrieve.")
    image_of_pair, text_of_pair = _positive_pairs(image_to_texts, num_texts)
    ks = _check_recall_k(recall_k, num_images, num_texts)
    of_texts = np.bincount(text_of_pair, minlength=num_texts)
    of_images = np.bincount(image_of_pair, minlength=num_images)
    chance = {f"image_retrieval_recall@{k}": _chance(of_texts, num_images, k) for k in ks}
    chance |= {f"text_retrieval_recall@{k}": _chance(of_images, num_texts, k) for k in ks}
    return chance


def _chance(num_positives: IntArray, num_candidates: int, k: int) -> float:
    counts, weights = np.unique(num_positives, return_counts=True)
    drawn = np.arange(k)
    # A factor is zero, and the product with it, once the negatives are used up.
    factors = (num_candidates - counts[:, None] - drawn).clip(min=0) / (num_candidates - drawn)
    return float(((1 - factors.prod(axis=1)) * weights).sum() / weights.sum())


def _ranks(
    blocks: Iterable[tuple[int, FloatArray]], query_of_pair: IntArray, candidate_of_pair: IntArray
) -> IntArray:
    """Ranks of all queries, in order, from (first query, scores of some); every one has a pair."""
    order = np.argsort(query_of_pair, kind="stable")
    query_of_pair, candidate_of_pair = query_of_pair[order], candidate_of_pair[order]
    ranks = np.empty(int(query_of_pair[-1]) + 1, dtype=np.int64)
    for start, scores in blocks:
        first, last = np.searchsorted(query_of_pair, [start, start + len(scores)])
        is_positive = np.zeros(scores.shape, dtype=bool)
        is_positive[query_of_pair[first:last] - start, candidate_of_pair[first:last]] = True
        ranks[start : start + len(scores)] = rank_of_best_positive(
            scores, is_positive, TIE_TOLERANCE
        )
    return ranks


def pairs_of_images(
    image_to_texts: Positives, num_images: int, num_texts: int
) -> tuple[IntArray, IntArray]:
    """Return the distinct right (image, text) pairs as two arrays (num_pairs,) of row numbers.

    Args:
        image_to_texts: for each image the rows of its texts.
        num_images: rows of images.
        num_texts: rows of texts.

    Raises:
        ValueError: not one entry an image, a text out of range, or a sample without a partner.
    """
    if len(image_to_texts) != num_images:
        raise ValueError(
            f"image_to_texts has {len(image_to_texts)} entries for {num_images} images: give one "
            "list of text rows an image."
        )
    return _positive_pairs(image_to_texts, num_texts)


def _positive_pairs(image_to_texts: Positives, num_texts: int) -> tuple[IntArray, IntArray]:
    """Return the distinct (image, text) pairs as two arrays."""
    pairs: list[tuple[int, int]] = []
    for image, texts in enumerate(image_to_texts):
        if not len(texts):
            raise ValueError(
                f"Image {image} has no text, so no answer could be right: leave it out or list its "
                "text in image_to_texts."
            )
        for text in sorted({int(text) for text in texts}):
            if not 0 <= text < num_texts:
                raise ValueError(
                    f"image_to_texts names text {text} for image {image}, but there are "
                    f"{num_texts} texts (0 to {num_texts - 1})."
                )
            pairs.append((image, text))
    images, texts_of = np.asarray(pairs, dtype=np.int64).T
    lonely = np.setdiff1d(np.arange(num_texts), texts_of)
    if lonely.size:
        raise ValueError(
            f"{lonely.size} texts have no image (first: text {lonely[0]}), so no answer could be "
            "right: leave them out or list them in image_to_texts."
        )
    return images, texts_of


def _check_recall_k(recall_k: Sequence[int], num_images: int, num_texts: int) -> tuple[int, ...]:
    limit = min(num_images, num_texts)
    if not len(recall_k):
        raise ValueError("recall_k is empty: give at least one number, such as 5.")
    for k in recall_k:
        if not 1 <= k <= limit:
            raise ValueError(
                f"recall_k holds {k}, but there are {num_images} images and {num_texts} texts: "
                f"choose from 1 to {limit}, or evaluate more samples."
            )
    return tuple(recall_k)
