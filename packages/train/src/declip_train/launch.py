"""Start the training processes under DeepSpeed's launcher, and leave none of them behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import declip_shards
from declip_shards import DeclipError
from declip_train.dataset_files import output_folder
from declip_train.extension import ensure_built, extensions_folder, sweep_shared_memory
from declip_train.heart import BOARD_VARIABLE, Board, board_folder, sweep_boards
from declip_train.monitor import SECONDS_BETWEEN_LINES, read_last_record, summary_line
from declip_train.settings import TrainSettings
from declip_train.stalls import SECONDS_AFTER_A_DEATH, StallWatch, name_stall, process_state
from declip_train.supervision import (
    ENDED_EARLY,
    INTERRUPTED,
    PARENT_VARIABLE,
    STOPPED,
    StopWish,
    end_group,
    hold_file,
    process_start,
    signal_group,
)

LAUNCH_LOG = "launch.log"
"""In the run's folder: what the launcher and all processes print."""
ERROR_MARK = "declip_train: error: "
"""How a process begins the sentence that says why it cannot go on."""
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_SIOCGIFADDR = 0x8915
"""Linux's question for the address of an interface."""
_SECONDS_BETWEEN_LOOKS = 0.3


@dataclass(frozen=True, kw_only=True)
class Place:
    """The part of a run that this machine computes."""

    slots: tuple[int, ...]
    """Processes of each machine, in the order of their ranks."""
    index: int
    """Which of them this is."""
    address: str
    """Where process 0 listens, on machine 0."""
    port: int

    @property
    def here(self) -> int:
        """Processes of this machine."""
        return self.slots[self.index]

    @property
    def is_alone(self) -> bool:
        """Whether there is no other machine."""
        return len(self.slots) == 1

    @property
    def log(self) -> str:
        """Name of the file in the run's folder that takes what this machine's processes print."""
        return LAUNCH_LOG if self.index == 0 else f"launch.host_{self.index:05d}.log"


class RunEndedError(DeclipError):
    """A run ended by no fault of settings or data, as far as can be told: started again it may
    go on."""

    status = ENDED_EARLY
    """What a command that reports it exits with."""


class RunStalledError(RunEndedError):
    """A run made no progress and was ended; started again it goes on."""


def choose_accelerator(num_ranks: int) -> str:
    """``cuda`` where every process can have a GPU, else ``cpu``; DS_ACCELERATOR overrides it."""
    given = os.environ.get("DS_ACCELERATOR")
    if given:
        return given
    import torch

    return "cuda" if 0 < num_ranks <= torch.cuda.device_count() else "cpu"


