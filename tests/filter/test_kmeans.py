"""Clusters are a partition of the rows, near ones together, the same at any number of threads."""

import numpy as np
import pytest
import torch
from index_rows import unit_rows

from declip_filter import kmeans
from declip_filter.kmeans import SPLIT_ABOVE, Clusters, assign, cluster_rows, nearest_centers
from declip_filter.knn_graph import ArrayVectors
from declip_filter.knn_select import MOST_ROWS
from declip_filter.knn_space import Space, project_rows

SIZE = 32


def matrix_of(rows: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return project_rows(ArrayVectors(rows), Space(None, rows.shape[1] // 32 * 32 + 32, dtype))


def check_partition(clusters: Clusters, num_rows: int) -> None:
    assert np.array_equal(np.sort(clusters.order), np.arange(num_rows))
    sizes = np.diff(clusters.starts)
    assert clusters.starts[0] == 0
    assert clusters.starts[-1] == num_rows
    assert (sizes > 0).all()
    assert clusters.towns[0] == 0
    assert clusters.towns[-1] == clusters.num_clusters
    assert (np.diff(clusters.towns) >= 0).all()
    assert np.diff(clusters.towns).max() <= MOST_ROWS
    assert len(clusters.town_centers) == len(clusters.towns) - 1
    assert len(clusters.centers) == clusters.num_clusters
    for start, stop in zip(clusters.starts[:-1], clusters.starts[1:], strict=True):
        assert (np.diff(clusters.order[start:stop]) > 0).all()


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clusters_are_a_partition_and_no_thread_shows(dtype, num_threads):
    matrix = matrix_of(unit_rows(3000, 24, num_centers=40), dtype)
    clusters = cluster_rows(matrix, 3000, SIZE, 7, num_threads)
    check_partition(clusters, 3000)
    assert np.diff(clusters.starts).max() <= SPLIT_ABOVE * SIZE
    again = cluster_rows(matrix, 3000, SIZE, 7)
    assert np.array_equal(clusters.order, again.order)
    assert np.array_equal(clusters.starts, again.starts)
    assert torch.equal(clusters.centers, again.centers)


def test_members_are_near_their_centers():
    rows = unit_rows(3000, 24, num_centers=40)
    matrix = matrix_of(rows)
    clusters = cluster_rows(matrix, 3000, SIZE, 0)
    of_row = np.repeat(np.arange(clusters.num_clusters), np.diff(clusters.starts))
    ordered = matrix[torch.from_numpy(clusters.order)]
    own = (ordered * clusters.centers[torch.from_numpy(of_row)]).sum(dim=1)
    any_of_them = (ordered @ clusters.centers.T).mean()
    assert own.mean() > any_of_them + 0.4
    assert torch.allclose(clusters.centers.norm(dim=1), torch.ones(clusters.num_clusters))
    assert (clusters.centers[:, -1] == 0).all()  # that column holds the scores' offset


@pytest.mark.parametrize("num", [1, 2, 31, 33])
def test_few_rows_are_few_clusters(num):
    check_partition(cluster_rows(matrix_of(unit_rows(num, 24)), num, SIZE, 0), num)


def test_equal_rows_are_dealt_out():
    """No center parts them: clusters of the wanted size, by row."""
    clusters = cluster_rows(matrix_of(np.repeat(unit_rows(1, 24), 2000, axis=0)), 2000, SIZE, 0)
    check_partition(clusters, 2000)
    assert np.diff(clusters.starts).max() <= SPLIT_ABOVE * SIZE


def test_a_town_of_more_clusters_than_a_block_holds_counts_as_several(monkeypatch):
    """As where a million rows of many have (nearly) the same text: one town gets them all."""
    monkeypatch.setattr(kmeans, "MOST_ROWS", 100)
    num = 1030
    clusters = cluster_rows(matrix_of(np.repeat(unit_rows(1, 24), num, axis=0)), num, 1, 0)
    check_partition(clusters, num)
    assert clusters.num_clusters == num
    assert np.diff(clusters.towns).max() == 100


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("num", [1, 5, 80])
def test_nearest_centers_are_those_of_all_products(num, num_threads):
    rows = unit_rows(1500, 24)
    matrix = matrix_of(rows)
    centers = torch.zeros(60, 32)
    centers[:, :24] = torch.from_numpy(unit_rows(60, 24, seed=1)).float()
    scores = matrix[:1500, :24] @ centers[:, :24].T
    near = nearest_centers(matrix, 1500, centers, num, num_threads)
    assert near.shape == (1500, min(num, 60))
    assert all(len(set(row)) == len(row) for row in near.tolist())
    found = scores.gather(1, torch.from_numpy(near).long())
    wanted = scores.topk(min(num, 60), dim=1).values
    assert torch.allclose(found, wanted, atol=1e-4)  # keys round where columns stand
    labels = assign(matrix, torch.arange(1500), centers)
    assert np.array_equal(labels, near[:, 0])
