"""What a run's folder says about a model: data, filter, settings, compute. Nothing is guessed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from declip_filter.selection import selected_keys
from declip_shards import DeclipError, Store, layout, manifest, sidecars
from declip_shards.manifest import Manifest
from pipelines.progress import Progress
from pipelines.runner import read_run_record

STEPS = ("prepare", "ingest", "measure", "filter", "embed", "index", "neighbors", "train")
"""Steps of a pipeline that a model comes from, in order."""
MOST_VALUES = 50
"""Different licenses or sources counted each by itself; the rest are counted together."""


@dataclass(frozen=True, kw_only=True)
class PairCounts:
    """Pairs by what a column says, downloaded and trained on."""

    column: str
    downloaded: Mapping[str, int]
    """Value -> pairs; the value is empty where the table says nothing."""
    trained: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What training took, by its log."""

    steps: int | None = None
    samples_seen: int | None = None
    seconds: float | None = None
    """Of steps alone: samples over speed, summed over the log."""
    samples_per_second: float | None = None
    """Median of the log's records."""
    last_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything that the card says about the run; None and empty mean unknown."""

    manifests: Mapping[str, Manifest]
    """Step -> its manifest; steps without one are left out."""
    manifest_hashes: Mapping[str, str]
    """Step -> sha256 of its manifest's file."""
    settings: Mapping[str, Any]
    """Of training, by `train/config.json`; empty where it is not there."""
    export: Mapping[str, Any]
    """`train/export.json`: hashes of files, sample set and settings, versions."""
    model_config: Mapping[str, Any]
    """`open_clip_config.json` of the export."""
    seconds: Mapping[str, float]
    """Step -> seconds of its last run."""
    num_shards: int
    num_bytes: int
    """Of the shards' tars, by the manifest of ingest."""
    counts: Sequence[PairCounts]
    compute: Compute


def gather_card_facts(store: Store) -> CardFacts:
    """Read what a run's folder says.

    Raises:
        DeclipError: there is no trained model in it, or one of its files is damaged.
    """
    settings = _json(store, "train/config.json")
    export = _json(store, "train/export.json")
    if not settings and not export:
        raise DeclipError(
            f"{store.url!r} holds no trained model (train/config.json); give the folder of a run."
        )
    manifests = {step: done for step in STEPS if (done := manifest.read_manifest(store, step))}
    ingest = manifests.get("ingest")
    tars = [record for record in ingest.files if record.path.endswith(".tar")] if ingest else []
    shards = [] if settings.get("train_data") else layout.list_shards(store)
    return CardFacts(
        manifests=manifests,
        manifest_hashes={step: store.sha256(f"manifests/{step}.json") for step in manifests},
        settings=settings,
        export=export,
        model_config=_json(store, "train/export/open_clip_config.json"),
        seconds={
            step: float(seconds)
            for step in manifests
            if isinstance(seconds := read_run_record(store, step).get("seconds"), int | float)
        },
        num_shards=len(tars) or len(shards),
        num_bytes=sum(record.size for record in tars),
        counts=count_pairs(store, shards, settings),
        compute=read_compute(store),
    )


def _json(store: Store, path: str) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        DeclipError: it is there and is no JSON object.
    """
    if not store.exists(path):
        return {}
    try:
        content = json.loads(store.read_bytes(path))
    except ValueError as error:
        raise DeclipError(f"{store.path(path)!r} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise DeclipError(f"{store.path(path)!r} holds no JSON object.")
    return content


def count_pairs(
    store: Store, shards: Sequence[str], settings: Mapping[str, Any]
) -> list[PairCounts]:
    """Count pairs by license and by source, of the columns that the tables have.

    Args:
        store: the dataset.
        shards: to count; none for a run on other people's tars.
        settings: of training: its selection and splits say which pairs were trained on.
    """
    if not shards:
        return []
    there = set(sidecars.read_table(store, layout.shard_parquet_path(shards[0])).column_names)
    columns = [name for name in ("license", "source") if name in there]
    splits = [name for name in settings.get("splits") or [] if "split" in there]
    wanted = ["key", "status", *columns, *(["split"] if splits else [])]
    downloaded = {name: Counter[str]() for name in columns}
    trained = {name: Counter[str]() for name in columns}
    if not columns:
        return []
    with Progress("card: count pairs", len(shards)) as bar:
        for shard in shards:
            rows = sidecars.read_rows(store, layout.shard_parquet_path(shard), wanted)
            selection = str(settings.get("selection") or "")
            chosen = set(selected_keys(store, selection, shard))
            for row in rows:
                if row["status"] != "success":
                    continue
                is_trained = row["key"] in chosen and (not splits or row["split"] in splits)
                for name in columns:
                    value = str(row[name] or "")
                    downloaded[name][value] += 1
                    trained[name][value] += is_trained
            bar.advance(len(rows))
    return [
        PairCounts(column=name, downloaded=downloaded[name], trained=trained[name])
        for name in columns
    ]


def read_compute(store: Store) -> Compute:
    """What `train/log.jsonl` says."""
    # Here, for it loads tensorboard.
    from declip_train.monitor import read_log

    log = [record for record in read_log(store.local_path("train")) if "samples_seen" in record]
    if not log:
        return Compute()
    seconds, seen, speeds = 0.0, 0.0, []
    for record in log:
        speed = float(record.get("samples_per_second") or 0.0)
        # After a restart the log may tell of steps once more; they took their time twice.
        new = float(record["samples_seen"]) - seen
        if speed > 0:
            speeds.append(speed)
            seconds += max(new, 0.0) / speed
        seen = float(record["samples_seen"])
    total = log[-1].get("total")
    return Compute(
        steps=int(log[-1]["step"]),
        samples_seen=int(seen),
        seconds=seconds or None,
        samples_per_second=sorted(speeds)[len(speeds) // 2] if speeds else None,
        last_loss=None if total is None else float(total),
    )
