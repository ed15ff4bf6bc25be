"""Several processes that evaluate together, over a folder that they share.

Nothing is sent between them. The unit of work is a chunk: a file in the feature cache, written
whole or not at all, whose bytes do not depend on who wrote it. Rank r takes chunks r, r + N, ... of
every dataset; rank 0 joins them, and takes itself what a rank has left behind that has gone on or
died. So a rank that fails slows the others down and changes no number.
"""

import contextlib
import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from declip_shards import DeclipError
from declip_shards.store import atomic_write
from pipelines.eval_cache_room import Holds

log = logging.getLogger(__name__)

STALE_SECONDS = 60.0
"""A rank that has given no sign for so long is taken for dead."""
BEAT_SECONDS = 2.0
"""Between two signs of a rank that lives."""
POLL_SECONDS = 0.05
"""Between two looks at what others have written."""
SESSION = "DECLIP_EVAL_SESSION"
"""Names the folder of signs; set for processes that this machine's rank 0 starts."""
_RANK = ("RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
_WORLD_SIZE = ("WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
_JOB = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT", SESSION)
_ENDED = 2**62
"""Place of a rank that has nothing left to do."""


@dataclass
class Ranks:
    """Which process this is, of how many, and how far it has come.

    Args:
        rank: from 0.
        size: processes in all.
        folder: where signs are written; None for one process.
        local_rank: number on this machine, for its GPU.
    """

    rank: int = 0
    size: int = 1
    folder: Path | None = None
    local_rank: int = 0
    place: int = 0
    """The step that this process is at."""
    parent: int | None = None
    """The process of rank 0 where that started this one."""
    is_alive: Callable[[int], bool] = lambda rank: True
    """Whether the process of a rank runs, where that can be asked."""
    holds: Holds = field(default_factory=Holds, repr=False)
    """Folders of features that rank 0 still has to read."""
    _seen: dict[int, tuple[str, float]] = field(default_factory=dict)

    def mine(self, number: int) -> bool:
        """Whether a chunk is this process's to take."""
        return number % self.size == self.rank

    def begin(self, place: int) -> None:
        """Go on to a step; steps are numbered alike in all ranks, and never go back."""
        self.place = place
        self._sign()

    def end(self) -> None:
        """Say that nothing follows."""
        self.place = _ENDED
        self._sign()

    def _sign(self, beat: int = 0) -> None:
        if self.folder is not None:
            text = f"{self.place} {beat} {os.getpid()}"
            atomic_write(self.folder / f"rank-{self.rank:05d}", text.encode())

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Give a sign of life now and then, and the last one at the end, whatever happens."""
        if self.folder is None:
            yield
            return
        over = threading.Event()

        def beat() -> None:
            number = 0
            while not over.wait(BEAT_SECONDS):
                number += 1
                if self.parent is not None and os.getppid() != self.parent:
                    # Rank 0 was killed: what is done is whole, and nobody waits for the rest.
                    os._exit(1)
                # A full disk is told by what is written there in earnest.
                with contextlib.suppress(OSError):
                    self._sign(number)

        self._sign()
        thread = threading.Thread(target=beat, name="beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.holds.release()
            with contextlib.suppress(OSError):
                self.end()

    def comes(self, number: int, place: int) -> bool:
        """Whether a chunk of step ``place`` may still come from the rank that it belongs to.

        False: that rank is past the step, is dead, or has given no sign for `STALE_SECONDS`.
        """
        owner = number % self.size
        if owner == self.rank or self.folder is None or not self.is_alive(owner):
            return False
        try:
            text = (self.folder / f"rank-{owner:05d}").read_text()
        except FileNotFoundError:
            text = "0"
        now = time.monotonic()
        before = self._seen.get(owner)
        if before is None or before[0] != text:
            self._seen[owner] = (text, now)
        elif now - before[1] > STALE_SECONDS:
            return False
        return int(text.split()[0]) <= place


def ranks_of_launcher(environment: Mapping[str, str], shared: Path, *, asked: bool) -> Ranks:
    """Which process of a launcher's this is.

    Args:
        environment: of this process.
        shared: a folder that all processes see.
        asked: ``--distributed``: then SLURM's and Open MPI's variables count as well, which also
            stand in shells that start one process alone.

    Raises:
        DeclipError: numbers that cannot be, or ``--distributed`` without a launcher.
    """
    names = (_RANK, _WORLD_SIZE) if asked else (_RANK[:1], _WORLD_SIZE[:1])
    rank, size = (_number(environment, some) for some in names)
    if rank is None or size is None:
        if asked:
            raise DeclipError(
                "--distributed needs a launcher that sets RANK and WORLD_SIZE (torchrun, srun, "
                "mpirun), and there is none; give --num-ranks N to start N processes here."
            )
        return Ranks()
    if not 0 <= rank < size:
        raise DeclipError(
            f"RANK is {rank} and WORLD_SIZE {size}, but ranks go from 0 to {size - 1}; mend the "
            "launcher's variables."
        )
    if size == 1:
        return Ranks()
    job = "\n".join(environment.get(name, "") for name in _JOB)
    folder = shared / ".ranks" / hashlib.sha256(job.encode()).hexdigest()[:16]
    local_rank = _number(environment, _LOCAL_RANK)
    ranks = Ranks(rank=rank, size=size, folder=folder, local_rank=local_rank or 0)
    if rank and SESSION in environment:
        ranks.parent = int(environment[SESSION].partition("-")[0])
    return ranks


def _number(environment: Mapping[str, str], names: Sequence[str]) -> int | None:
    for name in names:
        if name in environment:
            if not environment[name].isdecimal():
                raise DeclipError(
                    f"{name} is {environment[name]!r}, but a launcher sets it to a whole number; "
                    "unset it."
                )
            return int(environment[name])
    return None


@contextlib.contextmanager
def local_ranks(argv: Sequence[str], size: int, shared: Path) -> Iterator[Ranks]:
    """Start ranks 1 to ``size - 1`` as processes of this machine; this one is rank 0.

    They end with this one: at the end they are waited for, and stopped if it fails.

    Args:
        argv: the command's arguments, which they get as they are.
        size: processes in all.
        shared: the feature cache.
    """
    if size == 1:
        yield Ranks()
        return
    # Signs of an earlier run that was killed must not be taken for this one's.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {SESSION: f"{os.getpid()}-{time.time_ns()}"}
    environment |= {"WORLD_SIZE": str(size), "RANK": "0", "LOCAL_RANK": "0"}
    ranks = ranks_of_launcher(environment, shared, asked=False)
    children: dict[int, subprocess.Popen[bytes]] = {}
    ranks.is_alive = lambda rank: rank in children and children[rank].poll() is None
    try:
        for rank in range(1, size):
            children[rank] = subprocess.Popen(
                [sys.executable, "-m", "pipelines.eval_command", *argv],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for rank 0, which ends the others.
            )
        yield ranks
        for rank, child in children.items():
            if child.wait() != 0:
                log.warning(
                    "rank %d ended with status %d; its part was done", rank, child.returncode
                )
    finally:
        _stop(children.values())
        if ranks.folder is not None:
            _remove(ranks.folder)


def _stop(children: Iterable[subprocess.Popen[bytes]]) -> None:
    """End processes that still run."""
    running = [child for child in children if child.poll() is None]
    for child in running:
        child.send_signal(signal.SIGTERM)
    for child in running:
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _remove(folder: Path) -> None:
    for path in folder.glob("*"):
        path.unlink(missing_ok=True)
    for place in (folder, folder.parent):
        with contextlib.suppress(OSError):
            place.rmdir()
