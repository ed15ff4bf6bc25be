"""No process is left behind: how a training process learns that it must stop.

The ``deepspeed`` command ends at once on SIGTERM and leaves its processes training, and SIGKILL of
any parent does the same. So every training process watches its ancestors by itself: when one is
gone it asks for a checkpoint and stops, and when that takes too long it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

PARENT_VARIABLE = "OPENDECLIP_TRAIN_PARENT"
"""Environment: ``pid:start`` of the process that asked for the training."""
GRACE_SECONDS = 10.0
"""From the wish to stop to the end by force."""
_SECONDS_BETWEEN_LOOKS = 1.0
_PR_SET_PDEATHSIG = 1


def process_start(pid: int) -> str | None:
    """When a living process started, in the kernel's ticks (tells a reused number); else None.

    Where there is no ``/proc`` (macOS) this is an empty text for every living process.
    """
    try:
        # The name in parentheses may hold anything; the fields after it may not.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    return None if fields[0] in "ZX" else fields[19]


def _parent_of(pid: int) -> int:
    """Number of a process's parent; 0 where it cannot be told."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def group_members(group: int) -> list[int]:
    """Living processes of a process group, zombies left out; empty where there is no ``/proc``."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            members.append(int(entry.parent.name))
    return members


class StopSwitch:
    """Set by SIGTERM or SIGINT, or when an ancestor has died; read by the loop once a step."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def is_on(self) -> bool:
        """Whether the run has been asked to stop."""
        return self._event.is_set()

    def turn_on(self) -> None:
        """Ask the run to stop after its step."""
        self._event.set()

    def listen(self) -> None:
        """React to signals from now on. Main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.turn_on())

    def watch_ancestors(self) -> None:
        """Die with the direct parent, and stop when the launcher above it, or the process that
        asked for the training, is gone."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        watched = _ancestors()
        thread = threading.Thread(
            target=self._watch, args=(watched,), name="watch-ancestors", daemon=True
        )
        thread.start()

    def _watch(self, watched: dict[int, str]) -> None:
        while all(process_start(pid) == start for pid, start in watched.items()):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        self.turn_on()
        time.sleep(GRACE_SECONDS)
        os._exit(1)


def _ancestors() -> dict[int, str]:
    """Processes to outlive none of: launch.py, the ``deepspeed`` command, and who started it."""
    parent = os.getppid()
    named = os.environ.get(PARENT_VARIABLE, "")
    watched = {}
    for pid in (parent, _parent_of(parent)):
        start = process_start(pid) if pid > 1 else None
        if start is not None:
            watched[pid] = start
    if named:
        pid_text, _, start = named.partition(":")
        watched[int(pid_text)] = start
    return watched
