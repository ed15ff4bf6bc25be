"""Two small descriptions of a gray picture by which copies of it are found: shape and brightness.

They are made to be compared, by number of different bits and by difference of gray levels; how
well that works on real pictures, and why not by the difference hash alone, is in
docs/duplicates.md.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image

Gray = npt.NDArray[np.uint8]
"""(height, width), 0 black to 255 white."""

HASH_SIDE = 8
"""The hash keeps 8 x 8 coefficients: 64 bits."""
REDUCED_SIDE = 32
"""Pixels of a side of the picture that is transformed."""
NOISE = 3.0
"""Coefficients up to this count as nothing (orthonormal transform of gray levels 0 to 255).

In symmetric and in flat pictures many coefficients are zero but for rounding and the noise of
compression. Their signs are a coin's, and two copies would differ in half of them.
"""
LAYOUT_SIDE = 4
"""Fields of a side of the layout."""


def perceptual_hash(gray: Gray) -> str:
    """64-bit perceptual hash of a gray picture, as 16 hex digits; near-copies differ in few bits.

    The usual DCT hash: the picture is shrunk to 32 x 32 pixels and transformed, and a bit says
    whether one of the 8 x 8 lowest coefficients is above their median. What differs here is that
    it must also be above :data:`NOISE`, so that the fewer bits are set, the less there is to see
    in the picture: none in a flat one. The first bit, of the mean, says whether it is light.
    """
    side = (REDUCED_SIDE, REDUCED_SIDE)
    small = Image.fromarray(gray).resize(side, Image.Resampling.BOX)
    import cv2

    spectrum = cv2.dct(np.asarray(small, dtype=np.float32))[:HASH_SIDE, :HASH_SIDE].ravel()
    bits = spectrum > max(float(np.median(spectrum[1:])), NOISE)
    bits[0] = spectrum[0] > REDUCED_SIDE * 127.5
    return np.packbits(bits).tobytes().hex()


def luma_layout(gray: Gray) -> str:
    """Mean gray level of 4 x 4 equal fields, row by row, a byte each: 32 hex digits."""
    side = (LAYOUT_SIDE, LAYOUT_SIDE)
    fields = Image.fromarray(gray).resize(side, Image.Resampling.BOX)
    return np.asarray(fields, dtype=np.uint8).tobytes().hex()


def picture_hashes(gray: Gray) -> Mapping[str, str]:
    """The signals ``image_phash`` and ``image_layout``."""
    return {"image_phash": perceptual_hash(gray), "image_layout": luma_layout(gray)}
