"""Blurring of boxes (faces, number plates) by img2dataset's formula.

Its boxes are fractions of the picture, and its strength grows with the longest side of any box:
widen each box by a tenth of its longer side, take a Gaussian whose kernel spans twice a tenth of
the longest side, and blend by the blurred mask, as ImageNet's obfuscated faces were made (Yang et
al. 2022, "A Study of Face Obfuscation in ImageNet"). It happens on the resized picture, before a
crop or a border, as there.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from declip_ingest.failures import DecodeError
from declip_ingest.resize import Pixels

Boxes = Sequence[tuple[float, float, float, float]]
"""Left, top, right, bottom of each box, in 0 to 1 of the upright picture."""

MAX_BOXES = 10_000
"""More than any detector finds; a bound for the work."""
LANE_PIXELS = 64
"""A multiple of what any processor's vector code takes at once, in pixels of three floats."""
BAND_PIXELS = 1 << 21
"""Blurred at a time, where the kernel is no larger."""
_ROUND_TRIP = ((np.arange(256, dtype=np.float32) / np.float32(255)) * 255.0).astype(np.uint8)


def check_boxes(boxes: object) -> list[tuple[float, float, float, float]]:
    """Boxes as a table's column has them, checked.

    Raises:
        DecodeError: ``bad_boxes``: anything but a list of four numbers each, left <= right and
            top <= bottom within 0 to 1.
    """
    if boxes is None:
        return []
    if isinstance(boxes, str | bytes) or not isinstance(boxes, Sequence | np.ndarray):
        raise DecodeError("bad_boxes")
    if len(boxes) > MAX_BOXES:
        raise DecodeError("bad_boxes")
    checked = []
    for box in boxes:
        try:
            left, top, right, bottom = (float(value) for value in box)
        except (TypeError, ValueError) as error:
            raise DecodeError("bad_boxes") from error
        if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
            raise DecodeError("bad_boxes")
        checked.append((left, top, right, bottom))
    return checked


def blur_boxes(pixels: Pixels, boxes: Boxes) -> Pixels:
    """Blur the boxes of a picture.

    The work is that of the boxes' surroundings, as far as the kernel reaches, not the picture's.

    Args:
        pixels: height x width x 3, uint8.
        boxes: as :func:`check_boxes` returns them; none is no change.
    """
    if not boxes:
        return pixels
    height, width = pixels.shape[:2]
    marked, kernel = _marked(boxes, width, height)
    # What img2dataset's arithmetic makes of pixels that no box touches: some lose 1 to rounding.
    result: Pixels = np.asarray(cv2.LUT(pixels, _ROUND_TRIP), np.uint8)
    if not marked:
        return result
    reach = kernel // 2
    left, top = (max(0, min(box[i] for box in marked) - reach) for i in (0, 1))
    right = min(width, max(box[2] for box in marked) + reach)
    bottom = min(height, max(box[3] for box in marked) + reach)
    # In bands of rows, for the intermediates take several times the memory of the picture.
    step = max(kernel, BAND_PIXELS // (right - left))
    for row in range(top, bottom, step):
        band = slice(row, min(row + step, bottom)), slice(left, right)
        result[band] = _blurred(pixels, marked, kernel, *band)
    return result


def _blurred(
    pixels: Pixels, marked: Sequence[tuple[int, int, int, int]], kernel: int, *part: slice
) -> Pixels:
    """The pixels of a part (rows, columns), computed with as much around it as they depend on."""
    rows = _around(part[0], kernel, pixels.shape[0])
    columns = _around(part[1], kernel, pixels.shape[1])
    image = pixels[rows, columns].astype(np.float32) / np.float32(255)
    # Three channels, though they are alike: OpenCV's rounding differs with their number.
    mask = np.zeros(image.shape, np.float32)
    for box in marked:
        across = (max(0, box[i] - columns.start) for i in (0, 2))
        down = (max(0, box[i] - rows.start) for i in (1, 3))
        mask[slice(*down), slice(*across)] = 1
    inner = (
        slice(part[0].start - rows.start, part[0].stop - rows.start),
        slice(part[1].start - columns.start, part[1].stop - columns.start),
    )
    # A deviation of 0 has OpenCV derive it from the kernel.
    share = cv2.GaussianBlur(mask, (kernel, kernel), 0)[inner]
    blurred = cv2.GaussianBlur(image, (kernel, kernel), 0)[inner]
    mixed = image[inner] * (1 - share) + blurred * share
    result: Pixels = (mixed * 255.0).astype(np.uint8)
    return result


def _marked(boxes: Boxes, width: int, height: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """The widened boxes that hold any pixel, in pixels, and the kernel's side."""
    marked = []
    longest = 0
    for box in boxes:
        left, right = int(box[0] * width), int(box[2] * width)
        top, bottom = int(box[1] * height), int(box[3] * height)
        side = max(right - left, bottom - top)
        longest = max(longest, side)
        margin = 0.1 * side
        # img2dataset's limits: the last row and column stay as they are.
        left, right = (min(max(int(x), 0), width - 1) for x in (left - margin, right + margin))
        top, bottom = (min(max(int(y), 0), height - 1) for y in (top - margin, bottom + margin))
        if left < right and top < bottom:
            marked.append((left, top, right, bottom))
    return marked, max(3, 2 * math.ceil(0.1 * longest) + 1)


def _around(part: slice, kernel: int, size: int) -> slice:
    """What a blur of the pixels ``part`` looks at on one axis of ``size`` pixels.

    The cuts lie so that OpenCV's vector code meets the same pixels in the same lanes as in the
    whole picture, for its last few of a row are rounded otherwise.
    """
    start = max(0, part.start - kernel // 2) // LANE_PIXELS * LANE_PIXELS
    return slice(start, min(size, part.stop + kernel // 2 + LANE_PIXELS))
