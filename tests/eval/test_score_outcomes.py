"""Outcomes of scores: ranks and lists tell one story, and nothing unreadable is ever a gain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from declip_eval.outcomes import metric_names, metrics_of
from declip_eval.score_outcomes import (
    best_columns,
    classification_outcomes,
    classification_outcomes_of_features,
    multilabel_outcomes,
    retrieval_outcomes,
    retrieval_outcomes_of_scores,
)

FEW_LEVELS = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75])


@st.composite
def tied_scores(draw):
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 30)))
    scores = draw(arrays.arrays(np.float32, shape, elements=FEW_LEVELS.map(np.float32)))
    labels = draw(arrays.arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)))
    return scores, labels


def names(count, kind="image"):
    return [f"{kind} {n}" for n in range(count)]


@settings(max_examples=40, deadline=None)
@given(tied_scores(), st.sampled_from([0.0, 1e-6, 0.3]))
def test_the_label_stands_at_its_rank(sample, tolerance):
    scores, labels = sample
    outcomes = classification_outcomes(names(len(scores)), scores, labels, tolerance=tolerance)
    columns = outcomes.columns
    for row, rank in enumerate(columns["rank"]):
        others = np.delete(scores[row], labels[row])
        assert rank == np.count_nonzero(others >= scores[row, labels[row]] - tolerance)
        shown = columns["predicted"][row].tolist()
        assert (labels[row] in shown) == (rank < len(shown))
        if rank < len(shown):
            assert shown[rank] == labels[row]
        assert columns["scores"][row].tolist() == scores[row, shown].tolist()


@settings(max_examples=40, deadline=None)
@given(tied_scores(), st.integers(1, 6))
def test_the_best_columns_are_those_of_a_stable_sort(sample, num_best):
    scores = sample[0].astype(np.float64)
    num_best = min(num_best, scores.shape[1])
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :num_best]
    assert best_columns(scores, num_best).tolist() == expected.tolist()


def test_the_size_of_a_block_changes_nothing():
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(40, 8)), rng.integers(0, 30, 40)
    classifier = rng.normal(size=(8, 30))
    classifier /= np.linalg.norm(classifier, axis=0)
    whole = classification_outcomes_of_features(names(40), images, classifier, labels)
    for chunk_rows in (7, 40):
        part = classification_outcomes_of_features(
            names(40), images, classifier, labels, chunk_rows=chunk_rows
        )
        assert part.columns["rank"].tolist() == whole.columns["rank"].tolist()
        assert part.columns["predicted"].tolist() == whole.columns["predicted"].tolist()


def test_two_classes_have_a_score_and_more_do_not():
    scores = np.array([[0.25, 0.75], [0.5, 0.25]])
    outcomes = classification_outcomes(names(2), scores, np.array([1, 1]))
    assert outcomes.columns["score"].tolist() == [0.5, -0.25]
    more = classification_outcomes(names(2), np.eye(3)[:2], np.array([0, 1]))
    assert "score" not in more.columns


def test_any_candidate_of_the_class_is_right():
    # Class 0 is column 1 or 2, class 1 is column 0: ObjectNet's classes among ImageNet's.
    scores = np.array([[0.2, 0.1, 0.9, 0.0], [0.2, 0.1, 0.9, 0.0], [0.9, 0.2, 0.9, 0.0]])
    outcomes = classification_outcomes(
        names(3), scores, np.array([0, 1, 0]), candidates=[(1, 2), (0,)]
    )
    assert outcomes.columns["rank"].tolist() == [0, 1, 1]  # The last only ties with column 0.
    assert outcomes.columns["predicted"][:, 0].tolist() == [2, 2, 0]
    assert outcomes.num_classes == 4
    assert "score" not in outcomes.columns
    plain = classification_outcomes(names(3), scores, np.array([2, 0, 0]))
    same = classification_outcomes(
        names(3), scores, np.array([2, 0, 0]), candidates=[(0,), (1,), (2,), (3,)]
    )
    assert same == plain
    with pytest.raises(ValueError, match=r"candidates of class 1 are \[4\], but a class needs"):
        classification_outcomes(names(3), scores, np.array([0, 1, 0]), candidates=[(1,), (4,)])
    with pytest.raises(ValueError, match="labels holds class 1, but there are 1 classes"):
        classification_outcomes(names(3), scores, np.array([0, 1, 0]), candidates=[(1,)])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16))
def test_a_picture_less_never_makes_a_metric_better(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(14, 6)), rng.integers(0, 6, 14)
    positive = rng.random((14, 6)) < 0.4
    positive[0] = True
    binary = np.arange(14) % 2
    is_readable = rng.random(14) < 0.7
    for make in (
        lambda mask: classification_outcomes(names(14), scores, labels, is_readable=mask),
        lambda mask: classification_outcomes(names(14), scores[:, :2], binary, is_readable=mask),
        lambda mask: multilabel_outcomes(names(14), scores, positive, is_readable=mask),
    ):
        whole = make(None)
        partial = metrics_of(make(is_readable), metric_names(whole))
        for name, value in metrics_of(whole, metric_names(whole)).items():
            assert partial[name] <= value + 1e-12


def test_nothing_readable_is_nothing_right():
    nothing = np.zeros(10, dtype=bool)
    labels = np.arange(10) % 5
    outcomes = classification_outcomes(names(10), np.eye(5)[labels], labels, is_readable=nothing)
    assert set(metrics_of(outcomes, metric_names(outcomes)).values()) == {0.0}
    assert (outcomes.columns["predicted"] == -1).all()
    binary = classification_outcomes(
        names(10), np.eye(2)[labels % 2], labels % 2, is_readable=nothing
    )
    assert metrics_of(binary, ["roc_auc"]) == {"roc_auc": 0.0}


def gallery(seed, num_images=12):
    """Images with one to three captions, some of them shared by two images."""
    rng = np.random.default_rng(seed)
    texts_of = [[2 * (n // 2), 2 * (n // 2) + 1][: 1 + n % 2] for n in range(num_images)]
    num_texts = max(max(texts) for texts in texts_of) + 1
    return rng.normal(size=(num_images, 4)), rng.normal(size=(num_texts, 4)), texts_of


def test_scores_given_and_scores_computed_rank_alike():
    images, texts, texts_of = gallery(0)
    keys, text_keys = names(len(images)), names(len(texts), "text")
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts)]
    cosines = units[0] @ units[1].T
    given_scores = retrieval_outcomes_of_scores(keys, text_keys, cosines, cosines.T, texts_of)
    computed = retrieval_outcomes(keys, text_keys, images, texts, texts_of, chunk_rows=5)
    assert given_scores.columns["rank"].tolist() == computed.columns["rank"].tolist()
    assert given_scores.columns["best"].tolist() == computed.columns["best"].tolist()
    assert given_scores.keys == computed.keys == text_keys + keys
    with pytest.raises(ValueError, match="the second needs one row a text and one column an image"):
        retrieval_outcomes_of_scores(keys, text_keys, cosines, cosines[:5], texts_of)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_listed_candidate_is_right_exactly_at_rank_0(seed):
    images, texts, texts_of = gallery(seed)
    keys, text_keys = names(len(images)), names(len(texts), "text")
    outcomes = retrieval_outcomes(keys, text_keys, images, texts, texts_of)
    right = {key: {text_keys[t] for t in texts_of[n]} for n, key in enumerate(keys)}
    for text in range(len(texts)):
        right[text_keys[text]] = {key for n, key in enumerate(keys) if text in texts_of[n]}
    for key, rank, best in zip(
        outcomes.keys, outcomes.columns["rank"], outcomes.columns["best"], strict=True
    ):
        assert (best[0] in right[key]) == (rank == 0)


def test_an_unreadable_image_finds_nothing_and_is_never_found():
    images, texts, texts_of = gallery(1)
    keys, text_keys = names(len(images)), names(len(texts), "text")
    is_readable = np.arange(len(images)) % 4 != 3
    outcomes = retrieval_outcomes(keys, text_keys, images, texts, texts_of, is_readable=is_readable)
    columns, num_texts = outcomes.columns, len(texts)
    lost = [key for key, readable in zip(keys, is_readable, strict=True) if not readable]
    assert not set(columns["best"][:num_texts].ravel()) & set(lost)
    assert (columns["rank"][num_texts:][~is_readable] == num_texts).all()
    assert (columns["best"][num_texts:][~is_readable] == "").all()
    # Text 3 belongs to image 3 alone, which is lost: not even all images are enough.
    assert columns["rank"][3] == len(images)
    assert metrics_of(outcomes, [f"image_retrieval_recall@{len(images)}"]) != {
        f"image_retrieval_recall@{len(images)}": 1.0
    }
    # The others rank as in a gallery that never had the lost images.
    kept = np.flatnonzero(is_readable)
    asked = [text for text in range(num_texts) if any(text in texts_of[n] for n in kept)]
    smaller = retrieval_outcomes(
        [keys[n] for n in kept],
        [text_keys[t] for t in asked],
        images[kept],
        texts[asked],
        [[asked.index(t) for t in texts_of[n]] for n in kept],
    )
    assert columns["rank"][asked].tolist() == smaller.columns["rank"][: len(asked)].tolist()


def test_wrong_input_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="There are 1 keys for 2 samples: give one a sample"):
        classification_outcomes(["a"], np.eye(2), np.array([0, 1]))
    with pytest.raises(ValueError, match="labels holds class 2, but there are 2 classes"):
        classification_outcomes(names(2), np.eye(2), np.array([0, 2]))
    with pytest.raises(ValueError, match=r"is_readable is int64 of shape \(2,\), but must be bool"):
        classification_outcomes(names(2), np.eye(2), np.array([0, 1]), is_readable=np.ones(2, int))
    with pytest.raises(ValueError, match=r"is_positive has shape \(2,\), but must hold one 0 or 1"):
        multilabel_outcomes(names(2), np.eye(2), np.array([0, 1]))
