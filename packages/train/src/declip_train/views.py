"""Named sets of parameters of random views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["AUGMENTATIONS", "ViewParameters"]


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """How a random view of an image is drawn; probabilities from 0 to 1."""

    crop_scale_min: float
    """Least share of the image's area that a crop keeps; the most is 1."""
    jitter_probability: float
    """Of changing brightness, contrast, saturation and hue, in random order."""
    brightness: float
    """Factor drawn from [1 - x, 1 + x]."""
    contrast: float
    """Factor drawn from [1 - x, 1 + x]."""
    saturation: float
    """Factor drawn from [1 - x, 1 + x]."""
    hue: float
    """Shift drawn from [-x, x], in turns of the color wheel; at most 0.5."""
    gray_probability: float
    """Of removing all color."""
    blur_probability: float
    """Of a Gaussian blur."""
    blur_sigma_max: float
    """Largest standard deviation of the blur in pixels of a 224-pixel view; smaller views scale it
    down. The least is 0.1."""
    flip_probability: float
    """Of mirroring left and right."""


# MoCo v2 (arXiv 2003.04297), which DeCLIP takes for both of its views.
_MOCO_V2 = ViewParameters(
    crop_scale_min=0.2,
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    gray_probability=0.2,
    blur_probability=0.5,
    blur_sigma_max=2.0,
    flip_probability=0.5,
)

AUGMENTATIONS: Mapping[str, ViewParameters] = {
    # RandomResizedCrop and nothing else: the views of the CLIP baseline (method: SLIP's and
    # DeCLIP's CLIP configurations).
    "light": ViewParameters(
        crop_scale_min=0.5,
        jitter_probability=0.0,
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        hue=0.0,
        gray_probability=0.0,
        blur_probability=0.0,
        blur_sigma_max=0.1,
        flip_probability=0.0,
    ),
    "moco_v2": _MOCO_V2,
    # SLIP's own views of self-supervision: MoCo v2's with smaller crops.
    "slip_ssl": replace(_MOCO_V2, crop_scale_min=0.08),
    # For drawings whose captions name colors: crops that keep the subject, colors that stay
    # themselves.
    "demo": ViewParameters(
        crop_scale_min=0.5,
        jitter_probability=0.5,
        brightness=0.3,
        contrast=0.3,
        saturation=0.2,
        hue=0.02,
        gray_probability=0.05,
        blur_probability=0.1,
        blur_sigma_max=2.0,
        flip_probability=0.5,
    ),
}
"""Named sets of view parameters; each value can be overridden by the setting of its name."""
