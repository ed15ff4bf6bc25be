"""The resizing arithmetic is img2dataset's; the fast way comes near it and keeps the geometry."""

import io
import os

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest.resize import (
    DOUBLE_BELOW,
    decode_eighths,
    frame,
    plan_resize,
    resize_exact,
    resize_fast,
)

MODES = ("border", "keep_ratio", "keep_ratio_largest", "center_crop", "no")


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Soft colors with some edges, as photographs have them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(float) - other.astype(float)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def theirs(bgr: np.ndarray, mode: str, size: int, only_if_bigger: bool) -> np.ndarray:
    """What img2dataset's Resizer stores, as pixels: its lossless PNG in and out."""
    # albumentations, which it imports, calls home for its newest version otherwise.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.resizer import Resizer

    png = cv2.imencode(".png", bgr)[1].tobytes()
    resizer = Resizer(size, mode, only_if_bigger, encode_format="png", encode_quality=1)
    image, *_, error = resizer(io.BytesIO(png))
    assert error is None
    return np.asarray(cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR))


@given(
    st.sampled_from(MODES),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 64),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_plan_and_filter_give_img2datasets_very_pixels(mode, width, height, size, only_if_bigger):
    picture = smooth(height, width, seed=width * 91 + height)
    plan = plan_resize(width, height, mode=mode, size=size, only_if_bigger=only_if_bigger)
    ours = frame(resize_exact(picture, plan), plan)
    assert ours.shape[1::-1] == plan.final_size()
    assert np.array_equal(ours, theirs(picture, mode, size, only_if_bigger))


@pytest.mark.parametrize("ratio", [1.02, 1.3, 1.5, 1.99, 2.0, 2.7, 3.0, 3.49, 3.5, 5.3, 8.0])
def test_the_fast_way_is_near_the_exact_one(ratio):
    picture = smooth(round(64 * ratio), round(85 * ratio))
    size = (85, 64)
    exact = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    near = resize_fast(picture, size)
    assert near.shape == exact.shape
    assert psnr(near, exact) > 40
    if ratio >= DOUBLE_BELOW:
        assert np.array_equal(near, exact)


@given(st.integers(130, 400), st.integers(130, 400), st.integers(8, 64))
@settings(max_examples=60, deadline=None)
def test_the_fast_way_keeps_any_size(width, height, size):
    plan = plan_resize(width, height, mode="keep_ratio", size=size, only_if_bigger=False)
    assert resize_fast(smooth(height, width), (plan.width, plan.height)).shape == (
        plan.height,
        plan.width,
        3,
    )


def test_a_rounded_up_column_does_not_move_the_picture():
    """Half of 203 columns is 101.5 of 102: told so, the ramp stays where it was."""
    ramp = np.repeat(np.linspace(0, 250, 203)[np.newaxis, :, np.newaxis], 160, axis=0)
    ramp = np.repeat(ramp, 3, axis=2).astype(np.uint8)
    padded = np.concatenate([ramp, ramp[:, -1:]], axis=1)
    half = cv2.resize(padded, (102, 80), interpolation=cv2.INTER_AREA)
    exact = cv2.resize(ramp, (45, 40), interpolation=cv2.INTER_AREA)
    told = resize_fast(half, (45, 40), (101.5, 80))
    untold = resize_fast(half, (45, 40))
    worst = np.abs(told.astype(int) - exact).max()
    assert worst <= 1 < np.abs(untold.astype(int) - exact).max()


def test_scaled_decoding_leaves_enough_to_resize():
    assert [decode_eighths(r) for r in (1, 3.59, 3.6, 11.9, 12, 100)] == [8, 8, 4, 4, 2, 2]
    for ratio in np.linspace(3.6, 60, 200):
        assert ratio * decode_eighths(ratio) / 8 >= 1.8
