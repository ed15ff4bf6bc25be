"""Pictures read out of tars by their places: from a local disk, or from anywhere by URL.

Remote tars are fetched whole into a folder of bounded size, if all tars of the run fit into it;
where they do not, fetching would go in circles (an epoch's order visits all tars all the time), so
each picture is asked for by its range of bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from declip_shards import DeclipError
from declip_shards.store import TEMPORARY_MARK
from declip_train.network_tries import TRIES, asked_again, pause, words_of

__all__ = ["TarFiles", "TarSource", "fetch_tar", "find_tar", "is_remote", "open_fetched"]

_OPEN_TARS = 128
"""Tars that stay open; a process may have about 1,000 files open, a dataset has more tars."""
_OPENINGS = 10
_BLOCK = 1 << 22
_FOLDER = "tars"
_TAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "blob_id", "generation")
_TIMES = ("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "created")
"""What file systems call that by which a changed file is known. A time only where there is no tag:
listings have it in finer parts of a second than answers for one file."""


def is_remote(url: str) -> bool:
    """Whether ``url`` is no path of this machine."""
    return "://" in url and not url.startswith(("file://", "local://"))


@dataclass(frozen=True, kw_only=True)
class TarSource:
    """A tar as it was when its samples were listed."""

    url: str
    """Path on this machine, or a URL that fsspec opens."""
    size: int
    """Bytes."""
    version: str
    """Its time of change and number on the disk, or the server's tag."""
    sha256: str = ""
    """What a manifest says of its bytes; empty where none does."""

    def identity(self) -> dict[str, Any]:
        """What names these bytes in a cache."""
        return asdict(self)


def find_tar(url: str, sha256: str = "") -> TarSource:
    """A tar that is there now.

    Raises:
        DeclipError: it is missing, is no file, or a server does not say how long it is.
    """
    if not is_remote(url):
        path = url.partition("://")[2] if "://" in url else url
        try:
            state = os.stat(path)
        except OSError as error:
            raise DeclipError(
                f"the tar {path!r} cannot be read ({error.strerror}); correct its path, or bring "
                "it back (shards of ours: rerun ingest)."
            ) from error
        return TarSource(url=path, size=state.st_size, version=_version(state), sha256=sha256)
    info = _info(url)
    if info.get("size") is None:
        raise DeclipError(
            f"the server of {url!r} does not say how many bytes it has, so its samples cannot be "
            "read by their places; copy the tars to a local disk."
        )
    tags = [str(info[name]).strip('"') for name in _TAGS if info.get(name)]
    times = [f"{name}={info[name]}" for name in _TIMES if info.get(name)]
    version = tags[0] if tags else " ".join(times)
    return TarSource(url=url, size=int(info["size"]), version=version, sha256=sha256)


def _info(url: str) -> dict[str, Any]:
    """What a file system says of a remote tar; asked again where the network fails."""

    def ask() -> dict[str, Any]:
        fs, path = fsspec.core.url_to_fs(url)
        info: dict[str, Any] = fs.info(path)
        return info

    try:
        return asked_again(ask)
    except Exception as error:  # file systems raise what they like
        raise DeclipError(
            f"the tar {url!r} cannot be reached ({words_of(error)}); correct its "
            "address, or see that this machine can read it."
        ) from error


def _version(state: os.stat_result) -> str:
    return f"{state.st_mtime_ns}-{state.st_ino}"


