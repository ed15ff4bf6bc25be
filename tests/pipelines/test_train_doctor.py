"""What a log says is what is told: the worst first, with its figure and the setting to change."""

import json

import pytest

from declip_shards import DeclipError
from declip_train.phases import PHASES
from declip_train.settings import TrainSettings
from pipelines.train_doctor import diagnose_training, main

HEALTHY = {"forward": 0.4, "backward": 0.5, "communication": 0.02, "step": 0.06, "other": 0.02}
LOADER = {"fetch": 0.02, "decode": 0.2, "augment": 0.1, "tokens": 0.05, "neighbors": 0.01}


def write_run(root, shares=None, loader=None, *, gpu=False, utilization=0.7, steps=6, **settings):
    """A log of which every record but the first has these shares, and its settings."""
    folder = root / "train"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(1, steps + 1):
        record = {
            "step": 10 * number,
            "num_steps": 1000,
            "samples_per_second": 500.0,
            "total": 3.0,
            "time_shares": dict.fromkeys(PHASES, 0.0) | (shares or HEALTHY),
            "loader_shares": loader or LOADER,
            "flop_utilization": utilization,
            "memory_gigabytes": 2.5,
            **({"gpu_memory_gigabytes": 40.0} if gpu else {}),
        }
        if number == 1:
            record["time_shares"] = {"other": 1.0}
        if number == 3:
            record["alarms"] = ["step 27: the loss jumped to 20"]
        lines.append(json.dumps(record))
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_bytes(TrainSettings(**settings).to_json())
    return str(root)


def test_a_healthy_run_has_no_finding(tmp_path):
    found = diagnose_training(write_run(tmp_path))
    assert list(found.findings) == []
    assert sum(found.time_shares.values()) == pytest.approx(1)
    assert found.time_shares["backward"] == pytest.approx(0.5), "the first record is left out"
    assert (found.step, found.num_steps, found.num_records) == (60, 1000, 5)
    assert list(found.alarms) == ["step 27: the loss jumped to 20"]


@pytest.mark.parametrize(
    ("slow", "setting"),
    [
        ("fetch", "cache_gigabytes"),
        ("decode", "loader_threads"),
        ("augment", "photometric device"),
        ("tokens", "eda off"),
        ("neighbors", "neighbor_feature caption"),
    ],
)
def test_waiting_is_put_down_to_the_slowest_part_of_the_loader(tmp_path, slow, setting):
    shares = {"wait": 0.4, "forward": 0.3, "backward": 0.3}
    root = write_run(tmp_path, shares, LOADER | {slow: 0.6})
    (found,) = diagnose_training(root).findings
    assert found.what.startswith(f"40% of the time is waiting for data: {slow} takes ")
    assert setting in found.remedy
    assert found.share == pytest.approx(0.4)


def test_idle_threads_while_training_waits_mean_bursts(tmp_path):
    shares = {"wait": 0.1, "forward": 0.4, "backward": 0.5}
    (found,) = diagnose_training(write_run(tmp_path, shares)).findings
    assert "the loader's threads are busy 38% of the time" in found.what
    assert found.remedy.startswith("raise prefetch_batches (2), and ")


@pytest.mark.parametrize(
    ("phase", "settings", "told"),
    [
        ("save", {}, "checkpoint_every_seconds (600), or set async_save"),
        ("save", {"checkpoint_every_steps": 5, "async_save": True}, "checkpoint_every_steps (5)"),
        (
            "eval",
            {"evaluate_every_steps": 7, "evaluate_data": "x"},
            "evaluate_every_steps (7)",
        ),
        ("communication", {"num_ranks": 4, "zero_stage": 2}, "set zero_stage 0 where memory"),
        ("step", {"num_ranks": 2}, "raise global_batch_size (4096), or zero_stage to 1"),
    ],
)
def test_a_large_share_has_its_setting(tmp_path, phase, settings, told):
    shares = {phase: 0.3, "forward": 0.3, "backward": 0.4}
    (found,) = diagnose_training(write_run(tmp_path, shares, **settings)).findings
    assert found.what.startswith("30% of the time is ")
    assert told in found.remedy


def test_one_process_has_nobody_to_talk_to(tmp_path):
    shares = {"communication": 0.3, "forward": 0.3, "backward": 0.4}
    assert list(diagnose_training(write_run(tmp_path, shares)).findings) == []


def test_low_utilization_names_what_is_not_set(tmp_path):
    root = write_run(
        tmp_path, gpu=True, utilization=0.1, global_batch_size=64, num_ranks=2,
        accumulation_steps=2, grad_checkpointing=True,
    )  # fmt: skip
    (found,) = diagnose_training(root).findings
    assert "forward and backward take 90% of the time and reach 11%" in found.what
    for part in (
        "precision amp_bf16",
        "(16 now",
        "lower accumulation_steps (2)",
        "turn grad_checkpointing off",
        "set compile",
    ):
        assert part in found.remedy
    (found,) = diagnose_training(write_run(tmp_path / "cpu", utilization=0.1)).findings
    assert found.remedy.startswith("raise threads_per_rank (1)")


def test_the_worst_comes_first(tmp_path):
    shares = {"wait": 0.2, "save": 0.5, "forward": 0.15, "backward": 0.15}
    found = diagnose_training(write_run(tmp_path, shares)).findings
    assert [one.what.split(":")[0][-16:] for one in found] == [
        "ting checkpoints",
        "waiting for data",
    ]
    assert [one.share for one in found] == sorted((one.share for one in found), reverse=True)


def test_the_command_prints_text_or_json(tmp_path, capsys):
    root = write_run(tmp_path, {"wait": 0.4, "forward": 0.3, "backward": 0.3})
    assert main(["--out", root]) == 0
    text = capsys.readouterr().out
    assert "step 60 of 1,000, 500 samples/s, FLOP utilization 70.0%" in text
    assert "1. 40% of the time is waiting for data" in text
    assert "step 27: the loss jumped to 20" in text
    assert main(["--out", root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"][0]["share"] == pytest.approx(0.4)


def test_a_log_that_says_nothing_is_refused(tmp_path):
    with pytest.raises(DeclipError, match=r"holds no log of a training; give the folder"):
        main(["--out", str(tmp_path)])
    root = write_run(tmp_path, steps=1)
    with pytest.raises(DeclipError, match=r"has 1 records of where time goes, but needs 2"):
        main(["--out", root])
    with pytest.raises(DeclipError, match=r"there is no option --jsn"):
        main(["--out", root, "--jsn"])
