"""A process or a loader that makes no progress is named, with what each of its threads does.

Every process beats: it writes the number of its step and what it is about to do into memory that
all processes of this machine share (:class:`Board`, :class:`Heart`). A watcher reads the beats
(:class:`StallWatch`): the launcher where there is one, else a thread of each process. Whoever waits
in a collective for a stuck process looks stuck too, so the watcher does not go by silence alone: it
names processes that are frozen or gone, then those that are behind the others.

The watcher counts its own looks, not the clock's seconds. A machine that sleeps, or a terminal's
Ctrl-Z that stops watcher and watched together, is not a stall.

Stacks are written by :mod:`faulthandler` from within a signal handler in C: a thread that holds
Python's lock for ever is shown as well.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from declip_train.heart import DUMP_SIGNAL, PHASES, Beat, Board, Heart
from declip_train.supervision import ENDED_EARLY, process_start

if TYPE_CHECKING:
    from declip_train.settings import TrainSettings

SECONDS_AFTER_A_DEATH = 1.0
"""From the death of a process to the end of the others: they can save nothing without it, but may
have something to say."""
REPORTS = "stalls"
"""Folder of the run for what was found."""
_EARLY = 0.9
"""Share of the limit after which a process with evidence against it is named. What is only silent,
and may wait for another machine's, is named at the limit."""
_UNUSUAL = 3
"""Where steps take long by themselves (a large batch on CPUs), how many times the longest of the
last ones is a stall."""
_FROZEN = 0.5
"""Share of ``stall_seconds`` that a process may be stopped by a signal."""
_STATES = {
    "T": "frozen by a signal (SIGSTOP); it goes on after kill -CONT",
    "t": "stopped by a debugger",
    "D": "waiting inside the kernel, as for a disk or a network file system that does not answer",
}
_DOING = {
    "start": "starting",
    "restore": "loading a checkpoint",
    "wait": "waiting for its loader, which has given no batch",
    "compute": "computing",
    "evaluate": "evaluating",
    "save": "saving a checkpoint",
    "export": "exporting",
}


@dataclass(frozen=True, kw_only=True)
class Stall:
    """Processes without progress."""

    culprits: tuple[Beat, ...]
    """Who holds the others up, as far as can be told from this machine."""
    waiting: tuple[Beat, ...]
    """Who waits for them."""
    seconds: float
    """Since the culprits' last progress."""
    states: tuple[str, ...]
    """Of the culprits: the letter of /proc, empty for a process that is gone."""

    def sentence(self) -> str:
        """Who, since when, at which step, doing what, and in which state."""
        told = []
        for beat, state in zip(self.culprits, self.states, strict=True):
            how = _STATES.get(state, "" if state else "gone")
            told.append(
                f"process {beat.rank} (pid {beat.pid}) has made no progress for "
                f"{self.seconds:.0f} s at step {beat.step} while {_DOING[beat.phase]}"
                + (f": it is {how}" if how else "")
            )
        text = "; ".join(told)
        if self.waiting:
            ranks = ", ".join(str(beat.rank) for beat in self.waiting)
            one = len(self.waiting) == 1
            text += f"; process{'' if one else 'es'} {ranks} wait{'s' if one else ''} for it"
        elif len(self.culprits) > 1:
            text += "; no process is behind another here: they wait for one another, or for another"
            text += " machine"
        return text


