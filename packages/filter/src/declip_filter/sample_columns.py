"""Columns of signals over all shards as arrays, one column at a time.

Rows are the dataset's successes, through the shards in order and by key within a shard. Hex
digits become numbers, so that 15 million hashes are 120 MB and digests 240 MB.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_filter.index import progress
from declip_filter.signals import read_signal_columns, signal_columns
from declip_shards import DeclipError, Store, layout, sidecars

Rows = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

DIGEST_DIGITS = 32
"""Hex digits of a digest that are compared: 128 bits, beyond any chance of two alike."""


@dataclass(frozen=True)
class SampleColumns:
    """Reads columns of one set of signals; holds none of them."""

    store: Store
    signals: str
    shards: Sequence[str]

    @functools.cached_property
    def keys(self) -> pa.LargeStringArray:
        """Keys of all samples, in order."""
        parts = [self._read(shard, []).column("key").chunks for shard in self.shards]
        chunks = [chunk for part in parts for chunk in part]
        found = pa.chunked_array(chunks, pa.string()).cast(pa.large_string())
        return found.combine_chunks()

    @functools.cached_property
    def starts(self) -> Rows:
        """First row of each shard, and the number of all rows at the end: (shards + 1,)."""
        sizes = [
            sidecars.num_rows(self.store, layout.signals_path(self.signals, shard))
            for shard in self.shards
        ]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Columns that the signals have."""
        return frozenset(signal_columns(self.store, (self.signals,), self.shards[0]))

    def numbers(self, name: str) -> npt.NDArray[np.int64]:
        """A column of whole numbers; 0 where it is null."""
        parts = [part.fill_null(0).to_numpy() for part in self._parts(name)]
        return np.concatenate(parts).astype(np.int64)

    def hex_bytes(self, name: str, num_digits: int) -> tuple[Bytes, Mask]:
        """A column of hex digits as bytes, and where it is not null.

        Returns:
            uint8 (rows, num_digits / 2), zeros where null, and (rows,).

        Raises:
            DeclipError: a value is shorter, or not of hex digits; names the file.
        """
        found = np.zeros((self.num_rows, num_digits // 2), dtype=np.uint8)
        known = np.zeros(self.num_rows, dtype=np.bool_)
        for shard, start, part in zip(self.shards, self.starts, self._parts(name), strict=False):
            values = part.to_pylist()
            places = [place for place, value in enumerate(values) if value is not None]
            try:
                data = parse_hex([values[place] for place in places], num_digits)
            except ValueError as error:
                raise DeclipError(
                    f"{layout.signals_path(self.signals, shard)!r}: {name} {error}; rerun the "
                    "stage that measures."
                ) from error
            found[start + np.asarray(places, dtype=np.int64)] = data
            known[start + np.asarray(places, dtype=np.int64)] = True
        return found, known

    def downloaded_digests(self) -> tuple[Bytes, Mask]:
        """First 16 bytes of the sha256 of each file as it came, before ingest resized it."""
        found = np.zeros((self.num_rows, DIGEST_DIGITS // 2), dtype=np.uint8)
        known = np.zeros(self.num_rows, dtype=np.bool_)
        for shard, start, keys in zip(self.shards, self.starts, self._parts("key"), strict=False):
            path = layout.shard_parquet_path(shard)
            table = sidecars.read_table(self.store, path, ["key", "status", "sha256"])
            rows = table.filter(pa.compute.equal(table.column("status"), "success")).sort_by("key")
            if rows.column("key").to_pylist() != keys.to_pylist():
                raise DeclipError(
                    f"signals {self.signals!r} of shard {shard} are of other samples than the "
                    "shard holds now; rerun the stage that measures."
                )
            values = rows.column("sha256").to_pylist()
            places = [place for place, value in enumerate(values) if value]
            data = parse_hex([values[place] for place in places], DIGEST_DIGITS)
            found[start + np.asarray(places, dtype=np.int64)] = data
            known[start + np.asarray(places, dtype=np.int64)] = True
        return found, known

    def _parts(self, name: str) -> Iterator[pa.ChunkedArray]:
        """A column shard by shard."""
        for shard in progress(self.shards, len(self.shards), f"duplicates: read {name}"):
            yield self._read(shard, [name]).column(name)

    def _read(self, shard: str, columns: Sequence[str]) -> Any:
        return read_signal_columns(self.store, (self.signals,), shard, columns)


def parse_hex(values: Sequence[str], num_digits: int) -> Bytes:
    """The first ``num_digits`` hex digits of each value: uint8 (values, num_digits / 2).

    Raises:
        ValueError: a value is shorter, or not of hex digits.
    """
    cut = [value[:num_digits] for value in values]
    short = next((value for value in cut if len(value) < num_digits), None)
    if short is not None:
        raise ValueError(f"{short!r} is not of {num_digits} hex digits")
    try:
        data = bytes.fromhex("".join(cut))
    except ValueError:
        data = b""
    if len(data) * 2 != num_digits * len(cut):
        bad = next(v for v in cut if set(v.lower()) - set("0123456789abcdef"))
        raise ValueError(f"{bad!r} is not of {num_digits} hex digits")
    return np.frombuffer(data, dtype=np.uint8).reshape(len(cut), num_digits // 2)


def preference(samples: SampleColumns) -> Rows:
    """Place of each sample in the order in which the best is kept: 0 is kept before all others.

    The largest original picture (width by height) first; of those as large, the smallest key.
    """
    area = samples.numbers("original_width") * samples.numbers("original_height")
    keys = np.asarray(samples.keys.to_numpy(zero_copy_only=False), dtype=np.str_)
    by_key = np.arange(len(keys)) if (keys[1:] >= keys[:-1]).all() else np.argsort(keys).argsort()
    order = np.lexsort((by_key, -area))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order), dtype=np.int64)
    return rank
