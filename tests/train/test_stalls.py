"""Stalls: who is named, when, and what is written; what is no stall."""

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from declip_train import stalls
from declip_train.heart import Beat, Board, Heart
from declip_train.stalls import StallWatch, name_stall, process_state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SECONDS = 60.0


class Run:
    """Processes that exist on the board only, watched by a clock of our own."""

    def __init__(self, folder, ranks=3, seconds=SECONDS):
        self.board = Board(folder / "board", slots=ranks)
        self.states = dict.fromkeys(range(1, ranks + 1), "S")
        self.watch = StallWatch(self.board, seconds, lambda pid: self.states[pid])
        self.beats = [
            Beat(rank=r, pid=r + 1, count=0, step=7, phase="compute", factor=1, loader_count=0)
            for r in range(ranks)
        ]
        for rank in range(ranks):
            self.beat(rank)

    def beat(self, rank, **changes):
        beat = self.beats[rank]
        changes.setdefault("count", beat.count + 1)
        self.beats[rank] = dataclasses.replace(beat, **changes)
        self.board.write(rank, self.beats[rank])

    def until(self, seconds, living=()):
        """(seconds, stall) of the first stall within so many seconds; None for no stall."""
        for look in range(int(seconds)):
            for rank in living:
                self.beat(rank)
            found = self.watch.look(1.0)
            if found is not None:
                return look + 1, found
        return None


def ranks(beats):
    return [beat.rank for beat in beats]


def test_who_beats_is_not_named(tmp_path):
    assert Run(tmp_path).until(1000, living=(0, 1, 2)) is None
    assert Run(tmp_path, seconds=0).until(1000) is None, "0 watches nothing"


def test_a_frozen_process_is_named_and_who_waits_for_it(tmp_path):
    run = Run(tmp_path)
    run.states[2] = "T"
    when, stall = run.until(100)
    assert when <= SECONDS / 2 + 2
    assert ranks(stall.culprits) == [1]
    assert ranks(stall.waiting) == [0, 2]
    assert "process 1 (pid 2) has made no progress" in stall.sentence()
    assert "frozen by a signal (SIGSTOP)" in stall.sentence()
    assert stall.sentence().endswith("processes 0, 2 wait for it")


def test_a_short_freeze_is_forgiven(tmp_path):
    run = Run(tmp_path)
    for _ in range(20):
        run.states[2] = "T"
        assert run.until(SECONDS / 2 - 5) is None
        run.states[2] = "S"
        assert run.until(2, living=(0, 1, 2)) is None


def test_the_process_that_is_behind_is_named_and_its_loader(tmp_path):
    run = Run(tmp_path)
    run.beat(2, phase="wait")
    when, stall = run.until(100)
    assert SECONDS * 0.85 <= when <= SECONDS
    assert ranks(stall.culprits) == [2]
    assert "at step 7 while waiting for its loader, which has given no batch" in stall.sentence()
    run = Run(tmp_path)
    run.beat(0, step=8, phase="wait")
    run.beat(2, step=8, phase="wait")
    assert ranks(run.until(100)[1].culprits) == [1], "a step behind"


def test_a_slow_loader_that_goes_on_is_no_stall(tmp_path):
    run = Run(tmp_path, ranks=1)
    run.beat(0, phase="wait")
    for count in range(20):
        run.beat(0, count=run.beats[0].count, loader_count=count + 1)
        assert run.until(SECONDS / 2) is None
    assert run.until(SECONDS) is not None
    # Its beats count while the process waits for it, not while it computes.
    run = Run(tmp_path, ranks=1)
    found = None
    for count in range(20):
        run.beat(0, count=run.beats[0].count, loader_count=count + 1)
        found = found or run.until(SECONDS / 2)
    assert found is not None


def test_all_at_the_same_place_wait_for_one_another(tmp_path):
    when, stall = Run(tmp_path).until(100)
    assert SECONDS - 2 <= when <= SECONDS, "later than where one is to blame, within the limit"
    assert ranks(stall.culprits) == [0, 1, 2]
    assert "they wait for one another, or for another machine" in stall.sentence()


def test_a_process_that_is_gone_is_named(tmp_path):
    run = Run(tmp_path)
    run.states[3] = ""
    assert "process 2 (pid 3)" in run.until(100)[1].sentence()
    assert "it is gone" in run.until(100)[1].sentence()


