"""Columns that are worked out once and then mapped: one file each list, shared by all processes.

A file has the layout of safetensors (a header of names, types and places, then the bytes), so any
reader of that format can look at it; ours maps it, and pages that several processes read lie in
memory once. A file appears under its name whole or not at all, and its name is a hash of what it
was made from: it is never changed, only made again where something else is asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from declip_shards import DeclipError
from declip_shards.manifest import canonical_json
from declip_shards.store import TEMPORARY_MARK

__all__ = ["Columns", "TextColumn", "cache_base", "cached_columns", "digest_of", "text_chunks"]

_TYPES = {"I64": np.int64, "I32": np.int32, "U16": np.uint16, "U8": np.uint8}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_META = "__metadata__"
_FORMAT = 1
"""Of all lists; counts up when one gets other columns, or they another meaning or order. What
another version made is then made anew, and lies beside it."""
_SECONDS_BETWEEN_LINES = 10.0
_KEPT_FILES = 256
_KEPT_SECONDS = 30 * 24 * 3600.0
_LOCKS = 64
_SYNCED_BYTES = 1 << 20

Chunks = Sequence[NDArray[Any]]
"""A column in pieces, one after the other."""


def cache_base(chosen: str | None) -> Path:
    """The folder of everything that is worked out or fetched once.

    Args:
        chosen: the setting ``cache``; None: OPENDECLIP_CACHE, or .cache/opendeclip in the home
            folder.
    """
    named = chosen or os.environ.get("OPENDECLIP_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "opendeclip"


def digest_of(*parts: Any) -> str:
    """sha256 of plain JSON values: the name of what is made from them."""
    return hashlib.sha256(canonical_json(list(parts))).hexdigest()


class Columns:
    """A mapped file of columns."""

    def __init__(self, path: Path) -> None:
        """Map ``path``.

        Raises:
            ValueError: it is no whole file of columns.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"{path} has no header")
            header = json.loads(file.read(length))
        first = 8 + length
        self.path = path
        self.meta: dict[str, Any] = json.loads(header.pop(_META, {}).get("meta", "{}"))
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if first + max(ends, default=0) != size:
            raise ValueError(f"{path} is cut")
        data: NDArray[np.uint8] = np.empty(0, np.uint8)
        if size > first:
            data = np.memmap(path, np.uint8, "r", offset=0)[first:]
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            array = np.asarray(data[begin:end]).view(_TYPES[entry["dtype"]])
            self._arrays[name] = array.reshape(entry["shape"])

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def get(self, name: str) -> NDArray[Any] | None:
        """A column, if there is one of that name."""
        return self._arrays.get(name)

    def text(self, name: str) -> TextColumn:
        """A column of strings, written by :func:`text_chunks`."""
        return TextColumn(offsets=self[f"{name}.offsets"], data=self[f"{name}.data"])


@dataclass(frozen=True, kw_only=True)
class TextColumn(Sequence[str]):
    """Strings one after the other, as Arrow has them."""

    offsets: NDArray[np.int64]
    """(n + 1,): where each begins in ``data``, and where the last ends."""
    data: NDArray[np.uint8]
    """UTF-8."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> TextColumn:
        """A column in memory."""
        columns = text_chunks("t", [pa.array(texts, pa.large_string())])
        return cls(
            offsets=np.concatenate(columns["t.offsets"]), data=np.concatenate(columns["t.data"])
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        place = range(len(self))[index]
        return bytes(self.data[self.offsets[place] : self.offsets[place + 1]]).decode()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), 65_536):
            yield from self.take(np.arange(first, min(first + 65_536, len(self))))

    def arrow(self) -> pa.Array:
        """The column as Arrow's large_string, without a copy."""
        buffers = [pa.py_buffer(self.offsets), pa.py_buffer(self.data)]
        return pa.LargeStringArray.from_buffers(len(self), *buffers)

    def take_arrow(self, rows: NDArray[np.integer]) -> pa.Array:
        """Some rows as Arrow's large_string, in the order asked for."""
        return self.arrow().take(pa.array(rows))

    def take(self, rows: NDArray[np.integer]) -> list[str]:
        """Some rows, in the order asked for."""
        texts: list[str] = self.take_arrow(np.asarray(rows, np.int64)).to_pylist()
        return texts


