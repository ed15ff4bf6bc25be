"""One training step: schedule, parameter groups, bounds of the logit scale, losses gone wrong."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from declip_shards import DeclipError
from declip_train.loader import BatchLoader
from declip_train.losses import method_terms
from declip_train.samples import load_samples
from declip_train.settings import TrainSettings
from declip_train.towers import CLIP

if TYPE_CHECKING:
    from tests.train.training_data import write_training_data
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from training_data import write_training_data

SETTINGS = TrainSettings(
    model="test",
    augmentation="light",
    global_batch_size=24,
    max_steps=40,
    warmup_steps=2,
    start_lr=1e-3,
    peak_lr=3e-3,
    projector_dim=32,
    predictor_hidden_dim=16,
)


@pytest.fixture(scope="module")
def engine_module(tmp_path_factory):
    """The engine, in a process group of one; DeepSpeed's operator is built if it never was."""
    import os

    before = dict(os.environ)
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    import deepspeed

    from declip_train import engine, extension

    extension.use_prebuilt()
    meeting = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
    yield engine
    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_training_data(root)
    return load_samples(str(root), selection="default", neighbors="captions")


def make(engine_module, samples, **changed):
    settings = dataclasses.replace(SETTINGS, **changed)
    loader = BatchLoader(samples, settings, 0, 1)
    return engine_module.TrainEngine(settings, loader.num_steps), loader


@pytest.mark.parametrize("method", ["declip", "clip"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_training_lowers_the_loss(engine_module, samples, method, zero_stage):
    engine, loader = make(engine_module, samples, method=method, zero_stage=zero_stage)
    records = [engine.train_step(loader.make_batch(step)) for step in range(30)]
    weights = dict(method_terms(method))
    assert set(records[0].terms) == {*weights, "total"}
    for record in records:
        total = sum(weights[name] * record.terms[name] for name in weights)
        assert record.terms["total"] == pytest.approx(total, rel=1e-5)
    first, last = records[0].terms, records[-1].terms
    assert first["contrastive"] > math.log(24) - 0.3, "an untrained model knows nothing"
    assert last["total"] < first["total"]
    assert last["contrastive"] < first["contrastive"]


def test_mixed_precision_keeps_float32_weights(engine_module, samples):
    engine, loader = make(engine_module, samples, precision="amp_bf16")
    exact, _ = make(engine_module, samples)
    batch = loader.make_batch(0)
    mixed, plain = engine.train_step(batch).terms, exact.train_step(batch).terms
    assert mixed != plain
    assert mixed["total"] == pytest.approx(plain["total"], rel=0.03)
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}


def test_zero_stages_agree(engine_module, samples):
    found = []
    for zero_stage in (0, 1, 2):
        engine, loader = make(engine_module, samples, zero_stage=zero_stage)
        for step in range(4):
            engine.train_step(loader.make_batch(step))
        found.append(engine.module.clip.state_dict())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_the_logit_scale_stays_in_its_bounds(engine_module, samples, zero_stage):
    bounds = {"logit_scale_min": 2.65, "logit_scale_max": 2.66}
    engine, loader = make(engine_module, samples, zero_stage=zero_stage, **bounds)
    for step in range(6):
        engine.train_step(loader.make_batch(step))
        value = float(engine.module.clip.logit_scale.detach())
        assert 2.65 - 1e-6 <= value <= 2.66 + 1e-6
        assert engine.full_logit_scale() == pytest.approx(value, abs=1e-7)


def test_a_loss_that_is_not_finite_stops_before_the_update(engine_module, samples):
    engine, loader = make(engine_module, samples)
    batch = loader.make_batch(0)
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    bad = dataclasses.replace(batch, images=torch.full_like(batch.images, float("nan")), step=7)
    with pytest.raises(
        DeclipError, match=r"term 'contrastive' became nan at step 7; lower peak_lr"
    ):
        engine.train_step(bad)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_what_one_process_asks_for_all_are_told(engine_module, samples):
    engine, loader = make(engine_module, samples)
    record = engine.train_step(loader.make_batch(0), stop_asked=True)
    assert (record.stop_asked, record.save_asked) == (True, False)
    record = engine.train_step(loader.make_batch(1), save_asked=True)
    assert (record.stop_asked, record.save_asked) == (False, True)


def test_the_schedule(engine_module):
    settings = TrainSettings(
        warmup_steps=5, start_lr=0.1, peak_lr=1.0, end_lr=0.2, max_steps=105, model="test"
    )
    rates = [engine_module.learning_rate(settings, step, 105) for step in range(106)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[4] == rates[5] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.6)
    assert rates[105] == pytest.approx(0.2)
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_what_decays(engine_module):
    module = engine_module.TrainModule(SETTINGS)
    decayed, plain = engine_module.parameter_groups(module, 0.1)
    names = {id(p): name for name, p in module.named_parameters()}
    exempt = {names[id(p)] for p in plain["params"]}
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0
    assert len(exempt) + len(decayed["params"]) == len(names)
    assert "clip.logit_scale" in exempt
    assert "clip.visual.ln_pre.weight" in exempt
    assert "clip.transformer.resblocks.0.mlp.c_fc.bias" in exempt
    assert "heads.mlm_head.bias" in exempt
    assert "clip.transformer.resblocks.0.attn.in_proj_bias" not in exempt
    assert "clip.token_embedding.weight" not in exempt
    assert not [
        n
        for n in exempt
        if n.endswith("weight") and ".ln_" not in n and ".bn_" not in n and "ln_final" not in n
    ]


@pytest.mark.parametrize("rows_per_group", [1, 3, 8, 100])
def test_grouping_captions_by_length_changes_nothing(engine_module, samples, rows_per_group):
    loader = BatchLoader(samples, SETTINGS, 0, 1)
    batch = loader.make_batch(0)
    assert batch.replaced is not None
    token_ids, replaced = batch.token_ids.clone(), batch.replaced
    token_ids[::2, 3] = 49_407
    token_ids[::2, 4:] = 0
    replaced = replaced & (torch.arange(replaced.shape[1]) < 3)
    clip = CLIP(SETTINGS.model_config, generator=torch.Generator().manual_seed(0))
    mask: dict[str, Any] = {"mask_embedding": torch.randn(32), "need_hidden": True}
    whole = clip.forward_text(token_ids, mask_positions=replaced, **mask)
    found = engine_module.forward_text_by_length(
        clip, token_ids, rows_per_group=rows_per_group, replaced=replaced, **mask
    )
    torch.testing.assert_close(found.features, whole.features, rtol=1e-5, atol=1e-6)
    assert whole.hidden is not None
    for row, end in enumerate(token_ids.argmax(1).tolist()):
        torch.testing.assert_close(
            found.hidden[row, : end + 1], whole.hidden[row, : end + 1], rtol=1e-5, atol=1e-5
        )
