import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_filter.leaders import choose_leaders, leaders_of


def one_by_one(edges, num):
    """The definition: go from the best to the worst."""
    better = [[a for a, b in edges if b == row] for row in range(num)]
    leader = [-1] * num
    for row in range(num):
        leader[row] = min((a for a in better[row] if leader[a] < 0), default=-1)
    return leader


graphs = st.integers(1, 24).flatmap(
    lambda num: st.tuples(
        st.just(num),
        st.sets(st.tuples(st.integers(0, num - 1), st.integers(0, num - 1))).map(
            lambda pairs: sorted({(min(p), max(p)) for p in pairs if p[0] != p[1]})
        ),
    )
)


def arrays(edges):
    pairs = np.array(edges, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


@given(graphs)
def test_rounds_give_what_going_one_by_one_gives(graph):
    num, edges = graph
    left, right = arrays(edges)
    leader = leaders_of(left, right, num).tolist()
    assert leader == one_by_one(edges, num)
    kept = {row for row in range(num) if leader[row] < 0}
    assert not any(a in kept and b in kept for a, b in edges)  # a second round finds nothing
    assert all((leader[row], row) in edges for row in range(num) if row not in kept)  # stars


@settings(deadline=None)
@given(graphs, st.integers(1, 8))
def test_any_limit_of_pairs_gives_the_same_leaders(graph, max_pairs):
    num, edges = graph
    near = np.zeros((num, num), dtype=bool)
    near[arrays(edges)] = True
    held = []

    def neighbors(rows):
        left, right = np.nonzero(near[np.ix_(rows, rows)])
        for at in range(0, len(left), 3):
            held.append(len(left))
            yield left[at : at + 3], right[at : at + 3]

    def matches(chosen, rest):
        yield np.nonzero(near[np.ix_(chosen, rest)])

    leader = choose_leaders(neighbors, matches, num, max_pairs=max_pairs)
    assert leader.tolist() == one_by_one(edges, num)


def test_a_chain_keeps_every_second_one():
    rows = np.arange(9)
    assert leaders_of(rows[:-1], rows[1:], 9).tolist() == [-1, 0, -1, 2, -1, 4, -1, 6, -1]
