"""What every training process says of its progress, in memory that its machine's processes share.

A process beats before each part of a step: the number of the step and what it is about to do.
Whoever watches (:mod:`declip_train.stalls`) reads the last beat of each.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import signal
import struct
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from declip_train.supervision import process_start

BOARD_VARIABLE = "OPENDECLIP_TRAIN_BOARD"
"""Environment: the folder of the launcher's board; unset, processes keep one among themselves."""
PHASES = ("start", "restore", "evaluate", "save", "wait", "compute", "export")
"""What a beat can say, in the order of things at the same number of steps done; ``wait`` is for the
loader."""
LONG_PHASES = {"start": 60, "restore": 30, "evaluate": 10, "save": 10, "export": 30}
"""How many times ``stall_seconds`` a phase may last, where it is more than one: reading the data
and building the model, loading, evaluating, saving, exporting."""
FIRST_STEPS = 2
"""Steps of each process that may last as long as its start: compilers run in them."""
_REMEMBERED = 8
"""Steps whose times say what is usual."""
_SLOT = struct.Struct("<8q")
_ENDED_WELL = -1
"""In the place of a count of beats."""
DUMP_SIGNAL = signal.SIGUSR2
"""Upon it a process writes what its threads do to its file beside the board."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What one process said last."""

    rank: int
    pid: int
    count: int
    """Of beats so far."""
    step: int
    phase: str
    factor: int
    """How many times the usual limit this phase may last."""
    loader_count: int
    """Of the loader's own beats."""
    usual_ms: int = 0
    """The longest that this process has been at this phase in its last steps, milliseconds."""


class Board:
    """The beats of one machine's processes, in a file that all of them have mapped.

    Args:
        folder: holds the file, and the stacks that processes write.
        slots: processes; None for a board that another process has made.
    """

    def __init__(self, folder: Path, slots: int | None = None) -> None:
        self.folder = folder
        path = folder / "beats"
        if slots is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_RDWR | (os.O_CREAT if slots is not None else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if slots is not None:
                os.ftruncate(descriptor, slots * _SLOT.size)
            self._memory = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self.slots = len(self._memory) // _SLOT.size

    def write(self, slot: int, beat: Beat) -> None:
        """Put a beat where its process writes; a few microseconds, no system call."""
        numbers = (beat.rank, beat.pid, beat.count, beat.step, PHASES.index(beat.phase))
        more = (beat.factor, beat.loader_count, beat.usual_ms)
        _SLOT.pack_into(self._memory, slot * _SLOT.size, *numbers, *more)

    def clear(self, slot: int) -> None:
        """Forget a process that has ended well, but for their number."""
        _SLOT.pack_into(self._memory, slot * _SLOT.size, 0, 0, _ENDED_WELL, *[0] * 5)

    def num_ended_well(self) -> int:
        """Processes that came to the end of what they do, be it with an error that they told."""
        slots = (_SLOT.unpack_from(self._memory, i * _SLOT.size) for i in range(self.slots))
        return sum(count == _ENDED_WELL for _, _, count, *_ in slots)

    def read(self) -> list[Beat]:
        """The last beat of every process that has beaten, by rank."""
        beats = []
        for slot in range(self.slots):
            rank, pid, count, step, phase, factor, loader_count, usual_ms = _SLOT.unpack_from(
                self._memory, slot * _SLOT.size
            )
            if pid:
                beats.append(
                    Beat(
                        rank=rank,
                        pid=pid,
                        count=count,
                        step=step,
                        phase=PHASES[phase],
                        factor=factor,
                        loader_count=loader_count,
                        usual_ms=usual_ms,
                    )
                )
        return sorted(beats, key=lambda beat: beat.rank)

    def stacks(self, rank: int) -> Path:
        """Where the process of this rank writes what its threads do, when it is asked to."""
        return self.folder / f"rank_{rank:05d}.txt"

    def remove(self) -> None:
        """Give back the names; processes that have the board open keep it."""
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
            self.folder.rmdir()


def boards_folder() -> Path:
    """Where this user's boards lie: shared memory, or where there is none the temporary folder."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    return base / f"opendeclip-boards-{os.getuid()}"


def board_folder(keeper: int) -> Path:
    """The folder of the board that belongs to a living process, its ``keeper``."""
    return boards_folder() / f"{keeper}-{process_start(keeper) or 0}"


def sweep_boards() -> None:
    """Remove boards whose keeper was killed."""
    with contextlib.suppress(OSError):
        for folder in boards_folder().iterdir():
            pid, _, start = folder.name.partition("-")
            if pid.isdigit() and (process_start(int(pid)) or "0") != start:
                for path in folder.iterdir():
                    path.unlink(missing_ok=True)
                folder.rmdir()


class Heart:
    """The beats of one process. Without a board it does nothing, at no cost.

    Args:
        board: where to write; None for a process that nobody watches.
        slot: which of the board's places is this process's.
        rank: number of this process among all machines'.
    """

    def __init__(self, board: Board | None = None, *, slot: int = 0, rank: int = 0) -> None:
        self.board, self.slot, self.rank = board, slot, rank
        self._pid = os.getpid()
        self._count = self._loader_count = self._steps = 0
        self._step, self.phase = 0, "start"
        self._since = time.monotonic()
        self._lasted = {phase: deque[float](maxlen=_REMEMBERED) for phase in ("wait", "compute")}
        if board is not None:
            # Kept open: a signal handler can open nothing.
            self._stacks = board.stacks(rank).open("ab", buffering=0)
            faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)
        self.beat(0, "start")

    def beat(self, step: int, phase: str) -> None:
        """Say that this process goes on.

        Args:
            step: steps done.
            phase: what it is about to do; one of :data:`PHASES`.
        """
        if self.board is None:
            self.phase = phase
            return
        now = time.monotonic()
        if self.phase in self._lasted:
            self._lasted[self.phase].append(now - self._since)
        self.phase, self._since = phase, now
        self._steps += phase == "wait"
        self._step = step
        self._count += 1
        self._write()

    def beat_loader(self) -> None:
        """Say that the loader goes on, though no batch is ready; from any of its threads."""
        self._loader_count += 1
        if self.board is not None:
            self._write()

    def _write(self) -> None:
        factor = LONG_PHASES.get(self.phase, 1)
        if self._steps <= FIRST_STEPS:
            factor = LONG_PHASES["start"]
        assert self.board is not None
        self.board.write(
            self.slot,
            Beat(
                rank=self.rank,
                pid=self._pid,
                count=self._count,
                step=self._step,
                phase=self.phase,
                factor=factor,
                loader_count=self._loader_count,
                usual_ms=int(1000 * max(self._lasted.get(self.phase, ()), default=0)),
            ),
        )

    def close(self) -> None:
        """Write no stacks any more."""
        if self.board is not None:
            faulthandler.unregister(DUMP_SIGNAL)
            self._stacks.close()
            # Of a process that has ended well nobody asks where it is.
            self.board.clear(self.slot)
            if BOARD_VARIABLE not in os.environ:
                self.board.remove()
            self.board = None


def join_board() -> Heart:
    """The heart of this process: on the launcher's board, or on one with the other processes that
    DeepSpeed's launcher has started here."""
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    here = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
    given = os.environ.get(BOARD_VARIABLE)
    try:
        if given:
            board = Board(Path(given))
        else:
            sweep_boards()
            board = Board(board_folder(os.getppid()), slots=here)
    except OSError:
        # Without shared memory a run is not watched, and trains all the same.
        return Heart(rank=rank)
    # DeepSpeed's numbers within a machine are right as a set.
    return Heart(board, slot=local % board.slots, rank=rank)
