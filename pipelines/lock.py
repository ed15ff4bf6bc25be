"""One run at a time in a dataset folder."""

import contextlib
import fcntl
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TextIO

from declip_shards import DeclipError, Store
from declip_shards.store import TEMPORARY_MARK
from pipelines.lease import hold_lease

LOCK = "manifests/lock"
"""Held by the run, alone."""
TASKS_LOCK = "manifests/tasks.lock"
"""Held by every task at work, together: a new run waits for those that outlive their own run."""
TASKS_SECONDS = 60.0
"""For tasks of an earlier run to end; Ray ends them within seconds of their driver's death."""
LEFTOVER = re.compile(re.escape(TEMPORARY_MARK) + r"(?:(\d+)-[0-9a-f]{8}|[0-9a-f]{32})$")
"""End of a temporary name of ours; the group is the number of the process that wrote it."""
DAY_SECONDS = 86400.0


class Hold(Protocol):
    """The right to write to a dataset."""

    def check(self) -> None:
        """Raise a DeclipError where it is lost: call it before anything is published."""


class _LocalHold:
    def __init__(self, store: Store, file: TextIO) -> None:
        self.store, self.file = store, file

    def check(self) -> None:
        """The file of the lock must still be the one in place: another run would lock that one."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.file.name)):
                return
        raise DeclipError(
            f"{LOCK} in {self.store.url!r} was removed or replaced while this run held it, so "
            "another one may be writing; nothing more is written. Run the same command again."
        )


@contextlib.contextmanager
def workspace_lock(store: Store) -> Iterator[Hold]:
    """Hold the dataset while a run writes to it, and sweep what killed ones left half written.

    On a local disk the lock is the kernel's (``flock``): it goes with the process that holds it,
    however that ends, so there is no stale lock to clean. A remote store has a lease
    (:mod:`pipelines.lease`), which expires.

    Raises:
        DeclipError: another run holds it; the owner is named. Or it was lost on the way.
    """
    if not store.is_local:
        with hold_lease(store) as lease:
            yield lease
        return
    path = store.local_path(LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DeclipError(
                f"another run (process {_owner(f)}) is writing to {store.url!r}; "
                "wait for it, stop it, or choose another --out."
            ) from None
        f.truncate(0)
        f.write(f"{os.getpid()} on {socket.gethostname()}")
        f.flush()
        _wait_for_tasks(store)
        sweep(store, before=os.fstat(f.fileno()).st_mtime)
        try:
            yield _LocalHold(store, f)
            sweep(store, before=time.time())  # of workers that were lost on the way
        finally:
            f.truncate(0)


def _owner(file: TextIO) -> str:
    """Who holds the lock, as it wrote.

    Who has just taken it needs a moment to write, and until then a killed run's name stands there.
    """
    owner = ""
    for _ in range(20):
        time.sleep(0.05)
        file.seek(0)
        owner = file.read().strip()
        number, _, host = owner.partition(" on ")
        is_here = host == socket.gethostname() and number.isdecimal()
        if owner and (not is_here or _is_alive(int(number))):
            break
    return owner or "unknown"


@contextlib.contextmanager
def task_lock(store: Store) -> Iterator[None]:
    """Say that a task is at work on a local dataset, until it ends or its process dies."""
    if not store.is_local:
        yield
        return
    path = store.local_path(TASKS_LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        fcntl.flock(f, fcntl.LOCK_SH)
        yield


def _wait_for_tasks(store: Store) -> None:
    """Let tasks end whose run was killed: of other settings, they would mix two runs' files."""
    path = store.local_path(TASKS_LOCK)
    path.touch()
    start = time.monotonic()
    is_told = False
    with path.open("a") as f:
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waited = time.monotonic() - start
            if waited > TASKS_SECONDS:
                raise DeclipError(
                    f"tasks of an earlier run still write to {store.url!r} after "
                    f"{TASKS_SECONDS:.0f} s (its run is gone; they hold {TASKS_LOCK}); end their "
                    "processes, or choose another --out."
                )
            if waited > 2 and not is_told:
                is_told = True
                print("  waiting for tasks of an earlier run to end", file=sys.stderr, flush=True)
            time.sleep(0.05)


def sweep(store: Store, *, before: float) -> list[str]:
    """Remove temporary files that killed processes left in a local dataset.

    Args:
        store: the dataset.
        before: modification time, as the disk counts, from which on files are left alone.

    Returns:
        Their names. A file whose process is still alive here stays for a day.
    """
    swept = []
    for folder, _, names in os.walk(store.root):
        for name in names:
            if TEMPORARY_MARK in name and (found := LEFTOVER.search(name)):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    age = before - path.stat().st_mtime
                    writer = int(found[1]) if found[1] else 0
                    if age > DAY_SECONDS or (age > 0 and not _is_alive(writer)):
                        path.unlink()
                        swept.append(os.path.relpath(path, store.root))
    return sorted(swept)


def _is_alive(process: int) -> bool:
    """Whether a process of that number runs here; it may have got the number of a dead one."""
    if process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
