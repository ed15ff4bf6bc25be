"""Half precision: what DeepSpeed is told, what a device refuses, where the exact copies are."""

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

from declip_shards import DeclipError
from declip_train.checkpoint import Checkpoints
from declip_train.loader import BatchLoader
from declip_train.precision import clamp_scale, exact_batch_norm, full_precision, refuse_precision
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


@pytest.fixture
def fp16(monkeypatch):
    """A CPU computes in float16 well enough for a test; DeepSpeed's own table says that few do."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


def make(engine_module, samples, **changed):
    settings = dataclasses.replace(SETTINGS, **changed)
    loader = BatchLoader(samples, settings, 0, 1)
    return engine_module.TrainEngine(settings, loader.num_steps), loader


def losses_of(engine, loader, steps):
    return [engine.train_step(loader.make_batch(step)).terms["total"] for step in steps]


def exact_weights(engine):
    found = {}
    for name, parameter in engine.module.named_parameters():
        copy = full_precision(parameter, engine.deepspeed.optimizer)
        assert copy is not None
        assert copy.dtype == torch.float32
        found[name] = copy.detach().clone()
    return found


def test_a_device_without_the_precision_says_so_before_the_start(engine_module, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    settings = dataclasses.replace(SETTINGS, precision="fp16")
    expected = "fp16 is not supported by this machine's cpu device; set precision to bf16 or amp"
    with pytest.raises(DeclipError, match=expected):
        refuse_precision(settings)
    with pytest.raises(DeclipError, match=expected):
        engine_module.TrainEngine(settings, 40)


@pytest.mark.parametrize("accumulation_steps", [1, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stages_agree_and_stay_near_float32(
    engine_module, samples, fp16, precision, accumulation_steps
):
    """DeepSpeed's three stages have three optimizers for this; all must take the same steps."""
    plain, loader = make(engine_module, samples, precision="fp32")
    # The first steps of fp16 overflow and are skipped; what counts is the loss of the first.
    expected = losses_of(plain, loader, range(1))
    found = []
    for zero_stage in (0, 1, 2):
        engine, loader = make(
            engine_module,
            samples,
            precision=precision,
            zero_stage=zero_stage,
            accumulation_steps=accumulation_steps,
        )
        assert {p.dtype for p in engine.module.parameters()} == {
            torch.bfloat16 if precision == "bf16" else torch.float16
        }
        assert engine.module.heads["declip"].projector.bn_1.running_mean.dtype == torch.float32
        found.append(losses_of(engine, loader, range(6)))
        assert found[-1][0] == pytest.approx(expected[0], rel=0.01)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)
    assert found[0][-1] < found[0][0] or precision == "fp16"


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_an_overflow_is_skipped_and_a_persistent_one_is_refused(
    engine_module, samples, fp16, monkeypatch, zero_stage
):
    engine, loader = make(engine_module, samples, precision="fp16", zero_stage=zero_stage)
    before = exact_weights(engine)
    record = engine.train_step(loader.make_batch(0))
    assert record.skipped, "the first loss scale, 2^16, is too large for this model"
    after = exact_weights(engine)
    assert all(torch.equal(after[name], before[name]) for name in before)
    records = [engine.train_step(loader.make_batch(step)) for step in range(1, 8)]
    assert not records[-1].skipped
    assert not torch.equal(
        exact_weights(engine)["clip.text_projection"], after["clip.text_projection"]
    )

    def overflowing(gradient):
        return torch.full_like(gradient, float("inf"))

    engine.module.clip.text_projection.register_hook(overflowing)

    def until_refused():
        for _ in range(60):
            assert engine.train_step(loader.make_batch(9)).skipped

    with pytest.raises(DeclipError, match=r"in fp16 are not finite at step 9, .* lower peak_lr"):
        until_refused()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_resumed_run_is_the_straight_one(
    engine_module, samples, fp16, tmp_path, precision, zero_stage
):
    """Exact copies, moments and the loss scale come back from the checkpoint, bit for bit."""
    changes = {"precision": precision, "zero_stage": zero_stage}
    bank = {"neighbor_source": "bank", "bank_size": 60}
    straight, loader = make(engine_module, samples, **changes, **bank)
    checkpoints = Checkpoints(tmp_path, {"run": 1}, keep=1, say=lambda line: None)
    losses_of(straight, loader, range(5))
    checkpoints.save(straight.deepspeed, 5)
    expected = losses_of(straight, loader, range(5, 8))
    resumed, loader = make(engine_module, samples, **changes, **bank)
    assert checkpoints.restore(resumed.deepspeed) == 5
    assert losses_of(resumed, loader, range(5, 8)) == expected
    one, other = exact_weights(straight), exact_weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(straight.module.bank.features, resumed.module.bank.features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_clamped_scale_is_never_beyond_its_bound(dtype):
    for high in (4.605170185988092, 3.3, 2.0, 5.9999):
        parameter = torch.nn.Parameter(torch.tensor(7.0, dtype=dtype))
        copy = torch.tensor(7.0)
        clamp_scale(parameter, copy, 0.0, high)
        assert parameter.item() <= high
        assert parameter.item() == pytest.approx(high, rel=2 * torch.finfo(dtype).eps)
        assert float(copy) == pytest.approx(high)
        low = -high
        parameter = torch.nn.Parameter(torch.tensor(-7.0, dtype=dtype))
        clamp_scale(parameter, None, low, 1.0)
        assert parameter.item() >= low


def test_batch_norm_of_half_precision_weights_computes_in_float32():
    from declip_train.batch_norm import BatchNorm1d

    torch.manual_seed(0)
    plain, half = BatchNorm1d(5), BatchNorm1d(5)
    for parameter in half.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    exact_batch_norm(half)
    exact_batch_norm(plain)
    values = torch.randn(8, 5).to(torch.bfloat16)
    expected = plain(values.float())
    found = half(values)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(half.running_mean, plain.running_mean)
    found.float().square().sum().backward()
    gradient = half.weight.grad
    assert gradient is not None
    assert gradient.dtype == torch.bfloat16
    assert torch.isfinite(gradient).all()
