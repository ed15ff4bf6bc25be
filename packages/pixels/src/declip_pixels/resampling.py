"""The resampling law in NumPy: antialiased bicubic with whole-numbered weights.

A row (or column) of ``in`` pixels becomes one of ``out``. Output ``i`` has its center at
``(i + 0.5) * in / out`` and weighs the pixels within ``2 * max(in / out, 1)`` of it by the cubic
convolution kernel of Keys (IEEE Transactions on Acoustics, Speech and Signal Processing 29, 1981,
equation 4 with a = -0.5), stretched by ``max(in / out, 1)`` so that shrinking does not alias: the
filter that Pillow calls BICUBIC.

Weights are rounded to 1/16384 such that they add up to 1 exactly. Columns are resampled first, into
1/128 steps clipped to [0, 255]; then rows, into bytes. Every sum is of integers and exact, so the
order of additions, the width of a processor's vectors and fused operations change no bit: that is
what lets :mod:`declip_pixels.compiled` promise equal bytes. Float64 appears in the weights alone,
by operations that IEEE 754 rounds alike everywhere.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

WEIGHT_BITS = 14
"""Of a weight's fraction; 1.1, the largest weight there is, still fits 16 bits with a sign."""
MIDDLE_BITS = 7
"""Of the fraction that is kept between the passes; 255 and it fit 15 bits."""
_ONE = 1 << WEIGHT_BITS
_MIDDLE_MAX = 255 << MIDDLE_BITS
_BLOCK = 16
"""Outputs computed at once: a matrix over all of them would be mostly zeros."""
_BAND_VALUES = 1 << 22
"""Numbers handled at once: bounds the memory that a large picture takes."""

_Weights: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int16]]
"""First pixel of each output, and the weights from there on."""


class CenterWindow(NamedTuple):
    """What evaluation sees of a picture: the middle of one that is resized."""

    height: int
    """Rows of the whole picture when it is resized."""
    width: int
    """Columns of the same."""
    top: int
    """First of these rows that is seen."""
    left: int
    """First of these columns that is seen."""


def cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel at distances >= 0 in (stretched) pixels; 0 from 2 on."""
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return np.where(distance < 1.0, near, np.where(distance < 2.0, far, 0.0))


def center_window(height: int, width: int, size: int) -> CenterWindow:
    """The picture with its shorter side resized to ``size``, and the square in its middle.

    The longer side is rounded down, offsets are rounded half to even: as torchvision's Resize and
    CenterCrop have it, and open_clip by them.
    """
    shorter = min(height, width)
    rows, columns = int(size * height / shorter), int(size * width / shorter)
    return CenterWindow(rows, columns, round((rows - size) / 2), round((columns - size) / 2))


def resampling_weights(length: int, size: int, begin: int = 0, end: int | None = None) -> _Weights:
    """Where each output's pixels begin, and their weights.

    Args:
        length: pixels of a row of the input, at least 1.
        size: pixels of a row of the output, at least 1.
        begin: first of the outputs that are asked for.
        end: behind the last of them; None: all.

    Returns:
        (outputs,) first pixel, and (outputs, taps) weights in 1/16384, each row adding up to 16384;
        the last ones of a row may be 0 and lie beyond the input.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    reach = 2.0 * stretch
    centers = (np.arange(begin, size if end is None else end) + 0.5) * scale
    first = np.maximum(np.floor(centers - reach + 0.5), 0.0).astype(np.int64)
    ends = np.minimum(np.floor(centers + reach + 0.5), length).astype(np.int64)
    places = first[:, None] + np.arange(int((ends - first).max()))
    distance = np.abs((places + 0.5 - centers[:, None]) / stretch)
    weights = np.where(places < ends[:, None], cubic(distance), 0.0)
    # Rounding the running sum, not the weights, keeps their sum exact and carries what rounding
    # took from one weight over to the next. Beyond the end the sum stands still.
    running = np.cumsum(weights, axis=1)
    rounded = np.rint(running / running[:, -1:] * _ONE)
    return first, np.diff(rounded, axis=1, prepend=0.0).astype(np.int16)


def resize(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resample (height, width, 3) to (size, size, 3)."""
    height, width = picture.shape[:2]
    return _resample(picture, resampling_weights(height, size), resampling_weights(width, size))


def resize_center(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The :func:`center_window` of (height, width, 3): (size, size, 3).

    The same as resampling the whole picture and cutting out the window, which alone is made here.
    """
    height, width = picture.shape[:2]
    window = center_window(height, width, size)
    rows = resampling_weights(height, window.height, window.top, window.top + size)
    columns = resampling_weights(width, window.width, window.left, window.left + size)
    return _resample(picture, rows, columns)


def _resample(picture: NDArray[np.uint8], rows: _Weights, columns: _Weights) -> NDArray[np.uint8]:
    """Resample (height, width, 3) by the weights of outputs' rows and columns."""
    begin, end = int(rows[0][0]), int(rows[0][-1]) + rows[1].shape[1]
    middle = _resample_columns(picture[begin:end], columns)
    height, size = middle.shape[:2]
    flat = middle.reshape(height, size * 3)
    out = np.empty((len(rows[0]), size * 3), np.uint8)
    shift = WEIGHT_BITS + MIDDLE_BITS
    for outputs, places, weights in _blocks(height, (rows[0] - begin, rows[1])):
        # Up to 2**29 in sum: more than float32 holds exactly.
        sums = weights.astype(np.float64) @ flat[places].astype(np.float64)
        values = (sums.astype(np.int64) + (1 << (shift - 1))) >> shift
        out[outputs] = np.clip(values, 0, 255)
    return out.reshape(len(rows[0]), size, 3)


def _resample_columns(picture: NDArray[np.uint8], columns: _Weights) -> NDArray[np.int16]:
    """(height, width, 3) -> (height, outputs, 3) in 1/128."""
    height, width = picture.shape[:2]
    middle = np.empty((height, len(columns[0]), 3), np.int16)
    shift = WEIGHT_BITS - MIDDLE_BITS
    step = max(1, _BAND_VALUES // width)
    blocks = list(_blocks(width, columns))
    for start in range(0, height, step):
        band = slice(start, start + step)
        for channel in range(3):
            plane = picture[band, :, channel].astype(np.float32)
            for outputs, places, weights in blocks:
                # Below 2**23, so float32 is exact, whichever way a matrix product adds up.
                sums = plane[:, places] @ weights.astype(np.float32).T
                values = (sums.astype(np.int32) + (1 << (shift - 1))) >> shift
                middle[band, outputs, channel] = np.clip(values, 0, _MIDDLE_MAX)
    return middle


def _blocks(
    length: int, outputs_weights: _Weights
) -> Iterator[tuple[slice, slice, NDArray[np.int16]]]:
    """A few outputs at a time: which, of which pixels, and the matrix of weights between them."""
    first, weights = outputs_weights
    size, taps = weights.shape
    for start in range(0, size, _BLOCK):
        outputs = slice(start, min(start + _BLOCK, size))
        begin = int(first[start])
        end = min(int(first[outputs.stop - 1]) + taps, length)
        # Weights of 0 may lie beyond the input: room for them, cut off again.
        matrix = np.zeros((outputs.stop - start, end - begin + taps), np.int16)
        columns = (first[outputs] - begin)[:, None] + np.arange(taps)
        np.put_along_axis(matrix, columns, weights[outputs], axis=1)
        yield outputs, slice(begin, end), matrix[:, : end - begin]
