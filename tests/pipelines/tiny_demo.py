"""The demo's own recipe at the size of a test, by the real command line in its own process.

    python tiny_demo.py FAKES run demo --out FOLDER OPTIONS...

Only the registries are replaced: the packages are those of `pipelines.demo_fakes`, copied from the
folder FAKES. The compiled operator of DeepSpeed stays in the user's own cache.
"""

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TINY: dict[str, object] = {
    "prepare.max-pairs": 200,
    "prepare.num-held-out-concepts": 3,
    "prepare.num-failures": 28,
    "prepare.num-junk": 6,
    "prepare.image-size": 32,
    "ingest.image-size": 32,
    "ingest.shard-size": 60,
    # Hanging rows cost this much, and a busy machine must not make others hang.
    "ingest.timeout-seconds": 4.0,
    "ingest.retries": 0,
    "filter.min-side-pixels": 16,
    "embed.batch-size": 32,
    # As a large dataset has them: lists that are trained and filled, and a graph.
    "index.index-type": "IVF",
    "index.nlist": 4,
    "neighbors.method": "graph",
    "neighbors.k": 3,
    "train.model": "test",
    "train.global-batch-size": 16,
    "train.max-steps": 12,
    "train.warmup-steps": 2,
    "train.projector-dim": 32,
    "train.predictor-hidden-dim": 16,
    "train.log-every-steps": 1,
    "train.checkpoint-every-steps": 3,
    "eval.max-classes": 50,
    "report.num-examples": 2,
    "report.num-neighbors": 2,
    "report.num-predictions": 2,
    "report.num-queries": 2,
}
"""Settings under which the whole demo takes seconds."""


def main(fakes: Path, arguments: list[str]) -> int:
    """The command line with the registries replaced."""
    import pipelines.prepare as prepare_module
    from pipelines import cli
    from pipelines.demo_data import DemoTable, prepare_demo
    from pipelines.demo_fakes import make_fake_packages

    def prepare(folder: Path, cache: Path, **others: Any) -> DemoTable:
        packages, client = make_fake_packages(fakes / "origin")
        return prepare_demo(folder, fakes / "cache", packages=packages, client=client, **others)

    vars(prepare_module)["prepare_demo"] = prepare
    return cli.main(arguments)


def command(fakes: Path, *arguments: str) -> list[str]:
    """How another process runs this one."""
    return [sys.executable, __file__, str(fakes), *arguments]


def options(settings: Mapping[str, object]) -> list[str]:
    """Settings as the command line has them."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def environment(mark: str = "") -> dict[str, str]:
    """This process's, under which a child imports what we import; ``mark`` tells it apart."""
    paths = [path for path in sys.path if path]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TINY_DEMO": mark}
    return os.environ | ours


def free_port() -> int:
    """A port of the loopback that is free, as is the next one.

    Below those that the kernel gives to whoever asks for any: Ray and the trainer do.
    """
    while True:
        port = 18_600 + 2 * random.randrange(6_000)
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port


def run_tiny(
    fakes: Path,
    out: Path,
    *arguments: str,
    port: int,
    command_name: str = "run",
    mark: str = "",
    **settings: object,
) -> subprocess.CompletedProcess[str]:
    """Run the tiny demo to its end; ``settings`` are named with _ for the dot and for hyphens."""
    named = {name.replace("_", ".", 1).replace("_", "-"): value for name, value in settings.items()}
    chosen = options(TINY | {"prepare.port": port} | named)
    return subprocess.run(
        command(fakes, command_name, "demo", "--out", str(out), *arguments, *chosen),
        env=environment(mark),
        capture_output=True,
        text=True,
        timeout=900,
    )


@contextlib.contextmanager
def started(
    fakes: Path, out: Path, *arguments: str, port: int, mark: str
) -> Iterator[subprocess.Popen[str]]:
    """The tiny demo's process while it runs, its output piped; killed at the end, it alone."""
    chosen = options(TINY | {"prepare.port": port})
    with subprocess.Popen(
        command(fakes, "run", "demo", "--out", str(out), *arguments, *chosen),
        env=environment(mark),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def processes_of(mark: str) -> dict[int, str]:
    """Living processes whose environment holds ``mark``: pid -> command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if mark.encode() in (folder / "environ").read_bytes() and state not in "ZX":
                words = (folder / "cmdline").read_bytes().split(b"\0")
                found[int(folder.name)] = b" ".join(words).decode(errors="replace")
    return found


def wait_until_gone(mark: str, seconds: float) -> dict[int, str]:
    """Processes of ``mark`` that still live after ``seconds``; empty as soon as none does."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
