"""Pictures to views: decode, crop and resize, compiled where it can be.

Two ways with equal bytes: plain C++ on the libjpeg-turbo that Pillow brings, and Python on Pillow
and NumPy. docs/design/0006-pixels.md has the law that both keep, the reasons and the measurements.
"""

from declip_pixels.decoding import (
    decode_center_views,
    decode_pictures,
    decode_views,
    image_sizes,
    resize_views,
    views_to_planes,
)
from declip_pixels.reference import MAX_PIXELS

__all__ = [
    "MAX_PIXELS",
    "decode_center_views",
    "decode_pictures",
    "decode_views",
    "image_sizes",
    "resize_views",
    "views_to_planes",
]
