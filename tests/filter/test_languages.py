import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_filter.languages import UNRELIABLE, LanguageDetector

detect = LanguageDetector()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a black dog runs along the beach", "en"),
        ("ein schwarzer Hund läuft am Strand entlang", "de"),
        ("un chien noir court le long de la plage", "fr"),
        ("un perro negro corre por la playa con su dueño", "es"),
        ("czarny pies biegnie wzdłuż plaży", "pl"),
        ("чёрная собака бежит по пляжу", "ru"),
        ("一只黑狗沿着海滩奔跑", "zh"),
        ("黒い犬が浜辺を走っている", "ja"),
        ("कुत्ता समुद्र तट पर दौड़ रहा है", "hi"),
        ("כלב שחור רץ לאורך החוף", "he"),
    ],
)
def test_sentences_are_told_reliably(text, code):
    found = detect(text)
    assert found.code == code
    assert found.confidence is not None
    assert found.confidence >= 0.5


@pytest.mark.parametrize("text", ["", "   ", "12345", "!!!", "\ud800", "\x00\x01", "😀"])
def test_what_is_no_language_has_none(text):
    assert detect(text) == (None, None)


@given(st.text())
def test_any_text_gets_an_answer_and_the_same_twice(text):
    found = detect(text)
    assert found == detect(text)
    assert (found.code is None) == (found.confidence is None)
    assert found.confidence is None or 0 < found.confidence <= 1


def test_control_characters_and_addresses_change_nothing():
    text = "the old harbor at night with fishing boats"
    assert detect(text.replace(" ", "\x00")).code == "en"
    assert detect(f"{text}\ufffe\ud800").code == "en"
    foreign = "https://example.invalid/schwarzer-hund-am-strand-spielt-mit-dem-ball"
    assert detect(f"{foreign} {text} www.example.invalid/strand") == detect(text)


def test_a_guess_counts_half():
    found = detect("dvd")
    assert found.confidence is not None
    assert found.confidence <= UNRELIABLE


def test_a_second_language_lowers_the_confidence():
    english = "the old harbor at night with fishing boats and a lighthouse on the hill. "
    mixed = detect(english * 2 + "der alte Hafen bei Nacht mit Fischerbooten und Leuchtturm")
    alone = detect(english * 2)
    assert alone.confidence is not None
    assert mixed.confidence is not None
    assert (mixed.code, mixed.confidence < alone.confidence) == ("en", True)
