"""What may become a picture, what may not, and that the stored one is upright, RGB and whole."""

import hashlib
import io
import struct
import subprocess
import sys
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from declip_ingest.decode import (
    KNOWN_FORMATS,
    ImageNormalizer,
    ImagePolicy,
    decode_rgb,
    sniff_format,
    to_rgb,
)
from declip_ingest.failures import DECODE_REASONS, DecodeError
from declip_shards import DeclipError

if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import encode
else:
    # conftest.py puts this folder on the path.
    from misbehaving_server import encode

POLICY = ImagePolicy()
EVERYTHING = ImagePolicy(formats=KNOWN_FORMATS)


def save(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def reason(data: bytes, policy: ImagePolicy = POLICY) -> str:
    with pytest.raises(DecodeError) as caught:
        decode_rgb(data, policy)
    assert caught.value.reason in DECODE_REASONS
    assert caught.value.status == "failed_to_resize"
    return caught.value.message


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", KNOWN_FORMATS)
def test_each_known_format_is_recognized_and_decoded(kind):
    data = encode(kind.upper())
    assert sniff_format(data) == kind
    assert decode_rgb(data, EVERYTHING).size == (80, 60)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE html><html><body>Please log in</body></html>", "not_image"),
        (b"{}", "not_image"),
        (b"BMW sells cars", "not_image"),
        (b"\0" * 100, "not_image"),
        (b"PK\x03\x04" + b"\0" * 50, "not_image"),
        (b"<?xml version='1.0'?><svg xmlns='x'/>", "unsupported_format: svg"),
        (b"\xef\xbb\xbf <SVG></SVG>", "unsupported_format: svg"),
        (b"<html><svg></svg></html>", "not_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "unsupported_format: eps"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 20, "unsupported_format: heic"),
        (b"\0\0\0\x18ftypmp42" + b"\0" * 20, "not_image"),
    ],
)
def test_bytes_decide_not_headers(data, message):
    assert reason(data) == message


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "AVIF"])
def test_formats_outside_the_list_are_named(kind):
    assert reason(encode(kind)) == f"unsupported_format: {kind.lower()}"


