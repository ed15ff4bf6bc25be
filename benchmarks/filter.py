"""Rules over many million rows of signals: time, processor time and memory of plan and filter.

    python benchmarks/filter.py --data runs/demo --json benchmarks/results/filter-cpu.json
    python benchmarks/filter.py --data runs/demo --rows 1000000 --part rules
    python benchmarks/filter.py --data runs/demo --part signals      # what measuring costs

The signals are real: those of ``--data`` (measured anew if an older version wrote them). Each shard
that is made draws rows of them with replacement and moves every number by up to 3 %; the hashes of
captions and pictures are drawn so that some 15 % of the rows repeat another one's. The stages run
as they are: PlanFilter in one process of two threads, then FilterPairs in two processes, a task
a shard, with files flushed to disk. Reported are wall and processor time and the greatest resident
memory of any process. ``balance`` is the same with a list of 100,000 concepts.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from declip_filter import MeasureImages
from declip_filter.plan import PlanFilter
from declip_filter.rules import FilterPairs
from declip_filter.signals import read_signals
from declip_shards import DeclipError, Store, layout, sidecars

sys.path.insert(0, str(Path(__file__).parents[1]))
if TYPE_CHECKING:
    from benchmarks import filter_signals, surroundings
else:
    # The script's folder is on the path.
    import filter_signals
    import surroundings

PACKAGES = ("pyarrow", "numpy", "fsspec")
NUM_PROCESSES = 2
NUM_CONCEPTS = 100_000
MADE = "made.json"
"""Of a made dataset: what it is; written last."""
GOAL_SECONDS = 30.0
"""For ten million rows on two cores: the default rules, the first of the settings below."""
SETTINGS: Mapping[str, dict[str, Any]] = {
    "default": {"drop_duplicates": ("bytes", "perceptual")},
    "whole dataset": {
        "recipe": "default+datacomp_basic",
        "drop_duplicates": ("bytes", "perceptual"),
        "rules": (
            "text_repeated: count(caption_sha) > 10",
            "dull: not top_fraction(entropy, 0.7)",
        ),
    },
}
BALANCE: dict[str, Any] = {"recipe": "default+metaclip:20000"}


def real_rows(data: str, folder: Path) -> tuple[pa.Table, pa.Table]:
    """Signals of a workspace and the rows of its shards that they belong to."""
    store = Store(data)
    signals, rows = [], []
    shards = layout.list_shards(store)
    try:
        signals = [read_signals(store, "basic", shard) for shard in shards]
    except DeclipError as error:
        print(f"measuring anew: {error}", file=sys.stderr)
        copy = str(folder / "measured")
        shutil.copytree(store.local_path("shards"), Path(copy, "shards"))
        stage = MeasureImages(root=copy)
        work = stage.worker()
        for shard in stage.tasks():
            work(shard)
        signals = [read_signals(Store(copy), "basic", shard) for shard in shards]
    for shard in shards:
        table = sidecars.read_table(store, layout.shard_parquet_path(shard))
        rows.append(table.filter(pc.equal(table.column("status"), "success")).sort_by("key"))
    return pa.concat_tables(signals), pa.concat_tables(rows, promote_options="default")


def moved(column: pa.Array, kind: pa.DataType, rng: np.random.Generator) -> pa.Array:
    """Numbers a few percent off, so that no two shards are alike; all else as it is."""
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        return column
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    numbers = column.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64)
    numbers *= rng.uniform(0.97, 1.03, len(numbers))
    if pa.types.is_integer(kind):
        numbers = np.rint(numbers)
    return pa.array(numbers, mask=~valid).cast(kind)


def hexadecimal(numbers: np.ndarray[Any, Any], digits: int) -> pa.Array:
    """Numbers as texts of so many hexadecimal digits."""
    data = numbers.astype(">u8").tobytes()
    pieces = [data[i : i + 8].hex() for i in range(0, len(data), 8)]
    return pa.array([(piece * 4)[:digits] for piece in pieces])


def make_shard(
    store: Store, number: int, size: int, signals: pa.Table, rows: pa.Table, num_rows: int
) -> int:
    """One shard's tables; its pictures are never read, so there are none. Returns bytes written."""
    rng = np.random.default_rng([7, number])
    shard = layout.shard_name(number)
    keys = pa.array([layout.sample_key(number, row, size) for row in range(size)])
    drawn = pa.array(rng.integers(0, signals.num_rows, size))
    basic = {"key": keys}
    for field in signals.schema:
        if field.name != "key":
            column = signals.column(field.name).combine_chunks().take(drawn)
            basic[field.name] = moved(column, field.type, rng)
    # Texts and pictures out of a pool: some 15 % of the rows have another one's.
    basic["caption_sha"] = hexadecimal(rng.integers(0, 3 * num_rows, size), 32)
    basic["image_sha256"] = hexadecimal(rng.integers(0, 3 * num_rows, size), 64)
    sidecars.write_table(store, layout.signals_path("basic", shard), pa.table(basic))
    is_copy = rng.random((2, size)) < 0.05
    earlier = pa.array([layout.sample_key(max(number - 1, 0), row, size) for row in range(size)])
    duplicates = {
        "key": keys,
        "duplicate_bytes_of": pc.if_else(pa.array(is_copy[0]), earlier, None),
        "duplicate_perceptual_of": pc.if_else(pa.array(is_copy[1]), earlier, None),
        "duplicate_perceptual_distance": pa.array(rng.integers(0, 8, size), pa.int32()),
    }
    sidecars.write_table(store, layout.signals_path("duplicates", shard), pa.table(duplicates))
    own = rows.take(drawn)
    own = own.set_column(own.schema.get_field_index("key"), "key", keys)
    sidecars.write_table(store, layout.shard_parquet_path(shard), own)
    store.write_bytes(layout.shard_stats_path(shard), b"{}\n")
    paths = [layout.signals_path(name, shard) for name in ("basic", "duplicates")]
    return sum(store.size(path) for path in (*paths, layout.shard_parquet_path(shard)))


