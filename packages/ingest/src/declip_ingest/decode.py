"""Bytes from the web -> an upright RGB JPEG of the asked size, or a stable reason why not.

A plain JPEG goes the short way: its own header is read here, libjpeg-turbo decodes it strictly
(simplejpeg), at a fraction of its size where that is exact enough, and OpenCV resizes with
img2dataset's arithmetic. Whatever is not plain, and whatever the short way refuses, goes to Pillow,
whose judgment is the law: a file that it finds damaged or cut short is a failure, never half a
picture. What is stored is written anew, so EXIF with its GPS position, profiles and trailing bytes
stay behind.
docs/design/0003-decoding.md has the reasons and the measurements.

A hostile file can still crash or stall a C library, so :mod:`declip_ingest.decoder_pool` runs all
this in child processes.
"""

import functools
import hashlib
import io
import math
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from declip_ingest.blur import Boxes, blur_boxes, check_boxes
from declip_ingest.failures import DecodeError
from declip_ingest.image_policy import DecodedImage, ImagePolicy
from declip_ingest.jpeg import JpegHeader, read_header, strip_metadata
from declip_ingest.resize import (
    Pixels,
    ResizePlan,
    decode_eighths,
    frame,
    plan_resize,
    resize_exact,
    resize_fast,
)

SNIFF_BYTES = 1024
BAND_PIXELS = 1 << 20
ORIENTATION_TAG = 0x0112
MAX_JPEG_SIDE = 65_500
"""Pixels; libjpeg writes no longer ones."""

_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"%!PS", "eps"),
    (b"\xc5\xd0\xd3\xc6", "eps"),
    (b"8BPS", "psd"),
    (b"\0\0\1\0", "ico"),
    (b"\0\0\0\x0cJXL ", "jxl"),
    (b"\xff\x0a", "jxl"),
    (b"\0\0\0\x0cjP  ", "jp2"),
)
_FTYP_BRANDS = {b"avif": "avif", b"avis": "avif", b"heic": "heic", b"heix": "heic", b"mif1": "heic"}


