"""What Megatron-Energon (7.4) and open_clip read beside tars: a few small files, no copy.

    .nv-meta/dataset.yaml   what a sample's parts are
    .nv-meta/split.yaml     which tars are for training, and which samples are left out
    .nv-meta/.info.json     samples of each tar
    00000.tar.idx           first byte of each sample, then the end: little-endian 64-bit numbers
    sizes.json              samples of each tar, for open_clip and datacomp; or
    __len__                 samples of all tars, for open_clip: beside the dataset's own shards,
                            where img2dataset would take any other ``*.json`` for a shard's stats

``energon prepare`` writes the same, and a database by key besides, which only joins need.
"""

import json
import struct
import tarfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import BinaryIO

from declip_shards import layout, sidecars
from declip_shards.errors import DeclipError
from declip_shards.reader import TAR_BLOCK
from declip_shards.store import Store

META = ".nv-meta"
DATASET = f"{META}/dataset.yaml"
SPLIT = f"{META}/split.yaml"
INFO = f"{META}/.info.json"
SIZES = "sizes.json"
LENGTH = "__len__"
MARK = "opendeclip-export"
"""Says that a folder is an export of ours (:mod:`declip_shards.export_files`)."""
DATASET_TEXT = b"""\
sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: jpg
  caption: txt
"""


def tar_index(store: Store, path: str) -> bytes:
    """The ``.tar.idx`` of a tar: where each sample begins, and where the last one ends.

    Raises:
        DeclipError: the tar is damaged.
    """
    with store.open(path) as f:
        return read_index(f, path)


