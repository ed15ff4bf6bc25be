"""Zero-shot classification with an ensemble of prompts (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from declip_eval.ranking import (
    TIE_TOLERANCE,
    FloatArray,
    IntArray,
    blocks_of_rows,
    check_features,
    check_labels,
    check_scores,
    normalize_rows,
    rank_of_label,
    score_blocks,
)
from declip_eval.templates import check_templates, fill

EncodeText = Callable[[list[str]], NDArray[Any]]
"""Takes n texts, returns their features (n, dim) as a numpy array; unit length is not needed."""


ScoreTexts = Callable[[list[str]], NDArray[Any]]
"""Takes n texts, returns the scores (num_images, n) of the same images with each of them."""


class ZeroshotScores(NamedTuple):
    """What `zeroshot_classification` and `zeroshot_from_scores` return."""

    metrics: dict[str, float]
    """`acc1`, `acc5` (from 5 classes on) and `mean_per_class_recall`, fractions of 1."""

    confusion: IntArray
    """(num_classes, num_classes) counts: row = true class, column = predicted class."""


def build_classifier(
    encode_text: EncodeText,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 1024,
) -> NDArray[np.float32]:
    """Make one weight vector a class: normalize each prompt's feature, average, normalize again.

    Args:
        encode_text: the text encoder; called with batches of distinct prompts, so a prompt that
            occurs for several classes is encoded once.
        class_names: one name a class; class i is column i. Two classes of one name get the same
            column and tie, and a tie counts as wrong: a warning names them.
        templates: each with one {} for the class name, see `declip_eval.templates`.
        batch_size: prompts a call of `encode_text`.

    Returns:
        (dim, num_classes) float32, columns of unit length (zero where the encoder gave zeros).

    Raises:
        ValueError: no class, an empty name, a template without {}, or an encoder that returns
            something else than one finite vector a prompt.
    """
    names, templates = _check_names(class_names), check_templates(templates)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but a batch holds at least 1 prompt.")
    prompts = [[fill(template, name) for template in templates] for name in names]
    distinct = list(dict.fromkeys(prompt for of_class in prompts for prompt in of_class))
    features = np.concatenate(
        [
            _encode(encode_text, distinct[start : start + batch_size])
            for start in range(0, len(distinct), batch_size)
        ]
    )
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    means = np.stack(
        [
            features[[row_of[prompt] for prompt in of_class]].mean(axis=0, dtype=np.float64)
            for of_class in prompts
        ]
    )
    return np.ascontiguousarray(normalize_rows(means).T, dtype=np.float32)


def zeroshot_classification(
    image_features: NDArray[Any],
    classifier: NDArray[Any],
    labels: NDArray[Any],
    *,
    chunk_rows: int | None = None,
) -> ZeroshotScores:
    """Classify each image as the class of highest cosine. Ties count as wrong (see `ranking`).

    Args:
        image_features: (num_images, dim), any length and real dtype.
        classifier: (dim, num_classes) from `build_classifier`.
        labels: (num_images,) integers, the true class of each image.
        chunk_rows: images a block of scores; about 64 MiB by default. Changes no result.

    Returns:
        Metrics and confusion matrix. `acc1` is the matrix's trace over its sum. Where the right
        class only ties for best, the prediction is the best wrong class. A class without images
        has no recall and is left out of `mean_per_class_recall`.

    Raises:
        ValueError: shapes that do not fit, NaN, or a label that is no class.
    """
    images = check_features(image_features, "image_features")
    weights = check_classifier(classifier, images.shape[1])
    num_classes = weights.shape[0]
    truth = check_labels(labels, images.shape[0], "labels")
    if truth.max() >= num_classes:
        raise ValueError(
            f"labels holds class {truth.max()}, but the classifier has {num_classes} classes (0 to "
            f"{num_classes - 1}): build it from the names of all classes."
        )
    blocks = score_blocks(normalize_rows(images), weights, chunk_rows)
    return _scores_of_blocks(blocks, truth, num_classes)


def prompt_ensemble_scores(
    score_texts: ScoreTexts,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
) -> NDArray[np.float32]:
    """Score images with classes where prompts have no mean feature: average the similarities.

    FILIP compares an image with a prompt token by token and has no one vector a prompt, so its
    ensemble is the mean of the prompts' final similarities, not of their embeddings (Yao et al.
    2022, arXiv 2111.07783, on prompt ensembles).

    Args:
        score_texts: scores of the images with a list of prompts; called with the distinct prompts
            of some classes at a time, so that the prompts of all classes are never held at once.
        class_names: one name a class; class i is column i. Two classes of one name tie, and a tie
            counts as wrong: a warning names them.
        templates: each with one {} for the class name, see `declip_eval.templates`.
        batch_size: most prompts a call; a class's own templates are one call even above it.

    Returns:
        (num_images, num_classes) float32 for `zeroshot_from_scores`.

    Raises:
        ValueError: no class, an empty name, a template without {}, or scores of another shape than
            (num_images, number of prompts) or not finite.
    """
    names, templates = _check_names(class_names), check_templates(templates)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but a batch holds at least 1 prompt.")
    classes_a_call = max(1, batch_size // len(templates))
    columns: list[NDArray[np.float32]] = []
    for start in range(0, len(names), classes_a_call):
        some = names[start : start + classes_a_call]
        prompts = [fill(template, name) for name in some for template in templates]
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        scores = check_scores(score_texts(list(distinct)), "The result of score_texts")
        num_images = columns[0].shape[0] if columns else scores.shape[0]
        if scores.shape != (num_images, len(distinct)):
            raise ValueError(
                f"score_texts returned shape {scores.shape} for {len(distinct)} prompts and "
                f"{num_images} images: it must return one row an image and one column a prompt."
            )
        of_prompts = scores[:, [distinct[prompt] for prompt in prompts]]
        of_classes = of_prompts.reshape(num_images, len(some), len(templates))
        columns.append(of_classes.mean(axis=2, dtype=np.float64).astype(np.float32))
    return np.concatenate(columns, axis=1)


def zeroshot_from_scores(
    scores: NDArray[Any], labels: NDArray[Any], *, chunk_rows: int | None = None
) -> ZeroshotScores:
    """Classify each image as the class of highest score; `zeroshot_classification` for models
    whose scores are no product of two features, such as FILIP.

    Args:
        scores: (num_images, num_classes) of similarities within [-1, 1], such as means of cosines:
            scores closer than `ranking.TIE_TOLERANCE` are ties, and ties count as wrong.
        labels: (num_images,) integers, the true class of each image.
        chunk_rows: images a block; about 64 MiB by default. Changes no result.

    Returns:
        What `zeroshot_classification` returns.

    Raises:
        ValueError: shapes that do not fit, NaN, or a label that is no class.
    """
    table = check_scores(scores, "scores")
    num_classes = table.shape[1]
    truth = check_labels(labels, table.shape[0], "labels")
    if truth.max() >= num_classes:
        raise ValueError(
            f"labels holds class {truth.max()}, but the scores are of {num_classes} classes (0 to "
            f"{num_classes - 1}): score every class."
        )
    return _scores_of_blocks(blocks_of_rows(table, chunk_rows), truth, num_classes)


def _scores_of_blocks(
    blocks: Iterable[tuple[int, FloatArray]], truth: IntArray, num_classes: int
) -> ZeroshotScores:
    """Ranks, predictions and metrics from (first row, scores of some rows)."""
    ranks = np.empty(len(truth), dtype=np.int64)
    predicted = np.empty(len(truth), dtype=np.int64)
    for start, scores in blocks:
        block = slice(start, start + len(scores))
        ranks[block] = rank_of_label(scores, truth[block], TIE_TOLERANCE)
        predicted[block] = predict_against_ties(scores, truth[block], ranks[block])
    confusion = confusion_matrix(truth, predicted, num_classes)
    return ZeroshotScores(classification_metrics(ranks, confusion), confusion)


def predict_against_ties(scores: NDArray[Any], labels: IntArray, ranks: IntArray) -> IntArray:
    """Return the predicted class of each row: the right one where its rank is 0, else the best
    wrong one. Scores (num_rows, num_classes); labels, ranks and result (num_rows,)."""
    if scores.shape[1] == 1:
        return labels.copy()
    wrong = scores.copy()
    wrong[np.arange(len(labels)), labels] = -np.inf
    return np.where(ranks == 0, labels, wrong.argmax(axis=1))


def confusion_matrix(truth: IntArray, predicted: IntArray, num_classes: int) -> IntArray:
    """Count (true class, predicted class) into (num_classes, num_classes) int64."""
    cells = np.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def classification_metrics(ranks: IntArray, confusion: IntArray) -> dict[str, float]:
    """Turn ranks (num_rows,) and the confusion matrix into CLIP_benchmark's three metrics.

    `acc5` is left out below 5 classes, as there; at exactly 5 it is 1 for any model.
    """
    metrics = {"acc1": float((ranks == 0).mean())}
    if confusion.shape[0] >= 5:
        metrics["acc5"] = float((ranks < 5).mean())
    per_class = confusion.sum(axis=1)
    has_images = per_class > 0
    recall = confusion.diagonal()[has_images] / per_class[has_images]
    metrics["mean_per_class_recall"] = float(recall.mean())
    return metrics


def chance_classification(num_classes: int) -> dict[str, float]:
    """Return what guessing uniformly gives, under the metrics' own names.

    On unequal classes a model that always names the largest gets a higher `acc1` than this, its
    share of the samples, but never a higher `mean_per_class_recall`.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, but there is at least 1 class.")
    chance = {"acc1": 1 / num_classes}
    if num_classes >= 5:
        chance["acc5"] = 5 / num_classes
    chance["mean_per_class_recall"] = 1 / num_classes
    return chance


