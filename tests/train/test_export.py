"""Exports: open_clip computes our features from them; equal weights make equal bytes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from declip_shards import DeclipError
from declip_train.export import (
    CONFIG_NAME,
    HEADS_NAME,
    SAFE_NAME,
    WEIGHTS_NAME,
    PreprocessSettings,
    Scalar,
    export_open_clip,
    load_export,
)
from declip_train.heads import DeCLIPHeads
from declip_train.model_config import get_model_config
from declip_train.tokenizer import CaptionTokenizer
from declip_train.towers import CLIP

CAPTIONS = ["a red apple", "", "two dogs that run along a very long beach in the evening sun", "!"]
PROVENANCE: dict[str, Scalar] = {
    "method": "declip",
    "step": 3,
    "learning_rate": 1e-3,
    "is_demo": True,
    "note": None,
}

# Runs in a process of its own, because the stand-in for torchvision must not leak into other tests.
OPEN_CLIP_SIDE = """
import json, sys
from pathlib import Path
import numpy as np
import torchvision_stand_in
torchvision_stand_in.install()
import open_clip, torch
from PIL import Image
for folder in sys.argv[1:]:
    weights = f"{folder}/export/open_clip_pytorch_model.bin"
    safe = f"{folder}/export/open_clip_model.safetensors"
    data = np.load(f"{folder}/inputs.npz")
    open_clip.add_model_config(f"{folder}/configs")
    for way, name, pretrained in (
        ("local-dir", f"local-dir:{folder}/export", None),
        ("name and path", f"our-{Path(folder).name}", weights),
        ("safetensors", f"our-{Path(folder).name}", safe),
    ):
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, require_pretrained=True
        )
        assert type(model) is open_clip.CLIP, type(model)
        model.eval()
        with torch.no_grad():
            images = model.encode_image(torch.from_numpy(data["images"])).numpy()
            texts = model.encode_text(torch.from_numpy(data["token_ids"])).numpy()
        tokens = open_clip.get_tokenizer("ViT-B-32")(json.load(open(f"{folder}/captions.json")))
        picture = preprocess(Image.open(f"{folder}/picture.png")).numpy()
        scale = model.logit_scale.detach().numpy()
        bias = float("nan") if model.logit_bias is None else model.logit_bias.detach().numpy()
        np.savez(f"{folder}/{way}.npz", images=images, texts=texts, tokens=tokens.numpy(),
                 picture=picture, logit_scale=scale, logit_bias=bias)
"""


def make_model(
    name: str = "ViT-Ti-8-48", seed: int = 0, logit_bias: float | None = None
) -> tuple[CLIP, DeCLIPHeads]:
    """A model whose every parameter and statistic has been moved off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    config = replace(get_model_config(name), init_logit_bias=logit_bias)
    model = CLIP(config, generator)
    heads = DeCLIPHeads(config, projector_dim=8, predictor_hidden_dim=4, generator=generator)
    with torch.no_grad():
        for parameter in (*model.parameters(), *heads.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.3 * torch.rand(buffer.shape, generator=generator))
    return model.eval(), heads


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 61, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((122, 160), Image.Resampling.BICUBIC)


CASES: Mapping[str, float | None] = {"ViT-Ti-8-48": None, "test-rn": None, "test": -10.0}
"""Models, and their SigLIP bias."""
SETTINGS = PreprocessSettings(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), interpolation="bilinear")


