"""10,000 URLs of which 30% misbehave, three times over: is every row explained, in time, in bounds?

    python benchmarks/ingest_chaos.py --json benchmarks/results/ingest-chaos-cpu.json
    python benchmarks/ingest_chaos.py --rows 1000 --shard-size 250 --seeds 1

The server and the list come from tests/ingest (chaos_server.py, chaos_kinds.py): 128 kinds of
trouble that cover rows 1 to 28 of the fault catalogue, each with what it must end as. The good
pictures are the demo's photographs. The real stage runs under the real runner, on a Ray cluster of
this machine's cores; the two seams are names that only an injected resolver knows and a decoder
with a flaw that marked pictures hit. For each seed it is checked that

* rows = stored + failed, every row ended as its kind must, and list, shards, tars, ledger and
  quarantine agree; the exit status is 0;
* no row took longer than its time plus one second, no shard longer than its rows may take;
* a second run with other delays at the server and other concurrency wrote the same bytes;
* the canary, which listens where no downloader may go, saw no connection.

Memory is the kernel's peak (VmHWM) of every process of the run, looked at five times a second.
Lastly it is checked that `declip run` ends with status 1, one sentence and nothing published where
no name resolves, where the column of hashes is no such column, and where a blocklist is missing.
"""

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/ingest")]
if TYPE_CHECKING:
    from benchmarks import ingest_pictures, process_tree, surroundings
    from tests.ingest import chaos_checks, chaos_dataset, chaos_kinds, chaos_server
else:
    # The script's own folder is on the path, and the tests' was just put there.
    import chaos_checks
    import chaos_dataset
    import chaos_kinds
    import chaos_server

    import ingest_pictures
    import process_tree
    import surroundings

LIMITS = chaos_dataset.Limits(timeout_seconds=3.0, decode_timeout_seconds=2.0)
CHILD_SECONDS = 5.0
"""For a decoder to be started anew, on top of its time-out."""
PACKAGES = ("ray", "aiohttp", "pillow", "simplejpeg", "pyarrow")


def drive(given: dict[str, Any]) -> int:
    """Run the pipeline, as the command line does; its exit status."""
    chaos_stage = importlib.import_module("chaos_stage")

    from declip_shards import DeclipError
    from pipelines.pipeline import Pipeline, Step
    from pipelines.runner import run_pipeline

    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in given["settings"].items()}
    stage = chaos_stage.ChaosDownload(root=given["root"], **settings)
    step = Step(name="ingest", stage=stage, on_ray=True, summary="download a list of trouble")
    pipeline = Pipeline(recipe="chaos", root=given["root"], steps=[step])
    try:
        run_pipeline(pipeline, pipeline.steps, runner=given["runner"])
    except DeclipError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


@dataclasses.dataclass(kw_only=True)
class Run:
    """What one run of the list left."""

    status: int
    seconds: float
    verdict: chaos_checks.Verdict
    digests: dict[str, str]
    peaks: dict[str, float]
    """Megabytes by kind of process."""
    server: dict[str, Any]
    shard_seconds: list[float]
    log: str


