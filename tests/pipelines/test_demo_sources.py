"""Pictures: every package's form is read, and vendors agree on names."""

from collections import Counter

import pytest

from pipelines.demo_fakes import FAKE_EMOJI, make_fake_packages
from pipelines.demo_sources import VENDORS, icon_to_svg, read_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    packages, _ = make_fake_packages(folder)
    return read_pictures({name: folder / p.archive for name, p in packages.items()})


def by_source(pictures, source):
    return {p.name: p for p in pictures if p.source == source}


def test_every_vendor_draws_every_concept_under_one_name(pictures):
    for code, *_ in FAKE_EMOJI:
        name = code.lower().replace("-fe0f", "")
        drawn = [p for p in pictures if p.kind == "emoji" and p.name == name]
        assert len({p.label for p in drawn}) == 1
        missing = set(VENDORS) - {p.source for p in drawn}
        assert missing == ({"fxemoji"} if name == "1f40b" else set())  # its whale is hidden


def test_left_out_emoji_are_in_no_set(pictures):
    labels = {p.label for p in pictures}
    assert not {"man with beard", "keycap: 1", "light skin tone"} & labels
    assert not any(label.startswith("family") for label in labels)


def test_names_are_unique_within_a_source_and_sorted(pictures):
    keys = [(p.source, p.name) for p in pictures]
    assert keys == sorted(keys)
    assert max(Counter(keys).values()) == 1


def test_icon_found_by_alias_and_by_shortcode(pictures):
    assert by_source(pictures, "openmoji")["26f5"].label == "sailboat"
    assert by_source(pictures, "fxemoji")["1f697"].label == "automobile"


def test_grocery_leaves_its_test_part_alone(pictures):
    photos = by_source(pictures, "grocery")
    assert len(photos) == 10
    assert {p.label for p in photos.values()} == {
        "golden delicious apple",
        "watermelon",
        "anjou pear",
        "satsumas",
        "orange",
    }
    assert photos["00002"].captions[0] == "a photo of an anjou pear"
    assert photos["00004"].captions[0] == "a photo of satsumas"


def test_met_captions_are_of_the_works_own_text(pictures):
    works = by_source(pictures, "met")
    assert works["436525"].captions == (
        "Bouquet of Flowers by Vincent van Gogh, 1890",
        "Bouquet of Flowers by Vincent van Gogh, oil on canvas",
        "Bouquet of Flowers, showing flowers and vases",
    )
    assert works["36029"].captions == ("Water-moon, 1890", "Water-moon", "Water-moon")


def test_one_work_in_two_packages_has_one_split_key(pictures):
    assert (
        by_source(pictures, "met")["436525"].split_key
        == by_source(pictures, "wallpapers")["met-436525"].split_key
    )


def test_wallpapers_tell_photos_from_art(pictures):
    kinds = {name: p.kind for name, p in by_source(pictures, "wallpapers").items()}
    assert kinds == {"met-436525": "art", "nasa-as11-40-5874": "photo", "nmk-353": "art"}
    assert by_source(pictures, "wallpapers")["met-436525"].label == 'Scene from "Irises"'


def test_icon_takes_its_own_size_before_the_sets():
    icons = {"width": 64, "height": 64, "icons": {"a": {"body": "<g/>", "width": 32, "left": 4}}}
    assert 'viewBox="4 0 32 64"' in icon_to_svg(icons, "a")
