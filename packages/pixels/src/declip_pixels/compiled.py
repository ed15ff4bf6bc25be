"""The compiled way, if there is one here: plain C++ on the libjpeg-turbo that Pillow has loaded.

Using Pillow's own library means one decoder on both ways, and nothing more to install. Before it is
used, it must accept the layout of its structures that was compiled in, and give the Python way's
bytes for two small pictures.
"""

from __future__ import annotations

import ctypes
import functools
import io
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, _imaging

from declip_pixels.compiler import NoCompiledPartError, ensure_built
from declip_pixels.reference import decode_picture, make_views

_REFUSALS = {
    1: "it cannot be opened",
    2: "it lacks a function: libjpeg-turbo has all of them from 1.5 on",
    3: "it refuses our layout of its structures, which is that of libjpeg's version 62",
}
_FIRST = threading.Lock()
"""A loader's threads ask at once; one of them compiles."""


def pillow_libjpeg() -> Path:
    """The libjpeg that Pillow has loaded into this process.

    Raises:
        NoCompiledPartError: it cannot be found.
    """
    maps = Path("/proc/self/maps")
    if maps.exists():
        # Six columns, the last of which is a path, with the spaces that it may have.
        columns = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
        loaded = sorted({row[5] for row in columns if len(row) == 6 and "/libjpeg" in row[5]})
        # Other packages may have loaded libjpegs of their own: Pillow's is in its wheel's folder,
        # or the system's.
        beside = [path for path in loaded if "pillow.libs" in path]
        found = beside or [path for path in loaded if ".libs/" not in path]
    else:
        folder = Path(_imaging.__file__).parent / ".dylibs"
        found = [str(path) for path in sorted(folder.glob("libjpeg*.dylib"))]
    if not found:
        raise NoCompiledPartError("Pillow has not loaded a libjpeg that could be found")
    return Path(found[0])


