"""L-BFGS on many small convex problems at once, with a preconditioner, for numpy and torch.

The recursion is Nocedal's (1980; Nocedal and Wright 2006, algorithm 7.4). Its first matrix is the
problem's own preconditioner, not the identity, which is what saves the iterations: features of real
encoders spread over four decades of variance. It is scaled to the last pair (their equation 7.20
with the preconditioner between), since a classifier grown sure is flatter than its curvature says.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

Array = Any
"""A numpy array or a torch tensor; one run uses one kind."""

MEMORY = 10
"""Pairs of steps and gradient changes that are kept, scikit-learn's number (scipy's `maxcor`)."""

DECREASE_NEEDED = 1e-4
"""Share of the promised decrease a step must bring (Armijo)."""


LARGEST_SHRINKING = 0.05
"""A refused step is cut to where a parabola has its minimum, but at most to this share."""

SMALLEST_STEP = 1e-8
"""Share of a direction below which it leads nowhere."""

PATIENCE = 50
"""Evaluations within which a loss must have gone down by `Noise.progress` for going on."""

SCALE_KNOWN = 0.5
"""A pair that differs no more from what the preconditioner says does not change its scale."""


class Noise(NamedTuple):
    """What of a loss is lost in the rounding of the scores that it comes from; relative."""

    rounding: float
    """A step this much up is no step up."""
    progress: float
    """By how much a loss must have gone down since the last start for a new start to be worth it,
    and within `PATIENCE` evaluations for going on to be."""


OF_FLOAT32 = Noise(rounding=1e-7, progress=1e-6)
OF_FLOAT64 = Noise(rounding=1e-14, progress=1e-12)


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
    objective: Objective,
    start: Array,
    which: Array,
    *,
    max_iterations: int,
    xp: Any,
    noise: Noise = OF_FLOAT32,
) -> Minimum:
    """Minimize every problem from its own start; one that is done costs nothing more.

    Where a direction leads nowhere, as after gradients that rounding or far outliers spoiled, the
    descent starts anew from the preconditioner alone, as long as that brings something. It ends
    unconverged where neither does, or where the loss stands still.

    Args:
        objective: the problems.
        start: (m, columns, size) float64.
        which: (m,) integers, the objective's numbers of these problems.
        max_iterations: evaluations a problem may take after the first.
        xp: the module, numpy or torch.
        noise: of the losses.
    """
    points = xp.zeros_like(start)
    num_iterations = xp.zeros_like(which)
    converged = xp.zeros_like(which) > 0
    descent = _Descent(objective, start, which, xp, noise)
    for iteration in range(max_iterations + 1):
        descent.start_anew_where_stuck()
        descent.find_directions()
        solved = descent.is_solved()
        over = solved | (descent.steps < SMALLEST_STEP) | (descent.idle >= PATIENCE)
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
        "limits",
        "marks",
        "idle",
    )

    def __init__(
        self, objective: Objective, start: Array, which: Array, xp: Any, noise: Noise
    ) -> None:
        self.objective, self.xp, self.noise = objective, xp, noise
        self.which, self.points = which, start
        self.rows = xp.arange(len(which), device=which.device)
        self.losses, self.gradients, self.curvatures = objective.evaluate(start, which)
        self.directions = xp.zeros_like(start)
        self.steps = xp.ones_like(self.losses)
        self.limits = self.steps * float("inf")
        """The loss below which a new start is worth it."""
        self.marks = self.losses
        """The loss when it last went down by the noise's `progress`, and the evaluations since."""
        self.idle = xp.zeros_like(which)
        self.pairs: list[tuple[Array, Array, Array]] = []
        """Steps, gradient changes and 1 over their products; 0 for a pair that must not count."""

    def keep(self, running: Array) -> None:
        for name in self._KEPT:
            setattr(self, name, getattr(self, name)[running])
        self.pairs = [(s[running], y[running], r[running]) for s, y, r in self.pairs]

    def start_anew_where_stuck(self) -> None:
        stuck = (self.steps < SMALLEST_STEP) & (self.losses < self.limits)
        if bool(stuck.any()):
            below = self.losses - self.noise.progress * self.xp.abs(self.losses)
            self.limits = self.xp.where(stuck, below, self.limits)
            self.steps = self.xp.where(stuck, 1.0, self.steps)
            self.pairs = [(s, y, self.xp.where(stuck, 0.0, r)) for s, y, r in self.pairs]

    def find_directions(self) -> None:
        """Set the descent directions; a problem whose step was refused keeps its own."""
        vectors = self.gradients
        shares: list[Array] = []
        for s, y, r in reversed(self.pairs):
            shares.append(r * _dot(s, vectors))
            vectors = vectors - _spread(shares[-1]) * y
        vectors = self.objective.precondition(vectors, self.curvatures, self.which)
        if self.pairs:
            _, y, r = self.pairs[-1]
            along = r * _dot(y, self.objective.precondition(y, self.curvatures, self.which))
            known = (along <= 0) | (self.xp.abs(along - 1) < SCALE_KNOWN)
            vectors = vectors / _spread(self.xp.where(known, 1.0, along))
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
        slopes = self.steps * _dot(self.gradients, self.directions)
        allowed = DECREASE_NEEDED * slopes + self.noise.rounding * xp.abs(self.losses)
        taken = losses <= self.losses + allowed
        self._remember(points - self.points, gradients - self.gradients, taken)
        # Of the parabola through the loss here, its slope, and the loss there; NaN counts as high.
        rise = losses - self.losses - slopes
        rise = xp.where(rise < float("inf"), rise, float("inf"))
        shrinking = -0.5 * slopes / xp.where(taken, 1.0, rise)
        shrunk = self.steps * xp.clip(shrinking, LARGEST_SHRINKING, 0.5)
        self.points = xp.where(_spread(taken), points, self.points)
        self.gradients = xp.where(_spread(taken), gradients, self.gradients)
        self.losses = xp.where(taken, losses, self.losses)
        self.curvatures = xp.where(taken[:, None], curvatures, self.curvatures)
        self.steps = xp.where(taken, 1.0, shrunk)
        lower = self.losses < self.marks - self.noise.progress * xp.abs(self.marks)
        self.marks = xp.where(lower, self.losses, self.marks)
        self.idle = xp.where(lower, 0, self.idle + 1)

    def _remember(self, s: Array, y: Array, taken: Array) -> None:
        xp = self.xp
        product = _dot(s, y)
        curved = taken & (product > 1e-12 * xp.sqrt(_dot(s, s) * _dot(y, y)))
        inverse = xp.where(curved, 1 / xp.where(curved, product, 1.0), 0.0)
        if not bool(curved.all()):
            # A refused step may hold infinities, which 0 times does not take away.
            s, y = (xp.where(_spread(curved), each, 0.0) for each in (s, y))
        self.pairs = [*self.pairs, (s, y, inverse)][-MEMORY:]


def _dot(a: Array, b: Array) -> Array:
    return (a * b).sum((1, 2))


def _spread(values: Array) -> Array:
    return values[:, None, None]
