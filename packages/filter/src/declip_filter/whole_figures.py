"""Figures of a whole dataset that are exact and found in bounded memory, a shard at a time.

Each search takes any number of passes over one column and asks for another pass until it is done.
What is added in a pass may come in any order, so neither the order of shards nor the number of
threads changes the outcome.
"""

import ast
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_filter.evaluation import Column
from declip_filter.expressions import Expression, WholeFigure, constant_of
from declip_filter.text_hash import Hashes, hash_column

MAX_CANDIDATES = 1 << 21
"""Values that a search for a rank holds at once: 16 MiB."""
MAX_HASHES = 1 << 23
"""Hashes that a count holds at once, about: 64 MiB, and as much again to sort them."""
_LEVEL_BITS = 20
_SIGN = np.uint64(1 << 63)


def ordered_bits(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """Doubles as whole numbers of the same order; -0.0 counts as 0.0."""
    bits = (values + 0.0).view(np.uint64)
    flipped: npt.NDArray[np.uint64] = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return flipped


def from_ordered_bits(value: int) -> float:
    """The double that :func:`ordered_bits` made ``value`` of."""
    bits = value & ~(1 << 63) if value >> 63 else ~value & (2**64 - 1)
    return float(np.array([bits], dtype=np.uint64).view(np.float64)[0])


class RankSearch:
    """The value of a given rank among all of a column's, by radix: 20 bits a pass, then a sort.

    The first pass counts values by their highest bits; when few enough share the bits of the one
    that is sought, the next pass collects those.
    """

    def __init__(self, fraction: float, *, is_top: bool) -> None:
        self.fraction = fraction
        self.is_top = is_top
        self.limit: float | None = None
        """The least value of the highest fraction, or the greatest of the lowest."""
        self.is_done = False
        self.num_values = 0
        self._rank = 0
        self._prefix, self._prefix_bits = 0, 0
        self._counts: dict[int, int] = {}
        self._candidates: list[npt.NDArray[np.uint64]] = []
        self._collects = False
        self._lock = threading.Lock()

    def add(self, column: Column) -> None:
        """One shard's values; missing ones do not count, nor do infinite ones: a limit is finite,
        and they lie beyond it."""
        numbers = column.drop_null().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        numbers = numbers[np.isfinite(numbers)]
        bits = ordered_bits(numbers)
        if self._prefix_bits:
            bits = bits[bits >> np.uint64(64 - self._prefix_bits) == self._prefix]
        if self._collects:
            with self._lock:
                self._candidates.append(bits)
            return
        place = np.uint64(64 - self._prefix_bits - self._level())
        digits, counts = np.unique(bits >> place, return_counts=True)
        with self._lock:
            for digit, count in zip(digits.tolist(), counts.tolist(), strict=True):
                self._counts[digit] = self._counts.get(digit, 0) + count

    def end_pass(self) -> None:
        """All shards were added once."""
        if self._collects:
            found = np.sort(np.concatenate(self._candidates))
            self.limit = from_ordered_bits(int(found[self._rank]))
            self.is_done = True
            return
        if not self._prefix_bits:
            self.num_values = sum(self._counts.values())
            if not self.num_values:
                self.is_done = True
                return
            wanted = max(int(self.fraction * self.num_values + 0.5), 1)
            self._rank = self.num_values - wanted if self.is_top else wanted - 1
        self._prefix_bits += self._level()
        for digit in sorted(self._counts):
            if self._rank < self._counts[digit]:
                self._prefix = digit
                break
            self._rank -= self._counts[digit]
        self._collects = self._counts[self._prefix] <= MAX_CANDIDATES
        self._counts = {}
        if self._prefix_bits == 64:
            self.limit, self.is_done = from_ordered_bits(self._prefix), True

    def _level(self) -> int:
        return min(_LEVEL_BITS, 64 - self._prefix_bits)


@dataclass(frozen=True)
class ValueCounts:
    """How often values occur: those that matter, by the hash of the value."""

    hashes: Hashes
    """Sorted."""
    counts: npt.NDArray[np.int64]
    least: int
    """Values that occur less often are left out, and count as 1."""

    def __call__(self, column: Column) -> pa.Int64Array:
        """The count of each value; missing where the value is."""
        found = np.ones(len(column), dtype=np.int64)
        if len(self.hashes):
            wanted = hash_column(column)
            at = np.searchsorted(self.hashes, wanted)
            at[at == len(self.hashes)] = 0
            hit = self.hashes[at] == wanted
            found[hit] = self.counts[at[hit]]
        return pa.array(found, mask=column.is_null().to_numpy(zero_copy_only=False))


class CountSearch:
    """Counts of a column's values: as many passes as keep the hashes of one pass within limits."""

    def __init__(self, least: int, num_samples: int, max_hashes: int = MAX_HASHES) -> None:
        self.least = least
        self.num_passes = max(-(-num_samples // max_hashes), 1)
        self.is_done = False
        self._pass = 0
        self._hashes: list[Hashes] = []
        self._found: list[tuple[Hashes, npt.NDArray[np.int64]]] = []
        self._lock = threading.Lock()

    def add(self, column: Column) -> None:
        """One shard's values; missing ones do not count."""
        hashes = hash_column(column.drop_null())
        if self.num_passes > 1:
            hashes = hashes[hashes % np.uint64(self.num_passes) == self._pass]
        with self._lock:
            self._hashes.append(hashes)

    def end_pass(self) -> None:
        """All shards were added once."""
        hashes, counts = np.unique(np.concatenate(self._hashes), return_counts=True)
        self._hashes = []
        often = counts >= self.least
        self._found.append((hashes[often], counts[often].astype(np.int64)))
        self._pass += 1
        self.is_done = self._pass == self.num_passes

    def result(self) -> ValueCounts:
        hashes = np.concatenate([hashes for hashes, _ in self._found])
        counts = np.concatenate([counts for _, counts in self._found])
        order = np.argsort(hashes)
        return ValueCounts(hashes[order], counts[order], self.least)


def least_count(expressions: Sequence[Expression], figure: WholeFigure) -> int:
    """The least count of a value that makes a difference to any of the expressions.

    ``count(caption_sha) > 10`` need not know which texts occur 2 to 10 times.
    """
    found: list[int] = []
    for expression in expressions:
        compared: set[int] = set()
        for node in ast.walk(expression.tree):
            if isinstance(node, ast.Compare) and len(node.ops) == 1:
                limit = constant_of(node.comparators[0])
                if _is_figure(node.left, figure) and isinstance(limit, int):
                    beyond = isinstance(node.ops[0], ast.Gt | ast.LtE)
                    if beyond or isinstance(node.ops[0], ast.GtE | ast.Lt):
                        found.append(limit + 1 if beyond else limit)
                        compared.add(id(node.left))
        for node in ast.walk(expression.tree):
            if _is_figure(node, figure) and id(node) not in compared:
                return 2
    return max(min(found, default=2), 2)


def _is_figure(node: ast.AST, figure: WholeFigure) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == figure.function
        and isinstance(node.args[0], ast.Name)
        and node.args[0].id == figure.column
    )
