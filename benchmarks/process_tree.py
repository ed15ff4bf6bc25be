"""What a command and all of its descendants cost: processor time and peak memory of each.

    python benchmarks/process_tree.py RESULT.json COMMAND ARGUMENT...

runs the command and writes ``{"status", "seconds", "cpu_seconds", "peak_megabytes", "left"}``.
Descendants that outlive their parents fall to this process, which waits for them too, so none of
their time is lost; ``left`` counts those that had to be killed. Linux only.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.2
ORPHAN_SECONDS = 10.0
_PR_SET_CHILD_SUBREAPER = 36


def descendants(pid: int) -> list[int]:
    """Process ids below ``pid``, itself left out."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue  # it has ended
            # The name, in parentheses, may hold anything.
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def peak_kilobytes(pid: int) -> int:
    """VmHWM, the most that was ever resident; 0 of a process that has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, of everything below it, and of all that they waited for,
    to a hundredth of a second."""
    ticks = 0
    for each in (pid, *descendants(pid)):
        try:
            stat = Path(f"/proc/{each}/stat").read_text()
        except OSError:
            continue
        ticks += sum(map(int, stat.rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def command_line(pid: int) -> str:
    """Program and arguments, cut short."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return " ".join(word.decode(errors="replace") for word in words if word)[:200]


class PeakSampler(threading.Thread):
    """Collects the peaks of everything below a process until stopped.

    The kernel keeps each process's peak, so a sample misses only those that live and die between
    two samples, and what a process adds in its last moments.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.peaks: dict[int, tuple[str, int]] = {}
        """Process id -> (command line, kilobytes)."""
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.sample()

    def sample(self) -> None:
        """Look once."""
        for pid in descendants(self.pid):
            peak = peak_kilobytes(pid)
            if peak:
                # The command line is read anew: between fork and exec it is the parent's.
                name, before = command_line(pid), self.peaks.get(pid, ("", 0))
                self.peaks[pid] = (name or before[0], max(peak, before[1]))

    def stop(self) -> dict[int, tuple[str, int]]:
        """The peaks found."""
        self._stopped.set()
        self.join()
        return self.peaks


def measure(command: list[str]) -> dict[str, Any]:
    """Run ``command`` to its end, and its descendants to theirs."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    process = subprocess.Popen(command)
    sampler = PeakSampler(os.getpid())
    sampler.start()
    status = process.wait()
    seconds = time.monotonic() - start
    end = time.monotonic() + ORPHAN_SECONDS
    while descendants(os.getpid()) and time.monotonic() < end:
        _reap()
        time.sleep(0.02)
    left = descendants(os.getpid())
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    while descendants(os.getpid()):
        _reap()
    peaks = sampler.stop()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "status": status,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "peak_megabytes": sorted((round(kb / 1024, 1) for _, kb in peaks.values()), reverse=True),
        "left": len(left),
    }


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure(sys.argv[2:])))
