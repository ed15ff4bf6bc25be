"""What a matrix may be, what a list is, and how lists are merged."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_filter.knn_graph import ArrayVectors, Graph, check_groups, check_k, order_lists
from declip_shards import DeclipError


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    candidates=st.lists(st.tuples(st.integers(-1, 9), st.integers(-3, 3)), min_size=1, max_size=24),
    k=st.integers(1, 12),
    num_groups=st.integers(0, 5),
)
def test_merged_lists_are_a_plain_loops(candidates, k, num_groups):
    """By score, then by row; each row once (at its score), each group once."""
    score_of = dict(candidates)  # a row has one score wherever it was found
    found = [(row, -np.inf if row < 0 else float(score_of[row])) for row, _ in candidates]
    groups = torch.arange(10) % num_groups if num_groups else None
    wanted, seen = [], set()
    for score, row in sorted({(-score, row) for row, score in found if row >= 0}):
        name = row if groups is None else int(groups[row])
        if name not in seen:
            seen.add(name)
            wanted.append((row, -score))
    wanted = wanted[:k]
    wanted += [(-1, -np.inf)] * (min(k, len(found)) - len(wanted))
    scores, ids = order_lists(
        torch.tensor([[score for _, score in found]]),
        torch.tensor([[row for row, _ in found]]),
        k,
        groups,
    )
    assert list(zip(ids[0].tolist(), scores[0].tolist(), strict=True)) == wanted


def test_array_vectors_are_the_array():
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    vectors = ArrayVectors(array)
    assert (vectors.num_rows, vectors.dim) == (4, 3)
    assert np.array_equal(vectors.read(1, 3), array[1:3])
    assert np.array_equal(vectors.take(np.asarray([3, 0, 3])), array[[3, 0, 3]])


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3)), np.zeros(3, np.float32), np.zeros((2, 3), int)]
)
def test_other_arrays_are_refused(array):
    with pytest.raises(DeclipError, match="give float16 or float32 of shape"):
        ArrayVectors(array)


def test_a_graph_knows_its_size():
    graph = Graph(np.zeros((5, 3), np.int64), np.zeros((5, 3), np.float32))
    assert (graph.num_rows, graph.k, graph.recall) == (5, 3, None)


def test_lists_of_nothing_are_refused():
    check_k(1, 2)
    with pytest.raises(DeclipError, match="k is -1; a list needs at least 1 neighbor"):
        check_k(-1, 2)
    with pytest.raises(DeclipError, match="there are 1 vectors; neighbors need at least 2"):
        check_k(1, 1)


@pytest.mark.parametrize("groups", [np.zeros(4, int), np.zeros((5, 1), int), np.zeros(5)])
def test_groups_are_one_integer_a_row(groups):
    check_groups(None, 5)
    check_groups(np.zeros(5, np.int32), 5)
    with pytest.raises(DeclipError, match="give one integer for each of the 5 vectors"):
        check_groups(groups, 5)
