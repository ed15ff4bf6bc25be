"""All samples of some tars as mapped columns, and the choices and neighbors among them.

    pool       every pair of the tars: key, caption, place of the picture, its size
    choice     which rows of the pool are trained on
    neighbors  for each of those, the rows of its neighbors, nearest first

Each is a file in the cache that is named by what it was made from, so that another selection or a
refreshed neighbor table makes its own part anew and no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from declip_shards import DeclipError
from declip_train.column_files import Chunks, Columns, TextColumn, text_chunks

__all__ = [
    "PIECE",
    "NeighborColumns",
    "RowFinder",
    "SamplePool",
    "fingerprint_of",
    "joined_neighbors",
    "neighbors_digest",
    "piece_columns",
    "piece_of",
    "pool_columns",
]

PIECE = pa.schema(
    [
        ("key", pa.large_string()),
        ("caption", pa.large_string()),
        ("offset", pa.int64()),
        ("size", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)
"""Pairs of one tar; height and width are 0 where nothing says them."""
_FINGERPRINT_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class SamplePool:
    """Every pair of some tars, as columns of equal length."""

    keys: TextColumn
    captions: TextColumn
    caption_ids: NDArray[np.int32]
    """Equal where captions are, and only there; from 0, none left out, by their first places."""
    caption_firsts: NDArray[np.int64]
    """(different captions,): the first row of each number."""
    tars: NDArray[np.int32]
    """Number of the tar."""
    offsets: NDArray[np.int64]
    """First byte of the picture."""
    sizes: NDArray[np.int32]
    """Bytes of the picture."""
    image_sizes: NDArray[np.int32] | None
    """(n, 2) height and width as the tars' tables say, 0 where they do not; None: nowhere."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What was kept with the columns."""

    def __len__(self) -> int:
        return len(self.tars)

    @classmethod
    def of(cls, columns: Columns) -> SamplePool:
        """From a file of :func:`pool_columns`."""
        return cls(
            keys=columns.text("keys"),
            captions=columns.text("captions"),
            caption_ids=columns["caption_ids"],
            caption_firsts=columns["caption_firsts"],
            tars=columns["tars"],
            offsets=columns["offsets"],
            sizes=columns["sizes"],
            image_sizes=columns.get("image_sizes"),
            meta=columns.meta,
        )

    @cached_property
    def tar_starts(self) -> NDArray[np.int64] | None:
        """(tars + 1,): first row of each tar; None where a tar's rows are not together."""
        if len(self) and np.any(np.diff(self.tars) < 0):
            return None
        last = int(self.tars[-1]) if len(self) else -1
        return np.searchsorted(self.tars, np.arange(last + 2))

    @cached_property
    def captions_digest(self) -> str:
        """sha256 of all captions in order."""
        known: str = self.meta.get("captions_sha256") or _digest(
            {"data": [self.captions.data], "offsets": [self.captions.offsets]}
        )
        return known

    def rows_of_tar(self, number: int) -> NDArray[np.int64]:
        """Rows of one tar's pairs."""
        starts = self.tar_starts
        if starts is None:
            return np.flatnonzero(self.tars == number)
        if number + 1 >= len(starts):
            return np.empty(0, np.int64)
        return np.arange(starts[number], starts[number + 1])


def piece_columns(piece: pa.Table) -> dict[str, Chunks]:
    """One tar's pairs as columns of a file; :func:`piece_of` is the inverse."""
    columns: dict[str, Chunks] = {}
    for entry in PIECE:
        if pa.types.is_large_string(entry.type):
            columns |= text_chunks(entry.name, piece.column(entry.name).chunks)
        else:
            columns[entry.name] = [piece.column(entry.name).to_numpy()]
    return columns


def piece_of(columns: Columns) -> pa.Table:
    """One tar's pairs out of a file of :func:`piece_columns`."""
    arrays = [
        columns.text(entry.name).arrow()
        if pa.types.is_large_string(entry.type)
        else pa.array(columns[entry.name])
        for entry in PIECE
    ]
    return pa.Table.from_arrays(arrays, schema=PIECE)


