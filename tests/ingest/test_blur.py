"""Boxes are blurred as img2dataset blurs them, and nonsense is refused."""

import os

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest import blur
from declip_ingest.blur import MAX_BOXES, blur_boxes, check_boxes
from declip_ingest.failures import DecodeError

SIDE = st.floats(0, 1, width=32)


@st.composite
def boxes(draw):
    left, right = sorted((draw(SIDE), draw(SIDE)))
    top, bottom = sorted((draw(SIDE), draw(SIDE)))
    return (left, top, right, bottom)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(st.lists(boxes(), min_size=1, max_size=4), st.integers(4, 80), st.integers(4, 80))
@settings(max_examples=60, deadline=None)
def test_the_pixels_are_img2datasets(found, width, height):
    # albumentations, which it imports, calls home for its newest version otherwise.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.blurrer import BoundingBoxBlurrer

    picture = noise(height, width)
    expected = BoundingBoxBlurrer()(picture, found)
    assert np.array_equal(blur_boxes(picture, check_boxes(found)), expected)


def formula(pixels: np.ndarray, found) -> np.ndarray:
    """img2dataset's own over the whole picture."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.blurrer import BoundingBoxBlurrer

    return np.asarray(BoundingBoxBlurrer()(pixels, found))


@pytest.mark.parametrize("seed", range(40))
def test_a_part_of_a_larger_picture_is_blurred_as_in_the_whole(seed, monkeypatch):
    """Small boxes in pictures of several hundred pixels, where most of it is left out."""
    monkeypatch.setattr(blur, "BAND_PIXELS", 5000 if seed % 2 else 1 << 21)
    random = np.random.default_rng(seed)
    height, width = (int(n) for n in random.integers(150, 700, 2))
    found = []
    for _ in range(random.integers(1, 4)):
        left, top = random.random(2)
        across, down = random.random(2) * random.choice([0.02, 0.1, 0.3, 1.0])
        found.append((left, top, min(1.0, left + across), min(1.0, top + down)))
    picture = noise(height, width)
    assert np.array_equal(blur_boxes(picture, found), formula(picture, found))


def test_small_boxes_cost_little_in_a_large_picture(monkeypatch):
    seen = []
    gaussian = cv2.GaussianBlur

    def count(image, *others):
        seen.append(image.shape[:2])
        return gaussian(image, *others)

    monkeypatch.setattr(cv2, "GaussianBlur", count)
    blur_boxes(noise(2000, 2000), [(0.5, 0.5, 0.55, 0.52), (0.5, 0.6, 0.52, 0.61)])
    assert len(seen) == 2
    assert all(height < 500 and width < 400 for height, width in seen)


def test_no_box_is_no_change_and_a_box_changes_its_inside_only():
    picture = noise(100, 100)
    assert blur_boxes(picture, []) is picture
    blurred = blur_boxes(picture, [(0.3, 0.3, 0.6, 0.6)])
    changed = np.abs(blurred.astype(int) - picture).max(axis=2) > 1
    assert changed[35:55, 35:55].mean() > 0.9
    assert not changed[:10].any()
    assert not changed[:, 90:].any()


@pytest.mark.parametrize("none", [None, [], (), np.empty((0, 4))])
def test_no_boxes_under_every_name(none):
    assert check_boxes(none) == []


def test_boxes_come_as_lists_tuples_or_arrays():
    for given_boxes in ([[0, 0.1, 1, 0.9]], ((0, 0.1, 1, 0.9),), np.array([[0, 0.1, 1, 0.9]])):
        assert check_boxes(given_boxes) == [(0.0, 0.1, 1.0, 0.9)]


@pytest.mark.parametrize(
    "wrong",
    [
        5,
        "0011",
        b"0011",
        {"left": 1},
        [1, 2, 3, 4],
        [(0, 0, 1)],
        [(0, 0, 1, 1, 1)],
        [(0.5, 0, 0.4, 1)],
        [(0, 0.5, 1, 0.4)],
        [(-0.1, 0, 1, 1)],
        [(0, 0, 1.1, 1)],
        [(0, 0, float("nan"), 1)],
        [("a", 0, 1, 1)],
        [None],
        [(0, 0, 1, 1)] * (MAX_BOXES + 1),
    ],
)
def test_other_boxes_are_refused(wrong):
    with pytest.raises(DecodeError) as caught:
        check_boxes(wrong)
    assert caught.value.message == "bad_boxes"
