"""Kill embed, index and neighbor table at random moments; the manifests must not differ.

Small JPEGs with captions of their own are ingested once over loopback. From that dataset one run
of ``declip run pairs --until neighbors`` on real Ray is left alone (real sentence encoder, real
FAISS); then runs in which a worker of Ray, the driver or the raylet gets SIGKILL at a random moment
while the dataset is embedded, indexed or its neighbors are looked up, until so many kills are done.
A killed driver is started again by the same command. After each build: the bytes of every manifest
and of every file that a manifest names equal the clean run's, and nothing half written is left.

    python benchmarks/filter_kills.py --kills 20 --shards 24 --seed 0

Prints a table and writes benchmarks/results/filter-kills-cpu.json. Needs psutil.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import random
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ingest_kills import (
    RUN_SECONDS,
    hit,
    leftovers,
    serving,
    snapshot,
    start_driver,
    write_pictures,
)

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "filter-kills-cpu.json"
KINDS = {"worker": 0.45, "driver": 0.35, "raylet": 0.2}
"""What is killed, and its share of the kills."""
STAGES = ("embed", "index", "graph", "neighbors")
"""During which of the stages it is killed."""
MOST_RERUNS = 3
"""Times that a run may end with an error after a kill."""
NOUNS = ("boat", "horse", "lamp", "river", "teapot", "bridge", "garden", "violin", "tower", "shoe")
ADJECTIVES = ("old", "small", "wooden", "golden", "broken", "quiet", "striped", "empty", "bright")


def caption(number: int) -> str:
    """A sentence of its own for every number, with others that are like it."""
    noun, adjective = NOUNS[number % 10], ADJECTIVES[number // 10 % 9]
    return f"a {adjective} {noun} of the year {1500 + number}"


def command(out: Path) -> list[str]:
    """The run that is killed, as a user gives it, from the table that the dataset was made of."""
    settings = {
        "ingest.table": str(out.parent / "pairs.csv"),
        "index.index-type": "IVF",
        "neighbors.method": "graph",
        "filter.min-contrast": "none",
        "filter.min-entropy": "none",
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    return [
        *(sys.executable, "-m", "pipelines", "run", "pairs", *options, *ingest_options(out)),
        *("--out", str(out), "--until", "neighbors"),
    ]


def ingest_options(out: Path) -> list[str]:
    """Settings of ingest; the same for all runs, so that its result stands."""
    address = (out.parent / "address").read_text()
    settings = {"allow-addresses": address, "image-size": "64", "robots": "ignore"}
    size = (out.parent / "shard_size").read_text()
    return [f"--ingest.{name}={value}" for name, value in {**settings, "shard-size": size}.items()]


def result_of(out: Path) -> dict[str, str]:
    """sha256 of every manifest and of every file that one names."""
    found = {}
    for manifest in sorted((out / "manifests").glob("*.json")):
        if manifest.name.endswith(".run.json"):
            continue
        paths = [manifest]
        paths += [out / record["path"] for record in json.loads(manifest.read_bytes())["files"]]
        for path in paths:
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"
            found[str(path.relative_to(out))] = digest
    return found


def stage_now(log: Path) -> str:
    """The stage that has been announced last."""
    found: list[str] = re.findall(r"^(\w+): .*\d tasks?(?: \(.*\))?$", log.read_text(), re.M)
    return found[-1] if found else ""


@dataclass
class Kill:
    """One kill and what it hit."""

    kind: str
    build: int
    stage: str


@dataclass
class Report:
    """What is written."""

    seed: int
    num_shards: int
    shard_size: int
    clean_seconds: float = 0.0
    kills: list[Kill] = field(default_factory=list)
    builds: list[dict[str, Any]] = field(default_factory=list)
    total_seconds: float = 0.0


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the run; its output alone is in ``log``, that of earlier ones behind it in a file."""
    with log.with_suffix(".all").open("ab") as kept:
        kept.write(log.read_bytes() if log.exists() else b"")
    log.unlink(missing_ok=True)
    process: subprocess.Popen[bytes] = start_driver(arguments, log)
    return process


def build_with_kills(
    arguments: list[str],
    out: Path,
    plan: list[tuple[str, str]],
    report: Report,
    rng: random.Random,
    stage_seconds: dict[str, float],
) -> int:
    """One build; ``plan`` is worked off from its end, as far as its stages come in their order."""
    log, number, reruns = out.with_suffix(".log"), len(report.builds), 0
    begin = time.monotonic()
    driver, started = start(arguments, log), time.monotonic()
    at: float | None = None
    while driver.poll() is None or (driver.returncode != 0 and reruns < MOST_RERUNS):
        if driver.poll() is not None:
            reruns += 1  # it gave up, as it may: the same command again must end it
            driver, started, at = start(arguments, log), time.monotonic(), None
        time.sleep(0.02)
        if time.monotonic() - started > RUN_SECONDS:
            driver.kill()
            raise RuntimeError(f"the run hangs; see {log}")
        if not plan:
            continue
        kind, stage = plan[-1]
        now = stage_now(log)
        if now != stage:
            at = None
            if now in STAGES and STAGES.index(now) > STAGES.index(stage):
                plan[-1] = (kind, now)  # too late for that one in this build: take this
            continue
        if at is None:
            at = time.monotonic() + rng.uniform(0, stage_seconds.get(stage, 1.0))
        if time.monotonic() < at or not hit(driver, kind, rng):
            continue
        plan.pop()
        report.kills.append(Kill(kind, number, stage))
        print(f"  killed {kind} in {stage}", flush=True)
        at = None
        if kind == "driver":
            driver, started = start(arguments, log), time.monotonic()
        else:
            time.sleep(1.0)  # the same stage may be hit again once it is at work
    report.builds.append(
        {
            "seconds": round(time.monotonic() - begin, 1),
            "kills": sum(kill.build == number for kill in report.kills),
            "reruns_after_giving_up": reruns,
            "status": driver.returncode,
        }
    )
    return int(driver.returncode)


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