def pool_columns(
    pieces: Iterable[pa.Table], *, by_key: bool
) -> tuple[dict[str, Chunks], dict[str, Any]]:
    """The columns of a pool, and what is kept with them.

    Args:
        pieces: of schema ``PIECE``, one for each tar in their order.
        by_key: whether rows are sorted by key; else they stay in the order of the tars.
    """
    tables = [piece.cast(PIECE) for piece in pieces]
    tars = np.repeat(
        np.arange(len(tables), dtype=np.int32), [table.num_rows for table in tables]
    ).astype(np.int32)
    whole = pa.concat_tables(tables) if tables else PIECE.empty_table()
    if by_key and not _is_sorted(whole.column("key")):
        order = pc.sort_indices(whole.column("key")).to_numpy()
        whole = whole.combine_chunks().take(order)
        tars = tars[order]
    sizes = np.stack([whole.column(n).to_numpy() for n in ("height", "width")], axis=1)
    captions = text_chunks("captions", whole.column("caption").chunks)
    caption_ids = _numbered(whole.column("caption"))
    columns: dict[str, Chunks] = {
        **text_chunks("keys", whole.column("key").chunks),
        **captions,
        "caption_ids": [caption_ids],
        "caption_firsts": [_firsts(caption_ids)],
        "tars": [tars],
        "offsets": [whole.column("offset").to_numpy()],
        "sizes": [whole.column("size").to_numpy()],
    }
    if sizes.any():
        columns["image_sizes"] = [sizes.astype(np.int32)]
    return columns, {"captions_sha256": _digest(captions)}


