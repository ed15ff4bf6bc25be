"""What memory an index takes while it is built: said before it starts, and kept to.

Counted is what a process must hold (its heap). Files that are mapped for reading are not: the
system drops their pages where it needs the space. So building a large index takes less than the
index itself, and only who searches wants all of it in memory.
"""

import math
import re
from dataclasses import dataclass, replace

from declip_filter.index_choice import MIN_ROWS_PER_LIST, Choice, index_bytes
from declip_filter.index_files import GROUP_ROWS
from declip_filter.index_recall import BLOCK_ROWS
from declip_filter.index_training import ROWS_AT_ONCE, sample_size
from declip_shards import DeclipError

GIB = 2**30
PROCESS_BYTES = 256 * 2**20
"""Python with NumPy, PyArrow and FAISS, and what the allocator keeps of freed blocks."""
MAX_ROWS_OF_CODES = 100_000
"""Rows of which FAISS trains codes, with their residuals."""
ROW_BYTES = 400
"""Of a row of rows.parquet while it is written: keys, digests, their strings in Python."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes, by phase; a phase ends before the next begins."""

    num_rows: int
    dim: int
    index: int
    """Of the finished index: its file, and memory where it is searched from there."""
    train: int
    fill: int
    """Of one task."""
    merge: int
    measure: int

    @property
    def peak(self) -> int:
        """Of the process that does all of it."""
        return PROCESS_BYTES + max(self.train, self.fill, self.merge, self.measure)

    def text(self, choice: Choice) -> str:
        """One line for the terminal."""
        shown = ", ".join(
            f"{name} {size / GIB:.3g}"
            for name, size in (
                ("train", self.train),
                ("fill", self.fill),
                ("merge", self.merge),
                ("measure", self.measure),
            )
        )
        return (
            f"index: {choice.index_key} of {self.num_rows} x {self.dim} ({choice.reason}): "
            f"{self.index / GIB:.3g} GiB on disk; peak memory {self.peak / GIB:.3g} GiB ({shown})"
        )


def group_rows(choice: Choice, dim: int, rows_per_task: int, limit_bytes: float) -> int:
    """Rows of a part: as asked, or fewer where they would not fit; whole blocks always."""
    wanted = max(1, math.ceil(rows_per_task / ROWS_AT_ONCE)) * ROWS_AT_ONCE
    while wanted > ROWS_AT_ONCE and PROCESS_BYTES + _fill(choice, wanted, dim) > limit_bytes:
        wanted -= ROWS_AT_ONCE
    return wanted


def estimate(
    choice: Choice, num_rows: int, dim: int, *, rows_per_task: int, num_queries: int
) -> Estimate:
    """What building this index takes.

    Args:
        choice: the type.
        num_rows: vectors.
        dim: their length.
        rows_per_task: of a part.
        num_queries: on which recall is measured.
    """
    size = index_bytes(choice.index_key, choice.nlist, num_rows, dim)
    centroids = choice.nlist * dim * 4 * 3
    train = _train(choice, num_rows, dim)
    fill = _fill(choice, min(num_rows, rows_per_task), dim)
    if choice.index_key == "Flat":
        fill, merge = 0, ROWS_AT_ONCE * dim * 6
    elif choice.is_fast_scan:
        merge = size + centroids  # packed; the plain lists are mapped
    elif choice.is_in_parts:
        merge = centroids + 16 * choice.nlist + 4 * num_rows // choice.nlist * size // num_rows
    else:
        fill, merge = size * 2, size  # arrays grow by doubling
    block = BLOCK_ROWS * (dim * 6 + num_queries * 4 * 4)
    in_memory = size if choice.is_fast_scan or not choice.is_in_parts else 0
    in_memory = 0 if choice.index_key == "Flat" else in_memory
    measure = max(block, GROUP_ROWS * ROW_BYTES) + in_memory + centroids // 3
    return Estimate(
        num_rows=num_rows, dim=dim, index=size, train=train, fill=fill, merge=merge, measure=measure
    )


def _train(choice: Choice, num_rows: int, dim: int) -> int:
    """The sample, which FAISS copies where it turns it, that of the codes, and the centroids."""
    sample = sample_size(choice, num_rows)
    copies = 2 if re.match("(OPQ|PCA|RR|ITQ|L2norm)", choice.build_key) else 1
    block = min(sample, ROWS_AT_ONCE) * dim * 2
    codes = 0 if choice.build_key.endswith("Flat") else min(sample, MAX_ROWS_OF_CODES) * dim * 8
    return sample * (dim * 4 * copies + 24) + choice.nlist * dim * 4 * 3 + block + codes


def fit_sample(choice: Choice, num_rows: int, dim: int, limit_bytes: float) -> Choice:
    """The choice with as large a sample as fits, at least 39 rows a list."""
    while choice.rows_per_list > MIN_ROWS_PER_LIST:
        if PROCESS_BYTES + _train(choice, num_rows, dim) <= limit_bytes:
            break
        choice = replace(choice, rows_per_list=choice.rows_per_list - 1)
    return choice


def _most_lists(choice: Choice, num_rows: int, dim: int, limit: float) -> int:
    """Lists for which training fits the limit, at least 1."""
    nlist = choice.nlist
    while nlist > 1 and PROCESS_BYTES + _train(replace(choice, nlist=nlist), num_rows, dim) > limit:
        nlist = nlist * 19 // 20
    return nlist


def _fill(choice: Choice, rows: int, dim: int) -> int:
    """A block, its codes, and the part's lists, which grow by doubling."""
    code = index_bytes(choice.build_key, 0, 1, dim)
    block = min(rows, ROWS_AT_ONCE) * (dim * 4 * 3 + code)
    return block + 2 * rows * code + choice.nlist * (dim * 4 + 200)


def index_limit(max_memory_gib: float, dim: int, num_queries: int) -> float:
    """Bytes that are left for an index that is searched from memory."""
    block = BLOCK_ROWS * (dim * 6 + num_queries * 4 * 4)
    return max_memory_gib * GIB - PROCESS_BYTES - max(block, GROUP_ROWS * ROW_BYTES)


def require_memory(found: Estimate, choice: Choice, max_memory_gib: float) -> None:
    """Refuse what would take more than the limit.

    Raises:
        DeclipError: the peak, the limit, and what would fit.
    """
    limit = max_memory_gib * GIB
    if found.peak <= limit:
        return
    phases = {"train": found.train, "fill": found.fill, "merge": found.merge}
    worst = max(phases, key=lambda name: phases[name])
    if choice.is_graph or not choice.is_in_parts:
        remedy = "choose index_type IVF or IVFPQ, which are built in parts"
    elif worst == "train" and choice.nlist:
        fits = _most_lists(choice, found.num_rows, found.dim, limit)
        remedy = f"set nlist to at most {fits}, or index fewer rows"
    else:
        remedy = "choose a smaller code by index_key"
    raise DeclipError(
        f"building {choice.index_key} of {found.num_rows} x {found.dim} takes up to "
        f"{found.peak / GIB:.3g} GiB ({worst} most of it), and max_memory_gib is "
        f"{max_memory_gib:g}; raise it to {math.ceil(found.peak / GIB * 10) / 10:g}, or {remedy}."
    )
