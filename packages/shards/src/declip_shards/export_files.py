"""A dataset in the other forms that users have: img2dataset's ``files`` and ``parquet``, Energon.

    files      00000/000000017.jpg .txt .json, 00000.parquet, 00000_stats.json
    parquet    00000.parquet with the pictures in a column jpg, 00000_stats.json
    energon    the tars (linked where the disk can), .nv-meta/, 00000.tar.idx, sizes.json or __len__

``opendeclip-export`` beside them says of which bytes each shard was made, so that a second export
writes only what has changed, and takes away what is no longer in the dataset.
"""

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from declip_shards import energon, layout, manifest, sidecars
from declip_shards.errors import DeclipError
from declip_shards.manifest import canonical_json
from declip_shards.optout import PENDING
from declip_shards.reader import IMAGE_EXTENSIONS
from declip_shards.store import Store

Form = Literal["files", "parquet", "energon"]
FORMS: tuple[Form, ...] = ("files", "parquet", "energon")
MARK = energon.MARK
"""Says that a folder is an export of ours, of which form, and of which bytes. JSON, but without
the ending: img2dataset takes every ``*.json`` of a folder for the stats of a shard."""
FORMAT_VERSION = 1
"""Of the mark; a reader refuses a higher one."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export did."""

    num_shards: int
    num_written: int
    """Shards that were not there yet as they are now."""
    num_removed: int
    """Shards taken away because the dataset has them no longer."""
    num_samples: int


def export(store: Store, target: Store, form: Form, *, selection: str | None = None) -> Exported:
    """Write a dataset to ``target`` in another form.

    Args:
        store: the dataset.
        target: an empty or new folder, or an earlier export of the same form; for ``energon``
            also the dataset's own folder of shards, beside whose tars the files are then put.
        form: one of :data:`FORMS`.
        selection: for ``energon``: leave out the samples that this selection drops.

    Raises:
        DeclipError: the target holds other files, or the dataset is damaged; where a file is not
            the one of its receipt, nothing has been written.
    """
    shards = layout.list_shards(store)
    if not shards:
        raise DeclipError(
            f"there is no complete shard under {store.path('shards')!r}; give the folder of a "
            "dataset."
        )
    digests = _check_whole(store, shards, selection)
    is_beside = form == "energon" and _is_same(target, store, "shards")
    done = _read_mark(target, form, is_beside=is_beside)
    if not target.exists(MARK):
        _write_mark(target, form, done)  # so that what a killed export leaves is known as ours
    write: Callable[[Store, Store, str], None] = {
        "files": _write_files,
        "parquet": _write_parquet,
        "energon": _write_index if is_beside else _link_tar,
    }[form]
    num_written = 0
    gone = sorted(set(done) - set(shards))
    for shard in gone:
        _remove_shard(target, shard, is_beside=is_beside)
        del done[shard]
    for shard in shards:
        digest = digests[shard]
        if done.get(shard) != digest:
            # The mark goes first: what is being replaced is not what it says.
            if done.pop(shard, None) is not None:
                _write_mark(target, form, done)
            write(store, target, shard)
            num_written += 1
            done[shard] = digest
            _write_mark(target, form, done)
    if gone:
        _write_mark(target, form, done)
    if form == "energon":
        files = energon.meta_files(store, shards, selection=selection, is_beside=is_beside)
        for path, data in files.items():
            if not target.exists(path) or target.read_bytes(path) != data:
                target.write_bytes(path, data)
    return Exported(
        num_shards=len(shards),
        num_written=num_written,
        num_removed=len(gone),
        num_samples=sum(energon.count_samples(store, shards).values()),
    )


def _is_same(target: Store, store: Store, folder: str) -> bool:
    if target.is_local and store.is_local:
        return Path(target.root).resolve() == Path(store.path(folder)).resolve()
    return bool(target.root.rstrip("/") == store.path(folder).rstrip("/"))


def _read_mark(target: Store, form: Form, *, is_beside: bool) -> dict[str, str]:
    """Shard -> digest of what it was made of; refuses a folder that holds something else."""
    if target.exists(MARK):
        try:
            value = json.loads(target.read_bytes(MARK))
            version, other, shards = value["format_version"], value["form"], dict(value["shards"])
        except (ValueError, KeyError, TypeError) as error:
            raise DeclipError(
                f"{MARK} in {target.url!r} is damaged ({error}); delete the folder and try again."
            ) from error
        if version > FORMAT_VERSION:
            raise DeclipError(f"{target.url!r} was written by a newer version; upgrade opendeclip.")
        if other != form:
            raise DeclipError(
                f"{target.url!r} holds an export of form {other!r}, not {form!r}; choose another "
                "--target."
            )
        return shards
    if not is_beside and (target.list(".") or target.list_folders(".")):
        raise DeclipError(
            f"{target.url!r} is not empty and holds no export of ours; choose a new --target."
        )
    return {}


