"""The training stage under the real launcher: killed anywhere, it ends with the same bytes."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from declip_shards import DeclipError, Store
from declip_train.monitor import VOLATILE, read_log
from declip_train.stages import EXPORT_FILES, TrainModel

if TYPE_CHECKING:
    from tests.train.training_data import write_training_data
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from training_data import write_training_data

SETTINGS: dict[str, Any] = {
    "model": "test",
    "augmentation": "demo",
    "global_batch_size": 8,
    "max_steps": 60,
    "warmup_steps": 2,
    "num_ranks": 2,
    "log_every_steps": 1,
    "checkpoint_every_steps": 7,
    "checkpoint_every_seconds": 0.0,
    "projector_dim": 32,
    "predictor_hidden_dim": 16,
}
RUN_STAGE = """
import json, sys
from declip_train.stages import TrainModel
TrainModel(**json.loads(sys.argv[1])).worker()("all")
"""
SOURCES = Path(__file__).parents[2] / "packages"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(p) for p in sorted(SOURCES.glob("*/src"))),
    "DS_ACCELERATOR": "cpu",
}


def start_stage(root):
    settings = json.dumps({**SETTINGS, "root": str(root)})
    return subprocess.Popen(
        [sys.executable, "-c", RUN_STAGE, settings], env=ENVIRONMENT, stderr=subprocess.PIPE
    )


def end_stage(process):
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors.decode()


def processes_of(root):
    """Living processes that were given this dataset's configuration."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"{root}/train/config.json".encode() in words:
            found.append((int(entry.parent.name), b"--local_rank" in b" ".join(words)))
    return found


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.02)


def digests(root):
    return [hashlib.sha256((root / path).read_bytes()).hexdigest() for path in EXPORT_FILES]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_three_ways_it_ends_with_the_same_bytes(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for root in (straight, broken):
        write_training_data(root)
    # The straight run, by the command of the README.
    config = straight / "train" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({**SETTINGS, "root": ".."}))
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--module"]
    subprocess.run(
        [*deepspeed, "declip_train", str(config)], env=ENVIRONMENT, check=True, capture_output=True
    )

    def steps_done(at_least):
        return lambda: len(read_log(broken / "train")) >= at_least

    # kill -9 of one training process.
    process = start_stage(broken)
    wait_until(steps_done(10))
    os.kill(next(pid for pid, is_rank in processes_of(broken) if is_rank), signal.SIGKILL)
    status, errors = end_stage(process)
    assert status != 0
    assert "died at step" in errors
    wait_until(lambda: not processes_of(broken), 10)

    # kill -9 of the process that runs the stage: nobody is left who could end the others.
    process = start_stage(broken)
    wait_until(steps_done(16))
    process.kill()
    end_stage(process)
    wait_until(lambda: not processes_of(broken), 15)

    # SIGTERM: a checkpoint is written at that very step, and all end.
    process = start_stage(broken)
    before = len(read_log(broken / "train"))
    wait_until(steps_done(before + 3))
    process.terminate()
    status, _ = end_stage(process)
    assert status == 143
    assert not processes_of(broken)
    stopped_at = read_log(broken / "train")[-1]["step"]
    assert list((broken / "train" / "checkpoints").glob(f"*/step_{stopped_at:08d}/manifest.json"))

    stage = TrainModel(**SETTINGS, root=str(broken))
    assert not stage.is_done("all")
    # A run of other settings that was given up must not end in this one's record.
    (broken / "train" / "checkpoints" / "given_up" / "step_00000001").mkdir(parents=True)
    stats = stage.worker()("all")
    assert len(list((broken / "train" / "checkpoints").iterdir())) == 1
    assert stage.is_done("all")
    assert digests(broken) == digests(straight)
    steps = [r["step"] for r in read_log(broken / "train")]
    assert steps == list(range(1, 61))
    untimed = [
        [{k: v for k, v in r.items() if k not in VOLATILE} for r in read_log(root / "train")]
        for root in (broken, straight)
    ]
    assert untimed[0] == untimed[1]
    assert (stats.num_in, stats.num_out, dict(stats.reasons)) == (48, 48, {})
    assert stats.extra["num_steps"] == 60
    store = Store(str(broken))
    assert all(store.exists(path) for path in [*stats.files, *stats.volatile_files])
    assert not dataclasses.replace(stage, seed=1).is_done("all")


def test_faults_of_the_data_are_told_before_anything_starts(tmp_path):
    write_training_data(tmp_path)
    stage = TrainModel(**{**SETTINGS, "root": str(tmp_path), "global_batch_size": 64})
    with pytest.raises(DeclipError, match="larger than the 48 samples"):
        stage.worker()("all")
    assert not (tmp_path / "train" / "launch.log").exists()
    with pytest.raises(DeclipError, match="run the filter step"):
        dataclasses.replace(stage, selection="none").worker()("all")


def test_a_stage_is_not_done_by_another_ones_export(tmp_path):
    stage = TrainModel(**SETTINGS, root=str(tmp_path))
    assert list(stage.tasks()) == ["all"]
    assert not stage.is_done("all")
    (tmp_path / "train" / "export").mkdir(parents=True)
    for path in EXPORT_FILES:
        (tmp_path / path).write_bytes(b"x")
    mark = tmp_path / "train" / "export.json"
    mark.write_text(json.dumps({"settings": stage.elastic_digest()}))
    assert stage.is_done("all")
    mark.write_text(json.dumps({"settings": "another"}))
    assert not stage.is_done("all")
