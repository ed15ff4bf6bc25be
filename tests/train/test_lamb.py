"""LAMB against its algorithm in a plain loop of float64, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from declip_shards import DeclipError
from declip_train.lamb import Lamb

SHAPES = ((5, 3), (7,), (), (2, 3, 4))


def plain_lamb(
    x: Tensor,
    gradients: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> Tensor:
    """Algorithm 2 of arXiv 1904.00962 as it is printed, phi the identity."""
    x = x.clone()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        r = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)) ** 0.5 + eps)
        u = r + decay * x
        own, other = float((x**2).sum() ** 0.5), float((u**2).sum() ** 0.5)
        x = x - lr * (own / other if own > 0 and other > 0 else 1.0) * u
    return x


def start(dtype: torch.dtype) -> tuple[list[torch.nn.Parameter], list[list[Tensor]]]:
    """Parameters of several shapes, one of zeros, and gradients of five steps."""
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    values[1].zero_()
    gradients = [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        for _ in range(5)
    ]
    return [torch.nn.Parameter(value.to(dtype)) for value in values], gradients


def descend(optimizer: torch.optim.Optimizer, gradients: list[list[Tensor]]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_the_printed_algorithm(decay: float, dtype: torch.dtype, tolerance: float) -> None:
    parameters, gradients = start(dtype)
    expected = [
        plain_lamb(p.detach().double(), [g[n] for g in gradients], 0.01, (0.9, 0.98), 1e-4, decay)
        for n, p in enumerate(parameters)
    ]
    optimizer = Lamb(parameters, lr=0.01, betas=(0.9, 0.98), eps=1e-4, weight_decay=decay)
    descend(optimizer, gradients)
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(
            parameter.detach().double(), wanted, rtol=tolerance, atol=tolerance
        )


def test_a_step_is_as_long_as_the_tensor() -> None:
    """Whatever the gradient's scale, |step| = lr |x|, for each tensor by itself."""
    parameters, gradients = start(torch.float64)
    before = [p.detach().clone() for p in parameters]
    descend(Lamb(parameters, lr=0.1), [[g * 1e6 for g in gradients[0]]])
    for parameter, old in zip(parameters, before, strict=True):
        if old.norm() > 0:
            moved = float((parameter.detach() - old).norm())
            assert moved == pytest.approx(0.1 * float(old.norm()))


def test_state_goes_on_where_it_was_saved() -> None:
    parameters, gradients = start(torch.float32)
    straight = Lamb(parameters, lr=0.01, weight_decay=0.1)
    descend(straight, gradients[:2])
    saved = copy.deepcopy(straight.state_dict())
    others = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = Lamb(others, lr=0.01, weight_decay=0.1)
    resumed.load_state_dict(saved)
    descend(straight, gradients[2:])
    descend(resumed, gradients[2:])
    for one, other in zip(parameters, others, strict=True):
        assert torch.equal(one, other)


def test_parameters_without_gradient_stay_and_do_not_age() -> None:
    parameters, gradients = start(torch.float64)
    optimizer = Lamb(parameters, lr=0.01)
    still = parameters[0].detach().clone()
    for parameter, gradient in zip(parameters[1:], gradients[0][1:], strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert torch.equal(parameters[0], still)
    assert parameters[0] not in optimizer.state
    expected = plain_lamb(still, [gradients[1][0]], 0.01, (0.9, 0.999), 1e-6, 0.0)
    parameters[0].grad = gradients[1][0]
    optimizer.step()
    torch.testing.assert_close(parameters[0].detach(), expected)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"lr": -1.0}, "lr of LAMB is -1.0, but must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay of LAMB is nan"),
        ({"eps": 0.0}, "eps of LAMB is 0.0, but must be above 0"),
        ({"betas": (0.9, 1.0)}, r"betas of LAMB are \(0.9, 1.0\)"),
    ],
)
def test_wrong_numbers_are_refused(wrong: dict[str, object], sentence: str) -> None:
    parameters, _ = start(torch.float64)
    with pytest.raises(DeclipError, match=sentence):
        Lamb(parameters, **wrong)  # type: ignore[arg-type]


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = Lamb(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(DeclipError, match="LAMB needs dense gradients"):
        optimizer.step()
