"""What a model sees of a picture at evaluation: uint8 views, and a cache of them on disk."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from declip_pixels import decode_center_views
from declip_shards import DeclipError
from declip_shards.store import atomic_write
from pipelines.eval_cache_room import bytes_in, last_use

Views = npt.NDArray[np.uint8]
"""(n, size, size, 3), red first."""
VERSION = 1
"""Counts up when the pixels of a view change; part of every cache's key."""
_UNSEEN_SHARE = 1 / 64
"""Of the limit of a cache: what a process writes, at most, between two looks at what all wrote."""
_MODES = ("shortest", "longest", "squash")
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a picture becomes a tower's input; names and meanings are open_clip's.

    Raises:
        DeclipError: a value that no picture can be prepared by.
    """

    size: int
    """Side of the view, pixels."""
    mean: tuple[float, ...]
    """Of the channels, in units of full brightness."""
    std: tuple[float, ...]
    """Standard deviation, likewise."""
    interpolation: str = "bicubic"
    """bicubic or bilinear."""
    resize_mode: str = "shortest"
    """shortest side to ``size`` and a center crop; longest and padding; or squash."""
    fill_color: int = 0
    """Of padding, 0 to 255."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DeclipError(f"preprocess size is {self.size}, but a view has at least 1 pixel.")
        if self.interpolation not in _FILTERS:
            raise DeclipError(
                f"preprocess interpolation is {self.interpolation!r}, but must be one of "
                f"{', '.join(_FILTERS)}."
            )
        if self.resize_mode not in _MODES:
            raise DeclipError(
                f"preprocess resize_mode is {self.resize_mode!r}, but must be one of "
                f"{', '.join(_MODES)}."
            )
        _check_normalization(self.mean, self.std)

    @property
    def views_text(self) -> str:
        """What the uint8 view follows from, beside the picture: a key of caches."""
        named = f"{self.resize_mode} {self.interpolation} {self.size}"
        fill = f" fill {self.fill_color}" if self.resize_mode == "longest" else ""
        return f"view {VERSION}: {named}{fill}"

    @property
    def text(self) -> str:
        """What the tower's input follows from, beside the picture: a key of caches."""
        return f"{self.views_text}; mean {list(self.mean)}; std {list(self.std)}"

    def make(
        self, images: Sequence[bytes | str], num_threads: int = 1
    ) -> tuple[Views, list[str | None]]:
        """Decode, resize and crop.

        Args:
            images: encoded pictures, or why there is none.
            num_threads: at work at once; it changes no pixel.

        Returns:
            The views (n, size, size, 3), black where there is none; and for each picture None, or
            why there is no view.
        """
        views = np.zeros((len(images), self.size, self.size, 3), np.uint8)
        if self.resize_mode == "shortest" and self.interpolation == "bicubic":
            return views, self._make_center_views(images, views, num_threads)

        def one(number: int) -> str | None:
            data = images[number]
            if isinstance(data, str):
                return data
            try:
                views[number] = self._view(data)
            except DeclipError as error:
                return str(error)
            return None

        if num_threads < 2 or len(images) < 2:
            return views, [one(number) for number in range(len(images))]
        with ThreadPoolExecutor(min(num_threads, len(images)), "views") as threads:
            return views, list(threads.map(one, range(len(images))))

    def _make_center_views(
        self, images: Sequence[bytes | str], views: Views, num_threads: int
    ) -> list[str | None]:
        """The usual way, by the decoder of training."""
        # What is no picture fails as such, at no cost, and is told by its own reason.
        data = [b"" if isinstance(item, str) else item for item in images]
        found = decode_center_views(data, self.size, views, num_threads=num_threads)
        return [
            item if isinstance(item, str) else reason
            for item, reason in zip(images, found, strict=True)
        ]

    def _view(self, data: bytes) -> Views:
        try:
            with Image.open(io.BytesIO(data)) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DeclipError(f"an image for evaluation cannot be decoded ({error}).") from error
        return np.asarray(self._resized(image))

    def _resized(self, image: Image.Image) -> Image.Image:
        """As open_clip's transforms of the same names do it."""
        width, height = image.size
        resample = _FILTERS[self.interpolation]
        if self.resize_mode == "squash":
            return image.resize((self.size, self.size), resample)
        if self.resize_mode == "longest":
            ratio = max(width, height) / self.size
            kept = round(width / ratio), round(height / ratio)
            canvas = Image.new("RGB", (self.size, self.size), (self.fill_color,) * 3)
            left, top = ((self.size - side) // 2 for side in kept)
            canvas.paste(image.resize((max(1, kept[0]), max(1, kept[1])), resample), (left, top))
            return canvas
        short = min(width, height)
        kept = int(self.size * width / short), int(self.size * height / short)
        left, top = (round((side - self.size) / 2) for side in kept)
        resized = image.resize(kept, resample)
        return resized.crop((left, top, left + self.size, top + self.size))


def _check_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse means and deviations that are of other units, or none."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not np.isfinite(values).all():
            raise DeclipError(
                f"preprocess {name} is {tuple(values)}, but must be three finite numbers, of red, "
                "green and blue."
            )
    if min(std) <= 0 or max(std) > 1 or min(mean) < 0 or max(mean) > 1:
        raise DeclipError(
            f"preprocess mean {tuple(mean)} and std {tuple(std)} do not fit a model of pictures: "
            "they are in units of full brightness, mean from 0 to 1, std above 0 and at most 1 "
            "(divide values of 0 to 255 by 255)."
        )


class ViewCache:
    """Views of a set's pictures on disk: a repeated evaluation reads and decodes no picture.

    A file holds the views of a range of pictures and is mapped, not read; it appears under its name
    when it is whole. Processes share a cache. Where ``limit_bytes`` are full, the sets that were
    used longest ago make room, and without room nothing is kept; nor is a range with a picture that
    could not be read, for the next time it may be (one that cannot be decoded stays so).

    Args:
        folder: of all sets' views; made where it is absent.
        data_digest: of the set.
        preparation: of the pictures.
        limit_bytes: of all sets together; 0 keeps nothing.

    Raises:
        DeclipError: the limit is negative.
    """

    def __init__(
        self, folder: Path | str, data_digest: str, preparation: Preparation, limit_bytes: int
    ) -> None:
        if limit_bytes < 0:
            raise DeclipError(
                f"the cache of views is limited to {limit_bytes} bytes; give 0 (none) or more."
            )
        self._preparation, self._limit = preparation, limit_bytes
        key = hashlib.sha256(f"{data_digest}\n{preparation.views_text}".encode()).hexdigest()
        self._root = Path(folder)
        self._folder = self._root / key[:32]
        self._total, self._unseen = 0, limit_bytes

    def get(
        self,
        start: int,
        stop: int,
        read: Callable[[], Sequence[bytes | str]],
        num_threads: int = 1,
    ) -> tuple[Views, list[str | None]]:
        """Views of the pictures ``start`` to ``stop``, as `Preparation.make` gives them.

        Args:
            start: first picture.
            stop: the one behind the last.
            read: the encoded pictures; called where the views are not there.
            num_threads: that decode.
        """
        found = self._find(start, stop)
        if found is not None:
            return found
        images = read()
        if len(images) != stop - start:
            raise ValueError(f"{len(images)} pictures were read for {stop - start} places.")
        views, reasons = self._preparation.make(images, num_threads)
        if not any(isinstance(image, str) for image in images):
            self._keep(start, stop, views, reasons)
        return views, reasons

    def _paths(self, start: int, stop: int) -> tuple[Path, Path]:
        stem = f"{start:09d}-{stop:09d}"
        return self._folder / f"{stem}.npy", self._folder / f"{stem}.json"

    def _find(self, start: int, stop: int) -> tuple[Views, list[str | None]] | None:
        path, beside = self._paths(start, stop)
        side = self._preparation.size
        try:
            # A set that is in use is the last to make room.
            os.utime(self._folder)
            failures: Mapping[str, Any] = json.loads(beside.read_bytes())
            views = np.load(path, mmap_mode="r")
            reasons: list[str | None] = [None] * (stop - start)
            for number, reason in failures.items():
                reasons[int(number)] = str(reason)
        except (OSError, ValueError, EOFError, AttributeError, IndexError):
            return None
        if views.shape != (stop - start, side, side, 3) or views.dtype != np.uint8:
            return None
        return views, reasons

    def _keep(self, start: int, stop: int, views: Views, reasons: Sequence[str | None]) -> None:
        if not self._make_room(views.nbytes):
            return
        path, beside = self._paths(start, stop)
        failures = {str(n): reason for n, reason in enumerate(reasons) if reason is not None}
        content = io.BytesIO()
        np.save(content, views)
        # The views last: they are the mark that both are there.
        try:
            atomic_write(beside, json.dumps(failures).encode())
            atomic_write(path, content.getbuffer())
        except OSError as error:
            if isinstance(error, FileNotFoundError | FileExistsError) and self._root.is_dir():
                # Another process made room of this very set meanwhile: there was none for it.
                self._unseen = self._limit
                return
            raise DeclipError(
                f"views cannot be kept in {str(self._folder)!r} ({error}); free some space, name "
                "another cache folder, or set its limit to 0."
            ) from error

    def _make_room(self, num_bytes: int) -> bool:
        """Whether there is room, having dropped sets that were used longer ago if need be.

        Other processes write, too, so what there is is looked up now and then.
        """
        self._unseen += num_bytes
        if self._unseen > self._limit * _UNSEEN_SHARE or self._total + num_bytes > self._limit:
            self._unseen, self._total = num_bytes, self._drop_until(self._limit - num_bytes)
        fits = self._total + num_bytes <= self._limit
        self._total += num_bytes if fits else 0
        return fits

    def _drop_until(self, most_bytes: int) -> int:
        """Remove other sets, the longest unused first, until there is so much; none where that
        would not do. Returns how much there is."""
        folders = self._root.iterdir() if self._root.is_dir() else ()
        sets = [(last_use(place), bytes_in(place), place) for place in folders if place.is_dir()]
        total = sum(size for _, size, _ in sets)
        if sum(size for _, size, place in sets if place == self._folder) > most_bytes:
            return total
        for _, size, folder in sorted(sets):
            if total <= most_bytes:
                break
            if folder != self._folder:
                shutil.rmtree(folder, ignore_errors=True)
                total -= size
        return total
