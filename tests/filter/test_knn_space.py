"""A space keeps what its measure says, and rows stand in it with their offset's column."""

import numpy as np
import pytest
import torch
from index_rows import unit_rows

from declip_filter.knn_exact import exact_neighbors
from declip_filter.knn_graph import ArrayVectors
from declip_filter.knn_select import MOST_ROWS
from declip_filter.knn_space import (
    LEAST_OFFSET,
    Space,
    candidate_spaces,
    project_rows,
    shares_kept,
    sort_rows,
)


def flat_rows(num: int, dim: int, inside: int) -> np.ndarray:
    """Unit rows of many dimensions that lie in a few: (num, dim) float16."""
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(dim, dim)))[0][:inside]
    return np.asarray(unit_rows(num, inside).astype(np.float64) @ turn, dtype=np.float16)


def check_padding(padding: torch.Tensor) -> None:
    """Zeros, and a first row below all vectors for queries that end in minus an offset."""
    assert (padding[1:] == 0).all()
    assert (padding[0, :-1] == 0).all()
    assert padding[0, -1] * LEAST_OFFSET > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_projected_with_a_last_one_and_padding(dtype):
    rows = unit_rows(300, 40)
    axes = torch.linalg.qr(torch.randn(40, 31, generator=torch.Generator().manual_seed(0)))[0]
    matrix = project_rows(ArrayVectors(rows), Space(axes, 32, dtype))
    assert matrix.shape == (300 + MOST_ROWS, 32)
    assert matrix.dtype == dtype
    assert (matrix[:300, -1] == 1).all()
    check_padding(matrix[300:])
    wanted = torch.nn.functional.normalize(torch.from_numpy(rows).float() @ axes, dim=1)
    assert torch.allclose(
        matrix[:300, :31].float(), wanted, atol=1e-5 if dtype == torch.float32 else 2e-2
    )


def test_all_dimensions_are_the_vectors_themselves():
    rows = unit_rows(50, 40)
    matrix = project_rows(ArrayVectors(rows), Space(None, 64, torch.float32))
    assert np.array_equal(matrix[:50, :40].numpy(), rows.astype(np.float32))
    assert (matrix[:50, 40:63] == 0).all()


def test_few_dimensions_do_where_vectors_lie_in_few():
    vectors = ArrayVectors(flat_rows(600, 200, 20))
    spaces = list(candidate_spaces(vectors, 10, dtype=torch.float32))
    assert [space.dim for space in spaces] == [64, 96, 128, 192, 224]
    assert [space.axes is None for space in spaces] == [False] * 4 + [True]


def test_all_dimensions_are_needed_where_none_is_better():
    vectors = ArrayVectors(unit_rows(2000, 200))
    spaces = list(candidate_spaces(vectors, 10, dtype=torch.float32))
    assert 64 not in [space.dim for space in spaces]
    assert spaces[-1].axes is None
    assert spaces[-1].dim > 200
    assert spaces[-1].dim % 32 == 0


def test_the_seed_alone_draws_the_axes():
    vectors = ArrayVectors(flat_rows(600, 200, 20))
    first, again = (next(candidate_spaces(vectors, 5, dtype=torch.float32)) for _ in range(2))
    assert first.axes is not None
    assert again.axes is not None
    assert torch.equal(first.axes, again.axes)


@pytest.mark.parametrize("components", [7, 31])
def test_shares_kept_are_a_plain_loops(components, monkeypatch):
    """A block of 1,000 rows is met in parts, and a share counts what a sort of all finds."""
    monkeypatch.setattr("declip_filter.knn_space.BLOCK_SCORES", 256 * 300)
    rows = unit_rows(1000, 48, num_centers=20)
    vectors = ArrayVectors(rows)
    axes = torch.linalg.qr(torch.randn(48, components, generator=torch.Generator().manual_seed(3)))
    matrix = project_rows(vectors, Space(axes[0], 32, torch.float32))
    queries = np.arange(0, 1000, 40)
    true = exact_neighbors(vectors, queries, 6).ids
    true[0, 4:] = -1  # a list of fewer
    scores = (matrix[queries][:, :31] @ matrix[:1000, :31].T).numpy()
    scores[np.arange(len(queries)), queries] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")
    widths = [6, 20, 900]
    wanted = [
        np.mean(
            [row in best[i, :width] for i in range(len(queries)) for row in true[i] if row >= 0]
        )
        for width in widths
    ]
    kept = shares_kept(matrix, queries, true, widths)
    assert kept == pytest.approx(wanted, abs=0.02)  # keys round near scores to one
    assert kept == sorted(kept)


def test_sorted_rows_are_the_rows_in_that_order():
    matrix = project_rows(ArrayVectors(unit_rows(70, 20)), Space(None, 32, torch.bfloat16))
    order = np.random.default_rng(0).permutation(70)
    ordered = sort_rows(matrix, order)
    assert ordered.shape == matrix.shape
    assert torch.equal(ordered[:70], matrix[torch.from_numpy(order)])
    check_padding(ordered[70:])


def test_mapped_files_are_read_without_a_warning(tmp_path, recwarn):
    np.save(tmp_path / "rows.npy", unit_rows(60, 20))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        spaces = list(candidate_spaces(ArrayVectors(mapped), 3))
        project_rows(ArrayVectors(mapped), spaces[-1])
    finally:
        torch.set_warn_always(before)
    assert not recwarn.list
