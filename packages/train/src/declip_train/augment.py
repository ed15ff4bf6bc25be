"""Random views of images, and the one fixed view that evaluation takes.

A view is a pure function of (seed, epoch, key, number of the view): how many processes train, how
they share a batch, and where a run was interrupted change no pixel. A view is made from crop to
normalization while it lies in the processor's cache, so any number of threads can make a batch.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import declip_pixels
from declip_shards import DeclipError
from declip_train.philox import uniform_numbers
from declip_train.views import ViewParameters

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the channels (red, green, blue) of [0, 1] images: OpenAI's, which exports name."""
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the channels, as above."""
_Matrix: TypeAlias = NDArray[np.float32]
_CROP_TRIES = 10
_ASPECT = (math.log(3 / 4), math.log(4 / 3))
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""
LEAST_SIGMA = 0.3
"""Blurs up to here, in pixels, are left out: a neighbor would weigh less than half a step of 8
bits."""
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
    draws: NDArray[np.float64] = view_draws_batch(seed, [epoch], [key], view)[0]
    return draws


def view_draws_batch(
    seed: int, epochs: Sequence[int], keys: Sequence[str], view: int
) -> NDArray[np.float64]:
    """Uniform numbers (n, k) in [0, 1) for one view of each of n samples.

    Row ``i`` is a pure function of (seed, epochs[i], keys[i], view): the stream of numpy's
    ``Generator(Philox(key=...))`` for a key that is the BLAKE2b digest of the four. The streams are
    computed together, which takes a fraction of the time of so many generators.
    """
    if len(epochs) != len(keys):
        raise ValueError(f"{len(keys)} keys have {len(epochs)} epochs.")
    texts = [
        f"{seed}/{epoch}/{view}/{key}".encode("utf-8", "surrogatepass")
        for epoch, key in zip(epochs, keys, strict=True)
    ]
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    return uniform_numbers(np.frombuffer(digests, "<u8").reshape(-1, 2), _NUM_DRAWS)


def crop_box(
    draws: NDArray[np.float64], height: int, width: int, scale_min: float
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop: :func:`crop_boxes` of one view."""
    (box,) = crop_boxes(draws[None], np.array([[height, width]]), scale_min).tolist()
    return box[0], box[1], box[2], box[3]


