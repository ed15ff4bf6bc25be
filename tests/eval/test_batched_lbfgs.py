"""The batched descent on quadratics, whose minimum is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from declip_eval.batched_lbfgs import minimize


class Quadratics:
    """0.5 x'Ax - b'x for several (A, b); only as many as are asked for are computed."""

    def __init__(self, num, size, xp, tolerance=1e-9, exact=False):
        rng = np.random.default_rng(0)
        roots = rng.standard_normal((num, size, size))
        matrices = np.einsum("mij,mkj->mik", roots, roots) + 0.1 * np.eye(size)
        sides = rng.standard_normal((num, 1, size))
        inverses = np.linalg.inv(matrices)
        self.solutions = sides @ inverses
        self.a, self.b, self.inverse = (xp.asarray(each) for each in (matrices, sides, inverses))
        self.tolerance, self.exact, self.asked = tolerance, exact, []

    def evaluate(self, points, which):
        self.asked.append(len(which))
        product = points @ self.a[which]
        losses = (points * (0.5 * product - self.b[which])).sum((1, 2))
        gradients = product - self.b[which]
        return losses, gradients, gradients[:, :, 0] * 0 + 1

    def precondition(self, vectors, curvatures, which):
        return vectors @ self.inverse[which] if self.exact else vectors * 1.0

    def is_solved(self, losses, gradients, decreases):
        return (gradients**2).sum((1, 2)) <= self.tolerance**2


def run(xp, num=4, size=7, limit=500, which=None, **settings):
    problem = Quadratics(num, size, xp, **settings)
    numbers = xp.asarray(np.arange(num) if which is None else which)
    start = xp.asarray(np.zeros((len(numbers), 1, size)))
    return problem, minimize(problem, start, numbers, max_iterations=limit, xp=xp)


@pytest.mark.parametrize("xp", [np, torch])
def test_every_problem_reaches_its_own_minimum(xp):
    problem, found = run(xp)
    assert np.allclose(np.asarray(found.points), problem.solutions, atol=1e-6)
    assert bool(found.converged.all())
    # One that is done is not evaluated again.
    assert sum(problem.asked) == 4 + int(found.num_iterations.sum())


def test_numpy_and_torch_take_the_same_steps():
    ours, theirs = run(np)[1], run(torch)[1]
    assert ours.num_iterations.tolist() == theirs.num_iterations.tolist()
    assert np.allclose(ours.points, theirs.points.numpy(), atol=1e-9)


def test_a_problems_result_does_not_depend_on_its_company():
    alone = run(np, which=[2])[1]
    together = run(np)[1]
    assert alone.num_iterations[0] == together.num_iterations[2]
    assert np.allclose(alone.points[0], together.points[2], atol=1e-9)


def test_the_exact_inverse_as_preconditioner_needs_one_step():
    _, found = run(np, exact=True)
    assert found.num_iterations.tolist() == [1] * 4


def test_the_limit_of_iterations_is_kept_and_told():
    problem, found = run(np, limit=3)
    assert found.num_iterations.tolist() == [3] * 4
    assert not found.converged.any()
    assert len(problem.asked) == 4


def test_an_objective_without_a_way_down_ends():
    class Lying(Quadratics):
        def evaluate(self, points, which):
            losses, gradients, curvatures = super().evaluate(points, which)
            return losses, -gradients - 1, curvatures

    problem = Lying(2, 3, np)
    found = minimize(problem, np.zeros((2, 1, 3)), np.arange(2), max_iterations=1000, xp=np)
    assert not found.converged.any()
    assert found.num_iterations.max() < 1000


def test_points_where_the_loss_is_not_finite_are_stepped_back_from_and_forgotten():
    class Walled(Quadratics):
        """Infinite, with gradients of no number, beyond a wall that the first steps jump over."""

        def evaluate(self, points, which):
            losses, gradients, curvatures = super().evaluate(points, which)
            beyond = np.abs(points).max((1, 2)) > 1.5 * np.abs(self.solutions[which]).max((1, 2))
            gradients[beyond] = np.nan
            return np.where(beyond, np.inf, losses), gradients, curvatures

        def precondition(self, vectors, curvatures, which):
            return vectors * 1e3

    problem = Walled(3, 5, np)
    found = minimize(problem, np.zeros((3, 1, 5)), np.arange(3), max_iterations=500, xp=np)
    assert found.converged.all()
    assert np.allclose(found.points, problem.solutions, atol=1e-6)


def test_a_loss_that_stands_still_ends_the_descent():
    _, found = run(np, tolerance=0.0, limit=5000)
    assert not found.converged.any()
    assert found.num_iterations.max() < 500
