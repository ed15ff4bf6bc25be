"""Prompts of classes, and what becomes of their features."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_eval.zeroshot import build_classifier, prompt_ensemble_scores
from declip_shards import DeclipError
from pipelines.eval_prompts import PromptTable, encode_distinct, length_groups

TEMPLATES = ("a photo of a {}.", "{}", "a drawing of the {}.")


def encode(texts):
    """Features that differ for every text, of unit length."""
    rows = [np.random.default_rng(list(text.encode())).normal(size=8) for text in texts]
    features = np.array(rows, np.float32).reshape(len(texts), 8)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_every_distinct_prompt_is_there_once():
    table = PromptTable.make([("cat",), ("dog",), ("cat", "kitten")], TEMPLATES)
    assert len(set(table.texts)) == len(table.texts) == 9
    assert table.num_classes == 3
    assert np.diff(table.starts).tolist() == [3, 3, 6]
    assert table.starts[-1] == len(table.rows)


def test_one_name_a_class_gives_the_classifier_of_declip_eval():
    names = ["cat", "dog {}", "blue whale"]
    table = PromptTable.make([(name,) for name in names], TEMPLATES)
    expected = build_classifier(encode, names, TEMPLATES)
    found = table.class_weights(encode(table.texts))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), 1, atol=1e-6)


def test_several_names_weigh_by_their_prompts():
    table = PromptTable.make([("angry", "mad"), ("sad",)], TEMPLATES)
    features = encode(table.texts)
    mean = features[[table.texts.index(t) for t in table.texts if "sad" not in t]].mean(axis=0)
    np.testing.assert_allclose(
        table.class_weights(features)[:, 0], mean / np.linalg.norm(mean), atol=1e-6
    )


def test_means_of_similarities_are_those_of_declip_eval():
    names = ["cat", "dog", "cow"]
    images = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    table = PromptTable.make([(name,) for name in names], TEMPLATES)
    expected = prompt_ensemble_scores(
        lambda texts: images @ encode(texts).T, names, TEMPLATES, batch_size=4
    )
    found = table.class_means(images @ encode(table.texts).T)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 12), max_size=60), st.integers(1, 9))
def test_groups_hold_every_row_once_and_one_length_each(lengths, most):
    array = np.array(lengths, np.int64)
    groups = list(length_groups(array, most))
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(1 <= len(group) <= most for group in groups)
    assert all(len(set(array[group])) == 1 for group in groups)


def test_a_text_that_is_asked_for_twice_is_encoded_once():
    asked = []

    def counting(texts):
        asked.extend(texts)
        return encode(texts)

    texts = ["b", "a", "b", "c", "a"]
    np.testing.assert_array_equal(encode_distinct(counting, texts), encode(texts))
    assert asked == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("names", "templates", "sentence"),
    [
        ([], ("{}",), "there are no class names; give at least one class."),
        ([("cat",), ()], ("{}",), r"class 1 has the names \(\), but needs"),
        ([("cat",), (" ",)], ("{}",), r"class 1 has the names \(' ',\), but needs"),
        (["cat"], ("{}",), "class 0 has the names 'cat', but needs a tuple"),
        ([("cat",)], ("a photo",), "a photo"),
        ([("cat",)], (), "template"),
    ],
)
def test_wrong_classes_and_templates_are_refused(names, templates, sentence):
    with pytest.raises(DeclipError, match=sentence):
        PromptTable.make(names, templates)