@pytest.mark.parametrize("kind", KNOWN_FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_a_cut_file_is_a_failure_and_never_half_a_picture(kind, share):
    data = encode(kind.upper(), size=(160, 120))
    cut = data[: max(16, int(len(data) * share))]
    assert reason(cut, EVERYTHING) in ("truncated_image", "corrupt_image")


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_cut_jpeg_and_png_are_called_truncated(options):
    for data in (encode("JPEG", **options), encode("PNG"), encode("WEBP"), encode("GIF")):
        assert reason(data[: len(data) // 2]) == "truncated_image"


@pytest.mark.parametrize("size", [(65_535, 65_535), (32_000, 32_000), (8_001, 8_000)])
def test_a_bomb_is_refused_by_its_header(size, stopwatch):
    assert reason(png_header(*size)) == "too_many_pixels"
    assert stopwatch() < 0.5


def test_a_bomb_costs_no_memory():
    """In a process of its own, whose peak says what the refusal took."""
    script = (
        "import resource, sys\n"
        "from declip_ingest.decode import ImagePolicy, decode_rgb\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode_rgb(sys.stdin.buffer.read(), ImagePolicy())\n"
        "except Exception as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], input=png_header(32_000, 32_000), capture_output=True
    )
    message, kilobytes = run.stdout.decode().split()
    assert message == "too_many_pixels", run.stderr.decode()
    assert int(kilobytes) < 20_000


def test_limits_are_judged_in_both_directions():
    wide, tall = encode(size=(200, 10)), encode(size=(10, 200))
    for data in (wide, tall):
        assert reason(data, ImagePolicy(max_aspect_ratio=19.9)) == "aspect_ratio_too_large"
        assert reason(data, ImagePolicy(min_image_size=11)) == "image_too_small"
        assert reason(data, ImagePolicy(max_pixels=1999)) == "too_many_pixels"
        exact = ImagePolicy(max_aspect_ratio=20, min_image_size=10, max_pixels=2000)
        assert decode_rgb(data, exact).mode == "RGB"


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return tuple(int(v) for v in np.asarray(image)[y, x])


def quadrants() -> Image.Image:
    """Red, green, blue and white quarters: every turn and mirror looks different."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30], pixels[:20, 30:] = (255, 0, 0), (0, 255, 0)
    pixels[20:, :30], pixels[20:, 30:] = (0, 0, 255), (255, 255, 255)
    return Image.fromarray(pixels)


INVERSE = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation):
    turn = INVERSE[orientation]
    stored = quadrants() if turn is None else quadrants().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_rgb(save(stored, exif=exif), POLICY)
    assert np.array_equal(np.asarray(upright), np.asarray(quadrants()))


def test_bad_exif_is_ignored():
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert decode_rgb(save(quadrants(), "JPEG", exif=exif), POLICY).size == (60, 40)


def test_nothing_of_the_metadata_is_stored():
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    exif.get_ifd(0x8825)[1] = "N"
    data = save(quadrants(), "JPEG", exif=exif, comment=b"secret comment")
    polyglot = data + b"PK\x03\x04<script>alert(1)</script>"
    stored = ImageNormalizer()(polyglot).image
    for trace in (b"taken at home", b"secret comment", b"Exif", b"script"):
        assert trace not in stored
    assert not Image.open(io.BytesIO(stored)).getexif()


def test_every_mode_becomes_rgb_with_the_right_colors():
    def center(image: Image.Image) -> tuple[int, ...]:
        rgb = decode_rgb(save(image), POLICY)
        assert rgb.mode == "RGB"
        return pixel(rgb, 5, 5)

    size = (10, 10)
    assert center(Image.new("L", size, 77)) == (77, 77, 77)
    assert center(Image.new("1", size, 1)) == (255, 255, 255)
    assert center(Image.new("RGBA", size, (255, 0, 0, 0))) == (255, 255, 255)
    assert center(Image.new("RGBA", size, (0, 0, 0, 128))) == (127, 127, 127)
    assert center(Image.new("LA", size, (0, 0))) == (255, 255, 255)
    palette = Image.new("RGB", size, (10, 200, 30)).quantize(4)
    assert center(palette) == (10, 200, 30)
    sink = io.BytesIO()
    palette.save(sink, "PNG", transparency=0)
    assert pixel(decode_rgb(sink.getvalue(), POLICY), 5, 5) in ((10, 200, 30), (255,) * 3)
    deep = Image.fromarray(np.full((10, 10), 32896, np.uint16))
    assert center(deep) == (128, 128, 128)
    for value, expected in ((0, 0), (65535, 255)):
        assert center(Image.fromarray(np.full((10, 10), value, np.uint16))) == (expected,) * 3


def test_cmyk_is_converted_not_inverted():
    cmyk = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    red, green, blue = pixel(decode_rgb(save(cmyk, "JPEG", quality=100), POLICY), 9, 9)
    assert red > 240
    assert max(green, blue) < 15


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        data = save(frames[0], kind, save_all=True, append_images=frames[1:])
        red, _, blue = pixel(decode_rgb(data, POLICY), 5, 5)
        assert red > 200
        assert blue < 60


@given(st.binary(max_size=300), st.sampled_from(KNOWN_FORMATS))
@settings(max_examples=60, deadline=None)
def test_no_bytes_break_the_decoder(tail, kind):
    """Random tails behind real headers: a picture or a named reason, nothing else."""
    data = encode(kind.upper(), size=(8, 8))[:40] + tail
    try:
        outcome = decode_rgb(data, EVERYTHING).mode
    except DecodeError as error:
        outcome = error.reason
    assert outcome in {"RGB", *DECODE_REASONS}


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("border", (200, 100), (64, 64)),
        ("keep_ratio", (200, 100), (128, 64)),
        ("keep_ratio_largest", (200, 100), (64, 32)),
        ("center_crop", (200, 100), (64, 64)),
        ("no", (200, 100), (200, 100)),
        ("keep_ratio_largest", (20, 10), (64, 32)),
    ],
)
def test_modes_are_img2datasets(mode, size, expected):
    data = encode("PNG", size=size)
    decoded = ImageNormalizer(ImagePolicy(image_size=64, resize_mode=mode))(data)
    stored = Image.open(io.BytesIO(decoded.image))
    assert (stored.format, stored.mode) == ("JPEG", "RGB")
    assert stored.size == (decoded.width, decoded.height) == expected
    assert (decoded.original_width, decoded.original_height) == size
    assert decoded.sha256 == hashlib.sha256(data).hexdigest()


def test_the_result_is_img2datasets_own_for_a_plain_picture():
    """Same bytes as its Resizer makes of the very file, where no conversion is due."""
    from img2dataset.resizer import Resizer

    data = encode("PNG", size=(90, 50), seed=3)
    theirs, *_, error = Resizer(64, "border", False, encode_quality=90)(io.BytesIO(data))
    assert error is None
    assert ImageNormalizer(ImagePolicy(image_size=64))(data).image == theirs


def test_the_border_is_white_and_small_pictures_may_stay():
    wide = save(Image.new("RGB", (40, 20), "black"))
    policy = ImagePolicy(image_size=64, encode_quality=100)
    bordered = Image.open(io.BytesIO(ImageNormalizer(policy)(wide).image))
    assert min(pixel(bordered, 32, 2)) > 250
    assert max(pixel(bordered, 32, 32)) < 5
    kept = ImageNormalizer(ImagePolicy(image_size=64, resize_only_if_bigger=True))(wide)
    assert (kept.width, kept.height) == (40, 20)


def test_quality_is_obeyed():
    data = encode("PNG")
    sizes = [len(ImageNormalizer(ImagePolicy(encode_quality=q))(data).image) for q in (30, 90)]
    assert sizes[0] < sizes[1]


def test_the_standard_streams_stand_after_the_resizer(capfd):
    ImageNormalizer()(encode())
    print("still here")
    assert "still here" in capfd.readouterr().out


def test_16_bit_gray_under_every_name_is_scaled_not_clipped():
    deep = np.full((4, 4), 0x8000, np.int32)
    assert pixel(to_rgb(Image.fromarray(deep)), 0, 0) == (128, 128, 128)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("image_size", 0),
        ("encode_quality", 101),
        ("min_image_size", -1),
        ("max_pixels", 10**9),
        ("max_aspect_ratio", 0.5),
        ("resize_mode", "stretch"),
        ("formats", ("jpeg", "tiff")),
        ("formats", ()),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(setting, value):
    make: Any = ImagePolicy
    with pytest.raises(DeclipError) as caught:
        make(**{setting: value})
    assert setting in str(caught.value)
    assert repr(value) in str(caught.value)
