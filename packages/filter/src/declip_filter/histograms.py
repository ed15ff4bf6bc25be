"""Distributions of signals, of all samples and of the kept ones, in one pass and little memory."""

import threading
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from declip_filter.evaluation import Column, Columns, kind_of

NUM_BINS = 40
"""Bins of a finished histogram, at most."""
MAX_VALUES = 200
"""Different texts of a signal whose values are counted; one with more has no histogram."""
TAIL = 0.002
"""Share of the samples at either end that the first and the last bin may gather."""
_SHIFT = np.uint32(18)
_NUM_CODES = 1 << 14
_SIGN = np.uint32(1 << 31)
_GREATEST = np.finfo(np.float32).max


class Histograms:
    """Counts of all numeric and boolean columns, and of some texts that have few values.

    Numbers are counted by the upper 14 bits of their single-precision form: 32 steps to the octave.
    A finished histogram joins such steps, so its counts are exact for its edges. Infinite numbers
    count as the greatest finite ones.
    """

    def __init__(self) -> None:
        self._codes: dict[str, npt.NDArray[np.int64]] = {}
        self._values: dict[str, tuple[Counter[Any], Counter[Any]] | None] = {}
        self._nulls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(
        self, columns: Columns, kept: npt.NDArray[np.bool_], texts: Collection[str] = ()
    ) -> None:
        """One shard; ``kept`` says which samples pass all rules.

        Of texts only those named are counted: others may be keys, captions or names of persons,
        which must not stand in a summary.
        """
        for name, column in columns.items():
            kind = kind_of(column.type)
            if kind == "number":
                self._add_numbers(name, column, kept)
                continue
            is_told = kind == "boolean" or (kind == "text" and name in texts)
            if is_told and self._values.get(name, ()) is not None:
                self._add_values(name, column, kept)

    def _add_numbers(self, name: str, column: Column, kept: npt.NDArray[np.bool_]) -> None:
        num_null = column.null_count
        if num_null:
            there = column.is_valid().to_numpy(zero_copy_only=False)
            column, kept = column.drop_null(), kept[there]
        with np.errstate(over="ignore"):
            numbers = column.to_numpy(zero_copy_only=False).astype(np.float32) + np.float32(0)
        numbers = np.clip(numbers, -_GREATEST, _GREATEST)
        bits = numbers.view(np.uint32)
        codes = np.where(bits & _SIGN, ~bits, bits | _SIGN) >> _SHIFT
        both = np.bincount((codes << np.uint32(1)) | kept, minlength=2 * _NUM_CODES)
        with self._lock:
            self._nulls[name] += num_null
            if name in self._codes:
                self._codes[name] += both
            else:
                self._codes[name] = both.astype(np.int64)

    def _add_values(self, name: str, column: Column, kept: npt.NDArray[np.bool_]) -> None:
        found = _value_counts(column)
        if len(found) > MAX_VALUES:
            with self._lock:
                self._values[name] = None
            return
        of_kept = _value_counts(column.filter(pa.array(kept)))
        with self._lock:
            held = self._values.setdefault(name, (Counter(), Counter()))
            if held is None:
                return
            self._nulls[name] += column.null_count
            held[0].update(found)
            held[1].update(of_kept)
            if len(held[0]) > MAX_VALUES:
                self._values[name] = None

    def result(self) -> dict[str, dict[str, Any]]:
        """By signal: ``edges`` (one more than bins), ``counts``, ``kept``, ``num_null``.

        For booleans and texts ``values`` takes the place of ``edges``, most frequent first.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, both in self._codes.items():
            if both.any():
                found[name] = {**_rebinned(both), "num_null": self._nulls[name]}
        for name, held in self._values.items():
            if held is None or not held[0]:
                continue
            values = _most_frequent(held[0])
            found[name] = {
                "values": values,
                "counts": [held[0][value] for value in values],
                "kept": [held[1][value] for value in values],
                "num_null": self._nulls[name],
            }
        return dict(sorted(found.items()))


def _most_frequent(counts: Mapping[Any, int]) -> list[Any]:
    """Values by how often they occur; those that occur as often, by themselves."""
    return sorted(counts, key=lambda value: (-counts[value], value))


def _value_counts(column: Column) -> Mapping[Any, int]:
    counted = pc.value_counts(column.drop_null())
    values, counts = counted.field(0).to_pylist(), counted.field(1).to_pylist()
    return dict(zip(values, counts, strict=True))


def _code_floor(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The least number of each code."""
    bits = codes.astype(np.uint32) << _SHIFT
    raw = np.where(bits & _SIGN, bits & ~_SIGN, ~bits).astype(np.uint32)
    with np.errstate(invalid="ignore"):
        numbers: npt.NDArray[np.float64] = raw.view(np.float32).astype(np.float64)
    return numbers


def _rebinned(both: npt.NDArray[np.int64]) -> dict[str, Any]:
    """A histogram of few bins, of even width save for the tails and the steps of the codes."""
    pairs = both.reshape(_NUM_CODES, 2)
    kept, counts = pairs[:, 1], pairs.sum(axis=1)
    used = np.flatnonzero(counts)
    total = np.cumsum(counts[used])
    low = used[np.searchsorted(total, total[-1] * TAIL, side="right")]
    high = used[np.searchsorted(total, total[-1] * (1 - TAIL), side="left")]
    floors = _code_floor(np.arange(_NUM_CODES))
    with np.errstate(invalid="ignore", over="ignore"):
        start, stop = floors[low], floors[min(high + 1, _NUM_CODES - 1)]
        inner = start + (stop - start) * np.arange(1, NUM_BINS) / NUM_BINS
    inner = inner[np.isfinite(inner)]
    cuts = np.searchsorted(floors[used[0] : used[-1] + 1], inner, side="left") + used[0]
    edges = np.unique(np.concatenate([[used[0]], cuts, [used[-1] + 1]]))
    edges = edges[(edges >= used[0]) & (edges <= used[-1] + 1)]
    return {
        "edges": [float(f"{value:.7g}") for value in _finite(floors[edges])],
        "counts": np.add.reduceat(counts, edges[:-1]).tolist(),
        "kept": np.add.reduceat(kept, edges[:-1]).tolist(),
    }


def _finite(edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Edges as JSON can hold them: what lies beyond the greatest number is that."""
    return np.clip(edges, -float(_GREATEST), float(_GREATEST))
