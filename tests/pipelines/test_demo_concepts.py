"""Concepts: one name for one emoji, whoever draws it and however they call it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.demo_concepts import (
    ConceptTable,
    normalize_code,
    normalize_name,
    read_concepts,
    tidy_label,
)
from pipelines.demo_fakes import FAKE_EMOJI, make_fake_packages

GROUPS = {1: "people & body", 2: "components", 4: "food & drink"}


def entry(code, label, group=4, tags=()):
    return {"hexcode": code, "label": label, "group": group, "tags": list(tags)}


@pytest.fixture
def table():
    return ConceptTable(
        [
            entry("1F34E", "red apple", tags=["fruit"]),
            entry("2615", "hot beverage"),
            entry("1F375", "teacup"),
            entry("1F3C3", "person running", 1),
            entry("1F3C3-200D-2642-FE0F", "man running", 1),
            entry("1F3FB", "light skin tone", 2),
            {"hexcode": "1F1E6", "label": "regional indicator A"},
        ],
        GROUPS,
        [{"2615": ["coffee", "hot"], "1F375": "hot", "1F3C3": "runner"}, {"1F34E": "coffee"}],
    )


@pytest.mark.parametrize(
    ("label", "tidy"),
    [
        ("red apple", "red apple"),
        ("flag: Bosnia & Herzegovina", "flag of Bosnia and Herzegovina"),
        ("man: bald", "bald man"),
        ("woman: red hair", "woman with red hair"),
        ("one o’clock", "one o'clock"),
        ("Japanese “here” button", 'Japanese "here" button'),
    ],
)
def test_labels_read_as_people_say_them(label, tidy):
    assert tidy_label(label) == tidy
    assert tidy_label(tidy) == tidy


@given(st.lists(st.sampled_from(["1f34e", "FE0F", "200D", "2642"]), min_size=1))
def test_codes_ignore_case_and_the_color_selector(parts):
    code = "-".join(parts)
    assert normalize_code(code) == normalize_code(code.upper()) == normalize_code(code.lower())
    assert normalize_code(normalize_code(code)) == normalize_code(code)
    assert "fe0f" not in normalize_code(code)


@pytest.mark.parametrize(
    "name", ["flag: France", "flag-for-france", "flag-for-flag-france", "Flag France"]
)
def test_flag_spellings_agree(name):
    assert normalize_name(name) == "flagfrance"


def test_found_by_code_and_by_name(table):
    assert table.by_code("1F34E-FE0F").label == "red apple"
    assert table.by_name(["red-apple"]) == table.by_code("1f34e")
    assert table.by_name(["unheard-of", "RedApple"]) == table.by_code("1f34e")
    assert table.by_code("1f34e").category == "Food & Drink"
    assert table.by_code("1f34e").tags == ("fruit",)


def test_labels_are_trusted_before_shortcodes(table):
    # "coffee" is a shortcode of two; "teacup" is a label.
    assert table.by_name(["coffee"]) is None
    assert table.by_name(["teacup"]).label == "teacup"


def test_name_that_two_share_means_neither(table):
    assert table.by_name(["hot"]) is None
    assert table.by_name(["nothing like it"]) is None


def test_left_out_emoji_are_not_taken_for_their_neighbors(table):
    assert table.by_code("1f3c3-200d-2642") is None
    table.add_names({"1f3c3": "man-running"})
    assert table.by_name(["man-running"]) is None
    assert table.by_name(["runner"]).label == "person running"
    assert table.by_code("1f3fb") is None
    assert table.by_code("1f1e6") is None
    assert len(table) == 4


def test_reads_the_packages_form(tmp_path):
    make_fake_packages(tmp_path)
    (emojibase,) = tmp_path.glob("emojibase-data-*.tgz")
    concepts = read_concepts(emojibase)
    assert len(concepts) == len(FAKE_EMOJI)
    for code, label, *_ in FAKE_EMOJI:
        concept = concepts.by_code(code)
        assert concept is not None
        assert concept.label == tidy_label(label)
