"""What failed, as tables for the terminal: rows by reason, tasks by first cause."""

import shlex
from collections.abc import Iterable, Mapping, Sequence

from declip_ingest.failures import reason_of
from pipelines.task_end import TaskEnd

MOST_REASONS = 15
"""Lines of a table of reasons."""
MOST_TASKS = 20
"""Lines of a table of failed tasks."""
MOST_ADVISED = 5
"""Reasons that the advice names."""


def _more(number: int, what: str) -> list[str]:
    return [f"  ... and {number:,} more {what}"] if number > 0 else []


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Rows of cells in columns; ``right`` says which columns end at the same place."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(right))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def reasons_table(reasons: Mapping[str, int], num_in: int) -> str:
    """Reason, rows and share of all rows, most frequent first.

    Args:
        reasons: why rows did not come through -> how many.
        num_in: rows attempted, those that came through included.
    """
    ranked = sorted(((n, r) for r, n in reasons.items() if n), key=lambda pair: (-pair[0], pair[1]))
    if not ranked:
        return ""
    # Of one line more than fits, the line itself is as short as saying so.
    shown = ranked if len(ranked) <= MOST_REASONS + 1 else ranked[:MOST_REASONS]
    rows = [("reason", "rows", "share")]
    rows += [(reason, f"{n:,}", f"{n / max(num_in, 1):.1%}") for n, reason in shown]
    lines = _aligned(rows, (False, True, True))
    return "\n".join([*lines, *_more(len(ranked) - len(shown), "reasons")])


def is_passing(reason: str) -> bool:
    """Whether another attempt may mend it."""
    try:
        return reason_of(reason).is_passing
    except KeyError:
        return False  # another vocabulary's


def ingest_advice(reasons: Mapping[str, int], root: str) -> str:
    """Which commands say why, and fetch those again that may come; empty where nothing failed."""
    if not any(reasons.values()):
        return ""
    out = shlex.quote(root)
    lines = [f"  why, and what to do: declip doctor ingest --out {out}"]
    passing = sorted(
        (r for r, n in reasons.items() if n and is_passing(r)), key=lambda r: (-reasons[r], r)
    )
    if passing:
        named = ",".join(passing) if len(passing) <= MOST_ADVISED else "passing"
        num_rows = sum(reasons[r] for r in passing)
        lines.append(
            f"  {num_rows:,} of them may come another time: "
            f"declip refetch --reason {named} --out {out}"
        )
    return "\n".join(lines)


def _one_line(cause: str) -> str:
    """A cause in one line: of a traceback the last one, which names the error."""
    lines = [line.strip() for line in cause.strip().splitlines() if line.strip()]
    if not lines:
        return "no cause was given"
    return lines[-1] if lines[0].startswith("Traceback ") else " ".join(lines)


def tasks_table(failed: Iterable[TaskEnd]) -> str:
    """Task, times tried and first cause, in the order of the tasks' names.

    A defect's traceback, which a developer needs, follows once.
    """
    ordered = sorted(failed, key=lambda end: end.task)
    if not ordered:
        return ""
    shown = ordered if len(ordered) <= MOST_TASKS + 1 else ordered[:MOST_TASKS]
    rows = [("task", "tried", "first cause")]
    rows += [(end.task, str(end.tries), _one_line(end.cause)) for end in shown]
    lines = _aligned(rows, (False, True, False))
    lines += _more(len(ordered) - len(shown), "tasks")
    traces = [end for end in ordered if end.cause.startswith("Traceback ")]
    if traces:
        lines += [f"In task {traces[0].task}:", traces[0].cause.strip()]
    return "\n".join(lines)
