"""Which pairs are trained on, where their pictures lie, and what their neighbors say."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from declip_shards import DeclipError, Store, image_places, layout, sidecars


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
    _files: dict[int, int] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_without_neighbor(self) -> int:
        """Samples whose row of the neighbor table is empty."""
        return sum(not captions for captions in self.neighbor_captions)

    def read_image(self, index: int) -> bytes:
        """Encoded bytes of a sample's picture.

        Raises:
            DeclipError: the tar has become shorter since it was listed.
        """
        shard, size = self.shard_of[index], self.sizes[index]
        if shard not in self._files:
            self._files[shard] = os.open(self.tar_paths[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], size, self.offsets[index])
        if len(data) != size:
            raise DeclipError(
                f"{self.tar_paths[shard]!r} was cut short during training at sample "
                f"{self.keys[index]!r}; rerun ingest for this shard."
            )
        return data

    def digest(self) -> str:
        """sha256 of what is trained on: keys, captions, neighbors, and the pictures' places."""
        digest = hashlib.sha256()
        columns = (self.keys, self.captions, self.neighbor_captions, self.offsets, self.sizes)
        for row in zip(*columns, strict=True):
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
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
    """Key, caption (and split) of a shard's successes."""
    columns = ["key", "caption", "status", *(["split"] if splits else [])]
    rows = sidecars.read_rows(store, layout.shard_parquet_path(shard), columns)
    return [row for row in rows if row["status"] == "success"]


def _read_neighbors(
    store: Store, name: str, shards: Sequence[str], captions: dict[str, str]
) -> dict[str, tuple[str, ...]]:
    """Neighbor captions by key. The table holds keys; captions are joined here."""
    joined: dict[str, tuple[str, ...]] = {}
    for shard in shards:
        path = layout.neighbors_path(name, shard)
        if not store.exists(path):
            raise DeclipError(
                f"{path!r} is missing: the neighbor table {name!r} does not cover shard {shard}; "
                "run the neighbors step, or choose method clip."
            )
        for row in sidecars.read_rows(store, path, ["key", "neighbor_keys"]):
            unknown = [key for key in row["neighbor_keys"] if key not in captions]
            if unknown:
                raise DeclipError(
                    f"{path!r} names the neighbor {unknown[0]!r}, which no shard holds: the table "
                    "is of other shards; rerun the neighbors step."
                )
            joined[row["key"]] = tuple(captions[key] for key in row["neighbor_keys"])
    return joined


def load_samples(
    root: str, *, selection: str, splits: Sequence[str] = (), neighbors: str | None = None
) -> TrainingSamples:
    """List the training samples of a dataset folder.

    Args:
        root: the dataset folder; local, because pictures are read by their place.
        selection: name of the selection; empty for every success.
        splits: values of the column ``split`` to keep; empty keeps all.
        neighbors: name of the neighbor table; None for none.

    Raises:
        DeclipError: a folder or table is missing, nothing is selected, or tables disagree.
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
        places = [place for place in image_places(store, shard) if place.key in wanted]
        if len(places) != len(wanted):
            raise DeclipError(
                f"shard {shard} lists {len(wanted)} wanted samples but its tar holds "
                f"{len(places)} of them; rerun ingest for this shard."
            )
        chosen += [(place.key, number, place.offset, place.size) for place in places]
    if not chosen:
        what = f"selection {selection!r}" if selection else "the shards"
        raise DeclipError(
            f"0 of {num_selected} samples of {what} are left for training with splits "
            f"{list(splits)}; loosen the filter's rules, or name other splits."
        )
    table = _read_neighbors(store, neighbors, shards, all_captions) if neighbors else {}
    chosen.sort()
    return TrainingSamples(
        keys=[key for key, *_ in chosen],
        captions=[all_captions[key] for key, *_ in chosen],
        neighbor_captions=[table.get(key, ()) for key, *_ in chosen],
        shard_of=[number for _, number, _, _ in chosen],
        offsets=[offset for *_, offset, _ in chosen],
        sizes=[size for *_, size in chosen],
        tar_paths=[str(store.local_path(layout.tar_path(shard))) for shard in shards],
        num_selected=num_selected,
    )