def _write_mark(target: Store, form: Form, shards: dict[str, str]) -> None:
    value = {"format_version": FORMAT_VERSION, "form": form, "shards": shards}
    target.write_bytes(MARK, canonical_json(value))


def _check_whole(store: Store, shards: Sequence[str], selection: str | None) -> dict[str, str]:
    """Shard -> sha256 over its tar and table; refuses what is not as the receipts say.

    A dataset that has none, another tool's for instance, is taken as it is.
    """
    if store.exists(PENDING):
        raise DeclipError(
            f"an opt-out of {store.url!r} was cut short, so samples that must go are still there; "
            "run declip optout again first."
        )
    recorded = {
        record.path: record.sha256
        for step in store.list_folders("manifests")
        for receipt in manifest.read_receipts(store, step).values()
        for record in receipt.files
    }
    found = {}
    for shard in shards:
        paths = [layout.tar_path(shard), layout.shard_parquet_path(shard)]
        own = [store.sha256(path) for path in paths]
        found[shard] = hashlib.sha256("".join(own).encode()).hexdigest()
        chosen = layout.selection_path(selection, shard) if selection else ""
        if chosen in recorded and store.exists(chosen):
            paths.append(chosen)
            own.append(store.sha256(chosen))
        for path, digest in zip(paths, own, strict=True):
            if recorded.get(path, digest) != digest:
                raise DeclipError(
                    f"{path!r} in {store.url!r} is damaged or was changed since it was written; "
                    "nothing was exported: delete it, make it again with declip run, then "
                    "convert again."
                )
    return found


def _remove_shard(target: Store, shard: str, *, is_beside: bool) -> None:
    names = [f"{shard}.tar.idx"]
    if not is_beside:
        names += [f"{shard}_stats.json", f"{shard}.parquet", f"{shard}.tar"]
        target.remove_folder(shard)
    for name in names:
        target.remove(name)


def _members(store: Store, shard: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of a tar's members, as they lie in it."""
    path = layout.tar_path(shard)
    try:
        with store.open(path) as f, tarfile.open(fileobj=f, mode="r:") as tar:
            for info in tar:
                stream = tar.extractfile(info) if info.isreg() else None
                if stream is not None:
                    yield info.name, stream.read()
    except tarfile.TarError as error:
        raise DeclipError(f"{path!r} is not a readable tar ({error}); rerun ingest.") from error


def _copy(store: Store, path: str, target: Store) -> None:
    target.write_bytes(path.rpartition("/")[2], store.read_bytes(path))


def _write_small(target: Store, path: str, data: bytes) -> None:
    """One of very many files that count only once their shard's stats stand: on a local disk not
    flushed one by one, which would take milliseconds each."""
    if not target.is_local:
        target.write_bytes(path, data)
        return
    place = target.local_path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)


def _write_files(store: Store, target: Store, shard: str) -> None:
    """A folder of a shard's members; the stats file, img2dataset's mark of done, comes last."""
    target.remove(f"{shard}_stats.json")
    names = set()
    for name, data in _members(store, shard):
        _write_small(target, f"{shard}/{name}", data)
        names.add(name)
    for name in target.list(shard):
        if name not in names:
            target.remove(f"{shard}/{name}")
    if target.is_local:
        os.sync()
    _copy(store, layout.shard_parquet_path(shard), target)
    _copy(store, layout.shard_stats_path(shard), target)


def _write_parquet(store: Store, target: Store, shard: str) -> None:
    """Every attempted row, with the picture's bytes in the last column; null for the failed."""
    pictures = {}
    for name, data in _members(store, shard):
        key, _, extension = name.partition(".")
        if extension in IMAGE_EXTENSIONS:
            pictures[key] = data
    table = sidecars.read_table(store, layout.shard_parquet_path(shard))
    column: list[Any] = [pictures.get(key) for key in table.column("key").to_pylist()]
    table = table.append_column("jpg", pa.array(column, pa.binary()))
    target.remove(f"{shard}_stats.json")
    target.write_bytes(f"{shard}.parquet", sidecars.pack_table(table))
    _copy(store, layout.shard_stats_path(shard), target)


def _write_index(store: Store, target: Store, shard: str) -> None:
    target.write_bytes(f"{shard}.tar.idx", energon.tar_index(store, layout.tar_path(shard)))


def _link_tar(store: Store, target: Store, shard: str) -> None:
    """A tar as it is: another name of the same bytes where both lie on one disk, else a copy."""
    path, name = layout.tar_path(shard), f"{shard}.tar"
    target.remove(name)
    if not (store.is_local and target.is_local and _linked(store, path, target, name)):
        _copy(store, path, target)
    _write_index(store, target, shard)


def _linked(store: Store, path: str, target: Store, name: str) -> bool:
    with contextlib.suppress(OSError):
        place = target.local_path(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(store.local_path(path), place)
        return True
    return False
