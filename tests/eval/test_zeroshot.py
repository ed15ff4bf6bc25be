"""Zero-shot classification against plain loops and scikit-learn, and its laws."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from declip_eval.intervals import wilson_interval
from declip_eval.templates import OPENAI_7, SIMPLE_TEMPLATES
from declip_eval.zeroshot import (
    build_classifier,
    chance_classification,
    group_confusion,
    prompt_ensemble_scores,
    zeroshot_classification,
    zeroshot_from_scores,
)

DIM = 16


def encode_text(texts):
    """A text tower without knowledge: every text has a random vector of its own, of any length."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) for text in texts]
    return np.stack([np.random.default_rng(seed).normal(size=DIM) * 3 for seed in seeds])


def random_problem(num_images=400, num_classes=8, signal=1.0, seed=0):
    rng = np.random.default_rng(seed)
    classifier = build_classifier(
        encode_text, [f"thing {i}" for i in range(num_classes)], SIMPLE_TEMPLATES
    )
    labels = rng.integers(0, num_classes, num_images)
    images = signal * classifier.T[labels] + rng.normal(size=(num_images, DIM)) / 2
    return images, classifier, labels


def test_classifier_equals_a_plain_loop():
    names = ["cat", "dog", "a {} b"]
    classifier = build_classifier(encode_text, names, OPENAI_7, batch_size=4)
    assert classifier.dtype == np.float32
    assert classifier.shape == (DIM, 3)
    for column, name in zip(classifier.T, names, strict=True):
        total = np.zeros(DIM)
        for template in OPENAI_7:
            feature = encode_text([template.replace("{}", name)])[0]
            total += feature / np.linalg.norm(feature)
        mean = total / len(OPENAI_7)
        assert np.allclose(column, mean / np.linalg.norm(mean), atol=1e-6)


def test_each_distinct_prompt_is_encoded_once_in_big_batches():
    batches = []

    def counting(texts):
        batches.append(list(texts))
        return encode_text(texts)

    # "x y" under "{}" and "x" under "{} y" are one prompt.
    build_classifier(counting, ["x", "x y", "z"], ["{}", "{} y"], batch_size=2)
    prompts = [text for batch in batches for text in batch]
    assert sorted(prompts) == sorted(["x", "x y", "x y y", "z", "z y"])
    assert [len(batch) for batch in batches] == [2, 2, 1]


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batch_size_changes_nothing(batch_size):
    expected = build_classifier(encode_text, ["a", "b"], OPENAI_7)
    assert np.array_equal(
        build_classifier(encode_text, ["a", "b"], OPENAI_7, batch_size=batch_size), expected
    )


def test_metrics_equal_scikit_learn():
    images, classifier, labels = random_problem()
    metrics, confusion = zeroshot_classification(images, classifier, labels)
    scores = images @ classifier
    predicted = scores.argmax(axis=1)
    classes = list(range(8))
    assert metrics["acc1"] == pytest.approx((predicted == labels).mean())
    assert metrics["acc5"] == pytest.approx(
        top_k_accuracy_score(labels, scores, k=5, labels=classes)
    )
    assert metrics["mean_per_class_recall"] == pytest.approx(
        balanced_accuracy_score(labels, predicted)
    )
    assert np.array_equal(confusion, sklearn_confusion_matrix(labels, predicted, labels=classes))
    assert 0.5 < metrics["acc1"] < 1  # A problem neither trivial nor hopeless.


def test_trace_of_the_confusion_matrix_is_acc1_even_with_ties():
    images, classifier, labels = random_problem()
    images[::3] = 0
    metrics, confusion = zeroshot_classification(images, classifier, labels)
    assert confusion.sum() == len(labels)
    assert confusion.trace() / confusion.sum() == pytest.approx(metrics["acc1"])


@pytest.mark.parametrize("chunk_rows", [1, 7, 400])
def test_order_and_chunks_do_not_matter(chunk_rows):
    images, classifier, labels = random_problem()
    expected = zeroshot_classification(images, classifier, labels)
    order = np.random.default_rng(1).permutation(len(labels))
    got = zeroshot_classification(images[order], classifier, labels[order], chunk_rows=chunk_rows)
    assert got.metrics == pytest.approx(expected.metrics)
    assert np.array_equal(got.confusion, expected.confusion)


def test_renumbering_the_classes_permutes_the_confusion_and_nothing_else():
    images, classifier, labels = random_problem()
    expected = zeroshot_classification(images, classifier, labels)
    new_of_old = np.random.default_rng(2).permutation(8)
    old_of_new = np.argsort(new_of_old)
    got = zeroshot_classification(images, classifier[:, old_of_new], new_of_old[labels])
    assert got.metrics == pytest.approx(expected.metrics)
    assert np.array_equal(got.confusion, expected.confusion[np.ix_(old_of_new, old_of_new)])


