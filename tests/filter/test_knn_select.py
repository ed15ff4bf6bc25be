"""Keys sort like scores, the best of them are the best, and jobs are done once each."""

import threading

import numpy as np
import pytest
import torch

from declip_filter.knn_select import (
    BLOCK_SCORES,
    LEAST_QUERIES,
    LIFT,
    MISSING,
    MOST_QUERIES,
    MOST_ROWS,
    Columnwise,
    Products,
    largest,
    pad_columns,
    run_in_threads,
)


@pytest.mark.parametrize("columns", [1, 2, 31, 1000, 2560])
def test_keys_say_score_and_column(columns):
    scores = torch.rand(5, columns, generator=torch.Generator().manual_seed(0)) * 2 - 1
    columnwise = Columnwise(columns)
    keys = columnwise.pack((scores + LIFT).clone())
    assert (columnwise.columns(keys) == np.arange(columns)).all()
    rounding = 2**-22 * 2 ** max(1, (columns - 1).bit_length())  # the bits the column took
    lost = scores.numpy() - columnwise.scores(keys)
    assert (lost >= -3e-7).all()
    assert (lost <= rounding + 3e-7).all()
    assert not columnwise.are_missing(keys).any()


def test_missing_scores_are_below_all_others():
    lifted = torch.full((1, 4), -1.0) + LIFT
    lifted[0, 2] = MISSING
    columnwise = Columnwise(4)
    keys = columnwise.pack(lifted)
    assert columnwise.are_missing(keys).tolist() == [[False, False, True, False]]
    assert columnwise.columns(largest(keys, 4, in_order=True))[0, -1] == 2


@pytest.mark.parametrize("num", [1, 7, 64, 200])
def test_largest_are_those_of_a_sort(num):
    keys = np.random.default_rng(0).permutation(64 * 3).astype(np.int32).reshape(3, 64)
    wanted = -np.sort(-keys, axis=1)[:, :num]
    assert np.array_equal(largest(keys.copy(), num, in_order=True), wanted)
    assert np.array_equal(np.sort(largest(keys.copy(), num), axis=1), wanted[:, ::-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 33, 700, MOST_ROWS])
def test_products_are_inner_products_less_the_offset(dtype, num_rows):
    """The last column is 1 in rows; buffers hold what an earlier block left."""
    matrix = torch.zeros(2 * MOST_ROWS, 32, dtype=dtype)
    matrix[:MOST_ROWS, :31] = torch.nn.functional.normalize(
        torch.randn(MOST_ROWS, 31, generator=torch.Generator().manual_seed(1)), dim=1
    )
    matrix[:MOST_ROWS, 31] = 1
    products = Products(dtype, 32, offset=0.25)
    at_once = Products.queries_at_once(num_rows)
    for num in (at_once, 3):
        queries = torch.arange(num) * 2
        wanted = matrix[queries][:, :31].float() @ matrix[:num_rows, :31].float().T - 0.25
        found = products.lifted(matrix, queries, matrix, num_rows) - LIFT
        assert found.shape == (num, num_rows)
        assert torch.allclose(found, wanted, atol=1e-5 if dtype == torch.float32 else 6e-3)
    assert (matrix[:MOST_ROWS, 31] == 1).all()


def test_blocks_fit_their_buffers():
    for num in range(1, MOST_ROWS + 1, 7):
        width, queries = pad_columns(num), Products.queries_at_once(num)
        assert num <= width <= MOST_ROWS
        assert LEAST_QUERIES <= queries <= MOST_QUERIES
        assert queries * width <= BLOCK_SCORES


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_each_job_is_done_once_on_one_thread(num_threads):
    done, threads, lock = [], set(), threading.Lock()

    def work(job: int) -> None:
        with lock:
            done.append(job)
            threads.add(torch.get_num_threads())

    before = torch.get_num_threads()
    run_in_threads(range(100), work, num_threads)
    assert sorted(done) == list(range(100))
    assert threads == {1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_failing_job_is_heard_of(num_threads):
    before = torch.get_num_threads()

    def work(job: int) -> None:
        if job == 7:
            raise ValueError("job 7")

    with pytest.raises(ValueError, match="job 7"):
        run_in_threads(range(10), work, num_threads)
    assert torch.get_num_threads() == before
