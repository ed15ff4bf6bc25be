"""Encoded pictures to views: the package's calls, each on the compiled way or the Python one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from declip_pixels.compiled import CompiledPart, compiled_part, say_once
from declip_pixels.reference import (
    UnreadablePictureError,
    check_box,
    decode_picture,
    make_views,
    picture_size,
)
from declip_pixels.resampling import resize_center
from declip_shards import DeclipError

_Result = TypeVar("_Result")
Decoder: TypeAlias = Literal["auto", "native", "python"]
"""auto: compiled where it can be, else Python; native: compiled or an error; python."""


def image_sizes(data: Sequence[bytes], *, decoder: Decoder = "auto") -> NDArray[np.int32]:
    """Upright sizes from the headers: (n, 2) height and width, (0, 0) where it cannot be told.

    That a size can be told does not mean that the picture can be decoded.

    Raises:
        DeclipError: decoder "native" where there is none.
    """
    part = _part(decoder)
    if part is None:
        return np.array([picture_size(item) for item in data], np.int32).reshape(len(data), 2)
    sizes, done = part.sizes(data)
    for index in np.flatnonzero(~done).tolist():
        sizes[index] = picture_size(data[index])
    return sizes


def decode_views(
    data: Sequence[bytes],
    boxes: NDArray[np.int32],
    flips: NDArray[np.bool_],
    size: int,
    out: NDArray[np.uint8],
    *,
    num_threads: int = 1,
    decoder: Decoder = "auto",
) -> list[str | None]:
    """Decode pictures, each once, and make views of them.

    A view is what decoding the whole picture, cutting out its box, resizing that by
    :mod:`declip_pixels.resampling` and mirroring give, byte for byte, whichever way is taken and
    whatever else is in the call.

    Args:
        data: n encoded pictures: JPEG, PNG, WebP or whatever Pillow reads.
        boxes: (views, n, 4) top, left, height, width of the crops, pixels of the upright picture.
        flips: (views, n) whether a view is mirrored, left to right.
        size: side of a view, pixels.
        out: (views, n, size, size, 3), contiguous; views are written here, RGB. Where a picture
            failed they are black.
        num_threads: at work at once.
        decoder: which way; both give the same bytes.

    Returns:
        For each picture None, or why there are no views of it.

    Raises:
        DeclipError: arrays of the wrong shape, or decoder "native" where there is none.
    """
    boxes, flips = _checked_request(len(data), boxes, flips, size, out)
    part = _part(decoder)
    done = None if part is None else part.views(data, boxes, flips, out, num_threads)

    def one(index: int) -> str | None:
        targets = [out[view, index] for view in range(len(out))]
        try:
            picture = decode_picture(data[index])
            _views_of(picture, boxes[:, index], flips[:, index], targets, part)
        except UnreadablePictureError as error:
            out[:, index] = 0
            return str(error)
        return None

    return _rest(one, len(data), done, num_threads)


def decode_center_views(
    data: Sequence[bytes],
    size: int,
    out: NDArray[np.uint8],
    *,
    num_threads: int = 1,
    decoder: Decoder = "auto",
) -> list[str | None]:
    """Decode pictures and make evaluation's one view of each: the middle, resized.

    The shorter side is resized to ``size`` by :mod:`declip_pixels.resampling`, the middle square
    cut out, with torchvision's rounding of sizes and offsets
    (:func:`declip_pixels.resampling.center_window`). Only the rows and columns that are seen are
    decoded and resized. Pictures are taken as they are stored, EXIF's orientation
    notwithstanding: so do open_clip, CLIP_benchmark and torchvision, and published figures.

    Args:
        data: n encoded pictures: JPEG, PNG, WebP or whatever Pillow reads.
        size: side of a view, pixels.
        out: (n, size, size, 3), contiguous; views are written here, RGB. Where a picture failed
            they are black.
        num_threads: at work at once.
        decoder: which way; both give the same bytes.

    Returns:
        For each picture None, or why there is no view of it.

    Raises:
        DeclipError: an array of the wrong shape, or decoder "native" where there is none.
    """
    _check_target(out, (len(data), size, size, 3))
    part = _part(decoder)
    done = None if part is None else part.center_views(data, out, num_threads)

    def one(index: int) -> str | None:
        try:
            picture = decode_picture(data[index], upright=False)
            out[index] = resize_center(picture, size)
        except UnreadablePictureError as error:
            out[index] = 0
            return str(error)
        return None

    return _rest(one, len(data), done, num_threads)


def decode_pictures(
    data: Sequence[bytes], num_threads: int = 1, *, decoder: Decoder = "auto"
) -> list[NDArray[np.uint8] | str]:
    """Decode whole pictures: (height, width, 3) RGB, upright, or why not.

    Raises:
        DeclipError: decoder "native" where there is none.
    """
    part = _part(decoder)
    pictures = [None] * len(data) if part is None else part.pictures(data, num_threads)

    def one(index: int) -> NDArray[np.uint8] | str:
        try:
            return decode_picture(data[index])
        except UnreadablePictureError as error:
            return str(error)

    left = [index for index, picture in enumerate(pictures) if picture is None]
    others = dict(zip(left, _each(one, left, num_threads), strict=True))
    return [others[index] if whole is None else whole for index, whole in enumerate(pictures)]


def resize_views(
    picture: NDArray[np.uint8],
    boxes: NDArray[np.int32],
    flips: NDArray[np.bool_],
    size: int,
    out: NDArray[np.uint8],
    *,
    decoder: Decoder = "auto",
) -> None:
    """Views of a picture that is kept decoded: the bytes that :func:`decode_views` gives.

    Args:
        picture: (height, width, 3).
        boxes: (views, 4) top, left, height, width.
        flips: (views,) whether a view is mirrored, left to right.
        size: side of a view, pixels.
        out: (views, size, size, 3), contiguous; views are written here.
        decoder: which way; both give the same bytes.

    Raises:
        DeclipError: arrays of the wrong shape, or a box that does not lie in the picture.
    """
    boxes, flips = _checked_request(1, boxes[:, None], flips[:, None], size, out[:, None])
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise DeclipError(
            f"a decoded picture is bytes of shape (height, width, 3), not {picture.dtype} of shape "
            f"{picture.shape}; decode it with decode_pictures."
        )
    try:
        _views_of(picture, boxes[:, 0], flips[:, 0], list(out), _part(decoder))
    except UnreadablePictureError as error:
        raise DeclipError(f"{error}; draw boxes within the picture's own size.") from error


def views_to_planes(
    views: NDArray[np.uint8],
    tables: NDArray[np.float32],
    out: NDArray[np.float32],
    *,
    sources: NDArray[np.int64] | None = None,
    targets: NDArray[np.int64] | None = None,
    decoder: Decoder = "auto",
) -> None:
    """Look up views' bytes in tables, and set the colors apart: what normalizing them comes to.

    ``out[targets[i], channel] = tables[channel][views[sources[i], :, :, channel]]``.

    Args:
        views: (n, height, width, 3), contiguous.
        tables: (3, 256): what each byte becomes, by channel.
        out: (m, 3, height, width), contiguous.
        sources: (k,) which views; None: all.
        targets: (k,) where in ``out`` they go, none twice; None: the first k places.
        decoder: which way; both give the same bits.

    Raises:
        DeclipError: arrays of the wrong shape, or decoder "native" where there is none.
    """
    sources, targets = _checked_planes(views, tables, out, sources, targets)
    part = _part(decoder)
    if part is not None:
        part.planes(views, sources, np.ascontiguousarray(tables), out, targets)
        return
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        for channel, table in enumerate(tables):
            np.take(table, views[source, :, :, channel], out=out[target, channel], mode="clip")


def _part(decoder: Decoder) -> CompiledPart | None:
    """The compiled part where it is asked for and there is one."""
    if decoder == "python":
        return None
    if decoder not in ("auto", "native"):
        raise DeclipError(f"there is no decoder {decoder!r}; take auto, native or python.")
    part = compiled_part()
    if isinstance(part, CompiledPart):
        return part
    if decoder == "native":
        raise DeclipError(
            f"the compiled decoder is asked for but cannot be had: {part}; mend that, or set "
            "decoder to auto or python, which is slower and gives the same pixels."
        )
    say_once(part)
    return None


def _views_of(
    picture: NDArray[np.uint8],
    boxes: NDArray[np.int32],
    flips: NDArray[np.bool_],
    out: list[NDArray[np.uint8]],
    part: CompiledPart | None,
) -> None:
    """Views of a decoded picture on either way."""
    if part is None:
        make_views(picture, boxes, flips, out)
        return
    for box in boxes:
        check_box(picture.shape[0], picture.shape[1], box)
    picture, boxes = np.ascontiguousarray(picture), np.ascontiguousarray(boxes)
    for view, target in enumerate(out):
        if not part.resize(picture, boxes[view : view + 1], flips[view : view + 1], target[None]):
            raise UnreadablePictureError("there is not enough memory to resize it")


def _rest(
    one: Callable[[int], str | None],
    count: int,
    done: NDArray[np.bool_] | None,
    num_threads: int,
) -> list[str | None]:
    """Do in Python what the compiled way has not done; why each picture has no views, or None."""
    failures: list[str | None] = [None] * count
    left = range(count) if done is None else np.flatnonzero(~done).tolist()
    for index, failure in zip(left, _each(one, left, num_threads), strict=True):
        failures[index] = failure
    return failures


def _each(one: Callable[[int], _Result], indices: Sequence[int], num_threads: int) -> list[_Result]:
    if num_threads < 2 or len(indices) < 2:
        return [one(index) for index in indices]
    with ThreadPoolExecutor(min(num_threads, len(indices))) as threads:
        return list(threads.map(one, indices))


def _checked_request(
    count: int,
    boxes: NDArray[np.int32],
    flips: NDArray[np.bool_],
    size: int,
    out: NDArray[np.uint8],
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Boxes and flips as contiguous arrays of their types."""
    views = len(out)
    _check_target(out, (views, count, size, size, 3))
    if boxes.shape != (views, count, 4) or flips.shape != (views, count):
        raise DeclipError(
            f"{views} views of {count} pictures need boxes of shape {(views, count, 4)} and flips "
            f"of shape {(views, count)}; these are {boxes.shape} and {flips.shape}."
        )
    return np.ascontiguousarray(boxes, np.int32), np.ascontiguousarray(flips, np.bool_)


