"""The objective of softmax regression: value, gradient and Hessian are those of autograd."""

import pytest
import torch
from torch.autograd.functional import hvp
from torch.nn import functional as F

from tests.regression import WEIGHT_DECAY
from torch_softmax.losses import _objective
from torch_softmax.losses._objective import Objective


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
    torch.testing.assert_close(f.hessian(v)(u), expected, rtol=1e-11, atol=1e-13)


def test_hessian_product_is_the_difference_of_gradients(problem):
    f, v, *_ = problem
    u = torch.randn_like(v)
    step = 1e-6
    difference = f.at(v + step * u).gradient - f.at(v - step * u).gradient
    torch.testing.assert_close(f.hessian(v)(u), difference / (2 * step), rtol=0, atol=1e-8)


@pytest.mark.parametrize("count", [1, 256, 511, 1442])
def test_pieces_change_no_product(problem, count, bias, monkeypatch, two_threads):
    _, v, input, target = problem
    monkeypatch.setattr(_objective, "_CACHED_INPUT", 1)  # 256 rows for each of two threads
    f = Objective(input[:count], target[:count], WEIGHT_DECAY, bias)
    u = torch.randn_like(v)
    expected = hvp(plain_objective(input[:count], target[:count], bias), v, u)[1]
    torch.testing.assert_close(f.hessian(v)(u), expected, rtol=1e-11, atol=1e-13)


def test_mean_curvature_is_the_mean_eigenvalue(problem):
    f, v, input, target = problem
    logits = f.examples.logits(v, input.unsqueeze(0))[0].t()
    mass = target.sum(1) if target.is_floating_point() else torch.ones(len(target))
    S = torch.softmax(logits, 1)
    mean = ((torch.diag_embed(S) - S[:, :, None] * S[:, None]) * mass[:, None, None]).mean(0)
    expected = torch.linalg.eigvalsh(mean)[1:].mean().item()
    assert f.hessian(v).mean_curvature() == pytest.approx(expected, rel=1e-10)


def test_gram_is_that_of_the_input_with_ones(problem, bias):
    f, _, input, _ = problem
    wide = torch.cat([input, torch.ones(len(input), 1)], 1) if bias else input
    torch.testing.assert_close(f.gram(), wide.t() @ wide / len(wide), rtol=1e-12, atol=1e-14)
