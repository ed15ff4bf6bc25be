"""Kill an ingest at random moments; what comes out must equal a run that nobody killed.

A loopback server in a process of its own serves small JPEGs to ``declip run pairs --until ingest``
on real Ray. One clean run; then runs in which a worker of Ray, a decoder (a child of a worker),
the driver or the raylet gets SIGKILL at a random moment, until so many kills are done; a killed
driver is started again by the same command. Then a cluster of two nodes that loses one with all
that runs there. After each: the manifest's bytes and the sha256 of every tar and parquet equal
the clean run's, and nothing half written is left.

    python benchmarks/ingest_kills.py --kills 50 --shards 200 --seed 0

Prints a table and writes benchmarks/results/ingest-kills-cpu.json. Needs psutil.
"""

import argparse
import contextlib
import csv
import hashlib
import http.server
import importlib
import json
import os
import platform
import random
import secrets
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from declip_shards.fakes import COLORS, SHAPES, draw
from declip_shards.store import TEMPORARY_MARK

psutil: Any = importlib.import_module("psutil")

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "ingest-kills-cpu.json"
KINDS = {"worker": 0.4, "decoder": 0.16, "driver": 0.28, "raylet": 0.16}
"""What is killed, and its share of the kills."""
MISSING_EVERY = 7
"""Every so manieth URL leads nowhere: failed rows must come out equal, too."""
MOST_RERUNS = 3
"""Times that a run may end with an error after a kill."""
RUN_SECONDS = 600.0
"""For one run to end; it never does on its own when it hangs."""


class _Pictures(http.server.SimpleHTTPRequestHandler):
    delay = 0.0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(self.delay)
        with contextlib.suppress(ConnectionError):  # a killed client
            super().do_GET()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 256


def serve(folder: str, delay: float) -> None:
    """Serve a folder on a free port of loopback, told on the standard output, until stdin ends."""
    _Pictures.delay = delay

    def handler(*args: Any) -> _Pictures:
        return _Pictures(*args, directory=folder)

    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_port, flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def serving(folder: Path, delay: float) -> Iterator[str]:
    """host:port of a server of ``folder`` in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--serve", str(folder), "--delay", str(delay)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def snapshot(folder: Path) -> Path:
    """A copy of the code: whoever edits the checkout meanwhile must not change what runs."""
    for name in ("packages", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    return folder


def environment(code: Path = REPOSITORY, **extra: str) -> dict[str, str]:
    """Of a driver: our packages on the path, nothing of Ray's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    paths = [str(p) for p in sorted(code.glob("packages/*/src"))] + [str(code)]
    paths += [p for p in kept.get("PYTHONPATH", "").split(os.pathsep) if p]
    own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return kept | own | {"RAY_USAGE_STATS_ENABLED": "0"} | extra


def write_pictures(folder: Path, number: int) -> None:
    """``number`` different small JPEGs."""
    rng = np.random.default_rng(0)
    for n in range(number):
        color, shape = COLORS[n % len(COLORS)], SHAPES[n // len(COLORS) % len(SHAPES)]
        (folder / f"{n}.jpg").write_bytes(draw(color, shape, 64, rng))


def write_table(path: Path, address: str, number: int) -> None:
    """URLs and captions; some URLs lead nowhere."""
    with path.open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["url", "caption"])
        for n in range(number):
            name = f"none/{n}.jpg" if n % MISSING_EVERY == 3 else f"{n}.jpg"
            rows.writerow([f"http://{address}/{name}", f"picture {n}"])


def command(table: Path, address: str, out: Path, shard_size: int) -> list[str]:
    """The run, as a user gives it."""
    settings = {
        "table": str(table),
        "allow-addresses": address,
        "shard-size": str(shard_size),
        "image-size": "64",
        "robots": "ignore",
        "memory-bytes": "0",
    }
    options = [f"--ingest.{name}={value}" for name, value in settings.items()]
    return [
        *(sys.executable, "-m", "pipelines", "run", "pairs", *options),
        *("--out", str(out), "--only", "ingest"),
    ]


def result_of(out: Path) -> dict[str, str]:
    """sha256 of the manifest and of every file of the dataset that is hashed there."""
    manifest = out / "manifests" / "ingest.json"
    if not manifest.exists():
        return {}
    names = [record["path"] for record in json.loads(manifest.read_bytes())["files"]]
    paths = [manifest, *(out / name for name in names)]
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.exists()
    }


def leftovers(out: Path) -> list[str]:
    """Temporary files."""
    return [p.name for p in out.rglob(f"*{TEMPORARY_MARK}*")]


def num_receipts(out: Path) -> int:
    return len(list((out / "manifests" / "ingest").glob("*.json")))


@dataclass
class Kill:
    """One kill and what came of it."""

    kind: str
    build: int
    """Number of the build that was hit."""
    num_done: int
    """Tasks that were done then."""
    seconds_into_run: float


