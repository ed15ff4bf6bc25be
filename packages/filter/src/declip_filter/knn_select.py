"""Selection of the best of many scores: where a neighbor search spends what products leave.

``torch.topk`` costs 3 ns a score on a CPU, four times the product of 128 dimensions in bfloat16.
numpy sorts and partitions 32-bit integers with vector instructions, 0.5 ns a score, but does not
say where they stood. So a score's lowest bits are replaced by its column: bits of a positive float
sort like the float. What that rounds away is less than bfloat16 already did, and candidates are
scored again in float32.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

Job = TypeVar("Job")
Keys = npt.NDArray[np.int32]
Columns = npt.NDArray[np.int32]
Coarse = npt.NDArray[np.float32]
"""Scores in the space of a scan, less its offset; -inf where there are fewer."""
LIFT = 3.0
"""Added to scores of -1 to 1: floats between 2 and 4 have one exponent, so even steps."""
MISSING = 0.5
"""A lifted score below all others: of what must not be chosen."""
LEAST_KEY = np.int32(0x3F400000)  # of 0.75
"""Keys below are of scores that were MISSING, or of nothing."""
LEAST_QUERIES, MOST_QUERIES = 32, 1024
BLOCK_SCORES = 2**18
"""Most scores of a block: 1 MiB, what a core's second cache holds."""
MOST_ROWS = BLOCK_SCORES // LEAST_QUERIES
"""Most rows that meet a block of queries."""


