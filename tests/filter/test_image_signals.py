import io
import math
from fractions import Fraction

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from declip_filter.image_signals import (
    count_levels,
    decode_gray,
    decode_rgb,
    difference_hash,
    jpeg_quality,
    level_contrast,
    level_entropy,
    measure_image,
    read_jpeg_header,
    sharpness,
)

pictures = arrays.arrays(np.uint8, st.tuples(st.integers(1, 24), st.integers(1, 24)))


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind, **options)
    return sink.getvalue()


def hamming(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def natural(seed: int, size: int = 96) -> Image.Image:
    """Smooth random colors: a picture that compresses and scales like a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


@given(pictures)
@settings(max_examples=60)
def test_levels_are_counted_and_contrast_and_entropy_are_the_definitions(gray):
    counts = count_levels(gray)
    assert counts.tolist() == np.bincount(gray.ravel(), minlength=256).tolist()
    assert level_contrast(counts) == pytest.approx(gray.std() / 255, abs=1e-9)
    shares = [Fraction(int(c), gray.size) for c in counts if c]
    assert level_entropy(counts) == pytest.approx(-sum(s * math.log2(s) for s in shares), abs=1e-9)
    assert 0 <= level_contrast(counts) <= 0.5
    assert 0 <= level_entropy(counts) <= 8


def test_flat_and_two_level_pictures():
    flat = measure_image(encode(np.full((20, 30, 3), 120, np.uint8)))
    assert (flat["contrast"], flat["entropy"], flat["sharpness"]) == (0, 0, 0)
    assert (flat["width"], flat["height"], flat["jpeg_quality"]) == (30, 20, None)
    halves = np.zeros((20, 20, 3), np.uint8)
    halves[:, 10:] = 255
    split = measure_image(encode(halves))
    assert split["contrast"] == pytest.approx(0.5)
    assert split["entropy"] == pytest.approx(1)


@given(pictures)
@settings(max_examples=60)
def test_sharpness_is_the_deviation_of_the_laplacian(gray):
    if min(gray.shape) < 2:
        return
    wide = np.pad(gray.astype(np.int64), 1, mode="reflect")
    sides = wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]
    edges = sides - 4 * wide[1:-1, 1:-1]
    assert sharpness(gray) == pytest.approx(edges.std() / 255, abs=1e-9)


def test_blur_lowers_sharpness():
    gray = np.asarray(natural(8).convert("L"))
    found = [sharpness(cv2.GaussianBlur(gray, (0, 0), sigma)) for sigma in (0.5, 1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
    assert found[0] < sharpness(gray)


@pytest.mark.parametrize("writer", ["pillow", "opencv", "simplejpeg", "progressive"])
def test_jpeg_quality_is_the_one_it_was_saved_with(writer):
    pixels = np.asarray(natural(1, 40))
    for quality in range(1, 101):
        if writer == "opencv":
            data = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes()
        elif writer == "simplejpeg":
            data = simplejpeg.encode_jpeg(pixels, quality=quality)
        else:
            data = encode(pixels, "JPEG", quality=quality, progressive=writer == "progressive")
        header = read_jpeg_header(data)
        assert header is not None
        assert (header.width, header.height) == (40, 40)
        assert jpeg_quality(header.luma_table) == quality


def test_quality_of_foreign_tables_grows_with_finer_steps():
    found = [jpeg_quality((step,) * 64) for step in (255, 100, 50, 20, 5, 1)]
    assert found == sorted(found)
    assert found[-1] == 100


@given(st.binary(max_size=60), st.integers(0, 700), st.integers(0, 255))
@settings(max_examples=150)
def test_headers_of_damaged_files_raise_nothing(noise, cut, byte):
    data = encode(np.asarray(natural(2, 24)), "JPEG")
    for broken in (noise, b"\xff\xd8\xff" + noise, data[:cut], data[:cut] + bytes([byte]) + noise):
        header = read_jpeg_header(broken)
        assert header is None or len(header.luma_table) == 64


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_luma_is_the_file_s_own(subsampling, progressive):
    data = encode(np.asarray(natural(3, 50)), "JPEG", subsampling=subsampling,
                  progressive=progressive)  # fmt: skip
    gray = decode_gray(data, read_jpeg_header(data))
    draft = Image.open(io.BytesIO(data))
    draft.draft("L", draft.size)
    assert np.array_equal(gray, np.asarray(draft))
    assert np.abs(gray - np.asarray(natural(3, 50).convert("L"), np.int16)).mean() < 6
    assert np.array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "WEBP"),
    ],
)  # fmt: skip
def test_other_formats_are_measured_too(mode, kind):
    sink = io.BytesIO()
    natural(4, 48).convert(mode).save(sink, kind)
    signals = measure_image(sink.getvalue())
    assert (signals["width"], signals["height"]) == (48, 48)
    assert (signals["jpeg_quality"] is None) == (kind != "JPEG")
    assert decode_rgb(sink.getvalue()).shape == (48, 48, 3)


@pytest.mark.parametrize("keep", [3, 100, 0.6])
def test_cut_files_are_errors_and_never_half_a_picture(keep):
    data = encode(np.asarray(natural(5, 64)), "JPEG", quality=95)
    with pytest.raises(OSError):
        measure_image(data[: int(keep * len(data)) if keep < 1 else keep])


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    data = encode(np.asarray(natural(6, 64)), "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        measure_image(data)
    with pytest.raises(Image.DecompressionBombError):
        decode_rgb(data)


def test_hash_survives_recompression_and_scaling_and_tells_pictures_apart():
    big, other = (np.asarray(natural(seed).convert("L")) for seed in (3, 7))
    data = encode(np.asarray(natural(3)), "JPEG", quality=60)
    again = decode_gray(data, read_jpeg_header(data))
    half = np.asarray(Image.fromarray(big).resize((48, 48)))
    assert len(difference_hash(big)) == 16
    assert hamming(difference_hash(big), difference_hash(again)) <= 4
    assert hamming(difference_hash(big), difference_hash(half)) <= 4
    assert hamming(difference_hash(big), difference_hash(other)) >= 16
