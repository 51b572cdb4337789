"""The objective of softmax regression: value, gradient and Hessian are those of autograd."""

import pytest
import torch
from torch.autograd.functional import hvp
from torch.nn import functional as F

from tests.regression import CLASSES, WEIGHT_DECAY
from torch_softmax.optim import _hessian
from torch_softmax.optim._objective import Objective


def plain_objective(input, target, bias):
    def function(v):
        W, b = (v[:, :-1], v[:, -1]) if bias else (v, None)
        penalty = 0.5 * WEIGHT_DECAY * W.square().sum()
        return F.cross_entropy(F.linear(input, W, b), target) + penalty

    return function


def test_hessian_product_is_that_of_autograd(problem, bias):
    f, v, input, target = problem
    u = torch.randn_like(v)
    expected = hvp(plain_objective(input, target, bias), v, u)[1]
    torch.testing.assert_close(f.hessian(f.at(v))(u), expected, rtol=1e-11, atol=1e-13)


def test_hessian_product_is_the_difference_of_gradients(problem):
    f, v, *_ = problem
    u = torch.randn_like(v)
    step = 1e-6
    difference = f.at(v + step * u).gradient - f.at(v - step * u).gradient
    torch.testing.assert_close(f.hessian(f.at(v))(u), difference / (2 * step), rtol=0, atol=1e-8)


@pytest.mark.parametrize("count", [1, 256, 511, 1442])
def test_pieces_change_no_product(problem, count, bias, monkeypatch, two_threads):
    _, v, input, target = problem
    monkeypatch.setattr(_hessian, "_CACHED_INPUT", 1)  # 256 rows for each of two threads
    f = Objective(input[:count], target[:count], CLASSES, WEIGHT_DECAY, bias)
    u = torch.randn_like(v)
    expected = hvp(plain_objective(input[:count], target[:count], bias), v, u)[1]
    torch.testing.assert_close(f.hessian(f.at(v))(u), expected, rtol=1e-11, atol=1e-13)


def test_mean_curvature_is_the_mean_eigenvalue(problem):
    f, v, input, target = problem
    W, b = f.split(v)
    logits = F.linear(input, W, b)
    mass = target.sum(1) if target.is_floating_point() else torch.ones(len(target))
    S = torch.softmax(logits, 1)
    mean = ((torch.diag_embed(S) - S[:, :, None] * S[:, None]) * mass[:, None, None]).mean(0)
    expected = torch.linalg.eigvalsh(mean)[1:].mean().item()
    assert f.hessian(f.at(v)).mean_curvature() == pytest.approx(expected, rel=1e-10)


def test_moments_are_those_of_the_input(problem, bias):
    f, _, input, _ = problem
    mean, second, _ = f.moments()
    about = input.mean(0) if bias else torch.zeros(64)
    torch.testing.assert_close(
        second, (input - about).t() @ (input - about) / len(input), rtol=1e-12, atol=1e-14
    )
    if bias:
        torch.testing.assert_close(mean, about, rtol=1e-13, atol=0)
    else:
        assert mean is None


def test_moments_about_a_large_mean_are_not_lost_in_rounding():
    input = torch.randn(500, 3, dtype=torch.float64) + 2000
    f = Objective(input.float(), torch.zeros(500).long(), 2, 0.0, bias=True)
    expected = torch.cov(input.float().double().t(), correction=0)
    torch.testing.assert_close(f.moments().second.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_wide_products_are_those_of_the_same_numbers_in_float64(problem, bias, weighted):
    _, v, input, target = problem
    input, target = input.float(), target.float() if target.is_floating_point() else target
    weight = torch.randint(1, 4, (len(input),)).double() if weighted else None
    wide = Objective(input, target, CLASSES, WEIGHT_DECAY, bias, weight).wide().at(v)
    exact = Objective(input.double(), target, CLASSES, WEIGHT_DECAY, bias, weight).at(v)
    assert wide.value == pytest.approx(exact.value, rel=1e-7 if weighted else 1e-14)
    torch.testing.assert_close(
        wide.gradient, exact.gradient, rtol=0, atol=1e-7 if weighted else 1e-15
    )
