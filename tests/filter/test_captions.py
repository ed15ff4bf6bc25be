import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_filter.captions import (
    caption_sha,
    is_file_name,
    is_url,
    measure_caption,
    normalize_caption,
)


@given(st.text())
def test_normalizing_twice_is_normalizing_once(text):
    once = normalize_caption(text)
    assert normalize_caption(once) == once


@given(st.text(), st.sampled_from([" ", "\t", "\n", "\u00a0", "  "]))
def test_white_space_around_changes_nothing(text, space):
    assert caption_sha(space + text + space) == caption_sha(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [("A Red  Apple", "a red apple"), ("café", "cafe\u0301"), ("STRASSE", "straße"), ("", " ")],
)
def test_same_text_same_hash(one, other):
    assert caption_sha(one) == caption_sha(other)


def test_other_text_other_hash():
    texts = ["a red apple", "a red apples", "red apple", "a red-apple", ""]
    assert len({caption_sha(text) for text in texts}) == len(texts)


@pytest.mark.parametrize(
    "text",
    [
        "IMG_1234.jpg",
        "DSC 0042",
        "my cat (2).PNG",
        "DSCN0001",
        "Screenshot 2021-03-04 10.22",
        "x.webp",
    ],
)
def test_file_names(text):
    assert is_file_name(text)


@pytest.mark.parametrize(
    "text",
    [
        "a red apple",
        "how to open a picture in a program that cannot read a .jpg",
        "photo of 3 dogs",
        "p",
        "Image",
        "version 1.2",
        "",
    ],
)
def test_captions_that_are_no_file_names(text):
    assert not is_file_name(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://example.invalid/a.jpg",
        "HTTPS://EXAMPLE.INVALID",
        "www.example.invalid",
        "example.invalid/shop?q=1",
        "http://a.invalid  http://b.invalid",
        "<http://a.invalid>",
    ],
)
def test_urls(text):
    assert is_url(text)


@pytest.mark.parametrize(
    "text", ["a cat, see http://a.invalid", "and/or", "3.5/5 stars", "Mr. Smith", ""]
)
def test_captions_that_are_no_urls(text):
    assert not is_url(text)


@pytest.mark.parametrize(
    "piece", ["a", "a.", "a ", "a+", "http:", "1", "-", "a.jpg ", "www.", "é'"]
)
def test_hostile_lengths_take_linear_time(piece):
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    measure_caption(text)
    assert time.process_time() - start < 1


def test_words_letters_and_repetition():
    signals = measure_caption(" Don't PANIC, don't panic 42! ")
    assert signals["caption_words"] == 5
    assert signals["caption_chars"] == 28
    assert signals["caption_letters"] == pytest.approx(18 / 24)
    assert signals["caption_repetition"] == pytest.approx(1 - 3 / 5)


@given(st.text())
def test_fractions_are_fractions(text):
    signals = measure_caption(text)
    assert 0 <= signals["caption_letters"] <= 1
    assert 0 <= signals["caption_repetition"] < 1
    assert signals["caption_words"] <= signals["caption_chars"]


def test_scripts_without_latin_letters_count_as_letters():
    assert measure_caption("красное яблоко")["caption_letters"] == 1
    assert measure_caption("हिन्दी")["caption_letters"] == 1
    assert measure_caption("красное яблоко")["caption_words"] == 2
