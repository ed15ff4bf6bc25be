"""Logistic regression with many L2 strengths at once, to scikit-learn's optimum.

The objective is scikit-learn's `LogisticRegression(C=1 / l2_strength)`: the summed cross-entropy
plus l2_strength times half the squared norm of the weights, the bias left free. Multinomial for
three classes and more, binomial for two, and one binomial a class for several labels a sample.

What makes it fast, changing nothing of the objective:

* float32 scores and residuals with float64 sums between blocks of rows, one read of a block for
  scores and gradient, and all strengths' columns in one product;
* the mean is taken out of the features and given back to the bias, which frees the bias from the
  weights;
* L-BFGS starts from the inverse of the Hessian that the features' covariance gives at the current
  confidence of the classifier, for any strength one division in the covariance's own axes.

Passes in float32 bound what can be told apart, as between rows of which one is a million times as
long as others. Where that ends a descent, it goes on in float64 from there, at twice the cost and
more; features for which even that is not enough, or 1,000 passes are not, end unconverged.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from declip_eval.batched_lbfgs import Minimum, minimize
from declip_eval.ranking import FloatArray, IntArray

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_ITERATIONS = 1000
"""L-BFGS iterations, CLIP's limit."""

GRADIENT_TOLERANCE = 1e-4
"""Largest entry of the mean loss's gradient at which to stop: scikit-learn's rule and default."""

DECREASE_TOLERANCE = 5e-7
"""Share of the mean loss that may still be to gain at the end. scikit-learn has no such rule, and
its own alone stops far too early where features are small, such as those of unit length."""

SMALLEST_LOSS = 1e-3
"""A mean loss below this does not make `DECREASE_TOLERANCE` any tighter."""

BLOCK_ROWS = 2048
"""Rows a pass takes at a time: the block (6 MiB at 768 columns) stays in the cache."""

NUM_PARTS = 16
"""Parts a pass is summed in, whatever the number of threads, so that no bit depends on it."""

LARGEST_FEATURE = 1e12
"""In size; features of encoders are far below."""

MAX_COLUMNS = 128
"""Columns of weights one pass carries; beyond, matrix products gain nothing from more."""

COVARIANCE_ROWS = 8
"""Rows a column of the features that the preconditioner's covariance is taken from."""

SHORTEST_ROW = 1e-30
"""Length of a row of zeros, so that it can be divided by."""


class LogisticModel(NamedTuple):
    """A fitted model: scores are `features @ weights + bias`."""

    weights: FloatArray
    """(dim, num_classes)."""
    bias: FloatArray
    """(num_classes,)."""
    l2_strength: float
    num_iterations: int
    """Passes over the training set; of several classifiers the most."""
    converged: bool

    def scores(self, features: NDArray[Any]) -> FloatArray:
        """Score features (num_rows, dim): (num_rows, num_classes) float64."""
        scores = np.empty((len(features), len(self.bias)))

        def fill(start: int) -> None:
            block = slice(start, start + BLOCK_ROWS)
            scores[block] = np.asarray(features[block], dtype=np.float64) @ self.weights
            scores[block] += self.bias

        with BlockThreads(blas_threads()) as threads:
            threads.map(fill, range(0, len(features), BLOCK_ROWS))
        return scores


class Layout(NamedTuple):
    """How problems and columns lie: `num_groups` problems a strength of `num_columns` each."""

    num_classes: int
    num_groups: int
    num_columns: int

    @property
    def is_softmax(self) -> bool:
        return self.num_columns > 1


def layout_of(targets: NDArray[Any], num_classes: int) -> Layout:
    """Softmax for three classes and more, else one sigmoid a classifier."""
    if targets.ndim == 2:
        return Layout(num_classes, num_classes, 1)
    return Layout(num_classes, 1, num_classes if num_classes > 2 else 1)


def covariance_axes(features: NDArray[np.float32]) -> tuple[FloatArray, FloatArray]:
    """Eigenvalues (dim,) and eigenvectors (dim, dim) of centered rows' covariance, from a sample.

    The sample is the same at every call, and only steers the search, never the optimum. A row
    longer than the median counts by its length, not its square: a classifier is the surer of a row
    the longer it is, and where it is sure it has no curvature.
    """
    rows = features[sample_rows(*features.shape)]
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    median = max(float(np.median(lengths)), SHORTEST_ROW)
    rows = rows * np.sqrt(median / np.maximum(lengths, median))[:, None]
    values, vectors = np.linalg.eigh((rows.T @ rows).astype(np.float64) / len(rows))
    return np.maximum(values, 0.0), vectors


