"""What can be said of a picture by its bytes alone, decoded once, in gray.

A plain JPEG's luma is what its file holds, so libjpeg-turbo (simplejpeg) gives it without color:
chroma is neither upsampled nor converted. All else, and what simplejpeg refuses, goes to Pillow,
whose judgment is the law. Sums are of integers, so that the order of adding changes nothing.
"""

import contextlib
import functools
import hashlib
import io
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from declip_filter.picture_hashes import picture_hashes

Gray = npt.NDArray[np.uint8]
"""(height, width), 0 black to 255 white."""
Rgb = npt.NDArray[np.uint8]
"""(height, width, 3)."""

DHASH_SIDE = 8
"""A difference hash compares 8 rows of 8 neighboring pairs: 64 bits."""

_JPEG_START = b"\xff\xd8\xff"
_FRAMES = frozenset(
    (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
)
"""Markers of a frame's header (ITU-T T.81, table B.1)."""
_DQT, _SOS, _EOI = 0xDB, 0xDA, 0xD9
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))
"""Markers without a length."""

# ITU-T T.81, table K.1, row by row: libjpeg scales it by its quality.
# fmt: off
_LUMINANCE = np.array((
    16, 11, 10, 16, 24, 40, 51, 61,
    12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77,
    24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
), dtype=np.int64)
# fmt: on


class JpegHeader(NamedTuple):
    """What a JPEG says before its first scan."""

    width: int
    height: int
    luma_table: tuple[int, ...]
    """Quantization of the first component, 64 steps in zigzag order."""


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Size and quantization of a JPEG; None where the bytes are no JPEG or the header is cut."""
    if not data.startswith(_JPEG_START):
        return None
    tables: dict[int, tuple[int, ...]] = {}
    frame: tuple[int, int, int] | None = None
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _ALONE:
            at += 2
            continue
        if marker in (_SOS, _EOI):
            break
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if len(body) != length - 2:
            return None
        if marker == _DQT:
            tables |= _quantization_tables(body)
        elif marker in _FRAMES and len(body) >= 9:
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            frame = (width, height, body[8])
        at += 2 + length
    if frame is None or frame[2] not in tables:
        return None
    return JpegHeader(frame[0], frame[1], tables[frame[2]])


def _quantization_tables(body: bytes) -> dict[int, tuple[int, ...]]:
    """Tables of one DQT segment by their number; what is cut is left out."""
    found: dict[int, tuple[int, ...]] = {}
    at = 0
    while at < len(body):
        is_wide, number = body[at] >> 4, body[at] & 15
        size = 128 if is_wide else 64
        steps = body[at + 1 : at + 1 + size]
        if len(steps) == size:
            found[number] = tuple(np.frombuffer(steps, ">u2" if is_wide else "u1").tolist())
        at += 1 + size
    return found


@functools.cache
def _libjpeg_tables() -> npt.NDArray[np.int64]:
    """libjpeg's luminance tables of quality 1 to 100: (100, 64) in zigzag order."""
    quality = np.arange(1, 101)[:, np.newaxis]
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return ((_LUMINANCE[_zigzag()] * scale + 50) // 100).clip(1, 255)


def _zigzag() -> npt.NDArray[np.int64]:
    """Row-by-row place of each step in zigzag order (T.81, figure A.6)."""
    places = sorted(
        ((row, column) for row in range(8) for column in range(8)),
        key=lambda p: (p[0] + p[1], p[0] if (p[0] + p[1]) % 2 else p[1]),
    )
    return np.array([row * 8 + column for row, column in places])


@functools.lru_cache(1024)
def jpeg_quality(luma_table: tuple[int, ...]) -> int:
    """libjpeg's quality whose luminance table is nearest, 1 to 100.

    Exact for files of libjpeg, of Pillow and of OpenCV; for tables of other makers the quality
    that quantizes about as coarsely (least sum of differences, the lower one of two).
    """
    distances = np.abs(_libjpeg_tables() - np.array(luma_table)).sum(axis=1)
    return int(distances.argmin()) + 1


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """OpenCV for this thread as a task of one core needs it, and alike on every processor."""
    import cv2

    threads, is_on = cv2.getNumThreads(), cv2.ipp.useIPP()
    cv2.setNumThreads(1)
    # Intel's kernels differ by processor; the switch is a thread's own.
    cv2.ipp.setUseIPP(False)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
        cv2.ipp.setUseIPP(is_on)


def decode_rgb(data: bytes) -> Rgb:
    """Colors of an encoded picture: (height, width, 3).

    Raises:
        OSError: the picture cannot be decoded.
        PIL.Image.DecompressionBombError: it has more pixels than Pillow allows.
    """
    header = read_jpeg_header(data)
    import simplejpeg

    if _is_for_simplejpeg(header):
        try:
            pixels: Rgb = simplejpeg.decode_jpeg(data, "RGB", strict=True)
            return pixels
        except ValueError:
            pass
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def _is_for_simplejpeg(header: JpegHeader | None) -> bool:
    """Whether it is a JPEG, and no larger than Pillow would take without a warning."""
    limit = Image.MAX_IMAGE_PIXELS
    return header is not None and (limit is None or header.width * header.height <= limit)


def decode_gray(data: bytes, header: JpegHeader | None) -> Gray:
    """Luma of an encoded picture: (height, width).

    Raises:
        OSError: the picture cannot be decoded.
        PIL.Image.DecompressionBombError: it has more pixels than Pillow allows.
    """
    import simplejpeg

    if _is_for_simplejpeg(header):
        try:
            pixels: Gray = simplejpeg.decode_jpeg(data, "GRAY", strict=True)
            return pixels[:, :, 0]
        except ValueError:
            pass
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("L"))


