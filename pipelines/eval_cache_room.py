"""The limit of the feature cache: folders that were used longest ago make room, whole ones; and
what killed processes left half written goes.

Who works on a folder holds a shared lock on it, which the kernel takes back from one that died; a
folder whose lock is held, or whose disk knows no locks, is never removed.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
import uuid
from collections import deque
from pathlib import Path

from declip_shards.store import TEMPORARY_MARK

log = logging.getLogger(__name__)

_IS_SET = re.compile(r"[0-9a-f]{32}")
_REMOVED = ".removed-"
_TRIES = 100
"""To lock a folder that others remove meanwhile."""
LEFTOVER_SECONDS = 3600.0
MOST_HOLDS = 64
"""Folders that a process may hold: one that runs ahead of rank 0 holds the last of them."""


class FolderHold:
    """Makes a folder, marks it as used now, and keeps it from being removed until released."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = -1
        for _ in range(_TRIES):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue
            with contextlib.suppress(OSError):  # A disk without locks: then nobody removes.
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            with contextlib.suppress(OSError):
                os.utime(folder)
                if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                    self._descriptor = descriptor
                    return
            os.close(descriptor)
        raise OSError(f"the folder {str(folder)!r} is removed again and again; look who does that.")

    def release(self) -> None:
        """Let the folder be removed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Holds:
    """The last folders that a process has worked on, held until it ends."""

    def __init__(self) -> None:
        self._kept: deque[FolderHold] = deque()

    def keep(self, hold: FolderHold) -> None:
        """Hold a folder on; the oldest is released where there are too many."""
        self._kept.append(hold)
        if len(self._kept) > MOST_HOLDS:
            self._kept.popleft().release()

    def release(self) -> None:
        """Release all."""
        while self._kept:
            self._kept.popleft().release()


def drop_features(root: Path, limit_bytes: int) -> int:
    """Remove feature folders, the longest unused first, until all together are within a limit.

    Folders at work are left, so that there may be more. One that is removed goes as a whole: it
    loses its name first.

    Args:
        root: of the cache; absent, it is empty.
        limit_bytes: of all feature folders together.

    Returns:
        Bytes that were removed.
    """
    if not root.is_dir():
        return 0
    for rest in root.glob(f"{_REMOVED}*"):
        shutil.rmtree(rest, ignore_errors=True)  # Of one that was killed in between.
    folders = [place for place in root.iterdir() if _IS_SET.fullmatch(place.name)]
    sets = [(last_use(place), bytes_in(place), place) for place in folders if place.is_dir()]
    total = sum(size for _, size, _ in sets)
    removed = num_removed = 0
    for _, size, folder in sorted(sets):
        if total - removed <= limit_bytes:
            break
        if _remove(folder):
            removed += size
            num_removed += 1
    if num_removed:
        log.info(
            "%d sets of features (%.1f GB) that were used longest ago made room in %s",
            *(num_removed, removed / 1e9, root),
        )
    return removed


def sweep_leftovers(root: Path) -> int:
    """Remove what killed processes left half written, anywhere in the cache; how many files.

    Others may be at work, on other machines too, so what counts is age: a file is written in
    seconds, and is a leftover after `LEFTOVER_SECONDS`.
    """
    oldest, num_removed = time.time() - LEFTOVER_SECONDS, 0
    for path in root.rglob(f"*{TEMPORARY_MARK}*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()
                num_removed += 1
    return num_removed


def _remove(folder: Path) -> bool:
    """Whether a folder is gone; one that is held stays."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = folder.with_name(f"{_REMOVED}{uuid.uuid4().hex}")
        folder.rename(gone)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    shutil.rmtree(gone, ignore_errors=True)
    return True


def last_use(folder: Path) -> float:
    """When a folder was used, seconds since 1970; now for one that is gone."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def bytes_in(folder: Path) -> int:
    """Bytes of the files of a folder, not of those of folders in it."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
