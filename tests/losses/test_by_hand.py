"""Gradients in closed form of functions of logits, against autograd's of the same functions."""

import math
from itertools import product

import pytest
import torch

from torch_softmax.losses._capped import row_losses, row_losses_by_hand
from torch_softmax.losses._targets import LogitOptions
from torch_softmax.losses.log_prob import row_log_probs, row_log_probs_by_hand

ROWS, CLASSES = 4, 6
OPTIONS = [
    LogitOptions(),
    LogitOptions(softcap=2.0),
    LogitOptions(logit_scale=-0.5),
    LogitOptions(softcap=2.0, logit_scale=1.5, z_loss=0.3),
    LogitOptions(z_loss=0.3),
]

every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def logits(kind):
    z = 3 * float64(ROWS, CLASSES)
    if kind == "far apart":
        z[0, 1], z[1, 0] = 4000.0, -4000.0
    if kind == "masked":
        z[1:, 2] = -math.inf
    return z


def by_autograd(fn, z, others, cotangents):
    leaf = z.clone().requires_grad_()
    values = fn(leaf, *others)
    pairs = [(v, c) for v, c in zip(values, cotangents, strict=True) if c is not None]
    asked, upstream = zip(*pairs, strict=True)
    (gradient,) = torch.autograd.grad(asked, [leaf], upstream)
    return tuple(value.detach() for value in values), gradient


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def check_log_probs(options, z, cotangents):
    label = torch.tensor([0, 1, 5, 3])
    values, gradient = by_autograd(lambda *at: row_log_probs(options, *at), z, (label,), cotangents)
    actual, by_hand = row_log_probs_by_hand(options, z.clone(), label, cotangents=cotangents)
    assert_close((*actual[:-1], by_hand), (*values[:-1], gradient))


def target_of(kind):
    """p, hot, mass, factor, scale and floor of a loss."""
    if kind == "labels":
        return torch.tensor([0, 1, 5, 3]), None, None, None, None, None
    smoothed = (torch.rand(CLASSES, dtype=torch.float64) for _ in range(2))
    rows = (torch.rand(ROWS, dtype=torch.float64) for _ in range(3))
    hot, mass, factor = rows
    factor[2] = 0
    if kind == "smoothed labels":
        return torch.tensor([0, 1, 5, 3]), hot, mass, factor, None, next(smoothed)
    return torch.rand(ROWS, CLASSES, dtype=torch.float64), None, mass, factor, *smoothed


@every_option
@pytest.mark.parametrize("kind", ["labels", "smoothed labels", "probabilities"])
@pytest.mark.parametrize("spread", ["near", "far apart"])
def test_losses(spread, kind, options):
    z, target, cotangents = logits(spread), target_of(kind), (float64(ROWS),)
    values, gradient = by_autograd(lambda *at: row_losses(options, *at), z, target, cotangents)
    actual = row_losses_by_hand(options, z.clone(), *target, cotangents=cotangents)
    assert_close(actual, (values, gradient))


@every_option
@pytest.mark.parametrize("kind", ["labels", "smoothed labels", "probabilities"])
def test_losses_without_a_gradient(kind, options):
    z, target = logits("near"), target_of(kind)
    values, gradient = row_losses_by_hand(options, z.clone(), *target)
    assert_close(values, row_losses(options, z, *target))
    assert gradient is None


@every_option
@pytest.mark.parametrize("spread", ["near", "far apart"])
@pytest.mark.parametrize("asked", [a for a in product([False, True], repeat=3) if any(a)], ids=str)
def test_log_probs(asked, spread, options):
    cotangents = (*(float64(ROWS) if a else None for a in asked), None)
    check_log_probs(options, logits(spread), cotangents)


@pytest.mark.parametrize("options", [LogitOptions(), LogitOptions(logit_scale=0.5)], ids=str)
def test_log_probs_of_a_class_without_a_share(options):
    check_log_probs(options, logits("masked"), (float64(ROWS), float64(ROWS), float64(ROWS), None))


@every_option
def test_log_probs_without_a_gradient(options):
    z, label = logits("near"), torch.tensor([0, 1, 5, 3])
    label[0] = z[0].argmax()
    values, gradient = row_log_probs_by_hand(options, z.clone(), label)
    assert_close(values, row_log_probs(options, z, label))
    assert gradient is None
