"""The samples that a model was trained on, and what their pictures are told by.

Rows are the samples of a dataset that are in the selection and in the splits that were trained
on, through the shards in order and by key within a shard.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from declip_filter.duplicate_rungs import Looks
from declip_filter.sample_columns import DIGEST_DIGITS, Bytes, Mask, Rows, parse_hex
from declip_filter.selection import selected_keys
from declip_filter.signals import read_signal_columns, shard_tasks, signal_columns
from declip_shards import DeclipError, Store, layout, sidecars
from declip_shards.errors import did_you_mean

CONFIG = "train/config.json"
"""Where a training run says what it was trained on."""
HASHES = ("image_phash", "image_dhash")
"""The surer one first."""


@dataclass(frozen=True)
class TrainedRows:
    """What a dataset holds of a model's training; reads columns when they are asked for."""

    store: Store
    shards: tuple[str, ...]
    selection: str
    """Empty: every sample."""
    splits: tuple[str, ...]
    """Values of the column `split`; empty: all."""

    @functools.cached_property
    def _keys_of_shards(self) -> list[pa.StringArray]:
        return [self._keys_of(shard) for shard in self.shards]

    def _keys_of(self, shard: str) -> pa.StringArray:
        """Keys of a shard's rows, sorted; as an array, which takes a fifth of a list's memory."""
        columns = ["key", "status", *(("split",) if self.splits else ())]
        table = sidecars.read_table(self.store, layout.shard_parquet_path(shard), columns)
        table = table.filter(pc.equal(table.column("status"), "success"))
        if self.splits:
            wanted = pa.array(self.splits, pa.string())
            table = table.filter(pc.is_in(table.column("split"), value_set=wanted))
        if self.selection:
            kept = pa.array(selected_keys(self.store, self.selection, shard), pa.string())
            table = table.filter(pc.is_in(table.column("key"), value_set=kept))
        return table.sort_by("key").column("key").cast(pa.string()).combine_chunks()

    @functools.cached_property
    def starts(self) -> Rows:
        """First row of each shard, and the number of all rows at the end: (shards + 1,)."""
        counts = [len(keys) for keys in self._keys_of_shards]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def key(self, row: int) -> str:
        """A row's key."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return str(self._keys_of_shards[number][row - int(self.starts[number])])

    def rows_of(self, number: int, keys: pa.Array) -> Rows:
        """Rows of some keys of a shard; -1 where one is not trained on.

        Args:
            number: of the shard, in `shards`.
            keys: string array.
        """
        places = pc.index_in(keys.cast(pa.string()), value_set=self._keys_of_shards[number])
        found = np.asarray(places.fill_null(-1)).astype(np.int64)
        return np.where(found < 0, -1, found + self.starts[number])

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over the keys, and the digests of the files as they came: what was trained on."""
        digests, known = self.downloaded_digests
        content = hashlib.sha256()
        row = 0
        for keys in self._keys_of_shards:
            for key in keys.to_pylist():
                content.update(key.encode() + b"\0")
                content.update(digests[row].tobytes() if known[row] else b"\0")
                row += 1
        return content.hexdigest()

    @functools.cached_property
    def downloaded_digests(self) -> tuple[Bytes, Mask]:
        """First 16 bytes of the sha256 of each file as it came: (rows, 16), and where known."""
        return self._hex("sha256", DIGEST_DIGITS, None)

    def _hex(self, name: str, num_digits: int, signals: str | None) -> tuple[Bytes, Mask]:
        """A column of hex digits as bytes (rows, digits / 2), and where it is known."""
        found = np.zeros((len(self), num_digits // 2), dtype=np.uint8)
        known = np.zeros(len(self), dtype=np.bool_)
        for number, shard in enumerate(self.shards):
            table = self._column(shard, name, signals)
            if table is None:
                continue
            values = table.column(name)
            table = table.filter(pc.is_valid(values))
            rows = self.rows_of(number, table.column("key").combine_chunks())
            texts = table.column(name).to_pylist()
            places = [place for place, text in enumerate(texts) if text and rows[place] >= 0]
            try:
                data = parse_hex([texts[place] for place in places], num_digits)
            except ValueError as error:
                raise DeclipError(
                    f"shard {shard} of the training data: {name} {error}; rerun the stage that "
                    "writes it."
                ) from error
            found[rows[places]] = data
            known[rows[places]] = True
        return found, known

    def _column(self, shard: str, name: str, signals: str | None) -> Any:
        """``key`` and a column of the shard's own table, or of its signals; None without it."""
        if signals is not None:
            return read_signal_columns(self.store, (signals,), shard, [name])
        path = layout.shard_parquet_path(shard)
        try:
            return sidecars.read_table(self.store, path, ["key", name])
        except DeclipError:
            # img2dataset writes sha256 when it was asked to; that the table can be read is known.
            return None

    @functools.cached_property
    def signals(self) -> str | None:
        """Name of the signals with pictures' hashes; ``basic`` before others."""
        names = sorted(self.store.list_folders("signals"), key=lambda name: (name != "basic", name))
        for name in names:
            if all(self.store.exists(layout.signals_path(name, s)) for s in self.shards):
                columns = signal_columns(self.store, (name,), self.shards[0])
                if any(known in columns for known in HASHES):
                    return name
        return None

    @functools.cached_property
    def signal_columns(self) -> frozenset[str]:
        """Columns of the signals; empty without any."""
        if self.signals is None:
            return frozenset()
        return frozenset(signal_columns(self.store, (self.signals,), self.shards[0]))

    def stored_digests(self) -> tuple[Bytes, Mask]:
        """First 16 bytes of the sha256 of each picture as stored: (rows, 16), and where known."""
        if "image_sha256" not in self.signal_columns:
            digits = np.zeros((len(self), DIGEST_DIGITS // 2), dtype=np.uint8)
            return digits, np.zeros(len(self), dtype=np.bool_)
        return self._hex("image_sha256", DIGEST_DIGITS, self.signals)

    @property
    def picture_hash(self) -> str | None:
        """The column of hashes; None without any."""
        return next((name for name in HASHES if name in self.signal_columns), None)

    def looks(self) -> tuple[Looks, Mask]:
        """What each stored picture looks like, and where that is known; needs `picture_hash`."""
        signals, name = self.signals, self.picture_hash
        assert signals is not None
        assert name is not None
        hashes, known = self._hex(name, 16, signals)
        layouts: Bytes | None = None
        if "image_layout" in self.signal_columns:
            layouts, has_layout = self._hex("image_layout", 32, signals)
            known &= has_layout
        sizes = np.zeros((len(self), 2), dtype=np.int64)
        for number, shard in enumerate(self.shards):
            names = ["width", "height"]
            table = read_signal_columns(self.store, (signals,), shard, names)
            rows = self.rows_of(number, table.column("key").combine_chunks())
            both = np.stack([table.column(n).fill_null(0).to_numpy() for n in names], axis=1)
            sizes[rows[rows >= 0]] = both[rows >= 0]
        known &= (sizes > 0).all(axis=1)
        width, height = np.maximum(sizes, 1).T
        numbers = hashes.view(">u8")[:, 0].astype(np.uint64)
        aspects = (width / height).astype(np.float32)
        return Looks(hashes=numbers, layouts=layouts, aspects=aspects), known


def trained_rows(train_root: str, selection: str | None = None) -> TrainedRows:
    """The samples of a dataset that a model was trained on.

    Args:
        train_root: the dataset's folder, any fsspec URL.
        selection: name of the selection that was trained on, empty for every sample. None: the
            training run in the folder says which; without one, ``default`` where there is such a
            selection, and else every sample.

    Raises:
        DeclipError: no shard, no such selection, nothing trained on, or a training run that says
            that it read other shards.
    """
    shards = tuple(shard_tasks(train_root))
    store = Store(train_root)
    config = _config(store)
    if config.get("train_data"):
        raise DeclipError(
            f"the training run in {train_root!r} read other shards (train_data "
            f"{config['train_data'][0]!r}) and not this dataset's; give --train-data the dataset "
            "that they are of."
        )
    known = store.list_folders("selection")
    if selection is None:
        default = "default" if "default" in known else ""
        selection = str(config.get("selection", default))
    if selection and selection not in known:
        near = did_you_mean(selection, known)
        raise DeclipError(f"there is no selection {selection!r} in {train_root!r}.{near}")
    found = TrainedRows(store, shards, selection, tuple(config.get("splits", ())))
    if not len(found):
        raise DeclipError(
            f"{train_root!r} has no sample that was trained on (selection {selection!r}, splits "
            f"{', '.join(found.splits) or 'all'}); name another selection."
        )
    return found


def _config(store: Store) -> dict[str, Any]:
    """Settings of the training run that lies in the dataset's folder; empty without one.

    Raises:
        DeclipError: the file is damaged.
    """
    if not store.exists(CONFIG):
        return {}
    try:
        content = json.loads(store.read_bytes(CONFIG))
    except ValueError as error:
        raise DeclipError(f"{CONFIG!r} is damaged ({error}); run the training again.") from error
    return content if isinstance(content, dict) else {}
