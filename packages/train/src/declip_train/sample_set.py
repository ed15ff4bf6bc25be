"""The samples of a run: mapped columns, pictures by place, neighbors by row."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from declip_shards import DeclipError
from declip_shards.neighbor_tables import TableVersion
from declip_train.column_files import TextColumn, cache_base
from declip_train.mixtures import epoch_length, epoch_sequence
from declip_train.sample_columns import (
    NeighborColumns,
    SamplePool,
    fingerprint_of,
    neighbors_digest,
)
from declip_train.stored_features import StoredFeatures
from declip_train.tar_cache import TarFiles


class _Rows(Sequence[Any]):
    """A column that is put together on demand; ``rows[3]``, ``rows[[1, 2]]`` and lists of it."""

    def __init__(self, length: int, take: Callable[[NDArray[np.int64]], Any]) -> None:
        self._length, self._take = length, take

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._take(np.arange(self._length)[index])
        if isinstance(index, int | np.integer):
            return self._take(np.array([range(self._length)[int(index)]]))[0]
        return self._take(np.asarray(index, np.int64))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self._take(np.arange(self._length)), dtype)

    def __iter__(self) -> Any:
        for first in range(0, self._length, 1 << 16):
            yield from self._take(np.arange(first, min(first + (1 << 16), self._length)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def _array(indices: ArrayLike) -> NDArray[np.int64]:
    return np.asarray(indices, np.int64).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class TrainingSamples:
    """The samples of a run, numbered from 0: those of a dataset by key, of other tars in theirs.

    Nothing is held for each sample but mapped columns, which processes side by side share, and
    pictures stay in their tars. All methods may be called by several threads.

    Measured at 15 million pairs, 13.5 million of them selected: a list that stands is opened in 0.1
    seconds of a core and takes a process 5 MB of its own; its 1.7 GB of mapped pages are shared and
    given back under pressure. Making it takes 50 seconds of a core, and 4.6 GB meanwhile, besides
    reading the tars' headers (20 microseconds a pair) and, where ingest recorded them, checking
    their sha256.
    """

    pool: SamplePool
    """All pairs of the tars, also those that only neighbors' captions are read of."""
    rows: NDArray[np.int64]
    """(samples,) ascending: each sample's row of the pool."""
    tars: TarFiles
    """Where the pictures are."""
    num_selected: int
    """Samples of the selection, before the splits were asked for."""
    part_sizes: tuple[int, ...]
    """Samples of each entry of ``train_data``, one behind the other; of a dataset: all."""
    weights: tuple[float, ...]
    """How often an epoch meets the samples of each part."""
    known_fingerprint: str = ""
    """What :meth:`fingerprint` gives, where it was worked out before."""
    pool_key: str = ""
    """Name of the pool in the cache."""
    choice_key: str = ""
    """Name of the list of rows in the cache."""
    near: NeighborColumns | None = None
    """Neighbors of each sample; None where none were asked for."""
    stored: StoredFeatures | None = None
    """Stored vectors of the neighbors' captions, where they were asked for."""
    stored_of_pool: NDArray[np.int64] | None = None
    """(pool,): row of ``stored`` of each row of the pool, -1 where it has none."""
    table: TableVersion | None = None
    """The neighbor table that was read; None for none."""
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Members of foreign tars that are no pair, by reason."""

    @classmethod
    def in_memory(
        cls,
        *,
        keys: Sequence[str],
        captions: Sequence[str],
        neighbor_captions: Sequence[Sequence[str]] | None = None,
    ) -> TrainingSamples:
        """Samples without pictures, for trials of what reads captions alone."""
        near = [list(texts) for texts in neighbor_captions or ()]
        flat = [text for texts in near for text in texts]
        texts = [*captions, *flat]
        numbers: dict[str, int] = {}
        ids = [numbers.setdefault(text, len(numbers)) for text in texts]
        size = len(texts)
        pool = SamplePool(
            keys=TextColumn.of([*keys, *(f"neighbor-{n}" for n in range(len(flat)))]),
            captions=TextColumn.of(texts),
            caption_ids=np.array(ids, np.int32),
            caption_firsts=np.unique(np.array(ids, np.int64), return_index=True)[1],
            tars=np.zeros(size, np.int32),
            offsets=np.zeros(size, np.int64),
            sizes=np.zeros(size, np.int32),
            image_sizes=None,
        )
        starts = np.cumsum([0, *map(len, near)], dtype=np.int64)
        places = np.arange(len(keys), size, dtype=np.int32)
        return cls(
            pool=pool,
            rows=np.arange(len(keys)),
            tars=TarFiles([], cache_base(None), 0),
            num_selected=len(keys),
            part_sizes=(len(keys),),
            weights=(1.0,),
            near=None if neighbor_captions is None else NeighborColumns(starts=starts, rows=places),
        )

    def __len__(self) -> int:
        return len(self.rows)

    # Epochs --------------------------------------------------------------------------------------

    @property
    def epoch_length(self) -> int:
        """Samples of an epoch, the same in each; not ``len`` where weights are not 1."""
        return epoch_length(self.part_sizes, self.weights)

    def epoch_sequence(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """(epoch_length,): the samples of an epoch in order, a pure function of the arguments."""
        return epoch_sequence(
            self.part_sizes,
            self.weights,
            seed=seed,
            epoch=epoch,
            fingerprint=self.fingerprint(),
        )

    # Columns -------------------------------------------------------------------------------------

    def keys_of(self, indices: ArrayLike) -> list[str]:
        """Keys of some samples."""
        return self.pool.keys.take(self.rows[_array(indices)])

    def captions_of(self, indices: ArrayLike) -> list[str]:
        """Captions of some samples."""
        return self.pool.captions.take(self.rows[_array(indices)])

    def caption_ids_of(self, indices: ArrayLike) -> NDArray[np.int64]:
        """``caption_ids`` of some samples."""
        return self.pool.caption_ids[self.rows[_array(indices)]].astype(np.int64)

    def image_sizes(self, indices: ArrayLike) -> NDArray[np.int32] | None:
        """(n, 2) int32 height and width of some samples' pictures as the shards' tables say, not
        looked up in the pictures; 0, 0 where they say nothing, None where they all do."""
        if self.pool.image_sizes is None:
            return None
        sizes: NDArray[np.int32] = self.pool.image_sizes[self.rows[_array(indices)]]
        return sizes

    @property
    def keys(self) -> Sequence[str]:
        """Each sample's key, put together on demand."""
        return _Rows(len(self), self.keys_of)

    @property
    def captions(self) -> Sequence[str]:
        """Each sample's own caption, put together on demand."""
        return _Rows(len(self), self.captions_of)

    @property
    def caption_ids(self) -> NDArray[np.int64]:
        """(samples,) on demand: numbers that are equal where captions are, and only there."""
        return self.caption_ids_of(np.arange(len(self)))

    # Pictures ------------------------------------------------------------------------------------

    def read_images(self, indices: ArrayLike) -> list[bytes | str]:
        """Encoded bytes of some samples' pictures, in order, or why one cannot be had."""
        rows = self.rows[_array(indices)]
        pool = self.pool
        return self.tars.read_many(pool.tars[rows], pool.offsets[rows], pool.sizes[rows])

    def read_image(self, index: int) -> bytes:
        """Encoded bytes of a sample's picture.

        Raises:
            DeclipError: the tar is missing, cut, or not the one that was listed.
        """
        (data,) = self.read_images([index])
        if isinstance(data, str):
            raise DeclipError(
                f"{data} at sample {self.keys[index]!r}; rerun ingest for this shard, or bring "
                "back the file."
            )
        return data

    # Neighbors -----------------------------------------------------------------------------------

    @property
    def num_without_neighbor(self) -> int:
        """Samples whose row of the neighbor table is empty."""
        return len(self) if self.near is None else self.near.num_empty

    def neighbor_counts(self, indices: ArrayLike) -> NDArray[np.int64]:
        """How many neighbors some samples have."""
        if self.near is None:
            return np.zeros(len(_array(indices)), np.int64)
        return self.near.counts(_array(indices))

    def _near_rows(self, indices: ArrayLike, places: ArrayLike) -> NDArray[np.int64]:
        """Rows of the pool: of each sample, the neighbor of a place (0 the nearest)."""
        wanted, which = _array(indices), _array(places)
        if self.near is None or not len(wanted):
            if len(wanted):
                raise IndexError("the samples were listed without neighbors")
            return np.empty(0, np.int64)
        if np.any((which < 0) | (which >= self.near.counts(wanted))):
            raise IndexError("a sample has no neighbor of that place")
        rows: NDArray[np.int32] = self.near.rows[self.near.starts[wanted] + which]
        return rows.astype(np.int64)

    def neighbor_captions_at(self, indices: ArrayLike, places: ArrayLike) -> list[str]:
        """Of each sample, the caption of its neighbor number ``places[i]``, 0 the nearest."""
        return self.pool.captions.take(self._near_rows(indices, places))

    def neighbor_caption_ids_of(self, indices: ArrayLike, places: ArrayLike) -> NDArray[np.int64]:
        """Those captions as numbers of ``caption_ids``."""
        return self.pool.caption_ids[self._near_rows(indices, places)].astype(np.int64)

    def stored_vectors_of(self, indices: ArrayLike, places: ArrayLike) -> NDArray[np.float32]:
        """(n, dim) stored vectors of those neighbors, of unit length.

        Raises:
            DeclipError: see :meth:`StoredFeatures.vectors`.
        """
        if self.stored is None or self.stored_of_pool is None:
            raise ValueError("the samples were listed without stored features")
        return self.stored.vectors(self.stored_of_pool[self._near_rows(indices, places)])

    def neighbor_captions_of(self, indices: ArrayLike) -> list[tuple[str, ...]]:
        """Captions of all neighbors of some samples, nearest first; empty where one has none."""
        wanted = _array(indices)
        counts = self.neighbor_counts(wanted)
        owners = np.repeat(wanted, counts)
        places = np.arange(len(owners)) - np.repeat(counts.cumsum() - counts, counts)
        texts = self.neighbor_captions_at(owners, places)
        ends = counts.cumsum().tolist()
        return [tuple(texts[end - n : end]) for end, n in zip(ends, counts.tolist(), strict=True)]

    @property
    def neighbor_captions(self) -> Sequence[tuple[str, ...]]:
        """Captions of each sample's neighbors, put together on demand."""
        return _Rows(len(self), self.neighbor_captions_of)

    @property
    def neighbor_starts(self) -> NDArray[np.int64]:
        """(samples + 1,): where a sample's neighbors begin in ``neighbor_caption_ids`` and
        ``stored_rows``."""
        return np.zeros(len(self) + 1, np.int64) if self.near is None else self.near.starts

    def _flat(self, of_pool: NDArray[Any]) -> NDArray[np.int64]:
        near = np.empty(0, np.int32) if self.near is None else self.near.rows
        flat: NDArray[np.int64] = of_pool[near].astype(np.int64)
        return flat

    @property
    def neighbor_caption_ids(self) -> NDArray[np.int64]:
        """The neighbors' captions as numbers, flat, put together on demand."""
        return self._flat(self.pool.caption_ids)

    @property
    def stored_rows(self) -> NDArray[np.int64]:
        """Rows of ``stored`` of all neighbors, flat, put together on demand."""
        if self.stored_of_pool is None:
            return np.empty(0, np.int64)
        return self._flat(self.stored_of_pool)

    # What they are -------------------------------------------------------------------------------

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint_of(self.pool, self.rows, self.part_sizes)

    def fingerprint(self) -> str:
        """sha256 of the samples: keys, captions, and the pictures' places in their tars."""
        return self.known_fingerprint or self._fingerprint

    def digest(self) -> str:
        """sha256 of what is trained on: the samples, their neighbors, their stored vectors."""
        digest = hashlib.sha256(self.fingerprint().encode())
        if self.near is not None:
            known = self.near.known_digest
            digest.update((known or neighbors_digest(self.pool, self.near)).encode())
        if self.stored is not None and self.stored_of_pool is not None:
            digest.update(self.stored.digest().encode())
            digest.update(np.ascontiguousarray(self.stored_of_pool).data)
        return digest.hexdigest()
