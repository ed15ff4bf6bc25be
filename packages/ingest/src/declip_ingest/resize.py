"""img2dataset's resize modes: where the pixels go, and its arithmetic on arrays.

Which filter, which rounding and which corner come from img2dataset 1.47's ``Resizer`` with its
defaults (``INTER_AREA`` down, ``INTER_LANCZOS4`` up, white borders), so that :func:`resize_exact`
gives the very pixels; a property test holds it to that class. :func:`resize_fast` comes near them
for less; docs/design/0003-decoding.md says how near, and where it does not try.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from declip_ingest.image_policy import ResizeMode

Pixels = npt.NDArray[np.uint8]
"""Height x width x 3."""

HALF_FROM, QUARTER_FROM = 3.6, 12.0
"""Source over target from which a JPEG is decoded at a half, and at a quarter, of its size.

libjpeg-turbo has vector code for these scales alone. What is left to do is then a ratio of 1.8 or
3 at least, for the nearer the target the more the DCT's low-pass shows.
"""
DOUBLE_BELOW = 3.5
"""Ratio under which twice two linear samples a pixel stand for its area well enough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResizePlan:
    """What becomes of a picture of a given size."""

    width: int
    """Pixels after the resize, before any crop or border."""
    height: int
    """Pixels after the resize, before any crop or border."""
    is_downscale: bool
    """Whether img2dataset takes it for a picture to be made smaller, which chooses the filter."""
    crop: int | None = None
    """Side of the square cut from the middle."""
    border: int | None = None
    """Side of the square it is laid upon."""

    def final_size(self) -> tuple[int, int]:
        """Width and height of what is stored."""
        if self.crop is not None:
            return self.crop, self.crop
        if self.border is not None:
            return max(self.border, self.width), max(self.border, self.height)
        return self.width, self.height


def plan_resize(
    width: int, height: int, *, mode: ResizeMode, size: int, only_if_bigger: bool
) -> ResizePlan:
    """Where img2dataset's modes bring a picture of this size (upright, in pixels)."""
    by_shorter = mode in ("keep_ratio", "center_crop")
    side = min(width, height) if by_shorter else max(width, height)
    is_downscale = side > size
    if mode == "no" or (only_if_bigger and not is_downscale):
        return ResizePlan(width=width, height=height, is_downscale=False)
    scale = size / side
    return ResizePlan(
        width=max(1, round(width * scale)),
        height=max(1, round(height * scale)),
        is_downscale=is_downscale,
        crop=size if mode == "center_crop" else None,
        border=size if mode == "border" else None,
    )


def resize_exact(pixels: Pixels, plan: ResizePlan) -> Pixels:
    """The resize alone, by img2dataset's filter."""
    if pixels.shape[:2] == (plan.height, plan.width):
        return pixels
    filter_ = cv2.INTER_AREA if plan.is_downscale else cv2.INTER_LANCZOS4
    return _array(cv2.resize(pixels, (plan.width, plan.height), interpolation=filter_))


def decode_eighths(ratio: float) -> int:
    """Eighths of its size at which a JPEG is decoded whose source is ``ratio`` times the target."""
    if ratio >= QUARTER_FROM:
        return 2
    return 4 if ratio >= HALF_FROM else 8


def resize_fast(
    pixels: Pixels, size: tuple[int, int], covered: tuple[float, float] | None = None
) -> Pixels:
    """Make a picture smaller, nearly as ``INTER_AREA`` does.

    ``INTER_AREA`` runs without vector code at ratios that are no whole numbers. Under
    :data:`DOUBLE_BELOW` two linear samples a pixel and axis are taken instead, and averaged two by
    two, both of which have it.

    Args:
        pixels: height x width x 3.
        size: width and height of the result, none larger than the picture's.
        covered: columns and rows that the picture covers, where a scaled decode rounded up: 357.5
            of 358, say. Leaving that out would move the picture's far edge by half a pixel.
    """
    width, height = size
    columns, rows = covered or (pixels.shape[1], pixels.shape[0])
    samples = 2 if min(columns / width, rows / height) < DOUBLE_BELOW else 1
    # With factors in place of a size OpenCV scales by them exactly, and makes as many pixels as the
    # rounded-up picture has; the few too many are cut off.
    sampled = cv2.resize(
        pixels,
        None,
        fx=samples * width / columns,
        fy=samples * height / rows,
        interpolation=cv2.INTER_AREA if samples == 1 else cv2.INTER_LINEAR,
    )
    sampled = sampled[: samples * height, : samples * width]
    if samples == 1:
        return _array(sampled)
    return _array(cv2.resize(sampled, size, interpolation=cv2.INTER_AREA))


def frame(pixels: Pixels, plan: ResizePlan) -> Pixels:
    """Crop to the middle, or lay upon a white square, as the plan has it."""
    height, width = pixels.shape[:2]
    if plan.crop is not None:
        top, left = (height - plan.crop) // 2, (width - plan.crop) // 2
        pixels = pixels[top : top + plan.crop, left : left + plan.crop]
    if plan.border is not None:
        down, right = max(0, plan.border - height), max(0, plan.border - width)
        if down or right:
            edges = (down // 2, down - down // 2, right // 2, right - right // 2)
            pixels = _array(
                cv2.copyMakeBorder(pixels, *edges, cv2.BORDER_CONSTANT, value=(255, 255, 255))
            )
    return pixels


def _array(result: Any) -> Pixels:
    """cv2's stubs say too little of what it returns."""
    checked: Pixels = np.asarray(result, np.uint8)
    return checked
