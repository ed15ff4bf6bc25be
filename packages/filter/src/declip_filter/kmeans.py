"""Spherical k-means in two levels: many small clusters at the cost of a few.

Rows are clustered into about the square root of the wanted number of clusters, each of those
again. A row then meets twice the square root of the number of centers, not all of them.
"""

import itertools
import math
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from declip_filter.knn_select import (
    MOST_ROWS,
    Columnwise,
    Products,
    largest,
    pad_columns,
    run_in_threads,
)

Labels = npt.NDArray[np.int32]
ITERATIONS = 4
SAMPLES_A_CENTER = 32
TOP_SAMPLES_A_CENTER = 128
SPLIT_ABOVE = 20
"""A cluster of more than this many times the wanted size is split again."""


@dataclass(frozen=True)
class Clusters:
    """Rows in clusters, and clusters in groups of neighboring ones ("towns")."""

    order: npt.NDArray[np.int64]
    """Rows by cluster, and by number within one: (num_rows,)."""
    starts: npt.NDArray[np.int64]
    """Where in the order each cluster begins, and the end: (num_clusters + 1,)."""
    centers: torch.Tensor
    """float32 (num_clusters, dim), unit length."""
    towns: npt.NDArray[np.int64]
    """First cluster of each town, and the end: (num_towns + 1,); of none more than MOST_ROWS."""
    town_centers: torch.Tensor
    """float32 (num_towns, dim), unit length."""

    @property
    def num_clusters(self) -> int:
        return len(self.starts) - 1


def normalize(rows: torch.Tensor) -> torch.Tensor:
    """Rows of unit length; zero rows stay."""
    return torch.nn.functional.normalize(rows, dim=1)