def _firsts(ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each number comes first; they are given in the order of their first places."""
    highest = np.maximum.accumulate(ids)
    return np.flatnonzero(np.diff(highest, prepend=np.int32(-1)) > 0)


def _digest(columns: Mapping[str, Chunks]) -> str:
    digest = hashlib.sha256()
    for name in sorted(columns):
        for chunk in columns[name]:
            digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()


def _is_sorted(keys: pa.ChunkedArray) -> bool:
    """Whether keys ascend, as those of img2dataset's shards do."""
    last: Any = None
    for chunk in keys.chunks:
        if not len(chunk):
            continue
        if last is not None and last > chunk[0].as_py():
            return False
        if len(chunk) > 1 and not pc.all(pc.less_equal(chunk[:-1], chunk[1:])).as_py():
            return False
        last = chunk[-1].as_py()
    return True


def _numbered(texts: pa.ChunkedArray) -> NDArray[np.int32]:
    """Numbers that are equal where texts are: by their first place."""
    encoded = texts.dictionary_encode()
    chunks = [np.asarray(chunk.indices, np.int32) for chunk in encoded.chunks]
    return np.concatenate(chunks) if chunks else np.empty(0, np.int32)


def fingerprint_of(pool: SamplePool, rows: NDArray[np.int64], more: Sequence[Any] = ()) -> str:
    """sha256 of the samples of some rows: keys, captions, places; the same wherever they lie."""
    digest = hashlib.sha256(repr(tuple(more)).encode())
    for first in range(0, len(rows), _FINGERPRINT_ROWS):
        some = rows[first : first + _FINGERPRINT_ROWS]
        for texts in (pool.keys, pool.captions):
            _update(digest, texts.take_arrow(some))
        digest.update(pool.offsets[some].tobytes())
        digest.update(pool.sizes[some].tobytes())
    return digest.hexdigest()


def neighbors_digest(pool: SamplePool, near: NeighborColumns) -> str:
    """sha256 of the neighbors of some samples: how many each has, and their captions."""
    digest = hashlib.sha256(np.ascontiguousarray(near.starts).data)
    for first in range(0, len(near.rows), _FINGERPRINT_ROWS):
        _update(digest, pool.captions.take_arrow(near.rows[first : first + _FINGERPRINT_ROWS]))
    return digest.hexdigest()


def _update(digest: hashlib._Hash, texts: pa.Array) -> None:
    """Hash texts and where each ends."""
    for chunks in text_chunks("t", [texts]).values():
        for chunk in chunks:
            digest.update(np.ascontiguousarray(chunk).data)


class RowFinder:
    """Rows of a pool by key. Arrow hashes all keys at each question: ask for many at once."""

    def __init__(self, keys: TextColumn) -> None:
        self._keys = keys.arrow()

    def __call__(self, wanted: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """(len(wanted),): the row of each key, -1 where there is none; the last of equal keys."""
        if not len(self._keys):
            return np.full(len(wanted), -1, np.int64)
        found = pc.index_in(wanted.cast(pa.large_string()), value_set=self._keys)
        filled = pc.fill_null(found, -1)
        if isinstance(filled, pa.ChunkedArray):
            filled = filled.combine_chunks()
        return np.asarray(filled, np.int64)


@dataclass(frozen=True, kw_only=True)
class NeighborColumns:
    """Neighbors of some samples."""

    starts: NDArray[np.int64]
    """(samples + 1,): where a sample's neighbors begin in ``rows``."""
    rows: NDArray[np.int32]
    """Rows of the pool, those of the first sample's neighbors, of the second's, ..."""
    known_digest: str = ""
    """What :func:`neighbors_digest` gives, where it was worked out before."""

    def counts(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many neighbors some samples have."""
        counts: NDArray[np.int64] = self.starts[indices + 1] - self.starts[indices]
        return counts

    @cached_property
    def num_empty(self) -> int:
        """Samples without a neighbor."""
        return sum(int((np.diff(part) == 0).sum()) for part in _overlapping(self.starts))


def _overlapping(starts: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Pieces of ``starts``, each beginning with the last number of the one before."""
    for first in range(0, max(len(starts) - 1, 0), 1 << 20):
        yield starts[first : first + (1 << 20) + 1]


def joined_neighbors(
    lists: Iterable[tuple[str, pa.Table]], pool: SamplePool, rows: NDArray[np.int64], group: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Neighbor tables' keys as rows of the pool, for the samples of ``rows``.

    Args:
        lists: (path, table with ``key`` and ``neighbor_keys``) of each shard, in the order of the
            pool's tars.
        pool: where all keys must be found.
        rows: ascending rows of the pool, one a sample.
        group: neighbors to look up together.

    Returns:
        ``starts`` and ``rows`` of :class:`NeighborColumns`.

    Raises:
        DeclipError: a table names a key that the pool does not hold, or samples of another tar.
    """
    finder = RowFinder(pool.keys)
    counts = np.zeros(len(rows) + 1, np.int64)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]] = []
    pending: list[tuple[int, str, pa.Table]] = []
    size = 0

    def look_up() -> None:
        for samples, lengths, near in _found_rows(pending, finder, rows, pool.tars):
            counts[samples + 1] = lengths
            found.append((samples, lengths, near))
        pending.clear()

    for tar, (path, table) in enumerate(lists):
        pending.append((tar, path, table))
        size += len(pc.list_flatten(table.column("neighbor_keys"))) + table.num_rows
        if size >= group:
            look_up()
            size = 0
    look_up()
    starts = counts.cumsum()
    flat = np.empty(int(starts[-1]), np.int32)
    for samples, lengths, near in found:
        # A later list of the same sample stands in for an earlier one.
        kept = counts[samples + 1] == lengths
        if not kept.all():
            near, samples, lengths = near[np.repeat(kept, lengths)], samples[kept], lengths[kept]
        shift = np.repeat(starts[samples] - (lengths.cumsum() - lengths), lengths)
        flat[shift + np.arange(len(near))] = near
    return starts, flat


def _found_rows(
    tables: Sequence[tuple[int, str, pa.Table]],
    finder: RowFinder,
    rows: NDArray[np.int64],
    tars: NDArray[np.int32],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]]:
    """(sample, number of neighbors, their rows) of the wanted rows of some tables."""
    columns: list[pa.Array] = []
    for _, _, table in tables:
        lists = table.column("neighbor_keys").combine_chunks()
        columns += [_text(table.column("key")), _text(pc.list_flatten(lists))]
    if not columns:
        return
    all_found = finder(pa.chunked_array(columns, pa.large_string()))
    first = 0
    for (tar, path, table), own, near in zip(tables, columns[::2], columns[1::2], strict=True):
        own_rows = all_found[first : first + len(own)]
        near_rows = all_found[first + len(own) : first + len(own) + len(near)]
        first += len(own) + len(near)
        for what, names, places in (("sample", own, own_rows), ("neighbor", near, near_rows)):
            unknown = np.flatnonzero(places < 0)
            if unknown.size:
                raise DeclipError(
                    f"{path!r} names the {what} {names[int(unknown[0])].as_py()!r}, which no "
                    "shard holds: the table is of other shards; rerun the neighbors step."
                )
        # Keys alone do not tell a file from its neighbor's: those of another tar are known, too.
        strange = np.flatnonzero(tars[own_rows] != tar)
        if strange.size:
            raise DeclipError(
                f"{path!r} names the sample {own[int(strange[0])].as_py()!r}, which another shard "
                "holds: the file is of that shard; delete it and rerun the neighbors step."
            )
        lengths = pc.fill_null(pc.list_value_length(table.column("neighbor_keys")), 0)
        counts = np.asarray(lengths.combine_chunks(), np.int64)
        places = np.searchsorted(rows, own_rows)
        places[places == len(rows)] = 0
        wanted = rows[places] == own_rows if len(rows) else np.zeros(len(own), bool)
        yield places[wanted], counts[wanted], near_rows[np.repeat(wanted, counts)].astype(np.int32)


def _text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    text = column.cast(pa.large_string())
    return text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text