class CompiledPart:
    """The library's calls, with arrays for pointers."""

    def __init__(self) -> None:
        """Compile if need be, open Pillow's libjpeg, and compare with the Python way.

        Raises:
            NoCompiledPartError: any of these fails; the text says which, and why.
        """
        libjpeg = pillow_libjpeg()
        try:
            self._library = ctypes.CDLL(str(ensure_built()))
        except OSError as error:
            raise NoCompiledPartError(f"the compiled file cannot be loaded ({error})") from error
        self._library.declip_open.argtypes = [ctypes.c_char_p]
        refusal = self._library.declip_open(os.fsencode(libjpeg))
        if refusal:
            reason = _REFUSALS.get(refusal, f"status {refusal}")
            raise NoCompiledPartError(f"Pillow's {libjpeg.name}: {reason}")
        self.has_vectors = bool(self._library.declip_has_vectors())
        self._compare()

    def sizes(self, data: Sequence[bytes]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """(n, 2) upright height and width, and (n,) whether they could be told."""
        sizes = np.zeros((len(data), 2), np.int32)
        done = np.zeros(len(data), np.bool_)
        pointers, lengths = _pointers(data)
        self._library.declip_sizes(
            pointers, _at(lengths), ctypes.c_int64(len(data)), _at(sizes), _at(done)
        )
        return sizes, done

    def views(
        self,
        data: Sequence[bytes],
        boxes: NDArray[np.int32],
        flips: NDArray[np.bool_],
        out: NDArray[np.uint8],
        num_threads: int,
        *,
        vectors: bool | None = None,
    ) -> NDArray[np.bool_]:
        """(n,) which pictures' views were made; arrays as in :func:`declip_pixels.decode_views`.

        ``vectors`` is for tests: whether to use the processor's (default: where it has them).
        """
        done = np.zeros(len(data), np.bool_)
        pointers, lengths = _pointers(data)
        self._library.declip_views(
            pointers,
            _at(lengths),
            ctypes.c_int64(len(data)),
            ctypes.c_int(len(out)),
            _at(boxes),
            _at(flips),
            ctypes.c_int(out.shape[2]),
            _at(out),
            ctypes.c_int(num_threads),
            ctypes.c_int(self._vectors(vectors)),
            _at(done),
        )
        return done

    def center_views(
        self,
        data: Sequence[bytes],
        out: NDArray[np.uint8],
        num_threads: int,
        *,
        vectors: bool | None = None,
    ) -> NDArray[np.bool_]:
        """(n,) which pictures' views were made; as in :func:`declip_pixels.decode_center_views`.

        ``vectors`` as in :meth:`views`.
        """
        done = np.zeros(len(data), np.bool_)
        pointers, lengths = _pointers(data)
        self._library.declip_center_views(
            pointers,
            _at(lengths),
            ctypes.c_int64(len(data)),
            ctypes.c_int(out.shape[1]),
            _at(out),
            ctypes.c_int(num_threads),
            ctypes.c_int(self._vectors(vectors)),
            _at(done),
        )
        return done

    def pictures(self, data: Sequence[bytes], num_threads: int) -> list[NDArray[np.uint8] | None]:
        """Whole upright pictures; None for those left to the Python way."""
        sizes, known = self.sizes(data)
        pictures = [
            np.empty((height, width, 3), np.uint8) if ours else None
            for (height, width), ours in zip(sizes.tolist(), known.tolist(), strict=True)
        ]
        targets = (ctypes.c_void_p * len(data))(
            *(None if picture is None else picture.ctypes.data for picture in pictures)
        )
        done = np.zeros(len(data), np.bool_)
        pointers, lengths = _pointers(data)
        self._library.declip_pictures(
            pointers,
            _at(lengths),
            ctypes.c_int64(len(data)),
            targets,
            ctypes.c_int(num_threads),
            _at(done),
        )
        return [
            picture if ours else None for picture, ours in zip(pictures, done.tolist(), strict=True)
        ]

    def resize(
        self,
        picture: NDArray[np.uint8],
        boxes: NDArray[np.int32],
        flips: NDArray[np.bool_],
        out: NDArray[np.uint8],
        *,
        vectors: bool | None = None,
    ) -> bool:
        """Views of a decoded picture, whose boxes lie in it; False for lack of memory."""
        height, width = picture.shape[:2]
        return bool(
            self._library.declip_resize(
                _at(picture),
                ctypes.c_int(height),
                ctypes.c_int(width),
                ctypes.c_int(len(out)),
                _at(boxes),
                _at(flips),
                ctypes.c_int(out.shape[1]),
                _at(out),
                ctypes.c_int(self._vectors(vectors)),
            )
        )

    def planes(
        self,
        views: NDArray[np.uint8],
        sources: NDArray[np.int64],
        tables: NDArray[np.float32],
        out: NDArray[np.float32],
        targets: NDArray[np.int64],
    ) -> None:
        """As :func:`declip_pixels.views_to_planes`, of arrays that have been checked."""
        self._library.declip_planes(
            _at(views),
            _at(sources),
            ctypes.c_int64(len(sources)),
            ctypes.c_int64(views.shape[1] * views.shape[2]),
            _at(tables),
            _at(out),
            _at(targets),
        )

    def _vectors(self, asked: bool | None) -> bool:
        return self.has_vectors if asked is None else asked and self.has_vectors

    def _compare(self) -> None:
        """Two small pictures must come out as the Python way has them.

        Raises:
            NoCompiledPartError: they do not.
        """
        height, width, size = 50, 70, 24
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        data = []
        for subsampling in (0, 2):
            file = io.BytesIO()
            Image.fromarray(noise).save(file, "JPEG", quality=90, subsampling=subsampling)
            data.append(file.getvalue())
        boxes = np.array([[[0, 0, height, width]] * 2, [[20, 35, 17, 21]] * 2], np.int32)
        flips = np.array([[False] * 2, [True] * 2])
        out = np.zeros((2, 2, size, size, 3), np.uint8)
        expected = np.ones_like(out)
        for index, item in enumerate(data):
            targets = [expected[view, index] for view in range(2)]
            make_views(decode_picture(item), boxes[:, index], flips[:, index], targets)
        made = self.views(data, boxes, flips, out, 1)
        if not made.all() or not np.array_equal(out, expected):
            raise NoCompiledPartError("its pixels are not the Python way's on this machine")


def compiled_part() -> CompiledPart | str:
    """The compiled part, or why there is none; found out once a process."""
    with _FIRST:
        return _compiled_part()


@functools.cache
def _compiled_part() -> CompiledPart | str:
    try:
        return CompiledPart()
    except NoCompiledPartError as error:
        return str(error)


@functools.cache
def say_once(reason: str) -> None:
    """One line on the slower way, to standard error."""
    print(
        f"pixels: decoding in Python, slower with equal results: {reason}",
        file=sys.stderr,
        flush=True,
    )


def _pointers(data: Sequence[bytes]) -> tuple[ctypes.Array[ctypes.c_char_p], NDArray[np.int64]]:
    lengths = np.fromiter((len(item) for item in data), np.int64, len(data))
    return (ctypes.c_char_p * len(data))(*data), lengths


def _at(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
