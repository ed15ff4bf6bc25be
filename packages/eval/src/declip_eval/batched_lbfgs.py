"""L-BFGS on many small convex problems at once, with a preconditioner, for numpy and torch.

The recursion is Nocedal's (1980; Nocedal and Wright 2006, algorithm 7.4). Its first matrix is the
problem's own preconditioner, not a multiple of the identity, which is what saves the iterations:
features of real encoders spread over four decades of variance.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

Array = Any
"""A numpy array or a torch tensor; one run uses one kind."""

MEMORY = 10
"""Pairs of steps and gradient changes that are kept, scikit-learn's number (scipy's `maxcor`)."""

DECREASE_NEEDED = 1e-4
"""Share of the promised decrease a step must bring (Armijo)."""

ROUNDING = 1e-7
"""Relative noise of a loss that comes from float32 scores; a step this much up is no step up."""

STEP_SHRINKING = 0.3
SMALLEST_STEP = 1e-5


class Objective(Protocol):
    """A batch of problems; `which` are the numbers (m,) of those that are meant."""

    def evaluate(self, points: Array, which: Array) -> tuple[Array, Array, Array]:
        """Return losses (m,), gradients (m, columns, size), curvatures (m, columns) at points of
        shape (m, columns, size)."""

    def precondition(self, vectors: Array, curvatures: Array, which: Array) -> Array:
        """Multiply (m, columns, size) by an approximate inverse Hessian, symmetric and positive."""

    def is_solved(self, losses: Array, gradients: Array, decreases: Array) -> Array:
        """Tell of each problem (m,) whether to stop, given the decrease that is still expected."""


class Minimum(NamedTuple):
    """Where the descent ended."""

    points: Array
    """(m, columns, size)."""
    num_iterations: Array
    """(m,) evaluations after the first."""
    converged: Array
    """(m,) whether `is_solved` said so."""


def minimize(
    objective: Objective, start: Array, which: Array, *, max_iterations: int, xp: Any
) -> Minimum:
    """Minimize every problem from its own start; one that is done costs nothing more.

    Args:
        objective: the problems.
        start: (m, columns, size) float64.
        which: (m,) integers, the objective's numbers of these problems.
        max_iterations: evaluations a problem may take after the first.
        xp: the module, numpy or torch.
    """
    points = xp.zeros_like(start)
    num_iterations = xp.zeros_like(which)
    converged = xp.zeros_like(which) > 0
    descent = _Descent(objective, start, which, xp)
    for iteration in range(max_iterations + 1):
        descent.find_directions()
        solved = descent.is_solved()
        over = solved | (descent.steps < SMALLEST_STEP)
        if iteration == max_iterations:
            over = over | True
        rows = descent.rows[over]
        points[rows] = descent.points[over]
        num_iterations[rows] = iteration
        converged[rows] = solved[over]
        if bool(over.all()):
            break
        if bool(over.any()):
            descent.keep(~over)
        descent.step()
    return Minimum(points, num_iterations, converged)


class _Descent:
    """The problems still running, one entry of the first axis each."""

    _KEPT = (
        "rows",
        "which",
        "points",
        "losses",
        "gradients",
        "curvatures",
        "directions",
        "steps",
    )

    def __init__(self, objective: Objective, start: Array, which: Array, xp: Any) -> None:
        self.objective, self.xp = objective, xp
        self.which, self.points = which, start
        self.rows = xp.arange(len(which), device=which.device)
        self.losses, self.gradients, self.curvatures = objective.evaluate(start, which)
        self.directions = xp.zeros_like(start)
        self.steps = xp.ones_like(self.losses)
        self.pairs: list[tuple[Array, Array, Array]] = []
        """Steps, gradient changes and 1 over their products; 0 for a pair that must not count."""

    def keep(self, running: Array) -> None:
        for name in self._KEPT:
            setattr(self, name, getattr(self, name)[running])
        self.pairs = [(s[running], y[running], r[running]) for s, y, r in self.pairs]

    def find_directions(self) -> None:
        """Set the descent directions; a problem whose step was refused keeps its own."""
        vectors = self.gradients
        shares: list[Array] = []
        for s, y, r in reversed(self.pairs):
            shares.append(r * _dot(s, vectors))
            vectors = vectors - _spread(shares[-1]) * y
        vectors = self.objective.precondition(vectors, self.curvatures, self.which)
        for (s, y, r), share in zip(self.pairs, reversed(shares), strict=True):
            vectors = vectors + _spread(share - r * _dot(y, vectors)) * s
        fresh = _spread(self.steps == 1)
        self.directions = self.xp.where(fresh, -vectors, self.directions)

    def is_solved(self) -> Array:
        # Half the Newton decrement squared: what a quadratic would still go down.
        decreases = -0.5 * _dot(self.gradients, self.directions)
        return self.objective.is_solved(self.losses, self.gradients, decreases)

    def step(self) -> None:
        xp = self.xp
        points = self.points + _spread(self.steps) * self.directions
        losses, gradients, curvatures = self.objective.evaluate(points, self.which)
        promised = DECREASE_NEEDED * self.steps * _dot(self.gradients, self.directions)
        taken = losses <= self.losses + promised + ROUNDING * xp.abs(self.losses)
        s, y = points - self.points, gradients - self.gradients
        product = _dot(s, y)
        curved = taken & (product > 1e-12 * xp.sqrt(_dot(s, s) * _dot(y, y)))
        inverse = xp.where(curved, 1 / xp.where(curved, product, 1.0), 0.0)
        self.pairs = [*self.pairs, (s, y, inverse)][-MEMORY:]
        self.points = xp.where(_spread(taken), points, self.points)
        self.gradients = xp.where(_spread(taken), gradients, self.gradients)
        self.losses = xp.where(taken, losses, self.losses)
        self.curvatures = xp.where(taken[:, None], curvatures, self.curvatures)
        self.steps = xp.where(taken, 1.0, self.steps * STEP_SHRINKING)


def _dot(a: Array, b: Array) -> Array:
    return (a * b).sum((1, 2))


def _spread(values: Array) -> Array:
    return values[:, None, None]
