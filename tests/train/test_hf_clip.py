"""Text towers of transformers in training and in exports, and open_clip's CustomTextCLIP."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
import transformers
from torch.testing import assert_close

from declip_shards import DeclipError
from declip_train.compiling import compile_towers
from declip_train.export import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    PreprocessSettings,
    Scalar,
    export_open_clip,
    load_export,
)
from declip_train.grad_cache import encode_parts
from declip_train.heads import TokenHeads
from declip_train.hf_clip import HFTextCLIP, build_tokenizer, build_towers, text_model_digest
from declip_train.hf_text import HFTextConfig
from declip_train.loader import Batch
from declip_train.methods import METHODS
from declip_train.model_config import get_model_config
from declip_train.module import TrainModule, forward_text_by_length
from declip_train.settings import TrainSettings
from declip_train.tokenizer import CaptionTokenizer, mask_tokens
from declip_train.towers import CLIP
from pipelines.encoders import CheckpointEncoder

if TYPE_CHECKING:
    from tests.train.test_hf_text import VOCABULARY, write_model
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from test_hf_text import VOCABULARY, write_model

ROWS = 8
WORDS = ("a", "red", "blue", "cat", "dog", "on", "the", "mat")
CAPTIONS = ["a red cat", "the dogs on the mat, the cats on the mat!", "", "cat"]


def write_long_model(folder: Path, kind: str) -> Path:
    """A tiny model that has positions for captions of CLIP's length."""
    write_model(folder, kind)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 80
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    kinds = ("bert", "distilbert", "roberta")
    return {kind: write_long_model(folder / kind, kind) for kind in kinds}


def settings_of(folder: Path, method: str, **others: Any) -> TrainSettings:
    return TrainSettings(
        model="test",
        method=method,
        text_model=str(folder),
        global_batch_size=ROWS,
        projector_dim=8,
        predictor_hidden_dim=4,
        simclr_hidden_dim=8,
        simclr_dim=4,
        token_dim=8,
        **others,
    )


def captions_of(seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(1, 12))) for _ in range(ROWS)]


def batch_of(settings: TrainSettings) -> Batch:
    """Random pixels and tokenized captions, as the loader gives them."""
    method, tokenizer = settings.method_parts, build_tokenizer(settings)
    draw, rows = torch.Generator().manual_seed(0), torch.arange(ROWS)
    ids = [torch.from_numpy(tokenizer(captions_of(seed), trim=True)) for seed in range(3)]
    given: dict[str, Any] = {"token_ids": ids[0]}
    if method.has("multi_view"):
        masked = mask_tokens(ids[0].numpy(), 0.4, np.random.default_rng(0), tokenizer.mask_rules)
        given = {name: torch.from_numpy(array) for name, array in masked._asdict().items()}
        given |= {"second_token_ids": ids[1], "neighbor_token_ids": ids[2]}
        given |= {"has_neighbor": rows != 3, "neighbor_caption_ids": rows + 100}
    images = torch.randn(method.num_views, ROWS, 3, 16, 16, generator=draw).double()
    return Batch(step=0, epoch=0, images=images, sample_ids=rows, caption_ids=rows, **given)


def clip_of(folder: Path, seed: int = 0, **changed: Any) -> HFTextCLIP:
    text = HFTextConfig(**{"model": str(folder), **changed})
    return HFTextCLIP(get_model_config("test"), text, torch.Generator().manual_seed(seed)).eval()


def ids_of(clip: HFTextCLIP) -> torch.Tensor:
    return torch.from_numpy(clip.make_tokenizer()(CAPTIONS))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_every_method_trains_all_that_is_not_frozen(models, kind, method):
    settings = settings_of(models[kind], method)
    module = TrainModule(settings).double()
    terms, _ = module(batch_of(settings))
    assert set(terms) == METHODS[method].term_names
    assert all(torch.isfinite(value) for value in terms.values())
    sum(terms.values()).backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    if method == "filip":
        assert frozen == {
            *("clip.logit_scale", "clip.text.proj.weight", "clip.visual.proj"),
            *("clip.visual.ln_post.weight", "clip.visual.ln_post.bias"),
        }
    else:
        mask = {"heads.declip.mask_embedding"}
        assert frozen == (mask if METHODS[method].has("simsiam") else set())


def test_the_sigmoid_loss_takes_a_text_model(models):
    settings = settings_of(models["bert"], "clip", contrastive_loss="sigmoid")
    module = TrainModule(settings).double()
    terms, _ = module(batch_of(settings))
    terms["contrastive"].backward()
    assert module.clip.logit_bias is not None
    assert module.clip.logit_bias.item() == -10
    assert module.clip.logit_bias.grad is not None


