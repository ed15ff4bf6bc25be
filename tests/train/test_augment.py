"""Views: pure functions of (seed, epoch, key, number), within their ranges."""

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
from declip_train.views import AUGMENTATIONS

PLAIN = dataclasses.replace(AUGMENTATIONS["light"], crop_scale_min=1.0)


def pictures(number, size=40):
    rng = np.random.default_rng(1)
    return [augment.decode_image(draw("red", "cross", size, rng), "k") for _ in range(number)]


def view(image, key="a", number=0, parameters=AUGMENTATIONS["moco_v2"], **changed):
    settings = {"size": 16, "seed": 3, "epoch": 2, **changed}
    return augment.random_view(image, key, number, parameters=parameters, **settings)


# Views of one small picture, drawn when there was a version 0.1: 4 by 4 pixels of 8 bits. Whoever
# trains with a seed gets the pixels that it always gave.
BLURRY = dataclasses.replace(AUGMENTATIONS["moco_v2"], blur_sigma_max=50.0, gray_probability=0.0)
SETS = {**AUGMENTATIONS, "blurry": BLURRY}
RECORDED = {
    ("000000199", "light", 0): "56232881233cab2350d6236456525d81528cab52b3d652b0"
    "5680938180c4ab8077d6806f56afc881af61abaf90d6afb3",
    ("000000199", "light", 1): "145e19505e65915eb7cd5e9c1488245088929188a2cd8875"
    "14b23050b2be91b259cdb2b514dc3b50dc8591dc91cddc74",
    ("000000199", "moco_v2", 0): "d205d8b00aaf8a0f83631455b134d2673ad2553ea4444174"
    "d62b37a062a05f86da488faac0899fa26a3a948d383ebfb6",
    ("000000199", "moco_v2", 1): "a17992798da76179685d7841a17a7d818e87618e70658d41"
    "a3a3a19ca37761a3736ea341b8a877a4b87f64b86276b842",
    ("000000199", "slip_ssl", 0): "da00d7c104b5a00891800c6e9924da8527bf732a9d602d7c"
    "d741906447da574ad64c4ea9da212bbd3132617dda5e90d5",
    ("000000199", "blurry", 1): "8f848e7f878969866c628457938b89838f836c8f6b658f58"
    "9e9e868ea17d72a2686aa258a5a88294ab7a75ad656dad56",
    ("000000022", "moco_v2", 0): "2828284747477474749595955a5a5a7d7d7d909090bbbbbb"
    "888888aeaeaecccccccacacab6b6b6d4d4d4ebebebffffff",
    ("000000022", "demo", 0): "112809482827802844b7286211611648615e8061a6b7619b"
    "119b22489b95809b8eb79b7f11d42f48d4a380d479b7d48a",
    ("000000022", "demo", 1): "3a342665313a912f4dbd2d603657386154688d5197b84f9d"
    "327a4a5d769689758db673622f9d5c599a9b879960b1969a",
}


@pytest.mark.parametrize(("key", "name", "number"), RECORDED)
def test_seeds_keep_their_pixels(key, name, number):
    y, x = np.mgrid[0:12, 0:10]
    image = np.stack([x * 25, y * 21, (x * y * 7) % 256], -1).astype(np.uint8)
    found = view(image, key, number, SETS[name], size=4, seed=1)
    recorded = np.frombuffer(bytes.fromhex(RECORDED[key, name, number]), np.uint8)
    # One step of 8 bits apart at most: other processors round otherwise.
    np.testing.assert_allclose(found.ravel() * 255, recorded, atol=1.01)


def test_named_sets_have_the_published_numbers():
    def numbers(name):
        return dataclasses.astuple(AUGMENTATIONS[name])

    # Crop scale, jitter, brightness, contrast, saturation, hue, gray, blur, largest blur, flip.
    assert numbers("moco_v2") == (0.2, 0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5, 2.0, 0.5)
    assert numbers("slip_ssl") == (0.08, 0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5, 2.0, 0.5)
    light = AUGMENTATIONS["light"]
    assert light.crop_scale_min == 0.5
    chances = ("jitter", "gray", "blur", "flip")
    assert not any(getattr(light, f"{name}_probability") for name in chances)


