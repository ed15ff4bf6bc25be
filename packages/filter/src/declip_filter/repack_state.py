"""How far a repacked dataset has come: written before its first shard and after its last file.

``repack.json`` lies in the dataset's folder and is no output of a step: what steps list goes when
settings change, and a folder whose shards were copied must be known as one at any moment, else a
recipe would download into it.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from declip_filter.repack_plan import RepackPlan
from declip_shards import DeclipError, Store, energon, layout
from declip_shards.manifest import canonical_json

STEP = "repacked"
"""The step that stands for ingest in a repacked dataset."""
STATE_PATH = "repack.json"
SIZES_PATH = f"shards/{energon.SIZES}"
"""Samples of each tar: what open_clip and datacomp read beside tars."""
FORMAT_VERSION = 1
FINISHED, UNFINISHED = "finished", "unfinished"
REMEDY = "run declip run repack again in the folder that it is repacked from"


def mark_path() -> str:
    """The manifest of :data:`STEP`, which the repack itself leaves; a later run writes it anew."""
    return layout.manifest_path(STEP)


def repack_digest(plan: RepackPlan, settings: Mapping[str, Any]) -> str:
    """sha256 of what goes into which shard, and of the settings that say what else is written."""
    digest = hashlib.sha256(canonical_json(dict(settings)))
    for shard, keys in zip(plan.shards, plan.keys, strict=True):
        digest.update(f"{shard} {len(keys)} {keys.dtype.str}\n".encode())
        digest.update(keys.tobytes())
    return digest.hexdigest()


def read_state(target: Store) -> tuple[str, str]:
    """State and digest of a repacked dataset; two empty strings where the folder is none.

    Raises:
        DeclipError: the file is damaged.
    """
    try:
        found = json.loads(target.read_bytes(STATE_PATH))
        return str(found["state"]), str(found["repack"])
    except FileNotFoundError:
        return "", ""
    except (ValueError, KeyError, TypeError) as error:
        raise DeclipError(f"{STATE_PATH!r} of {target.url!r} is damaged; {REMEDY}.") from error


def begin(target: Store, digest: str) -> None:
    """Take back that the dataset is finished, before the first shard is written."""
    _write(target, UNFINISHED, digest)
    target.remove(mark_path())
    target.remove(SIZES_PATH)


def finish(target: Store, digest: str) -> None:
    """Say that all is there, after the last file."""
    _write(target, FINISHED, digest)


def _write(target: Store, state: str, digest: str) -> None:
    content = {"format_version": FORMAT_VERSION, "repack": digest, "state": state}
    data = canonical_json(content)
    if not (target.exists(STATE_PATH) and target.read_bytes(STATE_PATH) == data):
        target.write_bytes(STATE_PATH, data)


def is_repacked(store: Store) -> bool:
    """Whether a dataset is one that was repacked, and finished."""
    return read_state(store)[0] == FINISHED and store.exists(SIZES_PATH)


def is_unfinished(store: Store) -> bool:
    """Whether a dataset is one that is being repacked, or whose repack was cut short."""
    return bool(read_state(store)[0]) and not is_repacked(store)


def require_finished(store: Store) -> dict[str, int]:
    """Samples of each tar as they were written, of a dataset that is whole as far as names tell.

    Raises:
        DeclipError: the repack was cut short, or other shards are there than it wrote.
    """
    if not is_repacked(store):
        raise DeclipError(
            f"{store.url!r} is a repacked dataset that was not finished: it may be half of one and "
            f"half of another; {REMEDY}."
        )
    try:
        sizes: dict[str, int] = dict(json.loads(store.read_bytes(SIZES_PATH)))
    except (ValueError, TypeError) as error:
        raise DeclipError(f"{SIZES_PATH!r} of {store.url!r} is damaged; {REMEDY}.") from error
    beside = set(store.list("shards"))
    there = {
        f"{shard}.tar"
        for shard in layout.list_shards(store)
        if {f"{shard}.tar", f"{shard}.parquet"} <= beside
    }
    if there != sizes.keys():
        odd = min(there ^ sizes.keys())
        fault = "names" if odd in sizes else "does not name"
        whole = "is not whole there" if odd in sizes else "is there"
        raise DeclipError(
            f"{SIZES_PATH!r} of {store.url!r} {fault} {odd!r}, which {whole}; {REMEDY}."
        )
    return sizes