def group_confusion(confusion: IntArray, groups: Sequence[str]) -> tuple[IntArray, list[str]]:
    """Add up a confusion matrix over groups of classes, so that many classes can be shown.

    Args:
        confusion: (num_classes, num_classes) counts.
        groups: (num_classes,) names; classes of one name become one row and column.

    Returns:
        (num_groups, num_groups) counts and the groups' names in alphabetical order. The diagonal
        then counts images put into the right group, whether or not into the right class.

    Raises:
        ValueError: the number of groups' names is not the number of classes.
    """
    if confusion.shape != (len(groups), len(groups)):
        raise ValueError(
            f"groups names {len(groups)} classes, but the confusion matrix has shape "
            f"{confusion.shape}: give one group a class."
        )
    names, group_of = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    grouped = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(grouped, (group_of[:, None], group_of[None, :]), confusion)
    return grouped, [str(name) for name in names]


def _check_names(class_names: Sequence[str]) -> list[str]:
    if isinstance(class_names, str) or not len(class_names):
        raise ValueError("class_names must be a list with at least one class name.")
    names: list[Any] = list(class_names)
    for row, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"class_names[{row}] is {name!r}, but every class needs a name.")
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    repeated = [name for name, count in seen.items() if count > 1]
    if repeated:
        warnings.warn(
            f"{len(repeated)} class names occur more than once ({', '.join(repeated[:5])}): their "
            "images tie and count as wrong; give each class a name of its own.",
            UserWarning,
            stacklevel=3,
        )
    return names


