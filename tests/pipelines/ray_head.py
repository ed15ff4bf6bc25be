"""A real Ray head for tests: its Python has what the workers need and none of our packages."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
MARK = "DECLIP_TEST_HEAD"
"""Environment variable that every process of the head inherits: how teardown finds them all."""
START_SECONDS = 90.0
TOKEN = "a-token-of-the-tests-only"


def worker_requirements() -> list[str]:
    """The lines of the two files that docs/cluster.md tells people to install on workers."""
    lines = []
    for name in ("ingest.txt", "filter.txt"):
        text = (REPOSITORY / "requirements" / name).read_text()
        lines += [line for line in text.splitlines() if line and line[0] not in "#-"]
    return lines


def closure(requirements: Iterable[str]) -> list[importlib.metadata.Distribution]:
    """What those requirements bring in, as installed in this environment."""
    found: dict[str, importlib.metadata.Distribution] = {}
    visited: set[tuple[str, frozenset[str]]] = set()
    queue = [Requirement(line) for line in requirements]
    while queue:
        wanted = queue.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package; what is really missing shows when the job imports it
        for line in found[name].requires or ():
            needed = Requirement(line)
            chosen = [{"extra": extra} for extra in extras or {""}]
            if needed.marker is None or any(needed.marker.evaluate(e) for e in chosen):
                queue.append(needed)
    return list(found.values())


def make_environment(folder: Path) -> Path:
    """A virtual environment of the workers' packages, linked, not copied; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    target = next(folder.glob("lib/python3*/site-packages"))
    for distribution in closure(worker_requirements()):
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (target / top).exists():
                (target / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder / "bin" / "python"


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody holds now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def plain_environment(home: Path, **extra: str) -> dict[str, str]:
    """This process's environment without its paths and without anything of Ray's."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("RAY_", "PYTHON", "VIRTUAL_ENV", "PYTEST", "COV_"))
        and not k.lower().endswith("_proxy")
    }
    return kept | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", **extra}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """A running head."""

    folder: Path
    """Everything that it writes; short, for Ray's sockets have 107 characters."""
    gcs_port: int
    client_port: int
    dashboard_port: int

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def environment(self, token: str | None = TOKEN, **extra: str) -> dict[str, str]:
        """Of somebody who uses the head."""
        own = {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        return plain_environment(self.folder / "home", **own, **extra)

    def get(self, path: str, token: str | None = TOKEN, data: bytes | None = None) -> Any:
        """JSON of the dashboard's answer."""
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.dashboard + path, data=data, headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as answer:
            return json.load(answer)

    def submit(
        self, *command: str, checkout: Path | None = None, timeout: float = 180, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """``ray job submit`` as docs/cluster.md has it; with the runtime env given a checkout."""
        code = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
        own = ["--runtime-env", "pipelines/runtime_env.yaml"] if checkout else []
        return subprocess.run(
            [*code, "job", "submit", "--address", self.dashboard, *own, "--", *command],
            cwd=checkout or self.folder,
            env=self.environment() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def jobs(self) -> list[dict[str, Any]]:
        """Submitted jobs, the latest first."""
        jobs = [job for job in self.get("/api/jobs/") if job["type"] == "SUBMISSION"]
        return sorted(jobs, key=lambda job: int(job["start_time"]), reverse=True)


def marked_processes(folder: Path) -> list[Any]:
    """Processes of the head, orphans included."""
    psutil: Any = importlib.import_module("psutil")
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder) and process.pid != os.getpid():
                found.append(process)
    return found


def _stop(folder: Path) -> None:
    psutil: Any = importlib.import_module("psutil")
    deadline = time.monotonic() + 20
    # Again and again: a process may be born of one that is killed in the same breath.
    while (processes := marked_processes(folder)) and time.monotonic() < deadline:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(processes, timeout=2)
    assert not marked_processes(folder)


def _wait_until_up(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError, ValueError, urllib.error.URLError):
            head.get("/api/version")
            # The client server comes last.
            socket.create_connection(("127.0.0.1", head.client_port), timeout=1).close()
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the head did not start:\n{log.read_text()}")
        time.sleep(0.3)


@contextlib.contextmanager
def running_head(
    python: Path, *, num_cpus: int = 2, authentication: Mapping[str, str] | None = None
) -> Iterator[Head]:
    """A head on loopback; every process of it and every file are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="rh", dir="/tmp"))
    gcs, client, dashboard, agent = free_ports(4)
    head = Head(folder=folder, gcs_port=gcs, client_port=client, dashboard_port=dashboard)
    (folder / "home").mkdir()
    if authentication is None:
        authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    env = plain_environment(folder / "home", **{MARK: str(folder)}, **authentication)
    env["PATH"] = f"{python.parent}{os.pathsep}{env['PATH']}"
    ports = {
        "--port": gcs,
        "--ray-client-server-port": client,
        "--dashboard-port": dashboard,
        "--dashboard-agent-listen-port": agent,
    }
    arguments = [f"{flag}={port}" for flag, port in ports.items()]
    arguments += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    arguments += [f"--temp-dir={folder / 'ray'}", f"--num-cpus={num_cpus}"]
    arguments += ["--object-store-memory=100000000", "--disable-usage-stats", "--block"]
    code = [str(python), "-c", "from ray.scripts.scripts import main; main()"]
    log = folder / "head.log"
    try:
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*code, "start", "--head", *arguments],
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait_until_up(head, process, log)
            yield head
        finally:
            _stop(folder)
            process.wait(timeout=10)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