def crop_boxes(
    draws: NDArray[np.float64], sizes: NDArray[np.integer[Any]], scale_min: float
) -> NDArray[np.int32]:
    """(n, 4) top, left, height, width of random crops: area in [scale_min, 1], aspect in
    [3/4, 4/3].

    Ten tries, then the largest centered crop of an allowed aspect, as RandomResizedCrop of
    Inception (arXiv 1409.4842) is done everywhere.

    Args:
        draws: (n, k) from :func:`view_draws_batch`.
        sizes: (n, 2) heights and widths of the pictures; 0 by 0 gives an empty box.
        scale_min: least share of the area.
    """
    tries = draws[:, _CROP].reshape(-1, _CROP_TRIES, 4)
    full = sizes.astype(np.int64)
    height, width = full[:, :1], full[:, 1:]
    area = (scale_min + (1 - scale_min) * tries[..., 0]) * (height * width)
    aspect = np.exp(_ASPECT[0] + (_ASPECT[1] - _ASPECT[0]) * tries[..., 1])
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    rows, first = np.arange(len(full)), fits.argmax(1)
    h, w = heights[rows, first], widths[rows, first]
    height, width = height[:, 0], width[:, 0]
    top = (tries[rows, first, 2] * (height - h + 1)).astype(np.int64)
    left = (tries[rows, first, 3] * (width - w + 1)).astype(np.int64)
    whole_w = np.minimum(width, np.maximum(1, np.rint(height * math.exp(_ASPECT[1]))))
    whole_h = np.minimum(height, np.maximum(1, np.rint(width / math.exp(_ASPECT[0]))))
    whole = ((height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w)
    boxes = np.where(fits.any(1), np.stack([top, left, h, w]), np.stack(whole))
    return np.ascontiguousarray(boxes.T.astype(np.int32))


def draw_flips(draws: NDArray[np.float64], parameters: ViewParameters) -> NDArray[np.bool_]:
    """(n,) whether to mirror, from uniform numbers (n, k)."""
    return draws[:, _REST + 12] < parameters.flip_probability


def color_choices(
    draws: NDArray[np.float64], parameters: ViewParameters, image_size: int
) -> tuple[
    NDArray[np.int64],
    NDArray[np.float32],
    NDArray[np.bool_],
    NDArray[np.bool_],
    NDArray[np.float32],
]:
    """The fields of :class:`ColorChoices`, of n views each, from uniform numbers (n, k)."""
    rest = draws[:, _REST:]
    spread = 2 * rest[:, 4:8] - 1
    strengths = (parameters.brightness, parameters.contrast, parameters.saturation)
    factors = np.empty_like(spread)
    factors[:, :3] = 1 + spread[:, :3] * np.array(strengths)
    factors[:, 3] = spread[:, 3] * parameters.hue * 360
    sigma = 0.1 + (parameters.blur_sigma_max - 0.1) * rest[:, 11]
    sigma = (sigma * image_size / 224).astype(np.float32)
    return (
        np.argsort(rest[:, :4], axis=1, kind="stable"),
        factors.astype(np.float32),
        rest[:, 8] < parameters.jitter_probability,
        rest[:, 9] < parameters.gray_probability,
        np.where(rest[:, 10] < parameters.blur_probability, sigma, np.float32(0)),
    )


def draw_colors(
    draws: NDArray[np.float64], parameters: ViewParameters, image_size: int
) -> ColorChoices:
    """Color choices of a view from its uniform numbers."""
    order, factors, jitter, gray, sigma = color_choices(draws[None], parameters, image_size)
    return ColorChoices(order[0], factors[0], bool(jitter[0]), bool(gray[0]), float(sigma[0]))


class _Scratch(threading.local):
    """Buffers of a thread that changes colors: memory that is new each time costs more than the
    arithmetic on it, for the kernel hands it out page by page."""

    size = 0

    def prepare(self, size: int) -> None:
        """Have buffers for views of ``size`` squared."""
        if self.size != size:
            self.size = size
            self.image: NDArray[np.float32] = np.empty((size, size, 3), np.float32)
            self.other: NDArray[np.float32] = np.empty((size, size, 3), np.float32)
            self.light: NDArray[np.float32] = np.empty((size, size), np.float32)
            self.soft: NDArray[np.float32] = np.empty((size, size), np.float32)


_scratch = _Scratch()


def _color_matrix(operation: int, amount: float, light: NDArray[np.float32] | None) -> _Matrix:
    """(3, 4): how brightness 0, contrast 1, saturation 2 and hue 3 (of HSV) move a color.

    ``light`` is the picture's brightness, which contrast asks for.
    """
    matrix = np.zeros((3, 4), np.float32)
    if operation == 3:
        np.fill_diagonal(matrix, 1)
        # Less than two turns, and not below none: what the way back from HSV takes.
        matrix[0, 3] = amount + 360 if amount < 0 else amount
        return matrix
    np.fill_diagonal(matrix, amount)
    if light is not None:
        matrix[:, 3] = (1 - amount) * float(light.mean())
    elif operation == 2:
        matrix[:, :3] += np.float32(1 - amount) * np.array(LUMA, np.float32)
    return matrix


def _jitter_once(operation: int, amount: float) -> None:
    """One of brightness 0, contrast 1, saturation 2, hue 3 on this thread's view in [0, 1].

    Each is one matrix on the colors of all pixels, which OpenCV applies in one pass.
    """
    image, other, light = _scratch.image, _scratch.other, None
    if operation == 3:
        cv2.cvtColor(image, cv2.COLOR_RGB2HSV, dst=other)
        cv2.transform(other, _color_matrix(operation, amount, None), dst=image)
        cv2.cvtColor(image, cv2.COLOR_HSV2RGB, dst=other)
    else:
        if operation == 1:
            light = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY, dst=_scratch.light)
        cv2.transform(image, _color_matrix(operation, amount, light), dst=other)
    np.clip(other, 0, 1, out=other)
    _scratch.image, _scratch.other = other, image


def _changed(view: NDArray[np.uint8], choices: ColorChoices) -> NDArray[np.float32]:
    """Jitter, gray and blur of (S, S, 3); (S, S, 3) or, where gray, (S, S) of this thread's."""
    _scratch.prepare(len(view))
    np.copyto(_scratch.image, view)
    _scratch.image /= np.float32(255)
    if choices.jitter:
        for operation in choices.order.tolist():
            amount = float(choices.factors[operation])
            if amount != (0 if operation == 3 else 1):
                _jitter_once(operation, amount)
    changed, other = _scratch.image, _scratch.other
    if choices.gray:
        changed = cv2.cvtColor(changed, cv2.COLOR_RGB2GRAY, dst=_scratch.light)
        other = _scratch.soft
    if choices.sigma > LEAST_SIGMA:
        changed = cv2.GaussianBlur(changed, (0, 0), choices.sigma, dst=other)
    return changed


