"""Views: pure functions of (seed, epoch, key, view), within their ranges, the same in any batch."""

import colorsys
import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from declip_shards import DeclipError
from declip_shards.fakes import draw
from declip_train import augment
from declip_train.settings import AUGMENTATIONS

PLAIN = dataclasses.replace(AUGMENTATIONS["light"], crop_scale_min=1.0)


def pictures(number, size=40):
    rng = np.random.default_rng(1)
    return [augment.decode_image(draw("red", "cross", size, rng), "k") for _ in range(number)]


def views(images, keys, parameters=AUGMENTATIONS["moco_v2"], **changed):
    settings = {"size": 16, "seed": 3, "epoch": 2, "num_views": 2, **changed}
    return augment.random_views(images, keys, parameters=parameters, **settings)


def test_a_sample_looks_the_same_in_any_batch():
    images, keys = pictures(9), [f"k{i}" for i in range(9)]
    together = views(images, keys)
    for i in range(9):
        np.testing.assert_array_equal(
            views(images[i : i + 1], keys[i : i + 1])[:, 0], together[:, i]
        )
    backwards = views(images[::-1], keys[::-1])
    np.testing.assert_array_equal(backwards[:, ::-1], together)


def test_views_differ_by_seed_epoch_key_and_view():
    image = pictures(1)
    base = views(image, ["a"])
    assert base.dtype == np.float32
    assert base.min() >= 0
    assert base.max() <= 1
    assert not np.array_equal(base[0], base[1])
    for other in ({"seed": 4}, {"epoch": 3}):
        assert not np.array_equal(views(image, ["a"], **other), base)
    assert not np.array_equal(views(image, ["b"]), base)


def test_nothing_asked_for_changes_nothing():
    image = pictures(1, 16)[0]
    boxes = [augment.crop_box(augment.view_draws(0, 0, str(i), 0), 16, 16, 1.0) for i in range(50)]
    assert set(boxes) == {(0, 0, 16, 16)}
    np.testing.assert_allclose(views([image], ["a"], PLAIN)[0, 0], image / np.float32(255))


@pytest.mark.parametrize(("height", "width"), [(100, 60), (1, 50), (48, 48), (7, 300)])
def test_crops_stay_inside_and_keep_their_share(height, width):
    for i in range(300):
        draws = augment.view_draws(1, 0, str(i), 0)
        top, left, h, w = augment.crop_box(draws, height, width, 0.2)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert h >= 1
        assert w >= 1
        if (height, width) == (48, 48):
            assert h * w >= 0.2 * height * width - h - w
            assert 0.7 < w / h < 1.43


def test_every_probability_is_met():
    draws = np.stack([augment.view_draws(0, 0, str(i), 1) for i in range(4000)])
    choices = augment.draw_colors(draws, AUGMENTATIONS["moco_v2"], 224)
    for share, expected in (
        (choices.jitter.mean(), 0.8),
        (choices.gray.mean(), 0.2),
        ((choices.sigma > 0).mean(), 0.5),
    ):
        assert abs(share - expected) < 0.03
    factors = choices.factors
    assert factors[:, :3].min() >= 0.6
    assert factors[:, :3].max() <= 1.4
    assert abs(factors[:, 3]).max() <= 36
    assert choices.sigma.max() <= 2
    assert len(np.unique(choices.order, axis=0)) == 24


def test_color_operations_against_plain_loops():
    rng = np.random.default_rng(0)
    image = rng.random((1, 4, 4, 3), dtype=np.float32)
    gray = image @ np.array([0.299, 0.587, 0.114], np.float32)
    amount = np.array([1.3], np.float32)
    expected = [
        np.clip(image * 1.3, 0, 1),
        np.clip(1.3 * image - 0.3 * gray.mean(), 0, 1),
        np.clip(1.3 * image - 0.3 * gray[..., None], 0, 1),
    ]
    for operation, wanted in enumerate(expected):
        found = augment._jitter_once(image.copy(), operation, amount)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    turned = augment._jitter_once(image.copy(), 3, np.array([90.0], np.float32))
    for pixel, new in zip(image.reshape(-1, 3), turned.reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*map(float, pixel))
        np.testing.assert_allclose(new, colorsys.hsv_to_rgb((h + 0.25) % 1, s, v), atol=1e-5)


def test_evaluation_view_is_pillows():
    image = Image.fromarray(pictures(1, 60)[0]).crop((0, 0, 60, 30))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    wanted = image.resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    view = augment.eval_view(sink.getvalue(), 16)
    np.testing.assert_array_equal(view, np.asarray(wanted))
    tensor = augment.eval_images([sink.getvalue()], 16)
    assert tensor.shape == (1, 3, 16, 16)
    back = tensor[0] * torch.tensor(augment.IMAGE_STD)[:, None, None]
    back = back + torch.tensor(augment.IMAGE_MEAN)[:, None, None]
    torch.testing.assert_close(back, torch.from_numpy(view.copy()).permute(2, 0, 1) / 255)


def test_no_image_is_refused():
    with pytest.raises(DeclipError, match="sample 'k7' cannot be decoded"):
        augment.decode_image(b"no image", "k7")
    with pytest.raises(DeclipError, match="cannot be decoded"):
        augment.eval_view(b"no image", 16)
