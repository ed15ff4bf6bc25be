"""A list of a million rows read, checked, deduplicated and split into tasks: seconds and memory.

    python benchmarks/sources.py --captions runs/demo/source/pairs.parquet --json out.json

The captions are real (a column of any parquet file, repeated), the addresses made up: 2% occur
twice, 1% of the rows lack one or the caption. Each list is written in its real form and read in a
process of its own, whose peak memory is the kernel's (VmHWM). The goal is 60 s and 1 GiB.
`--join` measures YFCC15M V1 as it is: 14,829,396 photo ids, looked up in a stream of metadata.
"""

import argparse
import bz2
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
GOAL_SECONDS, GOAL_BYTES = 60.0, 1 << 30


def make_rows(captions: list[str], count: int) -> Iterator[Row]:
    """Rows of real captions: every 50th has the URL of the row before, every 100th a fault."""
    for number in range(count):
        named = number - 1 if number % 50 == 49 else number
        digest = hashlib.md5(str(named).encode()).hexdigest()
        photo = 2_000_000_000 + named
        server = f"https://farm{named % 9}.staticflickr.com/{named % 8191}"
        yield {
            "number": number,
            "id": photo,
            "caption": "" if number % 200 == 0 else captions[number % len(captions)],
            "url": "" if number % 200 == 100 else f"{server}/{photo}_{digest[:10]}.jpg",
            "md5": digest,
            "sha256": digest * 2,
        }


def write_lines(path: Path, rows: Iterator[Row], line: Callable[[Row], str]) -> None:
    opener: Any = bz2.open if path.suffix == ".bz2" else open
    with opener(path, "wt", encoding="utf-8", newline="\n") as f:
        f.writelines(line(row) for row in rows)


def write_parquet(path: Path, rows: Iterator[Row], columns: Callable[[Row], Row]) -> None:
    writer: Any = None
    while part := [columns(row) for _, row in zip(range(100_000), rows)]:
        table = pa.Table.from_pylist(part)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def metadata_line(row: Row) -> str:
    """A line of YFCC100M's metadata with line number and hash."""
    words = quote_plus(row["caption"])
    fields = [
        row["number"],
        row["id"],
        row["md5"],
        "39019111%40N00",
        "some+one",
        "2012-02-16 09:56:37.0",
        1331840483,
        "Canon+PowerShot",
        words,
        words + "+%3Ca+href%3D%22http%3A%2F%2Fexample.org%22%3Emore%3C%2Fa%3E+www.example.org",
        "canon,canon+powershot",
        "",
        "",
        "",
        "",
        f"http://www.flickr.com/photos/39019111@N00/{row['id']}/",
        row["url"],
        "Attribution License",
        "http://creativecommons.org/licenses/by/2.0/",
        7205,
        8,
        row["md5"][:10],
        row["md5"][:10],
        "jpg",
        int(row["number"] % 100 == 7),
    ]
    return "\t".join(map(str, fields)) + "\n"


