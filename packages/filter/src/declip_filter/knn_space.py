"""The space that candidates are looked for in: fewer dimensions, fewer bits.

A graph is scanned in the leading principal components of the vectors, scaled back to unit length,
and its lists are scored again in full. How many components are enough is measured on a sample:
trained encoders need a third of theirs, a text's word counts need all.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from declip_filter.kmeans import normalize
from declip_filter.knn_exact import has_fast_bfloat16
from declip_filter.knn_graph import Matrix, Rows, Scores
from declip_filter.knn_select import (
    BLOCK_SCORES,
    MOST_ROWS,
    Products,
)

TRAINING_ROWS = 16_384
PROBED_ROWS = 256
KEPT_IN_SAMPLE = 0.94
"""Least share of a probed row's true neighbors (within the sample) among as many of its neighbors
in the space, for the space to be tried on all rows."""
ROUNDING = 1e-3
"""What a product's rounding may lift a row above another."""
LEAST_OFFSET = 0.01
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Space:
    """A projection and the type that products are made in."""

    axes: torch.Tensor | None
    """float32 (dim of the vectors, components); none where all dimensions are kept."""
    dim: int
    """Columns of a projected row: components, zeros up to a multiple of 32, and a last 1."""
    dtype: torch.dtype

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 or float16 (rows, dim of the vectors) -> (rows, dim), the last column 1."""
        projected = torch.zeros(rows.shape[0], self.dim, dtype=self.dtype)
        if self.axes is None:
            projected[:, : rows.shape[1]] = rows
        elif self.dtype == torch.bfloat16:
            components = (rows.to(self.dtype) @ self.axes.to(self.dtype)).float()
            projected[:, : self.axes.shape[1]] = normalize(components)
        else:
            projected[:, : self.axes.shape[1]] = normalize(rows.float() @ self.axes)
        projected[:, -1] = 1
        return projected


def candidate_spaces(
    vectors: Matrix, k: int, *, seed: int = 0, dtype: torch.dtype | None = None
) -> Iterator[Space]:
    """Spaces of 64, 96, 128, 192, 256 columns, then of all: from the first that may do.

    Whether one does is for :func:`shares_kept` to say; here those are left out in which neighbors
    do not even stay neighbors within a sample.

    Args:
        vectors: of unit length.
        k: length of the lists that are wanted.
        seed: of the sample.
        dtype: float32 or bfloat16; by default bfloat16 where the CPU has it in hardware.
    """
    dtype = dtype or (torch.bfloat16 if has_fast_bfloat16() else torch.float32)
    num = min(TRAINING_ROWS, vectors.num_rows)
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(vectors.num_rows, num, replace=False))
    sample = torch.from_numpy(np.asarray(vectors.take(chosen))).float()
    _, axes = torch.linalg.eigh(sample.T @ sample)
    axes = axes.flip(1)
    probed = torch.from_numpy(generator.choice(num, min(PROBED_ROWS, num), replace=False))
    near = min(k, num - 1)
    true = _nearest(sample, probed, near)
    for columns in (64, 96, 128, 192, 256):
        if columns >= vectors.dim:
            break
        space = Space(axes[:, : columns - 1].contiguous(), columns, dtype)
        inside = _nearest(space.project(sample).float()[:, :-1], probed, near)
        kept = (true[:, :, None] == inside[:, None, :]).any(dim=2).float().mean()
        if kept >= KEPT_IN_SAMPLE:
            yield space
    if vectors.dim % 32 == 0:  # all but the least component: a column fewer than 32 more
        yield Space(axes[:, : vectors.dim - 1].contiguous(), vectors.dim, dtype)
    else:
        yield Space(None, -(-(vectors.dim + 1) // 32) * 32, dtype)


def shares_kept(
    projected: torch.Tensor,
    queries: Rows,
    true: Rows,
    widths: Sequence[int],
    offset: float = 0.0,
) -> list[float]:
    """Share of rows' true neighbors among their best candidates in a space: what a scan can reach.

    Args:
        projected: as :func:`project_rows` makes them, with their padding.
        queries: (some,).
        true: their neighbors, (some, k), -1 where there are fewer.
        widths: how many candidates are kept, rising; one share each.
        offset: about what a neighbor scores.
    """
    num_rows = projected.shape[0] - MOST_ROWS
    products = Products(projected.dtype, projected.shape[1], offset)
    asked, there = torch.from_numpy(queries), true >= 0
    own = projected[asked].float()
    own[:, -1] = -offset
    wanted = projected[torch.from_numpy(np.maximum(true, 0))].float()
    scores = np.where(there, torch.einsum("qd,qkd->qk", own, wanted).numpy(), np.inf)
    limits = torch.from_numpy(scores.min(axis=1, initial=4.0)).to(projected.dtype)
    above: list[tuple[Rows, Scores]] = []
    step = BLOCK_SCORES // PROBED_ROWS
    for start in range(0, num_rows, step):
        size = min(step, num_rows - start)
        rows, columns, found = products.above(projected, asked, limits, projected[start:], size)
        others = columns + start != queries[rows]
        above.append((rows[others], found[others]))
    rows = np.concatenate([rows for rows, _ in above])
    found = np.concatenate([found for _, found in above])
    order = np.lexsort((found, rows))
    rows, found = rows[order], found[order]
    bounds = np.searchsorted(rows, np.arange(len(queries) + 1))
    rank = np.full(true.shape, np.iinfo(np.int64).max)
    for row, (low, high) in enumerate(itertools.pairwise(bounds.tolist())):
        rank[row] = high - low - np.searchsorted(found[low:high], scores[row] + ROUNDING)
    num_true = max(1, int(there.sum()))
    return [float((rank < width)[there].sum()) / num_true for width in widths]


def _nearest(sample: torch.Tensor, probed: torch.Tensor, k: int) -> torch.Tensor:
    scores = sample[probed] @ sample.T
    scores[torch.arange(len(probed)), probed] = -torch.inf
    return scores.topk(k, dim=1).indices


def project_rows(vectors: Matrix, space: Space) -> torch.Tensor:
    """All rows in a space, and padding: (num_rows + MOST_ROWS, space.dim).

    The padding is zeros, but for its first row's last number: against a query that ends in minus
    the offset that row scores lower than any vector, so that it may fill lists up.
    """
    projected = torch.zeros(vectors.num_rows + MOST_ROWS, space.dim, dtype=space.dtype)
    for start in range(0, vectors.num_rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, vectors.num_rows)
        # Copied where it cannot be written to, as in exact search.
        rows = torch.from_numpy(np.require(vectors.read(start, stop), requirements=["C", "W"]))
        projected[start:stop] = space.project(rows)
    projected[vectors.num_rows, -1] = 10 / LEAST_OFFSET
    return projected


def sort_rows(
    projected: torch.Tensor, order: "np.ndarray[tuple[int], np.dtype[np.int64]]"
) -> torch.Tensor:
    """Rows in another order, with the padding."""
    ordered = torch.zeros_like(projected)
    torch.index_select(projected, 0, torch.from_numpy(order), out=ordered[: len(order)])
    ordered[len(order) :] = projected[len(order) :]
    return ordered
