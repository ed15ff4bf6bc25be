"""Model configurations: a name leads to one shape, and open_clip's JSON is that shape."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from declip_shards import DeclipError
from declip_train.model_config import MODEL_CONFIGS, ModelConfig, get_model_config


def open_clip_config(name: str) -> dict[str, Any]:
    """open_clip's own JSON, read from its installed folder without importing it."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    config: dict[str, Any] = json.loads((folder / "model_configs" / f"{name}.json").read_text())
    return config


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_open_clip_form_is_invertible_and_plain_json(name: str) -> None:
    config = get_model_config(name)
    through_json = json.loads(json.dumps(config.to_open_clip()))
    assert ModelConfig.from_open_clip(through_json) == config


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("ViT-B-32", "ViT-B-32-quickgelu"),
        ("ViT-B-16", "ViT-B-16-quickgelu"),
        ("ViT-S-16", "ViT-S-16"),
        ("ViT-L-14", "ViT-L-14"),
        ("RN50", "RN50-quickgelu"),
        ("RN101", "RN101-quickgelu"),
    ],
)
def test_published_names_mean_open_clips_shapes(ours: str, theirs: str) -> None:
    expected = ModelConfig.from_open_clip(open_clip_config(theirs))
    config = get_model_config(ours)
    assert (config.embed_dim, config.vision, config.text) == (
        expected.embed_dim,
        expected.vision,
        expected.text,
    )
    if theirs.endswith("quickgelu"):
        assert config.quick_gelu
        assert expected.quick_gelu


@pytest.mark.parametrize("theirs", ["RN50", "RN50x4"])
def test_resnets_leave_as_they_came(theirs: str) -> None:
    given = open_clip_config(theirs)
    config = ModelConfig.from_open_clip(given)
    written = config.to_open_clip()
    assert written.pop("quick_gelu") is False
    assert written["vision_cfg"].pop("head_width") == 64
    assert written == given


def test_sizes_that_other_modules_read() -> None:
    resnet, vit = get_model_config("RN50").vision, get_model_config("ViT-L-14").vision
    assert (resnet.heads, resnet.num_patches, resnet.pooled_width) == (32, 49, 2048)
    assert resnet.token_width == 2048
    assert (vit.heads, vit.num_patches, vit.pooled_width, vit.token_width) == (16, 256, 1024, 1024)


def test_text_depth_is_replaceable() -> None:
    config = get_model_config("RN50")
    shallow = replace(config, text=replace(config.text, layers=3))
    assert shallow.to_open_clip()["text_cfg"].pop("layers") == 3
    assert replace(shallow, text=config.text) == config


def test_logit_scale_and_bias_are_written_where_they_are_not_open_clips_own() -> None:
    config = get_model_config("test-rn")
    assert not {"init_logit_scale", "init_logit_bias"} & set(config.to_open_clip())
    siglip = replace(config, init_logit_scale=2.3, init_logit_bias=-10)
    written = json.loads(json.dumps(siglip.to_open_clip()))
    assert (written["init_logit_scale"], written["init_logit_bias"]) == (2.3, -10)
    assert ModelConfig.from_open_clip(written) == siglip
    null = {**config.to_open_clip(), "init_logit_bias": None}
    assert ModelConfig.from_open_clip(null) == config


def test_misspelt_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(DeclipError, match=r"No model is named 'ViT-B32'\. Did you mean 'ViT-B-32'"):
        get_model_config("ViT-B32")


def broken(path: str, value: Any, model: str = "test") -> dict[str, Any]:
    """A small model's JSON with one entry changed; value `...` removes it."""
    config = get_model_config(model).to_open_clip()
    *tower, name = path.split(".")
    table = config[tower[0]] if tower else config
    if value is ...:
        del table[name]
    else:
        table[name] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("vision_cfg.patch_size", 5, "patch_size 5 does not divide image_size 16: choose"),
        ("vision_cfg.head_width", 24, "head_width 24 does not divide width 32: choose"),
        (
            "vision_cfg.layers",
            [3, 4, 6, 3],
            r"patch_size is 8, but layers \[3, 4, 6, 3\] mean a Res",
        ),
        ("vision_cfg.layers", 2.0, "layers is 2.0, but it must be a whole number"),
        ("init_logit_scale", "ten", "init_logit_scale is 'ten', but it must be a finite number"),
        ("init_logit_bias", float("nan"), "init_logit_bias is nan, but it must be a finite number"),
        ("text_cfg.heads", 3, "heads 3 does not divide width 32: choose"),
        ("text_cfg.layers", 0, "text_cfg.layers is 0, but it must be a whole number"),
        ("text_cfg.width", True, "text_cfg.width is True, but it must be a whole number"),
        ("embed_dim", 0, "embed_dim is 0, but it must be a whole number of at least 1"),
        ("embed_dim", "16", "embed_dim is '16', but it must be a whole number of at least 1"),
        ("quick_gelu", "yes", "quick_gelu is 'yes', but it must be true or false"),
        ("vision_cfg.ls_init_value", 0.1, "vision_cfg asks for 'ls_init_value', which these"),
        ("custom_text", True, "model_cfg asks for 'custom_text', which these towers do not"),
        ("vision_cfg.width", ..., "vision_cfg is incomplete"),
        ("text_cfg", ..., "model_cfg has no 'text_cfg'"),
        ("text_cfg", 3, "text_cfg is 3, but it must be a table"),
    ],
)
def test_wrong_shapes_are_refused_in_a_sentence(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(DeclipError, match=sentence):
        ModelConfig.from_open_clip(broken(path, value))


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("vision_cfg.image_size", 80, "image_size is 80, but .* choose a multiple of 32"),
        ("vision_cfg.layers", [3, 4, 6], r"layers is \[3, 4, 6\], but a ResNet has four stages"),
        (
            "vision_cfg.layers",
            [3, 4, 6, 0],
            "each of vision_cfg.layers is 0, but it must be a whole",
        ),
        ("vision_cfg.width", 5, "width is 5, but .* choose an even number"),
        ("vision_cfg.head_width", 48, "head_width 48 does not divide 32 times width 4: choose"),
        (
            "vision_cfg.patch_size",
            16,
            "patch_size is 16, but layers .* mean a ResNet, which has no",
        ),
        ("vision_cfg.layers", 12, "vision_cfg.patch_size is None, but it must be a whole number"),
        ("vision_cfg.mlp_ratio", 4, "vision_cfg asks for 'mlp_ratio', which these towers do not"),
        ("vision_cfg.width", ..., "vision_cfg is incomplete"),
    ],
)
def test_wrong_resnets_are_refused_in_a_sentence(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(DeclipError, match=sentence):
        ModelConfig.from_open_clip(broken(path, value, "test-rn"))