def test_long_phases_have_limits_of_their_own(tmp_path):
    run = Run(tmp_path)
    for rank in range(3):
        run.beat(rank, phase="save", factor=10)
    when, stall = run.until(20 * SECONDS)
    assert 8.5 * SECONDS < when <= 10 * SECONDS
    assert "while saving a checkpoint" in stall.sentence()


def test_steps_that_take_long_by_themselves_are_no_stall(tmp_path):
    run = Run(tmp_path)
    for rank in range(3):
        run.beat(rank, usual_ms=100_000)
    when, _ = run.until(1000)
    assert 290 < when <= 300


def test_a_watcher_that_slept_itself_accuses_nobody(tmp_path):
    run = Run(tmp_path)
    for _ in range(10):
        # The machine was suspended for an hour, or Ctrl-Z stopped all.
        assert run.watch.look(3600.0) is None


def test_what_was_named_is_not_named_at_once_again(tmp_path):
    run = Run(tmp_path)
    first, _ = run.until(100)
    run.watch.forgive()
    second, _ = run.until(100)
    assert second in (first - 1, first)


STUCK = """
import sys, threading, time
from pathlib import Path
from declip_train.heart import Board, Heart
heart = Heart(Board(Path(sys.argv[1])), slot=int(sys.argv[2]), rank=int(sys.argv[2]))
def loader_thread_that_hangs():
    time.sleep(60)
threading.Thread(target=loader_thread_that_hangs, daemon=True).start()
for step in range(3):
    heart.beat(step, "wait")
print("up", flush=True)
time.sleep(60)
"""


def start_stuck(board, slot):
    child = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(board.folder), str(slot)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    return child


@pytest.mark.parametrize("ending", [True, False])
def test_real_processes_tell_what_their_threads_do(tmp_path, ending):
    board = Board(tmp_path / "board", slots=2)
    children = [start_stuck(board, slot) for slot in range(2)]
    children[1].send_signal(signal.SIGSTOP)
    watch = StallWatch(board, 0.5)
    lines: list[str] = []
    try:
        stall = None
        while stall is None:
            time.sleep(watch.interval)
            stall = watch.look(watch.interval)
        line = name_stall(stall, board, tmp_path, lines.append, ending=ending)
        assert lines == [line]
        assert ranks(stall.culprits) == [1]
        assert process_state(children[1].pid) == ("S" if ending else "T")
        reports = sorted((tmp_path / "stalls").iterdir())
        assert str(reports[1]) in line
        assert [path.name for path in reports] == [
            "step_00000002_rank_00000.txt",
            "step_00000002_rank_00001.txt",
        ]
        running, frozen = (path.read_text() for path in reports)
        assert "in loader_thread_that_hangs" in running
        assert "frozen by a signal" in frozen
        assert ": state T" in frozen
        # A frozen process answers nothing; it is woken for its last words where it will be ended.
        assert ("in loader_thread_that_hangs" in frozen) == ending
        assert ("these are the kernel's words only" in frozen) != ending
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert process_state(children[0].pid) == ""


def test_a_thread_in_each_process_watches_where_no_launcher_does(tmp_path):
    board = Board(tmp_path / "board", slots=2)
    heart = Heart(board)
    for step in range(3):
        heart.beat(step, "wait")
    child = start_stuck(board, 1)
    said: list[str] = []
    ended: list[list[Beat]] = []
    # As in another process, which the board would show as well.
    other = copy.copy(heart)
    other.slot = 1
    watches = [
        stalls.RankWatch(h, 1.0, tmp_path, said.append, lambda beats: ended.append(list(beats)))
        for h in (heart, other)
    ]
    try:
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
    finally:
        for watch in watches:
            watch.close()
        child.kill()
        child.communicate()
        heart.close()
    assert len(said) == len(ended) == 1, "one of them speaks"
    assert "process 0 (pid" in said[0]
    assert "process 1 (pid" in said[0]
    assert ranks(ended[0]) == [0, 1]
    told = (tmp_path / "stalls" / "step_00000002_rank_00001.txt").read_text()
    assert "in loader_thread_that_hangs" in told


def test_the_kernel_names_threads():
    view = stalls.kernel_view(os.getpid())
    assert f"thread {os.getpid()} (" in view
    assert "s of processor" in view
    assert stalls.kernel_view(2**30) == ""
    assert Path("/proc/self").exists()
