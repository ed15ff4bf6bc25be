"""A scan meets all members of a row's nearest clusters, and nobody twice."""

import numpy as np
import pytest
import torch
from index_rows import unit_rows

from declip_filter import knn_grouped
from declip_filter.kmeans import Clusters, cluster_rows
from declip_filter.knn_graph import ArrayVectors
from declip_filter.knn_grouped import (
    MEMBERS_OF_GROUP,
    choose_members,
    close_up,
    first_of_groups,
    later_of_group,
    scan_clusters,
)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 0.6])
def test_all_clusters_met_is_exact_search(offset, dtype):
    matrix, clusters = clustered(unit_rows(NUM, 24, num_centers=30), dtype)
    found = scan_clusters(matrix, clusters, 10**6, WIDTH, offset=offset)
    check_found(found)
    scores = (matrix[:NUM, :31].float() @ matrix[:NUM, :31].float().T).numpy()
    np.fill_diagonal(scores, -np.inf)
    wanted = -np.sort(-scores, axis=1)[:, :WIDTH]
    reached = np.take_along_axis(scores, found, axis=1)
    # Keys give 11 bits to the 47 * 32 candidates' columns; a bfloat16 product has 8 bits in all.
    rounding = 1e-3 if dtype == torch.float32 else 1e-2
    assert np.allclose(np.sort(reached, axis=1)[:, ::-1], wanted, atol=rounding)


def test_more_clusters_find_more():
    matrix, clusters = clustered(unit_rows(NUM, 24))
    full = scan_clusters(matrix, clusters, 10**6, WIDTH)
    shares = []
    for probes in (1, 4, 16):
        found = scan_clusters(matrix, clusters, probes, WIDTH)
        check_found(found)
        shares.append(float((full[:, :, None] == found[:, None, :]).any(axis=2).mean()))
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


@pytest.mark.parametrize("scan_bytes", [1, 2**28])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_parts_and_threads_do_not_show(num_threads, scan_bytes, monkeypatch):
    """With the least buffer, 1,024 rows are scanned at once."""
    matrix, clusters = clustered(unit_rows(NUM, 24), torch.bfloat16)
    wanted = scan_clusters(matrix, clusters, 6, WIDTH)
    monkeypatch.setattr(knn_grouped, "SCAN_BYTES", scan_bytes)
    found = scan_clusters(matrix, clusters, 6, WIDTH, num_threads=num_threads)
    assert np.array_equal(found, wanted)


def test_a_group_is_no_candidate_of_its_own_and_one_of_others():
    matrix, clusters = clustered(unit_rows(NUM, 24, num_centers=30))
    groups = np.random.default_rng(1).integers(0, 60, NUM).astype(np.int32)
    found = scan_clusters(matrix, clusters, 8, WIDTH, groups=groups)
    check_found(found)
    for row in range(NUM):
        named = groups[found[row][found[row] >= 0]].tolist()
        assert int(groups[row]) not in named
        assert len(set(named)) == len(named)


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


def test_lists_close_up_in_their_order():
    near = np.asarray([[-1, 4, -1, 2], [1, 2, 3, 0], [-1, -1, -1, -1], [5, -1, -1, -1]], np.int32)
    assert close_up(near.copy()).tolist() == [
        [4, 2, -1, -1],
        [1, 2, 3, 0],
        [-1, -1, -1, -1],
        [5, -1, -1, -1],
    ]


def test_the_first_of_each_group_stays():
    groups = np.asarray([0, 0, 1, 1, 2], dtype=np.int32)
    near = np.asarray([[2, 3, 0, 1, 4], [-1, 0, -1, 1, -1]], dtype=np.int32)
    assert later_of_group(near, groups).tolist() == [
        [False, True, False, True, False],
        [False, False, False, True, False],
    ]
    assert first_of_groups(near, groups).tolist() == [[2, 0, 4, -1, -1], [0, -1, -1, -1, -1]]
