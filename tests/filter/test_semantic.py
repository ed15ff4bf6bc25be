import numpy as np
import pytest

from declip_filter import semantic
from declip_filter.semantic import cluster_leaders, semantic_leaders


class Matrix:
    """Vectors in memory, which notes the most rows asked for at once."""

    def __init__(self, rows):
        self.rows = rows
        self.most = 0

    @property
    def num_rows(self):
        return len(self.rows)

    @property
    def dim(self):
        return self.rows.shape[1]

    def take(self, rows, /):
        self.most = max(self.most, len(rows))
        return self.rows[rows]


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture
def crowd():
    """600 rows: 200 points, some with near copies, in a shuffled order of preference."""
    rng = np.random.default_rng(4)
    points = rng.normal(size=(200, 24))
    copies = [points[:k] + 0.15 * rng.normal(size=(k, 24)) for k in (200, 100, 60, 40)]
    return Matrix(unit(np.concatenate([points, *copies]))), rng.permutation(600)


def one_by_one(rows, rank, min_cosine):
    exact = rows.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    cosine = exact @ exact.T
    leader = np.full(len(rows), -1)
    kept: list[int] = []
    for row in np.argsort(rank):
        near = [k for k in kept if cosine[row, k] >= min_cosine]
        if near:
            leader[row] = near[0]
        else:
            kept.append(row)
    return leader, cosine


@pytest.mark.parametrize("block", [7, 64, 1024])
def test_one_cluster_is_going_from_the_best_to_the_worst(monkeypatch, crowd, block):
    matrix, rank = crowd
    monkeypatch.setattr(semantic, "BLOCK", block)
    leader, near = semantic_leaders(matrix, rank, min_cosine=0.97, num_clusters=1)
    wanted, cosine = one_by_one(matrix.rows, rank, 0.97)
    assert leader.tolist() == wanted.tolist()
    rows = np.flatnonzero(leader >= 0)
    assert 100 < len(rows) < 400
    np.testing.assert_allclose(near[rows], cosine[rows, leader[rows]], atol=1e-6)
    assert not near[leader < 0].any()
    assert matrix.most <= max(block, 1)


def test_clusters_part_few_pairs_and_make_up_none(crowd):
    matrix, rank = crowd
    leader, _ = semantic_leaders(matrix, rank, min_cosine=0.97, num_clusters=9, seed=3)
    exact, cosine = one_by_one(matrix.rows, rank, 0.97)
    rows = np.flatnonzero(leader >= 0)
    assert (cosine[rows, leader[rows]] >= 0.97).all()
    assert (rank[leader[rows]] < rank[rows]).all()
    assert (leader[leader[rows]] == -1).all()
    assert len(rows) >= 0.8 * (exact >= 0).sum()


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_change_nothing(monkeypatch, crowd, num_threads):
    matrix, rank = crowd
    monkeypatch.setattr(semantic, "ROWS_AT_ONCE", 50)
    one, many = (
        semantic_leaders(matrix, rank, min_cosine=0.96, num_clusters=7, seed=1, num_threads=num)
        for num in (1, num_threads)
    )
    assert one[0].tobytes() == many[0].tobytes()
    assert one[1].tobytes() == many[1].tobytes()


def test_a_large_cluster_is_parted_again(monkeypatch, crowd):
    matrix, _ = crowd
    monkeypatch.setattr(semantic, "LARGE_CLUSTER", 60)
    monkeypatch.setattr(semantic, "ROWS_PER_CLUSTER", 30)
    parts = list(semantic._clusters(matrix, np.arange(600), 2, 0, 1))
    assert sorted(np.concatenate(parts).tolist()) == list(range(600))
    assert len(parts) > 8


def test_equal_vectors_are_one_group_however_many():
    same = Matrix(np.repeat(unit(np.ones((1, 8))), 3000, axis=0))
    leader, near = cluster_leaders(same, np.arange(3000)[::-1].copy(), 1.0)
    assert leader.tolist() == [-1] + [0] * 2999
    assert near[1:].tolist() == [1.0] * 2999


def test_no_rows_and_one_row():
    for num in (0, 1):
        leader, _ = semantic_leaders(
            Matrix(unit(np.ones((num, 4)))), np.arange(num), min_cosine=0.9
        )
        assert leader.tolist() == [-1] * num
