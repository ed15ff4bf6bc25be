"""Second caption views: one operation, the words that were there, never nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_shards import DeclipError
from declip_train.text_views import (
    TextView,
    random_deletion,
    random_swap,
    synonym_replacement,
)

VOCABULARY = ["a", "red", "apple", "on", "the", "old", "table", "near", "my", "house"]
WORDS = st.lists(st.sampled_from(VOCABULARY), max_size=12)
SEEDS = st.integers(0, 2**32)


def synonyms(word: str) -> tuple[str, ...]:
    return {"red": ("crimson", "scarlet"), "apple": ("orchard apple tree",)}.get(word, ())


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(WORDS, SEEDS)
def test_swap_moves_two_words_at_most(words: list[str], seed: int) -> None:
    swapped = random_swap(words, rng(seed))
    assert Counter(swapped) == Counter(words)
    assert sum(a != b for a, b in zip(words, swapped, strict=True)) in (0, 2)


@given(WORDS, st.floats(0, 1), SEEDS)
def test_deletion_keeps_order_and_at_least_one_word(
    words: list[str], probability: float, seed: int
) -> None:
    kept = random_deletion(words, probability, rng(seed))
    rest = iter(words)
    assert all(word in rest for word in kept), "a subsequence"
    assert bool(kept) == bool(words)
    if len(words) < 2 or probability == 0:
        assert kept == words
    elif probability == 1:
        assert len(kept) == 1


@given(WORDS, SEEDS)
def test_replacement_changes_one_word_wherever_it_stands(words: list[str], seed: int) -> None:
    replaced = synonym_replacement(words, synonyms, rng(seed))
    changes = {(a, b) for a, b in zip(words, replaced, strict=True) if a != b}
    if {"red", "apple"} & set(words):
        ((old, new),) = changes
        assert new in synonyms(old)
        assert old not in replaced
    else:
        assert replaced == words


def test_function_words_are_not_replaced() -> None:
    words = ["the", "cat", "is", "on", "it"]
    seen = {
        tuple(synonym_replacement(words, lambda word: (word.upper(),), rng(seed)))
        for seed in range(20)
    }
    assert seen == {("the", "CAT", "is", "on", "it")}


@given(st.text(), SEEDS)
def test_views_are_a_function_of_caption_and_generator(caption: str, seed: int) -> None:
    view = TextView(synonyms)
    first = view(caption, rng(seed))
    assert first == view(caption, rng(seed))
    words = caption.split()
    assert bool(first.strip()) == bool(words)
    if not words:
        assert first == caption
    if len(words) == 1 and not synonyms(words[0]):
        assert first == words[0]


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    TextView(synonyms)("a red apple on the table", rng(0))
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]  # noqa: NPY002


def test_operations_are_drawn_equally_often() -> None:
    caption = "red one two three four five six seven eight nine"
    # Deletion of everything leaves one word, a swap leaves ten, and a replacement brings a new one.
    counts: Counter[str] = Counter()
    for with_synonyms in (False, True):
        view = TextView(synonyms if with_synonyms else None, deletion_probability=1.0)
        generator = rng(0)
        for _ in range(3000):
            words = view(caption, generator).split()
            kind = "delete" if len(words) == 1 else "swap" if "red" in words else "replace"
            counts[f"{kind} {with_synonyms}"] += 1
    assert counts.pop("replace False", 0) == 0
    for name, number in counts.items():
        assert number / 3000 == pytest.approx(1 / 3 if name.endswith("True") else 1 / 2, abs=0.04)
    assert len(counts) == 5


def test_words_are_left_out_at_the_given_rate() -> None:
    words = ["word"] * 50
    kept = [len(random_deletion(words, 0.1, rng(seed))) for seed in range(400)]
    assert np.mean(kept) == pytest.approx(45, abs=0.5)


def test_a_wrong_probability_is_refused_in_a_sentence() -> None:
    with pytest.raises(DeclipError, match=r"is -0\.1, but it must be from 0 to 1"):
        TextView(deletion_probability=-0.1)