def process_state(pid: int) -> str:
    """The kernel's letter for what a process does (R, S, D, T, ...); empty for one that is gone.

    ``S`` where there is no ``/proc``.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "" if process_start(pid) is None else "S"
    return "" if state in "ZX" else state


class StallWatch:
    """Tells from the beats who makes no progress.

    Args:
        board: of this machine's processes.
        seconds: ``stall_seconds`` of the run; 0 finds nothing, ever.
        state_of: replaces :func:`process_state` in tests.
    """

    def __init__(
        self, board: Board, seconds: float, state_of: Callable[[int], str] = process_state
    ) -> None:
        self.board, self.seconds = board, seconds
        self.interval = min(1.0, max(seconds, 0.1) / 20)
        """Seconds between looks."""
        self._state_of = state_of
        self._progress: dict[int, tuple[int, int, int]] = {}
        self._silent: dict[int, float] = {}
        self._frozen: dict[int, float] = {}

    def look(self, elapsed: float) -> Stall | None:
        """Read the beats once.

        Args:
            elapsed: seconds since the last look; more than three looks' worth counts as three, for
                then the watcher itself was not running.
        """
        if self.seconds <= 0:
            return None
        elapsed = min(elapsed, 3 * self.interval)
        beats = self.board.read()
        states = {beat.rank: self._state_of(beat.pid) for beat in beats}
        for beat in beats:
            loader = beat.loader_count if beat.phase == "wait" else -1
            progress = (beat.pid, beat.count, loader)
            if self._progress.get(beat.rank) != progress:
                self._progress[beat.rank] = progress
                self._silent[beat.rank] = 0.0
            else:
                self._silent[beat.rank] += elapsed
            frozen = self._frozen.get(beat.rank, 0.0) + elapsed
            self._frozen[beat.rank] = frozen if states[beat.rank] == "T" else 0.0
        return self._judge(beats, states)

    def _judge(self, beats: Sequence[Beat], states: dict[int, str]) -> Stall | None:
        margin = 1.5 * self.interval
        stopped = [b for b in beats if self._frozen[b.rank] >= _FROZEN * self.seconds - margin]
        if stopped:
            return self._stall(stopped, beats, states)
        silent = [b for b in beats if self._share(b, margin) >= _EARLY]
        gone = [b for b in silent if not states[b.rank]]
        if gone:
            return self._stall(gone, beats, states)
        if len(silent) < len(beats) or not silent:
            # Somebody goes on; who is silent in a collective would have stopped the others too.
            late = [b for b in silent if self._share(b, margin) >= 1]
            return self._stall(late, beats, states) if late else None
        places = {b.rank: (b.step, PHASES.index(b.phase)) for b in silent}
        behind = [b for b in silent if places[b.rank] == min(places.values())]
        alone = len(behind) < len(silent) or behind[0].phase != "compute"
        if alone or all(self._share(b, margin) >= 1 for b in silent):
            return self._stall(behind, beats, states)
        return None

    def _share(self, beat: Beat, margin: float) -> float:
        """Silence as a share of what this process may need for what it does."""
        limit = max(self.seconds * beat.factor, _UNUSUAL * beat.usual_ms / 1000)
        return (self._silent[beat.rank] + margin) / limit

    def _stall(
        self, culprits: Sequence[Beat], beats: Sequence[Beat], states: dict[int, str]
    ) -> Stall:
        ranks = {beat.rank for beat in culprits}
        return Stall(
            culprits=tuple(culprits),
            waiting=tuple(b for b in beats if b.rank not in ranks and self._silent[b.rank] > 0),
            seconds=max(self._silent[rank] for rank in ranks),
            states=tuple(states[beat.rank] for beat in culprits),
        )

    def forgive(self) -> None:
        """Begin to count anew: what was named is not named again before as long has passed."""
        for counts in (self._silent, self._frozen):
            counts.update(dict.fromkeys(counts, 0.0))


def write_reports(stall: Stall, board: Board, folder: Path, *, ending: bool) -> list[Path]:
    """Ask every process of the stall for its stacks and write them down, one file a process.

    Args:
        stall: what was found.
        board: the processes'.
        folder: of the run; the files go to its ``stalls``.
        ending: whether the processes will be ended: then a frozen one is woken for a moment, since
            it can answer no signal before.

    Returns:
        The files, culprits first.
    """
    everyone = [*stall.culprits, *stall.waiting]
    sizes = {beat.rank: _size(board.stacks(beat.rank)) for beat in everyone}
    kernel = {beat.rank: kernel_view(beat.pid) for beat in everyone}
    for beat in everyone:
        with contextlib.suppress(OSError):
            os.kill(beat.pid, DUMP_SIGNAL)
            if ending and process_state(beat.pid) == "T":
                os.kill(beat.pid, signal.SIGCONT)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        if all(_size(board.stacks(rank)) > size for rank, size in sizes.items()):
            break
        time.sleep(0.02)
    # A stack is written in many small pieces.
    time.sleep(0.1)
    (folder / REPORTS).mkdir(parents=True, exist_ok=True)
    paths = []
    for beat in everyone:
        with contextlib.suppress(OSError):
            stacks = board.stacks(beat.rank).read_bytes()[sizes[beat.rank] :]
            path = folder / REPORTS / f"step_{beat.step:08d}_rank_{beat.rank:05d}.txt"
            silence = "" if stacks else "\nIt did not answer, so these are the kernel's words only."
            head = f"{stall.sentence()}\n\n{kernel[beat.rank]}{silence}\n"
            path.write_bytes(head.encode() + stacks)
            paths.append(path)
    return paths


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def kernel_view(pid: int) -> str:
    """What the kernel says of a process's threads: name, state, where each waits; one a line."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("[0-9]*"), key=lambda p: int(p.name)):
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            name = (task / "comm").read_text().strip()
            place = (task / "wchan").read_text().strip()
        except OSError:
            continue
        place = "" if place in ("", "0") else f", in {place}"
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        lines.append(
            f"thread {task.name} ({name}): state {fields[0]}{place}, {seconds:.1f} s of processor"
        )
    return "\n".join(lines)