@dataclass
class Report:
    """What is written."""

    seed: int
    num_shards: int
    shard_size: int
    clean_seconds: float = 0.0
    kills: list[Kill] = field(default_factory=list)
    builds: list[dict[str, Any]] = field(default_factory=list)
    nodes: dict[str, Any] = field(default_factory=dict)
    total_seconds: float = 0.0


def start_driver(arguments: list[str], log: Path, **extra: str) -> subprocess.Popen[bytes]:
    """Start the run with the code that lies beside its log."""
    code = log.parent / "code"
    with log.open("ab") as sink:
        return subprocess.Popen(
            arguments,
            cwd=code,
            env=environment(code, **extra),
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )


def victims(driver: subprocess.Popen[bytes], kind: str) -> list[Any]:
    """Processes of that kind of a driver's cluster."""
    if kind == "driver":
        return [psutil.Process(driver.pid)]
    try:
        below = psutil.Process(driver.pid).children(recursive=True)
        if kind == "raylet":
            return [p for p in below if p.name().startswith("raylet")]
        workers = [p for p in below if p.name().startswith("ray::") and "Agent" not in p.name()]
        if kind == "worker":
            return workers
        return [child for worker in workers for child in worker.children(recursive=True)]
    except psutil.Error:
        return []


def hit(driver: subprocess.Popen[bytes], kind: str, rng: random.Random) -> bool:
    """Kill one process of that kind; whether there was one."""
    found = sorted(victims(driver, kind), key=lambda p: int(p.pid))
    if not found:
        return False
    try:
        rng.choice(found).kill()
    except psutil.Error:
        return False
    if kind == "driver":
        driver.wait()  # and nothing else: the next run meets what is left of its cluster
    return True


def build_with_kills(
    arguments: list[str],
    out: Path,
    plan: list[str],
    report: Report,
    rng: random.Random,
    longest_pause: float,
) -> int:
    """One build during which the kinds of ``plan`` are killed, from its end; returns the status."""
    log, number = out.with_suffix(".log"), len(report.builds)
    start = time.monotonic()
    driver, started = start_driver(arguments, log), time.monotonic()
    restarts, reruns = 0, 0
    num_kills = len(report.kills)
    pause = rng.uniform(0.0, longest_pause)
    seen = num_receipts(out)
    since = None
    while True:
        time.sleep(0.05)
        if driver.poll() is not None:
            if driver.returncode == 0 or reruns == MOST_RERUNS:
                break
            # It gave up, as it may: the same command again must end it.
            reruns += 1
            driver, started = start_driver(arguments, log), time.monotonic()
            seen, since = num_receipts(out), None
        if time.monotonic() - started > RUN_SECONDS:
            driver.kill()
            raise RuntimeError(f"the run hangs; see {log}")
        if since is None:
            # Once it is at work again: it would be no test to kill what has not begun.
            since = time.monotonic() if num_receipts(out) > seen else None
            continue
        if not plan or time.monotonic() - since < pause:
            continue
        if not hit(driver, plan[-1], rng):
            continue
        kind = plan.pop()
        report.kills.append(
            Kill(kind, number, num_receipts(out), round(time.monotonic() - started, 2))
        )
        print(f"  killed {kind} at {report.kills[-1].num_done} tasks", flush=True)
        pause, seen, since = rng.uniform(0.0, longest_pause), num_receipts(out), None
        if kind == "driver":
            driver, started = start_driver(arguments, log), time.monotonic()
            restarts += 1
    report.builds.append(
        {
            "seconds": round(time.monotonic() - start, 1),
            "kills": len(report.kills) - num_kills,
            "restarts_of_driver": restarts,
            "reruns_after_giving_up": reruns,
            "status": driver.returncode,
        }
    )
    return driver.returncode


def judge(out: Path, clean: dict[str, str], build: dict[str, Any]) -> None:
    """Compare with the clean run."""
    result = result_of(out)
    build["differing_files"] = sorted(
        name for name in clean.keys() | result.keys() if clean.get(name) != result.get(name)
    )
    build["leftovers"] = leftovers(out)
    build["equal"] = (
        build["status"] == 0 and not build["differing_files"] and not build["leftovers"]
    )


