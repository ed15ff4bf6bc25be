"""Training on several machines, started over ssh from a file of hosts.

On every host an agent (this module, run as ``python -m declip_train.multi_node agent``) starts
``deepspeed --no_ssh --node_rank I --hostfile ...`` for its part, watches its processes as on a
machine alone, and listens to the connection: the word ``stop`` saves and stops, ``now`` stops at
once, and the connection's end is ``stop`` as well. So no signal has to travel, and no host trains
on when the one that started it is gone. (DeepSpeed's own start of several machines wants pdsh, ends
its processes by their name, and checks the first host only.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import secrets
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import declip_shards
from declip_shards import DeclipError
from declip_train.dataset_files import output_folder
from declip_train.heart import BOARD_VARIABLE
from declip_train.launch import (
    ERROR_MARK,
    Place,
    Progress,
    RunEndedError,
    RunStalledError,
    choose_accelerator,
    import_path,
    launch,
    say_restart,
)
from declip_train.settings import TrainSettings, read_settings
from declip_train.supervision import (
    ENDED_EARLY,
    GRACE_SECONDS,
    PARENT_VARIABLE,
    SAVING_SECONDS,
    STOPPED,
    StopWish,
)

SSH_VARIABLE = "OPENDECLIP_SSH"
"""Environment: the ssh command and its options, as ``ssh -p 2222``; unset: ``ssh``."""
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3")
_PASSED_ON = ("OPENDECLIP_", "NCCL_", "GLOO_", "CUDA_", "DS_", "TORCH_", "UCX_", "HF_")
_HERE_ONLY = (PARENT_VARIABLE, BOARD_VARIABLE, SSH_VARIABLE)
_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_CONNECTION_LOST = 255
_SEEN = "seen_by_hosts"
_SECONDS_BETWEEN_LOOKS = 0.3
_PROBE_SECONDS = 120.0
"""For a host to import what training needs; the first time may read it from a slow disk."""
_SHARED_FOLDER_SECONDS = 5.0
"""For a file to be seen by other hosts: network file systems remember folders for a while."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A line of the file of hosts."""

    name: str
    """As ssh knows it."""
    slots: int
    """Processes."""


class HostLostError(RunEndedError):
    """A host could not be reached."""

    def __init__(self, host: str, sentence: str) -> None:
        super().__init__(sentence)
        self.host = host


def read_hostfile(path: str | Path) -> list[Host]:
    """Hosts of a run in the order of their processes: lines ``NAME slots=N``, as DeepSpeed's.

    Raises:
        DeclipError: no such file, no host, a line of another form, or a name that stands twice.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DeclipError(
            f"hostfile {str(path)!r} cannot be read ({error}); give a file with one line "
            "`NAME slots=N` for each host."
        ) from error
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        if found is None or found[2].strip("0") == "" or found[1].startswith("-"):
            raise DeclipError(
                f"hostfile {str(path)!r}, line {number} is {line!r}, but must be `NAME slots=N` "
                "with N from 1; correct it."
            )
        if found[1] in (host.name for host in hosts):
            raise DeclipError(
                f"hostfile {str(path)!r}, line {number}: {found[1]} stands there twice; give each "
                "host one line with all its slots."
            )
        hosts.append(Host(name=found[1], slots=int(found[2])))
    if not hosts:
        raise DeclipError(f"hostfile {str(path)!r} names no host; add lines `NAME slots=N`.")
    return hosts


def _ssh(host: Host, words: Sequence[str]) -> list[str]:
    """The command that runs ``words`` on a host, in this folder, with this Python's modules."""
    ssh = shlex.split(os.environ.get(SSH_VARIABLE, "ssh"))
    for option in _OPTIONS:
        ssh += ["-o", option]
    # What an agent must know before it is told anything.
    known = [f"PYTHONPATH={import_path()}"]
    known += [f"{name}={os.environ[name]}" for name in ("DS_ACCELERATOR",) if name in os.environ]
    remote = ["env", *known, sys.executable, "-u", *words]
    return [*ssh, host.name, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(remote)}"]