def sniff_format(data: bytes) -> str | None:
    """The format that the bytes begin like, lower case; None where they are no picture."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    # Two letters are too little to tell a bitmap from a text; four reserved bytes are zero in it.
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":
        return "bmp"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        return _FTYP_BRANDS.get(data[8:12])
    head = data[:SNIFF_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<svg", b"<?xml", b"<!--")) and b"<svg" in head and b"<html" not in head:
        return "svg"
    return None


def _check_size(width: int, height: int, policy: ImagePolicy) -> None:
    if width < 1 or height < 1:
        raise DecodeError("corrupt_image", "no pixels")
    if width * height > policy.max_pixels:
        raise DecodeError("too_many_pixels")
    if min(width, height) < policy.min_image_size:
        raise DecodeError("image_too_small")
    limit = policy.max_aspect_ratio
    if limit is not None and max(width, height) > limit * min(width, height):
        raise DecodeError("aspect_ratio_too_large")


def plan_for(width: int, height: int, policy: ImagePolicy) -> ResizePlan:
    """What becomes of an upright picture of this size, judged before any pixel is made.

    Without ``max_aspect_ratio`` a thin line blown up to ``image_size`` would fill the memory.

    Raises:
        DecodeError: stored, it would be longer than a JPEG can be, or have more pixels than both
            ``max_pixels`` and a square of ``image_size``.
    """
    plan = plan_resize(
        width,
        height,
        mode=policy.resize_mode,
        size=policy.image_size,
        only_if_bigger=policy.resize_only_if_bigger,
    )
    if max(plan.final_size()) > MAX_JPEG_SIDE:
        raise DecodeError("aspect_ratio_too_large")
    if plan.width * plan.height > max(policy.max_pixels, policy.image_size**2):
        raise DecodeError("too_many_pixels")
    return plan


def _sniff_allowed(data: bytes, policy: ImagePolicy) -> str:
    kind = sniff_format(data)
    if kind is None:
        raise DecodeError("not_image")
    if kind not in policy.formats:
        raise DecodeError("unsupported_format", kind)
    return kind


def decode_rgb(data: bytes, policy: ImagePolicy) -> Pixels:
    """Decode the whole picture by Pillow: height x width x 3, RGB, upright.

    Raises:
        DecodeError: not a picture, a format not taken, limits passed, cut short, or damaged.
    """
    kind = _sniff_allowed(data, policy)
    try:
        with (
            # Warnings tell of odd EXIF and of sizes Pillow finds large; both are judged here.
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=(kind.upper(),)) as image,
        ):
            _check_size(*image.size, policy)
            image.load()
            return turn_upright(to_rgb(image), _orientation(image))
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError("too_many_pixels") from error
    except MemoryError as error:
        raise DecodeError("decoder_memory") from error
    except Exception as error:
        # Decoders raise whatever their parser stumbles over (struct.error, SyntaxError, IndexError,
        # OSError, ...): for a picture from the web each of them means a damaged file.
        raise DecodeError(_damage(kind, data, error)) from error


def to_rgb(image: Image.Image) -> Pixels:
    """Any mode Pillow decodes to RGB: alpha over white, 16-bit gray scaled down, CMYK converted."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        gray = ((deep * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(gray[:, :, np.newaxis], 3, axis=2)
    if image.has_transparency_data:
        return over_white(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def over_white(rgba: Pixels) -> Pixels:
    """A picture with alpha laid upon white, rounded to the nearest as img2dataset does it.

    Args:
        rgba: height x width x 4.
    """
    rgb = np.empty((*rgba.shape[:2], 3), np.uint8)
    # In bands of rows, for the wider intermediate would take several times the picture's memory.
    rows = max(1, BAND_PIXELS // rgba.shape[1])
    for top in range(0, len(rgba), rows):
        band = rgba[top : top + rows].astype(np.uint16)
        alpha = band[:, :, 3:]
        # 255 is odd, so no quotient lies halfway and adding half of it rounds as rint does.
        mixed = (band[:, :, :3] * alpha + (255 * (255 - alpha) + 127)) // 255
        rgb[top : top + rows] = mixed
    return rgb


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation by Pillow's parser; 1 where EXIF is damaged or says nothing valid."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turn and mirror as EXIF's orientation 1 to 8 says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _damage(kind: str, data: bytes, error: Exception) -> str:
    """Cut short, or damaged in another way."""
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "truncated_image"
    # Pillow knows a cut WebP only as one that cannot be read; its header knows the whole length.
    if kind == "webp" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        return "truncated_image"
    return "corrupt_image"


class ImageNormalizer:
    """One for a process: downloaded bytes in, what is stored out."""

    def __init__(self, policy: ImagePolicy | None = None) -> None:
        self.policy = policy or ImagePolicy()
        cv2.setNumThreads(1)
        if self.policy.resizer == "img2dataset":
            self._make: Callable[[bytes, Boxes], tuple[bytes, int, int, int, int]]
            self._make = Img2datasetWay(self.policy)
        else:
            self._make = self._make_own_way

    def __call__(self, data: bytes, boxes: Boxes = ()) -> DecodedImage:
        """Turn downloaded bytes into what is stored.

        Args:
            data: a picture's file.
            boxes: to blur; fractions of the upright picture.

        Raises:
            DecodeError: see :func:`decode_rgb`; or ``bad_boxes``.
        """
        checked = check_boxes(boxes)
        # Intel's kernels differ by processor, and the same picture must give the same bytes. The
        # switch is a thread's own: left off, the threads of a process would no longer agree.
        had_ipp = cv2.ipp.useIPP()
        cv2.ipp.setUseIPP(False)
        try:
            image, width, height, original_width, original_height = self._make(data, checked)
        except (MemoryError, cv2.error) as error:
            if isinstance(error, MemoryError) or error.code == cv2.Error.STS_NO_MEM:
                raise DecodeError("decoder_memory") from error
            raise DecodeError("corrupt_image") from error
        finally:
            cv2.ipp.setUseIPP(had_ipp)
        return DecodedImage(
            image=image,
            width=width,
            height=height,
            original_width=original_width,
            original_height=original_height,
            sha256=hashlib.sha256(data).hexdigest(),
        )

    def _make_own_way(self, data: bytes, boxes: Boxes) -> tuple[bytes, int, int, int, int]:
        policy = self.policy
        if _sniff_allowed(data, policy) == "jpeg" and (header := read_header(data)) is not None:
            _check_size(header.width, header.height, policy)
            done = self._plain_jpeg(data, header, boxes)
            if done is not None:
                return done
        rgb = decode_rgb(data, policy)
        height, width = rgb.shape[:2]
        plan = plan_for(width, height, policy)
        if policy.resizer == "scaled" and plan.is_downscale:
            small = resize_fast(rgb, (plan.width, plan.height))
        else:
            small = resize_exact(rgb, plan)
        small = frame(blur_boxes(small, boxes), plan)
        image = self._encode(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        return image, *plan.final_size(), width, height

    def _encode(self, bgr: Pixels) -> bytes:
        return encode_jpeg(bgr, self.policy.encode_quality, optimize=self.policy.optimize_huffman)

    def _plain_jpeg(
        self, data: bytes, header: JpegHeader, boxes: Boxes
    ) -> tuple[bytes, int, int, int, int] | None:
        """The short way; None where Pillow has to judge."""
        orientation = header.orientation
        if orientation is None:
            orientation = _jpeg_orientation(data)
        width, height = header.width, header.height
        if orientation >= 5:
            width, height = height, width
        plan = plan_for(width, height, self.policy)
        try:
            if self.policy.skip_reencode and not boxes and _may_keep(header, orientation, plan):
                # Decoded all the same: what cannot be read is not kept.
                simplejpeg.decode_jpeg(data, "GRAY", strict=True)
                if (kept := strip_metadata(data)) is not None:
                    return kept, width, height, width, height
            if self.policy.resizer == "scaled" and plan.is_downscale:
                small = _decode_scaled(data, header, orientation, plan)
            else:
                bgr = simplejpeg.decode_jpeg(data, "BGR", strict=True)
                small = resize_exact(turn_upright(bgr, orientation), plan)
        except ValueError:
            return None
        image = self._encode(frame(blur_boxes(small, boxes), plan))
        return image, *plan.final_size(), width, height


def _decode_scaled(data: bytes, header: JpegHeader, orientation: int, plan: ResizePlan) -> Pixels:
    """Decode no finer than it takes, resize, and turn what is then small.

    Raises:
        ValueError: simplejpeg finds anything wrong.
    """
    size = (plan.height, plan.width) if orientation >= 5 else (plan.width, plan.height)
    eighths = decode_eighths(min(header.width / size[0], header.height / size[1]))
    columns, rows = header.width * eighths / 8, header.height * eighths / 8
    bgr = simplejpeg.decode_jpeg(
        data, "BGR", min_height=math.ceil(rows), min_width=math.ceil(columns), strict=True
    )
    return turn_upright(resize_fast(bgr, size, (columns, rows)), orientation)


def _may_keep(header: JpegHeader, orientation: int, plan: ResizePlan) -> bool:
    """Whether the file's coefficients can be stored as they are."""
    return (
        header.is_baseline
        and header.is_ycbcr
        and orientation == 1
        and plan.final_size() == (header.width, header.height) == (plan.width, plan.height)
    )


def _jpeg_orientation(data: bytes) -> int:
    """By Pillow's parser, for EXIF that is not plain; the picture itself is not decoded."""
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=("JPEG",)) as image,
        ):
            return _orientation(image)
    except Exception:
        # Whatever is wrong, the decoders will say so.
        return 1


def encode_jpeg(bgr: Pixels, quality: int, *, optimize: bool = True) -> bytes:
    """Baseline JPEG, 4:2:0, no metadata.

    Args:
        bgr: height x width x 3.
        quality: 1 to 100, libjpeg's scale.
        optimize: make Huffman tables for this picture in place of the standard ones; the pixels are
            the same.

    Raises:
        DecodeError: ``aspect_ratio_too_large`` for a side above ``MAX_JPEG_SIDE``, else
            ``decoder_memory``.
    """
    is_done, encoded = cv2.imencode(".jpg", bgr, _encode_options(quality, optimize))
    if not is_done:
        # What libjpeg can want besides shorter sides is memory.
        is_long = max(bgr.shape) > MAX_JPEG_SIDE
        raise DecodeError("aspect_ratio_too_large" if is_long else "decoder_memory")
    return encoded.tobytes()


@functools.cache
def _encode_options(quality: int, optimize: bool) -> tuple[int, ...]:
    return (
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_OPTIMIZE,
        int(optimize),
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    )


class Img2datasetWay:
    """Pillow's judgment, then img2dataset's very ``Resizer``.

    It takes an encoded stream, so the upright RGB pixels are handed over as an uncompressed BMP.
    It redirects the process's standard streams while it works, so calls go through one lock and
    what other threads print meanwhile is lost.
    """

    _lock = threading.Lock()

    def __init__(self, policy: ImagePolicy) -> None:
        self.policy = policy
        # albumentations, which it imports, calls home for its newest version otherwise.
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        with warnings.catch_warnings(action="ignore"):
            from img2dataset.blurrer import BoundingBoxBlurrer
            from img2dataset.resizer import Resizer
        self._resize: Callable[..., tuple[Any, ...]] = Resizer(
            image_size=policy.image_size,
            resize_mode=policy.resize_mode,
            resize_only_if_bigger=policy.resize_only_if_bigger,
            encode_quality=policy.encode_quality,
            encode_format="jpg",
            blurrer=BoundingBoxBlurrer(),
        )

    def __call__(self, data: bytes, boxes: Boxes) -> tuple[bytes, int, int, int, int]:
        """The stored file, its width and height, and those of the upright original.

        Raises:
            DecodeError: see :func:`decode_rgb`.
        """
        stream = io.BytesIO()
        rgb = decode_rgb(data, self.policy)
        plan_for(rgb.shape[1], rgb.shape[0], self.policy)
        Image.fromarray(rgb).save(stream, "BMP")
        with self._lock:
            image, width, height, original_width, original_height, error = self._resize(
                stream, boxes or None
            )
        if error is not None:
            raise DecodeError("corrupt_image")
        return image, width, height, original_width, original_height
