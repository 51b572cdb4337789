"""Linear systems and spectra: those of the whole matrix."""

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.curvature.conftest import D, Head
from tests.curvature.dense import dense_hessian, flat
from tests.helpers import NewTensors, assert_identical
from tests.scripts.benchmark.test_benchmark import Products
from torch_softmax._checks import UserError
from torch_softmax.curvature import HeadHessian, _scipy
from torch_softmax.optim import _hessian


@pytest.fixture(params=[5, 40], ids=["few classes", "many classes"])
def problem(request, bias):
    """An operator, its matrix, and the head they are of."""
    head = Head(request.param, bias, "ignored", {"weight_decay": 0.1})
    given, named = head.arguments()
    return HeadHessian(*given, chunk_size=4, **named), dense_hessian(*given, **named), head


@pytest.mark.parametrize("number", [(), (1,), (4,)], ids=str)
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_solution_is_that_of_the_matrix(problem, number, damping):
    H, matrix, head = problem
    g = head.direction(*number)
    u = flat(H.solve(g, damping, tolerance=1e-10))
    expected = flat(g) @ torch.linalg.inv(
        matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    )
    torch.testing.assert_close(u, expected, rtol=1e-6, atol=1e-7)


def test_every_residual_is_within_the_tolerance_of_its_own_right_side(problem):
    H, matrix, head = problem
    sizes = torch.tensor([1e-6, 1.0, 1e6, 0.0], dtype=torch.float64)
    g = head.direction(4)
    for part in g if isinstance(g, tuple) else (g,):
        part.mul_(sizes.view(-1, *(1,) * (part.dim() - 1)))
    u = flat(H.solve(g, 0.01, tolerance=1e-3))
    residuals = (u @ (matrix + 0.01 * torch.eye(len(matrix), dtype=torch.float64)) - flat(g)).norm(
        dim=1
    )
    assert (residuals <= 1.001e-3 * flat(g).norm(dim=1)).all()
    assert not u[3].any()


@pytest.fixture
def steps(monkeypatch):
    """A list that has grown by one for each product."""
    counted, multiply = [], HeadHessian._products
    monkeypatch.setattr(
        HeadHessian, "_products", lambda *args: counted.append(0) or multiply(*args)
    )
    return counted


def test_damping_helps_however_differently_features_are_scaled(steps):
    x = torch.randn(60, 8, dtype=torch.float64) * torch.logspace(-2, 2, 8, dtype=torch.float64)
    H = HeadHessian(x, torch.randn(4, 8, dtype=torch.float64) / 10, weight_decay=0.1)
    H.solve(torch.randn(4, 8, dtype=torch.float64), 1e5, tolerance=1e-6)
    assert len(steps) < 10  # where 20 are too few for a preconditioner that does not know of it


