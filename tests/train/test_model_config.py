"""Model configurations: a name leads to one shape, and open_clip's JSON is that shape."""

from __future__ import annotations

import importlib.util
import json
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


def test_misspelt_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(DeclipError, match=r"No model is named 'ViT-B32'\. Did you mean 'ViT-B-32'"):
        get_model_config("ViT-B32")


def broken(path: str, value: Any) -> dict[str, Any]:
    """The test model's JSON with one entry changed; value `...` removes it."""
    config = get_model_config("test").to_open_clip()
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
        ("vision_cfg.layers", [3, 4, 6, 3], r"layers is \[3, 4, 6, 3\], but it must be a whole"),
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
