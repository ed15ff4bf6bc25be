"""A run's folder as a pipeline leaves it: shards, selection, manifests and log, without a model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from declip_shards import Store, layout, sidecars
from declip_shards.fakes import write_fake_dataset
from declip_shards.manifest import FileRecord, Manifest, write_manifest

LICENSES = ("MIT", "CC-BY-4.0", "<script>x</script>|evil", None)
REASONS = {"caption_too_short": 3, "image_flat": 1}


def write_run(
    root: Path, *, columns: Sequence[str] = ("license", "source"), **changes: Any
) -> Store:
    """Two shards of 24 rows, every sixth failed; every fifth of the others not selected."""
    store = write_fake_dataset(str(root), num_shards=2, fail_every=6)
    for shard in layout.list_shards(store):
        path = layout.shard_parquet_path(shard)
        rows = sidecars.read_rows(store, path)
        for index, row in enumerate(rows):
            extra = {"license": LICENSES[index % 4], "source": f"site {index % 3}"}
            row |= {name: extra[name] for name in columns}
        sidecars.write_table(store, path, pa.Table.from_pylist(rows))
        kept = [
            {"key": row["key"], "keep": i % 5 != 0, "reason": "" if i % 5 else "image_flat"}
            for i, row in enumerate(row for row in rows if row["status"] == "success")
        ]
        sidecars.write_table(
            store, layout.selection_path("default", shard), pa.Table.from_pylist(kept)
        )
    settings = {
        "method": "declip", "model": "ViT-T", "selection": "default", "splits": [], "seed": 7,
        "root": "/home/somebody/secret", "peak_lr": 0.001,
    }  # fmt: skip
    _write(store, "train/config.json", settings | changes)
    export = {"files": {"w.bin": "a" * 64}, "samples": "b" * 64, "world_size": 2, "backend": "gloo"}
    _write(store, "train/export.json", export)
    (root / "train/export").mkdir(exist_ok=True)
    log = [
        {"step": 5 * n, "samples_seen": 100 * n, "samples_per_second": 50.0, "total": 4.0 - n}
        for n in (1, 2, 3)
    ]
    store.write_bytes(
        "train/log.jsonl", "".join(json.dumps(record) + "\n" for record in log).encode()
    )
    write_step(
        store, "ingest", 48, 40, {"http_404": 8}, tars=["shards/00000.tar", "shards/00001.tar"]
    )
    write_step(store, "filter", 40, 36, REASONS)
    write_step(store, "train", 36, 36, {})
    return store


def _write(store: Store, path: str, content: dict[str, Any]) -> None:
    store.write_bytes(path, json.dumps(content).encode())


def write_step(
    store: Store,
    step: str,
    num_in: int,
    num_out: int,
    reasons: dict[str, int],
    tars: Sequence[str] = (),
) -> None:
    """The manifest of a finished step."""
    files = [FileRecord(path=tar, size=1000, sha256="c" * 64) for tar in tars]
    write_manifest(
        store,
        Manifest(
            step=step, stage=step, fingerprint=f"{step}-" + "f" * 20, code_version="declip 0",
            settings={"fence": "```"}, inputs={}, num_tasks=1, num_in=num_in, num_out=num_out,
            reasons=reasons, files=files, volatile_files=[], extra={},
        ),
    )  # fmt: skip
