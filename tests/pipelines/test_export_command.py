"""``declip export``: of a finished run and of a checkpoint, in every form; refusals in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from declip_shards import DeclipError, Store
from declip_train.checkpoint_files import MANIFEST, file_digest
from declip_train.export import PreprocessSettings, export_open_clip, load_export
from declip_train.module import TrainModule
from declip_train.pretrained import read_pretrained
from declip_train.settings import TrainSettings
from pipelines import export_command

SETTINGS = TrainSettings(
    model="test",
    method="slip",
    global_batch_size=8,
    max_steps=9,
    warmup_steps=1,
    simclr_hidden_dim=8,
    simclr_dim=4,
)


def write_checkpoint(root: Path, step: int, run: str = "cafe") -> dict[str, torch.Tensor]:
    """What DeepSpeed writes in stage 0 without half precision, under a manifest of ours."""
    module = TrainModule(SETTINGS)
    with torch.no_grad():
        module.clip.logit_scale.add_(step / 100)
    folder = root / f"train/checkpoints/{run}/step_{step:08d}"
    folder.mkdir(parents=True)
    path = folder / "mp_rank_00_model_states.pt"
    state = {f"module.{name}": value for name, value in module.state_dict().items()}
    torch.save({"module": state, "optimizer": {}}, path)
    record = {"path": path.name, "size": path.stat().st_size, "sha256": file_digest(path)}
    manifest = {
        "format_version": 2,
        "step": step,
        "files": [record],
        "settings": SETTINGS.elastic_digest(),
        "method": "slip",
        "made_by": {"world_size": 2},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (root / "train/config.json").write_bytes(SETTINGS.to_json())
    return dict(module.clip.state_dict())


@pytest.fixture(scope="module")
def going_on(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run with two checkpoints and no export yet, and the newer one's weights."""
    root = tmp_path_factory.mktemp("run")
    write_checkpoint(root, 3)
    return root, write_checkpoint(root, 6)


@pytest.mark.parametrize("form", export_command.FORMATS)
def test_the_newest_checkpoint_in_every_form(
    going_on: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    form: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, weights = going_on
    target = tmp_path / "out"
    arguments = ["--out", str(root), "--format", form, str(target)]
    for _ in range(2):
        assert export_command.main(arguments) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"{form}: step 6 of run cafe is in {target}\n")
        listed = {line.split()[0] for line in told.splitlines()[1:]}
        assert listed == {path.name for path in target.iterdir()}
    found = read_pretrained(target)
    assert found.towers.keys() == weights.keys()
    assert all(torch.equal(found.towers[name], weights[name]) for name in weights)
    assert bool(found.heads) == (form != "huggingface")
    assert (target / "open_clip_pytorch_model.bin").exists() == (form == "open_clip")
    if form != "huggingface":
        provenance = load_export(target).provenance
        assert (provenance["run"], provenance["steps"]) == ("cafe", 6)
        assert "made_by" not in provenance


def test_a_step_or_a_folder_is_named(
    going_on: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    root, _ = going_on
    store = Store(str(root))
    assert export_command.find_model(store, "latest").provenance["steps"] == 6
    assert export_command.find_model(store, "3").provenance["steps"] == 3
    folder = root / "train/checkpoints/cafe/step_00000003"
    assert export_command.find_model(store, str(folder)).provenance["steps"] == 3
    with pytest.raises(DeclipError, match=r"--checkpoint 4 is not there; there are: steps 3, 6\."):
        export_command.find_model(store, "4")
    with pytest.raises(DeclipError, match="--checkpoint 'newest' is no folder; give a step"):
        export_command.find_model(store, "newest")
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    write_checkpoint(copy, 3, run="beef")
    with pytest.raises(DeclipError, match=r"--checkpoint 3 is there in 2 runs.*beef.*cafe"):
        export_command.find_model(Store(str(copy)), "3")


def test_a_finished_run_is_preferred_and_left_alone(
    going_on: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    root = tmp_path / "done"
    module = TrainModule(SETTINGS)
    own = root / "train/export"
    wanted = PreprocessSettings(interpolation="bilinear")
    export_open_clip(module.clip, module.heads, own, wanted, {"steps": 9, "method": "slip"})
    arguments = ["--out", str(root), "--format", "safetensors"]
    assert export_command.main([*arguments, str(tmp_path / "x")]) == 0
    one, other = load_export(own), load_export(tmp_path / "x")
    assert (one.preprocess, one.provenance) == (other.preprocess, other.provenance)
    for first, second in (
        (one.model.state_dict(), other.model.state_dict()),
        (one.aux_state_dict, other.aux_state_dict),
    ):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(DeclipError, match="is the run's own export, which its record vouches for"):
        export_command.main([*arguments, str(own)])


def test_wrong_places_and_forms_are_sentences(tmp_path: Path) -> None:
    root, target = tmp_path / "root", tmp_path / "target"
    root.mkdir()
    with pytest.raises(DeclipError, match="holds no train/export and no checkpoint in train/ch"):
        export_command.main(["--out", str(root), str(target)])
    with pytest.raises(DeclipError, match=r"--format is 'hugging'. Did you mean 'huggingface'"):
        export_command.main(["--out", str(root), "--format", "hugging", str(target)])
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(DeclipError, match=r"holds 'notes.txt' and no export in the form open_clip"):
        export_command.main(["--out", str(root), str(target)])
    with pytest.raises(DeclipError, match="is a file; name a folder"):
        export_command.main(["--out", str(root), str(target / "notes.txt")])
    assert not list(root.iterdir())