@pytest.mark.parametrize("method", ["declip", "defilip"])
def test_parts_meet_as_the_whole(models, method):
    settings = settings_of(models["bert"], method)
    module, batch = TrainModule(settings).double(), batch_of(settings)
    whole, joined = module.encode(batch), encode_parts(module, batch, 4).features
    real = module.clip.caption_mask(batch.token_ids)
    assert whole.keys() == joined.keys()
    for name, value in whole.items():
        behind = name == "text_tokens"  # what stands behind a caption is anything
        mine, other = (t[real] if behind else t for t in (value, joined[name]))
        assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_groups_go_by_the_towers_own_length_and_change_nothing(models, monkeypatch):
    settings = settings_of(models["bert"], "declip")
    module, batch = TrainModule(settings).double(), batch_of(settings)
    tower = module.clip
    seen: list[int] = []
    plain = tower.forward_text

    def watched(token_ids, **options):
        seen.extend(tower.caption_mask(token_ids).sum(dim=1).tolist())
        return plain(token_ids, **options)

    monkeypatch.setattr(tower, "forward_text", watched)
    options: dict[str, Any] = {
        "replaced": batch.replaced,
        "state_positions": batch.mask_positions,
    }
    grouped = forward_text_by_length(tower, batch.token_ids, rows_per_group=3, **options)
    assert seen == sorted(seen)
    whole = forward_text_by_length(tower, batch.token_ids, rows_per_group=ROWS, **options)
    assert_close(grouped.features, whole.features)
    assert_close(grouped.states, whole.states)


def test_masked_tokens_are_no_padding_and_padding_moves_no_loss(models):
    settings = settings_of(models["bert"], "defilip")
    module, batch = TrainModule(settings).double(), batch_of(settings)
    assert batch.targets is not None
    assert batch.replaced is not None
    assert batch.replaced.any()
    real = module.clip.caption_mask(batch.token_ids)
    assert torch.equal(real, module.clip.caption_mask(batch.targets))
    module.eval()
    terms, _ = module(batch)
    longer = batch.with_tensors(
        lambda name, value: (
            torch.nn.functional.pad(value, (0, 3))
            if name in ("token_ids", "targets", "replaced", "mask_positions")
            else value
        )
    )
    padded, _ = module(longer)
    for name, value in terms.items():
        assert_close(padded[name], value, rtol=1e-10, atol=1e-10)


def test_autocast_and_bfloat16_weights_stay_near_float32(models):
    settings = settings_of(models["bert"], "defilip")
    batch = batch_of(settings).with_tensors(
        lambda _, value: value.float() if value.is_floating_point() else value
    )
    exact, _ = TrainModule(settings)(batch)
    coarse, _ = TrainModule(settings_of(models["bert"], "defilip", precision="amp_bf16"))(batch)
    for name, value in exact.items():
        assert float(coarse[name].detach()) == pytest.approx(float(value.detach()), abs=0.15)


