"""Look through every file of a dataset for what was taken out of it."""

import base64
import contextlib
import gzip
import hashlib
import html
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from declip_shards import Store
from declip_shards.needles import NeedleSearch
from declip_shards.optout import LIST
from declip_shards.store import TEMPORARY_MARK

MIN_CAPTION_BYTES = 21
"""Shorter captions ("a red car") are found everywhere and say nothing about one sample."""
SLICE = 48
"""Bytes out of the middle of a picture by which a copy of it is known: a multiple of three, so
that base64 keeps them together."""
MIN_DISTINCT = 24
"""A slice of fewer different bytes (a flat area) is not a picture's own."""
WINDOW = 1 << 26
"""Bytes of a file searched at once."""
OVERLAP = 1 << 17
"""Bytes that two windows share: more than the longest URL or caption that ingest takes."""
SKIPPED = ("staging/", "optout/pending.json")
"""Of the change that is under way."""
ROW_PLACES = ("shards/", "ledger/")
"""Tables that keep a removed row's key, and nothing else of it, so that keys never move."""


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What identifies a sample that was taken out."""

    key: str
    shard: str
    was_stored: bool
    """Whether it had a picture in the tar; else it is a row that had failed."""
    url: str | None = None
    caption: str | None = None
    digests: tuple[str, ...] = ()
    """Hex digests of the file that came and of the picture as it was stored."""
    picture: str = ""
    """Hex of bytes out of the stored picture's middle."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A place that still names a removed sample."""

    path: str
    where: str
    """``column NAME``, ``member``, ``file name`` or ``bytes``."""
    what: str
    """``key``, ``url``, ``caption``, ``digest`` or ``picture``."""
    count: int
    why: str


@dataclass(kw_only=True)
class Proof:
    """The result of a search."""

    num_files: int = 0
    num_bytes: int = 0
    hits: list[Hit] = field(default_factory=list)
    num_kept_keys: int = 0
    """Keys in the rows that stay on purpose, emptied (see ROW_PLACES)."""