def read_index(file: BinaryIO, path: str) -> bytes:
    """As :func:`tar_index`, of an open tar; ``path`` is its name in errors."""
    places: list[int] = []
    previous, end = None, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                key = info.name.partition(".")[0]
                if key != previous:
                    places.append(info.offset)
                previous = key
                end = info.offset_data + -(-info.size // TAR_BLOCK) * TAR_BLOCK
    except tarfile.TarError as error:
        raise DeclipError(f"{path!r} is not a readable tar ({error}); rerun ingest.") from error
    return struct.pack(f"<{len(places) + 1}Q", *places, end)


def count_samples(store: Store, shards: Iterable[str]) -> dict[str, int]:
    """Name of each tar -> its samples, from the shards' tables."""
    counts = {}
    for shard in shards:
        table = sidecars.read_table(store, layout.shard_parquet_path(shard), ["status"])
        counts[f"{shard}.tar"] = table.column(0).to_pylist().count("success")
    return counts


def split_text(counts: Mapping[str, int], excluded: Iterable[str] = ()) -> bytes:
    """``split.yaml``: tars with samples are for training; ``excluded`` are ``00000.tar/KEY``."""
    left_out = [f"- {name}\n" for name in excluded]
    return "".join([*_train_lines(counts), *_excluded_lines(left_out)]).encode()


def _train_lines(counts: Mapping[str, int]) -> list[str]:
    names = [f"  - {name}\n" for name, number in counts.items() if number]
    return ["split_parts:\n", *(["  train:\n", *names] if names else ["  train: []\n"])]


def _excluded_lines(left_out: Sequence[str]) -> list[str]:
    return ["exclude:\n", *left_out] if left_out else ["exclude: []\n"]


def _refreshed_split(text: str, counts: Mapping[str, int], keys: Collection[str]) -> str:
    """A ``split.yaml`` of ours for other counts, without the entries of ``keys``.

    One that somebody has edited keeps its parts; only tars without samples go from it.
    """
    lines = text.splitlines(keepends=True)
    start = next((n for n, line in enumerate(lines) if line.startswith("exclude:")), len(lines))
    parts, left_out = lines[:start], lines[start + 1 :]
    left_out = [line for line in left_out if line.strip().rpartition("/")[2] not in keys]
    named = {line: line.strip().removeprefix("- ") for line in parts}
    is_ours = parts[:1] == ["split_parts:\n"] and all(
        line in ("  train:\n", "  train: []\n") or named[line] in counts for line in parts[1:]
    )
    if is_ours:
        parts = _train_lines(counts)
    else:
        parts = [line for line in parts if counts.get(named[line], 1)]
    head = lines[start : start + 1] if left_out else _excluded_lines(())
    return "".join([*parts, *(head if start < len(lines) else []), *left_out])


def excluded_by(store: Store, selection: str, shards: Iterable[str]) -> list[str]:
    """``00000.tar/KEY`` of the samples that a selection drops.

    Raises:
        DeclipError: the selection does not cover a shard.
    """
    found = []
    for shard in shards:
        rows = sidecars.read_rows(store, layout.selection_path(selection, shard), ["key", "keep"])
        found += [f"{shard}.tar/{row['key']}" for row in rows if not row["keep"]]
    return found


def meta_files(
    store: Store, shards: Sequence[str], *, selection: str | None = None, is_beside: bool = False
) -> dict[str, bytes]:
    """All files but the ``.tar.idx``, by path beside the tars.

    Args:
        store: the dataset.
        shards: all of it.
        selection: whose dropped samples are left out; None for none.
        is_beside: for the dataset's own folder of shards.
    """
    counts = count_samples(store, shards)
    excluded = excluded_by(store, selection, shards) if selection else ()
    sizes = json.dumps(counts, indent=2).encode() + b"\n"
    return {
        DATASET: DATASET_TEXT,
        SPLIT: split_text(counts, excluded),
        INFO: json.dumps({"shard_counts": counts}, indent=2).encode() + b"\n",
        **({LENGTH: b"%d\n" % sum(counts.values())} if is_beside else {SIZES: sizes}),
    }


def index_path(shard: str) -> str:
    """A tar's index where it lies beside the dataset's own tars."""
    return f"shards/{shard}.tar.idx"


def refreshed(
    store: Store, touched: Collection[str], keys: Collection[str]
) -> dict[str, bytes | None]:
    """New bytes of those of these files that lie beside the dataset's own tars.

    Args:
        store: the dataset, its shards already changed.
        touched: shards whose index is made again.
        keys: samples that are gone.
    """
    beside = [f"shards/{name}" for name in (SPLIT, INFO, LENGTH)]
    standing = {path: store.read_bytes(path) for path in beside if store.exists(path)}
    found: dict[str, bytes] = {}
    if standing:
        shards = layout.list_shards(store)
        made = meta_files(store, shards, is_beside=True)
        found = {f"shards/{name}": data for name, data in made.items()}
        split = f"shards/{SPLIT}"
        if split in standing:
            counts = json.loads(made[INFO])["shard_counts"]
            text = _refreshed_split(standing[split].decode(), counts, keys)
            found[split] = text.encode()
    changes: dict[str, bytes | None] = {
        path: found[path] for path, data in standing.items() if found[path] != data
    }
    for shard in touched:
        path = index_path(shard)
        if store.exists(path):
            data = tar_index(store, layout.tar_path(shard))
            if store.read_bytes(path) != data:
                changes[path] = data
    return changes


def forget(store: Store) -> bool:
    """Remove what ``declip convert --to energon`` wrote beside the dataset's own tars.

    For a step that is about to write shards anew. Where no export of ours is, nothing is touched;
    its mark goes last, so that one that was cut short is finished by the next call.

    Returns:
        Whether there was an export.
    """
    mark = f"shards/{MARK}"
    if not store.exists(mark):
        return False
    indexes = store.list("shards", ".tar.idx")
    for name in (*indexes, DATASET, SPLIT, INFO, LENGTH):
        store.remove(f"shards/{name}")
    if not store.list(f"shards/{META}"):
        store.remove_folder(f"shards/{META}")
    store.remove(mark)
    return True
