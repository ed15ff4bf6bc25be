"""Exact search is a plain loop's result, whatever is scanned at once and in how many bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index_rows import unit_rows

from declip_filter import knn_exact
from declip_filter.knn_exact import best_columns, exact_neighbors, number_groups
from declip_filter.knn_graph import ArrayVectors, Graph
from declip_shards import DeclipError


def steps_rows(num: int, dim: int, seed: int) -> np.ndarray:
    """float32 of a few small values each, so that products are exact and ties are many."""
    return np.random.default_rng(seed).integers(-2, 3, (num, dim)).astype(np.float32) / 8


def plain_loop(rows: np.ndarray, queries: np.ndarray, k: int, groups: np.ndarray | None) -> Graph:
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    for place, query in enumerate(queries.tolist()):
        products = rows.astype(np.float64) @ rows[query].astype(np.float64)
        seen = set() if groups is None else {int(groups[query])}
        found = []
        for row in sorted(range(len(rows)), key=lambda row: (-products[row], row)):
            if row == query or (groups is not None and int(groups[row]) in seen):
                continue
            if groups is not None:
                seen.add(int(groups[row]))
            found.append(row)
        found = found[:k]
        ids[place, : len(found)] = found
        scores[place, : len(found)] = products[found]
    return Graph(ids, scores)


def check_same(found: Graph, wanted: Graph) -> None:
    assert np.array_equal(found.ids, wanted.ids)
    assert np.array_equal(found.scores, wanted.scores)
    assert found.recall == 1


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    num=st.integers(2, 60),
    dim=st.integers(1, 6),
    k=st.integers(1, 80),
    num_groups=st.integers(0, 12),
    rows_at_once=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_it_is_a_plain_loop(num, dim, k, num_groups, rows_at_once, dtype, seed):
    rows = steps_rows(num, dim, seed)
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, num_groups, num) * 10**15 if num_groups else None
    queries = generator.permutation(num)[: generator.integers(1, num + 1)]
    found = exact_neighbors(
        ArrayVectors(rows), queries, k, rows_at_once=rows_at_once, groups=groups, scan_dtype=dtype
    )
    check_same(found, plain_loop(rows, queries, k, groups))


@pytest.mark.parametrize("with_groups", [False, True])
def test_many_chunks_and_blocks_change_nothing(with_groups, monkeypatch):
    """Of 700 rows, 90 fit a chunk; all in one and in many is a plain loop's result."""
    rows = np.repeat(steps_rows(350, 8, 1), 2, axis=0)
    groups = np.arange(700) // 4 if with_groups else None
    queries = np.arange(0, 700, 20)
    wanted = plain_loop(rows, queries, 20, groups)
    for size in (None, 90 * 4 * 8):
        if size:
            monkeypatch.setattr(knn_exact, "CPU_CHUNK_BYTES", size)
        for at_once in (None, 1, 9):
            found = exact_neighbors(
                ArrayVectors(rows), queries, 20, rows_at_once=at_once, groups=groups
            )
            check_same(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_few_bits_of_a_scan_do_not_show(dtype):
    """Rows so near each other that a scan in few bits cannot tell them apart."""
    spread = np.random.default_rng(0).normal(size=(1500, 16)) * 1e-3
    rows = np.float32(1) * (spread + np.eye(16)[0])
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    queries = np.arange(0, 1500, 25)
    wanted = exact_neighbors(ArrayVectors(rows), queries, 5, scan_dtype=torch.float32)
    check_same(exact_neighbors(ArrayVectors(rows), queries, 5, scan_dtype=dtype), wanted)


def test_more_ties_than_candidates_are_kept_by_row():
    rows = np.repeat(unit_rows(2, 8), 400, axis=0)
    found = exact_neighbors(ArrayVectors(rows), np.asarray([0, 5, 799]), 6)
    assert found.ids.tolist() == [
        [1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 6],
        [400, 401, 402, 403, 404, 405],
    ]


def test_a_near_group_larger_than_the_candidates_hides_nothing():
    """300 copies of one group are nearest; the list goes on with the other groups."""
    rows = np.concatenate([np.repeat(unit_rows(1, 8), 301, axis=0), unit_rows(20, 8, seed=4)])
    groups = np.concatenate([[0], np.ones(300), np.arange(2, 22)]).astype(np.int64)
    found = exact_neighbors(ArrayVectors(rows), np.asarray([0]), 30, groups=groups)
    assert found.ids[0, 0] == 1
    assert sorted(found.ids[0, 1:21].tolist()) == list(range(301, 321))
    assert found.ids[0, 21:].tolist() == [-1] * 9
    assert (found.scores[0, 21:] == -np.inf).all()


def test_no_queries_no_lists():
    found = exact_neighbors(ArrayVectors(unit_rows(9, 4)), np.empty(0, dtype=np.int64), 3)
    assert found.ids.shape == found.scores.shape == (0, 3)


@pytest.mark.parametrize("num", [0, 1])
def test_fewer_than_two_rows_are_refused(num):
    with pytest.raises(DeclipError, match=f"there are {num} vectors; neighbors need at least 2"):
        exact_neighbors(ArrayVectors(np.zeros((num, 4), np.float16)), np.arange(num), 3)


@pytest.mark.parametrize("bad", [3, 30])
def test_rows_that_are_not_finite_are_refused_by_number(bad):
    """Row 3 is among the queries, row 30 among those they meet."""
    rows = unit_rows(40, 8)
    rows[bad, 2] = np.nan
    with pytest.raises(DeclipError, match=f"row {bad} of the vectors is not finite; leave it out"):
        exact_neighbors(ArrayVectors(rows), np.arange(10), 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(DeclipError, match="device is 'cuda', but this machine shows torch no GPU"):
        exact_neighbors(ArrayVectors(unit_rows(9, 4)), np.arange(9), 3, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_gpu_finds_what_a_cpu_finds(dtype):
    rows = np.repeat(steps_rows(3000, 16, 1), 2, axis=0)
    on_cpu = exact_neighbors(ArrayVectors(rows), np.arange(6000), 12)
    on_gpu = exact_neighbors(
        ArrayVectors(rows), np.arange(6000), 12, device="cuda", scan_dtype=dtype
    )
    check_same(on_gpu, on_cpu)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"rows_at_once": 0}, "rows_at_once is 0; it must be at least 1"),
        ({"k": 0}, "k is 0; a list needs at least 1 neighbor"),
        ({"scan_dtype": torch.int8}, "scan_dtype is torch.int8; it must be torch.float32"),
        ({"device": "gpu"}, "device is 'gpu'; it must be 'cpu', 'cuda' or 'cuda:N'"),
        ({"groups": np.zeros(9)}, r"groups are float64 of shape \(9,\); give one integer"),
    ],
)
def test_wrong_settings_are_refused(wrong, sentence):
    with pytest.raises(DeclipError, match=sentence):
        exact_neighbors(ArrayVectors(unit_rows(9, 4)), np.arange(9), **{"k": 3, **wrong})


def test_mapped_files_are_read_without_a_warning(tmp_path: Path, recwarn):
    """torch warns (once a process, unless told otherwise) of arrays that cannot be written to."""
    np.save(tmp_path / "rows.npy", unit_rows(60, 8))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        found = exact_neighbors(ArrayVectors(mapped), np.arange(60), 3)
    finally:
        torch.set_warn_always(before)
    assert not recwarn.list
    check_same(found, exact_neighbors(ArrayVectors(np.array(mapped)), np.arange(60), 3))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(columns=st.integers(1, 700), num=st.integers(1, 12), seed=st.integers(0, 99))
def test_best_columns_are_those_of_topk(columns, num, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-50, 50, (3, columns), generator=generator).float()
    values, places = best_columns(scores, num)
    assert torch.equal(values, scores.topk(min(num, columns), dim=1).values)
    assert torch.equal(scores.gather(1, places), values)
    assert all(len(set(row)) == len(row) for row in places.tolist())


def test_numbered_groups_are_the_same_groups():
    groups = np.asarray([7, -3, 7, 10**18, -3])
    assert number_groups(groups).tolist() == [1, 0, 1, 2, 0]