def _encode(encode_text: EncodeText, prompts: list[str]) -> NDArray[np.float32]:
    features = check_features(encode_text(prompts), "The result of encode_text")
    if features.shape[0] != len(prompts):
        raise ValueError(
            f"encode_text returned {features.shape[0]} rows for {len(prompts)} prompts: it must "
            "return one feature vector a prompt, in their order."
        )
    return normalize_rows(features).astype(np.float32)


def check_classifier(classifier: NDArray[Any], dim: int) -> NDArray[np.float64]:
    """Return a classifier (dim, num_classes) as float64 rows (num_classes, dim), or refuse it.

    Raises:
        ValueError: it does not fit features of `dim` columns, is not finite, or has columns of
            another length than 1 (or 0).
    """
    weights = check_features(np.asarray(classifier).T, "classifier (transposed)")
    if weights.shape[1] != dim:
        raise ValueError(
            f"image_features has {dim} columns, but the classifier has {weights.shape[1]} rows: it "
            "must be (dim, num_classes), built by the same model's text encoder."
        )
    weights = weights.astype(np.float64)
    norms = np.linalg.norm(weights, axis=1)
    if not ((np.abs(norms - 1) < 1e-3) | (norms == 0)).all():
        raise ValueError(
            f"classifier has columns of length {norms.min():.3g} to {norms.max():.3g}, but they "
            "must have unit length, or classes of long vectors win: use build_classifier."
        )
    return weights
