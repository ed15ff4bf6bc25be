"""Samples that loaders bring to a trainer, for each second of a core: ours beside its peers.

    python -m venv PEERS
    PEERS/bin/pip install torch==2.13.0 torchvision==0.28.0 open_clip_torch==3.3.0 \\
        webdataset==0.2.86 mosaicml-streaming==0.13.0 pandas
    python benchmarks/loader.py --peers PEERS/bin/python [--rounds 3] [--minutes 60]

(builds of torch from PyPI: torchvision's does not load beside a CPU build.) All read the same real
photographs (benchmarks/loader_pictures.py), and hand over batches of 128 with token ids. Each run
is a process of its own (loader_worker.py, loader_peer.py); rounds take turns, and of each figure
the best round counts, for others may use the machine. Processor time is of all threads and
processes, after a first pass over the pictures; nothing is kept decoded. "First batch" counts from
building the loader in a process that has imported all it needs; ours lists its samples and
tokenizes captions in that time, "again" finds them in the cache. --minutes watches memory of ours
and of open_clip's loader for so long, with as many pictures as there are, over and over.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks import surroundings
    from benchmarks.embed import package_pairs
    from benchmarks.loader_equality import equality
    from benchmarks.loader_pictures import SETS, SHARD_ROWS, pictures, write_set
    from benchmarks.loader_worker import RUNS
else:
    import surroundings
    from embed import package_pairs
    from loader_equality import equality
    from loader_pictures import SETS, SHARD_ROWS, pictures, write_set
    from loader_worker import RUNS

HERE = Path(__file__).parent
PEER_RUNS = (
    "open_clip, one view",
    "mosaicml-streaming, one view",
    "torchvision decodes, one view, 8-bit",
    "open_clip, two views",
)
COMPARED = {
    "one view, for a GPU": PEER_RUNS[:3],
    "one view, on the CPU": PEER_RUNS[:2],
    "one view, plain Python": PEER_RUNS[:2],
    "two views, for a GPU": PEER_RUNS[3:],
    "two views, on the CPU": PEER_RUNS[3:],
}
"""Ours -> which peers' runs it is divided by."""
WATCHED = ("two views, for a GPU", "open_clip, two views")
PACKAGES_READ = ("torch", "numpy", "pillow", "opencv-python-headless")


def make_sets(work: Path, names: list[str], cache: Path | None) -> dict[str, dict[str, float]]:
    """Write the sets; returns how many pictures of how many kilobytes each has."""
    pairs, made = list(package_pairs(cache)), {}
    for name in names:
        chosen = pictures(pairs, name)
        rows = len(chosen) // SHARD_ROWS * SHARD_ROWS
        write_set(work / name, chosen)
        (work / name / "set.json").write_text(json.dumps({"shard_rows": SHARD_ROWS}))
        size = sum(len(data) for data, _ in chosen[:rows]) / rows
        made[name] = {"pictures": rows, "mean_kilobytes": round(size / 1024, 1)}
    return made


def run(given: argparse.Namespace, root: Path, label: str, **options: Any) -> dict[str, Any]:
    """One run in a process of its own."""
    ours = label in RUNS
    python, script = (sys.executable, "loader_worker") if ours else (given.peers, "loader_peer")
    options = {"workers": given.workers, "threads": given.threads, "minutes": 0, **options}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not ours:
        # The other environment has packages of its own.
        environment.pop("PYTHONPATH", None)
    command = [python, str(HERE / f"{script}.py"), str(root), label, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{label}: {done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure the best round."""
    found = dict(rounds[0])
    for name in ("samples_per_core_second", "samples_per_second"):
        found[name] = max(row[name] for row in rounds)
    for name in ("seconds_to_first_batch", "seconds_to_first_batch_again"):
        if name in found:
            found[name] = min(row[name] for row in rounds)
    found["megabytes"] = min((row["megabytes"] for row in rounds), key=sum)
    return found


def measure_set(given: argparse.Namespace, root: Path, rows: int) -> list[dict[str, Any]]:
    """All runs over one set, ours with what times a peer's they are."""
    labels = [label for label in (*RUNS, *PEER_RUNS) if given.only in label]
    rounds: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for number in range(given.rounds):
        for label in labels:
            print(f"{root.name}, round {number + 1}: {label}", file=sys.stderr, flush=True)
            cache = root / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            more = {"warm_up": rows, "cache": str(cache)}
            passes = given.passes if label in PEER_RUNS else 4 * given.passes
            row = run(given, root, label, samples=passes * rows, **more)
            if label in RUNS:
                again = run(given, root, label, samples=1, **{**more, "warm_up": 1})
                row["seconds_to_first_batch_again"] = again["seconds_to_first_batch"]
            rounds[label].append(row)
    found = {label: best(some) for label, some in rounds.items()}
    for label, peers in COMPARED.items():
        if label in found:
            found[label]["times"] = {
                peer: round(
                    found[label]["samples_per_core_second"]
                    / found[peer]["samples_per_core_second"],
                    2,
                )
                for peer in peers
                if peer in found
            }
    return [{"set": root.name, "run": label, **row} for label, row in found.items()]


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    times = ", ".join(f"{value} x {name}" for name, value in row.get("times", {}).items())
    again = row.get("seconds_to_first_batch_again")
    first = f"{row['seconds_to_first_batch']}" + (f" ({again})" if again else "")
    print(
        f"{row['set']:12} {row['run']:38} {row['samples_per_core_second']:8} a core-second, first "
        f"batch {first} s, {sum(row['megabytes']):.0f} MB  {times}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", required=True, help="Python of the peers' environment")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=1, help="of a peer; ours makes four times it")
    parser.add_argument("--threads", type=int, default=1, help="that draw views, ours")
    parser.add_argument("--workers", type=int, default=0, help="processes, the peers'; 0: in this")
    parser.add_argument("--minutes", type=float, default=0, help="to watch memory for, each")
    parser.add_argument("--only", default="", help="runs whose label has this in it")
    parser.add_argument("--cache", type=Path, help="where fetched packages are kept")
    parser.add_argument("--work", type=Path, help="folder for the sets; unset: a temporary one")
    parser.add_argument("--out", type=Path, default=HERE / "results/loader-cpu.json")
    return parser.parse_args()


def main() -> None:
    given = parse()
    content: dict[str, Any] = {"surroundings": surroundings.describe(PACKAGES_READ)}
    settings = ("rounds", "passes", "threads", "workers", "minutes")
    content["settings"] = {name: getattr(given, name) for name in settings}
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        work = Path(folder)
        content["sets"] = make_sets(work, given.sets, given.cache)
        content["equality"] = equality(work / given.sets[0], given.peers)
        content["runs"] = []
        for name, about in content["sets"].items():
            rows = measure_set(given, work / name, int(about["pictures"]))
            content["runs"] += rows
            for row in rows:
                show(row)
        if given.minutes:
            content["memory"] = {}
            for label in (label for label in WATCHED if given.only in label):
                root = work / given.sets[0]
                more = {"warm_up": 1, "samples": 1, "cache": str(root / "cache")}
                row = run(given, root, label, **{**more, "minutes": given.minutes})
                content["memory"][label] = row["memory"]
                print(label, {k: v for k, v in row["memory"].items() if k != "series"}, flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
