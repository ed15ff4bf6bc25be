"""Which pairs are trained on, where their pictures lie, and what their neighbors say."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_shards import DeclipError, Store, image_places, layout, neighbor_tables, sidecars
from declip_shards.neighbor_tables import TableVersion
from declip_train.settings import TrainSettings
from declip_train.stored_features import StoredFeatures, load_stored_features

_OPEN_TARS = 128
"""Tars that stay open; a process may have about 1,000 files open, a dataset has more tars."""


class _OpenFile:
    """A file descriptor that is closed with its last user."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@dataclass(frozen=True, kw_only=True)
class TrainingSamples:
    """The selected samples in the order of their keys, as columns of equal length.

    Pictures stay in their tars; :meth:`read_image` fetches one by its place.
    """

    keys: Sequence[str]
    """Each sample's key."""
    captions: Sequence[str]
    """Each sample's own caption."""
    neighbor_captions: Sequence[tuple[str, ...]]
    """Captions of the sample's neighbors, nearest first; empty where it has none."""
    shard_of: Sequence[int]
    """Row of ``tar_paths`` that holds the picture."""
    offsets: Sequence[int]
    """First byte of the picture in its tar."""
    sizes: Sequence[int]
    """Bytes of the picture."""
    tar_paths: Sequence[str]
    """Local paths of the tars."""
    num_selected: int
    """Samples of the selection, before the splits were asked for."""
    stored: StoredFeatures | None = None
    """Stored vectors of the neighbors' captions, where they were asked for."""
    stored_rows: Sequence[int] | NDArray[np.int64] = ()
    """Rows of ``stored``: those of all neighbors of the first sample, of the second, ..."""
    table: TableVersion | None = None
    """The neighbor table that was read; None for none."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_without_neighbor(self) -> int:
        """Samples whose row of the neighbor table is empty."""
        return sum(not captions for captions in self.neighbor_captions)

    @cached_property
    def neighbor_starts(self) -> NDArray[np.int64]:
        """(samples + 1,): where a sample's neighbors begin in ``stored_rows`` and in
        ``neighbor_caption_ids``."""
        counts = np.fromiter(map(len, self.neighbor_captions), np.int64, len(self))
        return np.concatenate([np.zeros(1, np.int64), counts.cumsum()])

    @cached_property
    def _all_caption_ids(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        numbers: dict[str, int] = {}

        def ids(captions: Iterable[str]) -> NDArray[np.int64]:
            return np.fromiter((numbers.setdefault(c, len(numbers)) for c in captions), np.int64)

        own = ids(self.captions)
        return own, ids(chain.from_iterable(self.neighbor_captions))

    @property
    def caption_ids(self) -> NDArray[np.int64]:
        """(samples,): numbers that are equal where captions are, and only there."""
        return self._all_caption_ids[0]

    @property
    def neighbor_caption_ids(self) -> NDArray[np.int64]:
        """The neighbors' captions as such numbers, flat; see ``neighbor_starts``."""
        return self._all_caption_ids[1]

    @cached_property
    def _open(self) -> Callable[[str], _OpenFile]:
        return lru_cache(_OPEN_TARS)(_OpenFile)

    def read_image(self, index: int) -> bytes:
        """Encoded bytes of a sample's picture. Threads may call this at the same time.

        Raises:
            DeclipError: the tar has become shorter since it was listed.
        """
        path, size = self.tar_paths[self.shard_of[index]], self.sizes[index]
        file = self._open(path)
        data = os.pread(file.number, size, self.offsets[index])
        if len(data) != size:
            raise DeclipError(
                f"{path!r} was cut short during training at sample "
                f"{self.keys[index]!r}; rerun ingest for this shard."
            )
        return data

    def digest(self) -> str:
        """sha256 of what is trained on: keys, captions, neighbors, and the pictures' places."""
        digest = hashlib.sha256()
        columns = (self.keys, self.captions, self.neighbor_captions, self.offsets, self.sizes)
        for row in zip(*columns, strict=True):
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
        if self.stored is not None:
            digest.update(self.stored.digest().encode())
            digest.update(np.asarray(self.stored_rows, np.int64).tobytes())
        return digest.hexdigest()