def sample_rows(num_rows: int, dim: int) -> IntArray:
    """Return the rows that the covariance is taken from; drawn, since every k-th may be alike."""
    size = min(num_rows, COVARIANCE_ROWS * dim)
    return np.sort(np.random.default_rng(0).choice(num_rows, size, replace=False))


class LogisticProblem:
    """Features and labels, ready to be fitted with any L2 strength.

    What was fitted is kept: a new strength starts from the nearest one (by ratio).

    Args:
        features: (num_rows, dim), any real dtype; kept, and beside them a centered float32 copy.
        targets: (num_rows,) class numbers, each of 0 to `num_classes` - 1 present, or
            (num_rows, num_classes) booleans for several labels a sample.
        num_classes: at least 2 (1 with booleans).
        num_threads: of the passes; by default those that numpy's BLAS may use.

    Raises:
        ValueError: features beyond `LARGEST_FEATURE`.
    """

    max_columns = MAX_COLUMNS

    def __init__(
        self,
        features: NDArray[Any],
        targets: NDArray[Any],
        *,
        num_classes: int,
        num_threads: int | None = None,
    ) -> None:
        self.layout = layout_of(targets, num_classes)
        self.num_rows, self.dim = features.shape
        largest = max(float(features.max()), -float(features.min()))
        if largest > LARGEST_FEATURE:
            raise ValueError(
                f"A feature is {largest:.3g} in size, but a probe takes up to "
                f"{LARGEST_FEATURE:.0g}, whose squares float32 can still sum: divide all features "
                "by one number, or look whether the encoder diverged."
            )
        self.given = features
        self.mean = np.asarray(features.mean(axis=0, dtype=np.float64))
        self.labels = targets.astype(np.int64) if self.layout.is_softmax else None
        self.signs = None if self.layout.is_softmax else signs_of(targets)
        self.num_threads = num_threads or blas_threads()
        self._points: dict[float, FloatArray] = {}
        self._prepare(features)

    def _prepare(self, features: NDArray[Any]) -> None:
        """Make what the passes in float32 read; another device makes it there."""
        self.features = centered(features, self.mean)
        with BlockThreads(1):
            self.values, self.vectors = covariance_axes(self.features)

    def fit(self, strengths: Sequence[float]) -> list[LogisticModel]:
        """Fit one model a strength, in the order given."""
        models: dict[float, LogisticModel] = {}
        columns = self.layout.num_groups * self.layout.num_columns
        together = max(1, self.max_columns // columns)
        # From strong to weak, so that the ones that are easy give the hard ones their start.
        ordered = sorted(set(strengths), reverse=True)
        for first in range(0, len(ordered), together):
            models |= self._fit_together(ordered[first : first + together])
        return [models[strength] for strength in strengths]

    def _fit_together(self, strengths: Sequence[float]) -> dict[float, LogisticModel]:
        start = np.concatenate([self._start(strength) for strength in strengths])
        found = self._minimize(start, strengths)
        if not found.converged.all():
            from declip_eval.logistic_exact import finish

            found = finish(self, found, strengths)
        groups = self.layout.num_groups
        models = {}
        for index, strength in enumerate(strengths):
            part = slice(index * groups, (index + 1) * groups)
            points = found.points[part]
            self._points[strength] = points
            weights, bias = raw_coefficients(points, self.mean, self.layout)
            models[strength] = LogisticModel(
                weights,
                bias,
                strength,
                int(found.num_iterations[part].max()),
                bool(found.converged[part].all()),
            )
        return models

    def _start(self, strength: float) -> FloatArray:
        if self._points:
            return self._points[min(self._points, key=lambda s: abs(np.log(s / strength)))]
        shape = (self.layout.num_groups, self.layout.num_columns, self.dim + 1)
        return np.zeros(shape)

    def _minimize(self, start: FloatArray, strengths: Sequence[float]) -> Minimum:
        which = np.arange(len(start))
        with BlockThreads(self.num_threads) as threads:
            passes = Passes(self, strengths, threads)
            return minimize(passes, start, which, max_iterations=MAX_ITERATIONS, xp=np)


class BlockThreads:
    """Threads for blocks of rows, with one BLAS thread in each.

    The work between matrix products so runs on all threads too, and a product's bits depend
    neither on their number nor on the machine's settings.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads)

    def __enter__(self) -> BlockThreads:
        self._limit = limit_blas(1)
        self._limit.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._threads.shutdown()
        self._limit.__exit__(*error)

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Do `work` for every item and return the results in the items' order."""
        return list(self._threads.map(work, items))


class Passes:
    """The objective of some strengths' problems, evaluated in passes over the features."""

    dtype: type[np.floating[Any]] = np.float32
    """Of scores and residuals."""

    def __init__(
        self, problem: LogisticProblem, strengths: Sequence[float], threads: BlockThreads
    ) -> None:
        groups = problem.layout.num_groups
        self.problem, self.threads = problem, threads
        self.penalties = np.repeat(np.array(strengths, dtype=np.float64), groups)
        self.penalties /= problem.num_rows
        self.groups = np.tile(np.arange(groups), len(strengths))
        self.mean = problem.mean
        """What the rows of the passes are less."""
        self.values, vectors = self.find_axes()
        self.vectors = vectors.astype(self.dtype)

    def find_axes(self) -> tuple[FloatArray, FloatArray]:
        """Variances (dim,) of the features along axes (dim, dim)."""
        return self.problem.values, self.problem.vectors

    def rows(self, block: slice) -> NDArray[Any]:
        """Centered features (rows, dim)."""
        return self.problem.features[block]

    def evaluate(
        self, points: FloatArray, which: IntArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """See `batched_lbfgs.Objective`; the losses are means over the rows plus the penalty."""
        problem = self.problem
        starts = range(0, problem.num_rows, BLOCK_ROWS)
        parts = [starts[i::NUM_PARTS] for i in range(min(NUM_PARTS, len(starts)))]
        weights = points.astype(self.dtype)
        groups = self.groups[which]
        sums = self.threads.map(lambda part: self._sum_blocks(weights, groups, part), parts)
        losses, gradients, curvatures = (
            sum(values[1:], values[0]) / problem.num_rows for values in zip(*sums, strict=True)
        )
        penalties = self.penalties[which]
        without_bias = points[:, :, :-1]
        gradients[:, :, :-1] += penalties[:, None, None] * without_bias
        losses += 0.5 * penalties * (without_bias**2).sum((1, 2))
        return losses, gradients, curvatures

    def _sum_blocks(
        self, points: NDArray[Any], groups: IntArray, starts: Sequence[int]
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        problem = self.problem
        num, columns, size = points.shape
        weights = np.ascontiguousarray(points[:, :, :-1]).reshape(num * columns, size - 1)
        bias = points[:, :, -1:].reshape(num * columns, 1)
        losses, curvatures = np.zeros(num), np.zeros((num, columns))
        gradients = np.zeros((num, columns, size))
        for start in starts:
            block = slice(start, start + BLOCK_ROWS)
            rows = self.rows(block)
            scores = weights @ rows.T
            scores += bias
            scores = scores.reshape(num, columns, len(rows))
            if problem.labels is not None:
                loss, residuals, spread = softmax_block(scores, problem.labels[block])
            if problem.signs is not None:
                loss, residuals, spread = sigmoid_block(scores, problem.signs[groups, block])
            losses += loss
            curvatures += spread
            flat = residuals.reshape(num * columns, len(rows))
            gradients[:, :, :-1] += (flat @ rows).reshape(num, columns, size - 1)
            gradients[:, :, -1] += residuals.sum(2)
        return losses, gradients, curvatures

    def precondition(
        self, vectors: FloatArray, curvatures: FloatArray, which: IntArray
    ) -> FloatArray:
        """Divide by curvature times variance plus penalty, along the covariance's axes."""
        num, columns, size = vectors.shape
        curvatures = np.maximum(curvatures, SMALLEST_CURVATURE)[:, :, None]
        flat = vectors[:, :, :-1].astype(self.dtype).reshape(num * columns, size - 1)
        along = (flat @ self.vectors).reshape(num, columns, size - 1)
        scaled = along / (curvatures * self.values + self.penalties[which][:, None, None])
        result = np.empty_like(vectors)
        flat = scaled.astype(self.dtype).reshape(num * columns, size - 1) @ self.vectors.T
        result[:, :, :-1] = flat.reshape(num, columns, size - 1)
        result[:, :, -1:] = vectors[:, :, -1:] / curvatures
        return result

    def is_solved(
        self, losses: FloatArray, gradients: FloatArray, decreases: FloatArray
    ) -> NDArray[np.bool_]:
        """scikit-learn's rule, on the gradient of the features as they came, and our own."""
        bias = gradients[:, :, -1:]
        raw = np.abs(gradients[:, :, :-1] + bias * self.mean).max((1, 2))
        steepest = np.maximum(raw, np.abs(bias).max((1, 2)))
        needed = DECREASE_TOLERANCE * np.maximum(losses, SMALLEST_LOSS)
        return np.asarray((steepest <= GRADIENT_TOLERANCE) & (decreases <= needed))


SMALLEST_CURVATURE = 1e-6
"""A classifier sure of every row has a curvature of nothing, which cannot be divided by."""


def centered(features: NDArray[Any], mean: FloatArray) -> NDArray[np.float32]:
    """Return features less their mean, taken off in float64, as float32."""
    result = np.empty(features.shape, dtype=np.float32)
    for start in range(0, len(features), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        result[block] = features[block] - mean
    return result


def signs_of(targets: NDArray[Any]) -> NDArray[np.float32]:
    """Return 1 for a positive and -1 for a negative, (num_groups, num_rows)."""
    positive = targets.T if targets.ndim == 2 else targets[None] == 1
    return np.where(positive, np.float32(1), np.float32(-1))


def softmax_block(
    scores: NDArray[Any], labels: IntArray
) -> tuple[FloatArray, NDArray[Any], FloatArray]:
    """Losses (m,) summed, residuals (m, classes, rows), and p (1 - p) summed (m, classes).

    Args:
        scores: (m, classes, rows); overwritten.
        labels: (rows,).
    """
    rows = np.arange(len(labels))
    scores -= scores.max(1, keepdims=True)
    of_label = scores[:, labels, rows]
    np.exp(scores, out=scores)
    sums = scores.sum(1, keepdims=True)
    losses = (np.log(sums[:, 0]) - of_label).sum(1, dtype=np.float64)
    scores /= sums
    spread = scores.sum(2, dtype=np.float64) - np.einsum("mcr,mcr->mc", scores, scores)
    scores[:, labels, rows] -= 1
    return losses, scores, spread


def sigmoid_block(
    scores: NDArray[Any], signs: NDArray[np.float32]
) -> tuple[FloatArray, NDArray[Any], FloatArray]:
    """Losses (m,) summed, residuals (m, 1, rows), and p (1 - p) summed (m, 1).

    Args:
        scores: (m, 1, rows).
        signs: (m, rows), 1 or -1.
    """
    margins = scores[:, 0] * signs
    small = np.exp(-np.abs(margins))
    losses = (np.log1p(small) + np.maximum(-margins, 0)).sum(1, dtype=np.float64)
    # The probability of the wrong side, without overflow on either.
    wrong = np.where(margins > 0, small, np.float32(1)) / (1 + small)
    spread = (wrong * (1 - wrong)).sum(1, dtype=np.float64)
    return losses, (-wrong * signs)[:, None, :], spread[:, None]


def raw_coefficients(
    points: FloatArray, mean: FloatArray, layout: Layout
) -> tuple[FloatArray, FloatArray]:
    """Weights (dim, num_classes) and bias of features as they came, of a strength's problems."""
    flat = points.reshape(-1, points.shape[-1])
    weights, bias = flat[:, :-1].T, flat[:, -1] - flat[:, :-1] @ mean
    if flat.shape[0] == 1 and layout.num_classes == 2:
        # One classifier decides between two classes, as in scikit-learn.
        return np.hstack([-weights, weights]), np.concatenate([-bias, bias])
    return weights, bias


@functools.cache
def _blas() -> Any:
    """The BLAS libraries that are loaded; finding them takes milliseconds, so only once."""
    return import_module("threadpoolctl").ThreadpoolController().select(user_api="blas")


def blas_threads() -> int:
    """Threads numpy's BLAS may use, at most the processors of this process."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [int(library["num_threads"]) for library in _blas().info()]
    return max(1, min([*found, allowed or 1]))


def limit_blas(num_threads: int) -> AbstractContextManager[Any]:
    """Let numpy's BLAS use `num_threads` while the context lasts."""
    limit: AbstractContextManager[Any] = _blas().limit(limits=num_threads)
    return limit
