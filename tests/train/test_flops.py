"""FLOPs, parameters and kept activations by arithmetic, against what torch counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from declip_train import flops
from declip_train.model_config import MODEL_CONFIGS, get_model_config
from declip_train.settings import TrainSettings
from declip_train.towers import CLIP

LENGTH = 20
SMALL = ["test", "test-rn", "ViT-Ti-8-48"]


def make_captions(rows: int) -> Tensor:
    token_ids = torch.zeros(rows, 77, dtype=torch.long)
    token_ids[:, 0], token_ids[:, 1 : LENGTH - 1], token_ids[:, LENGTH - 1] = 49_406, 320, 49_407
    return token_ids


def make_images(model: CLIP, rows: int) -> Tensor:
    size = model.config.vision.image_size
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = MODEL_CONFIGS[name]
    with torch.device("meta"):
        model = CLIP(config)
    counts = flops.parameter_counts(config)
    assert counts["image"] == sum(p.numel() for p in model.visual.parameters())
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["total"] == counts["image"] + counts["text"] + 1


def test_published_figures() -> None:
    """In GF, as profilers of other implementations give them."""
    base, resnet = get_model_config("ViT-B-32"), get_model_config("RN50")
    found = flops.forward_flops(base, 77, whole=True)
    assert found["image"] / 1e9 == pytest.approx(8.82, abs=0.005)
    assert found["text"] / 1e9 == pytest.approx(5.96, abs=0.005)
    total = found["total"] + 2 * flops.contrastive_flops(512, 4096)
    assert total / 1e9 == pytest.approx(14.79, abs=0.01)
    assert flops.image_flops(resnet, whole=True) / 1e9 == pytest.approx(12.23, abs=0.01)
    tokens = flops.tokenwise_flops(49, 77, 256, 4096)
    assert tokens / 1e9 == pytest.approx(22.7 - 14.79, abs=0.05)
    assert flops.parameter_counts(base)["total"] == 151_277_313


@pytest.mark.parametrize("name", SMALL)
def test_forward_passes_cost_what_torch_counts(name: str) -> None:
    config = get_model_config(name)
    model = CLIP(config, torch.Generator().manual_seed(0)).eval()
    images, token_ids = make_images(model, 2), make_captions(2)
    asked = torch.zeros_like(token_ids, dtype=torch.bool)
    asked[:, 3:6] = True
    passes: list[tuple[Callable[[], object], float]] = [
        (lambda: model.forward_image(images), flops.image_flops(config)),
        (lambda: model.forward_image(images, True), flops.image_flops(config, need_tokens=True)),
        (lambda: model.forward_text(token_ids), flops.text_flops(config, LENGTH)),
        (
            lambda: model.forward_text(token_ids, trim=False, need_hidden=True),
            flops.text_flops(config, 77, need_hidden=True),
        ),
        (
            lambda: model.forward_text(token_ids, state_positions=asked),
            flops.text_flops(config, LENGTH, num_asked=3),
        ),
    ]
    for run, expected in passes:
        # torch has no count for its CPU flash attention; plain attention is matrix products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == 2 * expected


def test_less_is_computed_where_less_is_asked_for() -> None:
    for name in ("ViT-B-32", "RN50", "test"):
        config = get_model_config(name)
        assert flops.image_flops(config) < flops.image_flops(config, whole=True)
        one, some, every = (
            flops.text_flops(config, 20),
            flops.text_flops(config, 20, num_asked=3),
            flops.text_flops(config, 20, need_hidden=True),
        )
        assert one < some < every == flops.text_flops(config, 20, whole=True)


def measure_kept(model: CLIP, run: Callable[[], object]) -> int:
    """Bytes of distinct storages that autograd keeps, weights and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    assert outputs is not None
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


@pytest.mark.parametrize("name", ["test-rn", "ViT-Ti-8-48", "ViT-Mi-8-48"])
@pytest.mark.parametrize("need_tokens", [False, True])
def test_kept_activations_are_what_autograd_keeps(name: str, need_tokens: bool) -> None:
    rows, model = 4, CLIP(get_model_config(name), torch.Generator().manual_seed(0))
    images, token_ids = make_images(model, rows), make_captions(rows)
    measured = measure_kept(
        model,
        lambda: (
            model.forward_image(images, need_tokens),
            model.forward_text(token_ids, need_hidden=need_tokens),
        ),
    )
    estimate = flops.activation_values(model.config, LENGTH, need_tokens=need_tokens)
    assert 4 * rows * estimate == pytest.approx(measured, rel=0.05)


