"""Recall is what brute force says it is, and exact search streams."""

import numpy as np
import pytest
from index_rows import unit_rows

from declip_filter import index_recall
from declip_filter.index import build_index
from declip_filter.index_files import search
from declip_filter.index_recall import (
    draw_queries,
    exact_truths,
    measure_recall,
    wilson_interval,
)
from declip_filter.knn_graph import ArrayVectors

pytestmark = pytest.mark.usefixtures("several_threads")


def plain_recall(index, vectors: np.ndarray, queries: list[int], nprobe: int) -> float:
    """recall@10 of the other rows by plain loops over sorted scores; no duplicates allowed."""
    wide = vectors.astype(np.float64)
    total = 0
    for query in queries:
        order = [r for r in np.argsort(-(wide @ wide[query]), kind="stable").tolist() if r != query]
        _, rows = search(index, vectors[[query]].astype(np.float32), 11, nprobe)
        found = [r for r in rows[0].tolist() if r not in (query, -1)][:10]
        total += len(set(found) & set(order[:10]))
    return total / (10 * len(queries))


@pytest.mark.parametrize("nprobe", [1, 2, 4, 16])
def test_recall_is_what_brute_force_says(nprobe):
    vectors = unit_rows(900, 24, num_centers=30)
    index = build_index(vectors, nlist=16, seed=0)
    queries = list(range(0, 900, 9))
    truths = exact_truths(ArrayVectors(vectors), np.asarray(queries))
    measured = measure_recall(index, ArrayVectors(vectors), truths, nprobe)
    assert measured.recall == pytest.approx(plain_recall(index, vectors, queries, nprobe), abs=2e-3)
    assert measured.recall_with_duplicates >= measured.recall
    assert (measured.recall == 1) == (nprobe == 16)


def test_duplicates_do_not_flatter_the_recall():
    """Every row forty times: the easy figure is perfect, the honest one sees the lists missed."""
    vectors = np.repeat(unit_rows(300, 24), 40, axis=0)
    index = build_index(vectors, nlist=64, seed=0)
    rows = ArrayVectors(vectors)
    measured = measure_recall(index, rows, exact_truths(rows, np.arange(0, 12000, 97)), 1)
    assert measured.recall_with_duplicates > 0.99
    assert measured.recall < 0.8


def test_flat_index_is_exact():
    vectors = unit_rows(200, 16)
    index = build_index(vectors, nlist=0, seed=0)
    rows = ArrayVectors(vectors)
    assert measure_recall(index, rows, exact_truths(rows, np.arange(200))).recall == 1


def test_wilson_interval_by_the_textbook():
    low, high = wilson_interval(0.9, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson_interval(1.0, 50)[1] == 1
    assert wilson_interval(0.0, 50)[0] == 0


def test_the_size_of_a_block_changes_nothing(monkeypatch):
    rows = ArrayVectors(np.repeat(unit_rows(150, 16), 4, axis=0))
    queries = draw_queries(rows.num_rows, 40, 1)
    whole = exact_truths(rows, queries)
    monkeypatch.setattr(index_recall, "BLOCK_ROWS", 37)
    in_blocks = exact_truths(rows, queries)
    assert [t.duplicates for t in in_blocks] == [t.duplicates for t in whole]
    assert all(len(t.duplicates) == 4 for t in whole)
    for mine, theirs in zip(in_blocks, whole, strict=True):
        assert mine.nearest_score == pytest.approx(theirs.nearest_score, abs=1e-6)
        assert mine.plain_score == pytest.approx(theirs.plain_score, abs=1e-6)


def test_a_query_with_too_many_duplicates_is_left_out(monkeypatch):
    monkeypatch.setattr(index_recall, "MAX_DUPLICATES", 30)
    vectors = np.concatenate([unit_rows(50, 16), np.repeat(unit_rows(1, 16, seed=9), 40, axis=0)])
    truths = exact_truths(ArrayVectors(vectors), np.arange(90))
    assert [truth.row for truth in truths] == list(range(50))
    index = build_index(vectors, nlist=0, seed=0)
    assert measure_recall(index, ArrayVectors(vectors), truths).num_queries == 50
    assert measure_recall(index, ArrayVectors(vectors), []).interval == (0.0, 1.0)
