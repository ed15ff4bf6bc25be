"""Random views of images, and the one fixed view that evaluation takes.

A view is a pure function of (seed, epoch, key, number of the view): how many processes train, how
they share a batch, and where a run was interrupted change no pixel. A view is made from crop to
normalization while it lies in the processor's cache, so any number of threads can make a batch.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from declip_shards import DeclipError
from declip_train.views import ViewParameters

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the channels (red, green, blue) of [0, 1] images: OpenAI's, which exports name."""
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the channels, as above."""
_CROP_TRIES = 10
_ASPECT = (math.log(3 / 4), math.log(4 / 3))
_LUMA = (0.299, 0.587, 0.114)
# A row of uniform numbers holds every choice of a view, used or not, at a fixed place.
_CROP = slice(0, 4 * _CROP_TRIES)
_REST = 4 * _CROP_TRIES
_NUM_DRAWS = _REST + 13

# Several processes train side by side, each with its own core.
cv2.setNumThreads(1)


class ColorChoices(NamedTuple):
    """Drawn color changes of one view."""

    order: NDArray[np.int64]
    """(4,): in which order brightness 0, contrast 1, saturation 2 and hue 3 change."""
    factors: NDArray[np.float32]
    """(4,): three factors (1: unchanged) and the hue's shift in degrees (0: unchanged)."""
    jitter: bool
    """Whether any of the above happens."""
    gray: bool
    """Whether color is removed."""
    sigma: float
    """Blur in pixels of the view; 0 for none."""


def view_draws(seed: int, epoch: int, key: str, view: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for one view of one sample: a pure function of the arguments."""
    text = f"{seed}/{epoch}/{view}/{key}".encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=number)).random(_NUM_DRAWS)


def crop_box(
    draws: NDArray[np.float64], height: int, width: int, scale_min: float
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop: area in [scale_min, 1], aspect in [3/4, 4/3].

    Ten tries, then the largest centered crop of an allowed aspect, as RandomResizedCrop of
    Inception (arXiv 1409.4842) is done everywhere.
    """
    tries = draws[_CROP].reshape(_CROP_TRIES, 4)
    area = (scale_min + (1 - scale_min) * tries[:, 0]) * (height * width)
    aspect = np.exp(_ASPECT[0] + (_ASPECT[1] - _ASPECT[0]) * tries[:, 1])
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    if fits.any():
        first = int(fits.argmax())
        w, h = int(widths[first]), int(heights[first])
        top = int(tries[first, 2] * (height - h + 1))
        left = int(tries[first, 3] * (width - w + 1))
        return top, left, h, w
    w = min(width, max(1, round(height * math.exp(_ASPECT[1]))))
    h = min(height, max(1, round(width / math.exp(_ASPECT[0]))))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_colors(
    draws: NDArray[np.float64], parameters: ViewParameters, image_size: int
) -> ColorChoices:
    """Color choices of a view from its uniform numbers."""
    rest = draws[_REST:]
    spread = 2 * rest[4:8] - 1
    strengths = (parameters.brightness, parameters.contrast, parameters.saturation)
    factors = np.empty_like(spread)
    factors[:3] = 1 + spread[:3] * np.array(strengths)
    factors[3] = spread[3] * parameters.hue * 360
    sigma = 0.1 + (parameters.blur_sigma_max - 0.1) * rest[11]
    blurred = rest[10] < parameters.blur_probability
    return ColorChoices(
        order=np.argsort(rest[:4], kind="stable"),
        factors=factors.astype(np.float32),
        jitter=bool(rest[8] < parameters.jitter_probability),
        gray=bool(rest[9] < parameters.gray_probability),
        sigma=float(np.float32(sigma * image_size / 224)) if blurred else 0.0,
    )


def _luma(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Brightness (S, S, 1) of (S, S, 3)."""
    light: NDArray[np.float32] = image[..., 0] * np.float32(_LUMA[0])
    light += image[..., 1] * np.float32(_LUMA[1])
    light += image[..., 2] * np.float32(_LUMA[2])
    return light[..., None]


def _shift_hue(image: NDArray[np.float32], degrees: np.float32) -> NDArray[np.float32]:
    """Turn the hue of (S, S, 3) by up to half a turn, in HSV."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hue = hsv[..., 0] + degrees
    # The remainder by 360, without a division: one turn more or less is all it can be.
    hsv[..., 0] = hue + np.float32(360) * ((hue < 0).astype(np.float32) - (hue >= 360))
    turned: NDArray[np.float32] = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return turned


def _jitter_once(
    image: NDArray[np.float32], operation: int, amount: np.float32
) -> NDArray[np.float32]:
    """One of brightness 0, contrast 1, saturation 2, hue 3 on (S, S, 3) in [0, 1], in place
    where it can be."""
    if operation == 3:
        return _shift_hue(image, amount)
    if operation == 0:
        image *= amount
    else:
        ground: NDArray[np.float32] | np.float32 = _luma(image)
        if operation == 1:
            ground = ground.mean()
        image -= ground
        image *= amount
        image += ground
    return np.clip(image, 0, 1, out=image)


def change_colors(view: NDArray[np.uint8], choices: ColorChoices) -> NDArray[np.float32]:
    """Jitter, gray and blur of (S, S, 3) uint8; returns float32 in [0, 1]."""
    image: NDArray[np.float32] = view.astype(np.float32)
    image /= np.float32(255)
    if choices.jitter:
        for operation in choices.order.tolist():
            amount = choices.factors[operation]
            if amount != (0 if operation == 3 else 1):
                image = _jitter_once(image, operation, amount)
    if choices.gray:
        image[:] = _luma(image)
    # Narrower than this, the kernel's neighbors weigh less than half an 8-bit step.
    if choices.sigma > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), choices.sigma)
    return image