def training_environment(settings: TrainSettings, place: Place | None = None) -> dict[str, str]:
    """What the training processes must find in their environment, beside what is there.

    Args:
        settings: the run.
        place: this machine's part; None where it computes all of it.
    """
    here = place.here if place is not None else settings.num_ranks
    environment = {
        "DS_ACCELERATOR": choose_accelerator(here),
        "OMP_NUM_THREADS": str(settings.threads_per_rank),
        "TORCH_EXTENSIONS_DIR": str(extensions_folder()),
        # One number, and one name, fewer that differ from run to run.
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # Gloo would look up the machine's own name, which laptops often cannot resolve, and NCCL would
    # take any network: alone, a machine listens to itself only.
    interface = _LOOPBACK
    if place is not None and not place.is_alone:
        interface = interface_towards(place.address)
    if interface:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment[name] = os.environ.get(name, interface)
    return environment


def interface_towards(address: str) -> str:
    """Name of the network interface by which this machine reaches an address; empty if it cannot
    be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # A datagram socket sends nothing upon this; the kernel chooses the way.
            probe.connect((address, 9))
            own = probe.getsockname()[0]
    except OSError:
        return ""
    for _, name in socket.if_nameindex():
        request = struct.pack("256s", name.encode())
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET) as probe:
            reply = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            if socket.inet_ntoa(reply[20:24]) == own:
                return name
    return ""


def place_from_environment() -> Place | None:
    """This machine's part as DeepSpeed's launcher tells its processes; None if it is all."""
    here, everywhere = int(os.environ.get("LOCAL_SIZE", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 < here < everywhere:
        return None
    # How many the other machines have is of no matter to a process.
    return Place(
        slots=(here, everywhere - here),
        index=0,
        address=os.environ.get("MASTER_ADDR", ""),
        port=int(os.environ.get("MASTER_PORT", 0)),
    )


def prepare_environment(settings: TrainSettings) -> bool:
    """Set this process's environment, before torch and DeepSpeed are imported.

    Returns:
        Whether DeepSpeed will want its compiled CPU operator.
    """
    environment = training_environment(settings, place_from_environment())
    os.environ.update(environment)
    return environment["DS_ACCELERATOR"] == "cpu"


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def import_path() -> str:
    """PYTHONPATH under which the children find what this process has imported."""
    ours = [str(Path(module).parent.parent) for module in (__file__, str(declip_shards.__file__))]
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(dict.fromkeys([*ours, *filter(None, given.split(os.pathsep))]))


def launch_command(
    config: str | Path, num_ranks: int, port: int, place: Place | None = None, hosts: str = ""
) -> list[str]:
    """The ``deepspeed`` command, by this environment's own Python.

    Args:
        config: file of settings.
        num_ranks: processes of the whole run, whatever the file says.
        port: of the loopback, for a machine alone.
        place: this machine's part of a run on several, with its own port.
        hosts: DeepSpeed's file of hosts for that; their names are of no matter.
    """
    runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if place is None or place.is_alone:
        runner += ["--num_gpus", str(num_ranks)]
        address = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    else:
        runner += ["--hostfile", hosts, "--no_ssh", "--node_rank", str(place.index)]
        address = ["--master_addr", place.address, "--master_port", str(place.port)]
    ours = ["--module", "declip_train", "--quiet", "--num-ranks", str(num_ranks), str(config)]
    return [*runner, *address, *ours]


class Progress:
    """Shows how far the run is, read from its log.

    Args:
        folder: of the run.
        show: whether to.
    """

    def __init__(self, folder: Path, *, show: bool = True) -> None:
        self.folder, self._show = folder, show
        self._bar = tqdm(desc="train", unit="step", disable=not sys.stderr.isatty())
        self._last_line = time.monotonic()
        self._last_step = -1
        self._began = time.time()

    def look(self) -> None:
        """Read the newest record and show it, if it is time."""
        if not self._show:
            return
        record = read_last_record(self.folder)
        if record is None or record["time"] < self._began:
            return
        done, total = record["step"], record["num_steps"]
        if self._bar.disable:
            waited = time.monotonic() - self._last_line
            if waited >= SECONDS_BETWEEN_LINES and done != self._last_step:
                self._last_line, self._last_step = time.monotonic(), done
                batch = record["samples_seen"] / done
                left = (total - done) * batch / record["samples_per_second"]
                line = f"train: step {done}/{total}, {summary_line(record)}, {left:.0f} s left"
                print(line, file=sys.stderr, flush=True)
            return
        if self._bar.total != total:
            self._bar.total, self._bar.initial = total, done
        self._bar.n = done
        self._bar.set_postfix_str(summary_line(record))

    def close(self) -> None:
        """Leave the last line standing."""
        self._bar.close()


def launch(
    config: str | Path,
    settings: TrainSettings,
    *,
    place: Place | None = None,
    wish: StopWish | None = None,
    restarts: int = 0,
    show_progress: bool = True,
) -> None:
    """Train in ``settings.num_ranks`` processes; returns when the run is complete.

    With ``settings.hostfile`` they are started on its machines over ssh. Whatever ends this call
    early (an exception, Ctrl-C, SIGTERM) is passed on to every process: they write a checkpoint and
    stop, by force after a grace period, or at once upon a second Ctrl-C. Should this process be
    killed, they notice by themselves.

    Args:
        config: the configuration file that ``settings`` were read from.
        settings: for what must be known outside: processes, threads, folder.
        place: this machine's part of a run that was started on several machines.
        wish: to stop; None takes it from this process's signals.
        restarts: how often to start again when the run ends by no fault of settings or data.
        show_progress: whether to say now and then how far the run is.

    Raises:
        RunStalledError: no progress for ``stall_seconds``, and ``stall_ends_run``.
        DeclipError: a process failed; with its sentence, and the path of the log.
        SystemExit: SIGTERM and the like; the code is the status.
        KeyboardInterrupt: Ctrl-C.
    """
    own_wish = StopWish() if wish is None else wish
    try:
        if settings.hostfile and place is None:
            from declip_train.multi_node import launch_over_ssh

            launch_over_ssh(config, settings, own_wish, restarts)
        else:
            part = _Part(Path(config).resolve(), settings, place, show_progress)
            _launch_here(part, own_wish, restarts)
    finally:
        if wish is None:
            own_wish.close()
    if wish is None and own_wish.status is not None:
        if own_wish.status == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(own_wish.status)


@dataclass(frozen=True)
class _Part:
    """What this machine is to compute."""

    config: Path
    settings: TrainSettings
    place: Place | None
    show_progress: bool


def _launch_here(part: _Part, wish: StopWish, restarts: int) -> None:
    """Compute this machine's part, and again if it ends early; a wish to stop is no error."""
    for left in range(restarts, -1, -1):
        try:
            _run_here(part, wish)
            return
        except RunEndedError as error:
            if not left or wish.status is not None:
                raise
            say_restart(error, left - 1)


def say_restart(error: RunEndedError, left: int, where: str = "") -> None:
    """Tell the person who watches that a run is started again, and why."""
    _say(f"{error} Starting again{where}; {left} more times after this.")


def _run_here(part: _Part, wish: StopWish) -> None:
    """Start this machine's processes and wait for them."""
    settings, place = part.settings, part.place
    folder = output_folder(settings.root) / "train"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **training_environment(settings, place)}
    environment["PYTHONPATH"] = import_path()
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), environment.get("PATH", "")]
    )
    environment[PARENT_VARIABLE] = f"{os.getpid()}:{process_start(os.getpid())}"
    if environment["DS_ACCELERATOR"] == "cpu":
        ensure_built()
        sweep_shared_memory()
    sweep_boards()
    here = place.here if place is not None else settings.num_ranks
    board = Board(board_folder(os.getpid()), slots=here)
    environment[BOARD_VARIABLE] = str(board.folder)
    hosts = board.folder / "hosts"
    if place is not None:
        lines = [f"host-{index} slots={slots}\n" for index, slots in enumerate(place.slots)]
        hosts.write_text("".join(lines))
    command = launch_command(part.config, settings.num_ranks, free_port(), place, str(hosts))
    name = place.log if place is not None else LAUNCH_LOG
    # A second run must not write over what this one says, nor take its words for its own.
    held = hold_file(folder / name, lambda: wish.status is not None)
    try:
        if wish.status is not None:
            return
        with (folder / name).open("wb") as log:
            # A group of its own: signals reach all of it, and none of ours.
            child = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        # Of several machines, the first shows how far it is.
        progress = Progress(folder, show=part.show_progress and name == LAUNCH_LOG)
        _Vigil(child, folder, board, settings, wish, progress, log=folder / name).keep()
    finally:
        held.close()
        board.remove()


