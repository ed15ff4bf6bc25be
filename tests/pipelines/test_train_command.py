"""``declip train``: flags and settings of our own become one run, or a sentence."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from declip_shards import DeclipError, Store
from declip_train.open_clip_flags import read_flags
from declip_train.pretrained import pretrained_digest
from declip_train.samples import training_samples
from declip_train.settings import TrainSettings
from declip_train.stages import CONFIG, MARK, TrainModel
from pipelines import train_command

DATA = ["--train-data", "/data/{00000..00003}.tar", "--train.model", "test"]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> TrainSettings:
    assert train_command.main([*DATA, *arguments, "--dry-run"]) == 0
    return TrainSettings(**json.loads(capsys.readouterr().out))


def test_flags_and_settings_of_ours_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(
        capsys,
        *("--batch-size", "32", "--accum-freq", "2", "--lr", "1e-3", "--train.num-ranks", "3"),
        *("--train.logit-scale-min=1", "--name", "mine", "--logs", "/runs"),
    )
    assert found.root == "/runs/mine"
    assert found.train_data == ("/data/{00000..00003}.tar",)
    assert (found.global_batch_size, found.num_ranks, found.accumulation_steps) == (192, 3, 2)
    assert (found.peak_lr, found.logit_scale_min, found.weight_decay) == (1e-3, 1.0, 0.2)


def test_settings_of_ours_win_over_open_clips_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(
        capsys,
        *("--train.method", "declip", "--train.neighbor-source", "bank"),
        *("--train.precision", "fp32", "--train.max-steps", "20", "--train.warmup-steps", "3"),
    )
    assert (found.precision, found.max_steps, found.warmup_steps) == ("fp32", 20, 3)
    assert found.view_parameters == TrainSettings(method="declip").view_parameters
    assert capsys.readouterr().err == ""
    train_command.main([*DATA, "--dry-run"])
    assert capsys.readouterr().err == (
        "train: precision amp_bf16: open_clip's default, amp, is of float16\n"
    )


def test_the_same_command_means_the_same_folder(capsys: pytest.CaptureFixture[str]) -> None:
    first = shown(capsys, "--lr", "1e-3")
    assert first == shown(capsys, "--lr", "1e-3")
    assert first.root == "logs/model_test-lr_0.001-b_64-p_amp_bf16"
    assert shown(capsys, "--out", "/x").root == "/x"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lr", "1e-3", "--train.peak-lr", "1e-4"], "--train.peak-lr and --lr set the same"),
        (["--train.peak-rl", "1"], "no setting --train.peak-rl. Did you mean '--train.peak-lr'"),
        (["--train.seed", "1", "--train.seed", "2"], "--train.seed is given twice"),
        (["--learning-rate", "1"], r"there is no option --learning-rate\.( Did you mean .*)?$"),
        (["--use-bn-sync"], "--use-bn-sync would change nothing: it is read by batch norm"),
        (["--train.bank-size", "9"], "--train.bank-size would change nothing"),
        (["--train.evaluate-data", "x"], "--train.evaluate-data would change nothing"),
        (["--imagenet-val", "x", "--zeroshot-frequency", "0"], "--imagenet-val would change nothi"),
        (["--epochs", "2", "--train.max-steps", "9", "--warmup", "1"], "--epochs would change no"),
        (["--out", "x", "--name", "y"], "is the run folder; leave out --name"),
        (["--lock-image"], "--lock-image is open_clip's, and is not obeyed here: towers cannot"),
        (["--train.max-steps", "9"], "warmup_steps 10000 takes the whole run of max_steps 9"),
        (["--siglip", "--train.method", "declip"], "contrastive_loss sigmoid is for methods clip"),
    ],
)
def test_faults_are_sentences(arguments: list[str], sentence: str) -> None:
    with pytest.raises(DeclipError, match=sentence):
        train_command.main([*DATA, *arguments, "--dry-run"])


def test_there_must_be_data() -> None:
    with pytest.raises(DeclipError, match="nothing to train on: give --train-data TARS, or --out"):
        train_command.main(["--train.model", "test"])


def test_every_setting_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command.main(["--settings"]) == 0
    told = capsys.readouterr().out
    for field in dataclasses.fields(TrainSettings):
        if field.name != "root":
            assert f"--train.{field.name.replace('_', '-')} " in told


def stage_of(*arguments: str, **changes: Any) -> tuple[TrainModel, Any]:
    arguments_read = train_command.build_parser().parse_args(
        ["--train-data", "/d/a.tar", "--warmup", "1", "--train-num-samples", "1000", *arguments]
    )
    flags = read_flags(arguments_read, model="test")
    return train_command.build_stage("r", flags, {"model": "test", **changes}), flags


def test_epochs_between_checkpoints_become_steps() -> None:
    stage, flags = stage_of("--save-frequency", "2", "--imagenet-val", "/v", "--batch-size", "10")
    counted = train_command.with_epochs(stage, flags)
    assert counted.checkpoint_every_steps == counted.keep_every_steps == 200
    assert counted.evaluate_every_steps == 200
    stage, flags = stage_of("--save-frequency", "2", checkpoint_every_steps=5)
    with pytest.raises(
        DeclipError, match=r"--train.checkpoint-every-steps and --save-frequency set"
    ):
        train_command.with_epochs(stage, flags)
    stage, flags = stage_of()
    assert train_command.with_epochs(stage, flags) is stage


def write_pairs(path: Path, keys: Sequence[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for key in keys:
            # No picture is decoded here.
            for name, data in (
                (f"{key}.jpg", b"\xff\xd8" + key.encode()),
                (f"{key}.txt", b"a cat"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_epochs_are_of_the_mixture(tmp_path: Path) -> None:
    """An epoch of weighted sources is longer than their lists."""
    write_pairs(tmp_path / "a.tar", ["a0", "a1", "a2", "a3"])
    write_pairs(tmp_path / "b.tar", ["b0", "b1"])
    arguments = train_command.build_parser().parse_args(
        [
            *("--train-data", f"{tmp_path}/a.tar::{tmp_path}/b.tar", "--warmup", "1"),
            *("--train-data-upsampling-factors", "1::4", "--batch-size", "2"),
            *("--save-frequency", "1"),
        ]
    )
    flags = read_flags(arguments, model="test")
    changes = {"model": "test", "cache": str(tmp_path / "cache")}
    stage = train_command.build_stage(str(tmp_path / "run"), flags, changes)
    assert train_command.with_epochs(stage, flags).checkpoint_every_steps == (4 + 4 * 2) // 2


def test_an_export_of_other_data_is_not_this_one(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a.tar", ["a0", "a1"])
    weights = tmp_path / "w.bin"
    weights.write_bytes(b"1")
    stage = TrainModel(
        root=str(tmp_path / "run"),
        train_data=(str(tmp_path / "a.tar"),),
        selection="",
        method="clip",
        pretrained=str(weights),
        cache=str(tmp_path / "cache"),
    )
    store = Store(stage.root)

    def mark() -> None:
        samples, first = training_samples(stage).digest(), pretrained_digest(stage)
        store.write_bytes(MARK, json.dumps({"samples": samples, "pretrained": first}).encode())

    mark()
    assert train_command.is_of_this_data(store, stage)
    weights.write_bytes(b"2")
    assert not train_command.is_of_this_data(store, stage)
    mark()
    write_pairs(tmp_path / "a.tar", ["a0", "a1", "a2"])
    assert not train_command.is_of_this_data(store, stage)


def test_a_run_of_other_settings_is_left_alone(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    stage, _ = stage_of()
    train_command.refuse_another_run(store, stage)
    there = dataclasses.replace(stage, root="..", log_every_steps=3, num_ranks=2, zero_stage=1)
    store.write_bytes(CONFIG, there.to_json())
    train_command.refuse_another_run(store, stage)
    other = dataclasses.replace(stage, peak_lr=2e-3, seed=5)
    # One that never took a step is nothing to keep.
    train_command.refuse_another_run(store, other)
    store.write_bytes("train/log.jsonl", b"")
    with pytest.raises(DeclipError) as caught:
        train_command.refuse_another_run(store, other)
    assert "seed is 0 there and 5 here" in str(caught.value)
    assert "peak_lr is 0.0005 there and 0.002 here" in str(caught.value)
    assert "choose another --name or --out, or remove" in str(caught.value)


@pytest.mark.parametrize(
    "kept",
    ["train/checkpoints/abc/step_00000004/manifest.json", "train/export/open_clip_config.json"],
)
def test_a_run_has_begun_with_what_it_kept(tmp_path: Path, kept: str) -> None:
    store, (stage, _) = Store(str(tmp_path)), stage_of()
    store.write_bytes(CONFIG, stage.to_json())
    other = dataclasses.replace(stage, seed=5)
    train_command.refuse_another_run(store, other)
    store.write_bytes(kept, b"")
    with pytest.raises(DeclipError, match="holds a run of other settings"):
        train_command.refuse_another_run(store, other)


def test_resuming_means_the_newest_checkpoint(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    train_command.refuse_another_checkpoint(store, None)
    train_command.refuse_another_checkpoint(store, "latest")
    with pytest.raises(DeclipError, match=r"is not the newest whole checkpoint.* is none; give"):
        train_command.refuse_another_checkpoint(store, str(tmp_path / "step_00000003"))
    file = tmp_path / "epoch_3.pt"
    file.write_bytes(b"x")
    with pytest.raises(DeclipError, match=r"is a file; .*--pretrained takes the weights of a file"):
        train_command.refuse_another_checkpoint(store, str(file))