def padded(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows and as many of zeros as blocks of products may read beyond."""
    whole = torch.zeros(pad_columns(len(rows)), rows.shape[1], dtype=dtype)
    whole[: len(rows)] = rows
    return whole


def assign(matrix: torch.Tensor, rows: torch.Tensor, centers: torch.Tensor) -> Labels:
    """The nearest center of each row, by inner product: int32 (len(rows),).

    Args:
        matrix: (any, dim), what ``rows`` (int64) are rows of.
        centers: (num_centers, dim).
    """
    labels = np.empty(len(rows), dtype=np.int32)
    products = Products(matrix.dtype, matrix.shape[1])
    columnwise = Columnwise(len(centers))
    against = padded(centers, matrix.dtype)
    step = Products.queries_at_once(len(centers))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        keys = columnwise.pack(products.lifted(matrix, block, against, len(centers)))
        labels[start : start + len(block)] = columnwise.columns(keys.max(axis=1))
    return labels


def train_centers(
    matrix: torch.Tensor,
    rows: torch.Tensor,
    num_centers: int,
    samples_a_center: int,
    generator: np.random.Generator,
) -> torch.Tensor:
    """Centers of some rows by Lloyd's iterations on a sample: float32 (num_centers, dim)."""
    num_samples = min(len(rows), num_centers * samples_a_center)
    chosen = generator.choice(len(rows), num_samples, replace=False)
    sample = matrix[rows[torch.from_numpy(chosen)]]
    everything = torch.arange(num_samples)
    points = sample.float()
    points[:, -1] = 0  # not of the vectors: the scores' offset
    centers = points[:num_centers].clone()
    for _ in range(ITERATIONS):
        labels = torch.from_numpy(assign(sample, everything, centers)).long()
        sums = torch.zeros_like(centers).index_add_(0, labels, points)
        centers = torch.where((sums != 0).any(dim=1)[:, None], normalize(sums), centers)
    return centers


def cluster_rows(
    matrix: torch.Tensor, num_rows: int, cluster_size: int, seed: int, num_threads: int = 1
) -> Clusters:
    """Cluster rows of unit length.

    Args:
        matrix: (at least num_rows, dim), float32 or bfloat16.
        num_rows: rows beyond are padding.
        cluster_size: rows that a cluster has on the average.
        seed: of the samples.
        num_threads: threads; the clusters are the same at any number.
    """
    generator = np.random.default_rng(seed)
    num_clusters = max(1, round(num_rows / cluster_size))
    num_towns = max(1, round(math.sqrt(num_clusters)))
    rows = torch.arange(num_rows)
    town_centers = train_centers(matrix, rows, num_towns, TOP_SAMPLES_A_CENTER, generator)
    town_of = np.empty(num_rows, dtype=np.int32)
    part = max(1, -(-num_rows // 64))

    def assign_part(start: int) -> None:
        here = rows[start : start + part]
        town_of[start : start + len(here)] = assign(matrix, here, town_centers)

    run_in_threads(range(0, num_rows, part), assign_part, num_threads)
    by_town = np.argsort(town_of, kind="stable")
    bounds = np.searchsorted(town_of[by_town], np.arange(num_towns + 1))
    found: list[list[torch.Tensor]] = [[] for _ in range(num_towns)]
    seeds = generator.integers(0, 2**63, num_towns)

    def split_town(town: int) -> None:
        mine = torch.from_numpy(by_town[bounds[town] : bounds[town + 1]])
        found[town] = _split(matrix, mine, cluster_size, np.random.default_rng(seeds[town]))

    run_in_threads(range(num_towns), split_town, num_threads)
    return _gather(matrix, found, town_centers)


def _split(
    matrix: torch.Tensor, rows: torch.Tensor, size: int, generator: np.random.Generator
) -> list[torch.Tensor]:
    """Rows of a town into clusters, none of more than SPLIT_ABOVE times the wanted size."""
    waiting, done = [rows], []
    is_first = True
    while waiting:
        rows = waiting.pop()
        if len(rows) <= (size if is_first else SPLIT_ABOVE * size):
            done.append(rows)
            continue
        is_first = False
        num = min(MOST_ROWS, max(2, round(len(rows) / size)))
        centers = train_centers(matrix, rows, num, SAMPLES_A_CENTER, generator)
        labels = assign(matrix, rows, centers)
        order = np.argsort(labels, kind="stable")
        bounds = np.searchsorted(labels[order], np.arange(num + 1))
        parts = [rows[torch.from_numpy(order[a:b])] for a, b in itertools.pairwise(bounds) if b > a]
        if max(map(len, parts)) > 0.9 * len(rows):  # (nearly) equal vectors: no center parts them
            parts = list(torch.split(rows, size))
            done.extend(parts)
        else:
            waiting.extend(reversed(parts))
    return [part for part in done if len(part)]


def _gather(
    matrix: torch.Tensor, found: list[list[torch.Tensor]], town_centers: torch.Tensor
) -> Clusters:
    clusters = [cluster.sort().values for town in found for cluster in town]
    starts = np.concatenate([[0], np.cumsum([len(cluster) for cluster in clusters])])
    # A block of products has room for MOST_ROWS centers: a larger town counts as several.
    pieces = [max(1, -(-len(town) // MOST_ROWS)) for town in found]
    sizes = [
        min(MOST_ROWS, len(town) - piece * MOST_ROWS)
        for town, num in zip(found, pieces, strict=True)
        for piece in range(num)
    ]
    towns = np.concatenate([[0], np.cumsum(sizes)])
    centers = _means(matrix, torch.cat(clusters), starts)
    return Clusters(
        order=torch.cat(clusters).numpy(),
        starts=starts.astype(np.int64),
        centers=normalize(centers),
        towns=towns.astype(np.int64),
        town_centers=town_centers.repeat_interleave(torch.tensor(pieces), dim=0),
    )


def _means(
    matrix: torch.Tensor, order: torch.Tensor, starts: npt.NDArray[np.int64]
) -> torch.Tensor:
    """Mean of each run of rows: float32 (runs, dim)."""
    sums = torch.zeros(len(starts) - 1, matrix.shape[1])
    run = torch.from_numpy(np.repeat(np.arange(len(starts) - 1), np.diff(starts)))
    for start in range(0, order.shape[0], 2048):
        here = slice(start, start + 2048)
        sums.index_add_(0, run[here], matrix[order[here]].float())
    sums[:, -1] = 0
    return sums / torch.from_numpy(np.diff(starts)).clamp_min(1)[:, None]


def nearest_centers(
    matrix: torch.Tensor, num_rows: int, centers: torch.Tensor, num: int, num_threads: int = 1
) -> Labels:
    """The nearest centers of each row, best first: int32 (num_rows, min(num, num_centers))."""
    num = min(num, len(centers))
    labels = np.empty((num_rows, num), dtype=np.int32)
    columnwise = Columnwise(len(centers))
    against = padded(centers, matrix.dtype)
    step = Products.queries_at_once(len(centers))
    local = threading.local()

    def meet(start: int) -> None:
        if not hasattr(local, "products"):
            local.products = Products(matrix.dtype, matrix.shape[1])
        rows = torch.arange(start, min(start + step, num_rows))
        keys = columnwise.pack(local.products.lifted(matrix, rows, against, len(centers)))
        labels[start : start + step] = columnwise.columns(largest(keys, num, in_order=True))

    run_in_threads(range(0, num_rows, step), meet, num_threads)
    return labels
