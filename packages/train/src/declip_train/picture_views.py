"""Views of pictures: read, decoded once for all views, and colored, by a few threads.

A thread takes some rows of a batch from their tars to their places in the batch's own memory; what
is not reading, decoding and resizing is done for many rows at once. Threads, not processes: the
compiled decoder and OpenCV let go of Python's lock, and nothing is copied between processes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from declip_pixels import (
    decode_pictures,
    decode_views,
    image_sizes,
    resize_views,
    views_to_planes,
)
from declip_shards import DeclipError
from declip_train.augment import (
    LEAST_SIGMA,
    NORMALIZED,
    ColorChoices,
    change_colors_into,
    color_choices,
    crop_boxes,
    draw_flips,
    view_draws_batch,
)
from declip_train.batch_memory import BatchMemory
from declip_train.batch_order import BatchShare
from declip_train.device_views import ColorBatch, draw_color_batch
from declip_train.failed_samples import FailedSample, FailedSamples, stand_ins
from declip_train.loader_clock import PhaseClock
from declip_train.samples import TrainingSamples
from declip_train.settings import TrainSettings
from declip_train.views import ViewParameters

__all__ = ["PictureViews", "ViewMaker"]

_ROWS_PER_TASK = 32
"""Rows that a thread takes at once, at most: enough to work on many at a time, few enough that
threads end together."""
_STAND_INS = 16
"""Samples that are tried in place of one that fails."""


class PictureViews(NamedTuple):
    """The pictures' part of a batch."""

    indices: NDArray[np.int64]
    """(n,): the samples whose pictures these are: the ones asked for, or their stand-ins."""
    images: Tensor
    """As ``Batch.images``."""
    colors: ColorBatch | None
    """As ``Batch.colors``."""


@dataclass(kw_only=True)
class _Job:
    """A batch in the making; threads write to different rows of it."""

    indices: NDArray[np.int64]
    epochs: NDArray[np.int64]
    keys: list[str]
    draws: list[NDArray[np.float64]]
    """For each view, uniform numbers (n, k)."""
    images: Tensor
    tasks: list[Future[None]]


