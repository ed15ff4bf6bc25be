import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from declip_filter.encoders import load_encoder
from declip_shards import DeclipError


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
from declip_filter.encoders import PictureEncoder, TokenEncoder, load_encoder
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
assert isinstance(encoder, TokenEncoder) and isinstance(encoder, PictureEncoder)
prepared = np.stack([encoder.prepare_image(image) for image in images])
assert (encoder.encode_prepared(prepared) == found[1]).all()
told = encoder.tokenize(["x " * 75, "x " * 76, "a red cross"])
assert told.is_cut == [False, True, False], told.is_cut
assert (encoder.encode_tokens(encoder.tokenize(texts).ids) == found[0]).all()
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


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(DeclipError, match=r"needs open_clip with torchvision and timm .*install"):
        load_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k")
