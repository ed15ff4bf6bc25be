"""One training step: every method learns, bounds of the logit scales, losses gone wrong."""

import dataclasses
import math
from typing import TYPE_CHECKING

import pytest
import torch

from declip_shards import DeclipError
from declip_train import batch_record
from declip_train.loader import BatchLoader
from declip_train.methods import METHODS, method_terms
from declip_train.samples import load_samples
from declip_train.settings import TrainSettings

if TYPE_CHECKING:
    from tests.train.single_process import one_process
    from tests.train.training_data import write_training_data
else:
    from single_process import one_process
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
    simclr_hidden_dim=32,
    simclr_dim=16,
    token_dim=16,
)


@pytest.fixture(scope="module")
def engine_module(tmp_path_factory):
    with one_process(tmp_path_factory.mktemp("group")) as module:
        yield module


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_training_data(root)
    return load_samples(str(root), selection="default", neighbors="captions")


def make(engine_module, samples, **changed):
    settings = dataclasses.replace(SETTINGS, **changed)
    loader = BatchLoader(samples, settings, 0, 1)
    return engine_module.TrainEngine(settings, loader.num_steps), loader


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(engine_module, samples, method, zero_stage):
    engine, loader = make(engine_module, samples, method=method, zero_stage=zero_stage)
    # The same batch again and again: what is learned shows in a few steps.
    batches = [dataclasses.replace(loader.make_batch(0), step=step) for step in range(12)]
    records = [engine.train_step(batch) for batch in batches]
    weights = dict(method_terms(method))
    assert set(records[0].terms) == {*weights, "total"}
    for record in records:
        total = sum(weights[name] * record.terms[name] for name in weights)
        assert record.terms["total"] == pytest.approx(total, rel=1e-5)
        assert not record.skipped
    first, last = records[0].terms, records[-1].terms
    for name in ("contrastive", "tokenwise"):
        if name in first:
            assert first[name] > math.log(24) - 0.3, "an untrained model knows nothing"
            assert last[name] < first[name]
    assert last["total"] < first["total"] - 0.1


def test_the_bank_fills_and_the_record_tells_of_neighbors(engine_module, samples):
    engine, loader = make(
        engine_module, samples, method="declip", neighbor_source="bank", bank_size=60
    )
    first, second = (engine.train_step(loader.make_batch(step)) for step in range(2))
    assert first.metrics == {"neighbor_found": 0.0}
    assert first.terms["neighbor"] == 0
    assert second.metrics["neighbor_found"] == 1
    assert 0 <= second.metrics["neighbor_differs"] <= 1
    assert -1 <= second.metrics["neighbor_similarity"] <= 1
    assert int(engine.module.bank.num_entries()) == 60, "two captions of each of 2 x 24 samples"
    assert int(engine.module.bank.cursor) == 96 % 60


def test_mixed_precision_keeps_float32_weights(engine_module, samples):
    engine, loader = make(engine_module, samples, precision="amp_bf16")
    exact, _ = make(engine_module, samples)
    batch = loader.make_batch(0)
    mixed, plain = engine.train_step(batch).terms, exact.train_step(batch).terms
    assert mixed != plain
    assert mixed["total"] == pytest.approx(plain["total"], rel=0.03)
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
def test_zero_stages_agree(engine_module, samples, optimizer):
    found = []
    for zero_stage in (0, 1, 2) if optimizer != "lamb" else (0, 0):
        engine, loader = make(
            engine_module, samples, zero_stage=zero_stage, optimizer=optimizer, method="clip"
        )
        before = engine.module.clip.text_projection.detach().clone()
        for step in range(3):
            engine.train_step(loader.make_batch(step))
        assert not torch.equal(engine.module.clip.text_projection, before)
        found.append(engine.module.clip.state_dict())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_logit_scales_stay_in_their_bounds(engine_module, samples, zero_stage, precision):
    """In the module, and in the exact copy that DeepSpeed updates."""
    bounds = {"logit_scale_min": 2.65, "logit_scale_max": 2.67, "peak_lr": 0.1}
    engine, loader = make(
        engine_module, samples, zero_stage=zero_stage, precision=precision, **bounds,
        method="defilip",
    )  # fmt: skip
    assert len(engine.scales) == 2
    seen = set()
    for step in range(4):
        engine.train_step(loader.make_batch(step))
        for scale in engine.scales:
            value = float(scale.detach())
            assert 2.65 - 1e-6 <= value <= 2.67 + 1e-6
        exact = engine.full_logit_scale()
        assert 2.65 - 1e-6 <= exact <= 2.67 + 1e-6
        assert exact == pytest.approx(float(engine.scales[0].detach()), abs=0.02)
        seen.add(round(exact, 4))
    assert seen & {2.65, 2.67}, "the rate is so large that a bound is met"