def make_list(kind: str, folder: Path, captions: list[str], count: int) -> Row:
    """Write a list of a kind; the settings that read it."""
    rows = make_rows(captions, count)
    if kind == "cc3m":
        write_lines(folder / "cc3m.tsv", rows, lambda r: f"{r['caption']}\t{r['url']}\n")
    elif kind in ("cc12m", "cc12m_hashes"):
        write_lines(folder / "cc12m.tsv", rows, lambda r: f"{r['url']}\t{r['caption']}\n")
        if kind == "cc12m_hashes":
            again = (row for row in make_rows(captions, count) if row["url"])
            write_lines(
                folder / "hashes.txt", again, lambda r: f"{r['url']}\t{r['sha256']}\t{r['md5']}\n"
            )
            return {"lists": (str(folder / "cc12m.tsv"),), "hashes": (str(folder / "hashes.txt"),)}
    elif kind == "yfcc100m":
        write_lines(folder / "yfcc100m_dataset", rows, metadata_line)
    elif kind == "yfcc15m_v1":
        # As in life, the metadata has more rows than the subset: here twice as many.
        more = make_rows(captions, 2 * count)
        write_lines(folder / "yfcc100m_dataset", more, metadata_line)
        chosen = (row for row in make_rows(captions, 2 * count) if row["number"] % 2 == 0)
        write_lines(
            folder / "subset.tsv.bz2",
            chosen,
            lambda r: f"{r['number']}\t{r['id']}\t{r['md5']}\n",
        )
        return {
            "lists": (str(folder / "subset.tsv.bz2"),),
            "metadata": (str(folder / "yfcc100m_dataset"),),
        }
    elif kind == "yfcc15m_v2":
        names = ("caption", "md5", "url")
        write_lines(
            folder / "yfcc15m_clean_open_data.json",
            rows,
            lambda r: (
                json.dumps(dict(zip(("caption", "filename", "url"), (r[n] for n in names)))) + "\n"
            ),
        )
    else:
        return make_table(kind, folder, rows)
    return {"lists": (str(folder),)}


def make_table(kind: str, folder: Path, rows: Iterator[Row]) -> Row:
    """Lists whose columns have names."""
    if kind == "laion":
        write_parquet(
            folder / "part-00000.parquet",
            rows,
            lambda r: {
                "SAMPLE_ID": r["id"],
                "URL": r["url"],
                "TEXT": r["caption"],
                "HEIGHT": 512,
                "WIDTH": 640,
                "LICENSE": "?",
                "NSFW": "UNLIKELY",
                "similarity": 0.3,
            },
        )
    elif kind == "datacomp":
        write_parquet(
            folder / "0.parquet",
            rows,
            lambda r: {
                "uid": r["md5"],
                "url": r["url"],
                "text": r["caption"],
                "original_width": 640,
                "original_height": 512,
                "clip_b32_similarity_score": 0.25,
                "clip_l14_similarity_score": 0.2,
                "face_bboxes": [[0.1, 0.2, 0.3, 0.4]] if r["number"] % 4 == 0 else [],
                "sha256": r["sha256"],
            },
        )
    elif kind == "coyo":
        write_parquet(
            folder / "part-0.parquet",
            rows,
            lambda r: {
                "id": r["id"],
                "url": r["url"],
                "text": r["caption"],
                "width": 640,
                "height": 512,
                "image_phash": r["md5"][:16],
                "clip_similarity_vitb32": 0.25,
            },
        )
    elif kind == "csv":
        write_lines(
            folder / "pairs.csv",
            iter([{"url": "url", "caption": "caption"}]),
            lambda r: f"{r['url']},{r['caption']}\n",
        )
        with (folder / "pairs.csv").open("a", encoding="utf-8") as f:
            f.writelines(
                f'{r["url"]},"{r["caption"].replace(chr(34), chr(34) * 2)}"\n' for r in rows
            )
    else:
        write_lines(
            folder / "pairs.jsonl",
            rows,
            lambda r: (
                json.dumps({"url": r["url"], "caption": r["caption"], "n": r["number"]}) + "\n"
            ),
        )
    return {"lists": (str(folder),)}


KINDS = (
    "cc3m",
    "cc12m",
    "cc12m_hashes",
    "yfcc100m",
    "yfcc15m_v1",
    "yfcc15m_v2",
    "laion",
    "datacomp",
    "coyo",
    "csv",
    "jsonl",
)