def change_colors(view: NDArray[np.uint8], choices: ColorChoices) -> NDArray[np.float32]:
    """Jitter, gray and blur of (S, S, 3) uint8; returns float32 (S, S, 3) in [0, 1].

    The reference for :func:`declip_train.device_views.photometric`.
    """
    changed = _changed(view, choices)
    return np.repeat(changed[..., None], 3, 2) if changed.ndim == 2 else changed.copy()


def change_colors_into(
    view: NDArray[np.uint8], choices: ColorChoices, planes: NDArray[np.float32]
) -> None:
    """:func:`change_colors`, then normalization, into (3, S, S); makes no array of its own."""
    if not (choices.jitter or choices.gray or choices.sigma > LEAST_SIGMA):
        declip_pixels.views_to_planes(np.ascontiguousarray(view)[None], NORMALIZED, planes[None])
        return
    changed = _changed(view, choices)
    if changed.ndim == 3:
        cv2.split(changed, list(planes))
    for channel, plane in enumerate(planes):
        _normalize(changed if choices.gray else plane, channel, plane)


def _normalize(
    values: NDArray[np.float32], channel: int, out: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Normalize values of a channel in [0, 1]."""
    np.subtract(values, np.float32(IMAGE_MEAN[channel]), out=out)
    return np.divide(out, np.float32(IMAGE_STD[channel]), out=out)


_STEPS = np.arange(256, dtype=np.float32) / np.float32(255)
NORMALIZED = np.stack([_normalize(_STEPS, channel, np.empty_like(_STEPS)) for channel in range(3)])
"""(3, 256) float32: what each value of 8 bits is when normalized, by channel."""


def decode_image(data: bytes, key: str) -> NDArray[np.uint8]:
    """Encoded image -> (height, width, 3) uint8, red first, upright.

    Raises:
        DeclipError: the bytes are no image, or not all of one.
    """
    (image,) = declip_pixels.decode_pictures([data])
    if isinstance(image, str):
        raise DeclipError(
            f"the picture of sample {key!r} cannot be decoded: {image}; rerun ingest."
        )
    return image


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

    Resizing is bicubic and antialiased (:mod:`declip_pixels`), as that of the papers' and
    open_clip's RandomResizedCrop. Source: MoCo v2 (arXiv 2003.04297) for the set of that name.
    """
    draws = view_draws_batch(seed, [epoch], [key], view)
    boxes = crop_boxes(draws, np.array([image.shape[:2]]), parameters.crop_scale_min)
    pixels = np.empty((1, size, size, 3), np.uint8)
    declip_pixels.resize_views(image, boxes, draw_flips(draws, parameters), size, pixels)
    return change_colors(pixels[0], draw_colors(draws[0], parameters, size))


def normalize_into(view: NDArray[np.float32], planes: NDArray[np.float32]) -> None:
    """Write (size, size, 3) in [0, 1], normalized, into (3, size, size)."""
    for channel, plane in enumerate(planes):
        _normalize(view[..., channel], channel, plane)


def to_tensor(views: NDArray[np.float32]) -> Tensor:
    """(..., size, size, 3) in [0, 1] -> normalized float32 (..., 3, size, size)."""
    planes = torch.from_numpy(views).movedim(-1, -3).contiguous()
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    return planes.sub_(mean[:, None, None]).div_(std[:, None, None])


def eval_view(data: bytes, size: int) -> NDArray[np.uint8]:
    """The one view of evaluation, as open_clip takes it: (size, size, 3) uint8.

    Shorter side to ``size`` (bicubic), center crop: :func:`declip_pixels.decode_center_views`.

    Raises:
        DeclipError: the bytes are no image.
    """
    view: NDArray[np.uint8] = _eval_views([data], size)[0]
    return view


def eval_images(images: Sequence[bytes], size: int) -> Tensor:
    """Encoded images -> normalized float32 (N, 3, size, size), ready for the image tower.

    Raises:
        DeclipError: the bytes of one are no image.
    """
    planes = torch.empty(len(images), 3, size, size)
    declip_pixels.views_to_planes(_eval_views(images, size), NORMALIZED, planes.numpy())
    return planes


def _eval_views(images: Sequence[bytes], size: int) -> NDArray[np.uint8]:
    views = np.empty((len(images), size, size, 3), np.uint8)
    for failure in declip_pixels.decode_center_views(images, size, views):
        if failure is not None:
            raise DeclipError(f"an image for evaluation cannot be decoded: {failure}.")
    return views
