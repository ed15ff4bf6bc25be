"""Colors of views changed in batches, on any device: jitter, gray, blur and normalization.

The choices are drawn on the host, each sample's in its own order (:mod:`declip_train.augment`), and
stay there: which rows an operation is for is then known without asking the device. The CPU's way,
one view after the other, is the reference (:func:`declip_train.augment.change_colors`); the numbers
here differ from it by the rounding of float32 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from declip_train.augment import (
    IMAGE_MEAN,
    IMAGE_STD,
    LEAST_SIGMA,
    LUMA,
    color_choices,
)
from declip_train.views import ViewParameters

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_CHUNK_BYTES = 256 * 2**20
"""Float32 pixels of the views that are worked on at once; about four times as much is in use."""


@dataclass(frozen=True, kw_only=True)
class ColorBatch:
    """Drawn color changes of n views; the tensors lie on the host, pinned or not."""

    order: Tensor
    """(n, 4) int64: in which order brightness 0, contrast 1, saturation 2 and hue 3 change."""
    factors: Tensor
    """(n, 4) float32: three factors (1: unchanged), the hue's shift in degrees (0: unchanged)."""
    jitter: Tensor
    """(n,) bool: whether any of the above happens."""
    gray: Tensor
    """(n,) bool: whether color is removed."""
    sigma: Tensor
    """(n,) float32: blur in pixels of the view; 0 for none."""

    def __len__(self) -> int:
        return len(self.gray)

    def map(self, change: Callable[[Tensor], Tensor]) -> ColorBatch:
        """The batch with ``change`` done to each tensor: slicing, pinning."""
        return ColorBatch(**{name: change(value) for name, value in vars(self).items()})

    def narrow(self, first: int, rows: int) -> ColorBatch:
        """``rows`` rows from ``first`` on, as views of the same memory."""
        return self.map(lambda value: value.narrow(0, first, rows))

    def pin_memory(self) -> ColorBatch:
        """The batch in memory that a GPU can copy from by itself."""
        return self.map(lambda value: value.pin_memory())


def draw_color_batch(
    draws: NDArray[np.float64], parameters: ViewParameters, size: int
) -> ColorBatch:
    """Color choices of n views from their uniform numbers (n, k), as
    :func:`declip_train.augment.draw_colors` has them one by one.

    Args:
        draws: from :func:`declip_train.augment.view_draws_batch`.
        parameters: how views are drawn.
        size: side of a view, pixels.
    """
    order, factors, jitter, gray, sigma = map(
        torch.from_numpy, color_choices(draws, parameters, size)
    )
    return ColorBatch(order=order, factors=factors, jitter=jitter, gray=gray, sigma=sigma)


def _luma(image: Tensor) -> Tensor:
    """Brightness (n, S, 1, S) of (n, S, 3, S)."""
    light = image[:, :, 0] * LUMA[0]
    light += image[:, :, 1] * LUMA[1]
    light += image[:, :, 2] * LUMA[2]
    return light[:, :, None]


def _shift_hue(image: Tensor, degrees: Tensor) -> Tensor:
    """Turn the hue of (n, S, 3, S) in HSV by (n,) degrees, up to half a turn."""
    high, low = image.amax(2), image.amin(2)
    spread = high - low
    red, green, blue = image.unbind(2)
    # Sixths of a turn; where there is no color any hue will do, and the division must not trip.
    part = spread.clamp(min=torch.finfo(torch.float32).tiny)
    sixths = torch.where(
        high == red,
        (green - blue) / part,
        torch.where(high == green, (blue - red) / part + 2, (red - green) / part + 4),
    )
    sixths += degrees[:, None, None] / 60
    turned = torch.empty_like(image)
    for channel, offset in enumerate((5, 3, 1)):
        place = torch.remainder(sixths + offset, 6)
        share = torch.minimum(place, 4 - place).clamp_(0, 1)
        torch.addcmul(high, spread, share, value=-1, out=turned[:, :, channel])
    return turned


def _scale(image: Tensor, operations: Tensor, amounts: Tensor) -> None:
    """Brightness, contrast or saturation of (n, S, 3, S), each row its own, in place: every one
    of them moves a pixel away from, or towards, black, the mean brightness or its own."""
    light = _luma(image)
    mean = light.mean((1, 2, 3))
    own = ((1 - amounts) * (operations == _SATURATION))[:, None, None, None]
    base = ((1 - amounts) * (operations == _CONTRAST) * mean)[:, None, None, None]
    image *= amounts[:, None, None, None]
    image += light.mul_(own).add_(base)
    image.clamp_(0, 1)


