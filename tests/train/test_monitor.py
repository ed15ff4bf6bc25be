"""Records: what TensorBoard reads is what the log says, and a step stands there once."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from declip_shards import DeclipError
from declip_train.alarms import Alarms
from declip_train.loader_clock import PhaseClock
from declip_train.monitor import (
    EVENTS,
    LOG,
    VOLATILE,
    Meters,
    Monitor,
    read_last_record,
    read_log,
    require_wandb,
    summary_line,
)
from declip_train.phases import PHASES, PhaseTimes
from declip_train.settings import TrainSettings

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


CPU = torch.device("cpu")


def meters(**changed):
    found: dict[str, Any] = {
        "phases": PhaseTimes(CPU),
        "clock": PhaseClock(),
        "loader_threads": 2,
        "alarms": Alarms(TrainSettings(), 10),
        "flops": lambda length: 1e6 * length,
        "peak": 1e9,
        "device": CPU,
    }
    return Meters(**found | changed)


def test_a_record_says_where_the_time_went(tmp_path):
    own = meters()
    monitor = Monitor(tmp_path, num_steps=4, start_step=0, every=2, show=False, meters=own)
    for step in range(1, 5):
        with own.phases.phase("forward"):
            own.clock.add("decode", 0.001)
        monitor.step(step, NUMBERS, 0.0, 16, text_length=10.0 * step)
    monitor.close()
    first, second = read_log(tmp_path)
    for record in (first, second):
        assert set(record["time_shares"]) == set(PHASES)
        assert sum(record["time_shares"].values()) == pytest.approx(1)
        seconds = 2 * 16 / record["samples_per_second"]
        assert record["loader_shares"]["decode"] == pytest.approx(0.002 / (2 * seconds))
        assert 0.05 < record["memory_gigabytes"] < 50
        assert "gpu_memory_gigabytes" not in record
    # FLOPs of a step follow the captions of the record's own steps: 10 and 20, then 30 and 40.
    for record, length in ((first, 15), (second, 35)):
        rate = record["samples_per_second"] / 16
        assert record["flop_utilization"] == pytest.approx(rate * 1e6 * length / 1e9)
    found = scalars(tmp_path)
    assert {"train/time_shares/forward", "train/loader_shares/decode"} <= set(found)
    volatile = {name for name in first if name in VOLATILE}
    assert {"time_shares", "loader_shares", "flop_utilization"} <= volatile


def test_alarms_stand_in_the_next_record_and_on_the_screen(tmp_path, capsys):
    monitor = Monitor(tmp_path, num_steps=6, start_step=0, every=3, show=True, meters=meters())
    for step in range(1, 7):
        norm = 0.0 if step == 2 else 1.0
        monitor.step(step, {**NUMBERS, "gradient_norm": norm}, 0.0, 16)
    monitor.close()
    first, second = read_log(tmp_path)
    (alarm,) = first["alarms"]
    assert alarm.startswith("step 2: the gradient's norm is 0")
    assert "alarms" not in second
    assert f"train: alarm at {alarm}" in capsys.readouterr().err


def test_an_evaluated_step_has_a_record(tmp_path):
    monitor = Monitor(tmp_path, num_steps=9, start_step=0, every=5, show=False)
    for step in range(1, 8):
        accuracy = {"zeroshot_top1": 0.25} if step == 3 else {}
        monitor.step(step, {**NUMBERS, **accuracy}, 0.0, 16, always=bool(accuracy))
    monitor.close()
    records = read_log(tmp_path)
    assert [r["step"] for r in records] == [3, 5]
    assert records[0]["zeroshot_top1"] == 0.25
    assert [(e.step, e.value) for e in scalars(tmp_path)["train/zeroshot_top1"]] == [(3, 0.25)]


def test_the_log_is_json_whatever_the_numbers(tmp_path):
    monitor = Monitor(tmp_path, num_steps=1, start_step=0, every=1, show=False)
    monitor.step(1, {**NUMBERS, "gradient_norm": math.inf}, 0.0, 16)
    monitor.close()
    line = (tmp_path / LOG).read_text()
    assert json.loads(line, parse_constant=pytest.fail)["gradient_norm"] is None


def test_wandb_is_refused_in_words_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_wandb(TrainSettings())
    settings = TrainSettings(wandb="opendeclip")
    sentence = r"wandb is 'opendeclip', but the package wandb is not installed; install the extra"
    with pytest.raises(DeclipError, match=sentence):
        require_wandb(settings)
    with pytest.raises(DeclipError, match=sentence):
        Monitor(tmp_path, num_steps=1, start_step=0, every=1, show=False, settings=settings)
    assert not (tmp_path / LOG).exists()


def test_who_reads_a_log_loads_no_torch():
    code = "import sys, declip_train.monitor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


WANDB_RUN = """
import sys
from pathlib import Path
from declip_train.monitor import Monitor
from declip_train.settings import TrainSettings
numbers = {"total": 3.0, "logit_scale": 14.0}
monitor = Monitor(Path(sys.argv[1]), num_steps=2, start_step=0, every=1, show=False,
                  settings=TrainSettings(wandb="opendeclip"), run="0123abcd")
for step in (1, 2):
    monitor.step(step, numbers, 0.0, 16)
monitor.close()
"""


def test_wandb_gets_the_records(tmp_path):
    pytest.importorskip("wandb")
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", WANDB_RUN, str(tmp_path)]
    subprocess.run(command, check=True, env=environment)
    (file,) = tmp_path.rglob("run-0123abcd.wandb")
    content = file.read_bytes()
    assert b"opendeclip" in content
    assert content.count(b"samples_per_second") >= 2
    assert len(read_log(tmp_path)) == 2