def difference_hash(gray: Gray) -> str:
    """64-bit difference hash (dHash) of a gray picture, as 16 hex digits.

    The picture is shrunk to 9 x 8 pixels; a bit says whether a pixel is darker than the one to
    its right. Near-copies differ in few bits (Hamming distance).
    """
    small = Image.fromarray(gray).resize((DHASH_SIDE + 1, DHASH_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.int16)
    bits = pixels[:, 1:] > pixels[:, :-1]
    return np.packbits(bits).tobytes().hex()


def count_levels(gray: Gray) -> npt.NDArray[np.int64]:
    """How many pixels have each of the 256 gray levels."""
    # A float32 counts exactly to 2**24, so a larger picture is counted in bands of rows.
    rows = max(1, (1 << 24) // max(gray.shape[1], 1))
    counts = np.zeros(256, np.int64)
    import cv2

    for top in range(0, len(gray), rows):
        band = cv2.calcHist([gray[top : top + rows]], [0], None, [256], [0, 256])
        counts += np.asarray(band[:, 0]).astype(np.int64)
    return counts


def level_entropy(counts: npt.NDArray[np.int64]) -> float:
    """Shannon entropy of the gray levels, in bits: 0 for one flat color, at most 8."""
    shares = counts[counts > 0] / counts.sum()
    # Adding zero turns the -0.0 of a flat picture into 0.0.
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def level_contrast(counts: npt.NDArray[np.int64]) -> float:
    """Standard deviation of the luma where black is 0 and white 1: 0 to 0.5."""
    levels = np.arange(256)
    total = int(counts.sum())
    mean_square = int((counts * levels * levels).sum()) * total - int((counts * levels).sum()) ** 2
    return float(max(mean_square, 0) ** 0.5) / total / 255


def sharpness(gray: Gray) -> float:
    """Standard deviation of the Laplacian (kernel 0 1 0, 1 -4 1, 0 1 0) over white, 0 to 4.

    Low for blurred and flat pictures, high for noise and for drawings with hard edges; it depends
    on the picture's size, so compare only pictures of one resize.
    """
    import cv2

    edges = cv2.Laplacian(gray, cv2.CV_16S, ksize=1)
    _, deviation = cv2.meanStdDev(edges)
    return float(deviation[0, 0]) / 255


def measure_image(data: bytes) -> Mapping[str, int | float | str | None]:
    """Signals of one encoded picture.

    Returns:
        ``width`` and ``height`` (pixels, as stored), ``num_bytes``, ``bytes_per_pixel``,
        ``jpeg_quality`` (1 to 100, of the luminance table; None for no JPEG), ``contrast`` (see
        :func:`level_contrast`), ``entropy`` (bits), ``sharpness``, ``image_sha256`` (of the
        bytes), ``image_dhash``, ``image_phash`` and ``image_layout`` (see
        :mod:`declip_filter.picture_hashes`).

    Raises:
        OSError: the picture cannot be decoded.
        PIL.Image.DecompressionBombError: it has more pixels than Pillow allows.
    """
    header = read_jpeg_header(data)
    gray = decode_gray(data, header)
    height, width = gray.shape
    counts = count_levels(gray)
    return {
        "width": width,
        "height": height,
        "num_bytes": len(data),
        "bytes_per_pixel": len(data) / (width * height),
        "jpeg_quality": None if header is None else jpeg_quality(header.luma_table),
        "contrast": level_contrast(counts),
        "entropy": level_entropy(counts),
        "sharpness": sharpness(gray),
        "image_sha256": hashlib.sha256(data).hexdigest(),
        "image_dhash": difference_hash(gray),
        **picture_hashes(gray),
    }
