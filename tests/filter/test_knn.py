"""The fast graph: what its lists are, that only the seed changes them, and what it refuses."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from index_rows import unit_rows

from declip_filter import knn
from declip_filter.knn import ArrayVectors, Graph, approximate_graph, exact_neighbors
from declip_filter.knn_rerank import StoredRows
from declip_shards import DeclipError

NUM, DIM, K = 6000, 32, 10


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.asarray(unit_rows(NUM, DIM, num_centers=60))


@pytest.fixture(scope="module")
def exact(rows: np.ndarray) -> Graph:
    return exact_neighbors(ArrayVectors(rows), np.arange(NUM), K)


@pytest.fixture(scope="module")
def graph(rows: np.ndarray) -> Graph:
    return approximate_graph(ArrayVectors(rows), K)


def true_scores(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    products: np.ndarray = np.einsum("rd,rkd->rk", wide, wide[ids])
    products[ids < 0] = -np.inf
    return products


def share_found(graph: Graph, exact: Graph) -> float:
    """By scores, as rows that are as near as the last true neighbor are as good."""
    found = (graph.scores >= exact.scores[:, -1:] - 1e-5) & (graph.ids >= 0)
    return float(found.sum() / (exact.ids >= 0).sum())


def check_lists(graph: Graph, rows: np.ndarray) -> None:
    """What holds for every graph, however good."""
    there = graph.ids >= 0
    assert not (graph.ids == np.arange(len(rows))[:, None]).any()
    assert (there[:, :-1] >= there[:, 1:]).all()
    assert (np.isfinite(graph.scores) == there).all()
    assert np.allclose(graph.scores, true_scores(rows, graph.ids), atol=1e-5)
    for ids, scores in zip(graph.ids.tolist(), graph.scores.tolist(), strict=True):
        pairs = [(-score, row) for row, score in zip(ids, scores, strict=True) if row >= 0]
        assert pairs == sorted(pairs)
        assert len({row for _, row in pairs}) == len(pairs)


def test_the_set_is_large_enough_for_the_fast_way():
    assert NUM >= knn.EXACT_BELOW


def test_lists_are_sorted_true_scores_of_others(graph, rows):
    check_lists(graph, rows)
    assert graph.ids.shape == (NUM, K)
    assert graph.ids.dtype == np.int64
    assert graph.scores.dtype == np.float32
    assert graph.num_rows == NUM
    assert graph.k == K


def test_the_target_is_reached_against_exact_search(graph, exact):
    assert share_found(graph, exact) >= 0.95


@pytest.mark.parametrize("scan_dtype", [torch.float32, torch.bfloat16])
def test_both_scans_reach_the_target_at_another_seed(scan_dtype, rows, exact):
    graph = approximate_graph(ArrayVectors(rows), K, scan_dtype=scan_dtype, seed=5)
    check_lists(graph, rows)
    assert share_found(graph, exact) >= 0.95


@pytest.mark.parametrize("target", [0.9])
def test_the_recall_told_is_the_recall_within_its_error(target, exact, rows, monkeypatch):
    """Few probes at first, so that graphs of poor recall are judged too."""
    monkeypatch.setattr(knn, "FIRST_PROBES", (1, 2))
    graph = approximate_graph(ArrayVectors(rows), K, recall_target=target)
    wanted = exact.scores[:, -1:] - 1e-5
    of_rows = (graph.scores >= wanted).mean(axis=1)
    # The sample is of 256 rows; four standard errors, and one that no measured spread is under.
    error = 4 * float(of_rows.std()) / np.sqrt(knn.SAMPLED_ROWS) + 1 / knn.SAMPLED_ROWS
    assert graph.recall == pytest.approx(float(of_rows.mean()), abs=error)
    assert graph.recall >= target


def test_more_is_reached_where_more_is_asked(rows, exact, monkeypatch):
    monkeypatch.setattr(knn, "FIRST_PROBES", (1, 2))
    graphs = [approximate_graph(ArrayVectors(rows), K, recall_target=t) for t in (0.3, 0.99)]
    low, high = (share_found(graph, exact) for graph in graphs)
    assert low < high
    assert high >= 0.98


@pytest.mark.parametrize("num_threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bytes(num_threads, graph, rows):
    again = approximate_graph(ArrayVectors(rows), K, num_threads=num_threads)
    assert again.ids.tobytes() == graph.ids.tobytes()
    assert again.scores.tobytes() == graph.scores.tobytes()
    assert again.recall == graph.recall


def test_torch_has_its_threads_back(rows):
    before = torch.get_num_threads()
    approximate_graph(ArrayVectors(rows), K, num_threads=2)
    assert torch.get_num_threads() == before


def test_less_memory_gives_the_same_graph(graph, rows, monkeypatch):
    """At the lower limit vectors are read again where lists are scored."""
    needed, kept = [], []
    estimate = knn.estimate_bytes

    def spy_on_estimate(*args: Any) -> int:
        needed.append(estimate(*args))
        return needed[-1]

    def spy_on_rows(*args: Any, keep: bool) -> StoredRows:
        kept.append(keep)
        return StoredRows(*args, keep=keep)

    monkeypatch.setattr(knn, "estimate_bytes", spy_on_estimate)
    monkeypatch.setattr(knn, "StoredRows", spy_on_rows)
    for is_tight in (False, True):
        gib = (max(needed) + 1) / 2**30 if is_tight else 8.0
        again = approximate_graph(ArrayVectors(rows), K, max_memory_gib=gib)
        assert again.ids.tobytes() == graph.ids.tobytes()
        assert again.scores.tobytes() == graph.scores.tobytes()
    assert kept == [True, False]


def test_groups_are_kept_apart(rows):
    rows = rows[: knn.EXACT_BELOW]
    groups = np.random.default_rng(3).integers(0, 400, len(rows)) * 10**12 - 5
    wanted = exact_neighbors(ArrayVectors(rows), np.arange(len(rows)), K, groups=groups)
    graph = approximate_graph(ArrayVectors(rows), K, groups=groups)
    check_lists(graph, rows)
    named = groups[graph.ids]
    assert not ((named == groups[:, None]) & (graph.ids >= 0)).any()
    for own, there in zip(named, graph.ids >= 0, strict=True):
        assert len(np.unique(own[there])) == there.sum()
    assert share_found(graph, wanted) >= 0.95


def test_equal_rows_fill_their_lists():
    rows = np.repeat(unit_rows(40, DIM), 105, axis=0)
    graph = approximate_graph(ArrayVectors(rows), K)
    check_lists(graph, rows)
    assert np.allclose(graph.scores, 1, atol=2e-3)
    assert graph.recall == 1


def test_two_groups_of_equal_rows_give_lists_of_one(monkeypatch):
    monkeypatch.setattr(knn, "EXACT_BELOW", 1000)
    num = 1200
    rows = np.repeat(unit_rows(1, DIM), num, axis=0)
    groups = np.arange(num) // (num // 2)
    graph = approximate_graph(ArrayVectors(rows), K, groups=groups)
    assert ((graph.ids >= 0).sum(axis=1) == 1).all()
    assert (groups[graph.ids[:, 0]] != groups).all()


@pytest.mark.parametrize("num", [2, 3, 50, 600])
def test_small_sets_are_exact(num):
    rows = ArrayVectors(unit_rows(num, DIM))
    graph = approximate_graph(rows, K)
    wanted = exact_neighbors(rows, np.arange(num), K)
    assert np.array_equal(graph.ids, wanted.ids)
    assert np.array_equal(graph.scores, wanted.scores)
    assert graph.recall == 1
    assert ((graph.ids >= 0).sum(axis=1) == min(K, num - 1)).all()


def test_what_is_not_reached_is_said(caplog):
    """Rows without clusters, few probes: warned of, and the recall told is the low one."""
    rows = unit_rows(4096, 64)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(knn, "MOST_PROBES", 1)
        patch.setattr(knn, "FIRST_PROBES", (1, 2))
        graph = approximate_graph(ArrayVectors(rows), K)
    assert graph.recall is not None
    assert graph.recall < 0.9
    assert "below the target of 0.95" in caplog.text
    assert "use exact search or a lower target" in caplog.text


def spy_on_recall(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is told from now on, also of lists between steps."""
    told: list[float] = []
    recall = knn._Search._recall

    def spy(self: knn._Search, near: np.ndarray) -> float:
        told.append(recall(self, near))
        return told[-1]

    monkeypatch.setattr(knn._Search, "_recall", spy)
    return told


