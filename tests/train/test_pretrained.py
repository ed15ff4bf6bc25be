"""Weights to start from: what was exported comes back bit for bit; what does not fit is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from declip_shards import DeclipError
from declip_train.export import PreprocessSettings, export_open_clip
from declip_train.hf_export import export_hugging_face
from declip_train.model_config import MODEL_CONFIGS, get_model_config
from declip_train.module import TrainModule
from declip_train.pretrained import (
    fit_towers,
    load_pretrained,
    pretrained_digest,
    read_pretrained,
)
from declip_train.settings import TrainSettings
from declip_train.towers import CLIP

SETTINGS = TrainSettings(
    model="test",
    method="declip",
    neighbor_source="bank",
    bank_size=64,
    global_batch_size=8,
    max_steps=9,
    warmup_steps=1,
    projector_dim=8,
    predictor_hidden_dim=4,
)


@pytest.fixture(scope="module")
def trained() -> TrainModule:
    """Towers and heads that nobody's seed draws."""
    module = TrainModule(SETTINGS)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="module")
def places(trained: TrainModule, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in every form that is read."""
    folder = tmp_path_factory.mktemp("weights")
    plain = PreprocessSettings()
    export_open_clip(trained.clip, trained.heads, folder / "open_clip", plain, {})
    export_open_clip(trained.clip, trained.heads, folder / "safe", plain, {}, pickled=False)
    export_hugging_face(trained.clip, folder / "hf", plain, {})
    state = trained.clip.state_dict()
    # As open_clip's own training program writes it.
    wrapped = {f"module.{name}": value for name, value in state.items()}
    checkpoint = {"epoch": 3, "name": "x", "state_dict": wrapped, "optimizer": {"state": {}}}
    torch.save(checkpoint, folder / "epoch_3.pt")
    # CustomTextCLIP keeps the text tower under a name of its own.
    top = ("logit_scale", "visual.")
    custom = {n if n.startswith(top) else f"text.{n}": v for n, v in state.items()}
    save_file({n: v.clone() for n, v in custom.items()}, folder / "custom.safetensors")
    return {
        "open_clip": folder / "open_clip",
        "bin": folder / "open_clip/open_clip_pytorch_model.bin",
        "safe": folder / "safe",
        "hf": folder / "hf",
        "hf_file": folder / "hf/model.safetensors",
        "pt": folder / "epoch_3.pt",
        "custom": folder / "custom.safetensors",
    }


def start(place: Path, **changes: Any) -> tuple[TrainModule, list[str]]:
    settings = dataclasses.replace(SETTINGS, seed=99, pretrained=str(place), **changes)
    module = TrainModule(settings)
    lines: list[str] = []
    load_pretrained(module, settings, lines.append)
    return module, lines


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


FORMS = ("open_clip", "bin", "safe", "hf", "hf_file", "pt", "custom")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_weights_and_logits(
    trained: TrainModule, places: dict[str, Path], form: str
) -> None:
    module, lines = start(places[form])
    assert same(module.clip, trained.clip)
    has_heads = form in ("open_clip", "bin", "safe")
    assert same(module.heads, trained.heads) == has_heads
    assert ("heads declip too" in lines[-1]) == has_heads
    assert ("heads declip are not in it and start as drawn" in lines[-1]) != has_heads
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    token_ids = torch.tensor([[49406, 320, 736, 49407, 0], [49406, 49407, 0, 0, 0]])
    with torch.no_grad():
        ours = module.clip.eval()(images, token_ids)
        wanted = trained.clip.eval()(images, token_ids)
    assert all(torch.equal(one, other) for one, other in zip(ours, wanted, strict=True))


def test_nothing_happens_where_none_are_named() -> None:
    module = TrainModule(SETTINGS)
    load_pretrained(module, SETTINGS)
    assert same(module, TrainModule(SETTINGS))
    assert pretrained_digest(SETTINGS) == ""


def test_the_digest_is_of_the_bytes_and_not_of_the_place(
    places: dict[str, Path], tmp_path: Path
) -> None:
    def digest(path: Path) -> str:
        return pretrained_digest(dataclasses.replace(SETTINGS, pretrained=str(path)))

    copy = tmp_path / "other name.pt"
    copy.write_bytes(places["pt"].read_bytes())
    assert digest(copy) == digest(places["pt"]) != digest(places["custom"])
    with pytest.raises(DeclipError, match=r"is no file and no folder.*nothing is downloaded"):
        digest(tmp_path / "laion2b_s34b_b79k")
    with pytest.raises(DeclipError, match=r"holds none of open_clip_model.safetensors"):
        digest(tmp_path)


def resized(state: dict[str, Tensor], side: int, length: int) -> dict[str, Tensor]:
    """A state of another image size and context length; the class token's place keeps its value."""
    generator = torch.Generator().manual_seed(5)
    positions = torch.randn(1 + side**2, 32, generator=generator)
    texts = torch.randn(length, 32, generator=generator)
    return {**state, "visual.positional_embedding": positions, "positional_embedding": texts}


def test_positions_are_interpolated_as_open_clip_does(trained: TrainModule, tmp_path: Path) -> None:
    """Against its formula: bicubic with antialiasing over the grid, linear over the line."""
    state = resized(dict(trained.clip.state_dict()), side=5, length=20)
    torch.save({"state_dict": state}, tmp_path / "big.pt")
    module, lines = start(tmp_path / "big.pt")
    assert isinstance(module.clip, CLIP)
    grid = state["visual.positional_embedding"][1:].T.reshape(1, 32, 5, 5)
    small = F.interpolate(grid, (2, 2), mode="bicubic", antialias=True, align_corners=False)
    found = module.clip.visual.get_parameter("positional_embedding")
    torch.testing.assert_close(found[1:], small[0].flatten(1).T)
    assert torch.equal(found[0], state["visual.positional_embedding"][0])
    line = state["positional_embedding"].T.unsqueeze(0)
    longer = F.interpolate(line, 77, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(module.clip.positional_embedding, longer)
    assert "visual.positional_embedding was interpolated from 26 to 5 positions" in lines[0]
    assert "positional_embedding was interpolated from 20 to 77 positions" in lines[1]


def test_mismatches_are_named(trained: TrainModule, places: dict[str, Path]) -> None:
    state = dict(trained.clip.state_dict())
    clip = CLIP(get_model_config("test"))
    del state["ln_final.bias"]
    state["visual.proj"] = torch.zeros(32, 24)
    state["nonsense"] = torch.zeros(1)
    with pytest.raises(DeclipError) as caught:
        fit_towers(state, clip, "it")
    assert str(caught.value) == (
        "it does not fit the model: 1 parameters are missing (ln_final.bias); 1 are unknown "
        "(nonsense); 1 have another shape (visual.proj is (32, 24), not (32, 16)); choose the "
        "model that the weights are of."
    )
    with pytest.raises(DeclipError, match=r"does not fit the model: \d+ parameters are missing"):
        start(places["pt"], model="test-rn")
    with pytest.raises(DeclipError, match=r"head 'declip' in .* does not fit .*have another shape"):
        start(places["open_clip"], projector_dim=16)


def test_the_sigmoid_losss_bias(trained: TrainModule, tmp_path: Path) -> None:
    """Weights without one start it from 0, as open_clip does; weights with one need the loss."""
    state = dict(trained.clip.state_dict())
    torch.save(state, tmp_path / "plain.pt")
    module, lines = start(tmp_path / "plain.pt", method="clip", contrastive_loss="sigmoid")
    assert module.clip.logit_bias is not None
    assert module.clip.logit_bias.item() == 0
    assert "start from 0" in lines[0] or "starts from 0" in lines[0]
    # Some of open_clip's files keep scalars as vectors of one.
    state |= {"logit_bias": torch.tensor([-9.0]), "logit_scale": torch.tensor([2.0])}
    torch.save(state, tmp_path / "siglip.pt")
    module, _ = start(tmp_path / "siglip.pt", method="clip", contrastive_loss="sigmoid")
    assert module.clip.logit_bias is not None
    assert module.clip.logit_bias.item() == -9
    assert module.clip.logit_scale.item() == 2
    with pytest.raises(DeclipError, match=r"unknown .logit_bias.; set contrastive_loss to sig"):
        start(tmp_path / "siglip.pt", method="clip")


def test_another_activation_is_refused_where_a_configuration_tells(tmp_path: Path) -> None:
    exact = CLIP(dataclasses.replace(get_model_config("test"), quick_gelu=False))
    assert MODEL_CONFIGS["test"].quick_gelu
    export_open_clip(exact, None, tmp_path / "a", PreprocessSettings(), {})
    export_hugging_face(exact, tmp_path / "b", PreprocessSettings(), {})
    for name in ("a", "b"):
        with pytest.raises(DeclipError, match="was trained with quick_gelu False, but model 'te"):
            start(tmp_path / name)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/nowhere/at/all").touch, ())


def test_damaged_and_harmful_files_are_refused(tmp_path: Path, places: dict[str, Path]) -> None:
    cases = {
        "harmful.pt": (
            {"state_dict": _Harmful()},
            r"as weights \(it is no file of tensors, or holds",
        ),
        "list.pt": ([torch.zeros(1)], "holds a list, but must hold named tensors"),
        "other.pt": ({"weight": torch.zeros(1)}, "holds no image tower"),
    }
    for name, (content, sentence) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(DeclipError, match=sentence):
            read_pretrained(tmp_path / name)
    for form in ("pt", "custom"):
        whole = places[form].read_bytes()
        cut = tmp_path / places[form].name
        cut.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DeclipError, match=r"cannot be read as weights .*whole"):
            read_pretrained(cut)
    script = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(script, str(tmp_path / "jit.pt"))
    with pytest.raises(DeclipError, match="TorchScript archive, which is a program"):
        read_pretrained(tmp_path / "jit.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(DeclipError, match="cannot be read as weights"):
        read_pretrained(tmp_path / "empty.pt")
