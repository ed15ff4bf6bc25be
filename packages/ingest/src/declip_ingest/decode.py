"""Bytes from the web -> an upright RGB JPEG of the asked size, or a stable reason why not.

Pillow judges and img2dataset resizes. Pillow reads the dimensions before it decodes, takes only the
named formats, and refuses a file that ends early, where OpenCV would fill the rest with gray.
What it decoded is handed to img2dataset's own ``Resizer`` as an uncompressed BMP of the upright RGB
pixels: lossless, cheap, and the one way in, since ``Resizer`` takes an encoded stream. So its modes
and its arithmetic are exactly img2dataset's, and EXIF with its GPS position stays behind.

Decoders run in this process for now; a child process with a memory limit around them is the next
step, because a hostile file can still crash a C library.
"""

import hashlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageOps, features

from declip_ingest.failures import DecodeError
from declip_shards import DeclipError

ResizeMode = Literal["border", "keep_ratio", "keep_ratio_largest", "center_crop", "no"]
"""img2dataset's modes: pad to a square; shorter side; longer side; crop a square; leave."""
DEFAULT_FORMATS = ("jpeg", "png", "webp", "gif")
KNOWN_FORMATS = ("avif", "bmp", "gif", "jpeg", "png", "webp")
"""Formats that a user may ask for: those Pillow decodes without an outside program."""
PILLOW_PIXEL_LIMIT = 2 * 89_478_485
"""Pillow itself refuses more pixels, as a decompression bomb."""
SNIFF_BYTES = 1024

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


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """A picture as it goes into the tar."""

    image: bytes
    """JPEG, RGB, upright, without metadata."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    original_width: int
    """Pixels of the upright picture as it came."""
    original_height: int
    """Pixels of the upright picture as it came."""
    sha256: str
    """Of the bytes as they came, as img2dataset has it."""


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """What is taken and what is made of it; names and meanings are img2dataset's."""

    image_size: int = 256
    """Pixels; which side or sides is up to ``resize_mode``."""
    resize_mode: ResizeMode = "border"
    """border, keep_ratio, keep_ratio_largest, center_crop or no."""
    resize_only_if_bigger: bool = False
    """Leave pictures that are already small enough at their size."""
    encode_quality: int = 90
    """JPEG quality, 1 to 100."""
    min_image_size: int = 0
    """Pixels of the shorter side."""
    max_aspect_ratio: float | None = None
    """Longer side over shorter side; None is no limit."""
    max_pixels: int = 64_000_000
    """Width times height, judged by the header before anything is decoded."""
    formats: Sequence[str] = DEFAULT_FORMATS
    """Formats taken, of KNOWN_FORMATS; of an animation the first frame."""

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, float, float], ...] = (
            ("image_size", 1, 16_384),
            ("encode_quality", 1, 100),
            ("min_image_size", 0, 65_535),
            ("max_pixels", 1, PILLOW_PIXEL_LIMIT),
        )
        for name, least, most in limits:
            if not least <= getattr(self, name) <= most:
                raise DeclipError(
                    f"{name} is {getattr(self, name)} but must lie between {least} and {most}; "
                    "give a number within."
                )
        if self.max_aspect_ratio is not None and not self.max_aspect_ratio >= 1:
            raise DeclipError(
                f"max_aspect_ratio is {self.max_aspect_ratio} but a longer side over a shorter one "
                "is never below 1; give 1 or more, or leave it out."
            )
        if self.resize_mode not in get_args(ResizeMode):
            raise DeclipError(
                f"resize_mode is {self.resize_mode!r}; choose one of "
                f"{', '.join(get_args(ResizeMode))}."
            )
        unknown = sorted(set(self.formats) - set(KNOWN_FORMATS))
        if unknown or not self.formats:
            raise DeclipError(
                f"formats is {tuple(self.formats)}; choose one or more of "
                f"{', '.join(KNOWN_FORMATS)}."
            )
        if "avif" in self.formats and not features.check("avif"):
            raise DeclipError(
                "formats holds 'avif', which this machine's Pillow was built without; leave it out "
                "or install Pillow's own wheel."
            )


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow decodes to RGB: alpha over white, 16-bit gray scaled down, CMYK converted."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        gray = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def decode_rgb(data: bytes, policy: ImagePolicy) -> Image.Image:
    """Decode the whole picture, upright and RGB.

    Raises:
        DecodeError: not a picture, a format not taken, limits passed, cut short, or damaged.
    """
    kind = sniff_format(data)
    if kind is None:
        raise DecodeError("not_image")
    if kind not in policy.formats:
        raise DecodeError("unsupported_format", kind)
    try:
        with (
            # Warnings tell of odd EXIF and of sizes Pillow finds large; both are judged here.
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=(kind.upper(),)) as image,
        ):
            _check_size(*image.size, policy)
            image.load()
            return to_rgb(_upright(image))
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError("too_many_pixels") from error
    except Exception as error:
        # Decoders raise whatever their parser stumbles over (struct.error, SyntaxError, IndexError,
        # OSError, ...): for a picture from the web each of them means a damaged file.
        raise DecodeError(_damage(kind, data, error)) from error


def _upright(image: Image.Image) -> Image.Image:
    """Turn as EXIF says; where EXIF is damaged the picture stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _damage(kind: str, data: bytes, error: Exception) -> str:
    """Cut short, or damaged in another way."""
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "truncated_image"
    # Pillow knows a cut WebP only as one that cannot be read; its header knows the whole length.
    if kind == "webp" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        return "truncated_image"
    return "corrupt_image"


class ImageNormalizer:
    """One for a process: Pillow's judgment, then img2dataset's ``Resizer``.

    Not for several threads at once: ``Resizer`` redirects the process's standard streams while it
    works (to silence C libraries), so calls go through one lock and what other threads print
    meanwhile is lost.
    """

    _lock = threading.Lock()

    def __init__(self, policy: ImagePolicy | None = None) -> None:
        self.policy = policy or ImagePolicy()
        self._resize = _load_resizer(self.policy)

    def __call__(self, data: bytes) -> DecodedImage:
        """Turn downloaded bytes into what is stored.

        Raises:
            DecodeError: see :func:`decode_rgb`.
        """
        rgb = decode_rgb(data, self.policy)
        _check_size(*rgb.size, self.policy)
        stream = io.BytesIO()
        rgb.save(stream, "BMP")
        stream.seek(0)
        with self._lock:
            encoded, width, height, original_width, original_height, error = self._resize(stream)
        if error is not None:
            raise DecodeError("resize_failed")
        return DecodedImage(
            image=encoded,
            width=width,
            height=height,
            original_width=original_width,
            original_height=original_height,
            sha256=hashlib.sha256(data).hexdigest(),
        )


def _load_resizer(policy: ImagePolicy) -> Callable[[io.BytesIO], tuple[Any, ...]]:
    """img2dataset's ``Resizer``; imported late, for it takes seconds and much memory."""
    # albumentations, which it imports, calls home for its newest version otherwise.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    with warnings.catch_warnings(action="ignore"):
        from img2dataset.resizer import Resizer

    resizer: Callable[[io.BytesIO], tuple[Any, ...]] = Resizer(
        image_size=policy.image_size,
        resize_mode=policy.resize_mode,
        resize_only_if_bigger=policy.resize_only_if_bigger,
        encode_quality=policy.encode_quality,
        encode_format="jpg",
    )
    return resizer