def _jitter(image: Tensor, colors: ColorBatch) -> None:
    """Change the colors of (n, S, 3, S) in [0, 1], each row in its own order, in place."""
    device = image.device
    for place in range(4):
        operations = colors.order[:, place]
        amounts = colors.factors.gather(1, operations[:, None])[:, 0]
        unchanged = torch.where(operations == _HUE, 0.0, 1.0)
        works = colors.jitter & (amounts != unchanged)
        turns = works & (operations == _HUE)
        (rows,) = turns.nonzero(as_tuple=True)
        if len(rows):
            there = rows.to(device, non_blocking=True)
            angles = amounts[rows].to(device, non_blocking=True)
            image[there] = _shift_hue(image[there], angles).clamp_(0, 1)
        scales = works & ~turns
        if bool(scales.any()):
            # A row that is not to change is scaled by 1.
            factors = torch.where(scales, amounts, torch.ones(()))
            _scale(
                image,
                operations.to(device, non_blocking=True),
                factors.to(device, non_blocking=True),
            )


@lru_cache(maxsize=8)
def _reflections(size: int, radius: int, device: torch.device) -> Tensor:
    """(2 radius + 1, size * size): which pixel of a line each step of a kernel meets from each
    pixel, mirrored at the ends without repeating them."""
    steps = np.arange(-radius, radius + 1)[:, None] + np.arange(size)
    period = max(1, 2 * size - 2)
    met = np.abs((steps + size - 1) % period - (size - 1)) if size > 1 else np.zeros_like(steps)
    table = np.zeros((2 * radius + 1, size, size), np.float32)
    np.put_along_axis(table, met[..., None], 1, axis=2)
    return torch.from_numpy(table.reshape(2 * radius + 1, size * size)).to(device)


def _kernels(sigma: Tensor) -> Tensor:
    """Gaussian kernels (n, 2 radius + 1) of (n,) widths, as OpenCV cuts them off: four standard
    deviations to each side, rounded."""
    wide = sigma.double()
    radii = torch.round(wide * 8 + 1).long().bitwise_or(1) // 2
    steps = torch.arange(-int(radii.max()), int(radii.max()) + 1)
    weights = torch.exp(steps**2 / (-2 * wide[:, None] ** 2))
    weights *= steps.abs() <= radii[:, None]
    return (weights / weights.sum(1, keepdim=True)).float()


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Blur (n, S, 3, S), each row by its own width (host, (n,)).

    A line's blur with its mirrored ends is a matrix product, and so are all lines' of a picture.
    """
    number, size = image.shape[:2]
    kernels = _kernels(sigma).to(image.device, non_blocking=True)
    table = _reflections(size, kernels.shape[1] // 2, image.device)
    matrices = (kernels @ table).view(number, size, size)
    down = torch.bmm(matrices, image.reshape(number, size, 3 * size))
    along = torch.bmm(down.view(number, size * 3, size), matrices.transpose(1, 2))
    return along.view(number, size, 3, size)


def _chunk(images: Tensor, colors: ColorBatch, planes: Tensor) -> None:
    """:func:`photometric` of views that fit in memory together, into (n, 3, S, S)."""
    device = images.device
    image = images.movedim(3, 2).to(torch.float32, memory_format=torch.contiguous_format)
    image = image.div_(255)
    if bool(colors.jitter.any()):
        _jitter(image, colors)
    (rows,) = colors.gray.nonzero(as_tuple=True)
    if len(rows):
        there = rows.to(device, non_blocking=True)
        image[there] = _luma(image[there]).expand(-1, -1, 3, -1)
    (rows,) = (colors.sigma > LEAST_SIGMA).nonzero(as_tuple=True)
    if len(rows):
        there = rows.to(device, non_blocking=True)
        image[there] = _blur(image[there], colors.sigma[rows])
    mean = torch.tensor(IMAGE_MEAN).to(device, non_blocking=True)
    scale = (1 / torch.tensor(IMAGE_STD)).to(device, non_blocking=True)
    torch.sub(image.transpose(1, 2), mean[:, None, None], out=planes)
    planes *= scale[:, None, None]


@torch.no_grad()
def photometric(images: Tensor, colors: ColorBatch) -> Tensor:
    """Change the colors of views as drawn, and normalize them.

    Args:
        images: (n, S, S, 3) uint8, cropped, resized and mirrored, on any device.
        colors: the choices of the n views, on the host.

    Returns:
        float32 (n, 3, S, S) on the images' device: what :func:`declip_train.augment.change_colors`
        and normalization give, up to rounding. Memory beyond the result: about 1 GB, whatever n.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"views are {tuple(images.shape)}, but must be (n, S, S, 3).")
    if images.dtype != torch.uint8:
        raise ValueError(f"views are {images.dtype}, but must be torch.uint8.")
    number, size = images.shape[:2]
    if number != len(colors):
        raise ValueError(f"{number} views have the color choices of {len(colors)}.")
    planes = torch.empty((number, 3, size, size), device=images.device)
    rows = max(1, _CHUNK_BYTES // (12 * size * size))
    for first in range(0, number, rows):
        some = min(rows, number - first)
        part = planes.narrow(0, first, some)
        _chunk(images.narrow(0, first, some), colors.narrow(first, some), part)
    return planes
