"""`logistic` with torch: all strengths as one batch of problems on a GPU.

Same objective, same descent and same rule to stop; only the passes over the features are torch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_eval.batched_lbfgs import Minimum, minimize
from declip_eval.logistic import (
    DECREASE_TOLERANCE,
    GRADIENT_TOLERANCE,
    MAX_ITERATIONS,
    SHORTEST_ROW,
    SMALLEST_CURVATURE,
    SMALLEST_LOSS,
    LogisticProblem,
    sample_rows,
)
from declip_eval.ranking import FloatArray

Tensor = Any
"""torch is imported only where a probe runs on its device."""

MAX_SCORES = 2**28
"""Scores of one block of rows, 1 GiB of float32; one that large keeps any GPU busy."""


class TorchLogisticProblem(LogisticProblem):
    """`LogisticProblem` on a torch device.

    Args:
        features: (num_rows, dim), any real dtype; kept on the device as centered float32.
        targets: as in `LogisticProblem`.
        num_classes: as in `LogisticProblem`.
        device: such as "cuda", "cuda:1" or "cpu".

    Raises:
        ValueError: a device that torch does not have.
    """

    max_columns = 2**14

    def __init__(
        self, features: NDArray[Any], targets: NDArray[Any], *, num_classes: int, device: str
    ) -> None:
        self.device = check_device(device)
        super().__init__(features, targets, num_classes=num_classes)

    def _prepare(self, features: NDArray[Any]) -> None:
        import torch

        rows = torch.as_tensor(np.ascontiguousarray(features)).to(self.device)
        self.mean_tensor = torch.as_tensor(self.mean).to(self.device)
        self.rows = torch.empty(features.shape, dtype=torch.float32, device=self.device)
        for start in range(0, len(rows), 2**14):
            block = slice(start, start + 2**14)
            self.rows[block] = (rows[block].double() - self.mean_tensor).float()
        of_classes = self.signs if self.labels is None else self.labels
        self.targets = torch.as_tensor(of_classes).to(self.device)
        sample = self.rows[torch.as_tensor(sample_rows(*features.shape)).to(self.device)]
        lengths = sample.norm(dim=1)  # As in `logistic.covariance_axes`.
        median = lengths.median().clip(min=SHORTEST_ROW)
        sample = sample * (median / lengths.clip(min=median)).sqrt()[:, None]
        covariance = (sample.T @ sample).double() / len(sample)
        self.eigenvalues, self.axes = torch.linalg.eigh(covariance)
        self.eigenvalues = self.eigenvalues.clip(min=0)

    def _minimize(self, start: FloatArray, strengths: Sequence[float]) -> Minimum:
        import torch

        passes = TorchPasses(self, strengths)
        which = torch.arange(len(start), device=self.device)
        points = torch.as_tensor(start).to(self.device)
        with torch.no_grad(), exact_products():
            found = minimize(passes, points, which, max_iterations=MAX_ITERATIONS, xp=torch)
        return Minimum(*(np.asarray(part.cpu()) for part in found))


class TorchPasses:
    """`batched_lbfgs.Objective` of some strengths' problems, on the problem's device."""

    def __init__(self, problem: TorchLogisticProblem, strengths: Sequence[float]) -> None:
        import torch

        groups = problem.layout.num_groups
        self.problem = problem
        penalties = np.repeat(np.array(strengths, dtype=np.float64), groups) / problem.num_rows
        self.penalties = torch.as_tensor(penalties).to(problem.device)
        self.groups = torch.arange(groups, device=problem.device).repeat(len(strengths))

    def evaluate(self, points: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean losses plus penalty (m,), gradients and curvatures (m, columns)."""
        problem = self.problem
        num, columns, size = points.shape
        weights = points[:, :, :-1].reshape(num * columns, size - 1).float()
        bias = points[:, :, -1].reshape(num * columns, 1).float()
        losses, curvatures = points.new_zeros(num), points.new_zeros((num, columns))
        gradients = points.new_zeros(points.shape)
        num_rows = max(1, MAX_SCORES // (num * columns))
        for start in range(0, problem.num_rows, num_rows):
            block = slice(start, start + num_rows)
            rows = problem.rows[block]
            scores = (weights @ rows.T + bias).view(num, columns, len(rows))
            if problem.layout.is_softmax:
                loss, residuals, spread = softmax_block(scores, problem.targets[block])
            else:
                targets = problem.targets[self.groups[which]][:, block]
                loss, residuals, spread = sigmoid_block(scores, targets)
            losses += loss
            curvatures += spread
            flat = residuals.reshape(num * columns, len(rows))
            gradients[:, :, :-1] += (flat @ rows).view(num, columns, size - 1)
            gradients[:, :, -1] += residuals.double().sum(2)
        losses, gradients = losses / problem.num_rows, gradients / problem.num_rows
        penalties, without_bias = self.penalties[which], points[:, :, :-1]
        gradients[:, :, :-1] += penalties[:, None, None] * without_bias
        losses += 0.5 * penalties * (without_bias**2).sum((1, 2))
        return losses, gradients, curvatures / problem.num_rows

    def precondition(self, vectors: Tensor, curvatures: Tensor, which: Tensor) -> Tensor:
        """Divide by curvature times variance plus penalty, along the covariance's axes."""
        problem = self.problem
        curvatures = curvatures.clip(min=SMALLEST_CURVATURE)[:, :, None]
        along = vectors[:, :, :-1] @ problem.axes
        along = along / (curvatures * problem.eigenvalues + self.penalties[which][:, None, None])
        result = vectors / curvatures
        result[:, :, :-1] = along @ problem.axes.T
        return result

    def is_solved(self, losses: Tensor, gradients: Tensor, decreases: Tensor) -> Tensor:
        """The rule of `logistic.Passes.is_solved`."""
        bias = gradients[:, :, -1:]
        raw = (gradients[:, :, :-1] + bias * self.problem.mean_tensor).abs().amax((1, 2))
        needed = DECREASE_TOLERANCE * losses.clip(min=SMALLEST_LOSS)
        return (
            (raw <= GRADIENT_TOLERANCE)
            & (bias.abs().amax((1, 2)) <= GRADIENT_TOLERANCE)
            & (decreases <= needed)
        )


def softmax_block(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `logistic.softmax_block`, for scores (m, classes, rows) and labels (rows,)."""
    import torch

    index = labels.expand(len(scores), 1, -1)
    logs = torch.log_softmax(scores, 1)
    losses = -logs.gather(1, index).double().sum((1, 2))
    probabilities = logs.exp_()
    spread = (probabilities * (1 - probabilities)).double().sum(2)
    probabilities.scatter_add_(1, index, -torch.ones_like(index, dtype=scores.dtype))
    return losses, probabilities, spread


def sigmoid_block(scores: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `logistic.sigmoid_block`, for scores (m, 1, rows) and signs (m, rows)."""
    import torch

    margins = scores[:, 0] * signs
    losses = torch.nn.functional.softplus(-margins).double().sum(1)
    wrong = torch.sigmoid(-margins)
    spread = (wrong * (1 - wrong)).double().sum(1)
    return losses, (-wrong * signs)[:, None, :], spread[:, None]


def check_device(device: str) -> Any:
    """Return torch's device, or refuse it in a sentence."""
    import torch

    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {device!r}, but torch has no such device here "
            f"({str(error).splitlines()[0]}): take 'cpu', or run where it is."
        ) from error
    return found


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply in full float32 while this lasts: TF32's three digits find no optimum."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