@pytest.mark.parametrize("accumulation_steps", [1, 4])
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    engine_module, samples, zero_stage, accumulation_steps
):
    engine, loader = make(
        engine_module,
        samples,
        zero_stage=zero_stage,
        accumulation_steps=accumulation_steps,
        neighbor_source="bank",
        bank_size=60,
    )
    batch = loader.make_batch(0)
    before = {name: value.clone() for name, value in engine.module.named_parameters()}
    bank = {name: value.clone() for name, value in engine.module.bank.state_dict().items()}
    bad = dataclasses.replace(batch, images=torch.full_like(batch.images, float("nan")), step=7)
    with pytest.raises(
        DeclipError,
        match=r"term 'contrastive' became nan at step 7 on process 0: the features of its samples "
        r"'row \d+', .* and 19 more are not finite; lower peak_lr",
    ):
        engine.train_step(bad)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for name, value in engine.module.bank.state_dict().items():
        assert torch.equal(value, bank[name]), name


def test_weights_that_are_not_finite_are_not_kept(engine_module, samples):
    engine, _ = make(engine_module, samples, method="clip")
    engine.require_finite_weights(3)
    with torch.no_grad():
        engine.module.clip.ln_final.weight[0] = float("inf")
    with pytest.raises(DeclipError, match=r"'clip.ln_final.weight' is not finite after step 3"):
        engine.require_finite_weights(3)


def test_what_one_process_asks_for_all_are_told(engine_module, samples):
    engine, loader = make(engine_module, samples)
    record = engine.train_step(loader.make_batch(0), stop_asked=True)
    assert (record.stop_asked, record.save_asked) == (True, False)
    record = engine.train_step(loader.make_batch(1), save_asked=True)
    assert (record.stop_asked, record.save_asked) == (False, True)


def test_the_record_has_the_rate_and_the_scale_of_the_step(engine_module, samples):
    engine, loader = make(engine_module, samples, method="filip")
    record = engine.train_step(loader.make_batch(0))
    assert record.learning_rate == pytest.approx(1e-3)
    assert record.logit_scale == pytest.approx(1 / 0.07)
    assert record.metrics == {}


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_frozen_patch_embedding_stays(engine_module, samples, zero_stage):
    engine, loader = make(
        engine_module, samples, zero_stage=zero_stage, freeze_patch_embedding=True, method="clip"
    )
    before = {name: value.clone() for name, value in engine.module.clip.visual.named_parameters()}
    engine.train_step(loader.make_batch(0))
    for name, value in engine.module.clip.visual.named_parameters():
        assert torch.equal(value, before[name]) == (name == "conv1.weight"), name


def test_checkpointed_activations_change_nothing(engine_module, samples):
    found = []
    for grad_checkpointing in (False, True):
        engine, loader = make(engine_module, samples, grad_checkpointing=grad_checkpointing)
        found.append([engine.train_step(loader.make_batch(step)).terms for step in range(2)])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_kernel_that_cannot_run_here_is_refused_before_training(engine_module, samples):
    if torch.cuda.is_available():
        make(engine_module, samples, method="filip", tokenwise_kernel="triton")
    else:
        with pytest.raises(DeclipError, match=r"tokenwise_kernel is triton, but .* runs on CUDA"):
            make(engine_module, samples, method="filip", tokenwise_kernel="triton")
    make(engine_module, samples, method="clip", tokenwise_kernel="triton")


