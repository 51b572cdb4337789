"""Conjugate gradients: where they stop, and what the preconditioner learns from them."""

import pytest
import torch

from tests.regression import WEIGHT_DECAY
from torch_softmax.optim import _conjugate_gradients
from torch_softmax.optim._conjugate_gradients import Accuracy, Preconditioner, dot
from torch_softmax.optim._conjugate_gradients import solve as solve_system


def solve(f, v, relative=0.0, absolute=0.0):
    """The Hessian at v, and the solution of a Newton step from there."""
    hessian = f.hessian(f.at(v))
    precondition = Preconditioner(f.moments(), hessian.mean_curvature(), WEIGHT_DECAY, None)
    accuracy = Accuracy(relative, absolute)
    return hessian, solve_system(hessian, f.at(v).gradient, precondition, accuracy)


def test_solver_stops_at_the_residual_asked_for(problem):
    f, v, *_ = problem
    hessian, solution = solve(f, v, absolute=1e-3)
    assert (hessian(solution.u) + f.at(v).gradient).norm() <= 1e-3
    assert solution.products > 1


def test_solver_stops_at_the_part_of_the_residual_asked_for(problem):
    f, v, *_ = problem
    hessian, solution = solve(f, v, relative=0.01)
    precondition = Preconditioner(f.moments(), hessian.mean_curvature(), WEIGHT_DECAY, None)
    gradient = f.at(v).gradient
    residual = hessian(solution.u) + gradient
    before, after = (dot(r, precondition(r)) for r in (gradient, residual))
    assert after <= 0.01**2 * before
    assert solution.products > 1


def test_preconditioner_is_the_inverse_of_what_it_expects(problem, bias):
    f, v, input, _ = problem
    wide = torch.cat([input, torch.ones(len(input), 1)], 1) if bias else input
    expected = 0.3 * wide.t() @ wide / len(wide)
    expected.diagonal()[:64].add_(WEIGHT_DECAY)
    precondition = Preconditioner(f.moments(), 0.3, WEIGHT_DECAY, None)
    u = torch.randn_like(v)
    torch.testing.assert_close(precondition(u @ expected), u, rtol=1e-8, atol=1e-8)
    assert precondition.curvature(u) == pytest.approx(float((u * (u @ expected)).sum()), rel=1e-10)


def test_preconditioner_is_exact_on_what_is_known(problem):
    f, v, *_ = problem
    _, solution = solve(f, v, absolute=0.1)
    precondition = Preconditioner(f.moments(), 1.0, WEIGHT_DECAY, solution.known)
    directions, images = solution.known
    assert len(directions) == solution.products > 1
    for d, Hd in zip(directions, images, strict=True):
        torch.testing.assert_close(precondition(Hd.view_as(v)), d.view_as(v))


def test_solver_keeps_the_latest_directions(problem, monkeypatch):
    f, v, *_ = problem
    every = solve(f, v, absolute=0.1)[1].known.directions
    monkeypatch.setattr(_conjugate_gradients, "_MAX_DIRECTIONS", 2)
    assert torch.equal(solve(f, v, absolute=0.1)[1].known.directions, every[-2:])
