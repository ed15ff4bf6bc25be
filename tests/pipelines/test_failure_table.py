"""Tables of failures: ranked, aligned, capped, and with what to do."""

import random

import pytest

from pipelines import failure_table
from pipelines.failure_table import ingest_advice, reasons_table, tasks_table
from pipelines.task_end import TaskEnd


def test_reasons_come_most_frequent_first_with_their_share():
    text = reasons_table({"timeout": 50, "http_404": 1200, "truncated": 50, "never": 0}, 10_000)
    assert text.splitlines() == [
        "  reason      rows  share",
        "  http_404   1,200  12.0%",
        "  timeout       50   0.5%",
        "  truncated     50   0.5%",
    ]


def test_the_order_of_the_counts_does_not_matter():
    reasons = {f"r{n}": n % 5 + 1 for n in range(14)}
    shuffled = list(reasons.items())
    random.Random(0).shuffle(shuffled)
    assert reasons_table(dict(shuffled), 99) == reasons_table(reasons, 99)


def test_no_failure_no_table():
    assert reasons_table({}, 10) == ""
    assert reasons_table({"never": 0}, 0) == ""
    assert tasks_table([]) == ""
    assert ingest_advice({}, "out") == ""


@pytest.mark.parametrize("number", [15, 16, 17, 400])
def test_shown_and_left_out_is_all(number):
    lines = reasons_table({f"r{n:03d}": 1 for n in range(number)}, number).splitlines()[1:]
    shown = [line for line in lines if line.startswith("  r")]
    left = number - len(shown)
    assert lines[len(shown) :] == ([f"  ... and {left} more reasons"] if left else [])
    assert left != 1
    assert len(shown) <= failure_table.MOST_REASONS + 1


def test_advice_names_what_may_come_another_time():
    text = ingest_advice({"http_404": 9, "timeout": 3, "http_503": 5}, "/data/out")
    assert text.splitlines() == [
        "  why, and what to do: declip doctor ingest --out /data/out",
        "  8 of them may come another time: "
        "declip refetch --reason http_503,timeout --out /data/out",
    ]
    assert "refetch" not in ingest_advice({"http_404": 9}, "out")
    assert "--reason passing" in ingest_advice(
        dict.fromkeys(("timeout", "http_408", "http_429", "http_500", "http_502", "http_503"), 1),
        "out",
    )
    assert ingest_advice({"http_404": 1}, "/my data").endswith("--out '/my data'")


def test_a_reason_of_another_vocabulary_is_no_defect():
    assert "refetch" not in ingest_advice({"something_else": 3}, "out")


def test_failed_tasks_have_their_tries_and_first_cause_in_one_line():
    text = tasks_table(
        [
            TaskEnd(task="00010", cause="its worker was lost\n 4 times", tries=4),
            TaskEnd(task="00002", cause="no space"),
        ]
    )
    assert text.splitlines() == [
        "  task   tried  first cause",
        "  00002      1  no space",
        "  00010      4  its worker was lost 4 times",
    ]


def test_of_a_traceback_the_table_has_the_error_and_the_text_follows_once():
    trace = "Traceback (most recent call last):\n  File x\nZeroDivisionError: a defect\n"
    text = tasks_table([TaskEnd(task=str(n), cause=trace) for n in range(3)])
    assert text.count("ZeroDivisionError: a defect") == 4
    assert text.count("Traceback") == 1
    assert "In task 0:" in text


@pytest.mark.parametrize("number", [20, 21, 22, 1000])
def test_many_failed_tasks_are_counted(number):
    text = tasks_table([TaskEnd(task=f"t{n:04d}", cause="x") for n in range(number)])
    shown = sum(line.startswith("  t0") for line in text.splitlines())
    more = number - shown
    assert (f"  ... and {more:,} more tasks" in text) == (more > 0)
    assert more != 1
