"""The reference: whole pictures by Pillow, views by NumPy, and why a picture is refused.

Whatever the compiled way does not take comes here, so what it says of a picture that cannot be
decoded is what is said on both ways.
"""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from declip_pixels.resampling import resize

MAX_PIXELS = 178_956_970
"""Most pixels of a picture that is decoded: what Pillow opens at its own settings."""
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUIET = threading.Lock()
"""Warnings are switched off for the whole process, so by one thread at a time."""
_SOI, _SOS, _EOI = b"\xff\xd8", 0xDA, b"\xff\xd9"


class UnreadablePictureError(Exception):
    """A picture that cannot be decoded; the text says why, in words that depend on it alone."""


def picture_size(data: bytes) -> tuple[int, int]:
    """Upright height and width in pixels, from the header; (0, 0) where it cannot be told."""
    try:
        with _opened(data) as image:
            width, height = image.size
            return (width, height) if _orientation(image) >= 5 else (height, width)
    except UnreadablePictureError:
        return 0, 0


def decode_picture(data: bytes, *, upright: bool = True) -> NDArray[np.uint8]:
    """Decode a whole picture: (height, width, 3), RGB, upright by EXIF's orientation or as stored.

    Of animations the first frame; what is transparent is shown as if it were not; of 16-bit gray
    the upper byte.

    Raises:
        UnreadablePictureError: no picture, cut off, damaged, or of more than MAX_PIXELS.
    """
    with _opened(data) as image:
        # Pillow forgets the segments of EXIF and XMP with some conversions.
        turn = _TURNS.get(_orientation(image)) if upright else None
        try:
            image.load()
            if image.mode.startswith("I;16"):
                gray = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
                picture = Image.fromarray(gray).convert("RGB")
            else:
                picture = image.convert("RGB")
        except MemoryError as error:
            raise UnreadablePictureError("there is not enough memory to decode it") from error
        except Exception as error:
            raise UnreadablePictureError(_reason(error)) from error
        if _is_cut_jpeg(data):
            raise UnreadablePictureError("its file is cut off")
        return np.asarray(picture if turn is None else picture.transpose(turn))


def check_box(height: int, width: int, box: NDArray[np.int32]) -> None:
    """Whether (top, left, height, width) lies in a picture.

    Raises:
        UnreadablePictureError: it does not.
    """
    top, left, rows, columns = (int(number) for number in box)
    if (
        min(top, left) < 0
        or min(rows, columns) < 1
        or top + rows > height
        or left + columns > width
    ):
        raise UnreadablePictureError(
            f"the box of {rows} x {columns} pixels (height x width) at row {top}, column {left} "
            f"does not lie in the picture of {height} x {width}"
        )


def make_views(
    picture: NDArray[np.uint8],
    boxes: NDArray[np.int32],
    flips: NDArray[np.bool_],
    out: list[NDArray[np.uint8]],
) -> None:
    """Cut, resize and mirror.

    Args:
        picture: (height, width, 3).
        boxes: (views, 4) top, left, height, width.
        flips: (views,) whether a view is mirrored, left to right.
        out: for each view where it is written, (size, size, 3).

    Raises:
        UnreadablePictureError: a box does not lie in the picture.
    """
    for box in boxes:
        check_box(picture.shape[0], picture.shape[1], box)
    for box, flip, target in zip(boxes.tolist(), flips.tolist(), out, strict=True):
        top, left, height, width = box
        view = resize(picture[top : top + height, left : left + width], target.shape[0])
        target[...] = view[:, ::-1] if flip else view


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A picture whose header Pillow has read."""
    if not data:
        raise UnreadablePictureError("its file is empty")
    try:
        with _QUIET, warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise UnreadablePictureError(f"it has more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        # Pillow's own text names an address in memory.
        raise UnreadablePictureError("it is no picture, or one cut off in its header") from error
    except Exception as error:
        raise UnreadablePictureError(_reason(error)) from error
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UnreadablePictureError(f"it has more than {MAX_PIXELS:,} pixels")
        if min(width, height) < 1:
            raise UnreadablePictureError("it has no pixels")
        yield image


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; damaged EXIF counts as upright."""
    try:
        with _QUIET, warnings.catch_warnings(action="ignore"):
            value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _reason(error: Exception) -> str:
    text = str(error)
    if "truncated" in text.lower():
        return "its file is cut off"
    # An object's address differs from run to run.
    detail = f" ({text})" if text and " at 0x" not in text else ""
    return f"it is damaged: {type(error).__name__}{detail}"


def _is_cut_jpeg(data: bytes) -> bool:
    """Whether a JPEG's scans lack their end marker, which entropy-coded data cannot contain.

    Pillow may not miss it where all pixels have been there.
    """
    if not data.startswith(_SOI):
        return False
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        code = data[place + 1]
        if code == _SOS:
            return data.rfind(_EOI, place) < 0
        # Fill bytes and markers without a length stand alone.
        alone = code == 0xFF or code == 0x01 or 0xD0 <= code <= 0xD8
        place += (
            (1 if code == 0xFF else 2) if alone else 2 + (data[place + 2] << 8 | data[place + 3])
        )
    return False