def picture_slice(data: bytes) -> str:
    """Hex of a picture's own bytes for :class:`Removed`; empty where it has none to tell it by."""
    # A JPEG's tables come before its scan and are the same in many files.
    first = data.find(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
    start = (first + (len(data) - first) // 2) // 3 * 3
    found = data[start : start + SLICE]
    return found.hex() if len(found) == SLICE and len(set(found)) >= MIN_DISTINCT else ""


def make_search(removed: Collection[Removed], shared: Collection[str] = ()) -> NeedleSearch:
    """Everything that would name these samples, in the spellings that files use.

    Args:
        removed: the samples.
        shared: texts and digests that remaining samples have too; they prove nothing.
    """
    needles: dict[bytes, str] = {}
    for sample in removed:
        needles[sample.key.encode()] = "key"
        for what, text in (("url", sample.url), ("caption", sample.caption)):
            if text is not None and text not in shared and is_telling(what, text):
                needles |= dict.fromkeys(_spellings(text), what)
        needles |= {d.encode(): "digest" for d in sample.digests if d not in shared}
        if sample.picture and not any(digest in shared for digest in sample.digests):
            data = bytes.fromhex(sample.picture)
            needles |= {data: "picture", base64.b64encode(data): "picture"}
    return NeedleSearch(needles, whole=[n for n, what in needles.items() if what == "key"])


def is_telling(what: str, text: str) -> bool:
    """Whether a text tells of one sample."""
    return len(text.encode("utf-8", "surrogatepass")) >= (MIN_CAPTION_BYTES if what != "url" else 9)


def _spellings(text: str) -> set[bytes]:
    """A text as it is, in JSON (with and without escapes), and in HTML."""
    texts = {
        text,
        json.dumps(text)[1:-1],
        json.dumps(text, ensure_ascii=False)[1:-1],
        html.escape(text),
        html.escape(text, quote=False),
    }
    return {t.encode("utf-8", "surrogatepass") for t in texts}


def search_dataset(
    store: Store, search: NeedleSearch, digests: Collection[str], folders: Collection[str] = ()
) -> Proof:
    """Search every file for every needle, inside parquet, npz, zip and gzip too.

    Args:
        store: the dataset.
        search: from :func:`make_search`.
        digests: sha256 of pictures; members of tars are hashed and compared.
        folders: where to look; empty: everywhere.
    """
    proof = Proof()
    for path in list_files(store):
        if folders and path.partition("/")[0] not in folders:
            continue
        proof.num_files += 1
        proof.num_bytes += store.size(path)
        found: Counter[tuple[str, str]] = Counter()
        for _ in search.find(path.encode()):
            found["file name", "key"] += 1
        for where, data, num_seen in _contents(store, path):
            for what, needle, first in search.find(data):
                found[where, what] += first + len(needle) > num_seen
        if path.endswith(".tar") and digests:
            found["member", "picture"] += _num_members_of(store, path, digests)
        for (where, what), count in sorted(found.items()):
            if what == "key" and where in ("column key", "bytes") and _keeps_keys(path):
                # As bytes they are in the column's statistics, too.
                proof.num_kept_keys += count * (where == "column key")
            elif path == LIST or _is_of_copys_optout(path):
                continue  # digests are all a list has, and a proof the keys of what is gone
            elif count:
                why = explain(path)
                proof.hits.append(Hit(path=path, where=where, what=what, count=count, why=why))
    return proof


def _keeps_keys(path: str) -> bool:
    return _within_copy(path).startswith(ROW_PLACES) and path.endswith(".parquet")


def _is_of_copys_optout(path: str) -> bool:
    return path != _within_copy(path) and _within_copy(path).startswith("optout/")


def _within_copy(path: str) -> str:
    """A file's path in its own dataset: the one repacked from this lies inside of it."""
    folder, _, rest = path.partition("/")
    return rest.partition("/")[2] if folder == "repacked" else path


def list_files(store: Store) -> list[str]:
    """Every file of the dataset, relative, sorted; none that is half written."""
    root = store.path(".").rstrip("/")
    store.fs.invalidate_cache()
    names = (str(name)[len(root) :].lstrip("/") for name in store.fs.find(root))
    return sorted(
        name
        for name in names
        if TEMPORARY_MARK not in name and not name.startswith(SKIPPED) and not name.endswith("lock")
    )


def explain(path: str) -> str:
    """Why a file may still name a removed sample, and what to do about it."""
    reasons: Mapping[str, str] = {
        "source": "your own list; remove it there, or ask its owner",
        "train": "the record of a training that had read it; delete the run or train again",
        "eval": "results of an evaluation that had read it; run eval again",
        "report": "run report again",
        "optout": "the proof of an earlier opt-out",
    }
    folder = _within_copy(path).partition("/")[0]
    return reasons.get(folder, "no stage of ours keeps it there; remove it by hand")


Piece = tuple[str, bytes, int]
"""Where it is from, its bytes, and how many of them came at the end of the piece before."""


def _contents(store: Store, path: str) -> Iterator[Piece]:
    """A file as it lies on disk, then what it packs."""
    if path.endswith(".tar"):
        yield from _tar_members(store, path)
        return
    with store.open(path) as f:
        yield from _windows("bytes", f)
    if path.endswith(".parquet"):
        yield from _columns(store, path)
    elif path.endswith(".npy"):
        with store.open(path) as f:
            yield from _array("bytes", f)
    elif path.endswith((".npz", ".zip", ".pt", ".pth")):
        yield from _zip_members(store, path)
    elif path.endswith((".gz", ".tgz")):
        with store.open(path) as f, gzip.open(f) as unpacked, contextlib.suppress(OSError):
            yield from _windows("bytes", unpacked)


def _windows(where: str, f: IO[bytes] | gzip.GzipFile) -> Iterator[Piece]:
    """A file in windows that overlap, so that nothing is cut in two."""
    tail = b""
    while block := f.read(WINDOW):
        yield where, tail + block, len(tail)
        tail = (tail + block)[-OVERLAP:]


def _columns(store: Store, path: str) -> Iterator[Piece]:
    """The texts of a parquet file, column by column, a line each."""
    with store.open(path) as f:
        try:
            parquet = pq.ParquetFile(f)
        except pa.ArrowInvalid:
            return  # its bytes have been searched
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group)
            for name in table.column_names:
                for chunk in table.column(name).chunks:
                    for leaf in _leaves(chunk):
                        values = leaf.drop_null().cast(pa.large_binary()).to_pylist()
                        yield f"column {name}", b"\n".join(values), 0


_IS_LIST = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_IS_TEXT = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
)


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    """The arrays of texts inside an array of any type."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        yield from _leaves(array.dictionary_decode())
    elif pa.types.is_struct(kind):
        for field_array in array.flatten():
            yield from _leaves(field_array)
    elif pa.types.is_map(kind):
        yield from _leaves(array.keys)
        yield from _leaves(array.items)
    elif (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        yield from _leaves(array.flatten())
    elif any(test(kind) for test in _IS_TEXT):
        yield array


def _zip_members(store: Store, path: str) -> Iterator[Piece]:
    with store.open(path) as f:
        try:
            archive = zipfile.ZipFile(f)
        except zipfile.BadZipFile:
            return  # its bytes have been searched
        with archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    yield from _windows(f"member {name}", member)
                if name.endswith(".npy"):
                    with archive.open(name) as member:
                        yield from _array(f"member {name}", member)


def _array(where: str, f: IO[bytes]) -> Iterator[Piece]:
    """The texts of a NumPy array, a line each: on disk they have no gaps, or are UTF-32."""
    try:
        array = np.load(f, allow_pickle=False)
    except (ValueError, EOFError):
        return  # its bytes have been searched
    if array.dtype.kind in "SU":
        texts = np.char.encode(array, "utf-8") if array.dtype.kind == "U" else array
        yield where, b"\n".join(texts.ravel().tolist()), 0


def _tar_members(store: Store, path: str) -> Iterator[Piece]:
    """Names and contents: the numbers in a tar's headers (owner, mode) look like keys."""
    with store.open(path) as f:
        try:
            with tarfile.open(fileobj=f, mode="r:") as tar:
                for info in tar:
                    yield "member name", info.name.encode("utf-8", "surrogateescape"), 0
                    stream = tar.extractfile(info) if info.isreg() else None
                    if stream is not None:
                        yield from _windows("bytes", stream)
        except tarfile.TarError:
            f.seek(0)
            yield from _windows("bytes", f)


def _num_members_of(store: Store, path: str, digests: Collection[str]) -> int:
    """How many members of a tar are files of these digests."""
    num_found = 0
    with (
        contextlib.suppress(tarfile.TarError),
        store.open(path) as f,
        tarfile.open(fileobj=f, mode="r:") as tar,
    ):
        for info in tar:
            stream = tar.extractfile(info) if info.isreg() else None
            if stream is not None:
                num_found += hashlib.sha256(stream.read()).hexdigest() in digests
    return num_found
