"""Views: pure functions of (seed, epoch, key, number), within their ranges."""

import colorsys
import dataclasses
import hashlib
import io
import math
from concurrent.futures import ThreadPoolExecutor

import cv2
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


# Views of one small picture: 4 by 4 pixels of 8 bits. Whoever trains with a seed gets the pixels
# that it always gave, since resizing is bicubic and antialiased; crops and colors are older.
BLURRY = dataclasses.replace(AUGMENTATIONS["moco_v2"], blur_sigma_max=50.0, gray_probability=0.0)
SETS = {**AUGMENTATIONS, "blurry": BLURRY}
RECORDED = {
    ("000000199", "light", 0): "5523287f233cad2353d7236d55505b7f508dad50b6d750ac"
    "5582967f82c6ad8275d7826d55afca7faf65adaf88d7afbc",
    ("000000199", "light", 1): "145f19505f67915fbbcd5f9714882450889891889ccd886f"
    "14b33450b3a991b370cdb3b214dc4650dc8f91dc85cddc78",
    ("000000199", "moco_v2", 0): "cd04dab208af880e80601352b332d56139da553da143406f"
    "da1e21a1649d5e90da4493afc28ca4a5652c958f3439c7c1",
    ("000000199", "moco_v2", 1): "a17997798eac6078675d7841a1737482908a608d73658d41"
    "a4a4a19da47761a4736ca341b9ad7ea6b97e67b96171b842",
    ("000000199", "slip_ssl", 0): "da00d4c103b1a0078f800b6c8a25da8827bf762a9d622d7b"
    "d7418e6347da564ad94c4eabda1616bd3232627fda5f93d7",
    ("000000199", "blurry", 1): "8f838f7f878a68866e628458948a88848f846b906c648e59"
    "9e9f868fa17d72a36969a258a6aa8495ac7a75ad656cad56",
    ("000000022", "moco_v2", 0): "2a2a2a4949497474749090905a5a5a7d7d7d909090bbbbbb"
    "898989b7b7b7cacacac1c1c1b5b5b5cececef5f5f5ffffff",
    ("000000022", "demo", 0): "112909472926812946b7296c11601647605b8160acb7609d"
    "119c23479c9a819c94b79c7d11d33547d3a181d373b7d394",
    ("000000022", "demo", 1): "3a342764313a922f4ebd2d663656396053668e509bb84e9d"
    "327b4c5c78998a768db6755f2e9d62589a9a88995eb1969e",
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


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_changing_colors_in_place_is_changing_and_normalizing_them(name):
    image = pictures(1, 24)[0]
    for number in range(12):
        draws = augment.view_draws(0, 0, "k", number)
        choices = augment.draw_colors(draws, AUGMENTATIONS[name], 24)
        planes, wanted = np.empty((2, 3, 24, 24), np.float32)
        augment.change_colors_into(image, choices, planes)
        augment.normalize_into(augment.change_colors(image, choices), wanted)
        np.testing.assert_array_equal(planes, wanted)


def test_views_of_threads_and_of_other_sizes_do_not_mix():
    choices = choose(1, 1.3, sigma=1.5)
    images = [image for size in (16, 24, 40) for image in pictures(6, size)]
    wanted = [augment.change_colors(image, choices) for image in images]
    with ThreadPoolExecutor(4) as threads:
        for found, one in zip(
            threads.map(lambda image: augment.change_colors(image, choices), images * 5),
            wanted * 5,
            strict=True,
        ):
            np.testing.assert_array_equal(found, one)


def test_gray_and_blur_are_done_after_the_jitter():
    image = pictures(1, 32)[0]
    jittered = augment.change_colors(image, choose(3, 40.0))
    gray = jittered @ np.array([0.299, 0.587, 0.114], np.float32)
    found = augment.change_colors(image, choose(3, 40.0, gray=True))
    np.testing.assert_allclose(found, np.repeat(gray[..., None], 3, 2), atol=1e-6)
    found = augment.change_colors(image, choose(3, 40.0, gray=True, sigma=1.2))
    soft = cv2.GaussianBlur(np.repeat(gray[..., None], 3, 2), (0, 0), 1.2)
    np.testing.assert_allclose(found, soft, atol=1e-6)


def test_draws_of_many_are_those_of_each():
    """One at a time with numpy's own generator: what runs of the first versions drew."""
    keys = [f"{number:09d}" for number in range(40)] + ["", "ключ", "\udc80"]
    epochs = [0, 1] * 21 + [2**40]
    many = augment.view_draws_batch(5, epochs, keys, 1)
    for row, epoch, key in zip(many, epochs, keys, strict=True):
        text = f"5/{epoch}/1/{key}".encode("utf-8", "surrogatepass")
        number = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
        one = np.random.Generator(np.random.Philox(key=number)).random(len(row))
        np.testing.assert_array_equal(row, one)
        np.testing.assert_array_equal(augment.view_draws(5, epoch, key, 1), one)
    with pytest.raises(ValueError, match="2 keys have 1 epochs"):
        augment.view_draws_batch(0, [0], ["a", "b"], 0)


def plain_crop(draws, height, width, scale_min):
    """A crop, one try after the other in plain Python."""
    for area, aspect, y, x in draws[:40].reshape(10, 4).tolist():
        pixels = (scale_min + (1 - scale_min) * area) * (height * width)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * aspect)
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 1 <= w <= width and 1 <= h <= height:
            return [int(y * (height - h + 1)), int(x * (width - w + 1)), h, w]
    w = min(width, max(1, round(height * math.exp(math.log(4 / 3)))))
    h = min(height, max(1, round(width / math.exp(math.log(3 / 4)))))
    return [(height - h) // 2, (width - w) // 2, h, w]


def test_boxes_of_many_are_those_of_each():
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(1, 700, (400, 2)), [[1, 900], [900, 1], [1, 1]]])
    draws = augment.view_draws_batch(0, [3] * 403, [str(n) for n in range(403)], 0)
    for least in (0.08, 0.9, 1.0):
        boxes = augment.crop_boxes(draws, sizes, least)
        assert boxes.dtype == np.int32
        for box, row, (height, width) in zip(boxes.tolist(), draws, sizes.tolist(), strict=True):
            assert box == plain_crop(row, height, width, least)
            assert tuple(box) == augment.crop_box(row, height, width, least)


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