class _OpenFile:
    """A file descriptor that is closed with its last user."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class TarFiles:
    """The tars of a run.

    Args:
        sources: of :func:`find_tar`.
        cache: folder for remote ones.
        room: bytes that they may take there.
        taken: of these, bytes that other files of the run take.
        kind: what these files are, and what is read out of them, for the person who watches.
    """

    def __init__(
        self,
        sources: Sequence[TarSource],
        cache: Path,
        room: float,
        *,
        taken: int = 0,
        kind: tuple[str, str] = ("tars", "pictures"),
    ) -> None:
        self.sources = list(sources)
        self._base, self._room = cache, room
        self._taken, self._kind = taken, kind
        self._remote = [is_remote(source.url) for source in self.sources]
        pairs = zip(self.sources, self._remote, strict=True)
        self._total = sum(source.size for source, remote in pairs if remote)
        self._said = False
        self._seen: set[int] = set()

    @property
    def _all_fit(self) -> bool:
        return self._taken + self._total <= self._room

    def beside(self, sources: Sequence[TarSource], kind: tuple[str, str]) -> TarFiles:
        """Other files of the same run, which share the cache with these and get what they leave."""
        taken = self._total if self._all_fit else 0
        return TarFiles(sources, self._base, self._room, taken=taken, kind=kind)

    def open_whole(self, number: int) -> io.BufferedReader:
        """A tar as a local file, fetched whole where it is remote.

        Raises:
            DeclipError: it cannot be had.
        """
        source = self.sources[number]
        if self._remote[number]:
            return open_fetched(source, self._base, self._room)
        return open(source.url, "rb")

    @property
    def paths(self) -> list[str]:
        """Where the tars lie."""
        return [source.url for source in self.sources]

    @cached_property
    def _open(self) -> Callable[[int], _OpenFile]:
        return lru_cache(_OPEN_TARS)(self._opened)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        state.pop("_open", None)
        return state

    def _opened(self, number: int) -> _OpenFile:
        """An open tar that is still the one whose samples were listed.

        Raises:
            DeclipError: it is not, or cannot be fetched.
            OSError: it cannot be opened.
        """
        source = self.sources[number]
        if self._remote[number]:
            with open_fetched(source, self._base, self._room) as fetched:
                return _OpenFile(os.dup(fetched.fileno()))
        file = _OpenFile(os.open(source.url, os.O_RDONLY))
        state = os.fstat(file.number)
        if state.st_size < source.size:
            raise DeclipError(f"{source.url!r} was cut short during training")
        if _version(state) != source.version or state.st_size != source.size:
            raise DeclipError(f"{source.url!r} was changed during training")
        return file

    def read(self, number: int, offset: int, size: int) -> bytes | str:
        """Some bytes of a tar, or why they cannot be had. Threads may call this together."""
        url = self.sources[number].url
        if self._by_ranges(number):
            return self._ranges([(number, offset, size)])[0]
        try:
            # Held while it is read: another thread may crowd it out of the open ones, and then its
            # descriptor would be closed, or another tar's.
            file = self._open(number)
            data = os.pread(file.number, size, offset)
        except DeclipError as error:
            return str(error)
        except OSError as error:
            return f"{url!r} cannot be read ({error.strerror or error})"
        return data if len(data) == size else f"{url!r} was cut short during training"

    def read_many(
        self, numbers: NDArray[np.int32], offsets: NDArray[np.int64], sizes: NDArray[np.int32]
    ) -> list[bytes | str]:
        """:meth:`read` of many places, in the order asked for; tars are visited in theirs."""
        found: list[bytes | str] = [""] * len(numbers)
        ranges: list[int] = []
        for place in np.lexsort((offsets, numbers)).tolist():
            if self._by_ranges(int(numbers[place])):
                ranges.append(place)
            else:
                found[place] = self.read(
                    int(numbers[place]), int(offsets[place]), int(sizes[place])
                )
        if ranges:
            wanted = [(int(numbers[p]), int(offsets[p]), int(sizes[p])) for p in ranges]
            for place, data in zip(ranges, self._ranges(wanted), strict=True):
                found[place] = data
        return found

    def _by_ranges(self, number: int) -> bool:
        by_ranges = self._remote[number] and not self._all_fit
        if by_ranges and not self._said:
            self._said = True
            files, things = self._kind
            taken = f", of which the tars take {self._taken / 1e9:.1f}" if self._taken else ""
            print(
                f"train: the remote {files} have {self._total / 1e9:.1f} GB, cache_gigabytes is "
                f"{self._room / 1e9:g}{taken}: {things} are fetched one by one; raise it to fetch "
                "each file once",
                file=sys.stderr,
                flush=True,
            )
        return by_ranges

    def _ranges(self, places: Sequence[tuple[int, int, int]]) -> list[bytes | str]:
        """Ranges of remote tars, asked for together where the file system can."""
        answers: list[bytes | str] = [""] * len(places)
        by_system: dict[int, tuple[Any, list[int], list[str]]] = {}
        # Of this call alone: what cannot be reached now may be there for the next batch.
        faults: dict[int, str] = {}
        for place, (number, _, _) in enumerate(places):
            fault = "" if number in self._seen else faults.get(number)
            if fault is None:
                fault = faults[number] = changed_remote(self.sources[number])
            if fault:
                answers[place] = fault
                continue
            self._seen.add(number)
            fs, path = fsspec.core.url_to_fs(self.sources[number].url)
            _, rows, paths = by_system.setdefault(id(fs), (fs, [], []))
            rows.append(place)
            paths.append(path)
        for fs, rows, paths in by_system.values():
            starts = [places[row][1] for row in rows]
            ends = [places[row][1] + places[row][2] for row in rows]
            pending = list(range(len(rows)))
            for attempt in range(TRIES):
                if attempt:
                    pause(attempt)
                got = fs.cat_ranges(
                    [paths[i] for i in pending],
                    [starts[i] for i in pending],
                    [ends[i] for i in pending],
                    on_error="return",
                )
                for i, data in zip(pending, got, strict=True):
                    answers[rows[i]] = self._checked(places[rows[i]], data)
                pending = [i for i in pending if isinstance(answers[rows[i]], str)]
                if not pending:
                    break
        return answers

    def _checked(self, place: tuple[int, int, int], data: Any) -> bytes | str:
        url = self.sources[place[0]].url
        if not isinstance(data, bytes):
            return f"{url!r} cannot be read ({data or type(data).__name__})"
        if len(data) != place[2]:
            return f"{url!r} answered {len(data)} bytes where {place[2]} were asked for"
        return data


def changed_remote(source: TarSource) -> str:
    """Why a remote tar is not the one whose samples were listed; empty where it is."""
    try:
        fs, path = fsspec.core.url_to_fs(source.url)
        # Else a listing from before the change would answer.
        fs.invalidate_cache(path)
        found = find_tar(source.url)
    except DeclipError as error:
        return str(error)
    if (found.size, found.version) == (source.size, source.version):
        return ""
    return f"{source.url!r} is another file than the one whose samples were listed"


def open_fetched(source: TarSource, base: Path, room: float) -> io.BufferedReader:
    """:func:`fetch_tar`, opened: where the cache is small, others may crowd the file out at any
    moment, and who has it open keeps it.

    Raises:
        DeclipError: see :func:`fetch_tar`; or it was crowded out each time.
    """
    for _ in range(_OPENINGS):
        with contextlib.suppress(FileNotFoundError):
            return fetch_tar(source, base, room).open("rb")
    raise DeclipError(
        f"{source.url!r} was removed from the cache {str(base)!r} as often as it was fetched; "
        "raise cache_gigabytes, or start fewer runs that share the cache"
    )


def fetch_tar(source: TarSource, base: Path, room: float) -> Path:
    """A remote tar as a local file, fetched once by one process while others wait for it.

    Args:
        source: of :func:`find_tar`.
        base: the cache.
        room: bytes that they may take; the ones used longest ago make way.

    Raises:
        DeclipError: it cannot be had, or is not the tar that was listed, or there is no room.
    """
    name = hashlib.sha256(repr(sorted(source.identity().items())).encode()).hexdigest()[:40]
    folder = base / _FOLDER
    path = folder / f"{name}.tar"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{_lock_of(name):02d}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and path.stat().st_size == source.size:
                os.utime(path)
                return path
            _remove_unfinished(folder, _lock_of(name))
            _make_room(folder, room - source.size)
            _download(source, path)
    except OSError as error:
        raise DeclipError(
            f"{source.url!r} cannot be kept in {str(folder)!r} ({error.strerror or error}); make "
            "room there, or set cache to another folder"
        ) from error
    return path


def _lock_of(name: str) -> int:
    """Which of the locks is a tar's, going by its name."""
    return int(name[:8], 16) % 64


