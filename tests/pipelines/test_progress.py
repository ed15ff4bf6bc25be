"""Plain lines where nobody watches a terminal, a bar where somebody does."""

import io
import sys
import time
from types import SimpleNamespace

import pytest

from pipelines import progress
from pipelines.progress import Progress, time_text


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def test_times_are_for_people():
    assert [time_text(s) for s in (0, 59.4, 59.6, 200, 3599, 7260)] == [
        *("0 s", "59 s", "1 min 0 s", "3 min 20 s", "59 min 59 s", "2 h 1 min"),
    ]


def test_a_line_a_task_but_none_for_the_last_one(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    with Progress("measure", 3) as bar:
        for _ in range(3):
            bar.advance(10)
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert [line.split(" tasks, ")[0] for line in lines] == ["  measure: 1/3", "  measure: 2/3"]
    assert all(line.endswith(" s left") for line in lines)
    assert bar.num_done == 3
    assert bar.num_samples == 30


def test_figures_of_a_line(clock, capsys):
    bar = Progress("measure", 5)
    clock.now += 20
    bar.advance(1000)
    clock.now += 20
    bar.advance(3000)
    assert capsys.readouterr().err.splitlines() == [
        "  measure: 1/5 tasks, 1,000 samples, 50 samples/s, 1 min 20 s left",
        "  measure: 2/5 tasks, 4,000 samples, 100 samples/s, 1 min 0 s left",
    ]


def test_what_stood_before_counts_as_done_but_not_as_speed(clock, capsys):
    bar = Progress("measure", 10, num_done=6, num_in=300, num_out=290)
    clock.now += 10
    bar.advance(50, 30)
    assert bar.rate == 5
    assert capsys.readouterr().err == (
        "  measure: 7/10 tasks, 350 samples, 5 samples/s, 91.4 % ok, 30 s left\n"
    )


def test_failed_tasks_are_told_and_are_no_samples(clock, capsys):
    bar = Progress("ingest", 200, num_done=32, num_in=32_000, num_out=29_184)
    clock.now += 20
    bar.advance(1000, 912)
    clock.now += 20
    bar.fail()
    assert capsys.readouterr().err.splitlines()[-1] == (
        "  ingest: 34/200 tasks, 33,000 samples, 25 samples/s, 91.2 % ok, 1 task failed, "
        "55 min 20 s left"
    )
    clock.now += 20
    bar.fail()
    assert "2 tasks failed" in capsys.readouterr().err


def test_the_rate_is_that_of_late(clock):
    bar = Progress("measure", 1000)
    for _ in range(100):
        clock.now += 1
        bar.advance(100)
    for _ in range(100):
        clock.now += 1
        bar.advance(1)
    assert bar.rate == pytest.approx(1, rel=0.01)
    assert bar.seconds_left == pytest.approx(800, rel=0.02)


def test_of_long_tasks_the_window_holds_several(clock):
    bar = Progress("measure", 100)
    for _ in range(30):
        clock.now += 600
        bar.advance(6000)
    assert bar.rate == pytest.approx(10, rel=0.01)
    assert bar.seconds_left == pytest.approx(70 * 600, rel=0.01)


def test_a_first_task_that_takes_long_is_told_of(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    with Progress("ingest", 3, num_done=1, num_in=10, num_out=10):
        time.sleep(1.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert lines[0] == "  ingest: 1/3 tasks, 10 samples, 0 samples/s, no task has ended yet"


def test_lines_keep_their_distance(clock, capsys):
    bar = Progress("measure", 1000)
    for _ in range(100):
        clock.now += 1
        bar.advance(1)
    assert len(capsys.readouterr().err.splitlines()) == 100 / progress.PLAIN_LINE_SECONDS


def test_short_work_says_nothing(capsys):
    with Progress("measure", 100) as bar:
        for _ in range(50):
            bar.advance(1)
    assert capsys.readouterr().err == ""


def test_no_time_has_passed_and_the_rate_is_a_number(clock):
    bar = Progress("measure", 2)
    assert bar.rate == 0
    bar.advance(3)
    assert bar.rate > 0


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    with Progress("measure", 4, num_done=1) as bar:
        for _ in range(3):
            bar.advance(7)
    shown = terminal.getvalue()
    assert "1/4" in shown
    assert "4/4" in shown.splitlines()[-1]
    assert "samples/s" in shown
    assert "s left" not in shown