def lose_nodes(
    arguments: list[str], out: Path, rng: random.Random, num_tasks: int, num_losses: int
) -> dict[str, Any]:
    """Run on two nodes; one goes with all its processes, and a new one comes."""
    token = secrets.token_hex(16)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=small | {"include_dashboard": False})
    log = out.with_suffix(".log")
    lost: list[int] = []
    try:
        node = cluster.add_node(**small)
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": cluster.address}
        start = time.monotonic()
        driver = start_driver(arguments, log, **own)
        target = rng.randint(1, num_tasks // (num_losses + 1))
        while driver.poll() is None and time.monotonic() - start < RUN_SECONDS:
            time.sleep(0.05)
            if len(lost) < num_losses and num_receipts(out) >= target:
                cluster.remove_node(node, allow_graceful=False)
                lost.append(num_receipts(out))
                print(f"  a node was lost at {lost[-1]} tasks", flush=True)
                node = cluster.add_node(**small)
                target = num_receipts(out) + rng.randint(1, num_tasks // (num_losses + 1))
        if driver.poll() is None:
            driver.kill()
        return {
            "seconds": round(time.monotonic() - start, 1),
            "losses": len(lost),
            "tasks_done_then": lost,
            "status": driver.wait(),
        }
    finally:
        cluster.shutdown()


def table_text(report: Report) -> str:
    """Kills by kind and what came of them."""
    counts = Counter(kill.kind for kill in report.kills)
    equal = all(build["equal"] for build in report.builds)
    lines = [f"{'killed':<10}{'times':>6}  all builds equal the clean one"]
    lines += [f"{kind:<10}{counts[kind]:>6}  {'yes' if equal else 'NO'}" for kind in KINDS]
    if report.nodes:
        same = "yes" if report.nodes["equal"] else "NO"
        lines.append(f"{'node':<10}{report.nodes['losses']:>6}  {same}")
    num = len(report.builds)
    spent = sum(build["seconds"] for build in report.builds)
    lost = (spent - num * report.clean_seconds) / max(1, len(report.kills))
    lines.append(
        f"{num} builds of {report.num_shards} shards, {len(report.kills)} kills, seed "
        f"{report.seed}; clean {report.clean_seconds:.1f} s; {lost:.1f} s lost a kill"
    )
    return "\n".join(lines)


def plan_kills(number: int, rng: random.Random) -> list[str]:
    """Kinds in random order, each as often as its share says."""
    plan = [kind for kind, share in KINDS.items() for _ in range(round(number * share))]
    plan += ["worker"] * (number - len(plan))
    rng.shuffle(plan)
    return plan[:number]


def run(
    *,
    plan: list[str],
    shards: int,
    shard_size: int,
    seed: int,
    delay: float,
    folder: Path,
    num_losses: int,
    longest_pause: float = 2.0,
) -> Report:
    """The whole experiment in ``folder``.

    Args:
        plan: kinds to kill, the last one first.
        shards: tasks of a build.
        shard_size: URLs of a task.
        seed: of moments and victims.
        delay: seconds before each of the server's answers.
        folder: an empty one.
        num_losses: nodes to lose of the cluster of two; 0 for no such run.
        longest_pause: seconds between a build's being at work again and the next kill, at most.
    """
    rng = random.Random(seed)
    plan = list(plan)
    report = Report(seed=seed, num_shards=shards, shard_size=shard_size)
    begin = time.monotonic()
    number = shards * shard_size
    (folder / "web").mkdir()
    snapshot(folder / "code")
    write_pictures(folder / "web", number)
    table = folder / "pairs.csv"
    with serving(folder / "web", delay) as address:
        write_table(table, address, number)
        out = folder / "clean"
        start = time.monotonic()
        driver = start_driver(command(table, address, out, shard_size), folder / "clean.log")
        if driver.wait(timeout=RUN_SECONDS) != 0:
            raise RuntimeError(f"the clean run failed:\n{(folder / 'clean.log').read_text()}")
        report.clean_seconds = round(time.monotonic() - start, 1)
        clean = result_of(out)
        print(f"clean run: {report.clean_seconds} s, {len(clean)} files; seed {seed}", flush=True)
        while plan:
            out = folder / f"build{len(report.builds)}"
            arguments = command(table, address, out, shard_size)
            build_with_kills(arguments, out, plan, report, rng, longest_pause)
            judge(out, clean, report.builds[-1])
            print(f"build {len(report.builds)}: {report.builds[-1]}", flush=True)
        if num_losses:
            out = folder / "nodes"
            arguments = command(table, address, out, shard_size)
            report.nodes = lose_nodes(arguments, out, rng, shards, num_losses)
            judge(out, clean, report.nodes)
            print(f"two nodes: {report.nodes}", flush=True)
    report.total_seconds = round(time.monotonic() - begin, 1)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--shard-size", type=int, default=5)
    parser.add_argument("--seed", type=int, default=None, help="random, and printed, if left out")
    parser.add_argument("--delay", type=float, default=0.02, help="seconds before each answer")
    parser.add_argument("--nodes", type=int, default=3, help="nodes to lose of a cluster of two")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.delay)
        return 0
    seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="ik", dir="/tmp"))
    report = run(
        plan=plan_kills(arguments.kills, random.Random(seed)),
        shards=arguments.shards,
        shard_size=arguments.shard_size,
        seed=seed,
        delay=arguments.delay,
        folder=folder,
        num_losses=arguments.nodes,
    )
    print(table_text(report))
    is_good = all(build["equal"] for build in [*report.builds, report.nodes or {"equal": True}])
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    arguments.out.write_text(json.dumps({"machine": machine} | asdict(report), indent=2) + "\n")
    if is_good:
        shutil.rmtree(folder)
    else:
        print(f"what differs is kept in {folder}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
