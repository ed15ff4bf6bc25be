"""open_clip's models as evaluation uses them."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from declip_shards import DeclipError
from declip_train.augment import IMAGE_MEAN, IMAGE_STD
from declip_train.export import PreprocessSettings, export_open_clip
from declip_train.model_config import get_model_config
from declip_train.towers import CLIP
from pipelines import eval_open_clip
from pipelines.eval_models import ImageFeatures, TowersModel, load_eval_model
from pipelines.eval_open_clip import OpenClipModel
from pipelines.eval_views import Preparation

CONFIG = get_model_config("test")
TEXTS = ["a red circle", "a longer caption of a blue square, seen at night", "x", "a red circle"]


def make_towers():
    return CLIP(CONFIG, generator=torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    export_open_clip(make_towers(), None, folder, PreprocessSettings(), {"model": "test"})
    return folder


@pytest.fixture
def tiny(monkeypatch):
    """A model of the name ``tiny``, as if open_clip had it."""
    config = CONFIG.to_open_clip()
    monkeypatch.setattr(eval_open_clip, "_model_config", lambda name: config)
    return config


def save(path, state):
    path.parent.mkdir(exist_ok=True)
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    return path


def test_a_local_folder_is_the_export_itself(export):
    found = load_eval_model(f"open_clip:local-dir:{export}")
    assert isinstance(found, TowersModel)
    assert (found.name, found.digest) == ("test", load_eval_model(str(export)).digest)


def test_a_checkpoint_of_open_clips_trainer_is_the_same_model(export, tiny, tmp_path):
    path = save(tmp_path / "epoch_3.pt", make_towers().state_dict())
    found = load_eval_model(f"open_clip:tiny/{path}")
    assert (found.name, found.pretrained) == ("tiny", str(path))
    assert found.digest == load_eval_model(str(export)).digest
    assert found.preparation.mean == IMAGE_MEAN


def test_its_own_towers_give_the_same_features(export):
    ours = load_eval_model(str(export))
    towers = make_towers()
    other = OpenClipModel(
        towers,
        lambda texts: torch.from_numpy(towers.make_tokenizer()(texts)),
        Preparation(size=16, mean=IMAGE_MEAN, std=IMAGE_STD),
        config=CONFIG.to_open_clip(),
        name="test",
        pretrained="none",
        device="cpu",
        num_threads=2,
    )
    views = np.random.default_rng(0).integers(0, 256, (35, 16, 16, 3), np.uint8)
    found, expected = other.encode(views), ours.encode(views)
    assert isinstance(found, ImageFeatures)
    assert isinstance(expected, ImageFeatures)
    np.testing.assert_allclose(found.features, expected.features, atol=1e-5)
    np.testing.assert_array_equal(found.features, found.probe)
    np.testing.assert_allclose(other.encode_texts(TEXTS), ours.encode_texts(TEXTS), atol=1e-5)
    names, templates = (("cat",), ("dog", "puppy")), ("a {}.", "{}")
    np.testing.assert_allclose(
        other.classifier(names, templates), ours.classifier(names, templates), atol=1e-5
    )
    assert other.encode_texts([]).shape == (0, 16)


def test_a_configuration_beside_the_weights_must_be_of_the_model(tiny, tmp_path):
    path = save(tmp_path / "epoch_3.pt", make_towers().state_dict())
    beside = tmp_path / "open_clip_config.json"
    beside.write_text(json.dumps({"model_cfg": {**tiny, "quick_gelu": not tiny["quick_gelu"]}}))
    with pytest.raises(DeclipError, match=r"another model than tiny \(quick_gelu differ\)"):
        load_eval_model(f"open_clip:tiny/{path}")
    beside.write_text(json.dumps({"model_cfg": tiny, "preprocess_cfg": {"size": 32}}))
    with pytest.raises(DeclipError, match="prepares pictures of 32 pixels"):
        load_eval_model(f"open_clip:tiny/{path}")
    half = [0.5, 0.5, 0.5]
    beside.write_text(json.dumps({"model_cfg": tiny, "preprocess_cfg": {"mean": half}}))
    assert load_eval_model(f"open_clip:tiny/{path}").preparation.mean == (0.5, 0.5, 0.5)


def test_weights_of_another_image_size_or_model_are_refused(tiny, tmp_path):
    state = make_towers().state_dict()
    positions = state["visual.positional_embedding"]
    larger = {**state, "visual.positional_embedding": positions.repeat(4, 1)[:17]}
    path = save(tmp_path / "larger.pt", larger)
    with pytest.raises(DeclipError, match=r"interpolated from 17 to 5 positions.*trained as"):
        load_eval_model(f"open_clip:tiny/{path}")
    path = save(tmp_path / "less.pt", {k: v for k, v in state.items() if k != "ln_final.bias"})
    with pytest.raises(DeclipError, match=r"1 parameters are missing \(ln_final.bias\)"):
        load_eval_model(f"open_clip:tiny/{path}")


def test_tags_are_checked_before_anything_is_fetched(monkeypatch):
    stand_in = SimpleNamespace(
        list_pretrained_tags_by_model=lambda name: ["openai", "laion400m_e31"],
        get_pretrained_cfg=lambda name, tag: {"openai": {"quick_gelu": True}}.get(tag, {}),
    )
    monkeypatch.setattr(eval_open_clip, "_import_open_clip", lambda: stand_in)
    with pytest.raises(DeclipError, match=r"with quick_gelu True.*open_clip:RN50-quickgelu/openai"):
        load_eval_model("open_clip:RN50/openai")
    with pytest.raises(DeclipError, match=r"no weights 'opanai' of RN50.*nearest are openai"):
        load_eval_model("open_clip:RN50/opanai")


def test_a_model_without_a_twin_is_taken_as_it_is(monkeypatch):
    class LoadingError(RuntimeError):
        pass

    def create_model(name, pretrained):
        raise LoadingError(f"{name} {pretrained} is fetched")

    stand_in = SimpleNamespace(
        list_pretrained_tags_by_model=lambda name: ["laion2b_s12b_b32k"],
        get_pretrained_cfg=lambda name, tag: {"hf_hub": "somewhere"},
        create_model=create_model,
        get_tokenizer=lambda name: None,
    )
    monkeypatch.setattr(eval_open_clip, "_import_open_clip", lambda: stand_in)
    # Its configuration has quick_gelu, of which its tag says nothing.
    with pytest.raises(DeclipError, match="roberta-ViT-B-32 laion2b_s12b_b32k is fetched"):
        load_eval_model("open_clip:roberta-ViT-B-32/laion2b_s12b_b32k")


def stand_in_of(model, tokenize):
    """open_clip, as far as a folder's or a file's model needs it."""
    model.visual.preprocess_cfg = {"size": 16, "interpolation": "random"}
    return SimpleNamespace(
        create_model=lambda name, pretrained: model, get_tokenizer=lambda name: tokenize
    )


def test_a_folders_model_of_other_towers_is_the_same_wherever_it_lies(monkeypatch, tmp_path):
    towers = make_towers()
    stand_in = stand_in_of(towers, towers.make_tokenizer())
    monkeypatch.setattr(eval_open_clip, "_import_open_clip", lambda: stand_in)
    found = []
    for name in ("here", "there"):
        folder = tmp_path / name
        folder.mkdir()
        content = {"model_cfg": {**CONFIG.to_open_clip(), "custom_text": True}}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
        found.append(load_eval_model(f"open_clip:local-dir:{folder}"))
        assert isinstance(found[-1], OpenClipModel)
        assert found[-1].pretrained == str(folder)
    assert found[0].digest == found[1].digest
    assert found[0].name == "custom"
    # Drawn at random in training; open_clip takes bicubic to evaluate.
    assert found[0].preparation.interpolation == "bicubic"


def test_a_tokenizer_that_cannot_be_had_and_weights_that_do_not_fit_are_told_apart(
    monkeypatch, tiny, tmp_path
):
    tiny["custom_text"] = True
    path = save(tmp_path / "epoch_3.pt", make_towers().state_dict())
    stand_in = stand_in_of(make_towers(), None)

    def no_tokenizer(name):
        raise OSError("the Hub cannot be reached.\nCheck your connection.")

    def no_weights(name, pretrained):
        raise KeyError("Error(s) in loading:\n  Missing key(s): text.proj.")

    monkeypatch.setattr(eval_open_clip, "_import_open_clip", lambda: stand_in)
    stand_in.create_model = no_weights
    with pytest.raises(DeclipError, match=r"cannot load 'tiny' .*; give weights of this"):
        load_eval_model(f"open_clip:tiny/{path}")
    stand_in.get_tokenizer = no_tokenizer
    with pytest.raises(DeclipError, match=r"tokenizer of 'tiny': the Hub cannot be.*dir:"):
        load_eval_model(f"open_clip:tiny/{path}")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("ViT-B-32", "names no weights; give open_clip:MODEL/PRETRAINED"),
        ("ViT-B-31/openai", "open_clip has no model 'ViT-B-31'; the nearest are ViT-B-"),
        ("ViT-B-32/missing.pt", "there is no checkpoint 'missing.pt'"),
        ("local-dir:missing", "'missing' holds no open_clip_config.json"),
    ],
)
def test_what_is_no_model_is_refused(spec, sentence):
    with pytest.raises(DeclipError, match=sentence):
        load_eval_model(f"open_clip:{spec}")


def test_without_torchvision_a_sentence_says_so(monkeypatch):
    # None in place of a module makes its import fail.
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(DeclipError, match="install open_clip_torch with torchvision"):
        load_eval_model("open_clip:hf-hub:somebody/some-model")
