"""`logistic`'s last passes in float64, for what float32's rounding has ended unconverged.

The descent goes on from where it stood, problem by problem, with an inverse Hessian of its own: of
the covariance in which a row counts by how unsure the classifier is of it now. A row a million
times as long as others, of which it has long been sure, so does not steer the steps any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_eval.batched_lbfgs import OF_FLOAT64, Minimum, minimize
from declip_eval.logistic import (
    MAX_ITERATIONS,
    SMALLEST_CURVATURE,
    BlockThreads,
    LogisticProblem,
    Passes,
    sample_rows,
)
from declip_eval.ranking import FloatArray

ROUND = 100
"""Evaluations before what the classifier is sure of is looked at again."""


def finish(problem: LogisticProblem, found: Minimum, strengths: Sequence[float]) -> Minimum:
    """Go on where the descent has ended unconverged; what has converged stays as it is.

    Always on the CPU, whatever device the problem is on.

    Args:
        problem: that was fitted.
        found: where the descent has ended.
        strengths: of `found`, each with as many problems as the layout has groups.
    """
    points, num_iterations, converged = (np.array(part) for part in found)
    with BlockThreads(problem.num_threads) as threads:
        for row in np.flatnonzero(~converged):
            while not converged[row] and num_iterations[row] < MAX_ITERATIONS:
                which = np.array([row])
                limit = min(ROUND, MAX_ITERATIONS - int(num_iterations[row]))
                passes = ExactPasses(problem, strengths, threads, points[which])
                last = minimize(
                    passes, passes.start, which, max_iterations=limit, xp=np, noise=OF_FLOAT64
                )
                points[row] = moved(last.points, problem.mean - passes.mean)[0]
                converged[row] = last.converged[0]
                num_iterations[row] += last.num_iterations[0]
                if last.num_iterations[0] < limit:
                    break
    return Minimum(points, num_iterations, converged)


class ExactPasses(Passes):
    """`Passes` in float64, over the features as they were given; twice the work and more.

    Args:
        problem: see there.
        strengths: see there.
        threads: see there.
        start: (1, columns, dim + 1), where the classifier stands.
    """

    dtype = np.float64

    def __init__(
        self,
        problem: LogisticProblem,
        strengths: Sequence[float],
        threads: BlockThreads,
        start: FloatArray,
    ) -> None:
        self.start = start
        super().__init__(problem, strengths, threads)

    def rows(self, block: slice) -> NDArray[Any]:
        """Centered features (rows, dim)."""
        return np.asarray(self.problem.given[block] - self.mean)

    def find_axes(self) -> tuple[FloatArray, FloatArray]:
        """See `Passes`; of rows by the classifier's doubt, from a sample. Sets mean and start."""
        problem = self.problem
        rows = problem.given[sample_rows(problem.num_rows, problem.dim)] - problem.mean
        doubts = doubts_of(rows @ self.start[0, :, :-1].T + self.start[0, :, -1])
        shares = doubts / doubts.mean()
        center = shares @ rows / len(rows)
        self.mean = problem.mean + center
        self.start = moved(self.start, center)
        rows = (rows - center) * np.sqrt(shares)[:, None]
        # Squares of the rows would lose spreads a hundred million times smaller than the largest.
        _, lengths, axes = np.linalg.svd(rows, full_matrices=len(rows) < self.problem.dim)
        values = np.zeros(self.problem.dim)
        values[: len(lengths)] = lengths**2 / len(rows)
        return values, axes.T


def moved(points: FloatArray, shift: FloatArray) -> FloatArray:
    """Points of features less `shift` that give the scores `points` (m, columns, dim + 1) gave."""
    result = points.copy()
    result[:, :, -1] += points[:, :, :-1] @ shift
    return result


def doubts_of(scores: FloatArray) -> FloatArray:
    """p (1 - p), summed over the classes, of rows of scores (num_rows, columns); above 0."""
    if scores.shape[1] == 1:
        scores = np.concatenate([scores, np.zeros_like(scores)], axis=1)
    likely = np.exp(scores - scores.max(axis=1, keepdims=True))
    likely /= likely.sum(axis=1, keepdims=True)
    return np.asarray(np.maximum((likely * (1 - likely)).sum(axis=1), SMALLEST_CURVATURE))