class ViewMaker:
    """Makes the views of batches.

    Memory: the batches in the making, kept to be used again when they are done with, and, of each
    thread, up to 32 encoded pictures with their
    8-bit views; ``decoded_cache_megabytes`` of decoded pictures that stay.

    Args:
        samples: whose pictures to read.
        settings: views, seed, decoder, room for decoded pictures.
        num_threads: threads that work; 1: whoever asks does the work.
        failures: is told of pictures that cannot be used.
        clock: is told what time was spent on.
        on_device: leave the colors as they are, and say how they are to change.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        settings: TrainSettings,
        *,
        num_threads: int,
        failures: FailedSamples,
        clock: PhaseClock,
        on_device: bool,
    ) -> None:
        self.samples, self.settings, self.num_threads = samples, settings, num_threads
        self.failures, self.clock, self.on_device = failures, clock, on_device
        self.size = settings.model_config.vision.image_size
        method = settings.method_parts
        rest = settings.ssl_view_parameters if method.has("simclr") else settings.view_parameters
        self.views: list[ViewParameters] = [
            settings.view_parameters,
            *[rest] * (method.num_views - 1),
        ]
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._cache_room = settings.decoded_cache_megabytes * 1_000_000
        self._cache_lock = threading.Lock()
        self._local = threading.local()
        self._memory = BatchMemory()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.num_threads, "views")

    def close(self) -> None:
        """End the threads; work that has not begun is left."""
        if "_threads" in self.__dict__:
            self._threads.shutdown(wait=True, cancel_futures=True)
            del self.__dict__["_threads"]

    def start(self, share: BatchShare, *, pinned: bool = False) -> Callable[[], PictureViews]:
        """Begin to make the views of some samples.

        Args:
            share: which samples, and the epoch of each.
            pinned: whether the images lie in memory that a GPU copies from by itself.

        Returns:
            Waits for the views. It raises DeclipError where more pictures fail than the error
            budget allows, or a sample and all that were tried in its place.
        """
        number, size = len(share.indices), self.size
        shape: tuple[int, ...] = (len(self.views), number, 3, size, size)
        if self.on_device:
            shape = (len(self.views), number, size, size, 3)
        job = _Job(
            indices=share.indices.copy(),
            epochs=share.epochs,
            keys=list(self.samples.keys_of(share.indices)),
            draws=[],
            images=self._images(shape, pinned),
            tasks=[],
        )
        with self.clock.phase("augment"):
            streams = share.streams(job.keys)
            job.draws = [self._draw(streams, job.epochs, view) for view in range(len(self.views))]
        step = max(1, min(_ROWS_PER_TASK, -(-number // (2 * self.num_threads))))
        parts = [np.arange(first, min(first + step, number)) for first in range(0, number, step)]
        if self.num_threads == 1:
            for rows in parts:
                self._fill(job, rows)
        else:
            job.tasks = [self._threads.submit(self._fill, job, rows) for rows in parts]
        return lambda: self._finish(job)

    def _images(self, shape: Sequence[int], pinned: bool) -> Tensor:
        """Where a batch's views go."""
        dtype = torch.uint8 if self.on_device else torch.float32
        if pinned:
            # Torch itself keeps pinned memory to use it again.
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
        return self._memory.empty(shape, dtype)

    def _finish(self, job: _Job) -> PictureViews:
        try:
            for task in job.tasks:
                task.result()
        except BaseException:
            for task in job.tasks:
                task.cancel()
            raise
        colors = None
        if self.on_device:
            parts = [
                draw_color_batch(draws, parameters, self.size)
                for draws, parameters in zip(job.draws, self.views, strict=True)
            ]
            colors = ColorBatch(
                **{name: torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])}
            )
        return PictureViews(job.indices, job.images, colors)

    def _draw(
        self, keys: Sequence[str], epochs: NDArray[np.int64], view: int
    ) -> NDArray[np.float64]:
        return view_draws_batch(self.settings.seed, epochs.tolist(), keys, view)

    def _fill(self, job: _Job, rows: NDArray[np.int64]) -> None:
        """Make some rows, with other samples where pictures fail."""
        reasons = self._make(job, rows)
        tried = {
            row: stand_ins(
                len(self.samples),
                seed=self.settings.seed,
                epoch=int(job.epochs[row]),
                key=job.keys[row],
            )
            for row in reasons
        }
        for _ in range(_STAND_INS):
            if not reasons:
                return
            for row, reason in reasons.items():
                self._replace(job, row, next(tried[row]), reason)
            reasons = self._make(job, np.array(sorted(reasons)))
        if reasons:
            row, reason = next(iter(reasons.items()))
            raise DeclipError(
                f"a sample and {_STAND_INS} others in its place could not be read or decoded, the "
                f"last {job.keys[row]!r}: {reason}. Mend the shards (rerun ingest for them)."
            )

    def _replace(self, job: _Job, row: int, index: int, reason: str) -> None:
        """Put another sample into a row."""
        epoch, failed = int(job.epochs[row]), job.keys[row]
        (key,) = self.samples.keys_of(np.array([index]))
        self.failures.add(FailedSample(epoch=epoch, key=failed, reason=reason, replaced_by=key))
        job.indices[row], job.keys[row] = index, key
        for view, draws in enumerate(job.draws):
            draws[row] = self._draw([key], job.epochs[row : row + 1], view)[0]

    def _make(self, job: _Job, rows: NDArray[np.int64]) -> dict[int, str]:
        """Make some rows; returns why others could not be made."""
        indices = job.indices[rows]
        views = self._buffer(job, rows)
        with self._cache_lock:
            kept = {n: self._cache.get(i) for n, i in enumerate(indices.tolist())}
        known = [n for n, picture in kept.items() if picture is not None]
        others = [n for n, picture in kept.items() if picture is None]
        pictures = [kept[n] for n in known]
        reasons: dict[int, str] = {}
        if others:
            with self.clock.phase("fetch"):
                read = self.samples.read_images(indices[others])
            reasons = {n: why for n, why in zip(others, read, strict=True) if isinstance(why, str)}
            places = [n for n in others if n not in reasons]
            data = [item for item in read if not isinstance(item, str)]
            if self._cache_room > 0:
                decoded = self._keep(indices[places], data)
                reasons |= {
                    n: p for n, p in zip(places, decoded, strict=True) if isinstance(p, str)
                }
                known += [n for n in places if n not in reasons]
                pictures += [p for p in decoded if not isinstance(p, str)]
            else:
                reasons |= self._decode(job, rows, np.array(places, np.int64), data, views)
        for n, picture in zip(known, pictures, strict=True):
            assert picture is not None
            self._resize(job, rows[n], picture, views[:, n])
        good = np.array([n for n in range(len(rows)) if n not in reasons], np.int64)
        self._write(job, rows, good, views)
        return {int(rows[n]): reason for n, reason in reasons.items()}

    def _buffer(self, job: _Job, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Where the 8-bit views (views, n, size, size, 3) of some rows are made, contiguous: in the
        batch itself, or in memory of this thread's that it uses again and again."""
        shape = (len(self.views), len(rows), self.size, self.size, 3)
        span = _span(rows)
        if self.on_device and len(self.views) == 1 and span is not None:
            own: NDArray[np.uint8] = job.images.numpy()[:, span]
            return own
        length = math.prod(shape)
        memory: NDArray[np.uint8] | None = getattr(self._local, "memory", None)
        if memory is None or len(memory) < length:
            memory = self._local.memory = np.empty(length, np.uint8)
        return memory[:length].reshape(shape)

    def _boxes(
        self, job: _Job, rows: NDArray[np.int64], sizes: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Crops (views, n, 4) of pictures of ``sizes`` (n, 2), and which to mirror (views, n)."""
        with self.clock.phase("augment"):
            drawn = [draws[rows] for draws in job.draws]
            pairs = list(zip(drawn, self.views, strict=True))
            boxes = [crop_boxes(draws, sizes, view.crop_scale_min) for draws, view in pairs]
            flips = [draw_flips(draws, view) for draws, view in pairs]
            return np.stack(boxes), np.stack(flips)

    def _decode(
        self,
        job: _Job,
        rows: NDArray[np.int64],
        places: NDArray[np.int64],
        data: Sequence[bytes],
        views: NDArray[np.uint8],
    ) -> dict[int, str]:
        """Views of the encoded pictures at ``places`` of ``rows``, each decoded once and no further
        than its crops reach; returns why others have none."""
        if not len(places):
            return {}
        with self.clock.phase("decode"):
            sizes = image_sizes(data, decoder=self.settings.decoder)
        # What has no size fails to be decoded, too, and that is where the reason comes from.
        boxes, flips = self._boxes(job, rows[places], np.maximum(sizes, 1))
        whole = len(places) == len(rows)
        out = views if whole else np.empty((len(views), len(places), *views.shape[2:]), np.uint8)
        with self.clock.phase("decode"):
            found = decode_views(data, boxes, flips, self.size, out, decoder=self.settings.decoder)
        if not whole:
            views[:, places] = out
        reasons: dict[int, str] = {}
        for place, reason, smallest in zip(
            places.tolist(), found, sizes.min(axis=1).tolist(), strict=True
        ):
            if reason is not None or smallest < 1:
                reasons[place] = reason or "its size cannot be told"
        return reasons

    def _keep(
        self, indices: NDArray[np.int64], data: Sequence[bytes]
    ) -> list[NDArray[np.uint8] | str]:
        """Decode whole pictures, and keep them as long as there is room."""
        with self.clock.phase("decode"):
            decoded = decode_pictures(data, decoder=self.settings.decoder)
        with self._cache_lock:
            for index, picture in zip(indices.tolist(), decoded, strict=True):
                if isinstance(picture, str) or index in self._cache or self._cache_room <= 0:
                    continue
                self._cache_room -= picture.nbytes
                if self._cache_room >= 0:
                    self._cache[index] = picture
        return decoded

    def _resize(
        self, job: _Job, row: np.int64, picture: NDArray[np.uint8], out: NDArray[np.uint8]
    ) -> None:
        """Views of a picture that is kept decoded."""
        size = np.array([picture.shape[:2]], np.int32)
        boxes, flips = self._boxes(job, np.array([row]), size)
        views = np.empty_like(out)
        with self.clock.phase("decode"):
            resize_views(
                picture, boxes[:, 0], flips[:, 0], self.size, views, decoder=self.settings.decoder
            )
        out[:] = views

    def _write(
        self,
        job: _Job,
        rows: NDArray[np.int64],
        good: NDArray[np.int64],
        views: NDArray[np.uint8],
    ) -> None:
        """Views (views, n, size, size, 3) to their rows of the batch; the ``good`` ones of them
        are there, and the others' rows are written again."""
        images, span = job.images.numpy(), _span(rows)
        with self.clock.phase("augment"):
            if self.on_device:
                if span is None:
                    images[:, rows] = views
                elif not np.shares_memory(images, views):
                    images[:, span] = views
                return
            for number, parameters in enumerate(self.views):
                drawn = job.draws[number][rows]
                order, factors, jitter, gray, sigma = color_choices(drawn, parameters, self.size)
                # Compared in double precision, as one view's is.
                changed = (jitter | gray | (sigma.astype(np.float64) > LEAST_SIGMA))[good]
                same = good[~changed]
                views_to_planes(
                    views[number],
                    NORMALIZED,
                    images[number],
                    sources=same,
                    targets=rows[same],
                    decoder=self.settings.decoder,
                )
                for n in good[changed].tolist():
                    choices = ColorChoices(
                        order[n], factors[n], bool(jitter[n]), bool(gray[n]), float(sigma[n])
                    )
                    change_colors_into(views[number, n], choices, images[number, rows[n]])


def _span(rows: NDArray[np.int64]) -> slice | None:
    """Ascending rows as a slice; None where some are left out."""
    first, end = int(rows[0]), int(rows[-1]) + 1
    return slice(first, end) if end - first == len(rows) else None
