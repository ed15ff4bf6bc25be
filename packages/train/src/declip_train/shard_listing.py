"""The pool of a dataset's own shards: captions from their tables, places from their tars."""

from __future__ import annotations

import hashlib
import json
import posixpath
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import sched_getaffinity
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from declip_shards import DeclipError, Store, layout, sidecars
from declip_shards.reader import IMAGE_EXTENSIONS
from declip_train.column_files import cached_columns, digest_of
from declip_train.network_tries import is_final
from declip_train.sample_columns import PIECE, SamplePool, pool_columns
from declip_train.tar_cache import TarSource, find_tar, is_remote, open_fetched
from declip_train.tar_listing import walk_tar

__all__ = ["file_identities", "in_threads", "own_pool", "tar_location"]

_KIND = "samples"
_SECONDS_BETWEEN_LINES = 10.0
_MOST_THREADS = 16
_LARGEST_PICTURE = 1 << 31
_SIZES = ("height", "width")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_threads(
    what: str,
    items: Sequence[_Item],
    work: Callable[[_Item], _Result],
    *,
    num_threads: int | None = None,
) -> Iterator[_Result]:
    """``work`` of each item in order, in threads (hashing and reading let others run), with a line
    every ten seconds of how far it is."""
    threads = ThreadPoolExecutor(
        num_threads or max(1, min(_MOST_THREADS, len(sched_getaffinity(0))))
    )
    said = time.monotonic()
    try:
        for number, result in enumerate(threads.map(work, items)):
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"{what}: {number} of {len(items)}", file=sys.stderr, flush=True)
            yield result
    finally:
        threads.shutdown(cancel_futures=True)


def _of_network(store: Store) -> int | None:
    """Threads that look at files of a dataset: who waits for a network needs no core."""
    return None if store.is_local else _MOST_THREADS


def file_identities(store: Store, paths: Sequence[str]) -> list[list[Any] | None]:
    """What changes when files of one folder are written anew; None for one that is missing.

    Raises:
        DeclipError: the dataset is remote and cannot be reached.
    """
    if paths and not store.is_local:
        # File systems that keep listings answer for each file out of this one.
        store.list(posixpath.dirname(paths[0]))

    def look(path: str) -> list[Any] | None:
        try:
            source = find_tar(tar_location(store, path))
        except DeclipError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError) and is_final(cause):
                return None
            if store.is_local:
                return None
            raise
        return [source.size, source.version]

    return list(in_threads("looking for files", paths, look, num_threads=_of_network(store)))


def tar_location(store: Store, path: str) -> str:
    """A file of the dataset as a local path, or a URL."""
    if store.is_local:
        return store.path(path)
    return posixpath.join(store.url, path)


def _recorded_digests(store: Store, shards: Sequence[str]) -> dict[str, str]:
    """sha256 of tars by shard, as ingest's records have them: a task's own receipt, which is
    replaced with the tar, before the manifest of the whole step."""
    of_paths: dict[str, str] = {}
    records = [layout.manifest_path("ingest")]
    there = set(store.list(posixpath.dirname(layout.receipt_path("ingest", "x")), ".json"))
    records += [
        layout.receipt_path("ingest", shard) for shard in shards if f"{shard}.json" in there
    ]
    for record in records:
        try:
            files = json.loads(store.read_bytes(record))["files"]
            of_paths.update((str(f["path"]), str(f["sha256"])) for f in files)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue
    return {shard: of_paths.get(layout.tar_path(shard), "") for shard in shards}