def _selected_keys(store: Store, shard: str, selection: str) -> set[str] | None:
    """Keys that the selection keeps; None where every success is wanted."""
    if not selection:
        return None
    path = layout.selection_path(selection, shard)
    if not store.exists(path):
        raise DeclipError(
            f"{path!r} is missing: the selection {selection!r} does not cover shard {shard}; run "
            "the filter step, or name another selection (empty: every sample)."
        )
    rows = sidecars.read_rows(store, path, ["key", "keep"])
    return {row["key"] for row in rows if row["keep"]}


def _shard_rows(store: Store, shard: str, splits: Sequence[str]) -> list[dict[str, Any]]:
    """Key, caption (and split) of a shard's successes; a missing caption is an empty one, as it
    is for the embed step."""
    columns = ["key", "caption", "status", *(["split"] if splits else [])]
    rows = sidecars.read_rows(store, layout.shard_parquet_path(shard), columns)
    return [row | {"caption": row["caption"] or ""} for row in rows if row["status"] == "success"]


def _image_places(store: Store, shard: str, wanted: set[str]) -> list[tuple[str, int, int]]:
    """Key, first byte and number of bytes of the wanted pictures of a shard."""
    places = [place for place in image_places(store, shard) if place.key in wanted]
    if len(places) != len(wanted):
        raise DeclipError(
            f"shard {shard} lists {len(wanted)} wanted samples but its tar holds {len(places)} of "
            "them; rerun ingest for this shard."
        )
    return [(place.key, place.offset, place.size) for place in places]


def _read_neighbors(
    store: Store,
    version: TableVersion,
    shards: Sequence[str],
    captions: Mapping[str, str],
    wanted: Collection[str],
) -> dict[str, tuple[str, ...]]:
    """Neighbor keys by key. The table holds keys alone; what belongs to them is joined later."""
    joined: dict[str, tuple[str, ...]] = {}
    for shard in shards:
        path = layout.neighbors_path(version.folder, shard)
        table = neighbor_tables.read_lists(store, version, shard)
        keys, lists = table.column("key").to_pylist(), table.column("neighbor_keys").to_pylist()
        for key, near in zip(keys, lists, strict=True):
            for what, named in (("sample", (key,)), ("neighbor", near)):
                unknown = next((k for k in named if k not in captions), None)
                if unknown is not None:
                    raise DeclipError(
                        f"{path!r} names the {what} {unknown!r}, which no shard holds: the table "
                        "is of other shards; rerun the neighbors step."
                    )
            if key in wanted:
                joined[key] = tuple(near)
    return joined


def _read_stored(
    store: Store, name: str, dim: int, neighbors: Sequence[tuple[str, ...]]
) -> tuple[StoredFeatures, NDArray[np.int64]]:
    """Stored features, and the rows of all neighbors in order."""
    wanted = list(chain.from_iterable(neighbors))
    stored, row_of = load_stored_features(store, name, dim=dim, wanted=set(wanted))
    gone = next((key for key in wanted if key not in row_of), None)
    if gone is not None:
        raise DeclipError(
            f"embeddings {name!r} have no vector of the neighbor {gone!r}: they are of other "
            "samples than the neighbor table; rerun the embed step, or the index and neighbors "
            "steps after it."
        )
    return stored, np.fromiter((row_of[key] for key in wanted), np.int64, len(wanted))


def training_samples(settings: TrainSettings) -> TrainingSamples:
    """The samples that a run trains on, with what its method asks of their neighbors.

    The neighbors are those of the pipeline's own table, whatever was refreshed since: what a run is
    follows from it. :func:`with_table` brings in the others.

    Raises:
        DeclipError: see :func:`load_samples`.
    """
    return load_samples(
        settings.root,
        selection=settings.selection,
        splits=settings.splits,
        neighbors=settings.neighbors if settings.uses_index else None,
        neighbor_embeddings=settings.neighbor_embeddings if uses_stored(settings) else None,
        embed_dim=settings.model_config.embed_dim,
    )


def uses_stored(settings: TrainSettings) -> bool:
    """Whether stored vectors of the neighbors' captions are read."""
    return settings.uses_index and settings.neighbor_feature == "stored"


def embeddings_with(settings: TrainSettings, own: TableVersion, version: TableVersion) -> str:
    """Name of the stored vectors that belong to a table.

    Where the pipeline's table is of the very embeddings that training reads, a refreshed table
    brings its own; embeddings that the table has nothing to do with stay.
    """
    follows = version.is_refreshed and own.embeddings == settings.neighbor_embeddings
    return version.embeddings if follows else settings.neighbor_embeddings


