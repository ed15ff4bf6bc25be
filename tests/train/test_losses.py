"""Loss terms against plain loops in float64, against open_clip's code, and their laws."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from declip_train import contrastive_blocks, losses
from declip_train.losses import (
    info_nce,
    masked_language_modeling,
    multi_view_info_nce,
    neighbor_info_nce,
    nt_xent,
    sigmoid_loss,
    simsiam,
)
from declip_train.methods import method_terms
from declip_train.model_config import get_model_config
from declip_train.tokenizer import CaptionTokenizer
from declip_train.towers import CLIP

if TYPE_CHECKING:
    from tests.train import loss_workers
    from tests.train.several_processes import run_processes
else:
    # The name under which other processes find it, whatever pytest calls this module.
    import loss_workers
    from several_processes import run_processes

Loss = Callable[..., Tensor]
SCALE = torch.tensor(14.0, dtype=torch.float64)
BIAS = torch.tensor(-3.0, dtype=torch.float64)


def unit(seed: int, rows: int = 6, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return F.normalize(features, dim=-1)


def loop_log_sum_exp(values: Sequence[Tensor]) -> Tensor:
    largest = max(value.item() for value in values)
    return largest + torch.stack([(value - largest).exp() for value in values]).sum().log()


def loop_one_sided(
    queries: Tensor, keys: Tensor, scale: Tensor, smoothing: float = 0, beta: float = 0
) -> Tensor:
    """Mean over rows of -log softmax at the own column, one number at a time."""
    total = torch.zeros((), dtype=torch.float64)
    num = len(keys)
    for i, query in enumerate(queries):
        logits = [scale * (query * key).sum() for key in keys]
        if beta and num > 1:
            negatives = [beta * logit for j, logit in enumerate(logits) if j != i]
            norm = loop_log_sum_exp(negatives) - math.log(num - 1)
            logits = [x if j == i else x + beta * x - norm for j, x in enumerate(logits)]
        log_sum = loop_log_sum_exp(logits)
        for j, logit in enumerate(logits):
            target = smoothing / num + (1 - smoothing) * (i == j)
            total = total + target * (log_sum - logit)
    return total / len(queries)


def loop_info_nce(x: Tensor, y: Tensor, scale: Tensor, **options: float) -> Tensor:
    return (loop_one_sided(x, y, scale, **options) + loop_one_sided(y, x, scale, **options)) / 2


def loop_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, image in enumerate(x):
        for j, text in enumerate(y):
            logit = scale * (image * text).sum() + bias
            total = total - torch.log(torch.sigmoid(logit if i == j else -logit))
    return total / len(x)


def loop_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    views = [z / (z * z).sum().sqrt() for z in (*z1, *z2)]
    total, num = torch.zeros((), dtype=torch.float64), len(z1)
    for i, asking in enumerate(views):
        logits = {j: (asking * view).sum() / temperature for j, view in enumerate(views) if j != i}
        total = total + loop_log_sum_exp([*logits.values()]) - logits[(i + num) % (2 * num)]
    return total / len(views)


def with_gradients(loss: Loss, *inputs: Tensor) -> list[Tensor]:
    """The value and the gradients of all inputs."""
    copies = [each.detach().clone().requires_grad_() for each in inputs]
    value = loss(*copies)
    return [value.detach(), *torch.autograd.grad(value, copies)]


def assert_equal_loop(ours: Loss, loop: Loss, *inputs: Tensor) -> None:
    """Values and gradients: to 1e-10 in float64, to 1e-5 of the largest number in float32."""
    expected = with_gradients(loop, *inputs)
    for found, wanted in zip(with_gradients(ours, *inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    # The loop, too, sees what is left of the inputs in float32.
    coarse = [each.float() for each in inputs]
    expected = with_gradients(loop, *(each.double() for each in coarse))
    for found, wanted in zip(with_gradients(ours, *coarse), expected, strict=True):
        assert found.dtype == torch.float32
        size = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5 * size)


@given(
    st.integers(0, 1000),
    st.integers(1, 7),
    st.floats(0.5, 100.0),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([0.0, 0.25, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_info_nce_equals_the_loop(
    seed: int, rows: int, scale: float, smoothing: float, beta: float
) -> None:
    assert_equal_loop(
        lambda *inputs: info_nce(*inputs, label_smoothing=smoothing, hard_negative_beta=beta),
        lambda *inputs: loop_info_nce(*inputs, smoothing=smoothing, beta=beta),
        unit(seed, rows),
        unit(seed + 1, rows),
        torch.tensor(scale, dtype=torch.float64),
    )


@given(st.integers(0, 1000), st.integers(1, 7), st.floats(0.5, 50.0), st.floats(-10.0, 10.0))
@settings(max_examples=20, deadline=None)
def test_sigmoid_loss_equals_the_loop(seed: int, rows: int, scale: float, bias: float) -> None:
    scalars = (torch.tensor(number, dtype=torch.float64) for number in (scale, bias))
    assert_equal_loop(sigmoid_loss, loop_sigmoid, unit(seed, rows), unit(seed + 1, rows), *scalars)


@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([0.1, 0.5, 2.0]))
@settings(max_examples=20, deadline=None)
def test_nt_xent_equals_the_loop(seed: int, rows: int, temperature: float) -> None:
    assert_equal_loop(
        lambda a, b: nt_xent(a, b, temperature),
        lambda a, b: loop_nt_xent(a, b, temperature),
        3 * unit(seed, rows),
        0.5 * unit(seed + 1, rows),
    )


# Runs in a process of its own, because the stand-in for torchvision must not leak into other tests.
OPEN_CLIP_SIDE = """
import sys
import numpy as np
import torch
import torchvision_stand_in
torchvision_stand_in.install()
import open_clip.loss
folder = sys.argv[1]
for dtype in ("float32", "float64"):
    data = np.load(f"{folder}/{dtype}.npz")
    results = {}
    for name, module, num in (("clip", open_clip.loss.ClipLoss(), 3),
                              ("sigmoid", open_clip.loss.SigLipLoss(), 4)):
        inputs = [torch.from_numpy(data[f"arr_{i}"]).requires_grad_() for i in range(num)]
        value = module(*inputs)
        gradients = torch.autograd.grad(value, inputs)
        for i, tensor in enumerate((value, *gradients)):
            results[f"{name} {i}"] = tensor.detach().numpy()
    np.savez(f"{folder}/{dtype}-theirs.npz", **results)
