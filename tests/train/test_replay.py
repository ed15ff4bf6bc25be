"""A kept step computed again says where a number first was not finite."""

import dataclasses
import math
from typing import TYPE_CHECKING

import pytest
import torch

from declip_shards import DeclipError
from declip_train.batch_record import BatchRecord, GeneratorStates
from declip_train.loader import BatchLoader
from declip_train.methods import METHODS
from declip_train.module import TrainModule
from declip_train.replay import join_batches, replay_step
from declip_train.samples import load_samples
from declip_train.settings import TrainSettings

if TYPE_CHECKING:
    from tests.train.training_data import write_training_data
else:
    from training_data import write_training_data

SETTINGS = TrainSettings(
    model="test",
    augmentation="light",
    global_batch_size=12,
    max_steps=40,
    warmup_steps=2,
    projector_dim=32,
    predictor_hidden_dim=16,
    simclr_hidden_dim=32,
    simclr_dim=16,
    token_dim=16,
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_training_data(root, num_shards=1)
    return load_samples(str(root), selection="default", neighbors="captions")


def kept(samples, settings, *, ranks=1, change=lambda rank, batch: batch):
    """Records of all processes, and the module whose step it was."""
    records = []
    for rank in range(ranks):
        batch = change(rank, BatchLoader(samples, settings, rank, ranks).make_batch(1))
        records.append(
            BatchRecord(
                step=1,
                rank=rank,
                world_size=ranks,
                fault="the loss term 'contrastive' became nan",
                terms={},
                keys=samples.keys_of(batch.sample_ids.tolist()),
                bad_keys=[],
                bad_parameter=None,
                previous_keys=[],
                settings=settings,
                batch=batch,
                generators=GeneratorStates.take(torch.device("cpu")),
            )
        )
    return records, TrainModule(settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_healthy_step_has_the_losses_of_training_however_many_processes_shared_it(
    samples, method
):
    settings = dataclasses.replace(SETTINGS, method=method, accumulation_steps=2)
    (whole,), module = kept(samples, settings)
    expected, _ = module(whole.batch)
    for ranks in (1, 2):
        records, _ = kept(samples, settings, ranks=ranks)
        found = replay_step(records, module.state_dict())
        assert found.is_finite
        assert set(found.terms) == {*expected, "total"}
        for name, value in expected.items():
            assert found.terms[name] == pytest.approx(float(value.detach()), rel=1e-4)
        assert (found.first_layer, found.bad_samples, found.gradient_samples) == (None, [], [])


def test_joined_shares_are_the_global_batch(samples):
    settings = dataclasses.replace(SETTINGS, method="declip")
    (whole,), _ = kept(samples, settings)
    records, _ = kept(samples, settings, ranks=3)
    joined = join_batches([record.batch for record in records])
    for name, value in vars(whole.batch).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(joined, name), value), name
    for name, lengths in whole.batch.lengths.items():
        assert torch.equal(joined.lengths[name], lengths)


def test_a_bad_pixel_is_found_in_its_sample_and_process(samples):
    def spoil(rank, batch):
        images = batch.images.clone()
        if rank == 1:
            images[0, 2, 0, 5, 5] = math.inf
        return dataclasses.replace(batch, images=images)

    settings = dataclasses.replace(SETTINGS, method="declip")
    records, module = kept(samples, settings, ranks=2, change=spoil)
    found = replay_step(records, module.state_dict())
    assert not found.is_finite
    guilty = [(1, records[1].keys[2])]
    assert found.bad_inputs == guilty
    assert found.bad_samples == guilty
    assert (found.first_layer, found.layer_share) == ("clip.visual.conv1", 1)
    assert "contrastive" in found.bad_terms
    assert found.bad_gradient is None


def test_the_first_layer_that_overflows_is_named(samples):
    records, module = kept(samples, dataclasses.replace(SETTINGS, method="clip"))
    with torch.no_grad():
        module.clip.transformer.resblocks[0].mlp.c_fc.weight.fill_(3e38)
    found = replay_step(records, module.state_dict())
    assert found.first_layer == "clip.transformer.resblocks.0.mlp.c_fc"
    assert found.bad_parameter is None, "the weights are large, but finite"
    assert found.bad_inputs == []
    assert found.bad_terms == ["contrastive"]


def test_a_loss_that_overflows_over_good_features(samples):
    records, module = kept(samples, dataclasses.replace(SETTINGS, method="clip"))
    with torch.no_grad():
        module.clip.logit_scale.fill_(100.0)
    found = replay_step(records, module.state_dict())
    assert (found.first_layer, found.bad_samples) == (None, [])
    assert found.bad_terms == ["contrastive"]


def test_weights_that_were_bad_before_are_named(samples):
    records, module = kept(samples, dataclasses.replace(SETTINGS, method="clip"))
    with torch.no_grad():
        module.clip.visual.proj[0, 0] = math.nan
    assert replay_step(records, module.state_dict()).bad_parameter == "clip.visual.proj"


def test_a_gradient_alone_may_be_bad(samples, monkeypatch):
    """The square root's at zero, as a loss of one's own may have it."""
    records, module = kept(samples, dataclasses.replace(SETTINGS, method="clip"))
    terms = TrainModule.terms

    def with_root(self, encoded, batch):
        found, metrics = terms(self, encoded, batch)
        features = encoded["image_features"]
        root = (features[4] - features[4].detach()).abs().sum().sqrt()
        return {"contrastive": found["contrastive"] + root}, metrics

    monkeypatch.setattr(TrainModule, "terms", with_root)
    found = replay_step(records, module.state_dict())
    assert found.bad_terms == []
    assert found.bad_gradient is not None
    assert found.gradient_samples == [(0, records[0].keys[4])]


def test_weights_of_another_model_are_refused(samples):
    records, _ = kept(samples, dataclasses.replace(SETTINGS, method="clip"))
    other = TrainModule(dataclasses.replace(SETTINGS, method="filip"))
    with pytest.raises(DeclipError, match=r"weights do not fit the batch's settings .*same run"):
        replay_step(records, other.state_dict())


def test_half_precision_is_computed_as_trained(samples):
    settings = dataclasses.replace(SETTINGS, method="declip", precision="bf16")
    records, module = kept(samples, settings)
    found = replay_step(records, module.bfloat16().state_dict())
    exact = replay_step(
        [dataclasses.replace(records[0], settings=dataclasses.replace(settings, precision="fp32"))],
        module.float().state_dict(),
    )
    assert found.is_finite
    assert found.terms["contrastive"] != exact.terms["contrastive"]
    assert found.terms["contrastive"] == pytest.approx(exact.terms["contrastive"], rel=0.1)
