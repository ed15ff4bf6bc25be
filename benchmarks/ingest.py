"""Images a second and processor time an image of ingest, ours against img2dataset.

    python benchmarks/ingest.py --json benchmarks/results/ingest-cpu.json
    python benchmarks/ingest.py --sets 256 --images 400 --rounds 1 --variants
    python benchmarks/ingest.py --parts --rounds 0        # where our processor time goes

Both download the same URLs from the same loopback server (ingest_server.py, in a process of its own
whose cost is reported apart), with the same size, mode, quality, connections and retries, and write
the same layout. The pictures are real (ingest_pictures.py). Rounds of both take turns. Processor
time is user and system time. An image's is that of the process that works on a shard and of all
below it (our decoder; of img2dataset's processes only that one), over all shards but the first,
divided by their images: imports, models and the first use of everything are left out. All the rest
of the run's tree of processes is the start-up, told apart. There are four shards, so that
img2dataset's worker is not started anew within a run, which it is after five.

Quality is the PSNR of what each stored against the full-size original reduced in floating point.
Ours is measured as it is, with all safety on; then with one part of it taken out at a time: what a
setting switches off is said by its name, what has none is replaced (ingest_worker.PARTS). The
address guard and the limits on bytes and time have neither: they are within "fetch" of --parts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))
if TYPE_CHECKING:
    from benchmarks import (
        ingest_parts,
        ingest_pictures,
        ingest_quality,
        ingest_server,
        surroundings,
    )
else:
    # The script's folder is on the path; the repository's root was just put there.
    import ingest_parts
    import ingest_pictures
    import ingest_quality
    import ingest_server
    import surroundings

HERE = Path(__file__).parent
THREADS = 64
PACKAGES = ("img2dataset", "opencv-python-headless", "opencv-python", "simplejpeg", "aiohttp",
            "pillow", "pyarrow", "albumentations")  # fmt: skip
SHARDS = 4
PEER_SETTINGS: dict[str, Any] = {
    "image_size": 256,
    "resize_mode": "keep_ratio",
    "encode_quality": 90,
    "retries": 2,
    "timeout": 10,
    "compute_hash": "sha256",
    "extract_exif": False,
}
"""The rest is img2dataset's default. Its reading of EXIF is off, for ours stores none."""
OUR_SETTINGS: dict[str, Any] = {
    "image_size": 256,
    "resize_mode": "keep_ratio",
    "encode_quality": 90,
    "retries": 2,
    "timeout_seconds": 10.0,
}
What = tuple[str, dict[str, Any], tuple[str, ...]]
"""Who, changed settings, parts taken out."""
MAIN: dict[str, What] = {
    "ours": ("ours", {}, ()),
    "img2dataset": ("peer", {}, ()),
}
VARIANTS: dict[str, What] = {
    "ours, standard Huffman tables": ("ours", {"optimize_huffman": False}, ()),
    "ours, exact decoding": ("ours", {"resizer": "exact"}, ()),
    "ours, no robots.txt": ("ours", {"robots": "ignore"}, ()),
    "ours, no X-Robots-Tag": ("ours", {"disallowed_header_directives": []}, ()),
    "ours, hashes verified": ("ours", {"hash_column": "expected_hash"}, ()),
    "ours, no repeat alarm": ("ours", {"placeholder_repeats": 0}, ()),
    "ours, no least rate": ("ours", {"min_bytes_per_second": 0}, ()),
    "ours, decoder in process": ("ours", {}, ("decoder_process",)),
    "ours, no ledger": ("ours", {}, ("ledger",)),
    "img2dataset, with EXIF": ("peer", {"extract_exif": True}, ()),
}
"""What is measured beside the two."""


def write_table(path: Path, server: ingest_server.PictureServer, count: int) -> None:
    """URLs and captions; hashes are left out except where they are verified."""
    rows = [{"url": server.url(n), "caption": f"picture number {n}"} for n in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), path)


