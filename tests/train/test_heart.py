"""Beats: what one process writes, another reads; names in shared memory are given back."""

import dataclasses
import os
import subprocess
import sys

import pytest

from declip_train import heart
from declip_train.heart import FIRST_STEPS, LONG_PHASES, PHASES, Beat, Board, Heart
from declip_train.supervision import process_start

BEAT = Beat(rank=3, pid=77, count=5, step=9, phase="save", factor=10, loader_count=2**40)


def test_what_is_written_is_read_in_the_order_of_ranks(tmp_path):
    board = Board(tmp_path / "board", slots=3)
    assert board.read() == []
    beats = [
        dataclasses.replace(BEAT, rank=5 - slot, phase=phase)
        for slot, phase in enumerate(PHASES[:3])
    ]
    for slot, beat in enumerate(beats):
        board.write(slot, beat)
    other = Board(tmp_path / "board")
    assert other.slots == 3
    assert other.read() == beats[::-1]
    board.clear(0)
    assert other.read() == beats[:0:-1]


def test_a_heart_counts_and_knows_how_long_a_phase_may_last(tmp_path):
    board = Board(tmp_path / "board", slots=1)
    beating = Heart(board, rank=4)
    (first,) = board.read()
    assert (first.rank, first.pid, first.phase) == (4, os.getpid(), "start")
    assert first.factor == LONG_PHASES["start"]
    for step in range(FIRST_STEPS + 1):
        beating.beat(step, "wait")
        beating.beat(step, "compute")
        (beat,) = board.read()
        # Compilers run in the first steps.
        assert beat.factor == (LONG_PHASES["start"] if step < FIRST_STEPS else 1)
        assert beat.step == step
    before = beat.count
    beating.beat_loader()
    beating.beat(3, "save")
    (beat,) = board.read()
    assert (beat.count, beat.loader_count, beat.factor) == (before + 1, 1, LONG_PHASES["save"])
    beating.close()
    assert board.read() == [], "nobody asks where a process is that has ended well"


def test_a_heart_remembers_how_long_its_last_steps_were(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr("declip_train.heart.time.monotonic", lambda: next(clock))
    board = Board(tmp_path / "board", slots=1)
    beating = Heart(board)
    beating.beat(0, "wait")
    assert board.read()[0].usual_ms == 0
    for step in range(20):
        beating.beat(step, "compute")
        beating.beat(step + 1, "wait")
        assert board.read()[0].usual_ms == 7000
    beating.beat(20, "save")
    assert board.read()[0].usual_ms == 0
    beating.close()


def test_a_heart_without_a_board_is_silent():
    beating = Heart()
    beating.beat(1, "compute")
    beating.beat_loader()
    assert beating.phase == "compute"
    beating.close()


def test_stacks_are_written_from_within_a_signal_handler(tmp_path):
    board = Board(tmp_path / "board", slots=1)
    beating = Heart(board, rank=2)
    try:
        os.kill(os.getpid(), heart.DUMP_SIGNAL)
        told = board.stacks(2).read_text()
        assert "test_stacks_are_written_from_within" in told
        assert "most recent call first" in told
    finally:
        beating.close()


def test_boards_of_the_dead_are_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(heart, "boards_folder", lambda: tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = Board(heart.board_folder(child.pid), slots=2)
    ours = Board(heart.board_folder(os.getpid()), slots=1)
    assert ours.folder.name == f"{os.getpid()}-{process_start(os.getpid())}"
    heart.sweep_boards()
    assert theirs.folder.exists()
    child.communicate(b"\n")
    heart.sweep_boards()
    assert not theirs.folder.exists()
    assert ours.folder.exists()
    ours.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [True, False])
def test_processes_of_a_machine_join_one_board(tmp_path, monkeypatch, given):
    monkeypatch.setattr(heart, "boards_folder", lambda: tmp_path)
    environment = {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "WORLD_SIZE": "6"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(heart.BOARD_VARIABLE, raising=False)
    if given:
        launchers = Board(tmp_path / "launcher", slots=2)
        monkeypatch.setenv(heart.BOARD_VARIABLE, str(launchers.folder))
    joined = heart.join_board()
    assert joined.board is not None
    assert (joined.slot, joined.rank, joined.board.slots) == (1, 5, 2)
    expected = tmp_path / "launcher" if given else heart.board_folder(os.getppid())
    assert joined.board.folder == expected
    joined.close()
    assert expected.exists() == given, "the launcher removes its own"