def test_rows_far_from_0_take_no_more_steps(steps):
    x, W = torch.randn(60, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64) / 10
    b, numbers = torch.zeros(4, dtype=torch.float64), []
    for far in (0, 100):
        steps.clear()
        H = HeadHessian(x + far, W, linear_bias=b, weight_decay=0.1)
        H.solve((W.cos(), b.cos()), 1e-3, tolerance=1e-6)
        numbers.append(len(steps))
    near, far_off = numbers
    assert far_off < 1.5 * near


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_right_side_whose_squares_leave_float32_is_solved(size):
    H = HeadHessian(torch.randn(30, D), torch.randn(4, D), weight_decay=0.1)
    g = torch.randn(4, D)
    torch.testing.assert_close(H.solve(size * g) / size, H.solve(g), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_right_side_that_is_not_finite_raises(value):
    g = torch.ones(5, D)
    g[1, 2] = value
    with pytest.raises(ValueError, match="g must hold finite numbers"):
        HeadHessian(torch.ones(2, D), torch.ones(5, D)).solve(g, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("bias", [None, torch.zeros(5)], ids=["no bias", "bias"])
def test_rows_whose_squares_are_not_finite_raise(value, bias):
    x, g = torch.ones(2, D), torch.ones(5, D)
    x[1, 2] = value
    H = HeadHessian(x, torch.zeros(5, D), linear_bias=bias)
    with pytest.raises(ValueError, match=r"whose products are finite in torch\.float32"):
        H.solve(g if bias is None else (g, torch.ones(5)), 1.0)


def test_a_gradient_needs_no_damping():
    x, W = torch.randn(30, D, dtype=torch.float64), torch.randn(4, D, dtype=torch.float64)
    H = HeadHessian(x, W)
    g = H @ torch.randn(4, D, dtype=torch.float64)  # what lies in the range of H
    assert (H @ H.solve(g, tolerance=1e-8) - g).norm() <= 1.001e-8 * g.norm()


def test_a_system_without_a_solution_raises():
    x, W = torch.randn(30, D, dtype=torch.float64), torch.randn(4, D, dtype=torch.float64)
    with pytest.raises(UserError, match="damping must be larger"):
        HeadHessian(x, W).solve(torch.ones(4, D, dtype=torch.float64))


def test_a_matrix_that_is_not_definite_raises():
    x, W = torch.randn(30, D, dtype=torch.float64), torch.randn(4, D, dtype=torch.float64)
    H = HeadHessian(x, W, row_weight=torch.linspace(-1, 0.5, 30))
    with pytest.raises(UserError, match="damping must be larger"):
        H.solve(torch.randn(4, D, dtype=torch.float64), 1e-3, tolerance=1e-8)


@pytest.mark.parametrize(
    ("name", "value"), [("damping", -1.0), ("tolerance", 0.0), ("g", torch.ones(3))]
)
def test_an_unfit_argument_is_named(name, value):
    H = HeadHessian(torch.ones(2, D), torch.ones(5, D))
    with pytest.raises(ValueError, match=rf"^{name} must "):
        H.solve(**{"g": torch.ones(5, D), name: value})


# What is held meanwhile.


def solution(H, g):
    return H.solve(g, 0.01, tolerance=1e-8)


def spectrum(H, g):
    pytest.importorskip("scipy")
    return H.eigenvalues(3)


every_system = pytest.mark.parametrize("of", [solution, spectrum])


def in_chunks(head):
    """An operator that may hold S, of a head whose rows are not all in the same chunk."""
    given, named = head.arguments()
    H = HeadHessian(*given, **named)
    H.layout = replace(H.layout, step=4)
    return H


@every_system
@pytest.mark.parametrize("rows", [0, 5, 9, 100])
@pytest.mark.parametrize("cached", [2, 100], ids=["in blocks", "at once"])
def test_what_is_held_changes_no_digit(problem, of, rows, cached, monkeypatch):
    H, _, head = problem
    monkeypatch.setattr(_hessian, "cached_rows", lambda _: cached)
    monkeypatch.setattr("torch_softmax.curvature.hessian.rows_to_hold", lambda *_: rows)
    g = head.direction(2)
    assert_identical(of(in_chunks(head), g), of(H, g))


@pytest.mark.parametrize(("rows", "chunks_made"), [(100, 0), (9, 1), (3, 3)])
def test_a_product_makes_only_what_is_not_held(problem, rows, chunks_made, monkeypatch):
    H, _, head = problem
    monkeypatch.setattr("torch_softmax.curvature.hessian.rows_to_hold", lambda *_: rows)
    H = in_chunks(head)
    held, u = H._to_hold(), H.layer._replace(W=H.layer.W[None], b=None)
    u = u if H.layer.b is None else u._replace(b=H.layer.b[None])
    with Products() as first:
        H._products(u, held)
    with Products() as next_one:
        H._products(u, held)
    assert first.number == 3 * 3
    assert next_one.number == 2 * 3 + chunks_made


@every_system
def test_a_step_takes_two_products_of_the_layer(problem, of, steps):
    _, _, head = problem
    given, named = head.arguments()
    g, numbers = head.direction(), []
    for chunk_size in (None, len(head.input)):
        H = HeadHessian(*given, **named, chunk_size=chunk_size)
        steps.clear()
        with Products() as counted:
            of(H, g)
        numbers.append(counted.number)
    held, not_held = numbers
    # All make the logits once: the trace that a system starts with, or the first step.
    assert not_held - held == len(steps) - (of is spectrum)


@every_system
def test_nothing_is_held_afterwards(problem, of, monkeypatch):
    _, _, head = problem
    made = []

    class Held(_hessian.Held):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr("torch_softmax.curvature.hessian.Held", Held)
    of(in_chunks(head), head.direction())
    gc.collect()
    assert [ref() for ref in made] == [None]


@every_system
def test_a_given_chunk_size_is_all_that_is_held(of):
    rows, classes, chunk = 41, 37, 7
    x, W, g = (torch.randn(n, D, dtype=torch.float64) for n in (rows, classes, classes))
    H = HeadHessian(x, W, chunk_size=chunk)
    with NewTensors() as new:
        of(H, g)
    assert max(new.sizes) == chunk * classes


def test_batches_in_another_order_each_time_are_solved(problem):
    _, matrix, head = problem
    rows = DataLoader(TensorDataset(head.input, head.target), batch_size=3, shuffle=True)
    H = HeadHessian(rows, head.linear_weight, linear_bias=head.linear_bias, **head.options)
    g = head.direction()
    u = flat(H.solve(g, 0.5, tolerance=1e-10))
    damped = matrix + 0.5 * torch.eye(len(matrix), dtype=torch.float64)
    torch.testing.assert_close(u, torch.linalg.solve(damped, flat(g)), rtol=1e-6, atol=1e-7)


# SciPy


def test_linear_operator_is_the_matrix(problem):
    pytest.importorskip("scipy")
    H, matrix, _ = problem
    operator = H.as_linear_operator()
    assert operator.shape == H.shape == tuple(matrix.shape)
    identity = torch.eye(len(matrix), dtype=torch.float64).numpy()
    for product in (operator @ identity, operator.H @ identity):
        torch.testing.assert_close(torch.from_numpy(product), matrix, rtol=1e-12, atol=1e-12)
    column = torch.from_numpy(operator @ identity[:, 2])
    torch.testing.assert_close(column, matrix[2], rtol=1e-12, atol=1e-12)


def test_eigenvalues_are_the_largest_of_the_matrix(problem):
    pytest.importorskip("scipy")
    H, matrix, _ = problem
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:4]
    torch.testing.assert_close(H.eigenvalues(4), expected, rtol=1e-9, atol=0)


def test_eigenvalues_are_the_largest_where_those_below_0_are_larger_in_size():
    pytest.importorskip("scipy")
    x, W = torch.randn(30, D, dtype=torch.float64), torch.randn(4, D, dtype=torch.float64)
    weight = torch.where(torch.arange(30) % 3 == 0, 1.0, -1.0).double()
    expected = torch.linalg.eigvalsh(dense_hessian(x, W, row_weight=weight)).flip(0)
    assert -expected[-1] > expected[0] > 0
    values = HeadHessian(x, W, row_weight=weight).eigenvalues(2)
    torch.testing.assert_close(values, expected[:2], rtol=1e-9, atol=0)


def test_eigenvalues_are_the_same_each_time(problem):
    pytest.importorskip("scipy")
    H, *_ = problem
    assert torch.equal(H.eigenvalues(3), H.eigenvalues(3))


def test_eigenvalues_of_a_matrix_of_zeros_are_0():
    pytest.importorskip("scipy")
    assert HeadHessian(torch.zeros(2, D), torch.ones(5, D)).eigenvalues(3).tolist() == [0, 0, 0]


def test_a_matrix_that_is_not_finite_has_no_eigenvalues():
    pytest.importorskip("scipy")
    H = HeadHessian(torch.full((2, D), math.nan), torch.ones(5, D))
    with pytest.raises(ValueError, match="Hessian must be of finite rows"):
        H.eigenvalues(3)


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (5 * D, ValueError), (1.5, TypeError)])
def test_an_unfit_number_of_eigenvalues_is_named(k, error):
    with pytest.raises(error, match=r"^k must be"):
        HeadHessian(torch.ones(2, D), torch.ones(5, D)).eigenvalues(k)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(_scipy, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs scipy: pip install \"torch_softmax\[curvature\]\""):
        HeadHessian(torch.ones(2, D), torch.ones(5, D)).eigenvalues(1)