def write_case(folder: Path, picture: Image.Image, name: str) -> None:
    """An export, and what the other side is to compute with it."""
    model, heads = make_model(name, logit_bias=CASES[name])
    config_path, *_ = export_open_clip(model, heads, folder / "export", SETTINGS, PROVENANCE)
    size = model.config.vision.image_size
    images = np.random.default_rng(1).normal(size=(4, 3, size, size)).astype(np.float32)
    np.savez(folder / "inputs.npz", images=images, token_ids=CaptionTokenizer()(CAPTIONS))
    (folder / "captions.json").write_text(json.dumps(CAPTIONS))
    picture.save(folder / "picture.png")
    (folder / "configs").mkdir()
    model_cfg = json.loads(config_path.read_text())["model_cfg"]
    (folder / "configs" / f"our-{name}.json").write_text(json.dumps(model_cfg))


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, picture: Image.Image) -> Path:
    """A folder of cases by name, each with what open_clip made of it: one process for all."""
    folder = tmp_path_factory.mktemp("open_clip")
    for name in CASES:
        write_case(folder / name, picture, name)
    subprocess.run(
        [sys.executable, "-c", OPEN_CLIP_SIDE, *(str(folder / name) for name in CASES)],
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_open_clip_computes_our_features(answered: Path, picture: Image.Image, name: str) -> None:
    model, _ = make_model(name, logit_bias=CASES[name])
    folder, settings, size = answered / name, SETTINGS, model.config.vision.image_size
    given = np.load(folder / "inputs.npz")
    images, token_ids = given["images"], given["token_ids"]
    with torch.no_grad():
        our_images = model.encode_image(torch.from_numpy(images)).numpy()
        our_texts = model.encode_text(torch.from_numpy(token_ids)).numpy()
    assert min(np.abs(our_images).max(), np.abs(our_texts).max()) > 0.1
    for way in ("local-dir", "name and path", "safetensors"):
        theirs = np.load(folder / f"{way}.npz")
        np.testing.assert_allclose(our_images, theirs["images"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(our_texts, theirs["texts"], atol=1e-5, rtol=0)
        np.testing.assert_array_equal(token_ids, theirs["tokens"])
        assert float(theirs["logit_scale"]) == model.logit_scale.item()
        # NaN stands for a model without a bias.
        bias = math.nan if model.logit_bias is None else model.logit_bias.item()
        np.testing.assert_array_equal(theirs["logit_bias"], np.float32(bias))
    # By folder, the preprocessing arrives too: shortest side, center crop, our mean and deviation.
    scaled = picture.resize((size, int(size * 160 / 122)), Image.Resampling.BILINEAR)
    top = round((scaled.height - size) / 2)
    pixels = np.asarray(scaled.crop((0, top, size, top + size)), dtype=np.float32) / 255
    expected = (pixels - np.array(settings.mean)) / np.array(settings.std)
    theirs_picture = np.load(folder / "local-dir.npz")["picture"]
    np.testing.assert_allclose(theirs_picture, expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize(("name", "logit_bias"), [("test", None), ("test", -9.5), ("test-rn", 0)])
def test_load_inverts_export(tmp_path: Path, name: str, logit_bias: float | None) -> None:
    model, heads = make_model(name, logit_bias=logit_bias)
    settings = PreprocessSettings(interpolation="bilinear", resize_mode="squash")
    export_open_clip(model, heads, tmp_path, settings, PROVENANCE)
    loaded = load_export(tmp_path)
    assert loaded.preprocess == settings
    assert loaded.provenance == PROVENANCE
    assert loaded.model.config == model.config
    assert not loaded.model.training
    for ours, theirs in (
        (model.state_dict(), loaded.model.state_dict()),
        (heads.state_dict(), loaded.aux_state_dict),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_towers_and_heads_are_kept_apart(tmp_path: Path) -> None:
    model, heads = make_model("test")
    _, weights, *_ = export_open_clip(model, heads, tmp_path, PreprocessSettings(), {})
    content = torch.load(weights, weights_only=True)
    assert set(content) == {"state_dict", "aux_state_dict", "provenance"}
    assert not set(content["state_dict"]) & set(content["aux_state_dict"])
    assert load_export(tmp_path).aux_state_dict.keys() == heads.state_dict().keys()
    export_open_clip(model, None, tmp_path, PreprocessSettings(), {})
    assert load_export(tmp_path).aux_state_dict == {}


def test_equal_weights_make_equal_bytes(tmp_path: Path) -> None:
    model, heads = make_model("test")
    first = export_open_clip(model, heads, tmp_path / "a", PreprocessSettings(), PROVENANCE)
    again, again_heads = make_model("test")
    reordered = dict(reversed(PROVENANCE.items()))
    second = export_open_clip(
        again, again_heads, tmp_path / "deep" / "b", PreprocessSettings(), reordered
    )
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    with torch.no_grad():
        again.logit_scale.add_(1e-3)
    third = export_open_clip(again, again_heads, tmp_path / "c", PreprocessSettings(), reordered)
    assert first[0].read_bytes() == third[0].read_bytes()
    for place in (1, 2):
        assert first[place].read_bytes() != third[place].read_bytes()


@pytest.mark.parametrize("name", ["test", "test-rn"])
def test_training_precision_leaves_no_trace(tmp_path: Path, name: str) -> None:
    model, _ = make_model(name)
    model.bfloat16()
    export_open_clip(model, None, tmp_path, PreprocessSettings(), {})
    state = load_export(tmp_path).model.state_dict()
    dtypes = {t.dtype for key, t in state.items() if not key.endswith("num_batches_tracked")}
    assert dtypes == {torch.float32}


def test_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    with_bias, _ = make_model("test", logit_bias=-10.0)
    config, *_ = export_open_clip(with_bias, None, tmp_path, PreprocessSettings(), {})
    content = json.loads(config.read_text())
    del content["model_cfg"]["init_logit_bias"]
    config.write_text(json.dumps(content))
    with pytest.raises(DeclipError, match=r"do not fit its configuration .*logit_bias"):
        load_export(tmp_path)


def test_only_its_own_files_are_there(tmp_path: Path) -> None:
    model, heads = make_model("test")
    own = {CONFIG_NAME, WEIGHTS_NAME, SAFE_NAME}
    for kept in (heads, heads, None):
        paths = export_open_clip(model, kept, tmp_path, PreprocessSettings(), PROVENANCE)
        wanted = own | ({HEADS_NAME} if kept is not None else set())
        assert {path.name for path in tmp_path.iterdir()} == wanted
        assert {path.name for path in paths} == wanted
    export_open_clip(model, heads, tmp_path, PreprocessSettings(), PROVENANCE, pickled=False)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_NAME, SAFE_NAME, HEADS_NAME}


def test_safetensors_hold_what_the_pickle_holds(tmp_path: Path) -> None:
    model, heads = make_model("test", logit_bias=-9.5)
    settings = PreprocessSettings(resize_mode="squash")
    export_open_clip(model, heads, tmp_path, settings, PROVENANCE)
    pickled = load_export(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    safe = load_export(tmp_path)
    assert (safe.preprocess, safe.provenance) == (settings, PROVENANCE)
    for one, other in (
        (pickled.model.state_dict(), safe.model.state_dict()),
        (pickled.aux_state_dict, safe.aux_state_dict),
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    cut = (tmp_path / SAFE_NAME).read_bytes()[:-5]
    (tmp_path / SAFE_NAME).write_bytes(cut)
    with pytest.raises(DeclipError, match=r"open_clip_model.safetensors cannot be read \("):
        load_export(tmp_path)


def test_useless_weights_and_odd_provenance_write_nothing(tmp_path: Path) -> None:
    model, heads = make_model("test")
    with pytest.raises(DeclipError, match=r"'loss': .* of type float64, but takes only text"):
        export_open_clip(
            model,
            heads,
            tmp_path / "x",
            PreprocessSettings(),
            cast(dict[str, Scalar], {"loss": np.float64(1.0)}),
        )
    with torch.no_grad():
        model.get_parameter("visual.proj")[0, 0] = float("nan")
    with pytest.raises(DeclipError, match=r"visual\.proj that are not finite.*earlier checkpoint"):
        export_open_clip(model, heads, tmp_path / "x", PreprocessSettings(), {})
    assert not (tmp_path / "x").exists()


def test_damaged_exports_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DeclipError, match=f"has no {CONFIG_NAME}: give the folder"):
        load_export(tmp_path)
    model, _ = make_model("test")
    config, weights, safe = export_open_clip(model, None, tmp_path, PreprocessSettings(), {})
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DeclipError, match=r"cannot be read \(.*\): export the model again"):
        load_export(tmp_path)
    weights.write_bytes(whole)
    text = config.read_text()
    config.write_text(text.replace('"embed_dim": 16', '"embed_dim": 32'))
    with pytest.raises(DeclipError, match="do not fit its configuration"):
        load_export(tmp_path)
    config.write_text(text[:-10])
    with pytest.raises(DeclipError, match="is not JSON"):
        load_export(tmp_path)
    config.write_text(text)
    weights.unlink()
    safe.unlink()
    with pytest.raises(DeclipError, match=f"has no {WEIGHTS_NAME}"):
        load_export(tmp_path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\), but must be three finite numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "but each must be above 0"),
        ({"interpolation": "cubic"}, "'cubic', but must be one of bicubic, bilinear"),
        ({"resize_mode": "crop"}, "'crop', but must be one of shortest, longest, squash"),
    ],
)
def test_wrong_preprocessing_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DeclipError, match=sentence):
        PreprocessSettings(**settings)