def peak_bytes() -> int:
    """This process's largest resident memory so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_here(settings: Row, root: str, shard_size: int) -> Row:
    """In a process of its own: digest, read, check, deduplicate, write, and split into tasks."""
    from declip_ingest.sources import PAIRS_PATH, ReadPairs, pin_lists
    from declip_ingest.table import open_pairs, plan_shards

    imported = peak_bytes()
    start, cpu = time.perf_counter(), time.process_time()
    settings = {name: tuple(value) for name, value in settings.items()}
    stage = pin_lists(ReadPairs(root=root, **settings))
    stats = stage.worker()("all")
    pairs = open_pairs(f"{root}/{PAIRS_PATH}")
    shards = plan_shards(pairs.num_rows, shard_size)
    last = pairs.read((len(shards) - 1) * shard_size, pairs.num_rows)
    assert last.num_rows <= shard_size
    return {
        "num_rows": stats.num_in,
        "num_kept": stats.num_out,
        "reasons": dict(stats.reasons),
        "num_tasks": len(shards),
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mib": round(peak_bytes() / 2**20),
        "imported_mib": round(imported / 2**20),
    }


def join_here(count: int) -> Row:
    """Look up 64k photo ids at a time in V1's number of them."""
    from declip_ingest.list_rows import Rows
    from declip_ingest.yfcc import _IdJoin

    schema = pa.schema([("source_id", pa.string())])
    step = 65_536

    def parts() -> Iterator[Rows]:
        for first in range(0, count, step):
            numbers = np.arange(first, min(first + step, count), dtype=np.int64)
            ids = pa.array(2_000_000_000 + 7 * ((numbers * 2_654_435_761) % 4_000_000_007))
            yield Rows(
                name="subset.tsv",
                numbers=numbers,
                table=pa.table([ids.cast(pa.string())], schema=schema),
                faults=np.zeros(len(numbers), np.uint8),
            )

    before, start = peak_bytes(), time.perf_counter()
    join = _IdJoin(parts(), None)
    loaded, seconds = peak_bytes(), time.perf_counter() - start
    start, asked = time.perf_counter(), 0
    generator = np.random.default_rng(0)
    for _ in range(100):
        join.is_wanted(generator.integers(2_000_000_000, 30_000_000_000, step))
        asked += step
    return {
        "num_ids": count,
        "load_seconds": round(seconds, 1),
        "load_peak_mib": round((loaded - before) / 2**20),
        "look_ups_a_second": round(asked / (time.perf_counter() - start)),
    }


def run_child(arguments: list[str]) -> Row:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True, text=True
    )
    row: Row = json.loads(done.stdout)
    return row


def environment(given: argparse.Namespace) -> Row:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip() or None,
        "pyarrow": importlib.metadata.version("pyarrow"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "rows": given.rows,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--captions", default="runs/demo/source/pairs.parquet", metavar="PARQUET")
    parser.add_argument("--column", default="caption", help="of --captions")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--shard-size", type=int, default=1000)
    parser.add_argument("--folder", help="where lists are written (a temporary folder)")
    parser.add_argument("--join", action="store_true", help="V1's ids at their real number")
    parser.add_argument("--json", type=Path, help="write environment and rows to this file")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument("--join-here", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.here:
        settings, root = json.loads(given.here)
        print(json.dumps(read_here(settings, root, given.shard_size)))
        return
    if given.join_here:
        print(json.dumps(join_here(given.join_here)))
        return
    captions = pq.read_table(given.captions, columns=[given.column])[given.column].to_pylist()
    captions = [text.replace("\t", " ").replace("\n", " ") for text in captions if text]
    rows = []
    for kind in given.kinds:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=given.folder))
            place = Path(folder, "list")
            place.mkdir()
            settings = make_list(kind, place, captions, given.rows)
            size = sum(f.stat().st_size for f in place.iterdir())
            call = ["--here", json.dumps([settings, f"{folder}/out"])]
            row = {
                "list": kind,
                "mib": round(size / 2**20),
                **run_child([*call, "--shard-size", str(given.shard_size)]),
            }
        row["within_goal"] = row["seconds"] < GOAL_SECONDS and row["peak_mib"] << 20 < GOAL_BYTES
        print(json.dumps(row), flush=True)
        rows.append(row)
    if given.join:
        rows.append({"list": "yfcc15m_v1 join", **run_child(["--join-here", "14829396"])})
        print(json.dumps(rows[-1]), flush=True)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(
            json.dumps({"environment": environment(given), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