class RankWatch:
    """The watcher inside a process, where no launcher of ours watches from outside.

    All processes of the machine do the same; the first to find a stall speaks and, if the run is to
    end, ends with a status, upon which DeepSpeed's launcher ends the others.

    Args:
        heart: of this process; its board is watched.
        seconds: ``stall_seconds``.
        folder: of the run, for reports.
        tell: takes one line for the person who watches.
        end: called to end the run; None to go on.
    """

    def __init__(
        self,
        heart: Heart,
        seconds: float,
        folder: Path,
        tell: Callable[[str], None],
        end: Callable[[Sequence[Beat]], None] | None,
    ) -> None:
        assert heart.board is not None
        self._board, self._slot, self._folder = heart.board, heart.slot, folder
        self._watch = StallWatch(heart.board, seconds)
        self._tell, self._end = tell, end
        self._closed = threading.Event()
        self._ends_upon_death = False
        self._death = 0.0
        self._named: tuple[int, int, int] | None = None
        self._times = 0
        self._thread = threading.Thread(target=self._run, name="stall-watch", daemon=True)
        if seconds > 0:
            self._thread.start()

    @classmethod
    def start(cls, heart: Heart, settings: TrainSettings, folder: Path) -> RankWatch | None:
        """Watch from within a process, as the settings say; None where there is no board."""
        if heart.board is None:
            return None
        end = _end_this_machine if settings.stall_ends_run else None
        watch = cls(heart, settings.stall_seconds, folder, _say, end)
        watch._ends_upon_death = True
        return watch

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._watch.interval):
            # Should this thread never get Python's lock again, the stacks are shown all the same.
            faulthandler.dump_traceback_later(2 * self._watch.seconds)
            now = time.monotonic()
            stall = self._watch.look(now - last)
            self._notice_death(now - last)
            last = now
            if stall is None:
                continue
            faulthandler.cancel_dump_traceback_later()
            # The first to see it speaks; a frozen process cannot be the first.
            self._closed.wait(0.2 * self._slot)
            if self._claim(stall):
                name_stall(stall, self._board, self._folder, self._tell, ending=bool(self._end))
                if self._end is not None:
                    self._end(self._board.read())
            self._watch.forgive()
        faulthandler.cancel_dump_traceback_later()

    def _notice_death(self, elapsed: float) -> None:
        """End when another process of this machine has died: it will not come to a collective."""
        dead = any(not process_state(beat.pid) for beat in self._board.read())
        self._death = self._death + elapsed if dead else 0.0
        if self._death > SECONDS_AFTER_A_DEATH and self._ends_upon_death:
            sys.stderr.flush()
            os._exit(ENDED_EARLY)

    def _claim(self, stall: Stall) -> bool:
        """Whether this process is the one to speak of a stall; silent for as long again, it is
        spoken of again."""
        beat = stall.culprits[0]
        place = (beat.rank, beat.count, beat.loader_count)
        self._times = self._times + 1 if place == self._named else 0
        self._named = place
        name = "_".join(map(str, ("claim", *place, self._times)))
        try:
            os.close(os.open(self._board.folder / name, os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        except OSError:
            return self._slot == 0
        return True

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)


def _end_this_machine(beats: Sequence[Beat]) -> None:
    """End this process with the status of a stall, and the others of its machine with it.

    DeepSpeed's launcher takes the status of the first that ends, then ends the others one by one
    and waits half a minute for each that is frozen: they are killed before, a moment after it has
    seen us end.
    """
    others = [str(beat.pid) for beat in beats if beat.pid != os.getpid()]
    if others:
        subprocess.Popen(
            ["/bin/sh", "-c", "sleep 2; kill -9 " + " ".join(others)],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    sys.stderr.flush()
    os._exit(ENDED_EARLY)


def _say(line: str) -> None:
    print(f"train: {line}", file=sys.stderr, flush=True)


def name_stall(
    stall: Stall, board: Board, folder: Path, tell: Callable[[str], None], *, ending: bool
) -> str:
    """Write the reports and say one line; returns it."""
    paths = write_reports(stall, board, folder, ending=ending)
    where = f"; what its threads do: {paths[0]}" if paths else ""
    line = f"stalled: {stall.sentence()}{where}"
    tell(line)
    return line
