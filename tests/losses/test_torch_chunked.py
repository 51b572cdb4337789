"""Torch's own chunked linear_cross_entropy beside ours, both against its dense form in float64."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import assert_same, dense_linear_cross_entropy, randn
from torch_softmax.functional import linear_cross_entropy

if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
    pytest.skip("torch has no chunked linear_cross_entropy", allow_module_level=True)


def torch_chunked(input, linear_weight, target):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, allow_retain_graph=True)
    return F.linear_cross_entropy(input, linear_weight, target, options=options)


def ours_chunked(input, linear_weight, target):
    return linear_cross_entropy(input, linear_weight, target, chunk_size=2)


def gradient(loss, weight, direction):
    return torch.autograd.grad(loss(weight), weight)[0]


def hessian_vector_product(loss, weight, direction):
    return torch.autograd.functional.hvp(loss, weight, direction)[1]


def hessian(loss, weight, direction):
    return torch.autograd.functional.hessian(loss, weight)


def jvp(loss, weight, direction):
    return torch.func.jvp(loss, (weight,), (direction,))[1]


HIGHER = [hessian_vector_product, hessian, jvp]


@pytest.fixture
def derivative_of(derivative):
    """What a derivative with respect to the weight comes to, for a loss."""
    x, W, target = randn(5, 3), randn(4, 3), torch.randint(4, (5,))
    direction = torch.randn(4, 3, dtype=torch.float64)

    def of(function):
        return derivative(lambda W: function(x, W, target), W, direction).detach()

    return of


@pytest.mark.parametrize("derivative", [gradient, *HIGHER])
def test_ours_is_right(derivative_of):
    assert_same(derivative_of(ours_chunked), derivative_of(dense_linear_cross_entropy))


@pytest.mark.parametrize("derivative", [gradient])
def test_the_gradient_of_torch_is_right(derivative_of):
    assert_same(derivative_of(torch_chunked), derivative_of(dense_linear_cross_entropy))


@pytest.mark.parametrize("derivative", HIGHER)
def test_torch_gives_zero_without_a_word(derivative_of):
    assert derivative_of(dense_linear_cross_entropy).abs().max() > 0.01
    assert derivative_of(torch_chunked).abs().max() == 0