@pytest.mark.parametrize("k", [1, 200])
def test_a_round_never_makes_lists_worse(k, monkeypatch):
    """Of lists far longer than a round follows, and of shorter ones; rounds after each step."""
    told = spy_on_recall(monkeypatch)
    monkeypatch.setattr(knn, "FIRST_PROBES", (1, 2))
    monkeypatch.setattr(knn, "MANY_PROBES", 1)
    monkeypatch.setattr(knn, "MOST_PROBES", 4)
    vectors = ArrayVectors(unit_rows(4096, 64))
    graph = approximate_graph(vectors, k, recall_target=1, scan_dtype=torch.float32)
    assert len(told) > 3
    assert told == sorted(told)
    assert told[0] < told[-1]
    assert told[-1] == pytest.approx(graph.recall, abs=1e-12)


@pytest.mark.parametrize("power", [0.3, 0.8, 1.5])
def test_clusters_are_foretold_where_misses_fall_as_a_power(power):
    def missed(probes: int) -> float:
        return float(0.9 * probes**-power)

    allowed = missed(40) + 1e-9
    assert knn.next_probes([(3, missed(3)), (8, missed(8))], allowed) in (40, 41)


@pytest.mark.parametrize("missed", [[(3, 0.4)], [(3, 0.4), (8, 0.4)], [(3, 0.2), (8, 0.3)]])
@pytest.mark.parametrize("allowed", [0.0, 1e-9, 0.05, 0.39])
def test_each_step_meets_more_clusters(missed, allowed):
    assert knn.next_probes(missed, allowed) > missed[-1][0]


