"""A scan meets all members of a row's nearest clusters, and nobody twice."""

import itertools

import numpy as np
import pytest
import torch
from index_rows import unit_rows

from declip_filter import knn_grouped, knn_lists
from declip_filter.kmeans import Clusters, cluster_rows
from declip_filter.knn_graph import ArrayVectors
from declip_filter.knn_grouped import (
    MEMBERS_OF_GROUP,
    Scan,
    choose_members,
    later_of_group,
)
from declip_filter.knn_lists import Lists
from declip_filter.knn_space import Space, project_rows, sort_rows

NUM, WIDTH = 1500, 10


def clustered(
    rows: np.ndarray, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Clusters]:
    matrix = project_rows(ArrayVectors(rows), Space(None, 32, dtype))
    clusters = cluster_rows(matrix, len(rows), 32, 0)
    return sort_rows(matrix, clusters.order), clusters


def check_found(found: np.ndarray) -> None:
    own = np.arange(len(found))
    assert not (found == own[:, None]).any()
    there = found >= 0
    assert (there[:, :-1] >= there[:, 1:]).all()
    assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in found)


def scanned(
    matrix: torch.Tensor,
    clusters: Clusters,
    steps: tuple[int, ...],
    *,
    offset: float = 0.1,
    groups: np.ndarray | None = None,
    num_threads: int = 1,
) -> Lists:
    """Lists after meeting so many clusters, at first and then step by step."""
    scan = Scan(
        matrix,
        clusters,
        most_probes=steps[-1],
        offset=offset,
        groups=groups,
        num_threads=num_threads,
    )
    lists = scan.first_lists(steps[0], WIDTH)
    for done, probes in itertools.pairwise(steps):
        scan.widen(lists, done, probes)
    return lists


@pytest.mark.parametrize("steps", [(10**6,), (1, 10**6), (2, 8, 10**6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.1, 0.6])
def test_all_clusters_met_is_exact_search(offset, dtype, steps):
    matrix, clusters = clustered(unit_rows(NUM, 24, num_centers=30), dtype)
    lists = scanned(matrix, clusters, steps, offset=offset)
    check_found(lists.near)
    scores = (matrix[:NUM, :31].float() @ matrix[:NUM, :31].float().T).numpy()
    np.fill_diagonal(scores, -np.inf)
    wanted = -np.sort(-scores, axis=1)[:, :WIDTH]
    reached = np.take_along_axis(scores, lists.near, axis=1)
    # Keys give 11 bits to the 47 * 32 candidates' columns; a bfloat16 product has 8 bits in all, of
    # up to 2 where a row's limit was far off, as after a single cluster.
    rounding = 1e-3 if dtype == torch.float32 else 1e-2 if steps[0] > 1 else 2**-6
    assert np.allclose(np.sort(reached, axis=1)[:, ::-1], wanted, atol=rounding)
    assert np.allclose(lists.scores, reached - offset, atol=rounding)
    assert (lists.scores[:, :-1] >= lists.scores[:, 1:]).all()


def test_more_clusters_find_more_and_lose_nothing():
    matrix, clusters = clustered(unit_rows(NUM, 24))
    full = scanned(matrix, clusters, (10**6,)).near
    scan = Scan(matrix, clusters, most_probes=16, offset=0.1)
    lists, shares, done = scan.first_lists(1, WIDTH), [], 1
    for probes in (1, 4, 16):
        before = lists.scores.copy()
        if probes > done:
            scan.widen(lists, done, probes)
        done = probes
        check_found(lists.near)
        assert (lists.scores >= before).all()
        shares.append(float((full[:, :, None] == lists.near[:, None, :]).any(axis=2).mean()))
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_what_one_of_a_pair_saw_both_know():
    matrix, clusters = clustered(unit_rows(NUM, 24))
    lists = scanned(matrix, clusters, (1, 3))
    last = lists.scores[:, -1]
    for row in range(0, NUM, 7):
        for other, score in zip(lists.near[row], lists.scores[row], strict=True):
            if other >= 0 and score > last[other] + 1e-4:
                assert row in lists.near[other]


@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_parts_and_threads_do_not_show(num_threads, in_parts, monkeypatch):
    """With the least buffer, 2,048 rows are scanned at once."""
    matrix, clusters = clustered(unit_rows(2500, 24), torch.bfloat16)
    wanted = scanned(matrix, clusters, (2, 6))
    if in_parts:
        monkeypatch.setattr(knn_grouped, "BUFFER_KEYS", 1)
        monkeypatch.setattr(knn_grouped, "PART_ROWS", 700)
        monkeypatch.setattr(knn_lists, "CLOSED_AT_ONCE", 90)
    found = scanned(matrix, clusters, (2, 6), num_threads=num_threads)
    assert np.array_equal(found.near, wanted.near)
    assert np.array_equal(found.scores, wanted.scores)


@pytest.mark.parametrize("steps", [(2,), (8,), (2, 8)])
def test_a_group_is_no_candidate_of_its_own_and_one_of_others(steps):
    matrix, clusters = clustered(unit_rows(NUM, 24, num_centers=30))
    groups = np.random.default_rng(1).integers(0, 60, NUM).astype(np.int32)
    found = scanned(matrix, clusters, steps, groups=groups).near
    check_found(found)
    for row in range(NUM):
        named = groups[found[row][found[row] >= 0]].tolist()
        assert int(groups[row]) not in named
        assert len(set(named)) == len(named)


def test_where_clusters_are_many_towns_are_met_first(monkeypatch):
    """All towns met are all clusters; few towns met find most of what all find."""
    matrix, clusters = clustered(unit_rows(NUM, 24, num_centers=30))
    wanted = Scan(matrix, clusters, most_probes=4, offset=0.1).probes
    monkeypatch.setattr(knn_grouped, "FEW_CLUSTERS", 1)
    for met, least in ((10**6, 0.99), (3, 0.7)):
        monkeypatch.setattr(knn_grouped, "MET_TOWNS", met)
        probes = Scan(matrix, clusters, most_probes=4, offset=0.1).probes
        assert all(len(set(row)) == len(row) for row in probes.tolist())
        shared = (wanted[:, :, None] == probes[:, None, :]).any(axis=2).mean()
        assert shared >= least


def test_a_cluster_has_few_members_of_one_group():
    matrix, clusters = clustered(unit_rows(NUM, 24))
    everyone = choose_members(matrix, clusters, None)
    assert np.array_equal(everyone.rows, np.arange(NUM))
    groups = (np.arange(NUM) % 3).astype(np.int32)
    members = choose_members(matrix, clusters, groups)
    of_row = np.repeat(np.arange(clusters.num_clusters), np.diff(clusters.starts))
    of_member = np.repeat(np.arange(clusters.num_clusters), np.diff(members.starts))
    assert np.array_equal(of_row[members.rows], of_member)
    assert torch.equal(members.matrix[: len(members.rows)], matrix[torch.from_numpy(members.rows)])
    for cluster in range(clusters.num_clusters):
        for group in range(3):
            all_of_it = np.flatnonzero((of_row == cluster) & (groups == group))
            kept = members.rows[(of_member == cluster) & (groups[members.rows] == group)]
            assert kept.tolist() == all_of_it[:MEMBERS_OF_GROUP].tolist()


def test_the_first_of_each_group_stays():
    groups = np.asarray([0, 0, 1, 1, 2], dtype=np.int32)
    near = np.asarray([[2, 3, 0, 1, 4], [-1, 0, -1, 1, -1]], dtype=np.int32)
    assert later_of_group(near, groups).tolist() == [
        [False, True, False, True, False],
        [False, False, False, True, False],
    ]