def test_views_differ_by_seed_epoch_key_and_number():
    (image,) = pictures(1)
    base = view(image)
    assert base.shape == (16, 16, 3)
    assert base.dtype == np.float32
    assert base.min() >= 0
    assert base.max() <= 1
    np.testing.assert_array_equal(view(image), base)
    for other in ({"seed": 4}, {"epoch": 3}, {"key": "b"}, {"number": 1}):
        assert not np.array_equal(view(image, **other), base), other


def test_a_view_leaves_its_picture_alone():
    (image,) = pictures(1, 16)
    before = image.copy()
    for number in range(20):
        view(image, number=number)
    np.testing.assert_array_equal(image, before)


def test_normalizing_in_planes_is_normalizing():
    pixels = view(pictures(1)[0])
    planes = np.empty((3, 16, 16), np.float32)
    augment.normalize_into(pixels, planes)
    torch.testing.assert_close(torch.from_numpy(planes), augment.to_tensor(pixels), rtol=0, atol=0)


def test_nothing_asked_for_changes_nothing():
    image = pictures(1, 16)[0]
    boxes = [augment.crop_box(augment.view_draws(0, 0, str(i), 0), 16, 16, 1.0) for i in range(50)]
    assert set(boxes) == {(0, 0, 16, 16)}
    np.testing.assert_allclose(view(image, parameters=PLAIN), image / np.float32(255))


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
    draws = [augment.view_draws(0, 0, str(i), 1) for i in range(4000)]
    every = [augment.draw_colors(d, AUGMENTATIONS["moco_v2"], 224) for d in draws]
    sigma = np.array([choices.sigma for choices in every])
    for share, expected in (
        (np.mean([choices.jitter for choices in every]), 0.8),
        (np.mean([choices.gray for choices in every]), 0.2),
        ((sigma > 0).mean(), 0.5),
    ):
        assert abs(share - expected) < 0.03
    factors = np.stack([choices.factors for choices in every])
    assert factors[:, :3].min() >= 0.6
    assert factors[:, :3].max() <= 1.4
    assert abs(factors[:, 3]).max() <= 36
    assert sigma.max() <= 2
    assert len({tuple(choices.order.tolist()) for choices in every}) == 24


def test_color_operations_against_plain_loops():
    rng = np.random.default_rng(0)
    image = rng.random((4, 4, 3), dtype=np.float32)
    gray = image @ np.array([0.299, 0.587, 0.114], np.float32)
    amount = np.float32(1.3)
    expected = [
        np.clip(image * 1.3, 0, 1),
        np.clip(1.3 * image - 0.3 * gray.mean(), 0, 1),
        np.clip(1.3 * image - 0.3 * gray[..., None], 0, 1),
    ]
    for operation, wanted in enumerate(expected):
        found = augment._jitter_once(image.copy(), operation, amount)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    for turns in (0.25, -0.25, 0.5, -0.5):
        turned = augment._jitter_once(image.copy(), 3, np.float32(360 * turns))
        for pixel, new in zip(image.reshape(-1, 3), turned.reshape(-1, 3), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*map(float, pixel))
            wanted = colorsys.hsv_to_rgb((h + turns) % 1, s, v)
            np.testing.assert_allclose(new, wanted, atol=1e-5)


def test_evaluation_view_is_pillows():
    image = Image.fromarray(pictures(1, 60)[0]).crop((0, 0, 60, 30))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    wanted = image.resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    found = augment.eval_view(sink.getvalue(), 16)
    np.testing.assert_array_equal(found, np.asarray(wanted))
    tensor = augment.eval_images([sink.getvalue()], 16)
    assert tensor.shape == (1, 3, 16, 16)
    back = tensor[0] * torch.tensor(augment.IMAGE_STD)[:, None, None]
    back = back + torch.tensor(augment.IMAGE_MEAN)[:, None, None]
    torch.testing.assert_close(back, torch.from_numpy(found.copy()).permute(2, 0, 1) / 255)


def test_no_image_is_refused():
    with pytest.raises(DeclipError, match="sample 'k7' cannot be decoded"):
        augment.decode_image(b"no image", "k7")
    with pytest.raises(DeclipError, match="cannot be decoded"):
        augment.eval_view(b"no image", 16)
