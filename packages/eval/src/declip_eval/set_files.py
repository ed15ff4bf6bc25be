"""The files of a labelled set, on this machine or behind any fsspec URL, and what is said when they
are not there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["DatasetError", "FoundFile", "MissingDatasetError", "SetFolder"]

_HUB_PAGE = re.compile(r"^(https?://[^/]+/datasets/[^/]+/[^/]+)/(?:tree|blob|raw)/")
_REFUSED = (401, 403, 404, 410)
_ATTEMPTS = 3
_LOG = logging.getLogger(__name__)
_COPY_BYTES = 8 << 20
_FETCHES = 16
"""Remote files that are fetched side by side."""
_MARK = re.compile(
    r"etag|checksum|digest|crc(32c)?|md5(hash)?|sha256|content(hash|md5)|generation|versionid|blobid"
    r"|lastcommit|created|updated|modified|modify|mtime|lastmodified|modificationtime"
)
"""What file systems call what changes with a file's content, in small letters alone."""


class DatasetError(ValueError):
    """A labelled set that cannot give a number to be trusted: cut, short, mixed up, not as its
    table says."""


class MissingDatasetError(DatasetError):
    """A labelled set that is not there; the sentence says where it was looked for and how to get
    it."""


class FoundFile(NamedTuple):
    """What is known of a file that has not been read."""

    size: int
    """Bytes; -1 where the server does not say."""
    mark: str | None
    """Of a remote file: its size and all that its file system says and that changes with its
    content (ETag, checksum, version, time); None where there is none but the size."""


