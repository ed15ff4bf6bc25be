"""Make `outcomes` of scores: of features and a classifier, of a score matrix, of two galleries.

Everything shares one tie rule (`ranking`): the best candidates are listed with every right one
behind the wrong ones it ties with, so the first listed is right exactly where the rank is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_eval.outcomes import Outcomes, concatenate
from declip_eval.ranking import (
    TIE_TOLERANCE,
    FloatArray,
    IntArray,
    blocks_of_rows,
    check_features,
    check_labels,
    check_same_dim,
    check_scores,
    normalize_rows,
    rank_of_best_positive,
    score_blocks,
)
from declip_eval.retrieval import Positives, pairs_of_images
from declip_eval.zeroshot import check_classifier

NUM_BEST = 5
"""Candidates of a query that are kept, best first."""


def classification_outcomes(
    keys: Sequence[str],
    scores: NDArray[Any],
    labels: NDArray[Any],
    *,
    candidates: Sequence[Sequence[int]] | None = None,
    is_readable: NDArray[Any] | None = None,
    tolerance: float = TIE_TOLERANCE,
    chunk_rows: int | None = None,
) -> Outcomes:
    """Answer each sample with the class of highest score.

    Args:
        keys: (n,) the samples' names, all different.
        scores: (n, num_columns) any real dtype, higher is better; rows that are not readable may
            hold anything finite.
        labels: (n,) integers, the right class.
        candidates: for each class the columns of `scores` that count as right, where classes and
            columns are not the same (ObjectNet's 113 classes among ImageNet's 1,000); `predicted`
            then holds columns. None: class i is column i.
        is_readable: (n,) bool, False for a picture that could not be read: it counts as wrong.
        tolerance: scores closer than this tie; 0 for a regression's, which have no natural scale.
        chunk_rows: samples a block; changes no result.

    Returns:
        Outcomes of kind classification; with `score` where there are two classes.

    Raises:
        ValueError: shapes that do not fit, NaN, or a label or candidate out of range.
    """
    table = check_scores(scores, "scores")
    blocks = blocks_of_rows(table, chunk_rows)
    return _classify(keys, blocks, table.shape, labels, candidates, is_readable, tolerance)


def classification_outcomes_of_features(
    keys: Sequence[str],
    image_features: NDArray[Any],
    classifier: NDArray[Any],
    labels: NDArray[Any],
    *,
    candidates: Sequence[Sequence[int]] | None = None,
    is_readable: NDArray[Any] | None = None,
    chunk_rows: int | None = None,
) -> Outcomes:
    """Answer each image with the class of highest cosine; `zeroshot_classification`, sample by
    sample.

    Args:
        keys, labels, candidates, is_readable, chunk_rows: as in `classification_outcomes`.
        image_features: (n, dim), any length and real dtype.
        classifier: (dim, num_columns) from `build_classifier`.

    Raises:
        ValueError: as in `classification_outcomes`.
    """
    images = check_features(image_features, "image_features")
    weights = check_classifier(classifier, images.shape[1])
    blocks = score_blocks(normalize_rows(images), weights, chunk_rows)
    shape = (len(images), len(weights))
    return _classify(keys, blocks, shape, labels, candidates, is_readable, TIE_TOLERANCE)


def multilabel_outcomes(
    keys: Sequence[str],
    scores: NDArray[Any],
    is_positive: NDArray[Any],
    *,
    is_readable: NDArray[Any] | None = None,
) -> Outcomes:
    """Keep each sample's scores of all classes, rounded to float32, and its right classes.

    Args:
        keys: (n,) the samples' names, all different.
        scores: (n, num_classes) any real dtype.
        is_positive: (n, num_classes) bool or 0 and 1.
        is_readable: (n,) bool, False for a picture that could not be read: its right classes come
            last of all samples, its wrong ones first.

    Raises:
        ValueError: shapes that do not fit, NaN, or labels other than 0 and 1.
    """
    table = check_scores(scores, "scores").astype(np.float32)
    positive = np.asarray(is_positive)
    if positive.shape != table.shape or not np.isin(positive, (0, 1)).all():
        raise ValueError(
            f"is_positive has shape {positive.shape}, but must hold one 0 or 1 for each of the "
            f"{table.shape} scores."
        )
    positive = positive.astype(bool)
    lost = ~_check_readable(is_readable, len(table))
    table[lost] = np.where(positive[lost], -np.inf, np.inf)
    return Outcomes(
        "multilabel",
        _check_keys(keys, len(table)),
        {"labels": positive, "scores": table},
        num_classes=table.shape[1],
    )


def retrieval_outcomes(
    image_keys: Sequence[str],
    text_keys: Sequence[str],
    image_features: NDArray[Any],
    text_features: NDArray[Any],
    image_to_texts: Positives,
    *,
    is_readable: NDArray[Any] | None = None,
    chunk_rows: int | None = None,
) -> Outcomes:
    """Ask every text for its images and every image for its texts, by cosine.

    Args:
        image_keys: (num_images,) names, all different.
        text_keys: (num_texts,) names, all different.
        image_features: (num_images, dim), any length and real dtype.
        text_features: (num_texts, dim), one row a distinct caption.
        image_to_texts: for each image the rows of its texts, as in `retrieval.retrieval`.
        is_readable: (num_images,) bool, False for a picture that could not be read: it finds no
            text, and no text finds it.
        chunk_rows: queries a block; changes no result.

    Returns:
        Outcomes of kind retrieval: first all texts (direction "image"), then all images
        (direction "text").

    Raises:
        ValueError: shapes that do not fit, NaN, or a sample without a partner.
    """
    images = check_features(image_features, "image_features")
    texts = check_features(text_features, "text_features")
    check_same_dim(images, texts, "image_features", "text_features")
    images, texts = normalize_rows(images), normalize_rows(texts)
    return _retrieve(
        image_keys,
        text_keys,
        score_blocks(texts, images, chunk_rows),
        score_blocks(images, texts, chunk_rows),
        (len(images), len(texts)),
        image_to_texts,
        is_readable,
    )


def retrieval_outcomes_of_scores(
    image_keys: Sequence[str],
    text_keys: Sequence[str],
    image_to_text: NDArray[Any],
    text_to_image: NDArray[Any],
    image_to_texts: Positives,
    *,
    is_readable: NDArray[Any] | None = None,
    chunk_rows: int | None = None,
) -> Outcomes:
    """Do the same for a model whose two directions have scores of their own, such as FILIP.

    Args:
        image_to_text: (num_images, num_texts), by which an image ranks texts.
        text_to_image: (num_texts, num_images), by which a text ranks images.
        image_keys, text_keys, image_to_texts, is_readable, chunk_rows: as in `retrieval_outcomes`.

    Raises:
        ValueError: as in `retrieval_outcomes`.
    """
    of_images = check_scores(image_to_text, "image_to_text")
    of_texts = check_scores(text_to_image, "text_to_image")
    if of_texts.shape != of_images.shape[::-1]:
        raise ValueError(
            f"image_to_text has shape {of_images.shape} and text_to_image {of_texts.shape}: the "
            "second needs one row a text and one column an image."
        )
    return _retrieve(
        image_keys,
        text_keys,
        blocks_of_rows(of_texts, chunk_rows),
        blocks_of_rows(of_images, chunk_rows),
        of_images.shape,
        image_to_texts,
        is_readable,
    )


def _classify(
    keys: Sequence[str],
    blocks: Iterable[tuple[int, FloatArray]],
    shape: tuple[int, ...],
    labels: NDArray[Any],
    candidates: Sequence[Sequence[int]] | None,
    is_readable: NDArray[Any] | None,
    tolerance: float,
) -> Outcomes:
    num_rows, num_columns = shape
    truth = check_labels(labels, num_rows, "labels")
    is_right = _right_columns(candidates, num_columns)
    if truth.max() >= len(is_right):
        raise ValueError(
            f"labels holds class {truth.max()}, but there are {len(is_right)} classes (0 to "
            f"{len(is_right) - 1}): score every class."
        )
    readable = _check_readable(is_readable, num_rows)
    ranks = np.empty(num_rows, dtype=np.int32)
    best = np.empty((num_rows, min(NUM_BEST, num_columns)), dtype=np.int32)
    best_scores = np.empty(best.shape, dtype=np.float32)
    difference = np.empty(num_rows)
    for start, scores in blocks:
        rows = slice(start, start + len(scores))
        ranks[rows], best[rows], best_scores[rows] = _rank_and_best(
            scores, is_right[truth[rows]], tolerance
        )
        if num_columns == 2:
            difference[rows] = scores[:, 1] - scores[:, 0]
    ranks[~readable], best[~readable], best_scores[~readable] = num_columns, -1, np.nan
    columns: dict[str, NDArray[Any]] = {
        "label": truth.astype(np.int32),
        "rank": ranks,
        "predicted": best,
        "scores": best_scores,
    }
    if num_columns == 2 and len(is_right) == 2:
        columns["score"] = np.where(readable, difference, np.where(truth == 1, -np.inf, np.inf))
    return Outcomes("classification", _check_keys(keys, num_rows), columns, num_classes=num_columns)


def _right_columns(
    candidates: Sequence[Sequence[int]] | None, num_columns: int
) -> NDArray[np.bool_]:
    """Return (num_classes, num_columns): which columns are right for a class."""
    if candidates is None:
        return np.eye(num_columns, dtype=bool)
    is_right = np.zeros((len(candidates), num_columns), dtype=bool)
    for row, columns in enumerate(candidates):
        wrong = [column for column in columns if not 0 <= column < num_columns]
        if wrong or not len(columns):
            raise ValueError(
                f"candidates of class {row} are {list(columns)}, but a class needs at least one "
                f"column from 0 to {num_columns - 1}."
            )
        is_right[row, list(columns)] = True
    return is_right


def _retrieve(
    image_keys: Sequence[str],
    text_keys: Sequence[str],
    of_texts: Iterable[tuple[int, FloatArray]],
    of_images: Iterable[tuple[int, FloatArray]],
    shape: tuple[int, ...],
    image_to_texts: Positives,
    is_readable: NDArray[Any] | None,
) -> Outcomes:
    num_images, num_texts = shape
    images, texts = _check_keys(image_keys, num_images), _check_keys(text_keys, num_texts)
    readable = _check_readable(is_readable, num_images)
    image_of_pair, text_of_pair = pairs_of_images(image_to_texts, num_images, num_texts)
    everything = np.ones(num_texts, dtype=bool)
    pairs = (text_of_pair, image_of_pair)
    image_part = _ask("image", texts, images, of_texts, pairs, everything, readable)
    text_part = _ask("text", images, texts, of_images, pairs[::-1], readable, everything)
    return concatenate([image_part, text_part])


def _ask(
    direction: str,
    queries: list[str],
    gallery: list[str],
    blocks: Iterable[tuple[int, FloatArray]],
    pairs: tuple[IntArray, IntArray],
    asks: NDArray[np.bool_],
    answers: NDArray[np.bool_],
) -> Outcomes:
    """One direction; queries that cannot ask find nothing, candidates that cannot answer are never
    found and stand before no other."""
    order = np.argsort(pairs[0], kind="stable")
    query_of_pair, candidate_of_pair = pairs[0][order], pairs[1][order]
    num_best = min(NUM_BEST, len(gallery))
    ranks = np.empty(len(queries), dtype=np.int32)
    best = np.empty((len(queries), num_best), dtype=np.int64)
    best_scores = np.empty(best.shape, dtype=np.float32)
    finds = asks.copy()
    for start, scores in blocks:
        rows = slice(start, start + len(scores))
        first, last = np.searchsorted(query_of_pair, [start, start + len(scores)])
        is_right = np.zeros(scores.shape, dtype=bool)
        is_right[query_of_pair[first:last] - start, candidate_of_pair[first:last]] = True
        finds[rows] &= (is_right & answers).any(axis=1)
        scores = np.where(answers, scores, -np.inf)
        ranks[rows], best[rows], best_scores[rows] = _rank_and_best(
            scores, is_right & answers, TIE_TOLERANCE
        )
    ranks[~finds] = len(gallery)
    names = np.append(np.asarray(gallery, dtype=object), "")
    is_shown = asks[:, None] & np.isfinite(best_scores)
    return Outcomes(
        "retrieval",
        queries,
        {
            "direction": np.full(len(queries), direction, dtype=object),
            "rank": ranks,
            "best": names[np.where(is_shown, best, len(gallery))],
            "scores": np.where(is_shown, best_scores, np.float32(np.nan)),
        },
    )


def _rank_and_best(
    scores: FloatArray, is_right: NDArray[np.bool_], tolerance: float
) -> tuple[IntArray, IntArray, FloatArray]:
    """Ranks (n,), the best columns (n, k) and their scores, right ones behind those they tie with.

    A row without a right column has no meaningful rank.
    """
    ranks = rank_of_best_positive(scores, is_right, tolerance)
    lowered = np.where(is_right, np.nextafter(scores - tolerance, -np.inf), scores)
    best = best_columns(lowered, min(NUM_BEST, scores.shape[1]))
    return ranks, best, np.take_along_axis(scores, best, axis=1)


def best_columns(scores: FloatArray, num_best: int) -> IntArray:
    """Return the columns (n, num_best) of the highest scores, best first, equal ones by column.

    As a stable sort of every whole row would, at a tenth of its time for 1,000 columns.
    """
    if scores.shape[1] <= 4 * num_best:
        return np.argsort(-scores, axis=1, kind="stable")[:, :num_best].astype(np.int64)
    last = -np.partition(-scores, num_best - 1, axis=1)[:, num_best - 1 : num_best]
    # All above the last place, and of those equal to it the first ones that still fit.
    above = scores > last
    level = scores == last
    room = num_best - np.count_nonzero(above, axis=1, keepdims=True)
    chosen = above | (level & (np.cumsum(level, axis=1) <= room))
    columns = np.nonzero(chosen)[1].reshape(len(scores), num_best)
    order = np.argsort(-np.take_along_axis(scores, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1).astype(np.int64)


def _check_keys(keys: Sequence[str], num_rows: int) -> list[str]:
    if len(keys) != num_rows:
        raise ValueError(f"There are {len(keys)} keys for {num_rows} samples: give one a sample.")
    return list(keys)


def _check_readable(is_readable: NDArray[Any] | None, num_rows: int) -> NDArray[np.bool_]:
    if is_readable is None:
        return np.ones(num_rows, dtype=bool)
    mask = np.asarray(is_readable)
    if mask.dtype != bool or mask.shape != (num_rows,):
        raise ValueError(
            f"is_readable is {mask.dtype} of shape {mask.shape}, but must be bool of shape "
            f"({num_rows},)."
        )
    return mask