def _remove_unfinished(folder: Path, lock: int) -> None:
    """Remove what killed processes began to fetch under a lock: who holds it, fetches alone."""
    for path in folder.glob(f"*.tar{TEMPORARY_MARK}*"):
        if _lock_of(path.name) == lock:
            path.unlink(missing_ok=True)


def _make_room(folder: Path, room: float) -> None:
    """Remove the tars used longest ago until the others take at most ``room`` bytes."""
    files: list[tuple[float, int, Path]] = []
    for path in folder.glob("*.tar"):
        with contextlib.suppress(OSError):
            state = path.stat()
            files.append((state.st_mtime, state.st_size, path))
    taken = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if taken <= room:
            break
        path.unlink(missing_ok=True)
        taken -= size


def _download(source: TarSource, path: Path) -> None:
    """Fetch a tar, trying again where the network fails."""
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    fault = ""
    try:
        for attempt in range(TRIES):
            if attempt:
                pause(attempt)
            fault = _downloaded(source, temporary)
            if not fault:
                temporary.replace(path)
                return
    finally:
        temporary.unlink(missing_ok=True)
    raise DeclipError(fault)


def _downloaded(source: TarSource, target: Path) -> str:
    """Fetch a tar once; what is wrong with it, or nothing."""
    if fault := changed_remote(source):
        return fault
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as file:
        try:
            for block in _blocks(source.url):
                digest.update(block)
                size += len(block)
                file.write(block)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (28, 122):
                raise
            return f"{source.url!r} cannot be fetched ({words_of(error)})"
    if size != source.size:
        return f"{source.url!r} gave {size} bytes, but had {source.size} when it was listed"
    if source.sha256 and digest.hexdigest() != source.sha256:
        return (
            f"{source.url!r} is not the file of the manifest: its sha256 is {digest.hexdigest()}, "
            f"not {source.sha256}"
        )
    return ""


def _blocks(url: str) -> Iterator[bytes]:
    with fsspec.open(url, "rb", block_size=_BLOCK) as file:
        while block := file.read(_BLOCK):
            yield block