def test_heads_have_the_text_models_sizes_and_images_the_usual_weights(models):
    settings = settings_of(models["bert"], "defilip")
    module = TrainModule(settings)
    config = settings.model_config
    assert module.clip.config == config
    assert (config.text.width, config.text.layers, config.text.heads) == (32, 2, 4)
    assert config.text.vocab_size == len(VOCABULARY)
    assert module.get_parameter("heads.declip.mlm_head.weight").shape == (len(VOCABULARY), 32)
    usual = TrainModule(TrainSettings(model="test", method="defilip", projector_dim=8))
    assert isinstance(usual.clip, CLIP)
    assert_close(module.clip.visual.state_dict(), usual.clip.visual.state_dict(), rtol=0, atol=0)
    again = build_towers(settings, torch.Generator().manual_seed(0))
    assert_close(module.clip.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert isinstance(build_tokenizer(TrainSettings(model="test")), CaptionTokenizer)


def test_checkpointed_blocks_give_the_same_gradients(models):
    clip = clip_of(models["bert"]).train()
    images, ids = torch.randn(4, 3, 16, 16), ids_of(clip)
    found = []
    for enabled in (False, True):
        clip.set_grad_checkpointing(enabled)
        clip.zero_grad()
        image, text, scale = clip(images, ids)
        (scale * (image * text).sum()).backward()
        gradients = {name: p.grad for name, p in clip.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        found.append(gradients)
    assert_close(found[0], found[1])


@pytest.mark.slow
def test_compiled_towers_give_the_same_features(models):
    clip = clip_of(models["bert"])
    ids, images = ids_of(clip), torch.randn(4, 3, 16, 16)
    names = list(clip.state_dict())
    with torch.no_grad():
        expected = clip(images, ids)
        compile_towers(clip)
        assert list(clip.state_dict()) == names
        assert_close(clip(images, ids), expected, rtol=0, atol=1e-5)


def test_the_digest_is_of_what_training_starts_from(models, tmp_path):
    folder = shutil.copytree(models["bert"], tmp_path / "copy")

    def digest(where: Path) -> str:
        return text_model_digest(settings_of(where, "clip"))

    before = digest(folder)
    assert before == digest(models["bert"]) != digest(models["roberta"])
    assert text_model_digest(TrainSettings(model="test")) == ""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me"}))
    assert digest(folder) == before, "where it was saved to is nothing of it"
    for name in ("vocab.txt", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b"\n")
        assert digest(folder) != before
        (folder / name).write_bytes(content)


OPEN_CLIP = """
import os, sys
# Loaded first: it would take the stand-in for the whole of torchvision.
from transformers import AutoModel, BertModel, RobertaModel
import torchvision_stand_in
torchvision_stand_in.install()
import open_clip, torch
for folder in sys.argv[1:]:
    # An export names its text model's configuration by the working folder.
    os.chdir(f"{folder}/export")
    given = torch.load(f"{folder}/given.pt", weights_only=True)
    model, _, _ = open_clip.create_model_and_transforms("local-dir:.")
    assert type(model) is open_clip.CustomTextCLIP, type(model)
    ids = open_clip.get_tokenizer("local-dir:.")(given["captions"])
    with torch.no_grad():
        answers = {
            "ids": ids,
            "texts": model.eval().encode_text(given["ids"]),
            "images": model.encode_image(given["images"]),
            "scale": model.logit_scale.detach(),
        }
    torch.save(answers, f"{folder}/found.pt")
"""


def environment_of(**others: str) -> dict[str, str]:
    paths = [str(Path(__file__).parent), *(str(Path(entry).resolve()) for entry in sys.path)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        **others,
    }


@pytest.mark.slow
def test_open_clip_computes_our_features(models, tmp_path):
    images, kinds = torch.randn(4, 3, 16, 16), ("bert", "roberta")
    clips = {
        kind: clip_of(models[kind], projection="mlp", pooler="cls_last_hidden_state_pooler")
        for kind in kinds
    }
    for kind, clip in clips.items():
        export_open_clip(clip, None, tmp_path / kind / "export", PreprocessSettings(), {})
        given = {"ids": ids_of(clip), "images": images, "captions": CAPTIONS}
        torch.save(given, tmp_path / kind / "given.pt")
    subprocess.run(
        [sys.executable, "-c", OPEN_CLIP, *(tmp_path / kind for kind in kinds)],
        check=True,
        env=environment_of(),
    )
    for kind, clip in clips.items():
        ids, found = ids_of(clip), torch.load(tmp_path / kind / "found.pt", weights_only=True)
        assert torch.equal(found["ids"], ids), kind
        with torch.no_grad():
            assert_close(clip.encode_text(ids), found["texts"], rtol=0, atol=1e-5)
            assert_close(clip.encode_image(images), found["images"], rtol=0, atol=1e-5)
        assert_close(clip.logit_scale.detach(), found["scale"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_load_inverts_export_without_the_model_it_started_from(models, tmp_path, kind):
    source = shutil.copytree(models[kind], tmp_path / "source")
    clip = clip_of(source, context_length=20)
    paths = export_open_clip(clip, None, tmp_path / "export", PreprocessSettings(), {})
    assert {path.name for path in paths} == {path.name for path in (tmp_path / "export").iterdir()}
    ids = ids_of(clip)
    shutil.rmtree(source)
    loaded = load_export(tmp_path / "export").model
    assert isinstance(loaded, HFTextCLIP)
    assert loaded.config == clip.config
    assert loaded.open_clip_reads_it == (kind != "distilbert")
    assert_close(loaded.state_dict(), clip.state_dict(), rtol=0, atol=0)
    assert torch.equal(ids_of(loaded), ids)
    assert_close(loaded.encode_text(ids), clip.encode_text(ids), rtol=0, atol=0)
    again = export_open_clip(loaded, None, tmp_path / "again", PreprocessSettings(), {})
    for path in paths:
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert len(again) == len(paths)


def test_an_export_says_nothing_of_where_it_was_made(models, tmp_path):
    found = []
    for place in ("here", "there"):
        folder = shutil.copytree(models["bert"], tmp_path / place / "model")
        for name, key in (
            ("config.json", "_name_or_path"),
            ("tokenizer_config.json", "name_or_path"),
        ):
            values = {**json.loads((folder / name).read_text()), key: str(folder)}
            (folder / name).write_text(json.dumps(values))
        clip = clip_of(folder)
        paths = export_open_clip(clip, None, tmp_path / place / "out", PreprocessSettings(), {})
        found.append({path.name: path.read_bytes() for path in paths})
    assert found[0] == found[1]
    assert {CONFIG_NAME, WEIGHTS_NAME, "config.json", "vocab.txt"} <= set(found[0])
    assert not any(str(tmp_path).encode() in content for content in found[0].values())


def test_evaluation_reads_captions_with_the_models_own_tokenizer(models, tmp_path):
    settings = settings_of(models["bert"], "defilip")
    module = TrainModule(settings).eval()
    provenance: dict[str, Scalar] = {"method": "defilip"}
    export_open_clip(module.clip, module.heads, tmp_path, PreprocessSettings(), provenance)
    encoder = CheckpointEncoder(tmp_path, "tiny")
    captions = captions_of(4)
    ids = torch.from_numpy(build_tokenizer(settings)(captions, trim=True))
    with torch.no_grad():
        output = module.clip.forward_text(ids, need_hidden=True)
        expected = module.clip.encode_text(ids, normalize=True)
        assert output.hidden is not None
        tokens = cast(TokenHeads, module.heads["tokens"]).project_text(output.hidden)
    np.testing.assert_allclose(encoder.encode_text(captions), expected.numpy(), atol=1e-6)
    found, mask = encoder.encode_text_tokens(captions)
    assert torch.equal(mask, ids != 0), "the padding id of the model is 0"
    assert_close(found[mask], tokens[mask], rtol=0, atol=1e-6)


FROM_THE_HUB = """
import json, sys
from pathlib import Path
import torch
from declip_train.export import PreprocessSettings, export_open_clip, load_export
from declip_train.hf_clip import HFTextCLIP
from declip_train.hf_text import HFTextConfig
from declip_train.model_config import get_model_config
clip = HFTextCLIP(get_model_config("test"), HFTextConfig(model="some/bert"))
paths = export_open_clip(clip, None, sys.argv[1], PreprocessSettings(), {})
loaded = load_export(sys.argv[1]).model
same = all(torch.equal(value, loaded.state_dict()[n]) for n, value in clip.state_dict().items())
config = json.loads((Path(sys.argv[1]) / "open_clip_config.json").read_text())
names = sorted(path.name for path in paths)
print(json.dumps([same, config["model_cfg"]["text_cfg"]["hf_model_name"], names]))
"""


@pytest.mark.slow
def test_a_model_of_the_hub_keeps_its_name_and_its_export_needs_no_network(models, tmp_path):
    cache = tmp_path / "hub" / "models--some--bert"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    shutil.copytree(models["bert"], cache / "snapshots" / ("a" * 40))
    answer = subprocess.run(
        [sys.executable, "-c", FROM_THE_HUB, tmp_path / "export"],
        check=True,
        capture_output=True,
        text=True,
        env=environment_of(HF_HUB_CACHE=str(tmp_path / "hub")),
    )
    same, name, names = json.loads(answer.stdout)
    assert same
    assert name == "some/bert"
    assert {CONFIG_NAME, WEIGHTS_NAME, "config.json", "vocab.txt"} <= set(names)


def test_what_an_export_must_not_ask_for_is_named(models, tmp_path):
    clip = clip_of(models["bert"])
    export_open_clip(clip, None, tmp_path, PreprocessSettings(), {})
    path = tmp_path / CONFIG_NAME
    content = json.loads(path.read_text())
    content["model_cfg"]["text_cfg"]["hf_tokenizer_kind"] = "clips"
    path.write_text(json.dumps(content))
    with pytest.raises(DeclipError, match="text_cfg asks for 'hf_tokenizer_kind', which text tow"):
        load_export(tmp_path)
    del content["model_cfg"]["text_cfg"]["hf_tokenizer_kind"]
    content["model_cfg"]["text_cfg"]["hf_proj_type"] = "mlp"
    path.write_text(json.dumps(content))
    with pytest.raises(DeclipError, match="do not fit its configuration"):
        load_export(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(DeclipError, match="cannot be loaded"):
        load_export(tmp_path)