def versions() -> dict[str, str]:
    """What must be equal on all hosts: versions, and a digest of this project's own code."""
    digest = hashlib.sha256()
    for module in (__file__, str(declip_shards.__file__)):
        for path in sorted(Path(module).parent.rglob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "declip_train": digest.hexdigest()[:12],
    }


def probe(config: str, folder: str, token: str, slots: int) -> dict[str, Any]:
    """What a host is: versions, whether it sees the run's files, its address, a free port."""
    path = Path(folder) / _SEEN / token
    deadline = time.monotonic() + _SHARED_FOLDER_SECONDS
    while Path(folder).is_dir() and not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    # "client port, server, port" of the connection: this host as the other one reaches it.
    address = os.environ.get("SSH_CONNECTION", "- - 127.0.0.1 -").split()[2]
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.bind((address, 0))
        port = listener.getsockname()[1]
    return {
        "versions": versions(),
        "has_config": Path(config).is_file(),
        "has_folder": Path(folder).is_dir(),
        "sees_token": path.exists(),
        "accelerator": choose_accelerator(slots),
        "address": address,
        "port": port,
    }


def _ask(host: Host, arguments: Sequence[str]) -> dict[str, Any]:
    """:func:`probe` on a host, over ssh.

    Raises:
        HostLostError: ssh does not get there.
        DeclipError: what is there cannot answer.
    """
    command = _ssh(host, ["-m", "declip_train.multi_node", "probe", *arguments, str(host.slots)])
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise HostLostError(
            host.name,
            f"host {host.name} has not answered for {_PROBE_SECONDS:.0f} s; look after it, or "
            "take it out of the hostfile.",
        ) from None
    except FileNotFoundError as error:
        raise DeclipError(f"{command[0]!r} is not there; install ssh (openssh-client).") from error
    errors = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
    if done.returncode == _CONNECTION_LOST:
        raise HostLostError(
            host.name,
            f"host {host.name} cannot be reached over ssh ({errors[-1].strip()}); try `ssh "
            f"{host.name} true`, which must work without a password, or take it out of the "
            "hostfile.",
        )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise DeclipError(
            f"host {host.name} cannot run {sys.executable} with this project there "
            f"({errors[-1].strip()}); install the same environment at the same path on every host."
        ) from None
    assert isinstance(answer, dict)
    return answer


def _check_answers(
    hosts: Sequence[Host], answers: Sequence[Mapping[str, Any]], config: str, folder: str
) -> None:
    """Refuse hosts on which training would fail, or differ, later.

    Raises:
        DeclipError: naming the host, what is wrong and the remedy.
    """
    ours = versions()
    for host, answer in zip(hosts, answers, strict=True):
        for name, own in ours.items():
            other = answer["versions"].get(name)
            if other != own:
                raise DeclipError(
                    f"host {host.name} has {name} {other}, and this one {own}; install the same on "
                    "every host."
                )
        for what, is_there in ((config, "has_config"), (folder, "has_folder")):
            if not answer[is_there]:
                raise DeclipError(
                    f"host {host.name} does not see {what!r}; put dataset and configuration on a "
                    "file system that every host has at the same path."
                )
        if not answer["sees_token"]:
            raise DeclipError(
                f"host {host.name} has a folder {folder!r}, but not this one: a file written here "
                "does not appear there; use a file system that all hosts share."
            )
        if answer["accelerator"] != answers[0]["accelerator"]:
            raise DeclipError(
                f"host {host.name} with slots={host.slots} would train on "
                f"{answer['accelerator']}, and {hosts[0].name} on {answers[0]['accelerator']}; "
                "give each host at most as many slots as it has GPUs, or set DS_ACCELERATOR."
            )


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[str]:
    """A file that every host must see."""
    token = secrets.token_hex(8)
    path = folder / _SEEN / token
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        yield token
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def check_hosts(hosts: Sequence[Host], config: str, folder: Path) -> list[dict[str, Any]]:
    """Ask all hosts at once what they are; returns their answers.

    Raises:
        HostLostError, DeclipError: the first host of the list with which it would not go well.
    """
    with _token(folder) as token, ThreadPoolExecutor(len(hosts)) as pool:
        asked = [pool.submit(_ask, host, [config, str(folder), token]) for host in hosts]
        answers = [future.result() for future in asked]
    _check_answers(hosts, answers, config, str(folder))
    return answers


