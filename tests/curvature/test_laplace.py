"""Variances of logits under the Laplace approximation: those of the whole covariance matrix."""

import math

import pytest
import torch

from tests.curvature.conftest import D, Head
from tests.curvature.dense import dense_hessian
from tests.helpers import NewTensors, assert_same
from torch_softmax.curvature import HeadHessian, predictive_variance
from torch_softmax.curvature.laplace import STRUCTURES

PRECISION = 0.7


@pytest.fixture(params=["mean", "sum"])
def head(request, bias):
    return Head(5, bias, "ignored", {"reduction": request.param})


def operator(head, **options):
    given, named = head.arguments()
    return HeadHessian(*given, **named, **options)


def summed(head):
    """The whole Hessian of the sum of all losses."""
    given, named = head.arguments()
    return dense_hessian(*given, **(named | {"reduction": "sum"}))


def jacobians(head, input):
    """∂z/∂(W, b) of each row, (N, K, P)."""
    eye = torch.eye(5, dtype=torch.float64)
    of_W = torch.einsum("kl,nd->nkld", eye, input).flatten(2)
    return of_W if head.linear_bias is None else torch.cat([of_W, eye.expand(len(input), 5, 5)], 2)


def variance(precision, jacobian):
    """The variances of logits from the precision of the parameters."""
    covariance = torch.linalg.inv(
        precision + PRECISION * torch.eye(len(precision), dtype=torch.float64)
    )
    return torch.einsum("nkp,pq,nkq->nk", jacobian, covariance, jacobian)


def test_diagonal(head):
    x = torch.randn(7, D, dtype=torch.float64)
    expected = variance(summed(head).diagonal().diag(), jacobians(head, x))
    assert_same(predictive_variance(operator(head), x, PRECISION, structure="diagonal"), expected)


@pytest.mark.parametrize("structure", ["kronecker", "kronecker-diagonal"])
@pytest.mark.parametrize("chunk_size", [3, None])
def test_kronecker(head, structure, chunk_size):
    x = torch.randn(7, D, dtype=torch.float64)
    H = operator(head, chunk_size=chunk_size)
    counted = 1 if H.reduction == "sum" else 10
    A, B = H.factors(diagonal=structure == "kronecker-diagonal")
    # The bias of a class is the last column of its rows here, where jacobians has all of W first.
    wide = x if head.linear_bias is None else torch.cat([x, torch.ones(7, 1)], 1)
    jacobian = torch.einsum("kl,nd->nkld", torch.eye(5, dtype=torch.float64), wide).flatten(2)
    expected = variance(torch.kron(B if B.dim() == 2 else B.diag(), A) * counted, jacobian)
    assert_same(predictive_variance(H, x, PRECISION, structure=structure), expected)


def test_kronecker_is_exact_for_one_row():
    x, W = torch.randn(1, D, dtype=torch.float64), torch.randn(5, D, dtype=torch.float64)
    head = Head(5, bias=False, kind="none", options={})
    expected = variance(dense_hessian(x, W), jacobians(head, head.input))
    assert_same(predictive_variance(HeadHessian(x, W), head.input, PRECISION), expected)


def test_leading_dimensions_stay(head):
    x, H = torch.randn(2, 3, D, dtype=torch.float64), operator(head)
    expected = predictive_variance(H, x.flatten(0, 1), PRECISION).view(2, 3, 5)
    assert_same(predictive_variance(H, x, PRECISION), expected)
    assert predictive_variance(H, x[:, :0], PRECISION).shape == (2, 0, 5)


def test_one_row_needs_no_dimension_of_its_own(head):
    x, H = torch.randn(D, dtype=torch.float64), operator(head)
    assert_same(predictive_variance(H, x, PRECISION), predictive_variance(H, x[None], PRECISION)[0])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_negative_row_weights_are_refused(structure):
    H = HeadHessian(torch.ones(2, D), torch.ones(5, D), row_weight=torch.tensor([2.0, -1.0]))
    with pytest.raises(ValueError, match="hessian must have row weights of at least 0"):
        predictive_variance(H, torch.ones(2, D), PRECISION, structure=structure)


def test_rows_that_are_not_finite_are_refused():
    H = HeadHessian(torch.full((2, D), math.nan), torch.ones(5, D))
    with pytest.raises(ValueError, match="hessian must be of finite rows"):
        predictive_variance(H, torch.ones(2, D), PRECISION)


@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
def test_no_jacobian_is_made(structure):
    H = HeadHessian(torch.randn(50, 6), torch.randn(17, 6))
    with NewTensors() as new:
        predictive_variance(H, torch.randn(50, 6), PRECISION, structure=structure)
    assert max(new.sizes) <= 50 * 17


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("hessian", torch.eye(5), TypeError),
        ("hessian", HeadHessian(torch.ones(2, D), torch.ones(5, D), weight_decay=1.0), ValueError),
        ("input", torch.ones(2, D + 1), ValueError),
        ("prior_precision", 0.0, ValueError),
        ("structure", "full", ValueError),
    ],
)
def test_an_unfit_argument_is_named(name, value, error):
    arguments = {
        "hessian": HeadHessian(torch.ones(2, D), torch.ones(5, D)),
        "input": torch.ones(2, D),
        "prior_precision": 1.0,
        name: value,
    }
    with pytest.raises(error, match=rf"^{name} must "):
        predictive_variance(**arguments)
