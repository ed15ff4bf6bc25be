"""What a repacked dataset has as a whole: sizes, index, and manifests of what was carried over.

The index file is the same file (another name of it where the disk can) as long as each of its rows
is kept; only the table that names its rows and ``info.json`` are written anew. Where rows go, they
are taken out as an opt-out takes them out: centroids, ``nprobe`` and the measured recall stay those
of the build.

A manifest of the input is taken over, with the files as they are now, for each step whose work was
carried over and that was up to date; so ``declip run`` in the repacked dataset finds it done. None
lists a shard: what a step lists goes when its settings change, and shards that were copied cannot
be downloaded again from here.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_filter import optout
from declip_filter.embeddings import read_part
from declip_filter.index_files import (
    ROWS_SCHEMA,
    index_path,
    info_path,
    open_faiss,
    publish_path,
    rows_path,
)
from declip_filter.repack_manifests import manifest_files
from declip_filter.repack_plan import RepackPlan, as_keys
from declip_filter.repack_state import SIZES_PATH
from declip_filter.repack_tables import CarriedSets
from declip_filter.vectors import side_kinds
from declip_shards import DeclipError, Store, layout, sidecars
from declip_shards.manifest import canonical_json
from declip_shards.store import TEMPORARY_MARK, sync_folder


def carry_whole(store: Store, target: Store, plan: RepackPlan, sets: CarriedSets) -> list[str]:
    """Write what is of the whole dataset; the manifest of :data:`STEP` comes last.

    Args:
        store: the input.
        target: the repacked dataset, all of its shards written.
        plan: of the repack.
        sets: what is carried over.

    Returns:
        The files, by path in the target.

    Raises:
        DeclipError: a file is missing or damaged.
    """
    sizes = {f"{output}.tar": plan.num_in(output) for output in plan.outputs}
    target.write_bytes(SIZES_PATH, canonical_json(sizes))
    files = [SIZES_PATH]
    for name in sets.indexes:
        files += carry_index(store, target, plan, name)
    for base in (base for base in sets.tables if base.startswith("neighbors/")):
        # What tells a table from another one, and which of several is in use.
        for file in store.list(base, ".json"):
            target.write_bytes(f"{base}/{file}", store.read_bytes(f"{base}/{file}"))
            files.append(f"{base}/{file}")
    for path, data in manifest_files(store, target, plan.outputs).items():
        target.write_bytes(path, data)
        files.append(path)
    return files


def carry_index(store: Store, target: Store, plan: RepackPlan, name: str) -> list[str]:
    """Write an index for the kept samples; ``info.json`` comes last.

    Returns:
        The files; none where no row of the index is kept.

    Raises:
        DeclipError: a file is missing, damaged, or of another index.
    """
    info: dict[str, Any] = json.loads(store.read_bytes(info_path(name)))
    rows = sidecars.read_table(store, rows_path(name))
    places = plan.places(as_keys(rows.column("key").to_pylist()))
    kept = places >= 0
    num_left = int(kept.sum())
    if not num_left:
        return []
    if kept.all():
        place_file(store, target, index_path(name))
    else:
        data = _index_without(store, name, kept)
        target.write_bytes(index_path(name), data)
        built = info.get(optout.BUILT_AS, {k: info[k] for k in ("nb vectors", "index_sha256")})
        size = len(data)
        info |= {
            optout.BUILT_AS: built,
            "nb vectors": num_left,
            "size in bytes": size,
            "compression ratio": round(num_left * int(info["vectors dimension"]) * 4 / size, 6),
            "index_sha256": hashlib.sha256(data).hexdigest(),
        }
    rows = rows.filter(pa.array(kept)).combine_chunks()
    outputs = plan.output_of(places[kept])
    for column, values in (("row", np.arange(num_left)), ("shard", outputs)):
        field = ROWS_SCHEMA.field(column)
        rows = rows.set_column(rows.column_names.index(column), field, pa.array(values, field.type))
    packed = sidecars.pack_table(rows)
    target.write_bytes(rows_path(name), packed)
    info |= {
        "rows_sha256": hashlib.sha256(packed).hexdigest(),
        "embeddings_sha256": _vectors_digest(target, info, plan.outputs),
    }
    target.write_bytes(info_path(name), canonical_json(info))
    return [index_path(name), rows_path(name), info_path(name)]


def _index_without(store: Store, name: str, kept: npt.NDArray[np.bool_]) -> bytes:
    """An index file of the ``kept`` rows (rows,) alone.

    Raises:
        DeclipError: the file is damaged or of another length.
    """
    import faiss

    index = open_faiss(store, index_path(name), mmap=False)
    if index.ntotal != len(kept):
        raise DeclipError(
            f"index {name!r} has {index.ntotal} vectors and names {len(kept)} rows; delete its "
            "folder, rerun the stage that indexes, then repack again."
        )
    data: bytes = faiss.serialize_index(optout.remove_rows(index, kept)).tobytes()
    return data


def _vectors_digest(target: Store, info: dict[str, Any], outputs: Sequence[str]) -> str:
    """What BuildIndex writes: sha256 over the digests of the vector files, in the rows' order."""
    name = str(info["embeddings"])
    parts = [part for output in outputs if (part := read_part(target, name, output)).num_rows]
    paths = [
        layout.embedding_path(name, kind, part.partition)
        for part in parts
        for kind in side_kinds(str(info["kind"]))
    ]
    digests = [target.sha256(path) for path in paths]
    return hashlib.sha256(canonical_json(digests)).hexdigest()


def place_file(store: Store, target: Store, path: str) -> None:
    """The same file at the same path of another dataset: linked where the disk can, else copied.

    Nothing of ours writes into a file, so that two datasets may share one.
    """
    if not (store.is_local and target.is_local):
        target.fs.makedirs(target.path(path).rpartition("/")[0], exist_ok=True)
        target.fs.copy(store.path(path), target.path(path))
        return
    source, place = store.local_path(path), target.local_path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = place.with_name(place.name + mark)
    with contextlib.suppress(OSError):
        os.link(source, temporary)
        temporary.replace(place)
        # Renaming one name of a file over another of the same file does nothing.
        temporary.unlink(missing_ok=True)
        sync_folder(place.parent)
        return
    with publish_path(target, path) as local:
        shutil.copyfile(source, local)