def test_length_and_dtype_of_image_features_do_not_matter():
    images, classifier, labels = random_problem()
    expected = zeroshot_classification(images, classifier, labels)
    lengths = np.random.default_rng(3).uniform(0.1, 50, (len(images), 1))
    scaled = zeroshot_classification((images * lengths).astype(np.float32), classifier, labels)
    assert scaled.metrics == pytest.approx(expected.metrics)


def test_a_model_that_knows_nothing_sits_at_chance():
    rng = np.random.default_rng(4)
    classifier = build_classifier(encode_text, [f"c{i}" for i in range(50)], ["{}"])
    metrics, _ = zeroshot_classification(
        rng.normal(size=(5000, DIM)), classifier, rng.integers(0, 50, 5000)
    )
    chance = chance_classification(50)
    for name in ("acc1", "acc5"):
        low, high = wilson_interval(metrics[name], 5000, confidence=0.99)
        assert low <= chance[name] <= high


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_a_constant_model_scores_nothing(noise):
    # All classes the same vector but for rounding noise: breaking ties by position would give the
    # first class, which most labels have here, 90%.
    rng = np.random.default_rng(5)
    classifier = build_classifier(
        lambda texts: np.ones((len(texts), DIM)), [f"c{i}" for i in range(10)], ["{}"]
    )
    labels = np.array([0] * 90 + list(range(10)))
    images = rng.normal(size=(100, DIM)) + noise * rng.normal(size=(100, DIM))
    metrics, confusion = zeroshot_classification(images, classifier, labels)
    assert metrics == {"acc1": 0.0, "acc5": 0.0, "mean_per_class_recall": 0.0}
    assert confusion.trace() == 0


def test_a_constant_image_tower_is_not_above_chance_in_recall():
    _, classifier, labels = random_problem(num_images=997)
    metrics, _ = zeroshot_classification(np.ones((997, DIM)), classifier, labels)
    assert metrics["mean_per_class_recall"] <= chance_classification(8)["mean_per_class_recall"]


def test_acc5_needs_five_classes_and_absent_classes_have_no_recall():
    classifier = np.eye(4, dtype=np.float32)
    images = np.eye(4)[[0, 0, 1]]
    metrics, _ = zeroshot_classification(images, classifier, np.array([0, 0, 2]))
    assert metrics == {"acc1": pytest.approx(2 / 3), "mean_per_class_recall": 0.5}
    assert "acc5" not in chance_classification(4)


def test_classes_of_one_name_are_warned_about_and_tie():
    with pytest.warns(UserWarning, match="1 class names occur more than once .missile.: their im"):
        classifier = build_classifier(encode_text, ["missile", "cat", "missile"], ["{}"])
    metrics, _ = zeroshot_classification(classifier.T, classifier, np.array([0, 1, 2]))
    assert metrics["acc1"] == pytest.approx(1 / 3)


def test_grouping_keeps_the_sum_and_adds_up_blocks():
    rng = np.random.default_rng(6)
    confusion = rng.integers(0, 9, (5, 5))
    grouped, names = group_confusion(confusion, ["b", "a", "b", "a", "c"])
    assert names == ["a", "b", "c"]
    assert grouped.sum() == confusion.sum()
    assert grouped[1, 0] == confusion[np.ix_([0, 2], [1, 3])].sum()
    same, _ = group_confusion(confusion, list("vwxyz"))
    assert np.array_equal(same, confusion)
    with pytest.raises(ValueError, match="groups names 2 classes, but the confusion matrix has"):
        group_confusion(confusion, ["a", "b"])


