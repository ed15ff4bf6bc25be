"""Lists keep the best of what they are given, each once, as a plain loop does."""

import numpy as np
import pytest

from declip_filter import knn_lists
from declip_filter.knn_lists import Lists

NUM, WIDTH = 50, 6


def empty_lists(groups: np.ndarray | None = None, num: int = NUM, width: int = WIDTH) -> Lists:
    return Lists(
        np.full((num, width), -1, dtype=np.int32),
        np.full((num, width), -np.inf, dtype=np.float32),
        groups,
    )


def pair_scores(seed: int = 0) -> np.ndarray:
    """(NUM, NUM) of all pairs, symmetric, further apart than scores are rounded."""
    scores = np.zeros((NUM, NUM), dtype=np.float32)
    above = np.triu_indices(NUM, 1)
    steps = np.random.default_rng(seed).permutation(len(above[0]))
    scores[above] = steps / len(steps) * 2.5 - 1.5
    return np.asarray(scores + scores.T, dtype=np.float32)


def pieces(seed: int = 1, num_pieces: int = 4) -> list[np.ndarray]:
    """Pairs in any order, each piece of distinct ones; pieces share some."""
    generator = np.random.default_rng(seed)
    pairs = np.stack(np.divmod(np.arange(NUM * NUM), NUM), axis=1).astype(np.int32)
    return [generator.permutation(pairs)[: generator.integers(200, 600)] for _ in range(num_pieces)]


def plain_lists(
    given: list[np.ndarray], scores: np.ndarray, groups: np.ndarray | None
) -> list[list[int]]:
    lists = []
    for row in range(NUM):
        ids = {int(other) for piece in given for own, other in piece if own == row != other}
        seen = set() if groups is None else {int(groups[row])}
        best: list[int] = []
        for other in sorted(ids, key=lambda other: -scores[row, other]):
            if groups is not None:
                if int(groups[other]) in seen:
                    continue
                seen.add(int(groups[other]))
            best.append(other)
        lists.append(best[:WIDTH])
    return lists


def check_lists(lists: Lists, wanted: list[list[int]], scores: np.ndarray) -> None:
    assert [[other for other in row if other >= 0] for row in lists.near.tolist()] == wanted
    there = lists.near >= 0
    assert (there[:, :-1] >= there[:, 1:]).all()
    assert (lists.scores[~there] == -np.inf).all()
    truth = np.take_along_axis(scores, np.maximum(lists.near, 0), axis=1)
    assert np.abs(lists.scores - truth)[there].max() < 2e-6


@pytest.mark.parametrize("part", [NUM, 17])
def test_the_best_are_kept_each_once(part, monkeypatch):
    monkeypatch.setattr(knn_lists, "CLOSED_AT_ONCE", 7)
    scores, lists = pair_scores(), empty_lists()
    for piece in pieces():
        for first in range(0, NUM, part):
            stop = min(first + part, NUM)
            own, ids = piece[(piece[:, 0] >= first) & (piece[:, 0] < stop)].T
            lists.merge(first, stop, own, ids, scores[own, ids])
    check_lists(lists, plain_lists(pieces(), scores, None), scores)


@pytest.mark.parametrize("num_groups", [2, 8, 30])
def test_a_list_has_the_best_of_each_group_and_none_of_the_own(num_groups):
    """More candidates of a group at once than a list holds do not crowd the others out."""
    groups = np.random.default_rng(2).integers(0, num_groups, NUM).astype(np.int32)
    scores, lists = pair_scores(), empty_lists(groups)
    for piece in pieces():
        own, ids = piece.T
        lists.merge(0, NUM, own, ids, scores[own, ids])
    check_lists(lists, plain_lists(pieces(), scores, groups), scores)


def test_the_order_of_candidates_does_not_show():
    scores = pair_scores()
    found = []
    for seed in (3, 4):
        lists = empty_lists()
        own, ids = np.random.default_rng(seed).permutation(pieces()[0]).T
        lists.merge(0, NUM, own, ids, scores[own, ids])
        found.append(lists.near.tolist())
    assert found[0] == found[1]


def test_the_better_score_of_one_candidate_counts():
    lists = empty_lists(num=3, width=2)
    for score in (0.25, 0.5, 0.125):
        rows, ids = np.asarray([[0], [2]], dtype=np.int32)
        lists.merge(0, 3, rows, ids, np.asarray([score], dtype=np.float32))
    assert lists.near.tolist() == [[2, -1], [-1, -1], [-1, -1]]
    assert lists.scores[0].tolist() == [0.5, -np.inf]


def test_nothing_new_changes_nothing():
    scores, lists = pair_scores(), empty_lists()
    own, ids = pieces()[0].T
    lists.merge(0, NUM, own, ids, scores[own, ids])
    near, kept = lists.near.copy(), lists.scores.copy()
    lists.merge(0, NUM, own, ids, scores[own, ids])
    nobody = np.empty(0, dtype=np.int32)
    lists.merge(0, NUM, nobody, nobody, np.empty(0, dtype=np.float32))
    assert np.array_equal(lists.near, near)
    assert np.array_equal(lists.scores, kept)


def test_what_scores_below_the_threshold_is_of_no_use():
    scores, lists = pair_scores(), empty_lists()
    assert (lists.thresholds() == knn_lists.LOWEST).all()
    own, ids = np.concatenate(pieces()).T
    lists.merge(0, NUM, own, ids, scores[own, ids])
    assert np.isfinite(lists.thresholds()).all()
    full = lists.near[:, -1] >= 0
    assert np.array_equal(lists.thresholds()[full], lists.scores[full, -1])


@pytest.mark.parametrize("rows_at_once", [2**18, 13])
@pytest.mark.parametrize("with_groups", [False, True])
def test_reverse_candidates_are_those_of_a_plain_loop(with_groups, rows_at_once, monkeypatch):
    monkeypatch.setattr(knn_lists, "ROWS_AT_ONCE", rows_at_once)
    groups = np.arange(NUM, dtype=np.int32) // 2 if with_groups else None
    scores, lists = pair_scores(), empty_lists(groups)
    own, ids = pieces()[0].T
    for start in range(0, len(own), 5):
        here = slice(start, start + 5)
        lists.merge(0, NUM, own[here], ids[here], scores[own[here], ids[here]])
    listed = np.argwhere(lists.near >= 0)
    pairs = np.stack([listed[:, 0], lists.near[lists.near >= 0]], axis=1)
    lists.add_reverse()
    found = plain_lists([pairs, pairs[:, ::-1]], scores, groups)
    check_lists(lists, found, scores)
