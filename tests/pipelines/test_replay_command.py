"""``declip replay``: from a kept batch to the sample, layer and term it began with."""

import dataclasses
import json
import math
from typing import TYPE_CHECKING

import pytest
import torch

from declip_shards import DeclipError
from declip_train import checkpoint_files
from declip_train.batch_record import BatchRecord, GeneratorStates, write_record, write_weights
from declip_train.checkpoint_export import WEIGHTS
from declip_train.loader import BatchLoader
from declip_train.module import TrainModule
from declip_train.samples import load_samples
from declip_train.settings import TrainSettings
from pipelines.replay_command import main

if TYPE_CHECKING:
    from tests.train.training_data import write_training_data
else:
    from training_data import write_training_data


@pytest.fixture
def run(tmp_path):
    """A dataset whose training kept a batch with one bad picture; its key."""
    write_training_data(tmp_path, num_shards=1)
    settings = TrainSettings(model="test", method="clip", global_batch_size=12, warmup_steps=1)
    samples = load_samples(str(tmp_path), selection="default")
    batch = BatchLoader(samples, settings, 0, 1).make_batch(1)
    images = batch.images.clone()
    images[0, 4, 0, 0, 0] = math.nan
    keys = samples.keys_of(batch.sample_ids.tolist())
    record = BatchRecord(
        step=1,
        rank=0,
        world_size=1,
        fault="the loss term 'contrastive' became nan",
        terms={"contrastive": "nan", "total": "nan"},
        keys=keys,
        bad_keys=[keys[4]],
        bad_parameter=None,
        previous_keys=[],
        settings=settings,
        batch=dataclasses.replace(batch, images=images),
        generators=GeneratorStates.take(torch.device("cpu")),
    )
    folder = tmp_path / "train/bad_batches"
    write_record(folder, record)
    write_weights(folder, 1, TrainModule(settings))
    return tmp_path, keys[4]


def test_the_sample_layer_and_term_are_told(run, capsys):
    root, key = run
    assert main([str(root)]) == 0
    text = capsys.readouterr().out
    assert "step 1: the loss term 'contrastive' became nan" in text
    assert "weights: as they were before the step" in text
    assert f"Inputs that are not finite: {key!r} (process 0)." in text
    assert "First layer whose output is not finite: clip.visual.conv1, on process 0" in text
    assert text.rstrip().endswith("Terms that are not finite: contrastive.")
    for folder in (root / "train", root / "train/bad_batches"):
        assert main([str(folder), "--step", "1", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["bad_samples"] == [[0, key]]
        assert found["terms"]["total"] == "nan"


def test_without_its_weights_a_checkpoint_is_asked_for(run):
    root, _ = run
    (root / "train/bad_batches/step_00000001_weights.safetensors").unlink()
    with pytest.raises(DeclipError, match=r"no weights of step 1, and there is no whole checkpoin"):
        main([str(root)])
    with pytest.raises(DeclipError, match=r"--checkpoint is '.*shards', which holds no checkpoint"):
        main([str(root), "--checkpoint", str(root / "shards")])


def write_checkpoint(folder, step, module):
    """As a run writes it, with the weights alone."""
    folder.mkdir(parents=True, exist_ok=True)
    place = checkpoint_files.new_folder(folder, step)
    state = {"module": {f"module.{name}": value for name, value in module.state_dict().items()}}
    content = checkpoint_files.arrange(state, copy=False)
    record = checkpoint_files.write_state(place / WEIGHTS, content)
    manifest = {
        "format_version": checkpoint_files.FORMAT_VERSION, "step": step, "files": [record]
    }  # fmt: skip
    checkpoint_files.commit_folder(folder, step, manifest)


def test_the_checkpoint_before_the_step_serves(run, capsys):
    """Of two, the newest that is not of a later step; or the one that is named."""
    root, _ = run
    kept = root / "train/bad_batches/step_00000001_weights.safetensors"
    weights = TrainModule(TrainSettings(model="test", method="clip"))
    runs = root / "train/checkpoints/0123abcd"
    write_checkpoint(runs, 2, weights)
    with torch.no_grad():
        dict(weights.named_parameters())["clip.visual.proj"].fill_(math.nan)
    write_checkpoint(runs, 1, weights)
    main([str(root), "--checkpoint", str(runs / "step_00000002")])
    text = capsys.readouterr().out
    assert "step_00000002" in text
    assert "The weights themselves" not in text
    kept.unlink()
    main([str(root)])
    text = capsys.readouterr().out
    assert "weights: of the checkpoint before the step, step_00000001" in text
    assert "The weights themselves are not finite: 'clip.visual.proj' first." in text


def test_nothing_to_compute_is_told(run):
    root, _ = run
    with pytest.raises(DeclipError, match=r"there is no folder '.*/nowhere'; give that of a datas"):
        main([str(root / "nowhere")])
    with pytest.raises(DeclipError, match=r"holds no batch to compute again; training keeps one"):
        main([str(root / "shards")])
    with pytest.raises(DeclipError, match=r"holds no batch of step 5"):
        main([str(root), "--step", "5"])