def run_list(
    folder: Path,
    given: argparse.Namespace,
    server: chaos_server.ChaosServer,
    rows: list[chaos_kinds.Row],
    threads: int,
) -> Run:
    """Ingest the list into ``folder/data``, in processes of its own."""
    root = folder / "data"
    opted_out = [row["url"] for row in rows if chaos_checks.kind_of(row["kind"]).opted_out]
    chaos_dataset.write_dataset(root, rows, opted_out)
    settings = chaos_dataset.settings(folder / "lists", server.places, LIMITS)
    settings |= {"shard_size": given.shard_size, "thread_count": threads, "image_size": 128}
    wish = {"root": str(root), "settings": settings, "runner": given.runner}
    (folder / "drive.json").write_text(json.dumps(wish))
    log = folder / "log.txt"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "SSL_CERT_FILE": server.places.certificate,
        "OMP_NUM_THREADS": "1",
    }
    start = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, __file__, "--drive", str(folder / "drive.json")],
            stdout=sink, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        sampler = process_tree.PeakSampler(process.pid)
        sampler.start()
        status = process.wait()
    seconds = time.monotonic() - start
    peaks: dict[str, float] = {}
    for name, kilobytes in sampler.stop().values():
        role = _role(name)
        peaks[role] = max(peaks.get(role, 0.0), round(kilobytes / 1024, 1))
    if status:
        raise SystemExit(f"the run ended with status {status}:\n{log.read_text()[-3000:]}")
    return Run(
        status=status,
        seconds=round(seconds, 1),
        verdict=chaos_checks.judge(root, rows, given.shard_size, LIMITS.timeout_seconds),
        digests=chaos_checks.digests(root),
        peaks=peaks,
        server=server.stats(),
        shard_seconds=[
            json.loads(path.read_text())["duration"]
            for path in sorted((root / "shards").glob("*_stats.json"))
        ],
        log=log.read_text(),
    )


def _role(command: str) -> str:
    """What a process of the run is for."""
    if "decoder_child" in command:
        return "decoder"
    if command.startswith("ray::"):
        return "worker"
    return "driver" if "--drive" in command else "ray itself"


def shard_bound(rows: Sequence[chaos_kinds.Row], threads: int) -> float:
    """Seconds that a shard may take: each row its whole time, so many at once, the last one on
    top, and the decoders that are killed one after the other."""
    kinds = [chaos_checks.kind_of(row["kind"]) for row in rows]
    each = [LIMITS.timeout_seconds + kind.extra_seconds + 1 for kind in kinds]
    killers = sum(kind.name.startswith("decoder_") for kind in kinds)
    return (
        sum(each) / threads
        + max(each)
        + killers * (LIMITS.decode_timeout_seconds + 2 * CHILD_SECONDS)
    )


def run_seed(folder: Path, given: argparse.Namespace, seed: int, photos: Path) -> dict[str, Any]:
    """Both runs of a seed, judged; prints the table."""
    faults = []
    with chaos_server.running(folder / "one", photos=photos) as server:
        rows = chaos_kinds.make_rows(seed, given.rows, 0.3, server.places, given.shard_size)
        first = run_list(folder / "one", given, server, rows, threads=64)
        like = server.places
    with chaos_server.running(folder / "two", photos=photos, delays=seed + 1, like=like) as server:
        second = run_list(folder / "two", given, server, rows, threads=40)
    print(first.verdict.table())
    faults += first.verdict.faults + second.verdict.faults
    if first.digests != second.digests:
        names = sorted(n for n in first.digests if first.digests[n] != second.digests.get(n))
        faults.append(f"the two runs differ in {', '.join(names)}")
    for run, threads in ((first, 64), (second, 40)):
        faults += [f"the canary was reached at {hit}" for hit in run.server["canary_hits"]]
        for number, seconds in enumerate(run.shard_seconds):
            own = rows[number * given.shard_size : (number + 1) * given.shard_size]
            if seconds > shard_bound(own, threads):
                faults.append(f"shard {number} took {seconds:.0f} s")
        if run.verdict.num_ok + run.verdict.num_failed != len(rows):
            faults.append("rows are lost")
    for fault in faults[:40]:
        print(f"FAULT: {fault}")
    figures = {
        "seed": seed,
        "rows": len(rows),
        "troubled": sum(row["kind"] != "plain" for row in rows),
        "ok": first.verdict.num_ok,
        "failed": first.verdict.num_failed,
        "unexplained": len(rows) - first.verdict.num_ok - first.verdict.num_failed,
        "faults": faults,
        "exit_status": [first.status, second.status],
        "same_bytes": first.digests == second.digests,
        "canary_hits": len(first.server["canary_hits"]) + len(second.server["canary_hits"]),
        "seconds": [first.seconds, second.seconds],
        "slowest_shard_seconds": round(max(first.shard_seconds + second.shard_seconds), 1),
        "least_shard_bound_seconds": round(
            min(
                shard_bound(rows[at : at + given.shard_size], 64)
                for at in range(0, len(rows), given.shard_size)
            ), 1,
        ),
        "peak_megabytes": {
            role: max(first.peaks.get(role, 0), second.peaks.get(role, 0))
            for role in sorted({*first.peaks, *second.peaks})
        },
        "server_cpu_seconds": [first.server["cpu_seconds"], second.server["cpu_seconds"]],
        "kinds": {
            name: {
                "catalog_row": f.kind.row,
                "rows": f.rows,
                "expected": f.kind.reasons,
                "got": f.got,
                "slowest_milliseconds": f.slowest_milliseconds,
            }
            for name, f in sorted(first.verdict.kinds.items())
        },
    }  # fmt: skip
    print(json.dumps({k: v for k, v in figures.items() if k not in ("kinds", "faults")}))
    return figures