def choose(operation, amount, **more):
    """One operation alone, or the first of others that change nothing."""
    factors = np.array([1, 1, 1, 0], np.float32)
    factors[operation] = amount
    order = np.roll(np.arange(4), -operation)
    choices = {"jitter": True, "gray": False, "sigma": 0.0, **more}
    return augment.ColorChoices(order, factors, **choices)


def test_color_operations_against_plain_loops():
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    share = image / np.float32(255)
    gray = share @ np.array([0.299, 0.587, 0.114], np.float32)
    amount = 1.3
    expected = [
        np.clip(share * 1.3, 0, 1),
        np.clip(1.3 * share - 0.3 * gray.mean(), 0, 1),
        np.clip(1.3 * share - 0.3 * gray[..., None], 0, 1),
    ]
    for operation, wanted in enumerate(expected):
        found = augment.change_colors(image, choose(operation, amount))
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    for turns in (0.25, -0.25, 0.5, -0.5):
        turned = augment.change_colors(image, choose(3, 360 * turns))
        for pixel, new in zip(image.reshape(-1, 3), turned.reshape(-1, 3), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*map(float, pixel / 255))
            wanted = colorsys.hsv_to_rgb((h + turns) % 1, s, v)
            np.testing.assert_allclose(new, wanted, atol=1e-5)


def test_evaluation_view_is_pillows():
    image = Image.fromarray(pictures(1, 60)[0]).crop((0, 0, 60, 30))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    wanted = image.resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    found = augment.eval_view(sink.getvalue(), 16)
    # Pillow rounds to bytes between columns and rows.
    np.testing.assert_allclose(found.astype(int), np.asarray(wanted), atol=1)
    assert (found != np.asarray(wanted)).mean() < 0.25
    tensor = augment.eval_images([sink.getvalue()], 16)
    assert tensor.shape == (1, 3, 16, 16)
    shares = found[None].astype(np.float32) / np.float32(255)
    torch.testing.assert_close(tensor, augment.to_tensor(shares), rtol=0, atol=0)
    assert augment.eval_images([], 16).shape == (0, 3, 16, 16)
    back = tensor[0] * torch.tensor(augment.IMAGE_STD)[:, None, None]
    back = back + torch.tensor(augment.IMAGE_MEAN)[:, None, None]
    torch.testing.assert_close(back, torch.from_numpy(found.copy()).permute(2, 0, 1) / 255)


def test_no_image_is_refused():
    with pytest.raises(DeclipError, match="sample 'k7' cannot be decoded"):
        augment.decode_image(b"no image", "k7")
    with pytest.raises(DeclipError, match="evaluation cannot be decoded: it is no picture"):
        augment.eval_view(b"no image", 16)
