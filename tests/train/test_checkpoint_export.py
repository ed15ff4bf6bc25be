"""A model out of a checkpoint: that of the run, at that step."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from declip_shards import DeclipError
from declip_train.batch import Batch
from declip_train.checkpoint import MANIFEST, Checkpoints
from declip_train.checkpoint_export import (
    WEIGHTS,
    CheckpointPlace,
    exact_module,
    export_checkpoint,
    find_checkpoint,
    read_checkpoint,
)
from declip_train.export import load_export
from declip_train.precision import full_precision
from declip_train.settings import TrainSettings

if TYPE_CHECKING:
    from tests.train.single_process import one_process
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from single_process import one_process

SETTINGS = TrainSettings(
    model="test", global_batch_size=8, max_steps=9, warmup_steps=1, seed=3, zero_stage=1
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """train/ of a run with two checkpoints, and the weights of the newer."""
    folder = tmp_path_factory.mktemp("run") / "train"
    folder.mkdir()
    (folder / "config.json").write_bytes(SETTINGS.to_json())
    with one_process(folder) as module:
        engine = module.TrainEngine(SETTINGS, 9)
        identity = {"settings": SETTINGS.digest(), "method": "declip", "world_size": 1}
        checkpoints = Checkpoints(folder / "checkpoints/cafe", identity, keep=2, say=print)
        checkpoints.save(engine.deepspeed, 3)
        with torch.no_grad():
            engine.module.clip.text_projection.add_(1)
        checkpoints.save(engine.deepspeed, 6)
        weights = {name: value.clone() for name, value in engine.module.clip.state_dict().items()}
    return folder, weights


def test_the_export_has_the_checkpoints_weights_and_says_where_they_are_from(run_folder, tmp_path):
    folder, weights = run_folder
    place = find_checkpoint(folder / "checkpoints")
    assert place is not None
    assert (place.run, place.step) == ("cafe", 6)
    for start in ("checkpoints/cafe", "checkpoints/cafe/step_00000006"):
        assert find_checkpoint(folder / start) == place
    paths = export_checkpoint(place, folder / "config.json", tmp_path / "six")
    loaded = load_export(tmp_path / "six")
    for name, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)
    assert loaded.provenance["run"] == "cafe"
    assert loaded.provenance["steps"] == 6
    assert loaded.provenance["method"] == "declip"
    assert loaded.aux_state_dict
    before = [path.read_bytes() for path in paths]
    export_checkpoint(place, folder / "config.json", tmp_path / "again")
    assert [(tmp_path / "again" / path.name).read_bytes() for path in paths] == before
    earlier = find_checkpoint(folder / "checkpoints/cafe/step_00000003")
    assert earlier is not None
    export_checkpoint(earlier, folder / "config.json", tmp_path / "three")
    three = load_export(tmp_path / "three").model.state_dict()["text_projection"]
    assert not torch.equal(three, weights["text_projection"])


def test_a_torn_checkpoint_gives_way_to_the_one_before(run_folder, tmp_path):
    folder, _ = run_folder
    copy = tmp_path / "cafe"
    for step in (3, 6):
        name = f"step_{step:08d}"
        (copy / name).mkdir(parents=True)
        for path in (folder / "checkpoints/cafe" / name).iterdir():
            os.link(path, copy / name / path.name)
    newest = copy / "step_00000006"
    (newest / WEIGHTS).unlink()
    found = find_checkpoint(copy)
    assert found is not None
    assert found.step == 3
    (copy / "step_00000003" / MANIFEST).unlink()
    with pytest.raises(DeclipError, match=r"holds no whole checkpoint \(step_0000000\d: "):
        find_checkpoint(copy)
    assert find_checkpoint(tmp_path / "nothing") is None
    gone = CheckpointPlace(folder=newest, run="cafe", step=6)
    with pytest.raises(DeclipError, match=r"was removed while it was read"):
        export_checkpoint(gone, folder / "config.json", tmp_path / "out")


def test_a_checkpoint_of_other_settings_is_refused(run_folder, tmp_path):
    folder, _ = run_folder
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(SETTINGS.to_json()) | {"seed": 4}))
    place = find_checkpoint(folder / "checkpoints")
    assert place is not None
    with pytest.raises(DeclipError, match=r"of other settings than .*config.json"):
        export_checkpoint(place, config, tmp_path / "out")


def random_batch(settings):
    """Of method clip."""
    generator = torch.Generator().manual_seed(0)
    rows = settings.global_batch_size
    token_ids = torch.randint(1, 40_000, (rows, 6), generator=generator)
    token_ids[:, 0], token_ids[:, -1] = 49_406, 49_407
    return Batch(
        step=0,
        epoch=0,
        images=torch.randn(1, rows, 3, 16, 16, generator=generator),
        token_ids=token_ids,
        sample_ids=torch.arange(rows),
        caption_ids=torch.arange(rows),
    )


@pytest.mark.parametrize(("precision", "zero_stage"), [("bf16", 0), ("bf16", 1), ("bf16", 2)])
def test_half_precision_runs_export_what_the_optimizer_holds(tmp_path, precision, zero_stage):
    """Float32 weights that bfloat16 cannot hold come out whole, whatever the stage."""
    settings = dataclasses.replace(
        SETTINGS, method="clip", precision=precision, zero_stage=zero_stage, max_steps=4
    )
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "config.json").write_bytes(settings.to_json())
    with one_process(folder) as module:
        engine = module.TrainEngine(settings, 4)
        engine.train_step(random_batch(settings))
        exact = {}
        for name, parameter in engine.module.named_parameters():
            copy = full_precision(parameter, engine.deepspeed.optimizer)
            assert copy is not None
            exact[name] = copy.detach().float().clone().reshape(parameter.shape)
        identity = {"settings": settings.elastic_digest()}
        Checkpoints(folder / "checkpoints/cafe", identity, keep=2, say=print).save(
            engine.deepspeed, 1
        )
        half = {n: p.detach().float().clone() for n, p in engine.module.named_parameters()}
    place = find_checkpoint(folder / "checkpoints")
    assert place is not None
    found = read_checkpoint(place, folder / "config.json")
    again = exact_module(settings, place.folder).state_dict()
    assert all(torch.equal(again[name], value) for name, value in exact.items())
    for name, parameter in found.module.named_parameters():
        assert torch.equal(parameter, exact[name]), name
    assert any(not torch.equal(exact[name], half[name]) for name in exact)
    first = export_checkpoint(place, folder / "config.json", tmp_path / "out")
    weights = load_export(tmp_path / "out").model.state_dict()
    assert torch.equal(weights["text_projection"], exact["clip.text_projection"])
    assert first
