"""Retrieval against a plain loop, its exact chance against simulation, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_eval.intervals import wilson_interval
from declip_eval.retrieval import (
    chance_retrieval,
    group_captions,
    retrieval,
    retrieval_from_scores,
    retrieval_ranks,
)


def plain_recall(queries, gallery, positives, k):
    hits = 0
    for query, right in zip(queries, positives, strict=True):
        cosines = [
            float(query @ item) / (np.linalg.norm(query) * np.linalg.norm(item)) for item in gallery
        ]
        best = sorted(range(len(gallery)), key=lambda i: -cosines[i])[:k]
        hits += bool(set(best) & set(right))
    return hits / len(queries)


def random_problem(num_images=60, num_texts=25, signal=0.6, seed=0):
    """Images with one or two texts each, several images a text."""
    rng = np.random.default_rng(seed)
    texts = rng.normal(size=(num_texts, 8))
    first = np.concatenate(
        [np.arange(num_texts), rng.integers(0, num_texts, num_images - num_texts)]
    )
    positives = [sorted({int(a), int(b)}) for a, b in zip(first, np.roll(first, 3), strict=True)]
    images = np.stack([signal * texts[rows].mean(0) for rows in positives])
    return images + rng.normal(size=images.shape) / 2, texts, positives


def texts_of_images(positives, num_texts):
    return [[i for i, texts in enumerate(positives) if t in texts] for t in range(num_texts)]


def test_equals_a_plain_loop_in_both_directions():
    images, texts, positives = random_problem()
    metrics = retrieval(images, texts, positives, recall_k=(1, 5, 10))
    for k in (1, 5, 10):
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(
            plain_recall(images, texts, positives, k)
        )
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(
            plain_recall(texts, images, texts_of_images(positives, 25), k)
        )
    assert 0.1 < metrics["image_retrieval_recall@1"] < 1


def test_image_retrieval_asks_for_the_image_of_a_text():
    # Both texts are nearest to their image, but the second image is nearest to the wrong text.
    texts = np.array([[1.0, 0.0], [0.6, 0.8]])
    images = np.array([[1.0, -0.6], [1.0, 0.2]])
    metrics = retrieval(images, texts, [[0], [1]], recall_k=(1,))
    assert metrics == {"image_retrieval_recall@1": 0.5, "text_retrieval_recall@1": 0.5}
    ranks = retrieval_ranks(images, texts, [[0], [1]])
    assert ranks.of_texts.tolist() == [1, 0]
    assert ranks.of_images.tolist() == [0, 1]


def test_recall_grows_with_k():
    metrics = retrieval(*random_problem(), recall_k=(1, 2, 5, 10, 25))
    for direction in ("image", "text"):
        values = [metrics[f"{direction}_retrieval_recall@{k}"] for k in (1, 2, 5, 10, 25)]
        assert values == sorted(values)
    assert metrics["text_retrieval_recall@25"] == 1  # All texts were looked at.


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_order_length_and_chunks_do_not_matter(chunk_rows):
    images, texts, positives = random_problem()
    expected = retrieval(images, texts, positives)
    rng = np.random.default_rng(1)
    image_order, text_order = rng.permutation(60), rng.permutation(25)
    new_row = np.argsort(text_order)
    got = retrieval(
        images[image_order] * rng.uniform(0.1, 9, (60, 1)),
        texts[text_order],
        [[int(new_row[t]) for t in positives[i]] for i in image_order],
        chunk_rows=chunk_rows,
    )
    assert got == pytest.approx(expected)


def test_a_constant_model_finds_nothing():
    metrics = retrieval(np.ones((30, 4)), np.ones((30, 4)), [[i] for i in range(30)])
    assert set(metrics.values()) == {0.0}


def test_equal_captions_are_one_text_and_any_of_its_images_is_right():
    texts, positives = group_captions(["cat", "dog", "cat"])
    assert texts == ["cat", "dog"]
    assert positives == [[0], [1], [0]]
    images = np.array([[0.0, 1.0], [0.2, 1.0], [1.0, 0.0]])  # The first cat looks like a dog.
    metrics = retrieval(images, np.eye(2), positives, recall_k=(1,))
    assert metrics["image_retrieval_recall@1"] == 0.5  # cat finds the third image; dog ties off.
    assert metrics["text_retrieval_recall@1"] == pytest.approx(2 / 3)


@given(st.lists(st.sampled_from("abcdef"), min_size=1))
@settings(max_examples=50, deadline=None)
def test_grouping_captions_loses_nothing(captions):
    texts, positives = group_captions(captions)
    assert [texts[rows[0]] for rows in positives] == captions
    assert len(set(texts)) == len(texts)


def test_chance_equals_simulation():
    images, texts, positives = random_problem()
    rng = np.random.default_rng(2)
    chance = chance_retrieval(positives, len(texts), recall_k=(1, 5, 10))
    totals = dict.fromkeys(chance, 0.0)
    num_rounds = 400
    for _ in range(num_rounds):
        metrics = retrieval(
            rng.normal(size=images.shape),
            rng.normal(size=texts.shape),
            positives,
            recall_k=(1, 5, 10),
        )
        for name, value in metrics.items():
            totals[name] += value / num_rounds
    assert totals == pytest.approx(chance, abs=0.015)


def test_chance_of_one_right_answer_is_k_over_n():
    chance = chance_retrieval([[i] for i in range(200)], 200)
    assert chance == pytest.approx(
        {f"{d}_retrieval_recall@{k}": k / 200 for d in ("image", "text") for k in (1, 5, 10)}
    )


def test_chance_is_one_when_wrong_answers_run_out():
    chance = chance_retrieval([[0], [0], [0], [1]], 2, recall_k=(2,))
    assert chance["image_retrieval_recall@2"] == pytest.approx((1 + 0.5) / 2)
    assert chance["text_retrieval_recall@2"] == 1


def test_features_that_know_nothing_sit_at_chance():
    rng = np.random.default_rng(3)
    captions = [f"c{i % 300}" for i in range(900)]
    texts, positives = group_captions(captions)
    metrics = retrieval(rng.normal(size=(900, 64)), rng.normal(size=(300, 64)), positives)
    chance = chance_retrieval(positives, len(texts))
    for name, value in metrics.items():
        low, high = wilson_interval(
            value, 300 if name.startswith("image") else 900, confidence=0.99
        )
        assert low <= chance[name] <= high, name


def test_wrong_input_is_refused_in_a_sentence():
    images, texts, positives = random_problem()
    with pytest.raises(ValueError, match="recall_k holds 26, but there are 60 images and 25 texts"):
        retrieval(images, texts, positives, recall_k=(26,))
    with pytest.raises(ValueError, match="recall_k is empty"):
        retrieval(images, texts, positives, recall_k=())
    with pytest.raises(ValueError, match="image_to_texts has 59 entries for 60 images"):
        retrieval(images, texts, positives[:-1])
    with pytest.raises(ValueError, match="Image 0 has no text"):
        retrieval(images, texts, [[], *positives[1:]])
    with pytest.raises(ValueError, match="names text 25 for image 0, but there are 25 texts"):
        retrieval(images, texts, [[25], *positives[1:]])
    with pytest.raises(ValueError, match=r"1 texts have no image \(first: text 25\)"):
        retrieval(images, np.ones((26, 8)), positives)
    with pytest.raises(ValueError, match="image_features has 8 columns and text_features has 7"):
        retrieval(images, texts[:, :7], positives)
    with pytest.raises(ValueError, match="text_features has NaN"):
        retrieval(images, np.full_like(texts, np.nan), positives)
    with pytest.raises(ValueError, match="image_to_texts is empty"):
        chance_retrieval([], 0)


@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_scores_of_features_give_what_the_features_give(chunk_rows):
    images, texts, positives = random_problem()
    images[::9] = 0  # Ties are ties in both.
    expected = retrieval(images, texts, positives)
    unit = [
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
        for rows in (images, texts)
    ]
    scores = (unit[0] @ unit[1].T).astype(np.float32)
    assert retrieval_from_scores(scores, scores.T, positives, chunk_rows=chunk_rows) == expected


def test_each_direction_is_ranked_by_its_own_scores():
    right, wrong = np.eye(4), 1 - np.eye(4)
    positives = [[row] for row in range(4)]
    both = retrieval_from_scores(right, wrong, positives, recall_k=(1,))
    assert both == {"image_retrieval_recall@1": 0.0, "text_retrieval_recall@1": 1.0}
    both = retrieval_from_scores(wrong, right, positives, recall_k=(1,))
    assert both == {"image_retrieval_recall@1": 1.0, "text_retrieval_recall@1": 0.0}


def test_scores_that_do_not_fit_are_refused():
    positives = [[0], [1]]
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and text_to_image \(2, 2\): the second"):
        retrieval_from_scores(np.zeros((2, 3)), np.zeros((2, 2)), positives, recall_k=(1,))
    with pytest.raises(ValueError, match=r"image_to_texts has 2 entries for 3 images"):
        retrieval_from_scores(np.zeros((3, 2)), np.zeros((2, 3)), positives, recall_k=(1,))
    with pytest.raises(ValueError, match=r"text_to_image has NaN"):
        retrieval_from_scores(np.zeros((2, 2)), np.full((2, 2), np.nan), positives, recall_k=(1,))
