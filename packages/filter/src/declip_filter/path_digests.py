"""Digests of what users name by path, so that other content is another run.

A path says where a thing lies, not what it is: stages put the path outside their fingerprint and
the digest inside.
"""

import functools
import hashlib
import os
from pathlib import Path

BLOCK = 1 << 20


def full_path(path: str) -> str:
    """The same place, wherever a task runs; URLs stay as they are."""
    return path if not path or "://" in path else os.path.abspath(os.path.expanduser(path))


def path_digest(path: str) -> str:
    """sha256 of a local file's bytes, or of a folder's files by name and content.

    Empty where nothing is there, for the reader says so in its own words; and for a URL, whose
    content is the reader's to check.
    """
    if not path or "://" in path:
        return ""
    place = Path(path).expanduser()
    if place.is_file():
        return _file_digest(place)
    if not place.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted(p for p in place.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(place).as_posix()}\0{_file_digest(file)}\n".encode())
    return digest.hexdigest()


def path_state(path: str) -> str:
    """sha256 over the names, sizes and times of a file, or of a folder's files.

    For what is too large to be read whenever a command is given: another copy of the same files
    counts as changed, which costs a run and nothing else. Empty where nothing is there, and for a
    URL.
    """
    if not path or "://" in path:
        return ""
    place = Path(path).expanduser()
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        state = file.stat()
        name = file.relative_to(place.parent).as_posix()
        digest.update(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest() if files else ""


def _file_digest(file: Path) -> str:
    state = file.stat()
    return _digest_once(file, state.st_mtime_ns, state.st_size, state.st_ino)


@functools.lru_cache(maxsize=1024)
def _digest_once(file: Path, *state: int) -> str:
    """A stage is made several times for a command, and weights may be large."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
