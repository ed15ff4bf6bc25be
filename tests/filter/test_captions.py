import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_filter.captions import (
    CaptionMeasurer,
    caption_sha,
    caption_words,
    is_file_name,
    is_url,
    measure_caption,
    normalize_caption,
)
from declip_filter.dictionary import Dictionary
from declip_filter.languages import LanguageDetector


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


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Click to enlarge", 1),
        ("click here to view larger image", 1),
        ("Image not available", 1),
        ("No image available", 1),
        ("royalty free stock photo", 1),
        ("All rights reserved", 1),
        ("Kein Bild vorhanden", 1),
        ("Image 12", 1),
        ("a red barn in snow - royalty free image", 3 / 8),
        ("two dogs on a beach at sunset", 0),
        ("a photographer takes a picture of a stocky horse", 0),
        ("a person reading more books", 0),
        ("", 0),
    ],
)
def test_boilerplate_is_the_share_of_words_in_stock_phrases(text, share):
    assert measure_caption(text)["caption_boilerplate"] == pytest.approx(share)


def test_repeated_characters_count_where_there_are_no_words():
    signals = measure_caption("!" * 44)
    assert signals["caption_repetition"] == 0
    assert signals["caption_char_repetition"] == pytest.approx(39 / 40)
    assert measure_caption("红苹果红苹果红苹果红苹果")["caption_char_repetition"] > 0.5
    assert measure_caption("a red apple")["caption_char_repetition"] == 0


def test_capitals_and_digits_are_shares():
    signals = measure_caption("ABcd 12")
    assert signals["caption_upper"] == pytest.approx(1 / 2)
    assert signals["caption_digits"] == pytest.approx(1 / 3)
    assert measure_caption("红苹果 42")["caption_upper"] == 0


@given(st.text())
def test_words_given_are_words_found(text):
    assert measure_caption(text, caption_words(text.strip())) == measure_caption(text)


@given(st.text())
def test_every_share_is_a_share(text):
    for name, value in measure_caption(text).items():
        if isinstance(value, float):
            assert 0 <= value <= 1, name


def test_what_is_not_loaded_is_none():
    bare = CaptionMeasurer()("a red apple")
    full = CaptionMeasurer(detector=LanguageDetector(), dictionary=Dictionary(["en"]))
    whole = full("a red apple")
    assert whole["caption_language"] == "en"
    assert whole["caption_dictionary_words"] == 1
    names = ["caption_language", "caption_language_confidence", "caption_dictionary_words"]
    assert [bare[name] for name in (*names, "caption_nouns")] == [None] * 4
    assert {k: v for k, v in whole.items() if k not in names} == {
        k: v for k, v in bare.items() if k not in names
    }
