"""Which pairs are trained on, where their pictures lie, and what their neighbors say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from declip_shards import DeclipError, Store, layout, neighbor_tables, sidecars
from declip_shards.neighbor_tables import TableVersion
from declip_train.column_files import Chunks, cache_base, cached_columns, digest_of
from declip_train.dataset_files import finished_shards, open_dataset
from declip_train.foreign_shards import data_entries, foreign_pool
from declip_train.mixtures import epoch_length, parse_weights
from declip_train.sample_columns import (
    NeighborColumns,
    SamplePool,
    fingerprint_of,
    joined_neighbors,
    neighbors_digest,
)
from declip_train.sample_set import TrainingSamples
from declip_train.settings import TrainSettings
from declip_train.shard_listing import file_identities, own_pool
from declip_train.stored_features import join_stored_features
from declip_train.tar_cache import TarFiles

__all__ = [
    "TrainingSamples",
    "embeddings_with",
    "load_samples",
    "num_changed",
    "training_samples",
    "uses_stored",
    "with_table",
]

_GIGABYTE = 1e9
_DEFAULT_SELECTION = "default"
_KIND = "samples"
_NEIGHBORS_AT_ONCE = 30_000_000
"""Neighbors that are looked up together: 1 GB while they are."""
_COMPARED_AT_ONCE = 1 << 18


def _chosen(
    store: Store,
    shards: Sequence[str],
    pool: SamplePool,
    selection: str,
    splits: Sequence[str],
) -> tuple[dict[str, Chunks], dict[str, Any]]:
    """Rows of the pool that are trained on, ascending; and how many are selected."""
    rows: list[NDArray[np.int64]] = []
    num_selected = 0
    for number, shard in enumerate(shards):
        own = pool.rows_of_tar(number)
        if selection:
            own = own[_is_kept(store, shard, selection, pool, own)]
        num_selected += len(own)
        if splits:
            own = own[_is_in_splits(store, shard, splits, pool, own)]
        rows.append(own)
    chosen = np.sort(np.concatenate(rows)) if rows else np.empty(0, np.int64)
    meta: dict[str, Any] = {"num_selected": num_selected}
    if len(chosen):
        meta["fingerprint"] = fingerprint_of(pool, chosen, (len(chosen),))
    return {"rows": [chosen]}, meta


def _is_kept(
    store: Store, shard: str, selection: str, pool: SamplePool, rows: NDArray[np.int64]
) -> NDArray[np.bool_]:
    path = layout.selection_path(selection, shard)
    table = sidecars.read_table(store, path, ["key", "keep"])
    return _is_in(pool, rows, table.filter(table.column("keep")).column("key"))


def _is_in_splits(
    store: Store, shard: str, splits: Sequence[str], pool: SamplePool, rows: NDArray[np.int64]
) -> NDArray[np.bool_]:
    table = sidecars.read_table(store, layout.shard_parquet_path(shard), ["key", "split"])
    wanted = pc.is_in(table.column("split"), value_set=pa.array(list(splits), pa.string()))
    return _is_in(pool, rows, table.filter(wanted).column("key"))


def _is_in(pool: SamplePool, rows: NDArray[np.int64], keys: pa.ChunkedArray) -> NDArray[np.bool_]:
    wanted = keys.cast(pa.large_string()).combine_chunks()
    found: NDArray[np.bool_] = np.asarray(pc.is_in(pool.keys.take_arrow(rows), value_set=wanted))
    return found


def _check_selection(store: Store, shards: Sequence[str], selection: str) -> list[Any]:
    """What the selection is, going by its files."""
    if not selection:
        return []
    paths = [layout.selection_path(selection, shard) for shard in shards]
    identities = file_identities(store, paths)
    for shard, path, identity in zip(shards, paths, identities, strict=True):
        if identity is None:
            raise DeclipError(
                f"{path!r} is missing: the selection {selection!r} does not cover shard {shard}; "
                "run the filter step, or name another selection (empty: every sample)."
            )
    return identities


def _with_neighbors(
    samples: TrainingSamples,
    store: Store,
    shards: Sequence[str],
    version: TableVersion,
    base: Path,
    key: str,
) -> TrainingSamples:
    """The samples with the neighbors of a table."""
    paths = [layout.neighbors_path(version.folder, shard) for shard in shards]
    identities = file_identities(store, paths)

    def build() -> tuple[Mapping[str, Chunks], Mapping[str, Any]]:
        lists = (
            (path, neighbor_tables.read_lists(store, version, shard))
            for path, shard in zip(paths, shards, strict=True)
        )
        starts, rows = joined_neighbors(lists, samples.pool, samples.rows, _NEIGHBORS_AT_ONCE)
        near = NeighborColumns(starts=starts, rows=rows)
        meta = {"digest": neighbors_digest(samples.pool, near)}
        return {"starts": [starts], "rows": [rows]}, meta

    table_key = digest_of("near", key, version.folder, version.sha256, identities)
    columns = cached_columns(
        base, _KIND, table_key, build, what=f"the neighbors of table {version.folder!r}"
    )
    near = NeighborColumns(
        starts=columns["starts"], rows=columns["rows"], known_digest=columns.meta["digest"]
    )
    return dataclasses.replace(samples, near=near, table=version)


def _with_stored(
    samples: TrainingSamples, store: Store, name: str, dim: int, base: Path
) -> TrainingSamples:
    """The samples with stored vectors of their neighbors."""
    assert samples.near is not None
    stored, of_pool = join_stored_features(
        store,
        name,
        dim=dim,
        pool=samples.pool,
        tars=samples.tars,
        base=base,
        key=samples.pool_key,
    )
    for first in range(0, len(samples.near.rows), 1 << 20):
        rows = samples.near.rows[first : first + (1 << 20)]
        gone = np.flatnonzero(of_pool[rows] < 0)
        if gone.size:
            raise DeclipError(
                f"embeddings {name!r} have no vector of the neighbor "
                f"{samples.pool.keys[int(rows[gone[0]])]!r}: they are of other samples than the "
                "neighbor table; rerun the embed step, or the index and neighbors steps after it."
            )
    return dataclasses.replace(samples, stored=stored, stored_of_pool=of_pool)


def training_samples(settings: TrainSettings) -> TrainingSamples:
    """The samples that a run trains on, with what its method asks of their neighbors.

    The neighbors are those of the pipeline's own table, whatever was refreshed since: what a run is
    follows from it. :func:`with_table` brings in the others.

    Raises:
        DeclipError: see :func:`load_samples`.
    """
    if settings.train_data:
        return _foreign_samples(settings)
    return load_samples(
        settings.dataset,
        selection=settings.selection,
        splits=settings.splits,
        neighbors=settings.neighbors if settings.uses_index else None,
        neighbor_embeddings=settings.neighbor_embeddings if uses_stored(settings) else None,
        embed_dim=settings.model_config.embed_dim,
        cache=settings.cache,
        cache_gigabytes=settings.cache_gigabytes,
    )


def _foreign_samples(settings: TrainSettings) -> TrainingSamples:
    """The pairs of ``train_data``.

    Raises:
        DeclipError: something is asked of them that only a dataset of ours has; see also
            :func:`foreign_pool`.
    """
    if settings.uses_index:
        raise DeclipError(
            f"method {settings.method} reads the neighbor table {settings.neighbors!r}, but "
            "train_data are tars that have none; set neighbor_source to bank, or choose method "
            "clip, slip or filip."
        )
    for name, value in (("splits", list(settings.splits)), ("selection", settings.selection)):
        if value and value != _DEFAULT_SELECTION:
            raise DeclipError(
                f"{name} is {value!r}, but train_data are tars that have no tables for it; leave "
                "it out, or train on a dataset of ours."
            )
    entries = data_entries(settings.train_data)
    weights = parse_weights(data_entries(settings.data_weights), entries)
    base, room = cache_base(settings.cache), settings.cache_gigabytes * _GIGABYTE
    found = foreign_pool(entries, base, room)
    for entry, weight, size in zip(entries, weights, found.part_sizes, strict=True):
        if not epoch_length([size], [weight]):
            raise DeclipError(
                f"data_weights has {weight:g} for {entry!r}, of whose {size} pairs an epoch would "
                f"meet none; raise it to {1 / size:.3g} at least, or leave the entry out of "
                "train_data."
            )
    rows = np.arange(len(found.pool))
    return TrainingSamples(
        pool=found.pool,
        rows=rows,
        tars=TarFiles(found.sources, base, room),
        num_selected=len(rows),
        part_sizes=found.part_sizes,
        weights=weights,
        known_fingerprint=found.fingerprint,
        pool_key=found.key,
        choice_key=found.key,
        dropped=found.dropped,
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
        samples: of ``training_samples``.
        settings: the run.
        own: the pipeline's table.
        version: the table to read.

    Raises:
        DeclipError: a file of the table is missing, damaged, of another table or of other shards;
            or its stored vectors are missing or of another size.
    """
    store, base = open_dataset(settings.dataset), cache_base(settings.cache)
    shards = samples.pool.meta["shards"]
    found = _with_neighbors(samples, store, shards, version, base, samples.choice_key)
    if uses_stored(settings):
        name = embeddings_with(settings, own, version)
        found = _with_stored(found, store, name, settings.model_config.embed_dim, base)
    return found