def own_pool(
    store: Store, shards: Sequence[str], base: Path, room: float
) -> tuple[str, SamplePool, list[TarSource]]:
    """All successes of the shards, sorted by key.

    Args:
        store: the dataset.
        shards: its finished shards.
        base: the cache.
        room: bytes that remote tars may take there.

    Returns:
        The pool's name in the cache, the pool, and where its tars are.

    Raises:
        DeclipError: a tar or table is missing, damaged, or not the one of ingest's records; or a
            tar lacks pictures that its table lists.
    """
    digests = _recorded_digests(store, shards)
    sources = list(
        in_threads(
            "looking for tars",
            shards,
            lambda shard: find_tar(tar_location(store, layout.tar_path(shard)), digests[shard]),
            num_threads=_of_network(store),
        )
    )
    tables = file_identities(store, [layout.shard_parquet_path(shard) for shard in shards])
    key = digest_of("pool", list(shards), [source.identity() for source in sources], tables)

    def build() -> tuple[dict[str, Any], dict[str, Any]]:
        pieces = in_threads(
            "listing the samples of shards",
            list(zip(shards, sources, strict=True)),
            lambda pair: _own_piece(store, *pair, base, room),
        )
        columns, meta = pool_columns(pieces, by_key=True)
        return columns, {**meta, "shards": list(shards)}

    columns = cached_columns(base, _KIND, key, build, what="the list of samples")
    return key, SamplePool.of(columns), sources


def _own_piece(store: Store, shard: str, source: TarSource, base: Path, room: float) -> pa.Table:
    """The successes of one shard."""
    if is_remote(source.url):
        with open_fetched(source, base, room) as file:
            return _piece_of(store, shard, source, f"/dev/fd/{file.fileno()}")
    if source.sha256:
        _check_digest(source)
    return _piece_of(store, shard, source, source.url)


def _piece_of(store: Store, shard: str, source: TarSource, path: str) -> pa.Table:
    """The successes of one shard, whose tar lies at ``path`` of this machine."""
    keys, offsets, sizes = [], [], []
    for member in walk_tar(path, lambda _: False, source.url):
        key, _, extension = member.name.partition(".")
        if extension in IMAGE_EXTENSIONS and member.size < _LARGEST_PICTURE:
            keys.append(key)
            offsets.append(member.offset)
            sizes.append(member.size)
    table = _successes(store, shard)
    names = pa.array(keys, pa.large_string())
    places = pc.index_in(table.column("key").combine_chunks(), value_set=names)
    if places.null_count:
        raise DeclipError(
            f"shard {shard} lists {table.num_rows} wanted samples but its tar holds "
            f"{table.num_rows - places.null_count} of them; rerun ingest for this shard."
        )
    rows = np.asarray(places, np.int64)
    return pa.table(
        {
            "key": table.column("key"),
            "caption": table.column("caption"),
            "offset": np.array(offsets, np.int64)[rows],
            "size": np.array(sizes, np.int64)[rows].astype(np.int32),
            **{name: table.column(name) for name in _SIZES},
        },
        schema=PIECE,
    )


def _successes(store: Store, shard: str) -> pa.Table:
    """Key, caption, height and width of a shard's successes; a missing caption is an empty one, as
    it is for the embed step."""
    path = layout.shard_parquet_path(shard)
    table = sidecars.read_table(store, path)
    missing = [name for name in ("key", "caption", "status") if name not in table.column_names]
    if missing:
        raise DeclipError(
            f"{path!r} has no column {missing[0]!r}; it has: {', '.join(table.column_names)}."
        )
    table = table.filter(pc.equal(table.column("status"), "success"))
    zeros = pa.chunked_array([np.zeros(table.num_rows, np.int32)])
    found = {
        "key": table.column("key").cast(pa.large_string()),
        "caption": pc.fill_null(table.column("caption").cast(pa.large_string()), ""),
    }
    for name in _SIZES:
        known = name in table.column_names
        column = table.column(name) if known else zeros
        found[name] = pc.fill_null(column.cast(pa.int32()), 0)
    return pa.table(found)


def _check_digest(source: TarSource) -> None:
    """Refuse a tar that is not the one of ingest's records."""
    with open(source.url, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise DeclipError(
            f"the tar {source.url!r} is not the file of ingest's manifest: its sha256 is {found}, "
            f"not {source.sha256}; rerun ingest for this shard."
        )
