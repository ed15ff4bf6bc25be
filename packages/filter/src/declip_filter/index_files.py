"""The files of a stored index: where they lie, how they are opened, checked and replaced.

    index/NAME/index.faiss    inner product over unit vectors (cosine); nprobe is stored in it
    index/NAME/rows.parquet   row -> key, shard, caption_sha; rows in clip-retrieval's order
    index/NAME/info.json      what it is, of which vectors, and its measured recall; comes last
    index/NAME/build/         what is trained and the parts, while it is built

A file is opened for reading only and is never written in place: a new one takes its name by
rename, so who has the old one mapped keeps the old one. faiss is imported where it is used: a
recipe builds the stages without running them, and should not wait for it.
"""

import hashlib
import io
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from declip_filter.embeddings import Part
from declip_filter.vectors import side_kinds
from declip_shards import DeclipError, Store, layout
from declip_shards.manifest import canonical_json
from declip_shards.store import TEMPORARY_MARK, sync_folder

Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Texts = npt.NDArray[Any]
"""Strings as NumPy's variable-width type: short ones take 16 bytes each."""

FORMAT_VERSION = 2
"""Of info.json; a reader refuses a higher one. 2: other types than Flat and IVF-Flat."""
GROUP_ROWS = 131_072
"""Rows of a row group of rows.parquet: what is held at once when it is written or read."""
REMEDY = "delete the index's folder and rerun the stage that indexes."

REQUIRED = (
    "index_key",
    "index_param",
    "size in bytes",
    "nb vectors",
    "vectors dimension",
    "compression ratio",
    "recall@10",
    "recall@10 interval",
    "recall_target",
    "num_queries",
    "nlist",
    "nprobe",
    "embeddings",
    "kind",
    "encoder",
    "encoder_digest",
    "embeddings_sha256",
    "index_sha256",
    "rows_sha256",
)
"""Entries of info.json in every format."""

ROWS_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("caption_sha", pa.string()),
    ]
)


def load_faiss() -> Any:
    """FAISS, imported at its first use; its own type hints lack half of what it has."""
    import faiss

    return faiss


def index_path(name: str) -> str:
    return f"{layout.index_folder(name)}/index.faiss"


def rows_path(name: str) -> str:
    return f"{layout.index_folder(name)}/rows.parquet"


def info_path(name: str) -> str:
    return f"{layout.index_folder(name)}/info.json"


def build_path(name: str, file: str) -> str:
    """A file of an index that is being built."""
    return f"{layout.index_folder(name)}/build/{file}"


def search(index: Any, queries: Scores, k: int, nprobe: int | None = None) -> tuple[Scores, Ids]:
    """Scores and rows of the ``k`` nearest, best first; row -1 where the probed lists ran out.

    Args:
        index: a FAISS index.
        queries: float32 (queries, dim).
        k: how many; more than there are rows is allowed, the rest is -1.
        nprobe: lists searched, or of a graph index the breadth of the search (efSearch); None
            takes what is stored in the index. A Flat index has neither and ignores it.
    """
    parameters = None if nprobe is None else search_parameters(index, nprobe)
    if parameters is None:
        scores, rows = index.search(queries, k)
    else:
        scores, rows = index.search(queries, k, params=parameters)
    return scores, rows


def search_parameters(index: Any, effort: int) -> Any:
    """FAISS's parameters for ``effort`` lists (or, of a graph, nodes); None where it has none."""
    faiss = load_faiss()

    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        below = search_parameters(inner.index, effort)
        if below is None:
            return None
        wrapped = faiss.SearchParametersPreTransform()
        wrapped.index_params = below
        wrapped.referenced_objects = [below]  # SWIG holds a bare pointer only
        return wrapped
    if isinstance(inner, faiss.IndexIVF):
        lists = faiss.SearchParametersIVF()
        lists.nprobe = effort
        return lists
    if isinstance(inner, faiss.IndexHNSW):
        graph = faiss.SearchParametersHNSW()
        graph.efSearch = effort
        return graph
    return None


@dataclass(frozen=True)
class LoadedIndex:
    """An index with what names its rows, checked against its own info.json."""

    faiss_index: Any
    info: Mapping[str, Any]
    keys: Texts
    """Sample key of each row."""
    shards: Texts
    """Shard of each row."""
    captions: Ids
    """Number of each row's normalized caption: equal numbers, equal texts."""

    @property
    def num_rows(self) -> int:
        return len(self.keys)

    @property
    def nlist(self) -> int:
        """Inverted lists; 0 for a type without."""
        return int(self.info.get("nlist") or 0)

    @property
    def nprobe(self) -> int:
        """Lists that are searched; 0 for a type without."""
        return int(self.info.get("nprobe") or 0)


def vectors_digest(store: Store, name: str, side: str, parts: Sequence[Part]) -> str:
    """sha256 over the digests of the vector files, in the order of the rows."""
    paths = [
        layout.embedding_path(name, kind, part.partition)
        for part in parts
        if part.num_rows
        for kind in side_kinds(side)
    ]
    return hashlib.sha256(canonical_json([store.sha256(path) for path in paths])).hexdigest()


