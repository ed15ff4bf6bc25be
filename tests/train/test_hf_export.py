"""Hugging Face's layout: transformers computes our features from it; the way back is exact."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from declip_shards import DeclipError
from declip_train.export import PreprocessSettings, Scalar
from declip_train.hf_export import (
    HF_CONFIG,
    HF_WEIGHTS,
    export_hugging_face,
    from_hugging_face,
    read_hf_config,
    to_hugging_face,
)
from declip_train.model_config import ModelConfig, get_model_config
from declip_train.tokenizer import EOT_ID, CaptionTokenizer
from declip_train.towers import CLIP

CAPTIONS = [
    "a red apple",
    "",
    "two dogs' bones, they're 12 of them!",
    "Ünïcode of a café   in Zürich 😀",
    "the dog ran along the beach " * 20,
]
PROVENANCE: dict[str, Scalar] = {"method": "declip", "steps": 3}


def moved(config: ModelConfig, seed: int = 0) -> CLIP:
    """A model whose every parameter is off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    model = CLIP(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_transformers_computes_our_logits(tmp_path: Path, quick_gelu: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = moved(replace(get_model_config("test"), quick_gelu=quick_gelu))
    export_hugging_face(model, tmp_path, PreprocessSettings(), PROVENANCE)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path, local_files_only=True).eval()
    images = torch.randn(len(CAPTIONS), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    token_ids = torch.from_numpy(CaptionTokenizer()(CAPTIONS))
    with torch.no_grad():
        image_features, text_features, scale = model(images, token_ids)
        found = theirs(input_ids=token_ids, pixel_values=images)
    torch.testing.assert_close(found.image_embeds, image_features, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.text_embeds, text_features, atol=2e-6, rtol=0)
    ours = scale * image_features @ text_features.T
    assert float(ours.abs().max()) > 1
    torch.testing.assert_close(found.logits_per_image, ours, atol=3e-5, rtol=0)


def test_tokenizer_and_image_processor_do_as_ours(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = PreprocessSettings(mean=(0.5, 0.4, 0.3), interpolation="bilinear")
    export_hugging_face(moved(get_model_config("test")), tmp_path, settings, PROVENANCE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    theirs = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="np")
    ours = CaptionTokenizer()(CAPTIONS)
    is_caption = np.arange(77) <= ours.argmax(axis=1)[:, None]
    # They pad with the end token, which the tower does not look at.
    np.testing.assert_array_equal(theirs["input_ids"], np.where(is_caption, ours, EOT_ID))
    processor = transformers.AutoImageProcessor.from_pretrained(
        tmp_path, local_files_only=True, use_fast=False
    )
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    found = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    wanted = (pixels / 255 - np.array(settings.mean)) / np.array(settings.std)
    np.testing.assert_allclose(found, wanted.transpose(2, 0, 1), atol=1e-5)
    bigger = processor(Image.new("RGB", (64, 40)), return_tensors="np")["pixel_values"]
    assert bigger.shape == (1, 3, 16, 16)


def test_the_way_back_is_exact(tmp_path: Path) -> None:
    config = replace(get_model_config("test"), quick_gelu=False)
    model = moved(config)
    state = model.state_dict()
    assert equal(from_hugging_face(to_hugging_face(state), "it"), dict(state))
    export_hugging_face(model, tmp_path, PreprocessSettings(), PROVENANCE)
    assert read_hf_config(tmp_path / HF_CONFIG) == config
    assert json.loads((tmp_path / HF_CONFIG).read_bytes())["opendeclip"] == PROVENANCE


def test_equal_weights_make_equal_bytes(tmp_path: Path) -> None:
    model = moved(get_model_config("test"))

    def digests(name: str, provenance: dict[str, Any]) -> dict[str, str]:
        paths = export_hugging_face(model, tmp_path / name, PreprocessSettings(), provenance)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    first = digests("a", PROVENANCE)
    assert first == digests("b", dict(reversed(PROVENANCE.items())))
    assert {path.name for path in (tmp_path / "a").iterdir()} == first.keys()
    other = digests("c", {"method": "clip"})
    assert {name for name in first if first[name] != other[name]} == {HF_CONFIG}


@pytest.mark.parametrize(
    ("name", "changes", "provenance", "sentence"),
    [
        ("test-rn", {}, {}, "the image tower is a ResNet, which the layout .* no place for"),
        ("test", {"init_logit_bias": -10.0}, {}, "sigmoid loss and has a logit_bias"),
        ("test", {}, {"method": "filip"}, "method filip trains single tokens' features"),
    ],
)
def test_what_has_no_place_is_refused(
    tmp_path: Path,
    name: str,
    changes: dict[str, Any],
    provenance: dict[str, Any],
    sentence: str,
) -> None:
    model = CLIP(replace(get_model_config(name), **changes))
    with pytest.raises(DeclipError, match=sentence):
        export_hugging_face(model, tmp_path / "x", PreprocessSettings(), provenance)
    assert not (tmp_path / "x").exists()


def test_squashed_pictures_and_spoilt_weights_are_refused(tmp_path: Path) -> None:
    model = CLIP(get_model_config("test"))
    with pytest.raises(DeclipError, match="resize_mode is 'squash', but CLIPImageProcessor"):
        export_hugging_face(model, tmp_path / "x", PreprocessSettings(resize_mode="squash"), {})
    with torch.no_grad():
        model.logit_scale.fill_(float("inf"))
    with pytest.raises(DeclipError, match="logit_scale that are not finite"):
        export_hugging_face(model, tmp_path / "x", PreprocessSettings(), {})
    assert not (tmp_path / "x").exists()


def test_foreign_files_are_told_in_words(tmp_path: Path) -> None:
    state = to_hugging_face(moved(get_model_config("test")).state_dict())
    with pytest.raises(DeclipError, match=r"'it' has 'vision_model.nonsense', which is no param"):
        from_hugging_face({**state, "vision_model.nonsense": torch.zeros(1)}, "it")
    name = "text_model.encoder.layers.1.self_attn.v_proj.bias"
    with pytest.raises(DeclipError, match=r"lacks v_proj of 'transformer.resblocks.1.attn.in_proj"):
        from_hugging_face({k: v for k, v in state.items() if k != name}, "it")
    path = tmp_path / HF_CONFIG
    path.write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(DeclipError, match="a model of kind 'siglip', but only 'clip'"):
        read_hf_config(path)
    path.write_text(json.dumps({"model_type": "clip", "text_config": {"hidden_act": "relu"}}))
    with pytest.raises(DeclipError, match="text_config with hidden_act 'relu'"):
        read_hf_config(path)
    path.write_text("nonsense")
    with pytest.raises(DeclipError, match="is no configuration of transformers"):
        read_hf_config(path)
    assert HF_WEIGHTS == "model.safetensors"
