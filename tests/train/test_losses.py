"""Loss terms against plain loops in float64, against open_clip's code, and their laws."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_train.losses import (
    TERMS,
    info_nce,
    masked_language_modeling,
    method_terms,
    multi_view_info_nce,
    neighbor_info_nce,
    simsiam,
)
from declip_train.model_config import get_model_config
from declip_train.tokenizer import CaptionTokenizer
from declip_train.towers import CLIP

Array = NDArray[np.float64]
SCALE = torch.tensor(14.0, dtype=torch.float64)


def unit(seed: int, rows: int = 6, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return F.normalize(features, dim=-1)


def loop_cross_entropy(queries: Array, keys: Array, scale: float) -> float:
    """-log softmax at the own row, one number at a time."""
    total = 0.0
    for i, query in enumerate(queries):
        logits = [scale * sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
        largest = max(logits)
        total += largest + math.log(sum(math.exp(x - largest) for x in logits)) - logits[i]
    return total / len(queries)


def loop_info_nce(images: Tensor, texts: Tensor, scale: float) -> float:
    x, y = images.numpy(), texts.numpy()
    return (loop_cross_entropy(x, y, scale) + loop_cross_entropy(y, x, scale)) / 2


def open_clip_losses() -> ModuleType:
    """open_clip's loss module alone: the package around it needs torchvision, it does not."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss_alone", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@given(st.integers(0, 1000), st.integers(1, 9), st.floats(0.5, 100.0))
@settings(max_examples=30, deadline=None)
def test_info_nce_equals_the_loop(seed: int, rows: int, scale: float) -> None:
    images, texts = unit(seed, rows), unit(seed + 1, rows)
    loss = info_nce(images, texts, torch.tensor(scale, dtype=torch.float64))
    assert loss.item() == pytest.approx(loop_info_nce(images, texts, scale), abs=1e-9)


def test_info_nce_equals_open_clips_loss_and_gradients() -> None:
    theirs = open_clip_losses().ClipLoss()
    gradients = []
    for loss in (info_nce, theirs):
        inputs = [unit(1).requires_grad_(), unit(2).requires_grad_(), SCALE.clone()]
        inputs[2].requires_grad_()
        value = loss(*inputs)
        value.backward()
        gradients.append([value.detach(), *(each.grad for each in inputs)])
    for ours, other in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, other)


def test_one_pair_costs_nothing_and_equal_features_cost_ln_n() -> None:
    assert info_nce(unit(0, 1), unit(1, 1), SCALE).item() == 0.0
    same = unit(0, 1).expand(32, -1)
    assert info_nce(same, same, SCALE).item() == pytest.approx(math.log(32), abs=1e-12)


def test_order_of_the_pairs_does_not_matter() -> None:
    images, texts, order = unit(0, 12), unit(1, 12), torch.randperm(12)
    torch.testing.assert_close(
        info_nce(images, texts, SCALE), info_nce(images[order], texts[order], SCALE)
    )
    torch.testing.assert_close(info_nce(images, texts, SCALE), info_nce(texts, images, SCALE))
    assert not torch.isclose(info_nce(images, texts, SCALE), info_nce(images[order], texts, SCALE))


def test_untrained_towers_know_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    model = CLIP(get_model_config("ViT-Ti-8-48"), generator)
    images = torch.randn(64, 3, 48, 48, generator=generator)
    captions = [f"a picture of thing number {number}" for number in range(64)]
    with torch.no_grad():
        loss = info_nce(*model(images, torch.from_numpy(CaptionTokenizer()(captions, trim=True))))
    assert loss.item() == pytest.approx(math.log(64), rel=0.1)


def test_multi_view_is_four_single_pairs() -> None:
    image, other_image, text, other_text = (unit(seed, 7) for seed in range(4))
    loss = multi_view_info_nce(image, other_image, text, other_text, SCALE)
    pairs = [
        info_nce(x, y, SCALE)
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
    expected = np.mean(
        [loop_info_nce(x, y, 14.0) for x in (image, other_image) for y in (text, other_text)]
    )
    assert loss.mean.item() == pytest.approx(float(expected), abs=1e-9)


def test_neighbors_answer_images_only() -> None:
    images, neighbors = [unit(0), unit(1)], [unit(2), unit(3)]
    for view in (*images, *neighbors):
        view.requires_grad_()
    loss = neighbor_info_nce(images, neighbors, SCALE)
    loops = [
        loop_cross_entropy(x.detach().numpy(), y.detach().numpy(), 14.0)
        for x in images
        for y in neighbors
    ]
    assert loss.item() == pytest.approx(float(np.mean(loops)), abs=1e-9)
    loss.backward()
    assert all(view.grad is not None and view.grad.any() for view in images)
    assert all(view.grad is None for view in neighbors)


def test_absent_neighbors_are_as_if_their_rows_were_not_there() -> None:
    images, neighbors = [unit(0), unit(1)], [unit(2)]
    present = torch.tensor([True, False, True, True, False, True])
    loss = neighbor_info_nce(images, neighbors, SCALE, present)
    kept = neighbor_info_nce([x[present] for x in images], [y[present] for y in neighbors], SCALE)
    torch.testing.assert_close(loss, kept)
    everybody = torch.ones(6, dtype=torch.bool)
    torch.testing.assert_close(
        neighbor_info_nce(images, neighbors, SCALE, everybody),
        neighbor_info_nce(images, neighbors, SCALE),
    )
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

    def cosine(a: Array, b: Array) -> float:
        return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))

    rows = [[x.detach().numpy()[i] for x in (p1, z2, p2, z1)] for i in range(6)]
    expected = -np.mean([(cosine(a, b) + cosine(c, d)) / 2 for a, b, c, d in rows])
    assert loss.item() == pytest.approx(float(expected), abs=1e-12)
    loss.backward()
    assert p1.grad is not None
    assert p2.grad is not None
    assert z1.grad is None
    assert z2.grad is None
    torch.testing.assert_close(simsiam(p1, 3 * p1, p2, 0.5 * p2).item(), -1.0)
    torch.testing.assert_close(simsiam(p1, -p1, p2, -p2).item(), 1.0)


