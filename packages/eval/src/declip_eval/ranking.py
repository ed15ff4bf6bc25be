"""Scores, ranks and the one tie rule that every metric of this package shares.

**Ties count against the model.** The rank of the right answer is the number of wrong answers that
score at least as high. A model that gives every candidate the same score therefore gets nothing
right, where breaking ties by position would hand it whatever stands first in the list.

Cosine scores closer than `TIE_TOLERANCE` are ties: a matrix product gives equal columns results
that differ in the last bits, by their place in its blocks, and that noise must not decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TIE_TOLERANCE = 1e-6
"""Cosine difference below which two candidates tie (float32 features carry about 1e-7)."""

SCORE_BYTES = 64 * 2**20
"""Memory one block of scores may take, in bytes."""


def check_features(features: NDArray[Any], name: str) -> NDArray[Any]:
    """Return `features` as a real, finite (num_rows, dim) array, or refuse them.

    Args:
        features: (num_rows, dim), any real dtype; float16 is fine.
        name: what to call the array in an error.

    Raises:
        ValueError: not two-dimensional, empty, not numbers, or not finite.
    """
    array = np.asarray(features)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {array.shape}, but features need shape (num_rows, dim) with at "
            "least one row and one column: stack one feature vector a sample."
        )
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} has dtype {array.dtype}, but features must be real numbers.")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{name} has NaN or infinite values in {bad.size} of {array.shape[0]} rows (first: row "
            f"{bad[0]}): the encoder diverged or overflowed; evaluate an earlier checkpoint or use "
            "float32."
        )
    return array


def check_scores(scores: NDArray[Any], name: str) -> NDArray[Any]:
    """Return `scores` as a real, finite (num_queries, num_candidates) array, or refuse them.

    Raises:
        ValueError: not two-dimensional, empty, not numbers, or not finite.
    """
    array = np.asarray(scores)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"{name} has shape {array.shape}, but scores need shape (num_queries, num_candidates) "
            "with at least one of each."
        )
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} has dtype {array.dtype}, but scores must be real numbers.")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{name} has NaN or infinite values in {bad.size} of {array.shape[0]} rows (first: row "
            f"{bad[0]}): the model diverged or overflowed; evaluate an earlier checkpoint or use "
            "float32."
        )
    return array


def check_labels(labels: NDArray[Any], num_rows: int, name: str) -> IntArray:
    """Return `labels` as int64 of shape (num_rows,), or refuse them.

    Raises:
        ValueError: not integers, not one-dimensional, negative, or not one a row.
    """
    array = np.asarray(labels)
    if array.ndim != 1 or array.shape[0] != num_rows:
        raise ValueError(
            f"{name} has shape {array.shape}, but there are {num_rows} feature rows: give one "
            f"label a row, shape ({num_rows},)."
        )
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has dtype {array.dtype}, but labels are class numbers: convert them to "
            "integers counted from 0."
        )
    if array.min() < 0:
        raise ValueError(f"{name} holds {array.min()}, but class numbers start at 0.")
    return array.astype(np.int64)


def normalize_rows(features: NDArray[Any]) -> FloatArray:
    """Scale each row of (num_rows, dim) to unit length, in float64.

    A row of zeros stays zero: it scores 0 with everything, hence ties with everything.
    """
    rows = np.asarray(features, dtype=np.float64)
    # Scaling by the largest entry first keeps huge rows from overflowing when squared.
    largest = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1.0)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def score_blocks(
    queries: FloatArray, gallery: FloatArray, chunk_rows: int | None = None
) -> Iterator[tuple[int, FloatArray]]:
    """Yield (first query row, scores) over all queries, a bounded block at a time.

    Args:
        queries: (num_queries, dim).
        gallery: (num_candidates, dim).
        chunk_rows: queries a block; by default as many as fit into `SCORE_BYTES`.

    Yields:
        Scores of shape (rows of the block, num_candidates), float64 dot products.
    """
    rows = _rows_a_block(gallery.shape[0], chunk_rows)
    for start in range(0, queries.shape[0], rows):
        yield start, queries[start : start + rows] @ gallery.T


def blocks_of_rows(
    scores: NDArray[Any], chunk_rows: int | None = None
) -> Iterator[tuple[int, FloatArray]]:
    """Yield (first query row, scores) of a matrix that is there already, as `score_blocks` does.

    Args:
        scores: (num_queries, num_candidates), any real dtype; each block is turned into float64
            of its own, so that a float32 matrix is never doubled as a whole.
        chunk_rows: queries a block; by default as many as fit into `SCORE_BYTES`.
    """
    rows = _rows_a_block(scores.shape[1], chunk_rows)
    for start in range(0, scores.shape[0], rows):
        yield start, scores[start : start + rows].astype(np.float64)


def _rows_a_block(num_candidates: int, chunk_rows: int | None) -> int:
    if chunk_rows is None:
        return max(1, SCORE_BYTES // (8 * num_candidates))
    if chunk_rows < 1:
        raise ValueError(
            f"chunk_rows is {chunk_rows}, but a block holds at least 1 query: raise it, or leave "
            "it out for a block of about 64 MiB."
        )
    return chunk_rows


def rank_of_label(scores: FloatArray, labels: IntArray, tolerance: float) -> IntArray:
    """Count, for each row, the wrong classes that score at least as high as the right one.

    Args:
        scores: (num_rows, num_classes).
        labels: (num_rows,), the right class of each row.
        tolerance: how far below the right class's score still counts as a tie.

    Returns:
        (num_rows,) int64: 0 where the right class alone is best.
    """
    right = scores[np.arange(scores.shape[0]), labels][:, None]
    at_least_as_high = np.count_nonzero(scores >= right - tolerance, axis=1)
    return np.asarray(at_least_as_high, dtype=np.int64) - 1


def rank_of_best_positive(
    scores: FloatArray, is_positive: NDArray[np.bool_], tolerance: float
) -> IntArray:
    """Count, for each row, the negatives that score at least as high as its best positive.

    Args:
        scores: (num_queries, num_candidates).
        is_positive: the same shape; every row has at least one True.
        tolerance: how far below the best positive's score still counts as a tie.

    Returns:
        (num_queries,) int64: 0 where a positive alone is best.
    """
    best = np.where(is_positive, scores, -np.inf).max(axis=1, keepdims=True)
    before = (scores >= best - tolerance) & ~is_positive
    return np.asarray(np.count_nonzero(before, axis=1), dtype=np.int64)


def top_matches(
    queries: NDArray[Any], gallery: NDArray[Any], num_matches: int, chunk_rows: int | None = None
) -> tuple[IntArray, FloatArray]:
    """Find the best candidates of each query by cosine, for showing.

    Args:
        queries: (num_queries, dim), any length.
        gallery: (num_candidates, dim), any length.
        num_matches: candidates a query, at most num_candidates.
        chunk_rows: queries a block, see `score_blocks`.

    Returns:
        Candidate rows (num_queries, num_matches) int64 and their cosines, best first; candidates
        of exactly equal score stand in the gallery's order.

    Raises:
        ValueError: features that do not fit together, or more matches than candidates.
    """
    queries = check_features(queries, "queries")
    gallery = check_features(gallery, "gallery")
    check_same_dim(queries, gallery, "queries", "gallery")
    if not 1 <= num_matches <= gallery.shape[0]:
        raise ValueError(
            f"num_matches is {num_matches}, but there are {gallery.shape[0]} candidates: ask for 1 "
            f"to {gallery.shape[0]}."
        )
    candidates = normalize_rows(gallery)
    rows = np.empty((queries.shape[0], num_matches), dtype=np.int64)
    cosines = np.empty((queries.shape[0], num_matches), dtype=np.float64)
    for start, scores in score_blocks(normalize_rows(queries), candidates, chunk_rows):
        block = slice(start, start + len(scores))
        rows[block], cosines[block] = _best(scores, num_matches)
    return rows, cosines


def top_scores(
    scores: NDArray[Any], num_matches: int, chunk_rows: int | None = None
) -> tuple[IntArray, FloatArray]:
    """Find the best candidates of each query by given scores; `top_matches` for models whose
    scores are no product of two features.

    Args:
        scores: (num_queries, num_candidates), higher is better.
        num_matches: candidates a query, at most num_candidates.
        chunk_rows: queries a block, see `score_blocks`.

    Returns:
        Candidate rows (num_queries, num_matches) int64 and their scores, best first; candidates
        of exactly equal score stand in their own order.

    Raises:
        ValueError: scores that are no finite matrix, or more matches than candidates.
    """
    table = check_scores(scores, "scores")
    if not 1 <= num_matches <= table.shape[1]:
        raise ValueError(
            f"num_matches is {num_matches}, but there are {table.shape[1]} candidates: ask for 1 "
            f"to {table.shape[1]}."
        )
    rows = np.empty((table.shape[0], num_matches), dtype=np.int64)
    values = np.empty((table.shape[0], num_matches), dtype=np.float64)
    for start, block_scores in blocks_of_rows(table, chunk_rows):
        block = slice(start, start + len(block_scores))
        rows[block], values[block] = _best(block_scores, num_matches)
    return rows, values


def _best(scores: FloatArray, num_matches: int) -> tuple[IntArray, FloatArray]:
    best = np.argsort(-scores, axis=1, kind="stable")[:, :num_matches]
    return best.astype(np.int64, copy=False), np.take_along_axis(scores, best, axis=1)


def check_same_dim(
    first: NDArray[Any], second: NDArray[Any], first_name: str, second_name: str
) -> None:
    """Refuse two feature arrays whose rows have different lengths.

    Raises:
        ValueError: first.shape[1] differs from second.shape[1].
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{first_name} has {first.shape[1]} columns and {second_name} has {second.shape[1]}: "
            "both must come from the same model and the same space."
        )