def num_changed(before: TrainingSamples, after: TrainingSamples) -> int:
    """Samples whose neighbors' captions are not the same, in number, order or words.

    Args:
        before: samples with a neighbor table.
        after: the same samples with another.
    """
    changed = 0
    for first in range(0, len(before), _COMPARED_AT_ONCE):
        indices = np.arange(first, min(first + _COMPARED_AT_ONCE, len(before)))
        counts = before.neighbor_counts(indices)
        others = counts != after.neighbor_counts(indices)
        same = indices[~others]
        owners = np.repeat(np.arange(len(same)), counts[~others])
        places = np.arange(len(owners)) - np.searchsorted(owners, owners)
        pair = [each.neighbor_caption_ids_of(same[owners], places) for each in (before, after)]
        differs = np.unique(owners[pair[0] != pair[1]])
        changed += int(others.sum()) + len(differs)
    return changed


def load_samples(
    root: str,
    *,
    selection: str,
    splits: Sequence[str] = (),
    neighbors: str | None = None,
    neighbor_embeddings: str | None = None,
    embed_dim: int = 0,
    cache: str | None = None,
    cache_gigabytes: float = 50.0,
) -> TrainingSamples:
    """List the training samples of a dataset folder, or map the list that was made before.

    Args:
        root: the dataset folder; at any fsspec URL.
        selection: name of the selection; empty for every success.
        splits: values of the column ``split`` to keep; empty keeps all.
        neighbors: name of the neighbor table, the pipeline's own; None for none.
        neighbor_embeddings: name of the embeddings that hold the neighbors' features; None where
            their captions are all that is asked for.
        embed_dim: size that these features must have.
        cache: folder of lists and remote tars; see ``cache_base``.
        cache_gigabytes: room for remote tars.

    Raises:
        DeclipError: a folder or table is missing, nothing is selected, tables disagree, or stored
            features are of another size.
    """
    store, base = open_dataset(root), cache_base(cache)
    shards = finished_shards(store)
    room = cache_gigabytes * _GIGABYTE
    pool_key, pool, sources = own_pool(store, shards, base, room)
    identities = _check_selection(store, shards, selection)
    choice_key = digest_of("choice", pool_key, selection, identities, list(splits))
    choice = cached_columns(
        base,
        _KIND,
        choice_key,
        lambda: _chosen(store, shards, pool, selection, splits),
        what="the list of selected samples",
    )
    num_selected, rows = choice.meta["num_selected"], choice["rows"]
    if not len(rows):
        what = f"selection {selection!r}" if selection else "the shards"
        raise DeclipError(
            f"0 of {num_selected} samples of {what} are left for training with splits "
            f"{list(splits)}; loosen the filter's rules, or name other splits."
        )
    samples = TrainingSamples(
        pool=pool,
        rows=rows,
        tars=TarFiles(sources, base, room),
        num_selected=num_selected,
        part_sizes=(len(rows),),
        weights=(1.0,),
        known_fingerprint=choice.meta["fingerprint"],
        pool_key=pool_key,
        choice_key=choice_key,
    )
    if neighbors:
        version = neighbor_tables.read_version(store, neighbors)
        samples = _with_neighbors(samples, store, shards, version, base, choice_key)
    if neighbor_embeddings:
        samples = _with_stored(samples, store, neighbor_embeddings, embed_dim, base)
    return samples
