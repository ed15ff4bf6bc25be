"""What the files of a labelled set hold: a sha256 of each, and the state by which one that has not
changed is known without reading it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from declip_eval.set_files import SetFolder

__all__ = ["FileState", "HashFiles", "SetFile", "hash_file", "hash_files", "look_at"]

_ATTEMPTS = 3
_AT_ONCE = 4 << 20
"""Bytes of a file that is read as one: most pictures are."""
_THREADS = 16
"""Files that are read side by side: hashing leaves Python's lock alone, and disks and servers
answer several at once."""


@dataclass(frozen=True)
class SetFile:
    """One file that pictures are read from."""

    name: str
    """Relative to the dataset's folder: what stays when that moves."""
    place: str
    """Path of this machine, or URL."""
    folder: SetFolder | None = field(default=None, repr=False)
    """Whence a remote file is read, by its name; None: it lies on this machine."""
    mark: str | None = None
    """What a remote file system says of the file's content, see `SetFolder.find`."""


class FileState(NamedTuple):
    """What a file looks like from outside."""

    text: str
    """Another one after any change of the content."""
    changed_ns: int
    """When the file was changed last, nanoseconds since 1970: a change in the same tick of the
    clock would not show. 0 where the state does not go by time."""


HashFiles = Callable[[Sequence[SetFile]], list[str | None]]
"""sha256 (hex) of each file, None for one that cannot be read."""


def look_at(file: SetFile) -> FileState | None:
    """Return a file's state without reading it; None where it says too little (a size alone never
    is enough) or the file is not there."""
    if file.folder is not None:
        return None if file.mark is None else FileState(file.mark, 0)
    try:
        return _state(os.stat(file.place))
    except OSError:
        return None


def _state(found: os.stat_result) -> FileState:
    # The time of the last change of the inode cannot be set, as that of the content can.
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return FileState(f"{found.st_size} {times[0]} {times[1]}", max(times))


def hash_file(file: SetFile) -> tuple[str | None, FileState | None]:
    """Read a file through.

    Returns:
        Its sha256 (hex), None where it cannot be read; and the state that this is the hash of, None
        where that is not known or changed meanwhile.
    """
    if file.folder is not None:
        return _hash_remote(file.folder, file.name), look_at(file)
    try:
        with open(file.place, "rb", buffering=0) as opened:
            there = os.fstat(opened.fileno())
            before = _state(there)
            if there.st_size <= _AT_ONCE:
                found = hashlib.sha256(opened.read()).hexdigest()
            else:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            after = _state(os.fstat(opened.fileno()))
    except OSError:
        return None, None
    return found, after if after == before else None


def _hash_remote(folder: SetFolder, name: str) -> str | None:
    for attempt in range(_ATTEMPTS):
        time.sleep(attempt)
        try:
            data = folder.read(name)
        except ValueError:
            continue
        return None if data is None else hashlib.sha256(data).hexdigest()
    return None


def hash_files(files: Sequence[SetFile]) -> list[str | None]:
    """Read all files through, several side by side; see `HashFiles`."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return [found for found, _ in pool.map(hash_file, files)]
