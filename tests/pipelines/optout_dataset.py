"""A small dataset from URLs to neighbor tables, through the real runner, without a network.

What a URL serves is computed from it, so that a dataset can be built again, with another list of
what is opted out, and must come out the same.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from declip_filter import (
    BuildGraph,
    BuildIndex,
    BuildNeighbors,
    EmbedPairs,
    FilterPairs,
    FindDuplicates,
    MeasureImages,
    PlanFilter,
)
from declip_shards import Sample, Store, TaskStats, layout, write_shard
from declip_shards.fakes import COLORS, SHAPES, draw
from declip_shards.optout import KEPT_COLUMNS, REASON, STATUS, load_optout
from pipelines.pipeline import Pipeline, Step
from pipelines.runner import run_pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "filter"))

__version__ = "1"

PLACES = ("park", "street", "garden", "kitchen", "harbor", "forest", "station", "market")
PER_SHARD = 30
NUM_SHARDS = 3


def list_rows() -> list[dict[str, Any]]:
    """The URL table; the last shard is held out."""
    rows = []
    for number in range(NUM_SHARDS * PER_SHARD):
        color, shape = COLORS[number % 6], SHAPES[number // 6 % 4]
        rows.append(
            {
                "url": f"https://example.org/photos/{number:04d}/{color}.jpg?size=large",
                "caption": f"a {color} {shape} in the {PLACES[number % 8]} of number {number:03d}",
                "author": f"author {number}",
                "split": "test" if number >= (NUM_SHARDS - 1) * PER_SHARD else "train",
            }
        )
    # The same picture under another URL.
    rows[41]["url"] = rows[7]["url"].replace("example.org", "mirror.example.net")
    # A caption that two samples have.
    rows[50]["caption"] = rows[11]["caption"]
    return rows


def served(url: str) -> bytes | None:
    """The bytes of a URL; None where it fails."""
    number = int(url.split("/")[4])
    if number % 9 == 8:
        return None
    rng = np.random.default_rng(number)
    return draw(COLORS[number % 6], SHAPES[number // 6 % 4], 32, rng)


@dataclass(frozen=True, kw_only=True)
class DownloadShards:
    """Ingest's contract (rows, reasons, opt-out list) without its network."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Folder of the dataset."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def tasks(self) -> list[str]:
        return [layout.shard_name(n) for n in range(NUM_SHARDS)]

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(layout.shard_stats_path(task))

    def worker(self) -> Callable[[str], TaskStats]:
        return lambda task: download(Store(self.root), task)


def download(store: Store, shard: str) -> TaskStats:
    listed = load_optout(store)
    start = int(shard) * PER_SHARD
    rows, samples = [], []
    for index, given in enumerate(list_rows()[start : start + PER_SHARD]):
        key = layout.sample_key(int(shard), index, PER_SHARD)
        data = None if listed.blocks_url(given["url"]) else served(given["url"])
        sha256 = hashlib.sha256(data).hexdigest() if data else None
        row = {
            **given,
            "key": key,
            "status": "success" if data else STATUS,
            "error_message": None if data else "http_404",
            "width": 32 if data else None,
            "height": 32 if data else None,
            "original_width": 32 if data else None,
            "original_height": 32 if data else None,
            "sha256": sha256,
        }
        if listed.blocks_url(given["url"]) or listed.blocks_content(sha256):
            row = dict.fromkeys(row) | {"key": key, "status": STATUS, "error_message": REASON}
        elif data:
            samples.append(Sample(key=key, image=data, caption=given["caption"], metadata=row))
        rows.append(row)
    assert set(KEPT_COLUMNS) < set(rows[0])
    stats = {"count": len(rows), "successes": len(samples), "duration": 1.5}
    files = write_shard(store, shard, samples, pa.Table.from_pylist(rows), stats)
    reasons = Counter(row["error_message"] for row in rows if row["error_message"])
    return TaskStats(
        num_in=len(rows),
        num_out=len(samples),
        reasons=reasons,
        files=files,
        volatile_files=[layout.shard_stats_path(shard)],
    )


def make_pipeline(root: str, *, index_type: str = "IVF") -> Pipeline:
    """Ingest to neighbors, embedded by feature hashing."""
    lists = {"nlist": 6, "nprobe": 6} if index_type == "IVF" else {}
    steps = [
        Step(name="ingest", stage=DownloadShards(root=root)),
        Step(name="measure", stage=MeasureImages(root=root), reads=("ingest",)),
        Step(name="duplicates", stage=FindDuplicates(root=root), reads=("measure",)),
        Step(
            name="plan",
            stage=PlanFilter(root=root),
            reads=("measure", "duplicates"),
            settings_of="filter",
        ),
        Step(name="filter", stage=FilterPairs(root=root), reads=("measure", "duplicates", "plan")),
        Step(
            name="embed",
            stage=EmbedPairs(
                root=root,
                encoder="hashing:32",
                encoder_factory="hashing_encoder:make_encoder",
                images=True,
            ),
            reads=("ingest", "filter"),
        ),
        Step(
            name="index",
            stage=BuildIndex(root=root, index_type=index_type, **lists),  # type: ignore[arg-type]
            reads=("embed",),
        ),
        Step(
            name="graph",
            stage=BuildGraph(root=root),
            reads=("embed", "index"),
            settings_of="neighbors",
        ),
        Step(
            name="neighbors",
            stage=BuildNeighbors(root=root, method="graph", k=4, num_candidates=8),
            reads=("embed", "index", "graph"),
        ),
    ]
    return Pipeline(recipe="test", root=root, steps=steps).with_followers()


def build(root: str, *, until: str | None = None, index_type: str = "IVF") -> Pipeline:
    """Run the pipeline in this process."""
    pipeline = make_pipeline(root, index_type=index_type)
    run_pipeline(pipeline, pipeline.choose(until=until), runner="local")
    return pipeline


def files_of(root: str) -> dict[str, bytes]:
    """Every file by path, without what holds times or the process."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file()
        and path.parent.name != "times"
        and not path.name.endswith((".run.json", "_stats.json"))
        and not path.name.endswith("lock")
    }
