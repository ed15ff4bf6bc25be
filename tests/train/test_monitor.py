"""Records: what TensorBoard reads is what the log says, and a step stands there once."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from declip_train.monitor import EVENTS, LOG, Monitor, read_last_record, read_log, summary_line

NUMBERS = {"contrastive": 2.5, "total": 3.0, "logit_scale": 14.0, "learning_rate": 1e-3, "epoch": 1}


def write(folder, start, stop, *, every=1, num_steps=10, total=3.0):
    monitor = Monitor(folder, num_steps=num_steps, start_step=start, every=every, show=False)
    for step in range(start + 1, stop + 1):
        monitor.step(step, {**NUMBERS, "total": total + step}, 0.01 * step, 16)
    monitor.close()


def scalars(folder):
    accumulator = EventAccumulator(str((folder / EVENTS).parent))
    accumulator.Reload()
    return {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_holds_the_log(tmp_path):
    write(tmp_path, 0, 10)
    records = read_log(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 11))
    assert [r["samples_seen"] for r in records] == [16 * s for s in range(1, 11)]
    found = scalars(tmp_path)
    names = {"samples_seen", "samples_per_second", "data_wait", *NUMBERS}
    assert set(found) == {f"train/{name}" for name in names}
    for name in names:
        values = [(e.step, e.value) for e in found[f"train/{name}"]]
        assert values == [(r["step"], pytest.approx(r[name])) for r in records]


def test_a_continued_run_writes_each_step_once(tmp_path):
    write(tmp_path, 0, 8)
    with (tmp_path / LOG).open("ab") as f:
        f.write(b'{"step": 9, "tot')
    write(tmp_path, 5, 10, total=100.0)
    assert [r["step"] for r in read_log(tmp_path)] == list(range(1, 11))
    assert [r["total"] > 100 for r in read_log(tmp_path)] == [False] * 5 + [True] * 5
    assert [e.step for e in scalars(tmp_path)["train/total"]] == list(range(1, 11))


def test_the_last_step_is_always_written(tmp_path):
    write(tmp_path, 0, 10, every=4)
    assert [r["step"] for r in read_log(tmp_path)] == [4, 8, 10]


def test_the_last_record_is_the_logs_last(tmp_path):
    assert read_last_record(tmp_path) is None
    write(tmp_path, 0, 10)
    with (tmp_path / LOG).open("ab") as f:
        f.write(b'{"step": 11, "tot')
    assert read_last_record(tmp_path) == read_log(tmp_path)[-1]


def test_waiting_is_a_share_of_the_time(tmp_path):
    write(tmp_path, 0, 3)
    assert all(0 <= r["data_wait"] <= 1 for r in read_log(tmp_path))
    assert "waiting for data" in summary_line(read_log(tmp_path)[0])
    assert json.loads((tmp_path / LOG).read_bytes().splitlines()[0])["num_steps"] == 10
