"""Start the training processes under DeepSpeed's launcher, and leave none of them behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

import declip_shards
from declip_shards import DeclipError
from declip_shards.store import Store
from declip_train.extension import ensure_built, extensions_folder, sweep_shared_memory
from declip_train.monitor import SECONDS_BETWEEN_LINES, read_last_record, summary_line
from declip_train.settings import TrainSettings
from declip_train.supervision import (
    GRACE_SECONDS,
    PARENT_VARIABLE,
    group_members,
    process_start,
)

LAUNCH_LOG = "launch.log"
"""In the run's folder: what the launcher and all processes print."""
_ERROR_MARK = "declip_train: error: "
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def choose_accelerator(num_ranks: int) -> str:
    """``cuda`` where every process can have a GPU, else ``cpu``; DS_ACCELERATOR overrides it."""
    given = os.environ.get("DS_ACCELERATOR")
    if given:
        return given
    import torch

    return "cuda" if 0 < num_ranks <= torch.cuda.device_count() else "cpu"


def training_environment(settings: TrainSettings) -> dict[str, str]:
    """What the training processes must find in their environment, beside what is there."""
    environment = {
        "DS_ACCELERATOR": choose_accelerator(settings.num_ranks),
        "OMP_NUM_THREADS": str(settings.threads_per_rank),
        "TORCH_EXTENSIONS_DIR": str(extensions_folder()),
        # One number, and one name, fewer that differ from run to run.
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if environment["DS_ACCELERATOR"] == "cpu":
        # Gloo would look up the machine's own name, which laptops often cannot resolve, and talk
        # over whatever network that gives.
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", _LOOPBACK)
    return environment


def prepare_environment(settings: TrainSettings) -> bool:
    """Set this process's environment, before torch and DeepSpeed are imported.

    Returns:
        Whether DeepSpeed will want its compiled CPU operator.
    """
    environment = training_environment(settings)
    os.environ.update(environment)
    return environment["DS_ACCELERATOR"] == "cpu"


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _import_path() -> str:
    """PYTHONPATH under which the children find what this process has imported."""
    ours = [str(Path(module).parent.parent) for module in (__file__, str(declip_shards.__file__))]
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(dict.fromkeys([*ours, *filter(None, given.split(os.pathsep))]))


def launch_command(config: str | Path, num_ranks: int, port: int) -> list[str]:
    """The ``deepspeed`` command, by this environment's own Python."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks)]
    address = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [*runner, *address, "--module", "declip_train", "--quiet", str(config)]


class _Progress:
    """Shows how far the run is, read from its log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bar = tqdm(desc="train", unit="step", disable=not sys.stderr.isatty())
        self._last_line = time.monotonic()
        self._last_step = -1
        self._began = time.time()

    def look(self) -> None:
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
        self._bar.close()


class _Terminated(BaseException):
    """SIGTERM reached the process that launched the training."""


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def launch(config: str | Path, settings: TrainSettings) -> None:
    """Train in ``settings.num_ranks`` processes; returns when the run is complete.

    Whatever ends this call early (an exception, Ctrl-C, SIGTERM) is passed on to every process:
    they write a checkpoint and stop, by force after a grace period. Should this process be killed,
    they notice by themselves.

    Args:
        config: the configuration file that ``settings`` were read from.
        settings: for what must be known outside: processes, threads, folder.

    Raises:
        DeclipError: a process failed; with its sentence, and the path of the log.
    """
    folder = Store(settings.root).local_path("train")
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **training_environment(settings), "PYTHONPATH": _import_path()}
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), environment.get("PATH", "")]
    )
    environment[PARENT_VARIABLE] = f"{os.getpid()}:{process_start(os.getpid())}"
    if environment["DS_ACCELERATOR"] == "cpu":
        ensure_built()
        sweep_shared_memory()
    command = launch_command(Path(config).resolve(), settings.num_ranks, free_port())
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous: Any = signal.SIG_DFL
    if in_main_thread:
        previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        with (folder / LAUNCH_LOG).open("wb") as log:
            # A group of its own: signals reach all of it, and none of ours.
            child = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        _watch(child, folder)
    except _Terminated:
        sys.exit(128 + signal.SIGTERM)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def _watch(child: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for the launcher; end its whole group if we are leaving before it does."""
    progress = _Progress(folder)
    try:
        while child.poll() is None:
            time.sleep(0.3)
            progress.look()
        progress.look()
    finally:
        progress.close()
        end_group(child.pid)
        child.wait()
    if child.returncode:
        raise DeclipError(_first_cause(folder / LAUNCH_LOG, child.returncode))


def end_group(group: int, grace_seconds: float = GRACE_SECONDS) -> None:
    """Ask every process of a group to stop, all at once; by force after ``grace_seconds``."""
    if not group_members(group):
        return
    _signal_group(group, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while group_members(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    if group_members(group):
        _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass


def _first_cause(log: Path, status: int) -> str:
    """What went wrong, in one sentence: the first process's own, or the log's last lines."""
    lines = log.read_text(errors="replace").splitlines()
    own = [line.partition(_ERROR_MARK)[2] for line in lines if _ERROR_MARK in line]
    if own:
        return own[0]
    told = [line.strip() for line in lines if line.strip() and "[INFO]" not in line]
    errors = [line for line in told if "Error" in line and "launch.py" not in line]
    last = (errors or told or ["it said nothing"])[-1]
    return (
        f"training ended with status {status}: {last} (all of it: {str(log)!r}); run again to go "
        "on from the newest checkpoint."
    )
