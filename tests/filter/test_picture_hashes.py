import io

import numpy as np
import pytest
from duplicates_dataset import cropped, jpeg, patches, shrunk
from PIL import Image

from declip_filter.near_hashes import information, parse_hashes
from declip_filter.picture_hashes import luma_layout, perceptual_hash, picture_hashes


def gray(picture):
    return np.asarray(picture.convert("L"))


def distance(one, other):
    return (int(perceptual_hash(gray(one)), 16) ^ int(perceptual_hash(gray(other)), 16)).bit_count()


def reopened(data):
    return Image.open(io.BytesIO(data))


def test_copies_are_near_and_other_photographs_far():
    photos = patches(8)
    for photo in photos:
        assert distance(photo, reopened(jpeg(photo, 60))) <= 2
        assert distance(photo, shrunk(photo, 0.5)) <= 4
        assert distance(photo, cropped(photo, 0.01)) <= 8
        assert distance(photo, photo.convert("L")) == 0
    for place, one in enumerate(photos):
        assert all(distance(one, other) >= 10 for other in photos[:place])


@pytest.mark.parametrize("level", [0, 90, 255])
def test_a_flat_picture_says_nothing(level):
    noise = np.random.default_rng(level).integers(-1, 2, (60, 80))
    flat = np.clip(level + noise, 0, 255).astype(np.uint8)
    assert information(parse_hashes([perceptual_hash(flat)]))[0] <= 1


def test_a_symmetric_picture_does_not_hang_on_noise():
    y, x = np.mgrid[0:64, 0:64]
    disc = np.where((x - 31.5) ** 2 + (y - 31.5) ** 2 < 400, 40, 220).astype(np.uint8)
    again = np.asarray(reopened(jpeg(Image.fromarray(disc), 70)).convert("L"))
    differs = int(perceptual_hash(disc), 16) ^ int(perceptual_hash(again), 16)
    assert differs.bit_count() <= 2


def test_layout_is_the_mean_of_sixteen_fields():
    fields = np.arange(0, 160, 10, dtype=np.uint8).reshape(4, 4)
    picture = np.kron(fields, np.ones((5, 7), dtype=np.uint8))
    assert bytes.fromhex(luma_layout(picture)) == fields.tobytes()
    assert picture_hashes(picture) == {
        "image_phash": perceptual_hash(picture),
        "image_layout": luma_layout(picture),
    }
