"""Settings: round trip, and a sentence for every wrong value."""

import dataclasses
import json
from typing import Any

import pytest

from declip_shards import DeclipError
from declip_train.settings import TrainSettings, parse_settings, read_settings
from declip_train.views import AUGMENTATIONS


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
    assert settings.num_steps(109) == 27
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
    for other in (
        {"seed": 1},
        {"accumulation_steps": 2},
        {"neighbor_source": "bank"},
        {"text_layers": 3},
        {"optimizer": "sgd"},
    ):
        assert dataclasses.replace(settings, **other).digest() != settings.digest()
    changes: tuple[dict[str, Any], ...]
    changes = ({"seed": 2}, {"num_ranks": 2}, {"hue": 0.1}, {"zero_stage": 2}, {"text_model": "x"})
    for change in changes:
        assert dataclasses.replace(settings, **change).digest() != settings.digest()


def test_a_method_brings_its_published_views_unless_a_set_is_named():
    assert TrainSettings(method="clip").view_parameters == AUGMENTATIONS["light"]
    assert TrainSettings(method="filip").view_parameters == AUGMENTATIONS["moco_v2"]
    slip = TrainSettings(method="slip", ssl_augmentation="slip_ssl")
    assert slip.view_parameters == AUGMENTATIONS["light"]
    assert slip.ssl_view_parameters == AUGMENTATIONS["slip_ssl"]
    assert TrainSettings(augmentation="light").view_parameters == AUGMENTATIONS["light"]


def test_text_depth_and_sigmoid_change_the_model():
    base = TrainSettings(model="test", method="clip")
    assert base.model_config.init_logit_bias is None
    assert dataclasses.replace(base, text_layers=1).model_config.text.layers == 1
    sigmoid = dataclasses.replace(base, contrastive_loss="sigmoid").model_config
    assert sigmoid.init_logit_bias == -10.0
    assert sigmoid.vision == base.model_config.vision


def test_a_text_model_brings_its_own_sizes(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = {"model_type": "bert", "vocab_size": 99, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = TrainSettings(model="test")
    settings = dataclasses.replace(plain, text_model=str(tmp_path))
    text = settings.model_config.text
    assert (text.width, text.layers, text.heads, text.vocab_size) == (32, 3, 4, 99)
    assert settings.model_config.vision == plain.model_config.vision
    assert settings.digest() != plain.digest()
    nowhere = dataclasses.replace(plain, text_model=str(tmp_path / "nowhere"))
    with pytest.raises(DeclipError, match=r"nowhere' cannot be loaded"):
        _ = nowhere.model_config


def test_sizes_of_a_batch():
    settings = TrainSettings(global_batch_size=64, num_ranks=2, accumulation_steps=4)
    assert settings.local_batch_size == 32
    assert settings.micro_batch_size == 8


@pytest.mark.parametrize(
    ("given", "index", "bank"),
    [
        ({"method": "clip"}, False, False),
        ({"method": "slip", "neighbor_source": "bank"}, False, False),
        ({"method": "declip"}, True, False),
        ({"method": "defilip", "neighbor_source": "bank"}, False, True),
    ],
)
def test_where_neighbors_come_from(given, index, bank):
    settings = TrainSettings(**given)
    assert (settings.uses_index, settings.uses_bank) == (index, bank)
