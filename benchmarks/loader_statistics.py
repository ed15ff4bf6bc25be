"""What views are compared by where two programs draw them; NumPy alone, for either environment."""

import numpy as np
from numpy.typing import NDArray

CROPS = [(375, 500, 0.9), (375, 500, 0.2), (256, 256, 0.08), (200, 400, 0.5)]
"""Height, width, least share of the area; in the last few tries fit."""
CROP_DRAWS = 20_000
COLOR_REPEATS = 16
"""Draws of colors for each picture, of which every second pixel is taken."""
PIXEL_PICTURES = 96


def crop_statistics(
    boxes: NDArray[np.float64], height: int, width: int
) -> dict[str, NDArray[np.float64]]:
    """Of boxes (n, 4) top, left, height, width: share of the area, aspect, place."""
    top, left, rows, columns = boxes.astype(np.float64).T
    return {
        "area": rows * columns / (height * width),
        "aspect": np.log(columns / rows),
        "top": top / np.maximum(1, height - rows),
        "left": left / np.maximum(1, width - columns),
    }


def _looks(view: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Of a view (S, S, 3): means of the channels, contrast, saturation, sharpness."""
    image = view.astype(np.float64) / 255
    light = image @ np.array([0.299, 0.587, 0.114])
    bends = 4 * light[1:-1, 1:-1]
    bends -= light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:]
    chroma = image.max(2) - image.min(2)
    more = (light.std(), chroma.mean(), np.abs(bends).mean())
    return np.array([*image.mean((0, 1)), *more])


def color_statistics(view: NDArray[np.uint8], before: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What a change of colors did to a view, as ``COLOR_NAMES``: the ratio of each."""
    return _looks(view) / np.maximum(_looks(before), 1e-3)


COLOR_NAMES = ("red", "green", "blue", "contrast", "saturation", "sharpness")