def test_wrong_input_is_refused_in_a_sentence():
    images, classifier, labels = random_problem(20)
    with pytest.raises(ValueError, match=r"labels holds class 8, but the classifier has 8 classes"):
        zeroshot_classification(images, classifier, np.full(20, 8))
    with pytest.raises(
        ValueError, match=r"image_features has 15 columns, but the classifier has 16"
    ):
        zeroshot_classification(images[:, :15], classifier, labels)
    with pytest.raises(ValueError, match="they must have unit length"):
        zeroshot_classification(images, classifier * 2, labels)
    with pytest.raises(ValueError, match="encode_text returned 1 rows for 2 prompts"):
        build_classifier(lambda texts: np.ones((1, 4)), ["a", "b"], ["{}"])
    with pytest.raises(ValueError, match="result of encode_text has NaN"):
        build_classifier(lambda texts: np.full((len(texts), 4), np.nan), ["a", "b"], ["{}"])
    with pytest.raises(ValueError, match=r"class_names\[1\] is ' ', but every class needs a name"):
        build_classifier(encode_text, ["a", " "], ["{}"])
    with pytest.raises(ValueError, match="at least one class name"):
        build_classifier(encode_text, [], ["{}"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        build_classifier(encode_text, ["a"], ["{}"], batch_size=0)
    with pytest.raises(ValueError, match="num_classes is 0"):
        chance_classification(0)


def score_texts_of(images):
    """Cosines of some images with any texts, which is one way to score them."""
    unit = images / np.linalg.norm(images, axis=1, keepdims=True)

    def score(texts):
        features = encode_text(texts)
        return unit @ (features / np.linalg.norm(features, axis=1, keepdims=True)).T

    return score


@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_scores_of_a_classifier_give_what_the_classifier_gives(chunk_rows):
    images, classifier, labels = random_problem()
    images[::50] = 0  # Ties are ties in both.
    expected = zeroshot_classification(images, classifier, labels)
    lengths = np.linalg.norm(images, axis=1, keepdims=True)
    scores = (images / np.where(lengths > 0, lengths, 1)) @ classifier
    got = zeroshot_from_scores(scores.astype(np.float32), labels, chunk_rows=chunk_rows)
    assert got.metrics == expected.metrics
    assert np.array_equal(got.confusion, expected.confusion)


@pytest.mark.parametrize("batch_size", [1, 14, 16, 10_000])
def test_an_ensemble_of_scores_is_the_mean_over_a_classs_prompts(batch_size):
    images = np.random.default_rng(0).normal(size=(5, DIM))
    names = ["cat", "dog", "a {} b", "owl"]
    score, calls = score_texts_of(images), []

    def counting(prompts):
        calls.append(prompts)
        return score(prompts)

    got = prompt_ensemble_scores(counting, names, OPENAI_7, batch_size=batch_size)
    assert got.shape == (5, 4)
    assert got.dtype == np.float32
    for column, name in zip(got.T, names, strict=True):
        each = [score([template.replace("{}", name)])[:, 0] for template in OPENAI_7]
        assert np.allclose(column, sum(each) / len(OPENAI_7), atol=1e-6)
    # No call holds more than is asked for, save a class's own templates.
    assert max(map(len, calls)) <= max(batch_size, len(OPENAI_7))
    assert sum(map(len, calls)) == len(names) * len(OPENAI_7)


def test_similarities_are_averaged_and_not_embeddings():
    # The mean of class 0's opposed prompts is nothing, and normalized again it would be anything;
    # the mean of their similarities is 0, below class 1's.
    of = {"a0": [1.0, 0.001], "b0": [-1.0, 0.001], "a1": [0.3, 0.9539], "b1": [0.3, 0.9539]}

    def features(prompts):
        return np.array([of[prompt] for prompt in prompts])

    image = np.array([[0.0, 1.0], [1.0, 0.0]])
    means = build_classifier(features, ["0", "1"], ["a{}", "b{}"])
    assert zeroshot_classification(image, means, np.array([0, 1])).metrics["acc1"] == 1.0
    scores = prompt_ensemble_scores(
        lambda prompts: image @ features(prompts).T, ["0", "1"], ["a{}", "b{}"]
    )
    assert np.allclose(scores, [[0.001, 0.9539], [0.0, 0.3]])
    assert zeroshot_from_scores(scores, np.array([0, 1])).metrics["acc1"] == 0.5


def test_a_prompt_that_occurs_twice_is_scored_once_and_equal_names_tie():
    images = np.random.default_rng(0).normal(size=(30, DIM))
    score, calls = score_texts_of(images), []

    def counting(prompts):
        calls.append(prompts)
        return score(prompts)

    with pytest.warns(UserWarning, match="1 class names occur more than once"):
        scores = prompt_ensemble_scores(counting, ["x", "x"], ["{}", "the {}"])
    assert calls == [["x", "the x"]]
    assert zeroshot_from_scores(scores, np.zeros(30, dtype=int)).metrics["acc1"] == 0


def test_bad_scores_are_refused_in_a_sentence():
    labels = np.array([0, 1])
    with pytest.raises(ValueError, match=r"scores has shape \(2,\), but scores need shape"):
        zeroshot_from_scores(np.zeros(2), labels)
    with pytest.raises(ValueError, match=r"NaN or infinite values in 1 of 2 rows \(first: row 1\)"):
        zeroshot_from_scores(np.array([[0.0, 1.0], [np.nan, 0.0]]), labels)
    with pytest.raises(ValueError, match=r"labels holds class 1, but the scores are of 1 classes"):
        zeroshot_from_scores(np.zeros((2, 1)), labels)
    with pytest.raises(ValueError, match=r"returned shape \(3, 2\) for 1 prompts and 3 images"):
        prompt_ensemble_scores(lambda prompts: np.zeros((3, 2)), ["x"], ["{}"])
    sizes = iter([1, 2])
    with pytest.raises(ValueError, match=r"returned shape \(2, 1\) for 1 prompts and 1 images"):
        prompt_ensemble_scores(
            lambda prompts: np.zeros((next(sizes), 1)), ["x", "y"], ["{}"], batch_size=1
        )
    with pytest.raises(ValueError, match=r"batch_size is 0"):
        prompt_ensemble_scores(lambda prompts: np.zeros((1, 1)), ["x"], ["{}"], batch_size=0)