def plan_kills(number: int, rng: random.Random) -> list[tuple[str, str]]:
    """Kinds in random order, each as often as its share says, spread over the stages."""
    kinds = [kind for kind, share in KINDS.items() for _ in range(round(number * share))]
    kinds = (kinds + ["worker"] * number)[:number]
    rng.shuffle(kinds)
    # Embedding and the table are where the time goes, so they are hit most.
    stages = [("embed", "neighbors", *STAGES)[n % (len(STAGES) + 2)] for n in range(number)]
    return list(zip(kinds, stages, strict=True))


def ingest(folder: Path, num_shards: int, shard_size: int) -> Path:
    """Make the dataset that every run starts from."""
    number = num_shards * shard_size
    (folder / "web").mkdir()
    write_pictures(folder / "web", number)
    with serving(folder / "web", 0.0) as address:
        (folder / "address").write_text(address)
        (folder / "shard_size").write_text(str(shard_size))
        with (folder / "pairs.csv").open("w", newline="") as f:
            rows = csv.writer(f)
            rows.writerow(["url", "caption"])
            rows.writerows([f"http://{address}/{n}.jpg", caption(n)] for n in range(number))
        out = folder / "ingested"
        words = command(out)
        words[words.index("--until") + 1] = "measure"
        driver = start_driver(words, folder / "ingested.log")
        if driver.wait(timeout=RUN_SECONDS) != 0:
            raise RuntimeError((folder / "ingested.log").read_text())
    return out


def seconds_of_stages(out: Path) -> dict[str, float]:
    """What each stage took, from the run records."""
    found = {}
    for path in (out / "manifests").glob("*.run.json"):
        seconds = json.loads(path.read_text())["seconds"]
        found[path.name.removesuffix(".run.json")] = float(seconds)
    return found


def run(*, kills: int, shards: int, shard_size: int, seed: int, folder: Path) -> Report:
    """The whole experiment in ``folder``, an empty one."""
    rng = random.Random(seed)
    report = Report(seed=seed, num_shards=shards, shard_size=shard_size)
    begin = time.monotonic()
    snapshot(folder / "code")
    ingested = ingest(folder, shards, shard_size)
    out = folder / "clean"
    shutil.copytree(ingested, out)
    arguments = command(out)
    clock = time.monotonic()
    if start(arguments, folder / "clean.log").wait(timeout=RUN_SECONDS) != 0:
        raise RuntimeError(f"the clean run failed:\n{(folder / 'clean.log').read_text()}")
    report.clean_seconds = round(time.monotonic() - clock, 1)
    clean = result_of(out)
    print(f"clean run: {report.clean_seconds} s, {len(clean)} files; seed {seed}", flush=True)
    plan = plan_kills(kills, rng)
    rng.shuffle(plan)
    while plan:
        out = folder / f"build{len(report.builds)}"
        shutil.copytree(ingested, out)
        # Some for this build, in the order in which their stages come.
        some = sorted(plan[-6:], key=lambda kill: -STAGES.index(kill[1]))
        del plan[-6:]
        build_with_kills(
            command(out),
            out,
            some,
            report,
            rng,
            seconds_of_stages(folder / "clean"),
        )
        plan = some + plan  # those that this build was too fast for
        judge(out, clean, report.builds[-1])
        print(f"build {len(report.builds)}: {report.builds[-1]}", flush=True)
    report.total_seconds = round(time.monotonic() - begin, 1)
    return report


def table_text(report: Report) -> str:
    """Kills by stage and what came of them."""
    counts = Counter((kill.stage, kill.kind) for kill in report.kills)
    lines = [f"{'killed in':<12}" + "".join(f"{kind:>8}" for kind in KINDS)]
    lines += [
        f"{stage:<12}" + "".join(f"{counts[stage, kind]:>8}" for kind in KINDS) for stage in STAGES
    ]
    equal = sum(build["equal"] for build in report.builds)
    lines.append(
        f"{len(report.kills)} kills in {len(report.builds)} builds of {report.num_shards} shards, "
        f"{equal} of them equal to the clean one; clean {report.clean_seconds:.1f} s, seed "
        f"{report.seed}"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--shard-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None, help="random, and printed, if left out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    folder = Path(tempfile.mkdtemp(prefix="fk", dir="/tmp"))
    report = run(
        kills=arguments.kills,
        shards=arguments.shards,
        shard_size=arguments.shard_size,
        seed=seed,
        folder=folder,
    )
    print(table_text(report))
    is_good = all(build["equal"] for build in report.builds)
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    arguments.out.write_text(json.dumps({"machine": machine} | asdict(report), indent=2) + "\n")
    if is_good:
        shutil.rmtree(folder)
    else:
        print(f"what differs is kept in {folder}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