def _meeting_point(hosts: Sequence[Host], answers: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """Address and port of process 0; MASTER_ADDR and MASTER_PORT override them.

    Raises:
        DeclipError: the address is one that only the first host itself can reach.
    """
    address = os.environ.get("MASTER_ADDR", str(answers[0]["address"]))
    port = int(os.environ.get("MASTER_PORT", answers[0]["port"]))
    elsewhere = [a["address"] for a in answers if not str(a["address"]).startswith("127.")]
    if address.startswith("127.") and elsewhere:
        raise DeclipError(
            f"host {hosts[0].name} is reached at {address}, which other hosts cannot; name it in "
            "the hostfile as they do, or set MASTER_ADDR."
        )
    return address, port


class _Connection:
    """An agent on a host, and what it says."""

    def __init__(self, host: Host, order: Mapping[str, Any]) -> None:
        self.host = host
        self.last: deque[str] = deque(maxlen=50)
        # A session of its own: the terminal's Ctrl-C is ours to pass on.
        self.process = subprocess.Popen(
            _ssh(host, ["-m", "declip_train.multi_node", "agent"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"host {host.name}", daemon=True)
        self._reader.start()
        self.say(json.dumps(order))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = raw.decode(errors="replace").rstrip()
            self.last.append(line)
            if ERROR_MARK not in line:
                print(f"[{self.host.name}] {line}", file=sys.stderr, flush=True)

    def say(self, word: str) -> None:
        """Send one line; a connection that is gone hears nothing."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(word.encode() + b"\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """End the connection, which ends what runs there."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        self._reader.join(timeout=2)

    def fault(self) -> DeclipError:
        """Why the agent ended, by its own words."""
        self._reader.join(timeout=2)
        status, name = self.process.returncode, self.host.name
        own = [line.partition(ERROR_MARK)[2] for line in self.last if ERROR_MARK in line]
        if own:
            kind = RunStalledError if own[0].startswith("stalled") else RunEndedError
            return (kind if status == ENDED_EARLY else DeclipError)(f"host {name}: {own[0]}")
        tail = self.last[-1] if self.last else "it said nothing"
        return HostLostError(
            name,
            f"the connection to host {name} ended with status {status} ({tail}); look after the "
            "host, then run again to go on from the newest checkpoint.",
        )


def launch_over_ssh(
    config: str | Path, settings: TrainSettings, wish: StopWish, restarts: int = 0
) -> None:
    """Train on the hosts of ``settings.hostfile``; returns when the run is complete or ``wish`` has
    been fulfilled.

    Args:
        config: the configuration file, at the same path on every host.
        settings: of the run; ``num_ranks`` must be the sum of the slots.
        wish: to stop; passed on to every host at once.
        restarts: how often to start again when the run ends by no fault of settings or data; a host
            that is lost is left out then, and the others compute its part.

    Raises:
        HostLostError: a host cannot be reached, or is lost.
        RunStalledError: a host has found a stall, which ended the run.
        DeclipError: a host that does not fit, or the sentence of a process that failed.
    """
    assert settings.hostfile is not None
    hosts = read_hostfile(settings.hostfile)
    for left in range(restarts, -1, -1):
        try:
            run_on_hosts(config, settings, hosts, wish)
            return
        except RunEndedError as error:
            if isinstance(error, HostLostError):
                hosts = [host for host in hosts if host.name != error.host]
            if not left or not hosts or wish.status is not None:
                raise
            slots = sum(host.slots for host in hosts)
            # Refused in words where the batch cannot be shared by so many.
            settings = dataclasses.replace(settings, num_ranks=slots)
            say_restart(error, left - 1, f" on {', '.join(h.name for h in hosts)}")


def run_on_hosts(
    config: str | Path, settings: TrainSettings, hosts: Sequence[Host], wish: StopWish
) -> None:
    """:func:`launch_over_ssh` with the hosts themselves."""
    slots = sum(host.slots for host in hosts)
    if slots != settings.num_ranks:
        raise DeclipError(
            f"num_ranks is {settings.num_ranks}, but the hosts have {slots} slots in all; make "
            "them equal."
        )
    place = str(Path(config).resolve())
    folder = output_folder(settings.root) / "train"
    folder.mkdir(parents=True, exist_ok=True)
    answers = check_hosts(hosts, place, folder)
    address, port = _meeting_point(hosts, answers)
    passed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PASSED_ON) and name not in _HERE_ONLY
    }
    connections: list[_Connection] = []
    try:
        for index, host in enumerate(hosts):
            order = {
                "config": place,
                "num_ranks": settings.num_ranks,
                "slots": [host.slots for host in hosts],
                "index": index,
                "address": address,
                "port": port,
                "environment": passed,
            }
            connections.append(_Connection(host, order))
        _wait(connections, folder, wish)
    finally:
        for connection in connections:
            connection.close()


def _wait(connections: Sequence[_Connection], folder: Path, wish: StopWish) -> None:
    """Until all agents have ended; when one fails, or ``wish`` says so, all are told at once."""
    progress = Progress(folder)
    failed: _Connection | None = None
    deadline = float("inf")
    told_now = False
    while any(c.process.poll() is None for c in connections):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        progress.look()
        if failed is None:
            failed = next((c for c in connections if c.process.poll()), None)
        if (failed is not None or wish.status is not None) and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS + SAVING_SECONDS + GRACE_SECONDS
            for connection in connections:
                connection.say("stop")
        if wish.at_once and not told_now:
            told_now, deadline = True, time.monotonic() + GRACE_SECONDS
            for connection in connections:
                connection.say("now")
        if time.monotonic() > deadline:
            break
    progress.look()
    progress.close()
    if failed is None:
        failed = next((c for c in connections if c.process.poll()), None)
    if failed is None or wish.status is not None:
        return
    if failed.process.returncode == STOPPED:
        # Its scheduler, or somebody there, has asked it to stop; the others have stopped with it.
        wish.ask()
        return
    others = [
        c for c in connections if c is not failed and c.process.returncode not in (0, STOPPED)
    ]
    faults = [connection.fault() for connection in (failed, *others)]
    # Whose process died is found by the others too: a sentence of its own, or a stall, says more
    # than a connection that broke.
    raise min(faults, key=_says_little)


def _says_little(fault: DeclipError) -> int:
    if not isinstance(fault, RunEndedError):
        return 0
    return 1 if isinstance(fault, RunStalledError | HostLostError) else 2


def _agent() -> int:
    """Compute one host's part, as the first line of the input orders; returns the exit status."""
    order = json.loads(sys.stdin.readline())
    os.environ.update(order["environment"])
    wish = StopWish()

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == "now":
                wish.at_once = True
            wish.ask()
        wish.ask()

    threading.Thread(target=listen, name="listen", daemon=True).start()
    place = Place(
        slots=tuple(order["slots"]),
        index=order["index"],
        address=order["address"],
        port=order["port"],
    )
    try:
        settings = read_settings(order["config"])
        settings = dataclasses.replace(settings, num_ranks=order["num_ranks"])
        launch(order["config"], settings, place=place, wish=wish, show_progress=False)
    except DeclipError as error:
        print(f"{ERROR_MARK}{error}", flush=True)
        return int(getattr(error, "status", 1))
    finally:
        wish.close()
    return wish.status or 0


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        _, _, config, folder, token, slots = sys.argv
        print(json.dumps(probe(config, folder, token, int(slots))))
        sys.exit(0)
    sys.exit(_agent())
