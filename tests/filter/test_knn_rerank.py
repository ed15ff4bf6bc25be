"""Final lists are the candidates sorted by their true scores."""

import numpy as np
import pytest
import torch
from index_rows import unit_rows

from declip_filter.knn_graph import ArrayVectors
from declip_filter.knn_rerank import StoredRows, rank_lists

NUM, DIM = 400, 24


def plain_lists(rows, order, queries, near, k, groups):
    """A plain loop: (row, score) pairs of each list."""
    lists = []
    for query, places in zip(queries.tolist(), near.tolist(), strict=True):
        scored = [
            (-float(np.vecdot(rows[order[p]], rows[order[query]])), int(order[p]), p)
            for p in places
            if p >= 0
        ]
        found, seen = [], set()
        for score, row, place in sorted(scored):
            name = row if groups is None else int(groups[place])
            if name not in seen:
                seen.add(name)
                found.append((row, -score))
        lists.append((found + [(-1, -np.inf)] * k)[:k])
    return lists


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("with_groups", [False, True])
def test_lists_are_a_plain_loops(with_groups, num_threads, keep):
    """With equal rows (ties go by row), candidates missing, and lists that end early."""
    rows = np.repeat(unit_rows(NUM // 4, DIM), 4, axis=0)
    generator = np.random.default_rng(2)
    order = generator.permutation(NUM)
    near = np.stack([generator.permutation(NUM)[:30] for _ in range(NUM)]).astype(np.int32)
    near[generator.random(near.shape) < 0.3] = -1
    near[5] = -1
    groups = generator.integers(0, 9, NUM).astype(np.int32) if with_groups else None
    queries = np.arange(0, NUM, 3)
    stored = StoredRows(ArrayVectors(rows), order, keep=keep)
    assert stored.is_kept == keep
    scores, ids = rank_lists(stored, queries, near[queries], 12, groups, num_threads)
    wanted = plain_lists(rows.astype(np.float32), order, queries, near[queries], 12, groups)
    assert ids.tolist() == [[row for row, _ in found] for found in wanted]
    assert np.allclose(scores, [[score for _, score in found] for found in wanted], atol=1e-6)
    assert scores.dtype == np.float32
    assert ids.dtype == np.int64


def test_negative_scores_sort_too():
    rows = np.asarray([[1, 0], [-1, 0], [0, 1], [-0.6, 0.8], [0, -1]], dtype=np.float32)
    stored = StoredRows(ArrayVectors(rows), np.arange(5), keep=True)
    near = np.asarray([[1, 4, 3, 2]], dtype=np.int32)
    scores, ids = rank_lists(stored, np.asarray([0]), near, 6, None, 1)
    assert ids.tolist() == [[2, 4, 3, 1, -1, -1]]
    assert scores[0, :4] == pytest.approx([0, 0, -0.6, -1])
    assert (scores[0, 4:] == -np.inf).all()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_stored_rows_are_the_vectors_by_place(dtype, keep):
    rows = unit_rows(NUM, DIM).astype(dtype)
    order = np.random.default_rng(2).permutation(NUM)
    stored = StoredRows(ArrayVectors(rows), order, keep=keep)
    places = np.asarray([5, 5, 0, 399, 17])
    found = stored.take(torch.from_numpy(places)).numpy()
    assert found.dtype == dtype
    assert np.array_equal(found, rows[order[places]])
