"""Inverted lists as arrays: read from any index, merged, and written as a stream.

FAISS's own file of inverted lists ends in them, list by list: codes, then row numbers. A merged
file is therefore written front to back with one list in memory, however many rows there are, and
is the same file that FAISS would write of the whole index held in memory.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from declip_filter.index_files import Ids, Scores, load_faiss
from declip_shards import DeclipError

Codes = npt.NDArray[np.uint8]
Entries = Callable[[int], tuple[Ids, Codes]]
"""List number -> row numbers (n,), ascending, and codes (n, code_size)."""

_EMPTY_LISTS = struct.Struct("<4sQQ4sQ")
"""What FAISS writes for lists without an entry: mark, number, bytes a code, form, its length."""


def inner_index(index: Any) -> Any:
    """The index behind transforms; ``index`` owns it and must outlive it."""
    faiss = load_faiss()

    inner = index
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return inner


def has_lists(index: Any) -> bool:
    """Whether it has inverted lists that :func:`entries_of` reads."""
    faiss = load_faiss()

    return isinstance(inner_index(index), faiss.IndexIVF)


def set_effort(index: Any, effort: int) -> None:
    """Store how many lists a search looks through (nprobe), or how many nodes (efSearch)."""
    faiss = load_faiss()

    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = effort
    elif isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efSearch = effort


def stored_effort(index: Any) -> int:
    """What :func:`set_effort` stored; 0 for a type that has neither."""
    faiss = load_faiss()

    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF):
        return int(inner.nprobe)
    return int(inner.hnsw.efSearch) if isinstance(inner, faiss.IndexHNSW) else 0


def set_num_rows(index: Any, num_rows: int) -> None:
    """Say how many vectors an index has whose lists were filled by hand."""
    faiss = load_faiss()

    while isinstance(index, faiss.IndexPreTransform):
        index.ntotal = num_rows
        index = faiss.downcast_index(index.index)
    index.ntotal = num_rows


def list_sizes(index: Any) -> Ids:
    """Entries of every inverted list: (nlist,)."""
    lists = inner_index(index).invlists
    return np.asarray([lists.list_size(n) for n in range(lists.nlist)], dtype=np.int64)


def entries_of(index: Any) -> Entries:
    """What the lists of an index hold; the arrays of one list are copies."""
    faiss = load_faiss()

    inner = inner_index(index)
    lists = faiss.downcast_InvertedLists(inner.invlists)
    is_packed = isinstance(lists, faiss.BlockInvertedLists)
    size = int(lists.packer.code_size if is_packed else inner.code_size)

    def read(number: int, owner: Any = index) -> tuple[Ids, Codes]:  # a bare view outlives nothing
        length = lists.list_size(number)
        if not length:
            return np.empty(0, np.int64), np.empty((0, size), np.uint8)
        rows: Ids = faiss.rev_swig_ptr(lists.get_ids(number), length).copy()
        if is_packed:
            return rows, _unpack(lists, number, length, size)
        flat: Codes = faiss.rev_swig_ptr(lists.get_codes(number), length * size)
        return rows, flat.reshape(length, size).copy()

    return read


def _unpack(lists: Any, number: int, length: int, size: int) -> Codes:
    """Codes of a list of fast scan, where those of 32 rows lie interleaved."""
    faiss = load_faiss()

    per_block, block_size = int(lists.n_per_block), int(lists.block_size)
    num_blocks = -(-length // per_block)
    packed = faiss.rev_swig_ptr(lists.get_codes(number), num_blocks * block_size)
    flat = np.empty((num_blocks, per_block, size), dtype=np.uint8)
    for block in range(num_blocks):
        source = packed[block * block_size : (block + 1) * block_size]
        lists.packer.unpack_all(faiss.swig_ptr(source), faiss.swig_ptr(flat[block]))
    return flat.reshape(-1, size)[:length]


def merged(sources: Sequence[Entries]) -> Entries:
    """The entries of several, those of a list one after the other and in the order of rows."""

    def read(number: int) -> tuple[Ids, Codes]:
        found = [source(number) for source in sources]
        rows = np.concatenate([own for own, _ in found])
        codes = np.concatenate([own for _, own in found])
        if (np.diff(rows) < 0).any():
            order = np.argsort(rows, kind="stable")
            rows, codes = rows[order], codes[order]
        return rows, codes

    return read


def renumbered(source: Entries, new_rows: Ids) -> Entries:
    """The entries under other row numbers: ``new_rows[row]``, or none at all where that is -1."""

    def read(number: int) -> tuple[Ids, Codes]:
        rows, codes = source(number)
        fresh = new_rows[rows]
        stays = fresh >= 0
        return (fresh, codes) if stays.all() else (fresh[stays], codes[stays])

    return read


def refilled(index: Any, entries: Entries, num_rows: int) -> Any:
    """The trained index with other entries in its lists. ``index`` must not be used after.

    Lists are written anew in the order that ``entries`` gives, and what is packed for fast scan is
    filled plainly and packed again: the bytes do not depend on how many steps led there.
    """
    faiss = load_faiss()
    inner = inner_index(index)
    is_packed = isinstance(inner, faiss.IndexIVFPQFastScan)
    plain = _plain_copy(inner) if is_packed else inner
    fresh = faiss.ArrayInvertedLists(int(plain.nlist), int(plain.code_size))
    for number in range(int(plain.nlist)):
        rows, codes = entries(number)
        if len(rows):
            codes = np.ascontiguousarray(codes)
            fresh.add_entries(number, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(codes))
    plain.replace_invlists(fresh, True)
    fresh.this.disown()  # the index frees it now
    if not is_packed:
        set_num_rows(index, num_rows)
        return index
    plain.referenced_objects = [index]
    outer = behind_transforms(index, plain)
    set_num_rows(outer, num_rows)
    return to_fast_scan(outer)


def emptied(index: Any) -> Any:
    """A trained index without a row, its lists plain and its own, made of ``index``.

    ``index`` must not be used after.

    Raises:
        DeclipError: the index has no inverted lists.
    """
    faiss = load_faiss()
    inner = inner_index(index)
    if not isinstance(inner, faiss.IndexIVF):
        raise DeclipError(f"an index of type {type(inner).__name__} has no inverted lists.")
    if isinstance(inner, faiss.IndexIVFPQFastScan):
        plain = _plain_copy(inner)
        plain.referenced_objects = [index]
        return behind_transforms(index, plain)
    fresh = faiss.ArrayInvertedLists(int(inner.nlist), int(inner.code_size))
    inner.replace_invlists(fresh, True)
    fresh.this.disown()
    set_num_rows(index, 0)
    return index


def _plain_copy(packed: Any) -> Any:
    """An empty index of the same quantizers whose codes do not lie interleaved."""
    faiss = load_faiss()
    quantizer, pq = faiss.downcast_index(packed.quantizer), packed.pq
    plain = faiss.IndexIVFPQ(quantizer, packed.d, packed.nlist, pq.M, pq.nbits, packed.metric_type)
    plain.by_residual, plain.is_trained, plain.nprobe = packed.by_residual, True, packed.nprobe
    plain.pq = pq
    return plain


def behind_transforms(index: Any, inner: Any) -> Any:
    """``inner`` behind the transforms of ``index``, if it has any."""
    faiss = load_faiss()

    if not isinstance(index, faiss.IndexPreTransform):
        return inner
    chain = index.chain
    outer = faiss.IndexPreTransform(behind_transforms(faiss.downcast_index(index.index), inner))
    outer.referenced_objects = [inner, index]
    for number in reversed(range(chain.size())):
        outer.prepend_transform(chain.at(number))
    return outer


def to_fast_scan(index: Any) -> Any:
    """The same index with codes of 4 bits interleaved, behind the same transforms."""
    faiss = load_faiss()

    plain = inner_index(index)
    fast = faiss.IndexIVFPQFastScan(plain)
    fast.nprobe = plain.nprobe
    fast.referenced_objects = [index]
    return behind_transforms(index, fast)


def header_of(index: Any, num_rows: int) -> bytes:
    """What FAISS writes before the lists, for an empty index that will have ``num_rows``."""
    faiss = load_faiss()

    set_num_rows(index, num_rows)
    data = faiss.serialize_index(index).tobytes()
    set_num_rows(index, 0)
    inner = inner_index(index)
    tail = _EMPTY_LISTS.pack(b"ilar", int(inner.nlist), int(inner.code_size), b"sprs", 0)
    if not data.endswith(tail):
        raise DeclipError(
            f"FAISS {faiss.__version__} writes inverted lists in another form than this version "
            "of opendeclip knows; install the version that requirements/ pins."
        )
    return bytes(data[: -len(tail)])


def write_lists(out: BinaryIO, index: Any, sizes: Ids, entries: Entries) -> None:
    """Write an index file front to back.

    Args:
        out: where to.
        index: trained and empty; its header goes before the lists.
        sizes: (nlist,), how many entries each list will have.
        entries: what they are; one list is held at a time.
    """
    inner = inner_index(index)
    nlist, code_size = int(inner.nlist), int(inner.code_size)
    out.write(header_of(index, int(sizes.sum())))
    filled = np.flatnonzero(sizes)
    if len(filled) > nlist // 2:
        out.write(_EMPTY_LISTS.pack(b"ilar", nlist, code_size, b"full", nlist))
        out.write(sizes.astype("<u8").tobytes())
    else:
        pairs = np.stack([filled, sizes[filled]], axis=1).astype("<u8")
        out.write(_EMPTY_LISTS.pack(b"ilar", nlist, code_size, b"sprs", pairs.size))
        out.write(pairs.tobytes())
    for number in filled.tolist():
        rows, codes = entries(number)
        if len(rows) != sizes[number]:
            raise ValueError(f"list {number} has {len(rows)} entries, {sizes[number]} were counted")
        out.write(np.ascontiguousarray(codes).tobytes())
        out.write(rows.astype("<i8").tobytes())


def write_flat(out: BinaryIO, dim: int, num_rows: int, blocks: Iterable[Scores]) -> None:
    """Write the file of a Flat index front to back, from float32 blocks of (some rows, dim)."""
    faiss = load_faiss()

    index = faiss.IndexFlatIP(dim)
    index.ntotal = num_rows
    data = faiss.serialize_index(index).tobytes()
    out.write(data[:-8])
    out.write(struct.pack("<Q", num_rows * dim))
    for block in blocks:
        out.write(np.ascontiguousarray(block, dtype="<f4").tobytes())


def replace_header(path: Path, index: Any, num_rows: int) -> None:
    """Write the header of a file again, of the same length: another ``nprobe`` is in it."""
    with path.open("r+b") as f:
        f.write(header_of(index, num_rows))
