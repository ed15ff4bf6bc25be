"""What may become a picture, what may not, and that the stored one is upright, RGB and whole."""

import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib
from typing import TYPE_CHECKING, Any, get_args

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from declip_ingest.decode import ImageNormalizer, decode_rgb, encode_jpeg, sniff_format, to_rgb
from declip_ingest.failures import DECODE_REASONS, DecodeError
from declip_ingest.image_policy import KNOWN_FORMATS, ImagePolicy, ResizeMode
from declip_ingest.jpeg import read_header
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
    assert decode_rgb(data, EVERYTHING).shape == (60, 80, 3)


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
        "from declip_ingest.decode import decode_rgb\n"
        "from declip_ingest.image_policy import ImagePolicy\n"
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
        assert decode_rgb(data, exact).shape[2] == 3


@pytest.mark.parametrize("resizer", ["scaled", "exact", "img2dataset"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("size", "changes", "expected"),
    [
        ((1, 3000), {}, "aspect_ratio_too_large"),
        ((3000, 1), {}, "aspect_ratio_too_large"),
        ((1, 3000), {"resize_mode": "center_crop"}, "too_many_pixels"),
        ((1, 3000), {"image_size": 4096}, "aspect_ratio_too_large"),
        ((30, 1), {"max_pixels": 200_000}, "too_many_pixels"),
        ((1, 3000), {"resize_mode": "keep_ratio_largest"}, ""),
        ((1, 3000), {"resize_only_if_bigger": True}, ""),
        ((1, 200), {"max_pixels": 200}, "too_many_pixels"),
        ((9, 9), {"max_pixels": 100}, ""),
    ],
)
def test_what_would_be_too_large_once_resized_is_judged_before(
    size, changes, expected, kind, resizer
):
    policy = ImagePolicy(
        **{"max_aspect_ratio": None, "resizer": resizer, "max_pixels": 10_000_000, **changes}
    )
    normalize, data = ImageNormalizer(policy), save(Image.new("RGB", size, (9, 99, 199)), kind)
    if not expected:
        made = normalize(data)
        assert Image.open(io.BytesIO(made.image)).size == (made.width, made.height)
        return
    with pytest.raises(DecodeError) as caught:
        normalize(data)
    assert caught.value.message == expected


def test_an_encoder_that_gives_up_fails_the_row():
    with pytest.raises(DecodeError, match="aspect_ratio_too_large"):
        encode_jpeg(np.zeros((65_501, 1, 3), np.uint8), 90)
    assert encode_jpeg(np.zeros((65_500, 1, 3), np.uint8), 90)[:2] == b"\xff\xd8"


def pixel(image: Image.Image | np.ndarray, x: int, y: int) -> tuple[int, ...]:
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
    assert np.array_equal(upright, np.asarray(quadrants()))


def test_bad_exif_is_ignored():
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert decode_rgb(save(quadrants(), "JPEG", exif=exif), POLICY).shape == (40, 60, 3)


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
        assert rgb.dtype == np.uint8
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
        decode_rgb(data, EVERYTHING)
        outcome = "RGB"
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


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft colors with edges, as photographs have them; noise would be no fair judge of scaling."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def resizer_pixels(data: bytes, policy: ImagePolicy) -> np.ndarray:
    """What img2dataset's Resizer makes of the very file."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.resizer import Resizer

    resizer = Resizer(
        policy.image_size,
        policy.resize_mode,
        policy.resize_only_if_bigger,
        encode_quality=policy.encode_quality,
    )
    theirs, *_, error = resizer(io.BytesIO(data))
    assert error is None
    return pixels_of(theirs)


@pytest.mark.parametrize("mode", get_args(ResizeMode))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exact_pixels_are_img2datasets_own(mode, kind):
    for size in ((130, 90), (90, 130), (40, 61), (64, 64), (301, 77)):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = save(photo(*size), kind, **options)
        policy = ImagePolicy(image_size=64, resize_mode=mode, resizer="exact")
        ours = ImageNormalizer(policy)(data)
        assert np.array_equal(pixels_of(ours.image), resizer_pixels(data, policy))


def test_alpha_over_white_is_img2datasets_too():
    rng = np.random.default_rng(0)
    data = save(Image.fromarray(rng.integers(0, 256, (80, 70, 4), dtype=np.uint8)))
    policy = ImagePolicy(image_size=64, resizer="exact")
    ours = ImageNormalizer(policy)(data)
    assert np.array_equal(pixels_of(ours.image), resizer_pixels(data, policy))


@pytest.mark.parametrize("mode", ["keep_ratio", "border", "center_crop", "no"])
def test_the_very_resizer_gives_the_exact_pixels(mode):
    data = save(photo(120, 80), "JPEG")
    exact, very = (
        ImageNormalizer(ImagePolicy(image_size=64, resize_mode=mode, resizer=resizer))(data)
        for resizer in ("exact", "img2dataset")
    )
    assert np.array_equal(pixels_of(exact.image), pixels_of(very.image))
    assert (exact.width, exact.height) == (very.width, very.height)
    assert exact.sha256 == very.sha256


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("width", [70, 130, 257, 301, 515, 1031])
def test_scaled_pixels_are_near_the_exact_ones(width, orientation):
    """Within 40 dB before the JPEG; encoding at quality 90 alone costs about as much."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(photo(width, width * 3 // 4 + 1), "JPEG", quality=92, exif=exif)
    scaled, exact = (
        ImageNormalizer(ImagePolicy(image_size=40, encode_quality=100, resizer=resizer))(data)
        for resizer in ("scaled", "exact")
    )
    assert (scaled.width, scaled.height) == (exact.width, exact.height)
    assert scaled.original_width == exact.original_width
    difference = pixels_of(scaled.image).astype(float) - pixels_of(exact.image)
    assert 10 * np.log10(255**2 / np.mean(difference**2)) > 38


def cuts(data: bytes) -> list[bytes]:
    return [data[: len(data) * share // 8] for share in range(1, 8)]


@pytest.mark.parametrize("kind", KNOWN_FORMATS)
def test_a_file_cut_at_every_eighth_fails_whatever_the_resizer(kind):
    data = save(photo(600, 450), kind.upper())
    for resizer in ("scaled", "exact"):
        for skip in (False, True):
            policy = ImagePolicy(
                image_size=64, formats=KNOWN_FORMATS, resizer=resizer, skip_reencode=skip
            )
            for cut in cuts(data):
                with pytest.raises(DecodeError) as caught:
                    ImageNormalizer(policy)(cut)
                assert caught.value.reason in ("truncated_image", "corrupt_image")


def accepts(normalize: ImageNormalizer, data: bytes) -> bool:
    try:
        normalize(data)
    except DecodeError:
        return False
    return True


WAYS = [
    ImageNormalizer(ImagePolicy(image_size=16)),
    ImageNormalizer(ImagePolicy(image_size=16, resizer="exact")),
    ImageNormalizer(ImagePolicy(image_size=16, resize_mode="no", skip_reencode=True)),
]
VICTIMS = [
    save(photo(96, 64), "JPEG", **options)
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3})
]


@given(
    st.sampled_from(VICTIMS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    st.floats(0.5, 1),
)
@settings(max_examples=300, deadline=None)
def test_no_way_accepts_what_pillow_refuses(data, changes, keep):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    if keep < 0.75:
        del damaged[int(len(damaged) * keep) :]
    broken = bytes(damaged)
    try:
        decode_rgb(broken, POLICY)
        pillow = True
    except DecodeError:
        pillow = False
    for normalize in WAYS:
        assert accepts(normalize, broken) <= pillow


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100, "subsampling": 0}])
def test_what_is_stored_is_baseline_420_whatever_came(options):
    for size in ((100, 80), (20, 15)):
        stored = ImageNormalizer(ImagePolicy(image_size=32))(save(photo(*size), "JPEG", **options))
        header = read_header(stored.image)
        assert header is not None
        assert header.is_baseline
        assert header.sampling == ((2, 2), (1, 1), (1, 1))
        assert (header.is_ycbcr, header.orientation) == (True, 1)


