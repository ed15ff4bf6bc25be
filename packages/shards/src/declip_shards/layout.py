"""Where things lie in a dataset folder (design.md section 3). Pure names, no input or output."""

import json

from declip_shards.store import Store

SHARD_DIGITS = 5
"""Digits of a shard's number, as img2dataset writes them."""


def shard_name(shard_id: int) -> str:
    """``7 -> "00007"``."""
    return f"{shard_id:0{SHARD_DIGITS}d}"


def sample_key(shard_id: int, index: int, shard_size: int) -> str:
    """img2dataset's key: shard number, then the row's index in as many digits as the size needs.

    ``shard_size`` is the most rows a shard may have, not the rows of this one.
    """
    if not 0 <= index < shard_size:
        raise ValueError(f"index {index} is outside a shard of {shard_size}")
    digits = len(str(shard_size - 1)) if shard_size > 1 else 1
    return f"{shard_id:0{SHARD_DIGITS}d}{index:0{digits}d}"


def tar_path(shard: str) -> str:
    return f"shards/{shard}.tar"


def shard_parquet_path(shard: str) -> str:
    return f"shards/{shard}.parquet"


def shard_stats_path(shard: str) -> str:
    return f"shards/{shard}_stats.json"


def ledger_path(shard: str) -> str:
    """What was attempted for every row, with times: never hashed."""
    return f"ledger/ingest/{shard}.parquet"


def quarantine_path(key: str) -> str:
    """Bytes that killed a decoder, kept for whoever wants to know why."""
    return f"quarantine/{key}.bin"


def signals_path(name: str, shard: str) -> str:
    return f"signals/{name}/{shard}.parquet"


def selection_path(name: str, shard: str) -> str:
    return f"selection/{name}/{shard}.parquet"


def neighbors_path(name: str, shard: str) -> str:
    return f"neighbors/{name}/{shard}.parquet"


def index_folder(name: str) -> str:
    return f"index/{name}"


def embedding_path(name: str, kind: str, part: str) -> str:
    """clip-retrieval's layout. ``kind`` is ``img_emb``, ``text_emb`` or ``metadata``."""
    suffix = {"img_emb": "npy", "text_emb": "npy", "metadata": "parquet"}[kind]
    return f"embeddings/{name}/{kind}/{kind}_{part}.{suffix}"


def manifest_path(step: str) -> str:
    return f"manifests/{step}.json"


def receipt_path(step: str, task: str) -> str:
    return f"manifests/{step}/{task}.json"


def list_shards(store: Store) -> list[str]:
    """Shards that are complete: their stats file, which comes last, is there.

    Where ingest has finished, its manifest decides: a shard that a killed run of other settings
    left behind is none of the dataset's.
    """
    tail = "_stats.json"
    found = [name[: -len(tail)] for name in store.list("shards", tail)]
    try:
        content = json.loads(store.read_bytes(manifest_path("ingest")))
        listed = {record["path"] for record in content["files"]}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return found
    return [shard for shard in found if tar_path(shard) in listed]