def _check_target(out: NDArray[np.uint8], expected: tuple[int, ...]) -> None:
    """Whether views can be written to an array.

    Raises:
        DeclipError: they cannot, or not of that size.
    """
    size = expected[-2]
    if size < 1:
        raise DeclipError(f"views of {size} pixels cannot be made; the least size is 1.")
    if out.shape != expected or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise DeclipError(
            f"views are written to a contiguous array of bytes of shape {expected}, not to one of "
            f"{out.dtype} and shape {out.shape}; allocate it with numpy.empty."
        )


def _checked_planes(
    views: NDArray[np.uint8],
    tables: NDArray[np.float32],
    out: NDArray[np.float32],
    sources: NDArray[np.int64] | None,
    targets: NDArray[np.int64] | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which views go where, when all arrays fit."""
    if views.ndim != 4 or views.shape[3] != 3 or views.dtype != np.uint8:
        raise DeclipError(
            f"views are bytes of shape (n, height, width, 3), not {views.dtype} of shape "
            f"{views.shape}; decode_views makes such."
        )
    if tables.shape != (3, 256) or tables.dtype != np.float32:
        raise DeclipError(
            f"tables are float32 of shape (3, 256), not {tables.dtype} of shape {tables.shape}; "
            "give one value for each byte and channel."
        )
    height, width = views.shape[1:3]
    if out.ndim != 4 or out.shape[1:] != (3, height, width) or out.dtype != np.float32:
        raise DeclipError(
            f"planes are written to float32 of shape (n, 3, {height}, {width}), not to {out.dtype} "
            f"of shape {out.shape}; allocate it with numpy.empty."
        )
    if not (views.flags.c_contiguous and out.flags.c_contiguous):
        raise DeclipError("views and planes must be contiguous; use numpy.ascontiguousarray.")
    first = np.arange(len(views)) if sources is None else sources.astype(np.int64)
    second = np.arange(len(first)) if targets is None else targets.astype(np.int64)
    if first.shape != second.shape or first.ndim != 1:
        raise DeclipError(
            f"{first.shape} views cannot go to {second.shape} places; name one for each."
        )
    for places, room, name in ((first, len(views), "views"), (second, len(out), "planes")):
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < room:
            raise DeclipError(
                f"there are {room} {name}, 0 to {room - 1}, so not all of {int(places.min())} to "
                f"{int(places.max())} can be meant; mend sources or targets."
            )
    return first, second
