"""Settings: round trip, and a sentence for every wrong value."""

import dataclasses
import json

import pytest

from declip_shards import DeclipError
from declip_train.settings import AUGMENTATIONS, TrainSettings, parse_settings, read_settings


def test_reader_inverts_writer(tmp_path):
    settings = TrainSettings(
        root=str(tmp_path), model="test", splits=("train",), hue=0.05, max_steps=7, warmup_steps=3
    )
    path = tmp_path / "config.json"
    path.write_bytes(settings.to_json())
    assert read_settings(path) == settings


def test_root_is_relative_to_the_configuration(tmp_path):
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"root": ".."}))
    assert read_settings(folder / "config.json").root == str((tmp_path / "data").resolve())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"method": "filip"}, "arrives with issue 3"),
        ({"method": "delcip"}, "Did you mean 'declip'"),
        ({"neighbor_source": "bank"}, "arrives with issue 3; choose 'index'"),
        ({"model": "ViT-B-31"}, "Did you mean 'ViT-B-32'"),
        ({"model": "test", "image_size": 48}, "is not the 16 pixels of model 'test'"),
        ({"augmentation": "moco"}, "Did you mean 'moco_v2'"),
        ({"precision": "fp16"}, "Known: amp_bf16, fp32"),
        ({"zero_stage": 3}, "must be 0, 1 or 2"),
        ({"warmup_steps": 10, "max_steps": 10}, "takes the whole run of max_steps 10"),
        ({"global_batch_size": 9, "num_ranks": 2}, "choose a multiple"),
        ({"global_batch_size": 2, "num_ranks": 2}, "batch norm needs 2"),
        ({"mask_probability": 1.5}, "must be from 0 to 1"),
        ({"peak_lr": 0.0}, "must be above 0"),
        ({"peak_lr": float("nan")}, "must be of type float"),
        ({"start_lr": 1.0}, "is above peak_lr"),
        ({"logit_scale_min": 5.0}, "is above logit_scale_max"),
        ({"seed": True}, "must be of type int"),
        ({"splits": "train"}, "must be of type tuple"),
        ({"checkpoint_every_seconds": 0}, "set one of them"),
        ({"neighbors": ""}, "name one, or choose method clip"),
    ],
)
def test_wrong_values_are_refused(wrong, sentence):
    with pytest.raises(DeclipError, match=sentence.replace("(", r"\(")) as caught:
        TrainSettings(**wrong)
    assert str(next(iter(wrong.values()))) in str(caught.value) or wrong.get("seed")


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(DeclipError, match="Did you mean 'peak_lr'"):
        parse_settings({"peek_lr": 1e-3}, "x.json")


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_a_configuration_must_be_one_object(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(DeclipError, match=r"c\.json"):
        read_settings(tmp_path / "c.json")


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(DeclipError, match="does not exist"):
        read_settings(tmp_path / "none.json")


def test_number_of_steps():
    settings = TrainSettings(global_batch_size=10, epochs=2.5, warmup_steps=0)
    assert settings.num_steps(109) == 25
    with pytest.raises(DeclipError, match="larger than the 9 samples"):
        settings.num_steps(9)
    with pytest.raises(DeclipError, match="takes the whole run of 25 steps"):
        dataclasses.replace(settings, warmup_steps=25).num_steps(100)


def test_overrides_change_one_parameter_of_the_named_set():
    settings = TrainSettings(augmentation="demo", hue=0.25)
    assert settings.view_parameters == dataclasses.replace(AUGMENTATIONS["demo"], hue=0.25)


def test_the_digest_leaves_out_what_cannot_change_the_result():
    settings = TrainSettings()
    for same in ({"root": "x"}, {"log_every_steps": 3}, {"keep_checkpoints": 9}):
        assert dataclasses.replace(settings, **same).digest() == settings.digest()
    for other in ({"seed": 1}, {"num_ranks": 2}, {"hue": 0.1}, {"zero_stage": 2}):
        assert dataclasses.replace(settings, **other).digest() != settings.digest()