def test_tables_are_optimized_unless_told_not_to():
    data = save(photo(300, 300), "JPEG")
    optimized = ImageNormalizer()(data).image
    standard = ImageNormalizer(ImagePolicy(optimize_huffman=False))(data).image
    # Lengths and values of the first table (DC luminance) of T.81, K.3.1, behind its marker.
    table = bytes([0, 0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, *range(12)])
    assert b"\xff\xc4\0\x1f" + table in standard
    assert table not in optimized
    assert len(optimized) < len(standard)
    assert np.array_equal(pixels_of(optimized), pixels_of(standard))
    assert read_header(optimized) == read_header(standard)


def test_skip_reencode_keeps_the_coefficients_and_drops_the_rest():
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    data = save(photo(64, 48), "JPEG", quality=77, exif=exif, comment=b"secret")
    for changes in (
        {"resize_mode": "no"},
        {"image_size": 48},
        {"image_size": 300, "resize_only_if_bigger": True},
        {"image_size": 64, "resize_mode": "keep_ratio_largest"},
    ):
        normalize = ImageNormalizer(ImagePolicy(skip_reencode=True, **changes))
        kept = normalize(data + b"PK\x03\x04<script>")
        assert np.array_equal(pixels_of(kept.image), pixels_of(data))
        assert not any(trace in kept.image for trace in (b"home", b"secret", b"script", b"Exif"))
        assert (kept.width, kept.height) == (64, 48)
        assert normalize(kept.image).image == kept.image