def add_hashes(path: Path, parts: Sequence[tuple[bytes, bytes]]) -> None:
    """A column of what the server's answers hash to."""
    import hashlib

    table = pq.read_table(path)
    digests = []
    for number in range(table.num_rows):
        head, rest = parts[number % len(parts)]
        body = head[head.index(b"\r\n\r\n") + 4 :] + b"%09d" % number + rest
        digests.append("sha256:" + hashlib.sha256(body).hexdigest())
    pq.write_table(table.append_column("expected_hash", pa.array(digests)), path)


class Bench:
    """Runs on one set of pictures."""

    def __init__(self, given: argparse.Namespace, folder: Path, name: str) -> None:
        self.given = given
        self.folder = folder
        self.name = name
        self.originals = folder / name
        self.server: ingest_server.PictureServer

    def run(self, label: str, who: str, settings: Mapping[str, Any], without: Sequence[str],
            count: int) -> dict[str, Any]:  # fmt: skip
        """One run over the first ``count`` URLs, in processes of its own."""
        work = Path(tempfile.mkdtemp(dir=self.folder))
        table = work / "list.parquet"
        write_table(table, self.server, count)
        if "hash_column" in settings:
            add_hashes(table, ingest_server.Pictures(self.originals).parts)
        base = OUR_SETTINGS if who == "ours" else PEER_SETTINGS
        (work / "settings.json").write_text(
            json.dumps(
                {
                    "out": str(work / "out"),
                    "table": str(table),
                    "shard_size": -(-self.given.images // SHARDS),
                    "threads": THREADS,
                    "allow": self.server.addresses,
                    "settings": {**base, **settings},
                    "without": without,
                    "marks": str(work / "marks.jsonl"),
                }
            )
        )
        before = self.server.stats()
        result, log = work / "result.json", work / "log.txt"
        command = [sys.executable, str(HERE / "process_tree.py"), str(result), sys.executable,
                   str(HERE / "ingest_worker.py"), who, str(work / "settings.json")]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
        with log.open("wb") as sink:
            subprocess.run(
                command, check=True, stdout=sink, stderr=subprocess.STDOUT, env=environment
            )
        measured: dict[str, Any] = json.loads(result.read_text())
        stored = ingest_quality.quality(work / "out/shards", self.originals, self.given.psnr)
        if measured["status"] or stored["pictures"] != count:
            raise SystemExit(
                f"{label}: exit status {measured['status']}, {stored['pictures']} of {count} "
                f"pictures; its output:\n{log.read_text()[-3000:]}"
            )
        after = self.server.stats()
        return {
            "set": self.name,
            "who": label,
            "images": count,
            **measured,
            "marks": [json.loads(line) for line in (work / "marks.jsonl").read_text().splitlines()],
            "quality": stored,
            "server_cpu_seconds": round(after["cpu_seconds"] - before["cpu_seconds"], 3),
            "connections": after["connections"] - before["connections"],
        }

    def round(self, label: str, what: What) -> dict[str, Any]:
        """One run, and what it says of an image."""
        size = -(-self.given.images // SHARDS)
        run = self.run(label, *what, SHARDS * size)
        marks = run.pop("marks")
        seconds, cpu = (
            sum(mark[name] for mark in marks[1:]) / (size * (SHARDS - 1))
            for name in ("seconds", "cpu_seconds")
        )
        row = {
            "set": self.name,
            "who": label,
            "images": run["images"],
            "cpu_ms_per_image": round(1000 * cpu, 3),
            "images_per_second": round(1 / seconds, 1),
            "start_cpu_seconds": round(run["cpu_seconds"] - cpu * run["images"], 2),
            "run_seconds": run["seconds"],
            "run_cpu_seconds": run["cpu_seconds"],
            "server_cpu_ms_per_image": round(1000 * run["server_cpu_seconds"] / run["images"], 3),
            "connections": run["connections"],
            "peak_megabytes": run["peak_megabytes"],
            "left": run["left"],
            **run["quality"],
        }
        print(json.dumps(row), flush=True)
        return row


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each set and downloader: medians over rounds, and ratios to img2dataset."""
    lines: list[dict[str, Any]] = []
    for key in dict.fromkeys((row["set"], row["who"]) for row in rows):
        same = [row for row in rows if (row["set"], row["who"]) == key]
        peaks = [row["peak_megabytes"] for row in same]
        lines.append(
            {
                "set": key[0],
                "who": key[1],
                "rounds": len(same),
                "cpu_ms_per_image": statistics.median(r["cpu_ms_per_image"] for r in same),
                "cpu_ms_spread": [
                    min(r["cpu_ms_per_image"] for r in same),
                    max(r["cpu_ms_per_image"] for r in same),
                ],
                "images_per_second": statistics.median(r["images_per_second"] for r in same),
                "start_cpu_seconds": statistics.median(r["start_cpu_seconds"] for r in same),
                "server_cpu_ms_per_image": statistics.median(
                    r["server_cpu_ms_per_image"] for r in same
                ),
                "peak_megabytes": max(peaks),
                **{n: same[0][n] for n in ("psnr_mean_db", "psnr_least_db", "mean_bytes")},
                "baseline_420": all(r["baseline_420"] for r in same),
            }
        )
    peers = {line["set"]: line for line in lines if line["who"] == "img2dataset"}
    for line in lines:
        peer = peers.get(line["set"])
        if peer is not None:
            line["times_less_cpu"] = round(peer["cpu_ms_per_image"] / line["cpu_ms_per_image"], 2)
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The summary for a person."""
    text = [
        f"{'set':<9}{'who':<28}{'ms/image':>9}{'x less':>8}{'images/s':>10}{'start s':>9}"
        f"{'MB':>16}{'PSNR':>8}{'bytes':>9}{'server ms':>11}"
    ]
    for line in lines:
        peaks = "+".join(f"{mb:.0f}" for mb in line["peak_megabytes"][:3] if mb > 30)
        text.append(
            f"{line['set']:<9}{line['who']:<28}{line['cpu_ms_per_image']:>9.2f}"
            f"{line.get('times_less_cpu', float('nan')):>8.2f}{line['images_per_second']:>10.0f}"
            f"{line['start_cpu_seconds']:>9.1f}{peaks:>16}{line['psnr_mean_db']:>8.2f}"
            f"{line['mean_bytes']:>9}{line['server_cpu_ms_per_image']:>11.3f}"
        )
    return "\n".join(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=ingest_pictures.SETS,
                        default=list(ingest_pictures.SETS))  # fmt: skip
    parser.add_argument("--images", type=int, default=8000, help="URLs of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, taking turns")
    parser.add_argument("--psnr", type=int, default=300, help="pictures whose PSNR is computed")
    parser.add_argument("--only", choices=("ours", "img2dataset"), help="one of the two alone")
    parser.add_argument("--variants", nargs="*", default=[], metavar="NAME",
                        help="parts taken out in turn; without names all of them")  # fmt: skip
    parser.add_argument("--parts", action="store_true", help="also each part called alone")
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args(arguments)
    if "--variants" in (sys.argv if arguments is None else arguments) and not given.variants:
        given.variants = list(VARIANTS)
    if unknown := sorted(set(given.variants) - set(VARIANTS)):
        parser.error(f"there is no variant {unknown[0]!r}; choose of: {'; '.join(VARIANTS)}")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    given = parse(arguments)
    about = surroundings.describe(PACKAGES)
    what = {name: MAIN[name] for name in MAIN if given.only in (None, name)}
    what |= {name: VARIANTS[name] for name in given.variants}
    photos = ingest_pictures.read_photos()
    rows: list[dict[str, Any]] = []
    parts: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="ingest-") as folder:
        for name in given.sets:
            bench = Bench(given, Path(folder), name)
            ingest_pictures.write_set(bench.originals, name, photos)
            with ingest_server.running(bench.originals) as bench.server:
                if given.parts:
                    parts[name] = ingest_parts.measure(
                        bench.server, bench.originals, count=given.images // 4, threads=THREADS
                    )
                    print(json.dumps({"set": name, "milliseconds": parts[name]}), flush=True)
                for _ in range(given.rounds):
                    rows += [bench.round(label, who) for label, who in what.items()]
    lines = summarize(rows)
    print(table(lines))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {"ours": OUR_SETTINGS, "img2dataset": PEER_SETTINGS, "threads": THREADS}
        result = {**about, "settings": settings, "summary": lines, "parts": parts, "rows": rows}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