def write_rows(store: Store, path: str, tables: Iterable[pa.Table]) -> None:
    """Write rows.parquet of tables of key, shard and caption_sha, numbering the rows.

    How the rows are cut into tables does not change how they are stored.
    """
    with publish(store, path) as opened, opened() as f:
        _pack_rows(f, tables)


def pack_rows(table: pa.Table) -> bytes:
    """The bytes of rows.parquet as :func:`write_rows` writes them, of a table held in memory."""
    sink = io.BytesIO()
    _pack_rows(sink, [table])
    return sink.getvalue()


def _pack_rows(out: BinaryIO, tables: Iterable[pa.Table]) -> None:
    num_done = 0
    with pq.ParquetWriter(
        out, ROWS_SCHEMA, compression="zstd", write_page_checksum=True, store_schema=False
    ) as writer:
        for group in _groups(tables):
            numbers = pa.array(np.arange(num_done, num_done + len(group)), pa.int64())
            num_done += len(group)
            writer.write_table(group.combine_chunks().add_column(0, "row", numbers))


def _groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of :data:`GROUP_ROWS`; the last has what is left."""
    waiting, num_waiting = [], 0
    for table in tables:
        waiting.append(table.select(ROWS_SCHEMA.names[1:]))
        num_waiting += len(table)
        while num_waiting >= GROUP_ROWS:
            joined = pa.concat_tables(waiting)
            waiting, num_waiting = [joined.slice(GROUP_ROWS)], num_waiting - GROUP_ROWS
            yield joined.slice(0, GROUP_ROWS)
    if num_waiting:
        yield pa.concat_tables(waiting)


def read_info(store: Store, name: str) -> dict[str, Any]:
    """An index's info.json.

    Raises:
        DeclipError: it is missing, damaged, without a required entry or of a newer format.
    """
    path = info_path(name)
    if not store.exists(path):
        raise DeclipError(f"index {name!r}: {path!r} is missing; rerun the stage that indexes.")
    try:
        info: dict[str, Any] = json.loads(store.read_bytes(path))
        newest = int(info["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DeclipError(f"{path!r} is damaged ({error}); {REMEDY}") from error
    if newest > FORMAT_VERSION:
        raise DeclipError(
            f"{path!r} is of format {newest}, this version reads up to {FORMAT_VERSION}; upgrade "
            "opendeclip, or delete the index's folder and rerun the stage that indexes."
        )
    missing = [entry for entry in REQUIRED if entry not in info]
    if missing:
        raise DeclipError(f"{path!r} has no entry {missing[0]!r}, so it is damaged; {REMEDY}")
    return info


def load_index(store: Store, name: str, *, mmap: bool = True) -> LoadedIndex:
    """Open an index and verify that its files are whole and of each other.

    Args:
        store: the dataset.
        name: of the index.
        mmap: leave the vectors in the file, mapped for reading, where it lies on a local disk;
            else they are read into memory.

    Raises:
        DeclipError: a file is missing, cut, changed, of a newer format, or of another length or
            dimension than info.json says.
    """
    info = read_info(store, name)
    for path in (index_path(name), rows_path(name)):
        if not store.exists(path):
            raise DeclipError(f"index {name!r}: {path!r} is missing; rerun the stage that indexes.")
    check_index_file(store, name, info)
    if store.sha256(rows_path(name)) != info["rows_sha256"]:
        raise DeclipError(f"{rows_path(name)!r} has changed since it was written; {REMEDY}")
    index = open_faiss(store, index_path(name), mmap=mmap)
    keys, shards, captions = _read_names(store, name)
    _check_shape(name, index, info, len(keys))
    return LoadedIndex(faiss_index=index, info=info, keys=keys, shards=shards, captions=captions)


def check_sizes(store: Store, name: str, info: Mapping[str, Any]) -> None:
    """Refuse an index with a file that is missing or cut, without reading the vectors.

    Raises:
        DeclipError: names the file.
    """
    for path in (index_path(name), rows_path(name)):
        if not store.exists(path):
            raise DeclipError(f"index {name!r}: {path!r} is missing; rerun the stage that indexes.")
    _check_size(store, name, info)
    try:
        with store.open(rows_path(name)) as f:
            num_rows = pq.read_metadata(f).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise DeclipError(f"{rows_path(name)!r} is damaged ({error}); {REMEDY}") from error
    if num_rows != info["nb vectors"]:
        raise DeclipError(
            f"{rows_path(name)!r} names {num_rows} rows, its info.json says {info['nb vectors']}; "
            f"{REMEDY}"
        )


def check_index_file(store: Store, name: str, info: Mapping[str, Any]) -> None:
    """Refuse an index file that is cut or changed.

    Raises:
        DeclipError: names the file.
    """
    path = index_path(name)
    _check_size(store, name, info)
    if store.sha256(path) != info["index_sha256"]:
        raise DeclipError(f"{path!r} has changed since it was written; {REMEDY}")


def _check_size(store: Store, name: str, info: Mapping[str, Any]) -> None:
    path, written = index_path(name), info["size in bytes"]
    size = store.size(path)
    if size != written:
        what = "is cut short" if size < written else "has grown"
        raise DeclipError(f"{path!r} has {size} bytes, {written} were written: it {what}; {REMEDY}")


def _check_shape(name: str, index: Any, info: Mapping[str, Any], num_names: int) -> None:
    if index.d != info["vectors dimension"]:
        raise DeclipError(
            f"{index_path(name)!r} is of dimension {index.d}, its info.json says "
            f"{info['vectors dimension']}; {REMEDY}"
        )
    if index.ntotal != num_names:
        raise DeclipError(
            f"{index_path(name)!r} has {index.ntotal} vectors, {rows_path(name)!r} names "
            f"{num_names} rows; {REMEDY}"
        )


def open_faiss(store: Store, path: str, *, mmap: bool = True) -> Any:
    """A FAISS index file as an index; mapped for reading only where that is possible.

    Raises:
        DeclipError: FAISS cannot read it.
    """
    faiss = load_faiss()

    try:
        if not (mmap and store.is_local):
            return faiss.deserialize_index(np.frombuffer(store.read_bytes(path), np.uint8))
        return read_mapped(store.local_path(path))
    except FileNotFoundError as error:
        raise DeclipError(f"{path!r} is missing; rerun the stage that indexes.") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("Error")[2].strip(": ") or "not an index"
        raise DeclipError(f"{path!r} is no index that FAISS reads ({reason}); {REMEDY}") from error


def read_mapped(path: Path) -> Any:
    """A local FAISS file of any type with its vectors or codes left in it, mapped read-only."""
    faiss = load_faiss()

    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def _read_names(store: Store, name: str) -> tuple[Texts, Texts, Ids]:
    """Key, shard and number of the caption of every row; a part of the table at a time."""
    kind = np.dtypes.StringDType()
    keys, shards, digests = [], [], []
    for batch in iter_rows(store, rows_path(name), ["key", "shard", "caption_sha"]):
        keys.append(np.asarray(batch.column("key").to_pylist(), dtype=kind))
        shards.append(np.asarray(batch.column("shard").to_pylist(), dtype=kind))
        digests.append(_hex_pairs(batch.column("caption_sha").to_pylist(), rows_path(name)))
    empty = np.empty(0, dtype=kind)
    return (
        np.concatenate([empty, *keys]),
        np.concatenate([empty, *shards]),
        _number_equals(np.concatenate([np.empty((0, 2), np.uint64), *digests])),
    )


def _hex_pairs(shas: list[str], source: str) -> npt.NDArray[np.uint64]:
    """Digests of 32 hex digits as two numbers each: (rows, 2)."""
    try:
        data = bytes.fromhex("".join(shas))
        return np.frombuffer(data, dtype=">u8").reshape(len(shas), 2).astype(np.uint64)
    except (ValueError, TypeError) as error:
        raise DeclipError(f"{source!r} has a caption_sha that is none; {REMEDY}") from error


def _number_equals(pairs: npt.NDArray[np.uint64]) -> Ids:
    """A number for each row, the same for equal rows: (rows,)."""
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    ranked = pairs[order]
    is_new = np.ones(len(pairs), dtype=bool)
    is_new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    numbers = np.empty(len(pairs), dtype=np.int64)
    numbers[order] = np.cumsum(is_new) - 1
    return numbers


def iter_rows(store: Store, path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a table in order, some at a time, checksums verified.

    Raises:
        DeclipError: the table is missing, damaged or lacks a column.
    """
    try:
        with store.open(path) as f:
            parquet = pq.ParquetFile(f, page_checksum_verification=True)
            missing = sorted(set(columns) - set(parquet.schema_arrow.names))
            if missing:
                raise DeclipError(f"{path!r} has no column {missing[0]!r}; {REMEDY}")
            yield from parquet.iter_batches(batch_size=GROUP_ROWS, columns=columns)
    except FileNotFoundError as error:
        raise DeclipError(f"{path!r} is missing; rerun the stage that indexes.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DeclipError(f"{path!r} is damaged ({error}); {REMEDY}") from error


@contextmanager
def publish(store: Store, path: str) -> Iterator[Callable[[], BinaryIO]]:
    """As :func:`publish_path`; yields what opens the file for writing."""
    with publish_path(store, path) as local:
        yield lambda: local.open("wb")


@contextmanager
def publish_path(store: Store, path: str) -> Iterator[Path]:
    """Write a file of any size without holding it: whole under its name, or not at all.

    Yields:
        A local path to write to. On a local disk it is renamed at the end, after ``fsync``; for an
        object store it lies in a temporary folder and is put there as a whole.
    """
    full = store.path(path)
    if not store.is_local:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, "file")
            yield local
            store.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            store.fs.put_file(str(local), full)
        return
    target = Path(full)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = target.with_name(target.name + mark)
    try:
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


@contextmanager
def local_copy(store: Store, path: str) -> Iterator[Path]:
    """A file as a local one: itself, or for an object store a temporary copy."""
    if store.is_local:
        yield store.local_path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, "file")
        store.fs.get_file(store.path(path), str(local))
        yield local
