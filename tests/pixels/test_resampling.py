"""The resampling law in NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from declip_pixels.resampling import (
    _resample,
    center_window,
    cubic,
    resampling_weights,
    resize,
    resize_center,
)


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@settings(deadline=None, max_examples=150)
@given(length=st.integers(1, 5000), size=st.integers(1, 400))
def test_weights_add_up_to_one_and_lie_in_the_row(length: int, size: int) -> None:
    first, weights = resampling_weights(length, size)
    assert (weights.sum(axis=1, dtype=np.int64) == 16384).all()
    places = first[:, None] + np.arange(weights.shape[1])
    assert (places[weights != 0] < length).all()
    assert (first >= 0).all()
    assert (np.diff(first) >= 0).all()
    # What lets 16-bit factors and 32-bit sums serve.
    assert int(np.abs(weights.astype(np.int64)).sum(axis=1).max()) < 2 * 16384


def test_kernel_is_keys_cubic() -> None:
    assert cubic(np.array([0.0, 1.0, 2.0, 2.5])).tolist() == [1, 0, 0, 0]
    assert cubic(np.array([0.5, 1.5])).tolist() == [0.5625, -0.0625]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(1, 1, 7), (40, 30, 24), (30, 70, 64), (90, 20, 33), (200, 300, 16), (5, 400, 20)],
)
def test_is_at_most_one_from_pillow_columns_first(height: int, width: int, size: int) -> None:
    for picture in (noise(height, width), (noise(height, width) // 128 * 255).astype(np.uint8)):
        # Pillow 13 takes the rows first where that is cheaper, and clips in between.
        image = Image.fromarray(picture).resize((size, height), Image.Resampling.BICUBIC)
        expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        assert np.abs(resize(picture, size).astype(int) - expected).max() <= 1


def test_is_the_sum_of_whole_numbers_that_the_law_says() -> None:
    picture, size = noise(57, 83), 29
    matrices = []
    for length in picture.shape[:2]:
        first, weights = resampling_weights(length, size)
        matrix = np.zeros((size, length), np.int64)
        for output in range(size):
            for tap, weight in enumerate(weights[output].tolist()):
                if weight:
                    matrix[output, first[output] + tap] = weight
        matrices.append(matrix)
    middle = np.einsum("ow,hwc->hoc", matrices[1], picture.astype(np.int64))
    middle = np.clip((middle + 64) >> 7, 0, 255 << 7)
    sums = np.einsum("oh,hwc->owc", matrices[0], middle)
    assert np.array_equal(resize(picture, size), np.clip((sums + (1 << 20)) >> 21, 0, 255))


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(1, 60),
    value=st.integers(0, 255),
)
def test_one_color_stays_it(height: int, width: int, size: int, value: int) -> None:
    picture = np.full((height, width, 3), value, np.uint8)
    assert (resize(picture, size) == value).all()


def test_same_size_is_the_picture_itself() -> None:
    assert np.array_equal(resize(noise(31, 31), 31), noise(31, 31))


def test_bands_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resize(noise(64, 48), 20)
    monkeypatch.setattr("declip_pixels.resampling._BAND_VALUES", 48 * 5)
    assert np.array_equal(resize(noise(64, 48), 20), whole)


@settings(deadline=None, max_examples=300)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000), size=st.integers(1, 600))
def test_center_is_in_the_middle_of_a_picture_of_the_same_shape(
    height: int, width: int, size: int
) -> None:
    window = center_window(height, width, size)
    assert min(window.height, window.width) == size
    # Rounded down: never wider for its height than the picture, and less than a pixel narrower.
    assert 0 <= size * max(height, width) / min(height, width) - max(window[:2]) < 1
    for total, start in ((window.height, window.top), (window.width, window.left)):
        assert 0 <= start <= total - size
        assert abs(2 * start - (total - size)) <= 1
    # Python's own rounding, as torchvision does it: of two halves the even one.
    assert window.top == round((window.height - size) / 2.0)
    assert window.left == round((window.width - size) / 2.0)
    # A picture on its side has its window on its side.
    turned = center_window(width, height, size)
    assert turned == (window.width, window.height, window.left, window.top)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    size=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_center_is_cut_out_of_the_whole_resized(
    height: int, width: int, size: int, seed: int
) -> None:
    picture = noise(height, width, seed)
    window = center_window(height, width, size)
    rows = resampling_weights(height, window.height)
    whole = _resample(picture, rows, resampling_weights(width, window.width))
    assert whole.shape == (window.height, window.width, 3)
    seen = whole[window.top : window.top + size, window.left : window.left + size]
    assert np.array_equal(resize_center(picture, size), seen)


@pytest.mark.parametrize(("height", "width", "size"), [(60, 90, 32), (130, 70, 24), (20, 31, 40)])
def test_center_is_at_most_one_from_pillow_columns_first(
    height: int, width: int, size: int
) -> None:
    picture, window = noise(height, width), center_window(height, width, size)
    # Pillow takes first what is cheaper: one side at a time settles the order.
    image = Image.fromarray(picture).resize((window.width, height), Image.Resampling.BICUBIC)
    image = image.resize((window.width, window.height), Image.Resampling.BICUBIC)
    box = (window.left, window.top, window.left + size, window.top + size)
    difference = np.asarray(image.crop(box)).astype(int) - resize_center(picture, size)
    assert np.abs(difference).max() <= 1