@dataclass(frozen=True)
class Unread:
    """A matrix too large to be read here."""

    num_rows: int
    dim: int

    def read(self, start: int, stop: int) -> np.ndarray:
        raise AssertionError("refused before anything is read")

    def take(self, rows: np.ndarray) -> np.ndarray:
        raise AssertionError("refused before anything is read")


def test_more_rows_than_keys_have_bits_for_are_refused():
    with pytest.raises(DeclipError, match="134217729 vectors; a graph takes at most 134217728"):
        approximate_graph(Unread(2**27 + 1, 8), K)


def test_too_little_memory_is_refused_before_the_work(rows):
    with pytest.raises(DeclipError, match=r"needs 1\.0 GiB, and max_memory_gib is 0\.5; allow"):
        approximate_graph(ArrayVectors(rows), K, max_memory_gib=0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused_by_number(value, rows):
    broken = rows.astype(np.float32)
    broken[4321, 7] = value
    with pytest.raises(DeclipError, match="row 4321 of the vectors is not finite"):
        approximate_graph(ArrayVectors(broken), K)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"recall_target": 0.0}, "recall_target is 0.0; it must be above 0 and at most 1"),
        ({"recall_target": 1.5}, "recall_target is 1.5"),
        ({"recall_target": float("nan")}, "recall_target is nan"),
        ({"num_threads": 0}, "num_threads is 0; it must be at least 1"),
        ({"k": 0}, "k is 0; a list needs at least 1 neighbor"),
        ({"groups": np.zeros(3, dtype=np.int64)}, r"groups are int64 of shape \(3,\)"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence, rows):
    with pytest.raises(DeclipError, match=sentence):
        approximate_graph(ArrayVectors(rows), **{"k": K, **settings})
