"""Captions and splits: what is held out is neither shown nor named in training."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_shards.errors import DeclipError
from pipelines.demo_captions import (
    CaptionWriter,
    choose_held_out,
    choose_split,
    stable_hash,
    to_phrase,
)
from pipelines.demo_fakes import make_fake_packages
from pipelines.demo_sources import VENDORS, Picture, read_pictures

TEMPLATE = Picture(
    source="noto",
    name="x",
    kind="emoji",
    license="MIT",
    label="x",
    category="Food & Drink",
    split_key="x",
    data=b"",
    format="svg",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    packages, _ = make_fake_packages(folder)
    return read_pictures({name: folder / p.archive for name, p in packages.items()})


def emoji(label, source="noto", tags=()):
    return replace(TEMPLATE, source=source, name=label, label=label, tags=tuple(tags))


def test_hash_is_the_same_everywhere():
    assert stable_hash("held out", "red apple") == 14227535680302074676


@given(st.text(), st.text())
def test_phrases_hold_whole_words(left, right):
    assert to_phrase(left) in to_phrase(f"{left} {right}") or to_phrase(left).strip() == ""
    assert to_phrase(to_phrase(left)) == to_phrase(left)


def test_cat_is_not_in_category():
    assert to_phrase("cat") not in to_phrase("category of Cats")
    assert to_phrase("hot dog") in to_phrase("a Hot-Dog, please")


def test_label_that_others_contain_cannot_be_held_out(pictures):
    # "dog" is in "hot dog"; "pear" is in the photo caption "anjou pear".
    held_out = choose_held_out(pictures, 10)
    assert not {"dog", "pear"} & held_out
    assert "hot dog" in held_out


def test_too_many_held_out_are_refused(pictures):
    with pytest.raises(DeclipError, match=r"num_held_out_concepts is 11, .* between 0 and 10"):
        choose_held_out(pictures, 11)


def test_larger_number_holds_out_a_superset(pictures):
    sets = [choose_held_out(pictures, n) for n in range(11)]
    assert [len(s) for s in sets] == list(range(11))
    assert all(small < large for small, large in itertools.pairwise(sets))


def test_order_of_pictures_does_not_matter(pictures):
    assert choose_held_out(pictures, 4) == choose_held_out(pictures[::-1], 4)


def test_rarely_drawn_concepts_are_not_held_out():
    pictures = [emoji("red apple", v) for v in VENDORS[:2]] + [emoji("kiwi", v) for v in VENDORS]
    assert choose_held_out(pictures, 1) == {"kiwi"}


@pytest.mark.parametrize("num_held_out", [0, 3, 10])
def test_no_training_caption_names_what_is_held_out(pictures, num_held_out):
    held_out = choose_held_out(pictures, num_held_out)
    writer = CaptionWriter(held_out)
    for picture in pictures:
        caption = to_phrase(writer.write(picture))
        split = choose_split(picture, held_out, "twemoji")
        if split == "test_concept":
            assert to_phrase(picture.label) in caption
        else:
            assert not any(to_phrase(label) in caption for label in held_out)


def test_tag_that_names_a_held_out_concept_is_not_used():
    picture = emoji("teacup", tags=["green tea", "kiwi", "sweet kiwi jam", "leaves", "warm"])
    captions = {CaptionWriter({"kiwi"}).write(replace(picture, name=str(n))) for n in range(200)}
    text = " ".join(captions)
    assert "kiwi" not in text
    assert "green tea" in text
    assert "kiwi" in " ".join(
        CaptionWriter(()).write(replace(picture, name=str(n))) for n in range(200)
    )


def test_captions_vary_name_the_concept_and_hide_the_vendor(pictures):
    writer = CaptionWriter(())
    drawn = [p for p in pictures if p.kind == "emoji"]
    captions = [writer.write(p) for p in drawn]
    assert len(set(captions)) > len({p.label for p in drawn}) * 3
    for picture, caption in zip(drawn, captions, strict=True):
        assert picture.label in caption
        assert "{" not in caption
        assert not any(vendor in caption.lower() for vendor in VENDORS)
    assert captions == [CaptionWriter(()).write(p) for p in drawn]


def test_splits(pictures):
    for picture in pictures:
        split = choose_split(picture, {"pizza"}, "noto")
        if picture.kind != "emoji":
            assert split in ("train", "test_photo")
        elif picture.label == "pizza":
            assert split == "test_concept"
        else:
            assert split == ("test_vendor" if picture.source == "noto" else "train")


def test_about_a_seventh_of_photos_is_held_out():
    photos = [replace(TEMPLATE, kind="photo", split_key=f"p/{n}") for n in range(2000)]
    count = sum(choose_split(p, (), "noto") == "test_photo" for p in photos)
    assert 250 < count < 350
