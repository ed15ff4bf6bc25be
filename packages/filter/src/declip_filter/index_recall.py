"""How much of exact search an index finds, on rows of its own, with an interval.

Vectors pass by once in blocks, so that exact search needs the memory of a block and not of all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from declip_filter.index_files import Ids, Scores, search
from declip_filter.index_training import one_thread, progress, read_block, take_rows
from declip_filter.knn_graph import Matrix

NUM_NEIGHBORS = 10
"""Of the recall that is measured: recall@10."""
QUERIES_AT_ONCE = 64
"""Queries searched for at once."""
BLOCK_ROWS = 16_384
"""Rows compared with all queries at once."""
TIE_TOLERANCE = 1e-5
"""Scores closer than this are a tie: exact and index search sum in different orders."""
DUPLICATE_COSINE = 0.999
"""From here on two rows count as one content: float16 and the make-up of a batch change the
vector of an equal caption by less."""
MAX_DUPLICATES = 16_384
"""A query with more of them is not counted: an index would be asked for as many rows."""


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Measured recall@10 of an index on rows of its own."""

    recall: float
    """Without the query and its duplicates (DUPLICATE_COSINE): what a neighbor table needs."""
    recall_with_duplicates: float
    """The plain figure: the query finds itself and its duplicates, so it is flattering."""
    num_queries: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval. A query's hits hang together, so queries, not hits, are trials."""
        return wilson_interval(self.recall, self.num_queries)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What exact search says of one query."""

    row: int
    duplicates: frozenset[int]
    """Rows that are the same content again, the query's own among them."""
    nearest_score: float
    """Score of the 10th nearest of the other rows."""
    plain_score: float
    """Score of the 10th nearest of all rows."""
    num_wanted: int
    """10, or fewer where there are not so many other rows."""


def wilson_interval(share: float, num: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share among ``num`` trials (Wilson 1927)."""
    if not num:
        return 0.0, 1.0
    center = (share + z * z / (2 * num)) / (1 + z * z / num)
    spread = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + (z / (2 * num)) ** 2)
    # The sums are rounded; the interval of a share always holds the share.
    return max(0.0, min(share, center - spread)), min(1.0, max(share, center + spread))


def draw_queries(num_rows: int, num_queries: int, seed: int) -> Ids:
    """Rows on which recall is measured, ascending, drawn without replacement."""
    size = min(num_queries, num_rows)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(num_rows, size, replace=False)).astype(np.int64)


def exact_truths(vectors: Matrix, query_rows: Ids) -> list[Truth]:
    """Exact inner-product search by brute force for ``query_rows`` of ``vectors`` (rows, dim)."""
    queries = take_rows(vectors, query_rows)
    num_queries, num_rows = len(query_rows), vectors.num_rows
    plain = np.full((num_queries, NUM_NEIGHBORS), -np.inf, dtype=np.float32)
    others = plain.copy()
    same: list[list[int]] = [[] for _ in range(num_queries)]
    num_same = np.zeros(num_queries, dtype=np.int64)
    starts = range(0, num_rows, BLOCK_ROWS)
    for start in progress(starts, len(starts), "index: exact search"):
        stop = min(start + BLOCK_ROWS, num_rows)
        scores = queries @ read_block(vectors, start, stop).T
        plain = _keep_best(plain, scores)
        is_same = scores >= DUPLICATE_COSINE
        own = np.flatnonzero((query_rows >= start) & (query_rows < stop))
        is_same[own, query_rows[own] - start] = True
        num_same += is_same.sum(axis=1)
        for query, row in np.argwhere(is_same).tolist():
            if num_same[query] <= MAX_DUPLICATES:
                same[query].append(start + row)
        scores[is_same] = -np.inf
        others = _keep_best(others, scores)
    truths = []
    for query, row in enumerate(query_rows.tolist()):
        if num_same[query] > MAX_DUPLICATES:
            continue
        wanted = min(NUM_NEIGHBORS, num_rows - len(same[query]))
        truths.append(
            Truth(
                row=row,
                duplicates=frozenset(same[query]),
                nearest_score=_kth(others[query], wanted),
                plain_score=_kth(plain[query], min(NUM_NEIGHBORS, num_rows)),
                num_wanted=wanted,
            )
        )
    return truths


def _keep_best(best: Scores, scores: Scores) -> Scores:
    """The largest of both, as many as ``best`` (queries, k) has; in no order."""
    both = np.concatenate([best, scores], axis=1)
    cut = both.shape[1] - best.shape[1]
    return np.ascontiguousarray(np.partition(both, cut, axis=1)[:, cut:])


def _kth(best: Scores, k: int) -> float:
    return float(np.sort(best)[::-1][k - 1]) if k else math.inf


def measure_recall(
    index: Any, vectors: Matrix, truths: Sequence[Truth], nprobe: int | None = None
) -> Recall:
    """Share of the exact 10 nearest rows that the index finds, averaged over queries.

    A found row counts when its exact score, computed of the vectors and not taken from the index,
    reaches the 10th exact one: which of several tied rows came back does not matter, and a
    quantized index is judged by what it finds.

    Args:
        index: a FAISS index.
        vectors: what it holds.
        truths: of :func:`exact_truths`.
        nprobe: lists searched, or a graph's efSearch; None takes what is stored.
    """
    if not truths:
        return Recall(recall=1.0, recall_with_duplicates=1.0, num_queries=0)
    shares, plain_shares = [], []
    by_width = sorted(truths, key=lambda truth: len(truth.duplicates))
    for start in range(0, len(by_width), QUERIES_AT_ONCE):
        batch = by_width[start : start + QUERIES_AT_ONCE]
        width = min(vectors.num_rows, NUM_NEIGHBORS + len(batch[-1].duplicates))
        queries = take_rows(vectors, np.asarray([truth.row for truth in batch]))
        with one_thread():
            _, rows = search(index, queries, width, nprobe)
        for truth, query, own in zip(batch, queries, rows, strict=True):
            real = own[own >= 0]
            if truth.num_wanted:
                found = real[~np.isin(real, list(truth.duplicates))][: truth.num_wanted]
                limit = truth.nearest_score
                shares.append(_hits(vectors, query, found, limit) / truth.num_wanted)
            wanted = min(NUM_NEIGHBORS, vectors.num_rows)
            hits = _hits(vectors, query, real[:wanted], truth.plain_score)
            plain_shares.append(hits / wanted)
    return Recall(
        # Without any other row there is nothing to miss.
        recall=float(np.mean(np.sort(shares))) if shares else 1.0,
        recall_with_duplicates=float(np.mean(np.sort(plain_shares))),
        num_queries=len(truths),
    )


def _hits(vectors: Matrix, query: npt.NDArray[np.float32], rows: Ids, least_score: float) -> int:
    """How many of the found rows are as near as the 10th nearest."""
    scores = take_rows(vectors, np.sort(rows)) @ query
    return int((scores >= least_score - TIE_TOLERANCE).sum())