def with_table(
    samples: TrainingSamples, settings: TrainSettings, own: TableVersion, version: TableVersion
) -> TrainingSamples:
    """The same samples with the neighbors of another table.

    Args:
        samples: of :func:`training_samples`.
        settings: the run.
        own: the pipeline's table.
        version: the table to read.

    Raises:
        DeclipError: a file of the table is missing, damaged, of another table or of other shards;
            or its stored vectors are missing or of another size.
    """
    store = Store(settings.root)
    shards = layout.list_shards(store)
    captions = {
        row["key"]: row["caption"] for shard in shards for row in _shard_rows(store, shard, ())
    }
    table = _read_neighbors(store, version, shards, captions, frozenset(samples.keys))
    near = [table.get(key, ()) for key in samples.keys]
    stored, stored_rows = None, np.empty(0, np.int64)
    if uses_stored(settings):
        name = embeddings_with(settings, own, version)
        stored, stored_rows = _read_stored(store, name, settings.model_config.embed_dim, near)
    return dataclasses.replace(
        samples,
        neighbor_captions=[tuple(captions[key] for key in keys) for keys in near],
        stored=stored,
        stored_rows=stored_rows,
        table=version,
    )


def load_samples(
    root: str,
    *,
    selection: str,
    splits: Sequence[str] = (),
    neighbors: str | None = None,
    neighbor_embeddings: str | None = None,
    embed_dim: int = 0,
) -> TrainingSamples:
    """List the training samples of a dataset folder.

    Args:
        root: the dataset folder; local, because pictures are read by their place.
        selection: name of the selection; empty for every success.
        splits: values of the column ``split`` to keep; empty keeps all.
        neighbors: name of the neighbor table, the pipeline's own; None for none.
        neighbor_embeddings: name of the embeddings that hold the neighbors' features; None where
            their captions are all that is asked for.
        embed_dim: size that these features must have.

    Raises:
        DeclipError: a folder or table is missing, nothing is selected, tables disagree, or stored
            features are of another size.
    """
    store = Store(root)
    shards = layout.list_shards(store)
    if not shards:
        raise DeclipError(f"{root!r} holds no finished shard; run ingest, or correct the folder.")
    all_captions: dict[str, str] = {}
    chosen: list[tuple[str, int, int, int]] = []
    num_selected = 0
    for number, shard in enumerate(shards):
        rows = _shard_rows(store, shard, splits)
        all_captions.update((row["key"], row["caption"]) for row in rows)
        keep = _selected_keys(store, shard, selection)
        selected = [row for row in rows if keep is None or row["key"] in keep]
        num_selected += len(selected)
        wanted = {row["key"] for row in selected if not splits or row["split"] in splits}
        if not wanted:
            continue
        chosen += [
            (key, number, first, size) for key, first, size in _image_places(store, shard, wanted)
        ]
    if not chosen:
        what = f"selection {selection!r}" if selection else "the shards"
        raise DeclipError(
            f"0 of {num_selected} samples of {what} are left for training with splits "
            f"{list(splits)}; loosen the filter's rules, or name other splits."
        )
    chosen.sort()
    version = neighbor_tables.read_version(store, neighbors) if neighbors else None
    table: dict[str, tuple[str, ...]] = {}
    if version is not None:
        own = {key for key, *_ in chosen}
        table = _read_neighbors(store, version, shards, all_captions, own)
    near = [table.get(key, ()) for key, *_ in chosen]
    stored, stored_rows = None, np.empty(0, np.int64)
    if neighbor_embeddings:
        stored, stored_rows = _read_stored(store, neighbor_embeddings, embed_dim, near)
    return TrainingSamples(
        keys=[key for key, *_ in chosen],
        captions=[all_captions[key] for key, *_ in chosen],
        neighbor_captions=[tuple(all_captions[key] for key in keys) for keys in near],
        shard_of=[number for _, number, _, _ in chosen],
        offsets=[offset for *_, offset, _ in chosen],
        sizes=[size for *_, size in chosen],
        tar_paths=[str(store.local_path(layout.tar_path(shard))) for shard in shards],
        num_selected=num_selected,
        stored=stored,
        stored_rows=stored_rows,
        table=version,
    )