@dataclass(frozen=True)
class SetFolder:
    """One folder, whose files are named by paths relative to it with "/" between.

    Args:
        root: a path of this machine or any fsspec URL. The web page of a folder on a data hub
            (".../datasets/OWNER/NAME/tree/BRANCH") stands for the files that it shows.
        cache: folder of this machine where files of a remote set are kept; None allows none.
    """

    root: str
    cache: str | None = None
    _system: Any = field(init=False, repr=False, compare=False)
    _path: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        import fsspec

        url = _HUB_PAGE.sub(r"\1/resolve/", self.root.rstrip("/") or "/")
        try:
            system, path = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise DatasetError(
                f"The dataset root {self.root!r} cannot be opened ({error}): give a folder, or a "
                "URL whose fsspec package is installed."
            ) from error
        object.__setattr__(self, "_system", system)
        object.__setattr__(self, "_path", path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether the files lie on this machine, so that they are read in place."""
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self._system, LocalFileSystem)

    @property
    def is_listable(self) -> bool:
        """Whether the folder's names can be asked for: a plain web server only gives files."""
        return "http" not in self._protocols and "https" not in self._protocols

    @property
    def _protocols(self) -> tuple[str, ...]:
        protocol = self._system.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def full(self, path: str) -> str:
        """Return the path of the file system for a relative path ("" is the folder itself)."""
        return f"{self._path}/{path}" if path else self._path

    def shown(self, path: str) -> str:
        """Return what messages call a file."""
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def read(self, path: str, *, refused_is_absent: bool = False) -> bytes | None:
        """Return a file's content, None where there is no such file.

        Args:
            path: relative.
            refused_is_absent: None too where a server refuses it: hubs do so for what they do not
                have. Only for asking whether a set is there.

        Raises:
            DatasetError: it is there or may be, but cannot be read.
        """
        try:
            return bytes(self._system.cat_file(self.full(path)))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except Exception as error:
            if refused_is_absent and getattr(error, "status", None) in _REFUSED:
                return None
            raise DatasetError(_unreadable(self.shown(path), error)) from error

    def read_text(self, path: str, *, refused_is_absent: bool = False) -> str | None:
        """Return a UTF-8 file's text without a byte order mark, None where `read` returns it.

        Raises:
            DatasetError: it cannot be read or is not UTF-8.
        """
        data = self.read(path, refused_is_absent=refused_is_absent)
        if data is None:
            return None
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"{self.shown(path)} is not UTF-8 text ({error}): write it again as UTF-8."
            ) from error

    def size(self, path: str) -> int | None:
        """Return a file's size in bytes: None where there is no such file, -1 where the server
        does not say.

        Raises:
            DatasetError: the file cannot be asked for.
        """
        found = self._look(path)
        return None if found is None else found.size

    def _look(self, path: str) -> FoundFile | None:
        """What is known of a file; None where there is none.

        Raises:
            DatasetError: the file cannot be asked for.
        """
        try:
            info = self._system.info(self.full(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:
            raise DatasetError(_unreadable(self.shown(path), error)) from error
        return None if info.get("type") == "directory" else _found(info)

    def names(self, path: str = "") -> tuple[list[str], list[str]]:
        """Return the names of the files and of the folders in a folder, each sorted; none where it
        is not there or its server shows no list. Hidden names are left out.

        Raises:
            DatasetError: the folder cannot be listed.
        """
        if not self.is_listable:
            return [], []
        try:
            entries = self._system.ls(self.full(path), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        except Exception as error:
            raise DatasetError(_unreadable(self.shown(path), error)) from error
        files: list[str] = []
        folders: list[str] = []
        for entry in entries:
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            is_folder = entry["type"] == "directory"
            if not name.startswith(".") and entry["name"].rstrip("/") != self.full(path):
                (folders if is_folder else files).append(name)
        return sorted(files), sorted(folders)

    def find(self, path: str) -> dict[str, FoundFile]:
        """Return every file below a folder: path relative to that folder -> what is known of it;
        files of this machine have no mark.

        Raises:
            DatasetError: a folder cannot be listed.
        """
        start = self.full(path)
        try:
            if self.is_local:
                # fsspec's walk passes over folders that it may not read, and says nothing.
                return dict(sorted(_walk(start)))
            found = self._system.find(start, detail=True)
        except Exception as error:
            raise DatasetError(_unreadable(self.shown(path), error)) from error
        return {
            name[len(start) :].lstrip("/"): _found(info) for name, info in sorted(found.items())
        }

    def read_many(self, paths: Sequence[str]) -> list[bytes | str]:
        """Return each file's content, or in words why it cannot be had; remote files are fetched
        side by side."""
        if self.is_local:
            return [self._read_or_why(path) for path in paths]
        # One by one: fsspec's `cat` takes brackets in a name for a pattern.
        with ThreadPoolExecutor(_FETCHES) as pool:
            return list(pool.map(self._fetch_or_why, paths))

    def _fetch_or_why(self, path: str) -> bytes | str:
        try:
            return bytes(self._system.cat_file(self.full(path)))
        except Exception as error:
            return f"{self.shown(path)} cannot be read ({type(error).__name__}: {error})"

    def _read_or_why(self, path: str) -> bytes | str:
        try:
            return Path(self.full(path)).read_bytes()
        except OSError as error:
            return f"{self.shown(path)} cannot be read ({error.strerror})"

    def on_this_machine(self, path: str) -> str:
        """Return a path of this machine with the file's content.

        A local file is its own; a remote one is fetched whole into the cache first, and again
        only where its size there differs or its file system says that it has changed.

        Raises:
            DatasetError: the file is not there, cannot be fetched whole, or a remote set was
                given no cache.
        """
        there = self._look(path)
        if there is None:
            raise DatasetError(f"{self.shown(path)} is not there: fetch the dataset again.")
        if self.is_local:
            return self.full(path)
        if self.cache is None:
            raise DatasetError(
                f"{self.shown(path)} is on another machine and there is no cache to put it in: "
                "give a cache folder."
            )
        of_root = hashlib.sha256(self.root.rstrip("/").encode()).hexdigest()[:16]
        target = Path(self.cache) / "sets" / of_root / path
        beside = target.with_name(f"{target.name}.source")
        if not _is_copy(target, beside, there):
            self._fetch(path, there.size, target)
            # Behind the content: without it, or with an old one, the file is fetched again.
            beside.write_text(there.mark or "", encoding="utf-8")
        return str(target)

    def _fetch(self, path: str, size: int, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Ranks may fetch the same file at the same time: each its own, the last one stays.
        _LOG.info("fetching %s (%s bytes)", self.shown(path), "?" if size < 0 else f"{size:,}")
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        fault = ""
        try:
            for attempt in range(_ATTEMPTS):
                time.sleep(attempt)
                try:
                    with (
                        self._system.open(self.full(path), "rb") as source,
                        partial.open("wb") as copy,
                    ):
                        while block := source.read(_COPY_BYTES):
                            copy.write(block)
                except Exception as error:
                    fault = f"{type(error).__name__}: {error}"
                    continue
                found = partial.stat().st_size
                if size in (-1, found):
                    partial.replace(target)
                    return
                fault = f"{found} of {size} bytes arrived"
        finally:
            partial.unlink(missing_ok=True)
        raise DatasetError(
            f"{self.shown(path)} could not be fetched in {_ATTEMPTS} attempts ({fault}): see to "
            "the connection, or fetch the dataset by hand and give its folder."
        )


def _found(info: Mapping[str, Any]) -> FoundFile:
    size = -1 if info.get("size") is None else int(info["size"])
    marks = {
        name: str(value)
        for name, value in info.items()
        if value is not None and _MARK.fullmatch(re.sub(r"[\W_]", "", str(name)).lower())
    }
    # A weak ETag may stay while bytes change (RFC 9110, 8.8.1).
    marks = {name: value for name, value in marks.items() if not value.startswith("W/")}
    text = json.dumps({"size": size, **marks}, sort_keys=True) if marks else None
    return FoundFile(size, text)


def _is_copy(target: Path, beside: Path, there: FoundFile) -> bool:
    """Whether a file of the cache is the one that is there, by all that its server says."""
    try:
        size = target.stat().st_size
        if there.size not in (-1, size):
            return False
        return there.mark is None or beside.read_text(encoding="utf-8") == there.mark
    except OSError:
        return False


def _walk(start: str) -> Iterator[tuple[str, FoundFile]]:
    def refuse(error: OSError) -> None:
        raise error

    for folder, _, files in os.walk(start, onerror=refuse, followlinks=True):
        below = os.path.relpath(folder, start).replace(os.sep, "/")
        for name in files:
            try:
                size = os.stat(os.path.join(folder, name)).st_size
            except OSError:
                # Such as a link to nowhere: it is there, and reading it will say why it fails.
                size = 0
            yield (name if below == "." else f"{below}/{name}"), FoundFile(size, None)


def _unreadable(shown: str, error: Exception) -> str:
    return (
        f"{shown} cannot be read ({type(error).__name__}: {error}): see to its rights and to the "
        "connection."
    )
