"""Vectors of a remote dataset's embeddings, read row by row out of files that cannot be mapped."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from declip_shards import DeclipError
from declip_train.tar_cache import TarFiles

__all__ = ["FetchedVectors"]

_HEAD_BYTES = 4096
"""More than the header of an array of two dimensions takes."""
_HEADS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


@dataclass(frozen=True, slots=True)
class _Head:
    """What a .npy file says of itself."""

    shape: tuple[int, int]
    dtype: np.dtype[np.floating]
    start: int
    """First byte of the numbers."""


class FetchedVectors:
    """The rows of some .npy files at URLs, through the cache of remote files.

    Args:
        files: the .npy files.

    Raises:
        DeclipError: one cannot be read, or is no table of floats.
    """

    def __init__(self, files: TarFiles) -> None:
        self.files = files
        self._heads = [self._head(number) for number in range(len(files.sources))]

    def _head(self, number: int) -> _Head:
        source = self.files.sources[number]
        data = self.files.read(number, 0, min(source.size, _HEAD_BYTES))
        if isinstance(data, str):
            raise DeclipError(f"{data}; see that this machine may read it, or start again.")
        stream = io.BytesIO(data)
        try:
            shape, by_columns, dtype = _HEADS[npy.read_magic(stream)](stream)
        except (ValueError, KeyError, EOFError) as error:
            raise DeclipError(
                f"{source.url!r} is damaged ({error}); delete it and rerun the embed step."
            ) from error
        if len(shape) != 2 or dtype.kind != "f" or by_columns:
            raise DeclipError(
                f"{source.url!r} holds {dtype} of shape {shape}"
                f"{', column by column' if by_columns else ''}, but embeddings are floats (rows, "
                "size), row by row; rerun the embed step."
            )
        size = stream.tell() + shape[0] * shape[1] * dtype.itemsize
        if size != source.size:
            raise DeclipError(
                f"{source.url!r} is damaged (it has {source.size} bytes, its shape {shape} takes "
                f"{size}); delete it and rerun the embed step."
            )
        return _Head(shape, dtype, stream.tell())

    def shape(self, number: int) -> tuple[int, int]:
        """(rows, size) of one file."""
        return self._heads[number].shape

    def rows(self, numbers: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, size) float32: row ``rows[i]`` of file ``numbers[i]``, asked for all at once.

        Raises:
            DeclipError: a file cannot be reached, or is another than the one that was opened.
        """
        if not len(rows):
            return np.empty((0, self._heads[0].shape[1]), np.float32)
        heads = [self._heads[number] for number in numbers.tolist()]
        sizes = np.array([head.shape[1] * head.dtype.itemsize for head in heads], np.int32)
        offsets = np.array([head.start for head in heads], np.int64) + rows * sizes
        found = np.empty((len(rows), heads[0].shape[1]), np.float32)
        answers = self.files.read_many(numbers.astype(np.int32), offsets, sizes)
        for place, (head, data) in enumerate(zip(heads, answers, strict=True)):
            if isinstance(data, str):
                raise DeclipError(f"{data}; start the training again.")
            found[place] = np.frombuffer(data, head.dtype)
        return found

    def open_whole(self, number: int) -> io.BufferedReader:
        """One file, fetched whole.

        Raises:
            DeclipError: it cannot be had.
        """
        return self.files.open_whole(number)
