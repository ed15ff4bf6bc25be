"""The files of a list: one, a folder of them or a glob, on any filesystem that fsspec knows."""

import contextlib
import hashlib
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa

from declip_shards import DeclipError
from declip_shards.store import TEMPORARY_MARK

SUFFIXES = (
    ".parquet",
    ".csv",
    ".tsv",
    ".txt",
    ".json",
    ".jsonl",
    ".ndjson",
    ".gz",
    ".bz2",
    ".zst",
    ".zstd",
)
"""Of a folder, the files with one of these endings; where there is parquet, parquet alone."""
UNMARKED = "yfcc100m_dataset"
"""YFCC100M's unpacked files have no ending."""
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 1 << 20


def _ignore(count: int) -> None:
    """Nobody looks at the progress."""


@dataclass(frozen=True, kw_only=True)
class ListFile:
    """One file of a list."""

    fs: Any
    """Its fsspec filesystem."""
    path: str
    """Its path there."""
    location: str
    """How the user would name it."""
    name: str
    """Relative to what the user named; stands in ``source/dropped.parquet``."""

    @property
    def is_http(self) -> bool:
        """Whether a web server has it."""
        return self.location.startswith(("http://", "https://"))

    @property
    def size(self) -> int:
        """Bytes as they lie there; 0 where the server does not say."""
        with reading(self.location):
            return int(self.fs.info(self.path).get("size") or 0)

    def state(self) -> tuple[str, ...]:
        """What changes when somebody writes the file: size and time, or the server's mark."""
        with reading(self.location):
            info = self.fs.info(self.path)
        return tuple(str(info.get(k)) for k in ("size", "mtime", "LastModified", "ETag", "etag"))


@contextlib.contextmanager
def reading(location: str) -> Iterator[None]:
    """Turn what filesystems raise into one sentence that names the list."""
    try:
        yield
    except DeclipError:
        raise
    except FileNotFoundError as error:
        raise DeclipError(f"list {location!r} does not exist; check its path.") from error
    except IsADirectoryError as error:
        raise DeclipError(f"list {location!r} is a folder; give its files.") from error
    except (EOFError, OSError) as error:
        raise damaged(location, getattr(error, "strerror", None) or error) from error
    except Exception as error:
        # Clients of object stores and of HTTP have exception classes of their own.
        if type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        raise damaged(location, error) from error


_CLIENTS = ("aiohttp", "botocore", "s3fs", "gcsfs", "adlfs", "azure", "google", "fsspec")


def damaged(location: str, why: object) -> DeclipError:
    """A file that cannot be read to its end."""
    first_line = str(why).strip().split("\n")[0].rstrip(".") or type(why).__name__
    return DeclipError(
        f"list {location!r} cannot be read whole ({first_line}); fetch or write it again."
    )


def find_files(location: str) -> list[ListFile]:
    """The files that a location names, in the order in which they are read.

    Args:
        location: a file, a folder (searched through, sorted by path) or a glob; a path or any
            fsspec URL.

    Raises:
        DeclipError: nothing is there, or the URL's filesystem is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise DeclipError(f"list {location!r} cannot be reached: {error}.") from error
    if location.startswith(("http://", "https://")):
        with reading(location):
            fs.info(path)
        return [ListFile(fs=fs, path=path, location=location, name=_url_name(location))]
    fs.invalidate_cache()
    with reading(location):
        if fs.isfile(path):
            return [_file(fs, path, posixpath.basename(path))]
        if fs.isdir(path):
            found = _of_folder(fs, path)
            if not found:
                raise DeclipError(
                    f"folder {location!r} holds no list; its files must end in one of: "
                    f"{', '.join(SUFFIXES)}."
                )
            return found
        if any(mark in path for mark in "*?["):
            paths = sorted(p for p in fs.glob(path) if fs.isfile(p))
            if not paths:
                raise DeclipError(f"no file matches {location!r}; check the pattern.")
            return [_file(fs, p, posixpath.basename(p)) for p in paths]
    raise DeclipError(f"list {location!r} does not exist; check its path.")


def _url_name(location: str) -> str:
    return posixpath.basename(location.partition("?")[0]) or "list"


def _file(fs: Any, path: str, name: str) -> ListFile:
    location = path if fs.protocol in ("file", ("file", "local")) else fs.unstrip_protocol(path)
    return ListFile(fs=fs, path=path, location=str(location), name=name)


def _of_folder(fs: Any, folder: str) -> list[ListFile]:
    names = [posixpath.relpath(p, folder) for p in sorted(fs.find(folder))]
    names = [
        name
        for name in names
        if (name.lower().endswith(SUFFIXES) or posixpath.basename(name).startswith(UNMARKED))
        and not name.endswith("_stats.json")
        and TEMPORARY_MARK not in name
        and not any(part.startswith((".", "_")) for part in name.split("/"))
    ]
    parquet = [name for name in names if name.lower().endswith(".parquet")]
    return [_file(fs, posixpath.join(folder, name), name) for name in parquet or names]


@contextlib.contextmanager
def open_raw(file: ListFile, *, seekable: bool = False) -> Iterator[Any]:
    """The file's bytes as they lie there; of a web server as a stream unless ``seekable``."""
    options = {"block_size": 0} if file.is_http and not seekable else {}
    with reading(file.location), file.fs.open(file.path, "rb", **options) as f:
        yield f


@contextlib.contextmanager
def open_stream(file: ListFile, on_bytes: Callable[[int], None] = _ignore) -> Iterator[Any]:
    """The file's content as a pyarrow stream; gz, bz2 and zst are told by their first bytes.

    Args:
        file: the file.
        on_bytes: is told of every stored byte that was read.
    """
    with open_raw(file) as f:
        start = f.read(4)
    packing = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    with open_raw(file) as f:
        stream = pa.PythonFile(_Counted(f, on_bytes), mode="r")
        yield stream if packing is None else pa.CompressedInputStream(stream, packing)


class _Counted:
    """A file that tells how much of it was read."""

    def __init__(self, file: Any, on_bytes: Callable[[int], None]) -> None:
        self._file, self._on_bytes = file, on_bytes
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        self._on_bytes(len(data))
        return data

    def close(self) -> None:
        self.closed = True


def read_head(file: ListFile, size: int = 1 << 16) -> bytes:
    """The first ``size`` bytes of the unpacked content.

    Raises:
        DeclipError: missing, unreadable, or empty.
    """
    parts: list[bytes] = []
    with open_stream(file) as stream:
        while size > 0 and (data := stream.read(size)):
            parts.append(data)
            size -= len(data)
    head = b"".join(parts)
    if not head.strip(b"\xef\xbb\xbf \t\r\n"):
        raise DeclipError(f"list {file.location!r} is empty; fetch or write it again.")
    return head


def location_digest(location: str) -> str:
    """sha256, hex, of a location's files: their names below it, their order and their bytes.

    Where the location lies does not count.
    """
    whole = hashlib.sha256()
    for file in find_files(location):
        digest, size = hashlib.sha256(), 0
        with open_raw(file) as f:
            while block := f.read(_BLOCK):
                digest.update(block)
                size += len(block)
        whole.update(f"{file.name}\0{size}\0{digest.hexdigest()}\n".encode())
    return whole.hexdigest()