class _Vigil:
    """Waits for the ``deepspeed`` command, and for whatever is to end it earlier."""

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        folder: Path,
        board: Board,
        settings: TrainSettings,
        wish: StopWish,
        progress: Progress,
        *,
        log: Path,
    ) -> None:
        self.child, self.folder, self.board, self.wish, self.log = child, folder, board, wish, log
        self._ends = settings.stall_ends_run
        self._watch = StallWatch(board, settings.stall_seconds)
        self._progress = progress
        self._death: float | None = None
        self._pids: set[int] = set()
        """Of the training processes, as they came."""

    def keep(self) -> None:
        """Return when the group of processes is gone.

        Raises:
            RunStalledError, DeclipError: as :func:`launch`.
        """
        progress = self._progress
        stalled = died = ""
        try:
            last = time.monotonic()
            while self.child.poll() is None and self.wish.status is None and not stalled + died:
                time.sleep(min(_SECONDS_BETWEEN_LOOKS, self._watch.interval))
                progress.look()
                now = time.monotonic()
                stalled = self._look(now - last)
                died = self._look_for_the_dead(now)
                last = now
            progress.look()
        finally:
            progress.close()
            if stalled or died:
                # They would not hear anything gentler, and have nothing to save without the dead.
                signal_group(self.child.pid, signal.SIGKILL)
            end_group(self.child.pid, is_saving=self._is_saving, at_once=self._need_not_wait)
            self.child.wait()
        if stalled:
            raise RunStalledError(
                f"{stalled}; the run was ended, run again to go on from the newest checkpoint."
            )
        if self.wish.status is not None:
            return
        if self.child.returncode == STOPPED:
            self.wish.ask()
        elif self.child.returncode or self.board.num_ended_well() < self.board.slots:
            # DeepSpeed's command ends with 0 when what it has started was killed.
            raise _first_cause(self.log, self.child.returncode, died or self._name_the_dead())

    def _look(self, elapsed: float) -> str:
        """Name a stall; returns its sentence if the run is to end for it."""
        stall = self._watch.look(elapsed)
        if stall is None:
            return ""
        line = name_stall(stall, self.board, self.folder, _say, ending=self._ends)
        with contextlib.suppress(OSError), self.log.open("a") as log:
            log.write(f"train: {line}\n")
        self._watch.forgive()
        return line if self._ends else ""

    def _look_for_the_dead(self, now: float) -> str:
        """Name processes that have died for long enough that the others have been heard.

        DeepSpeed's launcher would end the others one by one, and wait for each.
        """
        sentence = self._name_the_dead()
        if not sentence:
            self._death = None
            return ""
        self._death = now if self._death is None else self._death
        return sentence if now - self._death > SECONDS_AFTER_A_DEATH else ""

    def _name_the_dead(self) -> str:
        """Who ended without a word; empty where nobody did."""
        beats = self.board.read()
        self._pids.update(beat.pid for beat in beats)
        dead = [beat for beat in beats if not process_state(beat.pid)]
        return "; ".join(
            f"process {beat.rank} (pid {beat.pid}) died at step {beat.step} (phase {beat.phase!r})"
            for beat in dead
        )

    def _need_not_wait(self) -> bool:
        """Whether those that are left have nothing to save: DeepSpeed's launcher takes seconds to
        end, with no process below it."""
        ended = len(self._pids) == self.board.slots and not any(map(process_state, self._pids))
        return self.wish.at_once or ended

    def _is_saving(self) -> bool:
        return any(
            beat.phase == "save" and process_state(beat.pid) not in ("", "T")
            for beat in self.board.read()
        )


def _say(line: str) -> None:
    print(f"train: {line}", file=sys.stderr, flush=True)


def _first_cause(log: Path, status: int, dead: str = "") -> DeclipError:
    """What went wrong, in one sentence: a process's own, who died, or the log's last lines."""
    lines = log.read_text(errors="replace").splitlines()
    own = [line.partition(ERROR_MARK)[2] for line in lines if ERROR_MARK in line]
    if own:
        return DeclipError(own[0])
    where = f"{str(log)!r}); run again to go on from the newest checkpoint."
    if dead:
        return RunEndedError(
            f"{dead}: killed (by the system, when memory runs out), or crashed (what all of them "
            f"said: {where}"
        )
    told = [line.strip() for line in lines if line.strip() and "[INFO]" not in line]
    errors = [line for line in told if "Error" in line and "launch.py" not in line]
    last = (errors or told or ["it said nothing"])[-1]
    return RunEndedError(f"training ended with status {status}: {last} (all of it: {where}")