def decode_image(data: bytes, key: str) -> NDArray[np.uint8]:
    """Encoded image -> (height, width, 3) uint8, red first.

    Raises:
        DeclipError: the bytes are no image.
    """
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise DeclipError(f"the picture of sample {key!r} cannot be decoded; rerun ingest.")
    rgb: NDArray[np.uint8] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return rgb


def resize_crop(
    image: NDArray[np.uint8], box: tuple[int, int, int, int], size: int, flip: bool
) -> NDArray[np.uint8]:
    """Cut ``box`` out of an image, resize it to ``size`` squared, mirror it if asked for.

    Shrinking averages areas (no aliasing), enlarging is bicubic.
    """
    top, left, height, width = box
    shrinks = height >= size and width >= size
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    cut = image[top : top + height, left : left + width]
    view: NDArray[np.uint8] = cv2.resize(cut, (size, size), interpolation=method)
    return view[:, ::-1] if flip else view


def random_view(
    image: NDArray[np.uint8],
    key: str,
    view: int,
    *,
    size: int,
    parameters: ViewParameters,
    seed: int,
    epoch: int,
) -> NDArray[np.float32]:
    """One random view of a decoded image: float32 (size, size, 3) in [0, 1].

    Args:
        image: (height, width, 3) uint8.
        key: of the sample.
        view: its number; different numbers of one sample are independent views.
        size: side of the view, pixels.
        parameters: how it is drawn.
        seed: of the run.
        epoch: pass over the data, from 0.

    Source: MoCo v2 (arXiv 2003.04297) for the set of that name.
    """
    height, width = image.shape[:2]
    draws = view_draws(seed, epoch, key, view)
    box = crop_box(draws, height, width, parameters.crop_scale_min)
    flip = bool(draws[_REST + 12] < parameters.flip_probability)
    return change_colors(resize_crop(image, box, size, flip), draw_colors(draws, parameters, size))


def normalize_into(view: NDArray[np.float32], planes: NDArray[np.float32]) -> None:
    """Write (size, size, 3) in [0, 1], normalized, into (3, size, size)."""
    for channel in range(3):
        np.subtract(view[..., channel], np.float32(IMAGE_MEAN[channel]), out=planes[channel])
        planes[channel] /= np.float32(IMAGE_STD[channel])


def to_tensor(views: NDArray[np.float32]) -> Tensor:
    """(..., size, size, 3) in [0, 1] -> normalized float32 (..., 3, size, size)."""
    planes = torch.from_numpy(views).movedim(-1, -3).contiguous()
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    return planes.sub_(mean[:, None, None]).div_(std[:, None, None])


def eval_view(data: bytes, size: int) -> NDArray[np.uint8]:
    """The one view of evaluation, as open_clip takes it: (size, size, 3) uint8.

    Shorter side to ``size`` (bicubic, Pillow), center crop.

    Raises:
        DeclipError: the bytes are no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError) as error:
        raise DeclipError(f"an image for evaluation cannot be decoded ({error}).") from error
    width, height = image.size
    if width <= height:
        resized = (size, int(size * height / width))
    else:
        resized = (int(size * width / height), size)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def eval_images(images: Sequence[bytes], size: int) -> Tensor:
    """Encoded images -> normalized float32 (N, 3, size, size), ready for the image tower."""
    if not images:
        return torch.empty(0, 3, size, size)
    views = np.stack([eval_view(data, size) for data in images])
    return to_tensor(views.astype(np.float32) / np.float32(255))
