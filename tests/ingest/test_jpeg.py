"""The header parser agrees with Pillow, or says that it does not know; stripping loses no pixel."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from declip_ingest.jpeg import exif_orientation, read_header, strip_metadata


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def save(image: Image.Image, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", **options)
    return sink.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def exif(orientation: int, order: str = "<") -> bytes:
    body = Image.Exif()
    body.endian = order
    body[0x0112] = orientation
    body[0x010E] = "taken at home"
    return body.tobytes()


def test_size_kind_and_sampling():
    header = read_header(save(picture(), subsampling=2))
    assert header is not None
    assert (header.width, header.height) == (40, 30)
    assert (header.is_baseline, header.is_progressive) == (True, False)
    assert header.sampling == ((2, 2), (1, 1), (1, 1))
    assert header.is_ycbcr
    assert header.orientation == 1
    progressive = read_header(save(picture(), progressive=True, subsampling=0))
    assert progressive is not None
    assert (progressive.is_baseline, progressive.is_progressive) == (False, True)
    assert progressive.sampling == ((1, 1),) * 3
    gray = read_header(save(picture(mode="L")))
    assert gray is not None
    assert len(gray.component_ids) == 1
    assert not gray.is_ycbcr


def test_rgb_stored_as_it_is_is_no_ycbcr():
    header = read_header(save(picture(), keep_rgb=True))
    assert header is not None
    assert not header.is_ycbcr


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_in_both_byte_orders(orientation, order):
    header = read_header(save(picture(), exif=exif(orientation, order)))
    assert header is not None
    assert header.orientation == orientation


def test_odd_orientations_are_left_to_a_parser():
    for body in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(0), exif(9)):
        header = read_header(save(picture(), exif=body))
        assert header is not None
        assert header.orientation is None
    xmp = b"<x:xmpmeta tiff:Orientation='6'/>"
    header = read_header(save(picture(), xmp=xmp))
    assert header is not None
    assert header.orientation is None


@given(st.binary(max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_exif_breaks_the_parser(body):
    for order in (b"II*\0", b"MM\0*", b""):
        assert exif_orientation(order + body) in (None, *range(1, 9))


def test_what_is_not_plain_is_not_known():
    plain = save(picture())
    assert read_header(b"") is None
    assert read_header(b"\xff\xd8") is None
    assert read_header(b"\x89PNG" + plain) is None
    assert read_header(save(picture(mode="CMYK"))) is None
    at = plain.index(b"\xff\xc0")
    assert read_header(plain[: at + 8]) is None
    for place, value in ((at + 4, 12), (at + 9, 2), (at + 11, 0x41), (at + 1, 0xC9)):
        odd = bytearray(plain)
        odd[place] = value
        assert read_header(bytes(odd)) is None
    for field in (slice(at + 5, at + 7), slice(at + 7, at + 9)):
        empty = bytearray(plain)
        empty[field] = b"\0\0"
        assert read_header(bytes(empty)) is None
    end = at + 2 + struct.unpack(">H", plain[at + 2 : at + 4])[0]
    assert read_header(plain[:end] + plain[at:end] + plain[end:]) is None
    assert read_header(plain[:2] + b"stray" + plain[2:]) is None


@given(st.integers(0, 700), st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_never_breaks_the_parser(place, value):
    data = bytearray(save(picture(), exif=exif(3)))
    data[place % len(data)] = value
    header = read_header(bytes(data))
    assert header is None or (header.width > 0 and header.height > 0)
    strip_metadata(bytes(data))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_blocks": 2}])
def test_stripping_keeps_every_pixel_and_nothing_else(options):
    data = save(
        picture(),
        exif=exif(1),
        comment=b"secret comment",
        icc_profile=b"profile" * 20,
        xmp=b"<xmp>who</xmp>",
        **options,
    )
    kept = strip_metadata(data + b"PK\x03\x04<script>")
    assert kept is not None
    assert np.array_equal(pixels(kept), pixels(data))
    for trace in (b"home", b"secret", b"profile", b"xmp", b"script", b"Exif", b"PK"):
        assert trace not in kept
    assert strip_metadata(kept) == kept
    assert len(kept) < len(data)


def test_files_that_cannot_be_stripped():
    data = save(picture())
    assert strip_metadata(data[: len(data) // 2]) is None
    assert strip_metadata(data[:-2]) is None
    assert strip_metadata(b"GIF89a") is None
    assert strip_metadata(save(picture(), progressive=True)) is None