def test_kept_bytes_in_mixed_precision_are_near_what_autograd_keeps() -> None:
    rows, model = 16, CLIP(get_model_config("ViT-Mi-8-48"), torch.Generator().manual_seed(0))
    images, token_ids = make_images(model, rows), make_captions(rows)
    with torch.autocast("cpu", torch.bfloat16):
        measured = measure_kept(
            model, lambda: (model.forward_image(images), model.forward_text(token_ids))
        )
    values = rows * flops.activation_values(model.config, LENGTH)
    # Autocast also keeps its 16-bit copies of the weight matrices, once for all samples.
    copies = 2 * sum(p.numel() for n, p in model.named_parameters() if "weight" in n and p.ndim > 1)
    copies -= 2 * model.token_embedding.weight.numel()
    expected = values * flops.BYTES_PER_VALUE["amp_bf16"] + copies
    assert expected == pytest.approx(measured, rel=0.15)


def test_recomputing_keeps_less_and_views_add_up() -> None:
    for name in ("ViT-B-32", "RN50"):
        config = get_model_config(name)
        one = flops.activation_values(config, 20)
        assert flops.activation_values(config, 20, grad_checkpointing=True) < 0.55 * one
        both = flops.activation_values(config, 20, image_views=2, text_views=2)
        assert both == 2 * one


@pytest.mark.parametrize("name", ["test-rn", "ViT-Mi-8-48"])
def test_recomputation_keeps_each_blocks_input(name: str) -> None:
    rows, model = 4, CLIP(get_model_config(name), torch.Generator().manual_seed(0))
    model.set_grad_checkpointing()
    images, token_ids = make_images(model, rows), make_captions(rows)
    measured = measure_kept(
        model, lambda: (model.forward_image(images), model.forward_text(token_ids))
    )
    estimate = flops.activation_values(model.config, LENGTH, grad_checkpointing=True)
    # The estimate has, on top, the one block that is being recomputed.
    assert 4 * rows * estimate > measured


def step(**values: object) -> float:
    settings = TrainSettings(**{"method": "clip", "model": "ViT-B-32", **values})  # type: ignore[arg-type]
    return flops.step_flops(settings, 20) / settings.global_batch_size


def test_a_step_is_three_passes_of_what_is_trained() -> None:
    config = get_model_config("ViT-B-32")
    pair = flops.forward_flops(config, 20)["total"]
    assert step() == 3 * (pair + 2 * flops.contrastive_flops(512, 4096))
    # Two image views, two captions, and all that hangs on them; the neighbor's caption once.
    declip = step(method="declip")
    assert 2 * 3 * pair < declip < 2.6 * 3 * pair
    stored = step(method="declip", neighbor_feature="stored")
    assert declip - stored == pytest.approx(flops.text_flops(config, 20))
    assert step(method="defilip") > declip
    assert step(method="filip") > step()
    assert step(method="slip") > 3 * 3 * flops.image_flops(config)
    assert step(method="filip", text_token_fraction=0.25) < step(method="filip")


def test_torch_is_not_loaded() -> None:
    code = "import sys, declip_train.flops; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_a_gpus_peak_is_its_makers() -> None:
    assert flops.known_peak("NVIDIA H200", "amp_bf16") == 989e12
    assert flops.known_peak("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert flops.known_peak("NVIDIA H100 PCIe", "fp16") == 756e12
    assert flops.known_peak("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert flops.known_peak("NVIDIA GH200 480GB", "bf16") == 989e12
    assert flops.known_peak("NVIDIA GeForce RTX 4090", "bf16") == 165.2e12
    assert flops.known_peak("Some Other Device", "bf16") is None
    for half, single in flops.PEAKS.values():
        assert half > single > 1e12


def test_a_measured_peak_is_that_of_large_products() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    peak = flops.measured_peak(torch.device("cpu"), "fp32")
    assert torch.equal(torch.get_rng_state(), before)
    # Other processes may take any share of the core meanwhile.
    assert 1e8 < peak < 1e13
    assert 1e8 < flops.device_peak(torch.device("cpu"), "amp_bf16") < 1e13