def check_statuses(folder: Path, photos: Path) -> list[dict[str, Any]]:
    """`declip run` where the fault is not the web's."""
    found: list[dict[str, Any]] = []
    with chaos_server.running(folder, photos=photos) as server:
        places = server.places
        good = [chaos_kinds.PLAIN.url(places, n) for n in range(40)]
        cases: dict[str, tuple[list[dict[str, Any]], list[str], int, str]] = {
            "rows fail": ([{"url": u} for u in (*good, "ftp://x/1")], [], 0, ""),
            "no name resolves": (
                [{"url": f"http://nothing-{n}.invalid/{n}.jpg"} for n in range(40)],
                [], 1, "did not resolve",
            ),
            "not a column of hashes": (
                [{"url": u, "digest": "0" * 64} for u in good],
                ["--ingest.hash-column", "digest"], 1, "hash",
            ),
            "no blocklist": (
                [{"url": u} for u in good],
                ["--ingest.blocklists", str(folder / "nowhere.txt")], 1, "does not exist",
            ),
        }  # fmt: skip
        for name, (rows, options, wanted, word) in cases.items():
            out, table = folder / f"out-{len(found)}", folder / f"list-{len(found)}.parquet"
            pq.write_table(pa.Table.from_pylist([{"caption": "c", **row} for row in rows]), table)
            command = [sys.executable, "-m", "pipelines", "run", "pairs", "--out", str(out),
                       "--only", "ingest", "--runner", "local", "--ingest.table", str(table),
                       "--ingest.timeout-seconds", "3",
                       "--ingest.allow-addresses", ",".join(places.allowed()),
                       *options]  # fmt: skip
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, env=environment
            )
            published = (out / "manifests/ingest.json").exists()
            case = {
                "case": name,
                "status": done.returncode,
                "as_wanted": done.returncode == wanted
                and word in done.stderr
                and not any(noise in done.stderr for noise in ("Traceback", "Unclosed"))
                and published == (wanted == 0),
                "message": done.stderr.strip()[-300:] if wanted else "",
            }
            print(json.dumps(case), flush=True)
            found.append(case)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--shard-size", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runner", choices=("ray", "local"), default="ray")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, judge, print, write; exit status 1 where anything is not as it must be."""
    given = parse(arguments)
    if given.drive:
        return drive(json.loads(given.drive.read_text()))
    about = surroundings.describe(PACKAGES)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        photos = folder / "photos"
        ingest_pictures.write_set(photos, "256", ingest_pictures.read_photos(), limit=200)
        seeds = [run_seed(folder / str(seed), given, seed, photos) for seed in given.seeds]
        statuses = check_statuses(folder / "statuses", photos)
    num_faults = sum(len(seed["faults"]) for seed in seeds)
    num_faults += sum(not case["as_wanted"] for case in statuses)
    print(f"{sum(seed['rows'] for seed in seeds):,} rows, {num_faults} faults")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        limits = dataclasses.asdict(LIMITS)
        result = {**about, "limits": limits, "seeds": seeds, "exit_statuses": statuses}
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
