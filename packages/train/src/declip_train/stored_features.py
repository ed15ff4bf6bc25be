"""Vectors of captions that an embed stage stored, fetched row by row out of the mapped files.

The layout is clip-retrieval's: ``embeddings/NAME/text_emb/text_emb_P.npy`` (rows, size) beside
``embeddings/NAME/metadata/metadata_P.parquet``, whose column ``key`` names the rows. Files are
mapped, so processes that train side by side share the one copy in the kernel's page cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from declip_shards import DeclipError, Store, layout, sidecars
from declip_train.column_files import Chunks, cached_columns, digest_of
from declip_train.sample_columns import RowFinder, SamplePool
from declip_train.tar_cache import find_tar

__all__ = [
    "StoredFeatures",
    "join_stored_features",
    "load_stored_features",
    "open_stored_features",
]

_MAPPED_FILES = 128
"""Files that stay mapped; each holds a file descriptor, of which a process has about 1,000."""
_KIND = "text_emb"
_ROWS_AT_ONCE = 30_000_000
"""Keys that are looked up together: 1 GB while they are."""


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """All rows of all files, numbered through."""

    name: str
    """Name of the embeddings."""
    dim: int
    """Numbers in a vector."""
    paths: Sequence[str]
    """Local paths of the files."""
    partitions: Sequence[str]
    """Their parts of the embeddings, as file names have them."""
    first_rows: NDArray[np.int64]
    """(files + 1,): number of each file's first row, and how many rows there are."""

    known_digest: str = ""
    """What :meth:`digest` gives, where it was worked out before."""

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    @cached_property
    def _mapped(self) -> Callable[[str], NDArray[np.floating]]:
        return lru_cache(_MAPPED_FILES)(_map)

    def vectors(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of some rows, (len(rows), dim) float32 of unit length.

        Raises:
            DeclipError: a file was replaced by one of another shape, or a vector has no direction
                (zero, NaN or infinite).
        """
        wanted = np.asarray(rows, np.int64)
        found = np.empty((len(wanted), self.dim), np.float32)
        files = np.searchsorted(self.first_rows, wanted, side="right") - 1
        for number in np.unique(files).tolist():
            places = np.flatnonzero(files == number)
            table = self._mapped(self.paths[number])
            if table.shape != (self.first_rows[number + 1] - self.first_rows[number], self.dim):
                raise DeclipError(
                    f"{self.paths[number]!r} was changed during training: it is of shape "
                    f"{table.shape} now; start the training again."
                )
            found[places] = table[wanted[places] - self.first_rows[number]]
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        bad = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
        if bad.size:
            number = int(files[bad[0]])
            raise DeclipError(
                f"{self.paths[number]!r}: row {wanted[bad[0]] - self.first_rows[number]} is of "
                f"length {lengths[bad[0], 0]}, so it has no direction; rerun the embed step."
            )
        found /= lengths
        return found

    def digest(self) -> str:
        """sha256 of the files' bytes, in order."""
        if self.known_digest:
            return self.known_digest
        digest = hashlib.sha256()
        for path in self.paths:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def _map(path: str) -> NDArray[np.floating]:
    try:
        table: NDArray[np.floating] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DeclipError(
            f"{path!r} is damaged ({error}); delete it and rerun the embed step."
        ) from error
    if table.ndim != 2 or table.dtype.kind != "f":
        raise DeclipError(
            f"{path!r} holds {table.dtype} of shape {table.shape}, but embeddings are floats "
            "(rows, size); rerun the embed step."
        )
    return table


def open_stored_features(store: Store, name: str, *, dim: int) -> StoredFeatures:
    """Open the text vectors of embeddings ``name``.

    Args:
        store: the dataset folder; local.
        name: of the embeddings.
        dim: size of the model's features, which the stored ones must have.

    Raises:
        DeclipError: there are none, of another size, of two encoders, or files are damaged.
    """
    folder, end = f"embeddings/{name}/{_KIND}", ".npy"
    files = sorted(file for file in store.list(folder, end) if file.startswith(f"{_KIND}_"))
    if not files:
        raise DeclipError(
            f"embeddings {name!r} hold no vectors of captions ({folder!r} is missing or empty); "
            "run the embed step with texts, correct neighbor_embeddings, or set neighbor_feature "
            "to caption."
        )
    _check_one_encoder(store, name)
    paths, partitions, first_rows = [], [], [0]
    for file in files:
        partition = file[len(_KIND) + 1 : -len(end)]
        path = str(store.local_path(layout.embedding_path(name, _KIND, partition)))
        table = _map(path)
        if table.shape[1] != dim:
            raise DeclipError(
                f"neighbor_embeddings {name!r} are vectors of {table.shape[1]} numbers, but the "
                f"model's features have {dim}; embed with an encoder of that size, choose another "
                "model, or set neighbor_feature to caption."
            )
        paths.append(path)
        partitions.append(partition)
        first_rows.append(first_rows[-1] + len(table))
    return StoredFeatures(
        name=name,
        dim=dim,
        paths=paths,
        partitions=partitions,
        first_rows=np.array(first_rows, np.int64),
    )


def _keys_of_file(store: Store, features: StoredFeatures, number: int) -> pa.Array:
    """Key of each row of one file, large_string."""
    keys = _keys(
        store, layout.embedding_path(features.name, "metadata", features.partitions[number])
    )
    rows = int(features.first_rows[number + 1] - features.first_rows[number])
    if len(keys) != rows:
        raise DeclipError(
            f"{features.paths[number]!r} has {rows} rows, but its metadata name {len(keys)}; rerun "
            "the embed step."
        )
    return keys


def load_stored_features(
    store: Store, name: str, *, dim: int, wanted: Collection[str]
) -> tuple[StoredFeatures, dict[str, int]]:
    """Open the text vectors of embeddings ``name``, for a few keys.

    Args:
        store: the dataset folder; local.
        name: of the embeddings.
        dim: size of the model's features, which the stored ones must have.
        wanted: keys whose rows are asked for.

    Returns:
        The features, and the row of every wanted key that has one.

    Raises:
        DeclipError: see :func:`open_stored_features`; or files disagree.
    """
    features = open_stored_features(store, name, dim=dim)
    rows: dict[str, int] = {}
    for number, first in enumerate(features.first_rows[:-1].tolist()):
        keys = _keys_of_file(store, features, number).to_pylist()
        rows.update((key, first + row) for row, key in enumerate(keys) if key in wanted)
    return features, rows


def join_stored_features(
    store: Store, name: str, *, dim: int, pool: SamplePool, base: Path, key: str
) -> tuple[StoredFeatures, NDArray[np.int64]]:
    """The text vectors of embeddings ``name``, and which of them each pair of a pool has.

    Args:
        store: the dataset folder; local.
        name: of the embeddings.
        dim: size of the model's features, which the stored ones must have.
        pool: whose keys are looked up.
        base: the cache.
        key: the pool's name there.

    Returns:
        The features; and (pool,) the row of each pair, -1 where it has none.

    Raises:
        DeclipError: see :func:`open_stored_features`; or files disagree.
    """
    features = open_stored_features(store, name, dim=dim)
    identities = [find_tar(path) for path in features.paths]
    metadata = [
        find_tar(str(store.local_path(layout.embedding_path(name, "metadata", partition))))
        for partition in features.partitions
        if store.exists(layout.embedding_path(name, "metadata", partition))
    ]

    def build() -> tuple[Mapping[str, Chunks], Mapping[str, Any]]:
        found = np.full(len(pool), -1, np.int64)
        finder = RowFinder(pool.keys)
        for numbers in _groups(features.first_rows):
            keys = [_keys_of_file(store, features, number) for number in numbers]
            rows = finder(pa.chunked_array(keys, pa.large_string()))
            known = np.flatnonzero(rows >= 0)
            found[rows[known]] = features.first_rows[numbers[0]] + known
        return {"rows": [found]}, {"digest": features.digest()}

    identity = [source.identity() for source in (*identities, *metadata)]
    columns = cached_columns(
        base,
        "samples",
        digest_of("stored", key, name, dim, identity),
        build,
        what=f"the rows of embeddings {name!r}",
    )
    known = str(columns.meta["digest"])
    return dataclasses.replace(features, known_digest=known), columns["rows"]


def _groups(first_rows: NDArray[np.int64]) -> Iterator[list[int]]:
    """Files that are looked up together."""
    group: list[int] = []
    for number in range(len(first_rows) - 1):
        group.append(number)
        if first_rows[number + 1] - first_rows[group[0]] >= _ROWS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _keys(store: Store, path: str) -> pa.Array:
    """Key of each row; clip-retrieval's tables from elsewhere name it ``image_path``."""
    table = sidecars.read_table(store, path)
    names = [name for name in ("key", "image_path") if name in table.column_names]
    if not names:
        raise DeclipError(
            f"{path!r} has neither a column 'key' nor 'image_path', so its rows cannot be joined; "
            "rerun the embed step."
        )
    return table.column(names[0]).cast(pa.large_string()).combine_chunks()


def _check_one_encoder(store: Store, name: str) -> None:
    """Refuse embeddings that two encoders wrote, where the embed step's own records tell."""
    encoders: dict[str, str] = {}
    folder = f"embeddings/{name}/parts"
    for file in store.list(folder, ".json"):
        try:
            part = json.loads(store.read_bytes(f"{folder}/{file}"))
            encoders[str(part["encoder_digest"])] = str(part["encoder"])
        except (ValueError, KeyError, TypeError) as error:
            raise DeclipError(
                f"'{folder}/{file}' is damaged ({error}); delete it and rerun the embed step."
            ) from error
    if len(encoders) > 1:
        raise DeclipError(
            f"embeddings {name!r} mix encoders ({', '.join(sorted(encoders.values()))}), whose "
            "vectors cannot be compared; delete them and rerun the embed step."
        )
