"""Laws of ranking: ties count against the model, and blocks change nothing."""

from __future__ import annotations

import numpy as np
import pytest

from declip_eval.ranking import (
    check_features,
    check_labels,
    normalize_rows,
    rank_of_best_positive,
    rank_of_label,
    score_blocks,
    top_matches,
    top_scores,
)


def test_rank_of_label_counts_like_a_plain_loop():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (50, 7)).astype(np.float64)  # Few values, so many ties.
    labels = rng.integers(0, 7, 50)
    expected = [
        sum(row[c] >= row[label] for c in range(7) if c != label)
        for row, label in zip(scores, labels, strict=True)
    ]
    assert rank_of_label(scores, labels, 0.0).tolist() == expected


def test_rank_of_best_positive_counts_like_a_plain_loop():
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 5, (40, 9)).astype(np.float64)
    positive = rng.random((40, 9)) < 0.3
    positive[np.arange(40), rng.integers(0, 9, 40)] = True
    expected = []
    for row, right in zip(scores, positive, strict=True):
        best = max(score for score, is_right in zip(row, right, strict=True) if is_right)
        expected.append(
            sum(s >= best for s, is_right in zip(row, right, strict=True) if not is_right)
        )
    assert rank_of_best_positive(scores, positive, 0.0).tolist() == expected


def test_scores_within_the_tolerance_tie():
    scores = np.array([[0.5, 0.5 - 4e-7, 0.5 - 1e-5]])
    assert rank_of_label(scores, np.array([0]), 1e-6).tolist() == [1]


def test_normalize_rows_gives_unit_length_is_idempotent_and_keeps_zeros():
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [1e200, 1e200], [1e-200, 0.0]])
    once = normalize_rows(rows)
    assert np.allclose(np.linalg.norm(once, axis=1), [1, 0, 1, 1])
    assert np.allclose(normalize_rows(once), once)


@pytest.mark.parametrize("chunk_rows", [1, 3, 10, 100, None])
def test_blocks_put_together_are_the_whole_product(chunk_rows):
    rng = np.random.default_rng(2)
    queries, gallery = rng.normal(size=(10, 4)), rng.normal(size=(6, 4))
    blocks = list(score_blocks(queries, gallery, chunk_rows))
    assert [start for start, _ in blocks] == list(range(0, 10, chunk_rows or 10))
    assert np.allclose(np.concatenate([scores for _, scores in blocks]), queries @ gallery.T)


def test_top_matches_equals_a_full_sort_and_ignores_length():
    rng = np.random.default_rng(3)
    queries, gallery = rng.normal(size=(8, 5)), rng.normal(size=(20, 5))
    rows, cosines = top_matches(queries, gallery * rng.uniform(1, 9, (20, 1)), 4, chunk_rows=3)
    full = normalize_rows(queries) @ normalize_rows(gallery).T
    assert np.array_equal(rows, np.argsort(-full, axis=1)[:, :4])
    assert np.allclose(cosines, np.take_along_axis(full, rows, axis=1))
    with pytest.raises(ValueError, match=r"num_matches is 21, but there are 20 candidates: ask"):
        top_matches(queries, gallery, 21)


def test_bad_features_and_labels_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"x has shape \(3,\), but features need shape"):
        check_features(np.zeros(3), "x")
    with pytest.raises(ValueError, match=r"x has shape \(0, 3\)"):
        check_features(np.zeros((0, 3)), "x")
    with pytest.raises(
        ValueError, match=r"x has NaN or infinite values in 2 of 4 rows \(first: ro"
    ):
        check_features(np.array([[0.0], [np.nan], [np.inf], [1.0]]), "x")
    with pytest.raises(ValueError, match="features must be real numbers"):
        check_features(np.zeros((2, 2), dtype=complex), "x")
    with pytest.raises(ValueError, match="there are 3 feature rows: give one label a row"):
        check_labels(np.array([0, 1]), 3, "labels")
    with pytest.raises(ValueError, match="labels are class numbers: convert them to integers"):
        check_labels(np.array([0.0, 1.0]), 2, "labels")
    with pytest.raises(ValueError, match="holds -1, but class numbers start at 0"):
        check_labels(np.array([0, -1]), 2, "labels")
    with pytest.raises(ValueError, match="chunk_rows is 0, but a block holds at least 1 query"):
        list(score_blocks(np.zeros((2, 2)), np.zeros((2, 2)), 0))


@pytest.mark.parametrize("chunk_rows", [1, 3, None])
def test_top_scores_of_a_matrix_are_the_top_matches_of_its_features(chunk_rows):
    rng = np.random.default_rng(4)
    queries, gallery = rng.normal(size=(8, 5)), rng.normal(size=(20, 5))
    full = normalize_rows(queries) @ normalize_rows(gallery).T
    rows, scores = top_scores(full, 4, chunk_rows)
    expected = top_matches(queries, gallery, 4)
    assert np.array_equal(rows, expected[0])
    assert np.allclose(scores, expected[1])
    assert np.array_equal(top_scores(np.zeros((2, 3)), 3)[0], [[0, 1, 2]] * 2)
    with pytest.raises(ValueError, match=r"num_matches is 21, but there are 20 candidates: ask"):
        top_scores(full, 21)
    with pytest.raises(ValueError, match=r"chunk_rows is 0"):
        top_scores(full, 1, 0)
    with pytest.raises(ValueError, match=r"scores has dtype"):
        top_scores(np.array([["a"]]), 1)