class Columnwise:
    """Keys of matrices with a given number of columns: score above, column below."""

    def __init__(self, num_columns: int, bits: int = 0) -> None:
        """``bits``, where given, are those of the widest matrix whose keys are compared."""
        bits = max(1, (num_columns - 1).bit_length(), bits)
        self.num_columns = num_columns
        self.mask = -(1 << bits)
        self._columns = torch.arange(num_columns, dtype=torch.int32)

    def pack(self, lifted: torch.Tensor) -> Keys:
        """Keys in the place of float32 scores + LIFT, (..., num_columns)."""
        keys = lifted.view(torch.int32)
        keys.bitwise_and_(self.mask).bitwise_or_(self._columns)
        packed: Keys = keys.numpy()
        return packed

    def columns(self, keys: Keys) -> Columns:
        """The columns that keys stand for."""
        return keys & np.int32(~self.mask)

    def are_missing(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which keys are of scores that were MISSING."""
        return keys < LEAST_KEY

    def scores(self, keys: Keys) -> Coarse:
        """The scores of keys, rounded down."""
        return (keys & np.int32(self.mask)).view(np.float32) - np.float32(LIFT)


def largest(keys: Keys, num: int, *, in_order: bool = False) -> Keys:
    """The largest ``num`` of each last axis, best first if ``in_order``; partitions in place."""
    width = keys.shape[-1]
    if num < width:
        keys.partition(width - num, axis=-1)
        keys = keys[..., width - num :]
    if in_order:
        keys = np.sort(keys, axis=-1)[..., ::-1]
    return keys


class Products:
    """Blocks of inner products in buffers of its own: one for each thread.

    oneDNN compiles a kernel for each new shape of a bfloat16 product, which costs as much as
    multiplying half a million pairs. So blocks are padded to a few shapes.

    The last column of every matrix is 1 in rows and 0 in centers and padding (knn_space.py), and
    minus ``offset`` in queries: scores come out less the offset. A bfloat16 product sums in float32
    and rounds the sum to 8 bits; near the offset that is fine enough to order by.
    """

    def __init__(self, dtype: torch.dtype, dim: int, offset: float = 0.0) -> None:
        self._offset = offset
        self._queries = torch.zeros(MOST_QUERIES, dim, dtype=dtype)
        self._coarse = torch.empty(BLOCK_SCORES, dtype=dtype)
        self._lifted = torch.empty(BLOCK_SCORES, dtype=torch.float32)

    @staticmethod
    def queries_at_once(num_rows: int) -> int:
        """How many queries fit a block with this many rows."""
        fitting = BLOCK_SCORES // pad_columns(num_rows)
        return min(MOST_QUERIES, max(LEAST_QUERIES, fitting // 128 * 128))

    def lifted(
        self, matrix: torch.Tensor, queries: torch.Tensor, rows: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        """Inner products + LIFT, float32 (len(queries), num_rows), good until the next call.

        Args:
            matrix: what ``queries`` are rows of.
            queries: int64, at most :meth:`queries_at_once`.
            rows: at least ``pad_columns(num_rows)`` of them; those beyond ``num_rows`` are read
                and forgotten.
            num_rows: how many count.
        """
        coarse = self._multiply(matrix, queries, self._offset, rows, num_rows)
        lifted = self._lifted[: coarse.numel()].view(coarse.shape)
        return lifted.copy_(coarse).add_(LIFT)

    def above(
        self,
        matrix: torch.Tensor,
        queries: torch.Tensor,
        thresholds: torch.Tensor,
        rows: torch.Tensor,
        num_rows: int,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Coarse]:
        """Which pairs score above their query's threshold: few, so that the rest costs little.

        Args:
            matrix, queries, rows, num_rows: as for :meth:`lifted`.
            thresholds: less the offset, (len(queries),), of the matrix's type.

        Returns:
            Places in ``queries`` and in ``rows``, and scores less the offset.
        """
        limits = (thresholds.float() + self._offset).to(matrix.dtype)
        coarse = self._multiply(matrix, queries, limits, rows, num_rows)
        asked, columns = find_positive(coarse)
        excess = coarse[torch.from_numpy(asked), torch.from_numpy(columns)].float().numpy()
        return asked, columns, excess + (limits.float().numpy()[asked] - np.float32(self._offset))

    def _multiply(
        self,
        matrix: torch.Tensor,
        queries: torch.Tensor,
        subtracted: "torch.Tensor | float",
        rows: torch.Tensor,
        num_rows: int,
    ) -> torch.Tensor:
        num = queries.shape[0]
        padded = LEAST_QUERIES if num <= LEAST_QUERIES else -(-num // 128) * 128
        width = pad_columns(num_rows)
        torch.index_select(matrix, 0, queries, out=self._queries[:num])
        self._queries[:num, -1] = -subtracted
        coarse = self._coarse[: padded * width].view(padded, width)
        torch.mm(self._queries[:padded], rows[:width].T, out=coarse)
        return coarse[:num, :num_rows]


def find_positive(
    scores: torch.Tensor,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where a matrix of float32 or bfloat16 is above 0: rows and columns.

    The bits of a positive float are a positive integer, which is what numpy has bfloat16 for.
    """
    bits = scores.view(torch.int16 if scores.dtype == torch.bfloat16 else torch.int32).numpy()
    flat = np.flatnonzero(bits > 0)
    rows = flat // scores.shape[1]
    return rows, flat - rows * scores.shape[1]


def pad_columns(num: int) -> int:
    """The least of the few widths that blocks have, at or above ``num``."""
    step = 32 if num <= 512 else 256
    return -(-num // step) * step


def run_in_threads(jobs: Iterable[Job], work: Callable[[Job], None], num_threads: int) -> None:
    """Do jobs, each on one thread, so that no sum depends on how many threads there are."""
    before = torch.get_num_threads()
    waiting = iter(list(jobs))
    lock = threading.Lock()

    def drain() -> None:
        torch.set_num_threads(1)
        while True:
            with lock:
                job = next(waiting, None)
            if job is None:
                return
            work(job)

    try:
        if num_threads == 1:
            drain()
            return
        with ThreadPoolExecutor(num_threads) as pool:
            for done in [pool.submit(drain) for _ in range(num_threads)]:
                done.result()
    finally:
        torch.set_num_threads(before)
