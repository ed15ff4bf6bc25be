"""A model out of a checkpoint: that of the run, at that step."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from declip_shards import DeclipError
from declip_train.checkpoint import MANIFEST, Checkpoints
from declip_train.checkpoint_export import (
    WEIGHTS,
    CheckpointPlace,
    export_checkpoint,
    find_checkpoint,
)
from declip_train.export import load_export
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
