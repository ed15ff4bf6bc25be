"""A round knows both ends of a link, and finds the best of neighbors' neighbors."""

import numpy as np
import pytest
import torch
from index_rows import unit_rows

from declip_filter import knn_refine
from declip_filter.knn_exact import exact_neighbors
from declip_filter.knn_graph import ArrayVectors
from declip_filter.knn_lists import Lists
from declip_filter.knn_refine import both_ways, refine
from declip_filter.knn_space import Space, project_rows

NUM = 700


def random_lists(num: int, width: int, seed: int = 0) -> np.ndarray:
    """Lists of others, some with gaps at their ends."""
    generator = np.random.default_rng(seed)
    near = np.stack(
        [generator.permutation(np.delete(np.arange(num), row))[:width] for row in range(num)]
    ).astype(np.int32)
    near[generator.random(num) < 0.2, width // 2 :] = -1
    return near


def plain_links(near: np.ndarray, num: int) -> list[list[int]]:
    links = []
    for row in range(len(near)):
        ahead = [int(n) for n in near[row, :num] if n >= 0]
        pointing = [
            (place, other)
            for other in range(len(near))
            for place in range(min(num, near.shape[1]))
            if near[other, place] == row
        ]
        links.append(sorted({row, *ahead, *(other for _, other in sorted(pointing)[:num])}))
    return links


@pytest.mark.parametrize("num", [1, 3, 6])
def test_links_go_both_ways_nearest_first(num):
    near = random_lists(60, 6)
    found = both_ways(near, num)
    assert found.shape == (61, 2 * num)
    assert (found[60] == 60).all()
    wanted = plain_links(near, num)
    for row in range(60):
        assert sorted({row, *found[row].tolist()}) == wanted[row]


def lists_of(
    matrix: torch.Tensor, near: np.ndarray, offset: float, groups: np.ndarray | None = None
) -> Lists:
    """Lists of these candidates, best first; of a group the best alone, and none of the own."""
    num, width = near.shape
    rows = np.repeat(np.arange(num, dtype=np.int32), width)
    ids = near.ravel()
    rows, ids = rows[ids >= 0], ids[ids >= 0]
    scores = (matrix[rows, :-1].float() * matrix[ids, :-1].float()).sum(dim=1).numpy() - offset
    empty = np.full((num, width), -1, dtype=np.int32)
    lists = Lists(empty, np.full((num, width), -np.inf, dtype=np.float32), groups)
    lists.merge(0, num, rows, ids, scores.astype(np.float32))
    return lists


def true_scores(rows: np.ndarray, near: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float32)
    return np.where(near < 0, -np.inf, np.einsum("rd,rkd->rk", wide, wide[near]))


@pytest.mark.parametrize("with_groups", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_finds_the_best_of_what_it_follows(dtype, with_groups):
    """At least as good as the best of each row's own two steps: eight rows share theirs."""
    rows = unit_rows(NUM, 24, num_centers=20)
    matrix = project_rows(ArrayVectors(rows), Space(None, 32, dtype))
    groups = (np.arange(NUM) // 3).astype(np.int32) if with_groups else None
    lists = lists_of(matrix, random_lists(NUM, 8), 0.5, groups)
    before = lists.scores.copy()
    links = both_ways(lists.near, 4)
    refine(matrix, lists, num_hops=4, offset=0.5)
    found = lists.near
    assert found.shape == (NUM, 8)
    assert found.dtype == np.int32
    assert (lists.scores >= before).all()
    wide = rows.astype(np.float32)
    scores = true_scores(rows, found)
    assert np.allclose(lists.scores, scores - 0.5, atol=2e-3 if dtype.itemsize == 4 else 2e-2)
    for row in range(NUM):
        mine = [n for n in found[row].tolist() if n >= 0]
        assert row not in mine
        assert len(set(mine)) == len(mine)
        reached = np.setdiff1d(links[links[row]].ravel(), [row])
        reached_scores = wide[reached] @ wide[row]
        if groups is not None:
            named = groups[mine]
            assert groups[row] not in named
            assert len(set(named.tolist())) == len(mine)
            best: dict[int, float] = {}
            for group, score in zip(groups[reached].tolist(), reached_scores.tolist(), strict=True):
                if group != groups[row]:
                    best[group] = max(score, best.get(group, -2.0))
            reached_scores = np.asarray(list(best.values()))
        wanted = np.sort(reached_scores)[::-1][:8]
        assert (
            scores[row, : len(wanted)] >= wanted - (2e-3 if dtype.itemsize == 4 else 2e-2)
        ).all()


def test_threads_and_parts_do_not_show(monkeypatch):
    matrix = project_rows(ArrayVectors(unit_rows(NUM, 24)), Space(None, 32, torch.bfloat16))
    found = []
    for num_threads, part in ((1, 2**18), (3, 2**18), (1, 192)):
        monkeypatch.setattr(knn_refine, "PART_ROWS", part)
        lists = lists_of(matrix, random_lists(NUM, 8), 0.1)
        refine(matrix, lists, num_hops=5, offset=0.1, num_threads=num_threads)
        found.append((lists.near.tolist(), lists.scores.tolist()))
    assert found[0] == found[1] == found[2]


def test_rounds_lead_from_random_lists_to_the_true_ones():
    rows = unit_rows(NUM, 8)
    matrix = project_rows(ArrayVectors(rows), Space(None, 32, torch.float32))
    wanted = exact_neighbors(ArrayVectors(rows), np.arange(NUM), 6).ids
    lists, shares = lists_of(matrix, random_lists(NUM, 12), 0.1), []
    for _ in range(3):
        refine(matrix, lists, num_hops=8, offset=0.1)
        shares.append(float((wanted[:, :, None] == lists.near[:, None, :]).any(axis=2).mean()))
    assert shares[0] < shares[-1]
    assert shares[-1] > 0.95


@pytest.mark.parametrize("num_hops", [1, 2, 10])
@pytest.mark.parametrize("offset", [0.01, 0.6])
def test_two_rows_know_each_other(num_hops, offset):
    """Lists with room: no padding gets in. Lists of fewer than are followed do too."""
    matrix = project_rows(ArrayVectors(unit_rows(2, 24)), Space(None, 32, torch.float32))
    lists = lists_of(matrix, np.asarray([[1, -1], [-1, -1]], dtype=np.int32), offset)
    refine(matrix, lists, num_hops=num_hops, offset=offset)
    assert lists.near.tolist() == [[1, -1], [0, -1]]


@pytest.mark.parametrize("num", [65, 70, 128])
def test_the_last_row_finds_as_much_as_the_others(num):
    """Where all are in reach, each row's list is the true one: the last batch is not full."""
    rows = unit_rows(num, 24)
    matrix = project_rows(ArrayVectors(rows), Space(None, 32, torch.float32))
    lists = lists_of(matrix, random_lists(num, 9), 0.1)
    refine(matrix, lists, num_hops=9, offset=0.1)
    wanted = exact_neighbors(ArrayVectors(rows), np.arange(num), 9).ids
    shares = (wanted[:, :, None] == lists.near[:, None, :]).any(axis=2).mean(axis=1)
    assert shares.min() >= 8 / 9
