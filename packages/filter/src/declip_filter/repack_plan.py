"""Which sample goes into which output shard, worked out from the selection alone.

Every process works the same plan out by itself: it depends on nothing but the shards' names and the
keys that the selection keeps, so that tasks may run anywhere, in any order, and again.
"""

import functools
import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from declip_filter.selection import require_selection, selected_keys
from declip_filter.signals import shard_tasks
from declip_shards import DeclipError, Store, energon, layout, manifest
from declip_shards.manifest import canonical_json

Keys = npt.NDArray[np.bytes_]
"""Sample keys as UTF-8 bytes."""

FOLDER = "repacked"
"""Repacked datasets of a workspace lie here, a folder each."""
CARRIED = ("signals", "selection", "embeddings", "index", "neighbors")
"""Folders whose files can be carried over."""
_TABLE = re.compile(r"[0-9]+\.parquet")
_EMBEDDING_FOLDERS = ("img_emb", "metadata", "parts", "text_emb")
_PLAIN_FOLDERS = ("signals", "selection", "neighbors")


def target_folder(name: str) -> str:
    """Where a repacked dataset lies in its workspace."""
    return f"{FOLDER}/{name}"


def target_store(store: Store, name: str) -> Store:
    """The repacked dataset as a dataset of its own."""
    return Store(f"{store.url.rstrip('/')}/{target_folder(name)}")


def as_keys(keys: Sequence[str]) -> Keys:
    """Keys as an array of bytes, in the same order."""
    return np.asarray([key.encode() for key in keys], dtype=np.bytes_)


@dataclass(frozen=True)
class Piece:
    """What one output shard takes out of one input shard."""

    shard: str
    """The input shard."""
    keys: Keys
    """Samples taken, ascending."""

    def names(self) -> list[str]:
        """The keys as text."""
        return [key.decode() for key in self.keys.tolist()]