def test_skip_reencode_writes_anew_what_has_to_change():
    upright = ImagePolicy(skip_reencode=True, resize_mode="no")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = photo(64, 48)
    boxes = [(0.1, 0.1, 0.9, 0.9)]
    for data, found in (
        (save(picture, "JPEG", exif=turned), []),
        (save(picture, "JPEG", progressive=True), []),
        (save(picture.convert("L"), "JPEG"), []),
        (save(picture.convert("CMYK"), "JPEG"), []),
        (save(picture, "JPEG", keep_rgb=True), []),
        (save(picture, "PNG"), []),
        (save(picture, "JPEG"), boxes),
    ):
        anew, kept = ImageNormalizer(ImagePolicy(resize_mode="no")), ImageNormalizer(upright)
        assert kept(data, found).image == anew(data, found).image
    with pytest.raises(DecodeError):
        ImageNormalizer(upright)(save(picture, "JPEG")[:-60])


def test_skip_reencode_and_img2datasets_resizer_exclude_each_other():
    with pytest.raises(DeclipError, match="skip_reencode is True but resizer 'img2dataset'"):
        ImagePolicy(skip_reencode=True, resizer="img2dataset")


def test_cmyk_with_adobes_inversion_and_ycck():
    """Pillow writes Adobe's inverted CMYK; transform 2 marks the same numbers as YCCK."""
    picture = photo(48, 48)
    for data in (save(picture.convert("CMYK"), "JPEG", quality=98),):
        near = pixels_of(ImageNormalizer(ImagePolicy(resize_mode="no"))(data).image).astype(int)
        assert np.abs(near - np.asarray(picture)).mean() < 12
        ycck = bytearray(data)
        ycck[ycck.index(b"Adobe") + 11] = 2
        other = pixels_of(ImageNormalizer(ImagePolicy(resize_mode="no"))(bytes(ycck)).image)
        assert np.abs(other.astype(int) - near).mean() > 12


def test_16_bit_color_is_taken_by_its_upper_byte():
    wide = np.full((20, 20, 3), (65535, 32896, 0), np.uint16)
    _, data = cv2.imencode(".png", wide[:, :, ::-1])
    assert pixel(decode_rgb(data.tobytes(), POLICY), 9, 9) == (255, 128, 0)


def test_boxes_are_blurred_on_the_upright_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = photo(80, 60).transpose(Image.Transpose.ROTATE_90)
    policy = ImagePolicy(resize_mode="no", encode_quality=100)
    sharp, blurred = (
        pixels_of(ImageNormalizer(policy)(save(stored, exif=exif), boxes).image).astype(int)
        for boxes in ([], [(0, 0, 0.3, 0.3)])
    )
    changed = np.abs(sharp - blurred).max(axis=2)
    assert changed[:15, :20].mean() > 4
    assert changed[30:, 40:].max() <= 2
    with pytest.raises(DecodeError, match="bad_boxes"):
        ImageNormalizer(policy)(save(stored), [(0.5, 0, 0.1, 1)])


def test_the_border_is_white_and_small_pictures_may_stay():
    wide = save(Image.new("RGB", (40, 20), "black"))
    policy = ImagePolicy(image_size=64, encode_quality=100, resize_mode="border")
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
    for resizer in ("scaled", "img2dataset"):
        ImageNormalizer(ImagePolicy(resizer=resizer))(encode())
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
        ("resizer", "magic"),
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
