"""softmax: values, derivatives of every order, dtypes, and what surrounds a torch function."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests import reference
from tests.helpers import (
    assert_differentiable,
    assert_identical,
    assert_same,
    errors,
    every_nesting,
    every_order,
    loss_and_gradients,
    randn,
    slope,
    untouched,
)
from torch_softmax.functional import softmax

SHAPES_AND_DIMS = [((3,), 0), ((2, 3), 1), ((2, 3), 0), ((2, 3, 2), -2), ((), 0)]


@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS)
def test_values_and_gradients_are_those_of_torch(shape, dim):
    z = randn(*shape)
    ours = loss_and_gradients(lambda z: softmax(z, dim), z)
    assert_same(ours, loss_and_gradients(lambda z: F.softmax(z, dim), z))


@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS)
def test_first_and_second_derivatives(shape, dim):
    assert_differentiable(lambda z: softmax(z, dim), randn(*shape))


def test_batched_backward_is_that_of_each_gradient():
    z, upstream = randn(2, 3), torch.randn(5, 2, 3, dtype=torch.float64)
    S = softmax(z)
    ours = torch.autograd.grad(S, z, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(S, z, u, retain_graph=True)[0] for u in upstream]
    assert_same(ours[0], torch.stack(each))


def test_default_dimension_is_the_last():
    z = randn(2, 3)
    assert_identical(softmax(z), softmax(z, 1))


def test_jacobian_is_the_closed_form():
    z = randn(4)
    assert_same(torch.func.jacfwd(softmax)(z), reference.softmax_jacobian(z).detach())


@every_nesting
def test_nested_derivatives_are_those_of_the_oracle(modes):
    z = randn(4)
    expected = slope(lambda z: reference.softmax(z)[1], (z,), modes)
    assert_same(slope(lambda z: softmax(z)[1], (z,), modes), expected)


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev])
def test_second_derivatives_by_one_mode_twice(transform):
    z = randn(3)
    ours = transform(transform(softmax))(z)
    assert_same(ours, transform(transform(reference.softmax))(z))


def test_vmap_of_the_gradient_is_that_of_each_element():
    z = randn(4, 3)

    def gradient(z):
        return torch.func.grad(lambda z: softmax(z)[0])(z)

    assert_same(torch.func.vmap(gradient)(z), torch.stack([gradient(row) for row in z]))


def test_vmap_keeps_the_dimension_of_each_element():
    z = randn(4, 3, 2)
    ours = torch.func.vmap(lambda z: softmax(z, 0), in_dims=1, out_dims=1)(z)
    assert_same(ours, softmax(z, 0))


def test_extreme_logits():
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    third = 1 / 3
    torch.testing.assert_close(
        softmax(z), torch.tensor([[1.0, 0.0, 0.0], [third, third, third]]), rtol=1e-6, atol=0
    )


def test_a_logit_of_minus_infinity_has_probability_and_gradient_zero():
    z = torch.tensor([1.0, -math.inf, 2.0], dtype=torch.float64, requires_grad=True)
    value, gradient = loss_and_gradients(softmax, z)
    finite = z.detach()[[0, 2]].requires_grad_()
    expected = torch.zeros(3, dtype=torch.float64)
    expected[[0, 2]] = softmax(finite).detach()
    assert_same(value, expected)
    assert gradient[1] == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_order
def test_error_in_half_precision_is_no_worse_than_that_of_torch(order, dtype):
    def draw():
        return (randn(16, 40, dtype=dtype),)

    ours = errors(softmax, softmax, draw, order)
    theirs = errors(lambda z: F.softmax(z, -1), softmax, draw, order)
    assert (ours <= 1.1 * theirs).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_under_autocast_are_those_of_torch(dtype):
    z = randn(2, 3, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = softmax(z), F.softmax(z, -1)
        (gradient,) = torch.autograd.grad(ours, z, torch.ones_like(ours))
    assert (ours.dtype, gradient.dtype) == (theirs.dtype, dtype)


def test_never_writes_into_its_input():
    z = randn(3, 4).detach().t().requires_grad_()
    check = untouched(z)
    loss_and_gradients(softmax, z)
    check()


def test_backward_twice_is_the_same_to_the_last_bit():
    z = randn(2, 3)
    loss = softmax(z)[:, 0].sum()
    first = torch.autograd.grad(loss, z, retain_graph=True)
    assert_identical(torch.autograd.grad(loss, z), first)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole():
    z = randn(2, 3)
    compiled = torch.compile(softmax, fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(compiled, z), loss_and_gradients(softmax, z))


class Softmax(torch.nn.Module):
    def forward(self, z):
        return softmax(z)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict):
    z = torch.randn(2, 3)
    exported = torch.export.export(Softmax(), (z,), strict=strict).module()
    assert_identical(exported(z), softmax(z))


def test_input_must_be_a_tensor():
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        softmax([1.0, 2.0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_input_must_have_a_floating_point_dtype(dtype):
    with pytest.raises(TypeError, match=f"input must have a floating-point dtype, got {dtype}"):
        softmax(torch.zeros(3, dtype=dtype))


def test_dim_must_exist():
    with pytest.raises(IndexError, match="Dimension out of range"):
        softmax(torch.zeros(2, 3), 2)
