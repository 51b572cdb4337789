"""Conjugate gradients: where they stop, and what the preconditioner learns from them."""

import torch

from tests.regression import WEIGHT_DECAY
from torch_softmax.optim import _conjugate_gradients
from torch_softmax.optim._conjugate_gradients import Preconditioner
from torch_softmax.optim._conjugate_gradients import solve as solve_system


def solve(f, v, stop):
    """The Hessian at v, and the solution of a Newton step from there."""
    hessian = f.hessian(v)
    precondition = Preconditioner(f.gram(), hessian.mean_curvature(), WEIGHT_DECAY, None)
    return hessian, solve_system(hessian, f.at(v).gradient, precondition, stop)


def test_solver_stops_at_the_residual_asked_for(problem):
    f, v, *_ = problem
    hessian, solution = solve(f, v, stop=1e-3)
    assert (hessian(solution.u) + f.at(v).gradient).norm() <= 1e-3
    assert solution.products > 1


def test_preconditioner_is_exact_on_what_is_known(problem):
    f, v, *_ = problem
    _, solution = solve(f, v, stop=0.1)
    precondition = Preconditioner(f.gram(), 1.0, WEIGHT_DECAY, solution.known)
    directions, images = solution.known
    assert len(directions) == solution.products > 1
    for d, Hd in zip(directions, images, strict=True):
        torch.testing.assert_close(precondition(Hd.view_as(v)), d.view_as(v))


def test_solver_keeps_the_latest_directions(problem, monkeypatch):
    f, v, *_ = problem
    every = solve(f, v, stop=0.1)[1].known.directions
    monkeypatch.setattr(_conjugate_gradients, "_MAX_DIRECTIONS", 2)
    assert torch.equal(solve(f, v, stop=0.1)[1].known.directions, every[-2:])