def text_chunks(name: str, arrays: Sequence[pa.Array]) -> dict[str, Chunks]:
    """The two columns that a column of strings is kept in.

    Args:
        name: of the column.
        arrays: its pieces, large_string, none of them null.
    """
    offsets: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
    data: list[NDArray[np.uint8]] = []
    end = 0
    for array in arrays:
        own = np.frombuffer(array.buffers()[1] or b"\0" * 8, np.int64)
        own = own[array.offset : array.offset + len(array) + 1]
        if not len(array):
            continue
        bytes_of = array.buffers()[2]
        if own[-1] > own[0]:
            data.append(np.frombuffer(bytes_of, np.uint8)[own[0] : own[-1]])
        offsets.append(own[1:] - own[0] + end)
        end += int(own[-1] - own[0])
    return {f"{name}.offsets": offsets, f"{name}.data": data or [np.empty(0, np.uint8)]}


def _write(path: Path, columns: Mapping[str, Chunks], meta: Mapping[str, Any]) -> None:
    """Write a file of columns under a temporary name and rename it."""
    # The widest numbers first: then each column begins at a multiple of its numbers' size.
    names = sorted(columns, key=lambda name: (-columns[name][0].dtype.itemsize, name))
    header: dict[str, Any] = {_META: {"meta": json.dumps(meta, sort_keys=True)}}
    end = 0
    for name in names:
        first = columns[name][0]
        rows = sum(len(chunk) for chunk in columns[name])
        size = sum(chunk.nbytes for chunk in columns[name])
        shape = [rows, *first.shape[1:]]
        header[name] = {
            "dtype": _NAMES[first.dtype],
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    packed = json.dumps(header, sort_keys=True).encode()
    packed += b" " * (-len(packed) % 8)
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(len(packed).to_bytes(8, "little") + packed)
            for name in names:
                for chunk in columns[name]:
                    file.write(np.ascontiguousarray(chunk).data)
            file.flush()
            # A power cut may leave a small file empty, which is seen and made again.
            if file.tell() > _SYNCED_BYTES:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cached_columns(
    base: Path,
    kind: str,
    key: str,
    build: Callable[[], tuple[Mapping[str, Chunks], Mapping[str, Any]]],
    *,
    what: str,
    keep: int = _KEPT_FILES,
) -> Columns:
    """The columns of ``key``, made by one process on first use while others wait for them.

    Args:
        base: of :func:`cache_base`.
        kind: folder within it.
        key: hash of everything that the columns follow from.
        build: makes the columns, and plain JSON values that are kept with them.
        what: what is being made, for the line that waiting processes say.
        keep: files of this kind that stay; the ones used longest ago make way.

    Raises:
        DeclipError: the cache cannot be written; and what ``build`` raises.
    """
    path = base / kind / f"{key[:40]}-{_FORMAT}.safetensors"
    found = _open(path)
    if found is not None:
        return found
    with _lock(base / kind, key, what):
        found = _open(path)
        if found is None:
            columns, meta = build()
            with _told(path.parent, what):
                _write(path, columns, meta)
                # Looking through many thousand files for each that is written would take hours.
                if keep == _KEPT_FILES or int(key[:8], 16) % _LOCKS == 0:
                    _prune(path.parent, keep)
                found = Columns(path)
    return found


@contextlib.contextmanager
def _told(folder: Path, what: str) -> Iterator[None]:
    """Say in words what is wrong with the cache."""
    try:
        yield
    except OSError as error:
        raise DeclipError(
            f"{what} cannot be kept in the cache folder {str(folder)!r}: "
            f"{error.strerror or error}; make room there, or choose another with the setting "
            "cache."
        ) from error


def _open(path: Path) -> Columns | None:
    """A file that is there and whole; its time tells when it was last of use."""
    try:
        found = Columns(path)
    except (OSError, ValueError, KeyError, TypeError):
        # Not there; or, as it came by rename, cut or damaged by the disk or a hand: made again.
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return found


@contextlib.contextmanager
def _lock(folder: Path, key: str, what: str) -> Iterator[None]:
    """One maker at a time; the kernel gives the lock back when its holder dies."""
    with _told(folder, what):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{int(key[:8], 16) % _LOCKS:02d}.lock").open("ab")
    with file:
        said = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    print(f"{what}: another process makes them; waiting", file=sys.stderr)
                time.sleep(0.05)
        yield


def _prune(folder: Path, keep: int) -> None:
    """Remove what has been of no use for long, and all but the newest."""
    files: list[tuple[float, Path]] = []
    for path in folder.glob("*.safetensors*"):
        with contextlib.suppress(OSError):
            files.append((path.stat().st_mtime, path))
    files.sort(reverse=True)
    for number, (used, path) in enumerate(files):
        if number >= keep or time.time() - used > _KEPT_SECONDS:
            # Who has it mapped keeps its pages.
            path.unlink(missing_ok=True)