@dataclass(frozen=True)
class RepackPlan:
    """The kept samples of all input shards in order, cut into output shards of nearly one size."""

    shards: tuple[str, ...]
    """Input shards, in order."""
    keys: tuple[Keys, ...]
    """Kept keys of each, ascending."""
    shard_size: int
    """Most samples of an output shard."""

    @functools.cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """Place of each input shard's first kept sample, and the number of all: (shards + 1,)."""
        return np.concatenate([[0], np.cumsum([len(k) for k in self.keys])]).astype(np.int64)

    @property
    def num_samples(self) -> int:
        return int(self.starts[-1])

    @functools.cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """First sample of each output shard, and the number of all; sizes differ by at most one."""
        num_shards = -(-self.num_samples // self.shard_size)
        return np.asarray(
            [number * self.num_samples // num_shards for number in range(num_shards + 1)], np.int64
        )

    @functools.cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the output shards, in order."""
        return tuple(layout.shard_name(number) for number in range(len(self.bounds) - 1))

    def num_in(self, output: str) -> int:
        """Samples of an output shard."""
        number = int(output)
        return int(self.bounds[number + 1] - self.bounds[number])

    def pieces(self, output: str) -> Iterator[Piece]:
        """What an output shard is made of, in order."""
        first, last = self.bounds[int(output)], self.bounds[int(output) + 1]
        for number, shard in enumerate(self.shards):
            start = max(int(first - self.starts[number]), 0)
            stop = min(int(last - self.starts[number]), len(self.keys[number]))
            if start < stop:
                yield Piece(shard, self.keys[number][start:stop])

    @functools.cached_property
    def _ranked(self) -> tuple[Keys, npt.NDArray[np.int64]]:
        """All kept keys ascending, and the place of each in the order of the output."""
        joined = np.concatenate(self.keys)
        order = np.argsort(joined, kind="stable").astype(np.int64)
        return joined[order], order

    def places(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Place of each key in the order of the output, -1 for one that is not kept."""
        ranked, order = self._ranked
        if not len(keys):
            return np.empty(0, np.int64)
        found = np.minimum(np.searchsorted(ranked, keys), len(ranked) - 1)
        return np.where(ranked[found] == keys, order[found], -1).astype(np.int64)

    def output_of(self, places: npt.NDArray[np.int64]) -> list[str]:
        """Output shard of each place of :meth:`places`; all must be kept ones."""
        numbers = np.searchsorted(self.bounds, places, side="right") - 1
        return [self.outputs[number] for number in numbers.tolist()]

    def check_unique(self) -> None:
        """Refuse keys that two samples share: they would be one sample in a reader's eyes.

        Raises:
            DeclipError: names the key and the shards.
        """
        ranked, order = self._ranked
        twice = np.flatnonzero(ranked[1:] == ranked[:-1])
        if twice.size:
            places = order[twice[0] : twice[0] + 2]
            numbers = np.searchsorted(self.starts, places, side="right") - 1
            first, second = (self.shards[number] for number in sorted(numbers.tolist()))
            raise DeclipError(
                f"sample {ranked[twice[0]].decode()!r} is in shard {first} and in shard {second}; "
                "keys must be unique in the whole dataset: drop one of the two by a selection."
            )


def plan_repack(store: Store, selection: str, shard_size: int) -> RepackPlan:
    """Work the plan out; ``selection=""`` means every downloaded sample.

    Raises:
        DeclipError: there is no shard, the selection is missing or keeps nothing, or two samples
            share a key.
    """
    shards = shard_tasks(store.url)
    require_selection(store, selection, shards)
    keys = tuple(as_keys(selected_keys(store, selection, shard)) for shard in shards)
    plan = RepackPlan(tuple(shards), keys, shard_size)
    plan.check_unique()
    return plan


def known_digests(store: Store) -> dict[str, str]:
    """sha256 of the files that the manifests of finished steps list."""
    found: dict[str, str] = {}
    for name in store.list("manifests", ".json"):
        step = name.removesuffix(".json")
        done = None if step.endswith(".run") else manifest.read_manifest(store, step)
        found |= {record.path: record.sha256 for record in done.files} if done else {}
    return found


def carried_files(store: Store, carry: Sequence[str]) -> list[str]:
    """The files beside the shards that a repack reads, by path."""
    found = []
    for folder in carry:
        for name in store.list_folders(folder):
            base = f"{folder}/{name}"
            if folder == "index":
                found += [f"{base}/{n}" for n in ("index.faiss", "info.json", "rows.parquet")]
            elif folder == "embeddings":
                for kind in _EMBEDDING_FOLDERS:
                    found += [f"{base}/{kind}/{n}" for n in store.list(f"{base}/{kind}")]
            else:
                found += [f"{base}/{n}" for n in store.list(base) if _TABLE.fullmatch(n)]
    return sorted(path for path in found if store.exists(path))


def inputs_digest(store: Store, selection: str, carry: Sequence[str]) -> str:
    """sha256 over what a repack reads: another one is another repack.

    Digests are those of the manifests; a file that none of them lists is hashed, but a tar, which
    is known by its size then.
    """
    known = known_digests(store)
    said: dict[str, str] = {}
    for shard in layout.list_shards(store):
        tar, table = layout.tar_path(shard), layout.shard_parquet_path(shard)
        said[tar] = known.get(tar) or f"{store.size(tar)} bytes"
        said[table] = known.get(table) or store.sha256(table)
        chosen = layout.selection_path(selection, shard) if selection else ""
        if chosen and store.exists(chosen):
            said[chosen] = store.sha256(chosen)
    for path in carried_files(store, carry):
        said.setdefault(path, known.get(path, "") or store.sha256(path))
    return hashlib.sha256(canonical_json(said)).hexdigest()


def estimate_bytes(store: Store, plan: RepackPlan, carry: Sequence[str]) -> int:
    """About how many bytes the repacked dataset has: each file's size by the share it keeps.

    A tar's samples are taken to be of one size; where all of a shard is kept it is exact.
    """
    counts = energon.count_samples(store, plan.shards)
    total = 0.0
    for shard, keys in zip(plan.shards, plan.keys, strict=True):
        share = len(keys) / max(counts[f"{shard}.tar"], 1)
        for path in (layout.tar_path(shard), layout.shard_parquet_path(shard)):
            total += share * store.size(path)
    share = plan.num_samples / max(sum(counts.values()), 1)
    for path in carried_files(store, carry):
        # What lies beside the shards may be of the selected samples alone already.
        total += store.size(path) * (share if path.partition("/")[0] in _PLAIN_FOLDERS else 1.0)
    return round(total)


def replaced_bytes(target: Store) -> int:
    """Bytes of the tars of an earlier repack, which make room for those of another one."""
    return sum(target.size(layout.tar_path(shard)) for shard in layout.list_shards(target))


def check_space(store: Store, name: str, num_bytes: int, num_replaced: int = 0) -> None:
    """Refuse to begin what the disk cannot hold; where the disk is remote nobody knows.

    Args:
        store: the input.
        name: of the repacked dataset.
        num_bytes: that will be written.
        num_replaced: that are there and go before.

    Raises:
        DeclipError: fewer bytes are free where the workspace lies.
    """
    if not store.is_local:
        return
    place = Path(store.root)
    free = shutil.disk_usage(place).free + num_replaced
    if num_bytes > free:
        raise DeclipError(
            f"repacking to {target_folder(name)!r} will write about {size_text(num_bytes)}, and "
            f"{size_text(free)} are free in {store.url!r}; make space, or keep fewer samples by "
            "another selection."
        )


def size_text(num_bytes: float) -> str:
    """``1536 -> "1.5 KB"``, in powers of 1000."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
