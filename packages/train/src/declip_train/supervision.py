"""No process is left behind: how a training process learns that it must stop, and ends in time.

The ``deepspeed`` command ends at once on SIGTERM and leaves its processes training, and SIGKILL of
any parent does the same. So every training process watches its ancestors by itself: when one is
gone it asks for a checkpoint and stops, and when that takes too long it ends.

What a run can end with, as a process's exit status:

    0    the run is complete
    1    it cannot go on: a wrong setting, faulty data; the sentence says what
    75   it stalled and was ended, or a process or a host died (EX_TEMPFAIL): start it again, it
         goes on
    130  SIGINT: it was saved, or stopped at once by the second one
    143  SIGTERM or SIGUSR1: it was saved; start it again, it goes on
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from declip_shards import DeclipError

ENDED_EARLY = 75
INTERRUPTED = 128 + signal.SIGINT
STOPPED = 128 + signal.SIGTERM
"""Exit statuses; see above."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a run to save and stop; SIGUSR1 is what SLURM's ``--signal`` is mostly told to send."""
PARENT_VARIABLE = "OPENDECLIP_TRAIN_PARENT"
"""Environment: ``pid:start`` of the process that asked for the training."""
GRACE_SECONDS = 10.0
"""From the wish to stop to the end by force."""
SAVING_SECONDS = 15.0
"""What a checkpoint that is being written then gets on top; Kubernetes waits 30 s in all."""
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


def hold_file(path: Path, give_up: Callable[[], bool] = lambda: False) -> BinaryIO:
    """Open a file that one run at a time may have; the kernel's lock goes with this process.

    A run that was asked to stop a moment ago may still be saving: it gets the time for that.

    Args:
        path: of the file; created, and what is in it stays.
        give_up: asked all the while; true ends the waiting, without the lock.

    Raises:
        DeclipError: another run still has it after that.
    """
    file = path.open("ab")
    deadline = time.monotonic() + GRACE_SECONDS + SAVING_SECONDS + 5
    while not give_up():
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise DeclipError(
                    f"another training run is writing to {str(path.parent)!r}; wait for it or stop "
                    "it."
                ) from None
            time.sleep(0.2)
    return file


def signal_group(group: int, number: int) -> None:
    """Send a signal to every process of a group; nothing happens where there is none."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def end_group(
    group: int,
    grace_seconds: float | None = None,
    is_saving: Callable[[], bool] = lambda: False,
    at_once: Callable[[], bool] = lambda: False,
) -> None:
    """Ask every process of a group to stop, all at once; by force after ``grace_seconds``.

    Args:
        group: of processes; none of them is this one's.
        grace_seconds: from asking to force; unset: :data:`GRACE_SECONDS`.
        is_saving: whether a checkpoint is being written, which is given :data:`SAVING_SECONDS`.
        at_once: asked all the while; true ends the grace.
    """
    if not group_members(group):
        return
    grace = GRACE_SECONDS if grace_seconds is None else grace_seconds
    signal_group(group, signal.SIGTERM)
    began = time.monotonic()
    while group_members(group) and not at_once():
        waited = time.monotonic() - began
        if waited > grace + (SAVING_SECONDS if is_saving() else 0):
            break
        time.sleep(0.05)
    if group_members(group):
        signal_group(group, signal.SIGKILL)
        # Until the kernel has done so: who returns from here leaves nobody behind.
        deadline = time.monotonic() + 5
        while group_members(group) and time.monotonic() < deadline:
            time.sleep(0.01)


class StopWish:
    """Signals to a process that waits for a training: it is told, not interrupted.

    The first one asks to save and stop; a second SIGINT asks to stop at once. Handlers are put back
    by :meth:`close`; outside of the main thread nothing is handled. A signal that the caller
    ignores (``nohup``) stays ignored.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        """Exit status for the signal that came first; None as long as none did."""
        self.at_once = False
        """Whether to end by force now."""
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (*STOP_SIGNALS, signal.SIGHUP):
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.at_once = self.status is not None
        if self.status is None:
            # SIGUSR1 stands for SIGTERM: the scheduler sends it earlier.
            self.status = 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)

    def ask(self, status: int = STOPPED) -> None:
        """Ask to stop as a signal would."""
        if self.status is None:
            self.status = status

    def close(self) -> None:
        """Handle signals as before."""
        for number, before in self._before.items():
            signal.signal(number, before or signal.SIG_DFL)
        self._before.clear()


class StopSwitch:
    """Set by a signal, or when an ancestor has died; read by the loop once a step.

    Args:
        by_force: whether the process is ended when it has not ended by itself :data:`GRACE_SECONDS`
            after that (a checkpoint that is being written has :data:`SAVING_SECONDS` more): it may
            be waiting for another process that is gone.
    """

    def __init__(self, *, by_force: bool = False) -> None:
        self._event = threading.Event()
        self._by_force = by_force
        self._interrupted = False
        self.is_saving: Callable[[], bool] = lambda: False
        """Whether this process is writing a checkpoint."""

    @property
    def is_on(self) -> bool:
        """Whether the run has been asked to stop."""
        return self._event.is_set()

    def turn_on(self, status: int = STOPPED) -> None:
        """Ask the run to stop after its step.

        Args:
            status: of the process, should it have to be ended by force.
        """
        # A signal handler may come while this runs in the same thread: no lock. Two threads that
        # get here at once end the process at the same time.
        asked_before = self._event.is_set()
        self._event.set()
        if self._by_force and not asked_before:
            threading.Thread(target=self._force, args=(status,), name="stop", daemon=True).start()

    def _force(self, status: int) -> None:
        time.sleep(GRACE_SECONDS)
        deadline = time.monotonic() + SAVING_SECONDS
        while self.is_saving() and time.monotonic() < deadline:
            time.sleep(0.1)
        os._exit(status)

    def listen(self) -> None:
        """React to signals from now on. Main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(INTERRUPTED)
            self._interrupted = True
        self.turn_on()

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