def make_dataset(data: str, root: str, num_rows: int, size: int) -> dict[str, Any]:
    """Shards without pictures."""
    signals, rows = real_rows(data, Path(root).parent)
    count = -(-num_rows // size)
    total = 0
    for number in range(count):
        total += make_shard(Store(root), number, size, signals, rows, num_rows)
        if number % 100 == 99:
            print(f"made {number + 1} of {count} shards", file=sys.stderr)
    made = {
        "real_rows": signals.num_rows,
        "shards": count,
        "rows": count * size,
        "signals": len(signals.column_names) - 1,
        "mib_on_disk": round(total / 2**20),
    }
    Store(root).write_bytes(MADE, json.dumps(made).encode())
    return made


def make_concepts(data: str, path: Path, count: int) -> None:
    """Runs of one to three words of real captions, filled up with runs that occur nowhere."""
    store = Store(data)
    found: set[str] = set()
    words: set[str] = set()
    for shard in layout.list_shards(store):
        captions = sidecars.read_table(store, layout.shard_parquet_path(shard), ["caption"])
        for caption in captions.column("caption").to_pylist():
            mine = [word for word in (caption or "").lower().split() if word.isalnum()]
            words.update(mine)
            for length in (1, 2, 3):
                found.update(" ".join(mine[i : i + length]) for i in range(len(mine) - length + 1))
    rng = np.random.default_rng(3)
    vocabulary = sorted(words)
    while len(found) < count:
        found.add(" ".join(rng.choice(vocabulary, int(rng.integers(2, 5)))))
    path.write_text("\n".join(sorted(found)[:count]))


def measured(stage: Any, tasks: Sequence[str], pipe: Any) -> None:
    """In a process of its own: all tasks, then what they cost."""
    started, used = time.perf_counter(), time.process_time()
    work = stage.worker()
    stats = [work(task) for task in tasks]
    pipe.send(
        {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - used,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "num_in": sum(stat.num_in for stat in stats),
            "num_out": sum(stat.num_out for stat in stats),
        }
    )


def run(stage: Any, tasks: Sequence[str], processes: int) -> dict[str, Any]:
    """A stage's tasks over so many processes, each with a part of them."""
    context = multiprocessing.get_context("spawn")
    started = time.perf_counter()
    ends = []
    for number in range(processes):
        here, there = context.Pipe()
        child = context.Process(target=measured, args=(stage, tasks[number::processes], there))
        child.start()
        there.close()
        ends.append((child, here))
    found = [here.recv() for _, here in ends]
    for child, _ in ends:
        child.join()
    return {
        "seconds": max(entry["seconds"] for entry in found),
        "seconds_with_imports": time.perf_counter() - started,
        "cpu_seconds": sum(entry["cpu_seconds"] for entry in found),
        "peak_mib": max(entry["peak_mib"] for entry in found),
        "num_in": sum(entry["num_in"] for entry in found),
        "num_out": sum(entry["num_out"] for entry in found),
    }


def measure_rules(root: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plan, then filter."""
    plan, pairs = PlanFilter(root=root, **settings), FilterPairs(root=root, **settings)
    planned = run(plan, plan.tasks(), 1)
    filtered = run(pairs, pairs.tasks(), NUM_PROCESSES)
    cpu = planned["cpu_seconds"] + filtered["cpu_seconds"]
    return {
        "settings": {name: value for name, value in settings.items() if name != "concepts"},
        "num_rules": len(pairs.resolved_rules),
        "rows": filtered["num_in"],
        "kept": filtered["num_out"],
        "seconds": planned["seconds"] + filtered["seconds"],
        "cpu_seconds": cpu,
        "rows_per_cpu_second": filtered["num_in"] / cpu,
        "peak_mib": max(planned["peak_mib"], filtered["peak_mib"]),
        "plan": planned,
        "filter": filtered,
    }


def rules_part(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    root = given.root or str(folder / "data")
    if not Store(root).exists(MADE):
        make_dataset(given.data, root, given.rows, given.shard_rows)
    made = json.loads(Store(root).read_bytes(MADE))
    concepts = folder / "concepts.txt"
    make_concepts(given.data, concepts, NUM_CONCEPTS)
    found: dict[str, Any] = {"dataset": made, "goal_seconds": GOAL_SECONDS}
    chosen = {**SETTINGS, "balance": {**BALANCE, "concepts": str(concepts)}}
    for name, settings in chosen.items():
        if given.only and name not in given.only:
            continue
        # What was written before is in the page cache or not: the second round tells the same.
        rounds = [measure_rules(root, settings) for _ in range(given.rounds)]
        found[name] = min(rounds, key=lambda entry: float(entry["cpu_seconds"]))
        found[name]["load_average"] = round(os.getloadavg()[0], 2)
        brief = {k: found[name][k] for k in ("seconds", "cpu_seconds", "peak_mib", "rows", "kept")}
        print(name, json.dumps(brief))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="a workspace whose signals are drawn from")
    parser.add_argument("--root", default="", help="folder of the made dataset, to use it again")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shard-rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="settings: default, 'whole dataset', balance")
    parser.add_argument("--part", choices=("rules", "signals"), nargs="*", default=["rules"])
    parser.add_argument("--json", default="", help="file for the results; what it has is kept")
    given = parser.parse_args()
    path = Path(given.json) if given.json else None
    results: dict[str, Any] = {}
    if path and path.exists():
        results = json.loads(path.read_text())
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        if "rules" in given.part:
            about = surroundings.describe(PACKAGES)
            results["rules"] = {"about": about, **rules_part(given, Path(folder))}
        if "signals" in given.part:
            results["signals"] = filter_signals.main_part(given.data)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