def mlm_inputs() -> tuple[Tensor, Tensor, Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    positions = torch.zeros(3, 9, dtype=torch.bool)
    positions[0, 1] = positions[0, 3] = positions[2, 2] = True
    targets = torch.randint(0, 11, (3, 9), generator=generator)
    return hidden, positions, targets, nn.Linear(5, 11).double()


def test_masked_language_modeling_equals_the_loop() -> None:
    hidden, positions, targets, head = mlm_inputs()
    seen: list[tuple[int, ...]] = []
    head.register_forward_hook(lambda _module, args, _out: seen.append(tuple(args[0].shape)))
    loss = masked_language_modeling(hidden, positions, targets, head)
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    losses = []
    for row, place in ((0, 1), (0, 3), (2, 2)):
        logits = weight @ hidden.detach().numpy()[row, place] + bias
        losses.append(math.log(np.exp(logits).sum()) - logits[int(targets[row, place])])
    assert loss.item() == pytest.approx(float(np.mean(losses)), abs=1e-9)
    assert seen == [(3, 5)], "the vocabulary is computed at the masked positions alone"
    loss.backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad.abs().sum(dim=-1) > 0, positions[:, :4])


def test_nothing_masked_costs_nothing_and_keeps_the_graph() -> None:
    hidden, positions, targets, head = mlm_inputs()
    loss = masked_language_modeling(hidden, torch.zeros_like(positions), targets, head)
    assert loss.item() == 0.0
    loss.backward()
    for tensor in (hidden, head.weight, head.bias):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_half_precision_features_give_a_float32_loss() -> None:
    images, texts = unit(0).bfloat16(), unit(1).bfloat16()
    exact = info_nce(images.float(), texts.float(), torch.tensor(14.0))
    loss = info_nce(images, texts, torch.tensor(14.0))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    assert simsiam(images, texts, texts, images).dtype == torch.float32


@pytest.mark.parametrize(
    "loss",
    [
        lambda *features: info_nce(features[0], features[1], SCALE),
        lambda a, b, c, d: multi_view_info_nce(a, b, c, d, SCALE).mean,
        lambda *features: neighbor_info_nce(features[:2], [unit(7)], SCALE),
        lambda *features: simsiam(features[0], unit(8), features[1], unit(9)),
    ],
)
def test_gradients_equal_finite_differences(loss: Callable[..., Tensor]) -> None:
    features = tuple(unit(seed).requires_grad_() for seed in range(4))
    assert torch.autograd.gradcheck(loss, features)


@pytest.mark.parametrize(
    ("method", "weighting", "expected"),
    [
        ("clip", "released", (1.0, 0, 0, 0, 0)),
        ("clip", "paper", (1.0, 0, 0, 0, 0)),
        ("declip", "released", (0.1, 0.3, 0.2, 0.2, 0.2)),
        ("declip", "paper", (0.4, 0.2, 0.2, 0.2, 0.2)),
    ],
)
def test_methods_are_lists_of_terms(method: str, weighting: str, expected: Sequence[float]) -> None:
    terms = dict(method_terms(method, weighting))
    assert set(terms) <= set(TERMS)
    assert [terms.get(name, 0) for name in TERMS] == list(expected)


def test_released_weighting_is_four_tenths_of_the_mean_pair() -> None:
    weights = dict(method_terms("declip"))
    loss = multi_view_info_nce(unit(0), unit(1), unit(2), unit(3), SCALE)
    weighted = weights["contrastive"] * loss.contrastive + weights["multi_view"] * loss.multi_view
    torch.testing.assert_close(weighted, 0.4 * loss.mean)


def test_unknown_methods_are_refused_by_name() -> None:
    for later in ("slip", "filip", "defilip"):
        with pytest.raises(DeclipError, match=f"'{later}' arrives with issue 3; choose clip or"):
            method_terms(later)
    with pytest.raises(DeclipError, match=r"method 'decilp' is not known\. Did you mean 'declip'"):
        method_terms("decilp")
    with pytest.raises(
        DeclipError, match=r"weighting 'papers' is not known\. Did you mean 'paper'"
    ):
        method_terms("declip", "papers")


def test_shapes_that_do_not_fit_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"of one shape .* image_features \(6, 5\), text_features"):
        info_nce(unit(0), unit(1, 5), SCALE)
    with pytest.raises(ValueError, match="with at least one row"):
        info_nce(unit(0)[:0], unit(1)[:0], SCALE)
    with pytest.raises(ValueError, match="0 image views and 1 neighbor views: give at least one"):
        neighbor_info_nce([], [unit(0)], SCALE)
    with pytest.raises(ValueError, match=r"has_neighbor has shape \(3,\), but must have \(6,\)"):
        neighbor_info_nce([unit(0)], [unit(1)], SCALE, torch.ones(3, dtype=torch.bool))
    hidden, positions, targets, head = mlm_inputs()
    with pytest.raises(ValueError, match=r"hidden states \(3, 4, 5\), mask positions \(3, 3\)"):
        masked_language_modeling(hidden, positions[:, :3], targets, head)
