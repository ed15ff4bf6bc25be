"""Whole pictures by Pillow, and the words for those that cannot be read."""

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from declip_pixels.reference import (
    MAX_PIXELS,
    UnreadablePictureError,
    check_box,
    decode_picture,
    picture_size,
)


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def reason(data: bytes) -> str:
    with pytest.raises(UnreadablePictureError) as caught:
        decode_picture(data)
    return str(caught.value)


@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_as_exif_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(noise(20, 30)), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_picture(data), np.asarray(expected))
    assert picture_size(data) == decode_picture(data).shape[:2]


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr"])
def test_other_colors_are_as_pillow_converts_them(mode: str) -> None:
    data = encoded(Image.fromarray(noise(20, 30)).convert(mode), quality=95)
    assert np.array_equal(decode_picture(data), by_pillow(data))


def test_other_formats() -> None:
    pixels = noise(20, 30)
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        image = Image.fromarray(pixels).convert(mode)
        assert np.array_equal(
            decode_picture(encoded(image, "PNG")), np.asarray(image.convert("RGB"))
        )
    for kind in ("WEBP", "BMP", "GIF", "TIFF"):
        data = encoded(Image.fromarray(pixels), kind)
        assert np.array_equal(decode_picture(data), by_pillow(data))


def test_of_16_bit_gray_the_upper_byte_counts() -> None:
    gray = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    pixels = decode_picture(encoded(Image.fromarray(gray), "PNG"))
    assert np.array_equal(pixels[..., 0], gray >> 8)
    assert pixels.shape == (32, 32, 3)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_off_anywhere_is_a_failure(progressive: bool) -> None:
    data = encoded(Image.fromarray(noise(20, 30)), progressive=progressive)
    start = data.index(b"\xff\xda")
    for end in [*range(start + 20, len(data) - 1, 37), len(data) - 2, len(data) - 1]:
        assert reason(data[:end]) == "its file is cut off", end
        assert reason(data[:end] + bytes(50)) in (
            "its file is cut off",
            "it is damaged: OSError (broken data stream when reading image file)",
        )


def test_bytes_behind_the_end_do_not_count() -> None:
    data = encoded(Image.fromarray(noise(20, 30)))
    assert np.array_equal(decode_picture(data + b"more"), decode_picture(data))


def test_an_end_in_a_thumbnail_is_not_the_end() -> None:
    small = encoded(Image.fromarray(noise(8, 8)))
    segment = b"\xff\xe5" + (len(small) + 2).to_bytes(2, "big") + small
    data = encoded(Image.fromarray(noise(20, 30)))
    assert reason(data[:2] + segment + data[2:-2]) == "its file is cut off"


def test_words_for_what_is_no_picture(tmp_path: Path) -> None:
    assert reason(b"") == "its file is empty"
    assert reason(b"<html>no such page</html>") == "it is no picture, or one cut off in its header"
    png = encoded(Image.fromarray(noise(40, 40)), "PNG")
    assert reason(png[: len(png) // 2]) == "its file is cut off"
    # The same words every time: no address in memory.
    assert reason(b"\x89PNG\r\n\x1a\n" + bytes(40)) == reason(b"\x89PNG\r\n\x1a\n" + bytes(40))


def test_too_many_pixels() -> None:
    side = 14_000
    data = encoded(Image.new("1", (side, side)), "PNG")
    assert side * side > MAX_PIXELS
    assert reason(data) == "it has more than 178,956,970 pixels"
    assert picture_size(data) == (0, 0)


@pytest.mark.parametrize(
    "box", [(0, 0, 5, 7), (-1, 0, 2, 2), (0, 0, 0, 1), (4, 0, 2, 1), (0, 0, 6, 1)]
)
def test_boxes_lie_in_the_picture(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(UnreadablePictureError, match="does not lie in the picture of 5 x 6"):
        check_box(5, 6, np.array(box, np.int32))
    check_box(5, 6, np.array([0, 0, 5, 6], np.int32))
