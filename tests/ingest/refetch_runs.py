"""A small ingest against a server half of which can be down, and runs of a refetch on it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from declip_ingest.refetch import RefetchShards
from declip_ingest.refetch_run import RefetchReport, refetch
from declip_ingest.stages import DownloadShards, stored_ingest
from declip_shards import Store, manifest
from pipelines.pipeline import Step
from pipelines.task_end import TaskEnd

if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import MisbehavingServer, encode, response
else:
    # conftest.py puts this folder on the path.
    from misbehaving_server import MisbehavingServer, encode, response

NUM_ROWS, SHARD_SIZE = 22, 8
DOWN = [i for i in range(NUM_ROWS) if i % 3 == 1 and i < 16]
"""Rows whose server is down at first: in the first two shards, not in the last."""
GONE = [5, 14, 20]
"""Rows that are dead links whatever happens."""
Pictures = dict[int, bytes]


def pictures() -> Pictures:
    kinds = ("JPEG", "PNG", "WEBP")
    return {i: encode(kinds[i % 3], (30 + i, 40), seed=i) for i in range(NUM_ROWS)}


def serve(server: MisbehavingServer, *, is_up: bool) -> None:
    """Answer as the web does on a good day, or with some hosts down."""
    bad: list[Any] = [response(status="503 Service Unavailable"), response(status="500 Oops")]
    for i, picture in pictures().items():
        answer: Any = response(picture)
        if i in GONE:
            answer = response(status="404 Not Found")
        elif i in DOWN and not is_up:
            answer = bad[i % 2]
        server.add(f"/{i}", answer)


def make_stage(root: Path, server: MisbehavingServer, **settings: Any) -> DownloadShards:
    (root / "source").mkdir(parents=True, exist_ok=True)
    rows = [
        {"url": server.url(f"/{i}"), "caption": f"picture {i}, “üñí”", "label": f"l{i}", "x": i / 7}
        for i in range(NUM_ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "source" / "pairs.parquet")
    given: dict[str, Any] = {
        "shard_size": SHARD_SIZE,
        "image_size": 24,
        "retries": 0,
        "thread_count": 8,
    }
    given |= {"allow_addresses": (server.address,), "robots": "ignore", **settings}
    return DownloadShards(root=str(root), **given)


def run_tasks(root: str, step: str, stage: Any, tasks: Any, digest: str) -> Iterator[TaskEnd]:
    """As the pipelines' local runner; the connections and decoders are closed at the end."""
    work = stage.worker()
    try:
        for task in tasks:
            receipt = manifest.make_receipt(Store(root), task, digest, work(task))
            yield TaskEnd(task=task, receipt=receipt)
    finally:
        work.close()


def ingest(stage: DownloadShards) -> manifest.Manifest:
    """What the pipeline's runner does with the step."""
    store = Store(stage.root)
    version = Step(name="ingest", stage=stage).code_version
    digest = manifest.fingerprint(stage, version, {})
    receipts = []
    for end in run_tasks(stage.root, "ingest", stage, stage.tasks(), digest):
        assert end.receipt is not None
        manifest.write_receipt(store, "ingest", end.receipt)
        receipts.append(end.receipt)
    done = manifest.build_manifest(
        step="ingest", stage=stage, code_version=version, inputs={}, receipts=receipts
    )
    manifest.write_manifest(store, done)
    return done


def mend(root: Path, *reasons: str, run: Any = run_tasks, **settings: Any) -> RefetchReport:
    stage = RefetchShards(root=str(root), ingest=stored_ingest(str(root)), reasons=reasons)
    return refetch(stage, run, **settings)


def all_files(root: Path) -> dict[str, str]:
    """Digest of every file."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def hashed_files(root: Path) -> dict[str, str]:
    """Digest of every file that must be the same on every run; of the others, that they stand."""
    return {
        path: "" if path.endswith("_stats.json") or path.startswith("ledger/") else digest
        for path, digest in all_files(root).items()
    }
