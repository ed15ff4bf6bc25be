"""Files of a dataset: any fsspec URL, written so that nothing is ever half there."""

import contextlib
import hashlib
import os
import posixpath
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from declip_shards.errors import DeclipError

TEMPORARY_MARK = ".part-"
"""Every temporary name contains this; readers and listings skip such names."""


class Store:
    """A folder at any fsspec URL, addressed by relative POSIX paths.

    A write appears under its final name whole or not at all: on a local disk by temporary name,
    ``fsync`` and rename; on an object store by one put of the whole object (an exception inside
    an open fsspec file would publish a truncated object, so none is ever opened for writing).
    """

    def __init__(self, root: str) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(root)
        self.url = root
        self.is_local = isinstance(self.fs, fsspec.implementations.local.LocalFileSystem)

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return (Store, (self.url,))

    def path(self, relative: str) -> str:
        """Full path of ``relative`` as the filesystem knows it. Refuses to leave the folder."""
        clean = posixpath.normpath(relative)
        if clean.startswith(("/", "..")):
            raise ValueError(f"path {relative!r} leaves the dataset folder {self.url!r}")
        return self.root if clean == "." else posixpath.join(self.root, clean)

    def local_path(self, relative: str) -> Path:
        """``relative`` as a local path; an error naming the URL where the store is remote."""
        if not self.is_local:
            raise DeclipError(
                f"{self.url!r} is not a local folder, and this stage needs one; "
                "copy the dataset to a local disk or pass a local --out."
            )
        return Path(self.path(relative))

    def exists(self, relative: str) -> bool:
        return bool(self.fs.exists(self.path(relative)))

    def size(self, relative: str) -> int:
        return int(self.fs.size(self.path(relative)))

    def read_bytes(self, relative: str) -> bytes:
        data: bytes = self.fs.cat_file(self.path(relative))
        return data

    @contextlib.contextmanager
    def open(self, relative: str) -> Iterator[BinaryIO]:
        """Open for reading, seekable."""
        with self.fs.open(self.path(relative), "rb") as f:
            yield f

    def write_bytes(self, relative: str, data: bytes | bytearray | memoryview) -> None:
        """Publish ``data`` under ``relative`` atomically and durably."""
        full = self.path(relative)
        if self.is_local:
            atomic_write(Path(full), data)
        else:
            self.fs.makedirs(posixpath.dirname(full), exist_ok=True)
            self.fs.pipe_file(full, bytes(data))

    def sha256(self, relative: str) -> str:
        """Hex digest of a file's bytes."""
        digest = hashlib.sha256()
        with self.open(relative) as f:
            while block := f.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def list(self, folder: str, suffix: str = "") -> list[str]:
        """Names of the files directly in ``folder``, sorted; empty where there is no folder."""
        full = self.path(folder)
        self.fs.invalidate_cache(full)
        if not self.fs.isdir(full):
            return []
        infos: list[dict[str, Any]] = self.fs.ls(full, detail=True)
        names = (posixpath.basename(i["name"].rstrip("/")) for i in infos if i["type"] == "file")
        return sorted(n for n in names if n.endswith(suffix) and TEMPORARY_MARK not in n)

    def list_folders(self, folder: str) -> Sequence[str]:
        """Names of the folders directly in ``folder``, sorted; empty where there is no folder."""
        full = self.path(folder)
        self.fs.invalidate_cache(full)
        if not self.fs.isdir(full):
            return []
        infos: list[dict[str, Any]] = self.fs.ls(full, detail=True)
        names = (posixpath.basename(i["name"].rstrip("/")) for i in infos)
        return sorted(n for n, i in zip(names, infos, strict=True) if i["type"] == "directory")

    def move(self, source: str, target: str) -> None:
        """Replace ``target`` by ``source``: by rename on a local disk, else by copy and removal."""
        start, end = self.path(source), self.path(target)
        if self.is_local:
            Path(end).parent.mkdir(parents=True, exist_ok=True)
            Path(start).replace(end)
            sync_folder(Path(end).parent)
        else:
            self.fs.makedirs(posixpath.dirname(end), exist_ok=True)
            self.fs.mv(start, end)

    def remove_folder(self, relative: str) -> None:
        """Remove a folder and all it holds; no error where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(relative), recursive=True)

    def remove(self, relative: str) -> None:
        """Remove a file; no error where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(relative))

    def check_writable(self) -> None:
        """Create the folder and prove that a file can be written there."""
        try:
            probe = f"{TEMPORARY_MARK}{uuid.uuid4().hex}"
            self.write_bytes(probe, b"")
            self.remove(probe)
        except OSError as error:
            raise DeclipError(
                f"cannot write to the output folder {self.url!r}: {error.strerror or error}; "
                "choose another with --out or give yourself write permission there."
            ) from error


def atomic_write(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write a local file under a temporary name, flush it to disk, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