"""


@pytest.mark.slow
def test_losses_and_gradients_equal_open_clips(tmp_path: Path) -> None:
    for dtype in ("float32", "float64"):
        arrays = [each.numpy().astype(dtype) for each in (unit(1, 50), unit(2, 50), SCALE, BIAS)]
        np.savez(tmp_path / f"{dtype}.npz", *arrays)
    subprocess.run(
        [sys.executable, "-c", OPEN_CLIP_SIDE, str(tmp_path)],
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-10)):
        inputs = [torch.from_numpy(each) for each in np.load(tmp_path / f"{dtype}.npz").values()]
        theirs = np.load(tmp_path / f"{dtype}-theirs.npz")
        cases: tuple[tuple[str, Loss, int], ...] = (
            ("clip", info_nce, 3),
            ("sigmoid", sigmoid_loss, 4),
        )
        for name, loss, num in cases:
            for i, ours in enumerate(with_gradients(loss, *inputs[:num])):
                expected = theirs[f"{name} {i}"]
                size = max(1.0, float(np.abs(expected).max()))
                np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=tolerance * size)


ALL_CONTRASTIVE: dict[str, Loss] = {
    "info_nce": lambda a, b, c, d: info_nce(a, b, SCALE.to(a.dtype)),
    "smoothed": lambda a, b, c, d: info_nce(a, b, SCALE.to(a.dtype), label_smoothing=0.2),
    "hard negatives": lambda a, b, c, d: info_nce(a, b, SCALE.to(a.dtype), hard_negative_beta=0.5),
    "both options": lambda a, b, c, d: info_nce(
        a, b, SCALE.to(a.dtype), label_smoothing=0.2, hard_negative_beta=0.5
    ),
    "multi_view": lambda a, b, c, d: multi_view_info_nce(a, b, c, d, SCALE.to(a.dtype)).mean,
    "sigmoid": lambda a, b, c, d: sigmoid_loss(a, b, SCALE.to(a.dtype), BIAS.to(a.dtype)),
    "neighbor": lambda a, b, c, d: neighbor_info_nce([a, b], [c, d], SCALE.to(a.dtype)),
    "neighbor with gaps": lambda a, b, c, d: neighbor_info_nce(
        [a, b], [c, d], SCALE.to(a.dtype), torch.arange(len(a)) % 3 != 1
    ),
    "nt_xent": lambda a, b, c, d: nt_xent(a, b),
}


@pytest.mark.parametrize("name", ALL_CONTRASTIVE)
def test_gradients_equal_finite_differences(name: str) -> None:
    features = tuple(unit(seed).requires_grad_() for seed in range(4))
    if name.startswith("neighbor"):
        constants = (features[2].detach(), features[3].detach())
        features = (*features[:2], *constants)
    elif name != "multi_view":
        features = (*features[:2], unit(2), unit(3))
    assert torch.autograd.gradcheck(ALL_CONTRASTIVE[name], features)


def test_gradients_of_the_scalars_equal_finite_differences() -> None:
    scale, bias = SCALE.clone().requires_grad_(), BIAS.clone().requires_grad_()
    images, texts = unit(0), unit(1)
    assert torch.autograd.gradcheck(
        lambda s: info_nce(images, texts, s, label_smoothing=0.1, hard_negative_beta=0.3), scale
    )
    assert torch.autograd.gradcheck(
        lambda s: multi_view_info_nce(images, texts, unit(2), unit(3), s).mean, scale
    )
    assert torch.autograd.gradcheck(lambda s: neighbor_info_nce([images], [texts], s), scale)
    assert torch.autograd.gradcheck(lambda s, b: sigmoid_loss(images, texts, s, b), (scale, bias))


@pytest.mark.parametrize("name", ALL_CONTRASTIVE)
def test_order_of_the_samples_does_not_matter(name: str) -> None:
    features = [unit(seed, 12) for seed in range(4)]
    # Whole threes, so that the gaps move with their rows.
    order = torch.tensor([9, 10, 11, 3, 4, 5, 0, 1, 2, 6, 7, 8])
    loss = ALL_CONTRASTIVE[name]
    value = loss(*features)
    torch.testing.assert_close(loss(*(each[order] for each in features)), value)
    mismatched = loss(features[0][order], *features[1:])
    assert not torch.isclose(mismatched, value)


@pytest.mark.parametrize("name", sorted(ALL_CONTRASTIVE.keys() - {"sigmoid"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_batch_of_one_costs_nothing(name: str, dtype: torch.dtype) -> None:
    features = [unit(seed, 1).to(dtype).requires_grad_() for seed in range(4)]
    loss = ALL_CONTRASTIVE[name](*features)
    loss.backward()
    assert loss.item() == 0.0
    for each in features:
        assert each.grad is None or not each.grad.any()
    assert features[0].grad is not None


def test_equal_features_cost_ln_n_and_sides_may_be_swapped() -> None:
    same = unit(0, 1).expand(32, -1)
    assert info_nce(same, same, SCALE).item() == pytest.approx(math.log(32), abs=1e-12)
    assert nt_xent(same, same).item() == pytest.approx(math.log(63), abs=1e-12)
    # Weights have mean one, so equal negatives are weighed as if there were no weights.
    weighed = info_nce(same, same, SCALE, hard_negative_beta=2.0)
    assert weighed.item() == pytest.approx(math.log(32), abs=1e-12)
    torch.testing.assert_close(info_nce(unit(0), unit(1), SCALE), info_nce(unit(1), unit(0), SCALE))


def test_hard_negatives_cost_more_the_more_they_weigh() -> None:
    values = [
        info_nce(unit(0), unit(1), SCALE, hard_negative_beta=beta).item()
        for beta in (0.0, 0.2, 0.5, 1.0, 3.0)
    ]
    assert values == sorted(values)
    assert values[0] < values[-1]


@pytest.mark.parametrize("name", ALL_CONTRASTIVE)
@pytest.mark.parametrize("place", range(4))
def test_nan_is_never_hidden(name: str, place: int) -> None:
    features = [unit(seed) for seed in range(4)]
    features[place][2, 1] = math.nan
    for each in features:
        each.requires_grad_()
    loss = ALL_CONTRASTIVE[name](*features)
    reads = 4 if name.startswith(("multi", "neighbor")) else 2
    assert loss.isnan() == (place < reads)
    loss.backward()
    gradients = [each.grad for each in features if each.grad is not None]
    assert any(gradient.isnan().any() for gradient in gradients) == (place < reads)


@pytest.mark.parametrize("name", ALL_CONTRASTIVE)
def test_a_second_derivative_is_refused(name: str) -> None:
    features = [unit(seed).requires_grad_() for seed in range(4)]
    loss = ALL_CONTRASTIVE[name](*features)
    with pytest.raises(RuntimeError, match="differentiate it once, without create_graph"):
        torch.autograd.grad(loss, features[0], create_graph=True)


@pytest.mark.parametrize("name", ALL_CONTRASTIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_give_a_float32_loss(name: str, dtype: torch.dtype) -> None:
    loss = ALL_CONTRASTIVE[name]
    coarse = [unit(seed, 40).to(dtype) for seed in range(4)]
    num = 2 if name.startswith(("neighbor", "nt", "info", "smo", "hard", "both", "sig")) else 4

    def of(rows: list[Tensor]) -> list[Tensor]:
        return with_gradients(lambda *used: loss(*used, *rows[num:]), *rows[:num])

    exact = of([each.float() for each in coarse])
    found = of(coarse)
    assert found[0].dtype == torch.float32
    for mine, wanted in zip(found, exact, strict=True):
        size = wanted.abs().max().item()
        torch.testing.assert_close(mine.float(), wanted, rtol=0, atol=0.03 * size)
    assert {gradient.dtype for gradient in found[1:]} == {dtype}


def test_float16_keeps_gradients_that_are_small_for_all_samples() -> None:
    # Divided by a batch of 4,096 before the product, most of these would be below what it can hold.
    features = [unit(seed, 4096, 8).to(torch.float16) for seed in range(2)]
    scale = torch.tensor(1.0)

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        return 1024 * info_nce(images, texts, scale)

    found = with_gradients(loss, *features)
    exact = with_gradients(loss, *(each.float() for each in features))
    for mine, wanted in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(
            mine.float(), wanted, rtol=0, atol=0.01 * wanted.abs().max().item()
        )


@pytest.mark.parametrize("name", ALL_CONTRASTIVE)
def test_autocast_is_the_same_as_features_of_its_dtype(name: str) -> None:
    features = [unit(seed, 20).float() for seed in range(4)]

    def cast(a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ALL_CONTRASTIVE[name](a, b, *features[2:])

    def by_hand(a: Tensor, b: Tensor) -> Tensor:
        if name == "nt_xent":
            a, b = (F.normalize(z, dim=-1).bfloat16().float() for z in (a, b))
        return ALL_CONTRASTIVE[name](*(each.bfloat16() for each in (a, b, *features[2:])))

    tolerance = 0.02 if name == "nt_xent" else 0.0
    for one, other in zip(
        with_gradients(cast, *features[:2]), with_gradients(by_hand, *features[:2]), strict=True
    ):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


class _LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.numel())
        return result


@pytest.mark.parametrize("name", ALL_CONTRASTIVE)
def test_no_tensor_is_as_large_as_the_matrix_of_logits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(contrastive_blocks._TILE_EDGE, "cpu", 16)
    rows = 200
    features = [unit(seed, rows).requires_grad_() for seed in range(4)]
    with _LargestTensor() as largest:
        ALL_CONTRASTIVE[name](*features).backward()
    assert features[0].grad is not None
    assert 16 * 16 <= largest.numbers <= 2 * rows * 6


def test_untrained_towers_know_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    model = CLIP(get_model_config("ViT-Ti-8-48"), generator)
    images = torch.randn(64, 3, 48, 48, generator=generator)
    captions = [f"a picture of thing number {number}" for number in range(64)]
    with torch.no_grad():
        loss = info_nce(*model(images, torch.from_numpy(CaptionTokenizer()(captions, trim=True))))
    assert loss.item() == pytest.approx(math.log(64), rel=0.1)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "hard_negative_beta": 0.5}])
def test_multi_view_is_four_single_pairs(options: dict[str, float]) -> None:
    image, other_image, text, other_text = (unit(seed, 7) for seed in range(4))
    loss = multi_view_info_nce(image, other_image, text, other_text, SCALE, **options)
    pairs = [
        info_nce(x, y, SCALE, **options)
        for x, y in (
            (image, text),
            (other_image, text),
            (image, other_text),
            (other_image, other_text),
        )
    ]
    torch.testing.assert_close(loss.contrastive, pairs[0])
    torch.testing.assert_close(loss.multi_view, torch.stack(pairs[1:]).mean())
    torch.testing.assert_close(loss.mean, torch.stack(pairs).mean())


def test_released_weighting_is_four_tenths_of_the_mean_pair() -> None:
    weights = dict(method_terms("declip"))
    loss = multi_view_info_nce(unit(0), unit(1), unit(2), unit(3), SCALE)
    weighted = weights["contrastive"] * loss.contrastive + weights["multi_view"] * loss.multi_view
    torch.testing.assert_close(weighted, 0.4 * loss.mean)


def test_neighbors_answer_images_only() -> None:
    images, neighbors = [unit(0), unit(1)], [unit(2), unit(3)]
    for view in (*images, *neighbors):
        view.requires_grad_()
    loss = neighbor_info_nce(images, neighbors, SCALE)
    loops = [loop_one_sided(x, y, SCALE) for x in images for y in neighbors]
    torch.testing.assert_close(loss, torch.stack(loops).mean())
    loss.backward()
    assert all(view.grad is not None and view.grad.any() for view in images)
    assert all(view.grad is None for view in neighbors)


def test_absent_neighbors_are_as_if_their_rows_were_not_there() -> None:
    images, neighbors = [unit(0), unit(1)], [unit(2), unit(3)]
    present = torch.tensor([True, False, True, True, False, True])
    other = torch.tensor([False, False, True, False, True, True])
    everybody = torch.ones(6, dtype=torch.bool)

    def only(mask: Tensor, view: Tensor) -> Tensor:
        return neighbor_info_nce([x[mask] for x in images], [view[mask]], SCALE)

    one_mask = neighbor_info_nce(images, neighbors, SCALE, present)
    expected = (only(present, neighbors[0]) + only(present, neighbors[1])) / 2
    torch.testing.assert_close(one_mask, expected)
    two_masks = neighbor_info_nce(images, neighbors, SCALE, [present, other])
    expected = (only(present, neighbors[0]) + only(other, neighbors[1])) / 2
    torch.testing.assert_close(two_masks, expected)
    torch.testing.assert_close(
        neighbor_info_nce(images, neighbors, SCALE, everybody),
        neighbor_info_nce(images, neighbors, SCALE),
    )
    # What stands in an absent neighbor's place is never read.
    neighbors[0][~present] = math.nan
    torch.testing.assert_close(neighbor_info_nce(images, neighbors, SCALE, present), one_mask)
    asking = unit(0).requires_grad_()
    nobody = neighbor_info_nce([asking], neighbors, SCALE, ~everybody)
    nobody.backward()
    assert nobody.item() == 0.0
    assert asking.grad is not None
    assert not asking.grad.any()


def test_simsiam_equals_the_loop_and_stops_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    p1, z2, p2, z1 = (
        torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(4)
    )
    loss = simsiam(p1, z2, p2, z1)

    def cosine(a: Tensor, b: Tensor) -> float:
        return ((a * b).sum() / (a * a).sum().sqrt() / (b * b).sum().sqrt()).item()

    expected = [-(cosine(p1[i], z2[i]) + cosine(p2[i], z1[i])) / 2 for i in range(6)]
    assert loss.item() == pytest.approx(float(np.mean(expected)), abs=1e-12)
    loss.backward()
    assert p1.grad is not None
    assert p2.grad is not None
    assert z1.grad is None
    assert z2.grad is None
    torch.testing.assert_close(simsiam(p1, 3 * p1, p2, 0.5 * p2).item(), -1.0)
    torch.testing.assert_close(simsiam(p1, -p1, p2, -p2).item(), 1.0)
    assert simsiam(*(each.bfloat16() for each in (p1, z2, p2, z1))).dtype == torch.float32


def mlm_inputs(num: int) -> tuple[Tensor, Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num, 5, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 11, (num,), generator=generator)
    return states, targets, nn.Linear(5, 11).double()


def test_masked_language_modeling_equals_the_loop() -> None:
    states, targets, head = mlm_inputs(4)
    loss = masked_language_modeling(states, targets, head)
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    expected = []
    for state, target in zip(states.detach().numpy(), targets.tolist(), strict=True):
        logits = weight @ state + bias
        expected.append(math.log(np.exp(logits).sum()) - logits[target])
    assert loss.item() == pytest.approx(float(np.mean(expected)), abs=1e-10)


def test_a_large_vocabulary_exists_for_few_positions_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states, targets, head = mlm_inputs(23)
    wanted = torch.autograd.grad(
        masked_language_modeling(states, targets, head), (states, *head.parameters())
    )
    monkeypatch.setattr(losses, "_VOCABULARY_ROWS", 4)
    seen: list[int] = []
    head.register_forward_hook(lambda _module, args, _out: seen.append(len(args[0])))
    loss = masked_language_modeling(states, targets, head)
    assert seen == [4, 4, 4, 4, 4, 3]
    found = torch.autograd.grad(loss, (states, *head.parameters()))
    assert len(seen) == 12, "computed again, block by block"
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other)


def test_nothing_masked_costs_nothing_and_keeps_the_graph() -> None:
    states, targets, head = mlm_inputs(0)
    loss = masked_language_modeling(states, targets, head)
    assert loss.item() == 0.0
    loss.backward()
    for tensor in (states, head.weight, head.bias):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_shapes_that_do_not_fit_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"of one shape .* image_features \(6, 5\), text_features"):
        info_nce(unit(0), unit(1, 5), SCALE)
    with pytest.raises(ValueError, match="with at least one row"):
        info_nce(unit(0)[:0], unit(1)[:0], SCALE)
    with pytest.raises(ValueError, match="of one shape"):
        sigmoid_loss(unit(0), unit(1, 6, 4), SCALE, BIAS)
    with pytest.raises(ValueError, match=r"of one shape .* z1 \(6, 5\), z2 \(3, 5\)"):
        nt_xent(unit(0), unit(1, 3))
    with pytest.raises(ValueError, match="0 image views and 1 neighbor views: give at least one"):
        neighbor_info_nce([], [unit(0)], SCALE)
    with pytest.raises(ValueError, match=r"has_neighbor has shape \(3,\), but must have \(6,\)"):
        neighbor_info_nce([unit(0)], [unit(1)], SCALE, torch.ones(3, dtype=torch.bool))
    masks = [torch.ones(6, dtype=torch.bool)] * 2
    with pytest.raises(ValueError, match="2 masks for 1 neighbor views: give one for all"):
        neighbor_info_nce([unit(0)], [unit(1)], SCALE, masks)
    states, targets, head = mlm_inputs(4)
    with pytest.raises(ValueError, match=r"states \(4, 5\) and targets \(3,\): they must be \(M"):
        masked_language_modeling(states, targets[:3], head)


def test_options_out_of_range_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.0, but must be at least 0"):
        info_nce(unit(0), unit(1), SCALE, label_smoothing=1.0)
    for beta in (-0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"hard_negative_beta is .* at least 0"):
            multi_view_info_nce(unit(0), unit(1), unit(2), unit(3), SCALE, hard_negative_beta=beta)
    with pytest.raises(ValueError, match=r"temperature is 0\.0, but must be a number above 0"):
        nt_xent(unit(0), unit(1), 0.0)


@pytest.mark.distributed
def test_processes_together_have_the_gradients_of_one(tmp_path: Path) -> None:
    processes = 2
    run_processes(loss_workers.run, processes, str(tmp_path))
    for process in range(processes):
        results = torch.load(tmp_path / f"{process}.pt", weights_only=True)
        for kind in loss_workers.LOSSES:
            expected = loss_workers.gradients_of(kind, slice(None))
            assert results[kind].keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(results[kind][name], tensor, rtol=1e-10, atol=1e-12)
            assert len(expected) > 2
