"""Vectors of captions that an embed stage stored, fetched row by row out of the mapped files.

The layout is clip-retrieval's: ``embeddings/NAME/text_emb/text_emb_P.npy`` (rows, size) beside
``embeddings/NAME/metadata/metadata_P.parquet``, whose column ``key`` names the rows. Files are
mapped, so processes that train side by side share the one copy in the kernel's page cache; those of
a remote dataset are read by place (:mod:`declip_train.fetched_vectors`).
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
from declip_train.fetched_vectors import FetchedVectors
from declip_train.sample_columns import RowFinder, SamplePool
from declip_train.shard_listing import file_identities, tar_location
from declip_train.tar_cache import TarFiles, find_tar

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
    """Of the files; URLs where the dataset is remote."""
    partitions: Sequence[str]
    """Their parts of the embeddings, as file names have them."""
    first_rows: NDArray[np.int64]
    """(files + 1,): number of each file's first row, and how many rows there are."""
    fetched: FetchedVectors | None = None
    """Reads the files of a remote dataset; None: they are mapped."""

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
            DeclipError: a file was replaced by one of another shape, a remote one cannot be
                reached, or a vector has no direction (zero, NaN or infinite).
        """
        wanted = np.asarray(rows, np.int64)
        files = np.searchsorted(self.first_rows, wanted, side="right") - 1
        if self.fetched is not None:
            found = self.fetched.rows(files, wanted - self.first_rows[files])
        else:
            found = self._rows_of_maps(files, wanted)
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

    def _rows_of_maps(
        self, files: NDArray[np.int64], wanted: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """(len(wanted), dim): the rows as the files have them."""
        found = np.empty((len(wanted), self.dim), np.float32)
        for number in np.unique(files).tolist():
            places = np.flatnonzero(files == number)
            table = self._mapped(self.paths[number])
            if table.shape != (self.first_rows[number + 1] - self.first_rows[number], self.dim):
                raise DeclipError(
                    f"{self.paths[number]!r} was changed during training: it is of shape "
                    f"{table.shape} now; start the training again."
                )
            found[places] = table[wanted[places] - self.first_rows[number]]
        return found

    def digest(self) -> str:
        """sha256 of the files' bytes, in order."""
        if self.known_digest:
            return self.known_digest
        digest = hashlib.sha256()
        for number, path in enumerate(self.paths):
            fetched = self.fetched
            with open(path, "rb") if fetched is None else fetched.open_whole(number) as file:
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


def open_stored_features(
    store: Store, name: str, *, dim: int, tars: TarFiles | None = None
) -> StoredFeatures:
    """Open the text vectors of embeddings ``name``.

    Args:
        store: the dataset.
        name: of the embeddings.
        dim: size of the model's features, which the stored ones must have.
        tars: of the dataset, whose cache the vectors share where it is remote.

    Raises:
        DeclipError: there are none, of another size, of two encoders, files are damaged, or the
            dataset is remote and cannot be reached.
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
    partitions = [file[len(_KIND) + 1 : -len(end)] for file in files]
    relative = [layout.embedding_path(name, _KIND, partition) for partition in partitions]
    paths, first_rows = [tar_location(store, path) for path in relative], [0]
    fetched = None
    if tars is not None and not store.is_local:
        sources = [find_tar(path) for path in paths]
        fetched = FetchedVectors(tars.beside(sources, ("embeddings", "vectors")))
    for number, path in enumerate(relative):
        if fetched is not None:
            shape = fetched.shape(number)
        else:
            shape = _map(str(store.local_path(path))).shape
        if shape[1] != dim:
            raise DeclipError(
                f"neighbor_embeddings {name!r} are vectors of {shape[1]} numbers, but the "
                f"model's features have {dim}; embed with an encoder of that size, choose another "
                "model, or set neighbor_feature to caption."
            )
        first_rows.append(first_rows[-1] + shape[0])
    return StoredFeatures(
        name=name,
        dim=dim,
        paths=paths,
        partitions=partitions,
        first_rows=np.array(first_rows, np.int64),
        fetched=fetched,
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
    store: Store,
    name: str,
    *,
    dim: int,
    pool: SamplePool,
    tars: TarFiles,
    base: Path,
    key: str,
) -> tuple[StoredFeatures, NDArray[np.int64]]:
    """The text vectors of embeddings ``name``, and which of them each pair of a pool has.

    Args:
        store: the dataset.
        name: of the embeddings.
        dim: size of the model's features, which the stored ones must have.
        pool: whose keys are looked up.
        tars: of the dataset, whose cache the vectors share where it is remote.
        base: the cache.
        key: the pool's name there.

    Returns:
        The features; and (pool,) the row of each pair, -1 where it has none.

    Raises:
        DeclipError: see :func:`open_stored_features`; or files disagree.
    """
    features = open_stored_features(store, name, dim=dim, tars=tars)
    vectors = features.fetched.files.sources if features.fetched else map(find_tar, features.paths)
    beside = [layout.embedding_path(name, "metadata", part) for part in features.partitions]

    def build() -> tuple[Mapping[str, Chunks], Mapping[str, Any]]:
        found = np.full(len(pool), -1, np.int64)
        finder = RowFinder(pool.keys)
        for numbers in _groups(features.first_rows):
            keys = [_keys_of_file(store, features, number) for number in numbers]
            rows = finder(pa.chunked_array(keys, pa.large_string()))
            known = np.flatnonzero(rows >= 0)
            found[rows[known]] = features.first_rows[numbers[0]] + known
        return {"rows": [found]}, {"digest": features.digest()}

    identity = [[source.identity() for source in vectors], file_identities(store, beside)]
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
