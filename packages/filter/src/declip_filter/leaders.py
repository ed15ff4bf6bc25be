"""Which of a set of near-alike things stay: leaders, and for each other thing its leader.

Going from the best to the worst, a thing becomes a leader unless it is near a leader already;
then it is a duplicate of the best leader that it is near to. So every duplicate is near the one
that is kept in its place (a star), and no two leaders are near each other, so that a second
round finds nothing. Connected components would not do: they chain unlike things together over
others that lie between, and a long chain would lose all its pictures but one.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Edges = Iterator[tuple[Rows, Rows]]
"""Near pairs, left < right, each once, in parts."""
Neighbors = Callable[[Rows], Edges]
"""Of rows (ascending), all near pairs among them, as places within them."""
Matches = Callable[[Rows, Rows], Edges]
"""Of leaders and of other rows, all near pairs, as places in the first and in the second."""


def leaders_of(left: Rows, right: Rows, num_rows: int) -> Rows:
    """The leader of each row, -1 for the leaders; rows are numbered from the best to the worst.

    Args:
        left: the better row of each near pair.
        right: the worse row of each near pair.
        num_rows: how many rows there are.

    Returns:
        (num_rows,), the same as going through the rows one by one.
    """
    leader = np.full(num_rows, -1, dtype=np.int64)
    if not left.size:
        return leader
    dropped = np.zeros(num_rows, dtype=np.bool_)
    blocked = np.zeros(num_rows, dtype=np.bool_)
    live_one, live_other = left, right
    while live_one.size:
        # Undecided rows without an undecided better neighbor are leaders.
        blocked[live_other] = True
        leads = ~blocked[live_one]
        blocked[live_other] = False
        dropped[live_other[leads]] = True
        live = ~(leads | dropped[live_one] | dropped[live_other])
        live_one, live_other = live_one[live], live_other[live]
    claims = ~dropped[left]
    best = np.full(num_rows, num_rows, dtype=np.int64)
    np.minimum.at(best, right[claims], left[claims])
    leader[dropped] = best[dropped]
    return leader


def choose_leaders(
    neighbors: Neighbors, matches: Matches, num_rows: int, *, max_pairs: int
) -> Rows:
    """:func:`leaders_of` in bounded memory, however many near pairs there are.

    At most ``max_pairs`` pairs are held. Where there are more, as in a crowd that is all alike,
    the best rows are decided first; what is near their leaders needs no further pair.

    Args:
        neighbors: near pairs among rows.
        matches: near pairs between leaders and rows.
        num_rows: rows, numbered from the best to the worst.
        max_pairs: pairs held at once, 1 or more.

    Returns:
        The leader of each row, -1 for the leaders: (num_rows,).
    """
    leader = np.full(num_rows, -1, dtype=np.int64)
    pending = np.arange(num_rows, dtype=np.int64)
    size = num_rows
    while pending.size:
        head = pending[:size]
        pairs = _collect(neighbors(head), max_pairs)
        if pairs is None:
            # So many rows have no more than max_pairs pairs in any case.
            fewest = max(1, int((2 * max_pairs) ** 0.5))
            size = max(fewest, min(size, len(pending)) // 4)
            continue
        local = leaders_of(*pairs, len(head))
        leader[head] = np.where(local < 0, -1, head[local])
        chosen, rest = head[local < 0], pending[len(head) :]
        pending = rest
        if rest.size:
            best = np.full(len(rest), num_rows, dtype=np.int64)
            for place, other in matches(chosen, rest):
                np.minimum.at(best, other, chosen[place])
            claimed = best < num_rows
            leader[rest[claimed]] = best[claimed]
            pending = rest[~claimed]
    return leader


def _collect(parts: Edges, max_pairs: int) -> tuple[Rows, Rows] | None:
    """All pairs, or None where they are more than ``max_pairs``."""
    left: list[Rows] = []
    right: list[Rows] = []
    held = 0
    for one, other in parts:
        held += len(one)
        if held > max_pairs:
            return None
        left.append(one)
        right.append(other)
    if not left:
        nothing = np.empty(0, dtype=np.int64)
        return nothing, nothing
    return np.concatenate(left), np.concatenate(right)