def test_the_gradients_norm_is_the_same_in_all_stages(engine_module, samples):
    norms = []
    ways: list[dict[str, object]] = [
        {"zero_stage": 0},
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 0, "accumulation_steps": 3},
        {"zero_stage": 2, "accumulation_steps": 3},
        {"zero_stage": 0, "precision": "bf16"},
        {"zero_stage": 2, "precision": "bf16"},
    ]
    for way in ways:
        engine, loader = make(engine_module, samples, method="clip", log_every_steps=2, **way)
        first, second = (engine.train_step(loader.make_batch(step)) for step in range(2))
        assert first.watched == {}, "only what the log has a record of is looked at"
        norms.append(second.watched["gradient_norm"])
        assert 0 < second.watched["text_feature_spread"] < 1
        assert 0 < second.watched["image_feature_spread"] < 1
    assert norms[1:5] == pytest.approx([norms[0]] * 4, rel=1e-4)
    assert norms[5:] == pytest.approx([norms[0]] * 2, rel=0.1)


def test_the_gradients_norm_is_torchs(engine_module, samples):
    engine, loader = make(engine_module, samples, method="declip", log_every_steps=1)
    batch = loader.make_batch(0)
    terms, _ = engine.module(batch)
    engine._total(terms).backward()
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    expected = float(torch.nn.utils.get_total_norm(grads))
    engine.module.zero_grad()
    found = engine.train_step(batch).watched["gradient_norm"]
    assert found == pytest.approx(expected, rel=1e-4)


def bad_batch(batch, row):
    images = batch.images.clone()
    images[0, row, 1, 3, 3] = float("nan")
    return dataclasses.replace(batch, images=images, step=7)


def test_a_bad_batch_is_kept_with_what_is_needed_to_compute_it_again(
    engine_module, samples, tmp_path
):
    settings = dataclasses.replace(SETTINGS, method="declip")
    loader = BatchLoader(samples, settings, 0, 1)
    engine = engine_module.TrainEngine(settings, 40, folder=tmp_path, keys_of=samples.keys_of)
    batch = bad_batch(loader.make_batch(0), 5)
    key = samples.keys[int(batch.sample_ids[5])]
    with pytest.raises(DeclipError, match=rf"its samples '{key}' are not finite; .*bad_batches'"):
        engine.train_step(batch)
    (record,) = batch_record.read_records(tmp_path / batch_record.FOLDER, 7)
    assert record.bad_keys == [key]
    assert record.keys == samples.keys_of(batch.sample_ids.tolist())
    assert record.terms["contrastive"] == "nan"
    assert record.bad_parameter is None
    assert torch.equal(record.batch.token_ids, batch.token_ids)
    weights = batch_record.read_weights(tmp_path / batch_record.FOLDER, 7)
    torch.testing.assert_close(
        weights, dict(engine.module.state_dict()), rtol=0, atol=0, equal_nan=True
    )


def test_a_gradient_that_is_not_finite_stops_before_the_update(engine_module, samples):
    """At the steps that the log has a record of; else the next loss says whose fault it was."""
    settings = dataclasses.replace(SETTINGS, method="clip")
    loader = BatchLoader(samples, settings, 0, 1)
    engine = engine_module.TrainEngine(settings, 40, keys_of=samples.keys_of)
    batch = loader.make_batch(0)

    def spoil(gradient):
        return gradient.fill_(float("inf"))

    handle = engine.module.clip.text_projection.register_hook(spoil)
    before = engine.module.clip.visual.proj.detach().clone()
    with pytest.raises(DeclipError, match=r"losses are finite, but their gradient is .* at step 9"):
        engine.train_step(dataclasses.replace(batch, step=9))
    assert torch.equal(engine.module.clip.visual.proj, before)
    engine.deepspeed.zero_grad()
    engine.train_step(batch)
    handle.remove()
    key = samples.keys[int(batch.sample_ids[0])]
    with pytest.raises(DeclipError, match=rf"the weights were not finite before it, .*'{key}'"):
        engine.train_step(dataclasses.replace(batch, step=1))
