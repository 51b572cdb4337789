"""The Hessian as an operator: each result is that of the whole matrix in float64."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.curvature.conftest import D, Head, N
from tests.curvature.dense import dense_hessian, flat
from tests.helpers import NewTensors, assert_identical, assert_same, untouched
from tests.scripts.benchmark.test_benchmark import Products
from torch_softmax import SoftmaxRegression
from torch_softmax.curvature import HeadHessian
from torch_softmax.optim import _hessian

every_chunk = pytest.mark.parametrize("chunk_size", [4, None])


def operator(head, **options):
    given, named = head.arguments()
    return HeadHessian(*given, **named, **options)


def matrix(head):
    given, named = head.arguments()
    return dense_hessian(*given, **named)


@pytest.fixture
def plain():
    """A head without a bias, of more rows than a chunk has."""
    return Head(40, bias=False, kind="indices", options={})


@every_chunk
def test_product_with_a_direction(head, chunk_size):
    u = head.direction()
    assert_same(flat(operator(head, chunk_size=chunk_size) @ u), matrix(head) @ flat(u))


@pytest.mark.parametrize("number", [0, 1, 7])
def test_product_with_many_directions(head, number):
    u = head.direction(number)
    assert_same(flat(operator(head, chunk_size=4) @ u), flat(u) @ matrix(head))


def test_diagonal(head):
    assert_same(flat(operator(head, chunk_size=4).diagonal()), matrix(head).diagonal())


def test_trace(head):
    assert_same(operator(head, chunk_size=4).trace(), matrix(head).trace())


def test_factors(head):
    H, (x, W, b) = (
        operator(head, chunk_size=4),
        (head.input, head.linear_weight, head.linear_bias),
    )
    S = F.linear(x, W, b).softmax(1)
    counts, number = torch.ones(N, dtype=torch.float64), N
    if head.target is not None and head.target.is_floating_point():
        counts = head.target.sum(1)
    elif head.target is not None:
        counts = (head.target != -100).double()
        number = int(counts.sum())
    counts = counts * head.options.get("row_weight", 1)
    wide = x if b is None else torch.cat([x, torch.ones(N, 1)], 1)
    jacobians = torch.diag_embed(S) - S[:, :, None] * S[:, None]
    expected = (jacobians * counts[:, None, None]).sum(0)
    if head.options.get("reduction", "mean") == "mean":
        expected = expected / number
    A, B = H.factors()
    assert_same(A, (wide * counts[:, None]).t() @ wide / counts.sum())
    assert_same(B, expected)
    assert_same(H.factors(diagonal=True).classes, expected.diagonal())


def test_chunks_that_no_cache_holds_are_gone_over_in_blocks(head, monkeypatch):
    monkeypatch.setattr(_hessian, "cached_rows", lambda _: 2)
    H, expected, u = operator(head, chunk_size=7), matrix(head), head.direction(3)
    assert_same(flat(H @ u), flat(u) @ expected)
    assert_same(flat(H.diagonal()), expected.diagonal())
    assert_same(H.trace(), expected.trace())
    factors = H.factors()
    monkeypatch.undo()
    assert_same(factors, operator(head).factors())


def test_factors_of_a_single_row_are_exact():
    x, W = torch.randn(1, D, dtype=torch.float64), torch.randn(5, D, dtype=torch.float64)
    A, B = HeadHessian(x, W).factors()
    assert_same(torch.kron(B, A), dense_hessian(x, W))


def test_the_hessian_is_symmetric(head):
    H, u, v = operator(head), head.direction(), head.direction()
    assert_same(flat(H @ u) @ flat(v), flat(H @ v) @ flat(u))


def test_leading_dimensions_are_rows(plain):
    x, W, target = plain.input[:10], plain.linear_weight, plain.target[:10]
    u = plain.direction()
    nested = HeadHessian(x.view(2, 5, D), W, target.view(2, 5)) @ u
    assert_same(nested, HeadHessian(x, W, target) @ u)


def test_an_ignored_row_adds_nothing_whatever_it_holds():
    head = Head(40, bias=True, kind="ignored", options={})
    u, expected = head.direction(), matrix(head)
    row_weight = torch.ones(N, dtype=torch.float64)
    head.input[0] = row_weight[0] = torch.nan
    H = operator(head, row_weight=row_weight, chunk_size=4)
    assert_same(flat(H @ u), expected @ flat(u))
    assert_same(flat(H.diagonal()), expected.diagonal())
    assert_same(H.trace(), expected.trace())
    assert H.factors().input.isfinite().all()


@pytest.mark.parametrize("target", [torch.full((N,), -100), torch.zeros(N, 40)], ids=["", "p"])
def test_rows_that_all_count_for_nothing_have_no_curvature(plain, target):
    H = HeadHessian(plain.input, plain.linear_weight, target)
    for result in (H @ plain.direction(), H.diagonal(), H.trace(), *H.factors()):
        assert not result.any()


def test_weights_that_add_up_to_0_have_no_factors():
    H = HeadHessian(torch.eye(2), torch.zeros(3, 2), row_weight=torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="row_weight must not add up to 0"):
        H.factors()


def test_no_rows_at_all(plain):
    H = HeadHessian(plain.input[:0], plain.linear_weight, weight_decay=2.0)
    u = plain.direction()
    assert_same(H @ u, 2 * u)


def test_a_row_that_is_sure_of_its_class_keeps_its_digits():
    # 1 − S is 2e-9 here, of which S − S² would have no digit in float32.
    x, W = torch.ones(1, 1), torch.tensor([[0.0], [-20.0]])
    expected = dense_hessian(x.double(), W.double()).diagonal()
    torch.testing.assert_close(
        HeadHessian(x, W).diagonal()[1].double(), expected[1:], rtol=1e-6, atol=0
    )


# What an input may be.


def batches_of(head):
    """The same rows in batches of three."""
    parts = [head.input]
    if head.target is not None:
        parts.append(head.target)
        if "row_weight" in head.options:
            parts.append(head.options["row_weight"])
    return DataLoader(TensorDataset(*parts), batch_size=3)


def test_batches_are_a_sum_over_all_of_them(head):
    _, named = head.arguments()
    if head.target is None:
        head.options.pop("row_weight", None)
    named.pop("row_weight", None)
    H = HeadHessian(batches_of(head), head.linear_weight, chunk_size=2, **named)
    u, expected = head.direction(2), matrix(head)
    assert_same(flat(H @ u), flat(u) @ expected)
    assert_same(flat(H.diagonal()), expected.diagonal())
    assert_same(H.trace(), expected.trace())


def test_batches_may_be_tensors(plain):
    u = plain.direction()
    H = HeadHessian(list(plain.input.split(4)), plain.linear_weight)
    assert_same(H @ u, HeadHessian(plain.input, plain.linear_weight) @ u)


def test_batches_that_can_not_be_gone_over_again_are_refused(plain):
    with pytest.raises(ValueError, match="input must hold batches that can be gone over again"):
        HeadHessian(iter(plain.input.split(4)), plain.linear_weight)


def test_batches_of_another_number_of_rows_raise(plain):
    batches = list(plain.input.split(4))
    H = HeadHessian(batches, plain.linear_weight)
    H.trace()
    batches.pop()
    with pytest.raises(ValueError, match="input must give the same rows each time"):
        H.trace()


def test_batches_of_other_rows_raise(plain):
    batches = list(plain.input.split(4))
    H = HeadHessian(batches, plain.linear_weight)
    H.trace()
    batches[0] = batches[0].flip(0) + 1e-3
    with pytest.raises(ValueError, match=r"input must give the same rows .* got others"):
        H.trace()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y, r: (-x, y, r),
        lambda x, y, r: (x.flip(1), y, r),
        lambda x, y, r: (x, y.roll(1), r),
        lambda x, y, r: (x, y, r.roll(1)),
        lambda x, y, r: (x, y, -r),
        lambda x, y, r: (x[[0, 0, 2, 3]], y, r),
    ],
    ids=["signs", "features", "ignored rows", "row weights", "their sign", "another row"],
)
def test_batches_whose_sizes_are_the_same_raise_where_their_rows_are_others(plain, change):
    x, r = plain.input[:4], torch.rand(4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, -100])
    batches = [(x, y, r)]
    H = HeadHessian(batches, plain.linear_weight)
    H.trace()
    batches[0] = change(x, y, r)
    with pytest.raises(ValueError, match=r"input must give the same rows .* got others"):
        H.trace()


def test_batches_may_come_in_any_order(plain):
    rows = TensorDataset(plain.input)
    H = HeadHessian(DataLoader(rows, batch_size=3, shuffle=True), plain.linear_weight)
    assert_same(H.trace(), H.trace())


def test_a_parameter_is_fine_and_results_have_no_gradient(plain):
    model = SoftmaxRegression(D, 5, bias=False, dtype=torch.float64)
    H = HeadHessian(plain.input.requires_grad_(), model.weight)
    for result in (H @ torch.ones(5, D, dtype=torch.float64), H.diagonal(), H.trace()):
        assert not result.requires_grad


def test_a_parameter_is_a_direction_where_no_gradient_is_taken(plain):
    u, H = plain.direction(), operator(plain)
    with torch.no_grad():
        assert_identical(H @ torch.nn.Parameter(u), H @ u)


def test_nothing_given_is_written_to(head):
    given, named = head.arguments()
    u = head.direction(2)
    parts = u if isinstance(u, tuple) else (u,)
    tensors = [*given, *named.values(), *parts]
    check = untouched(*(t for t in tensors if isinstance(t, torch.Tensor)))
    H = operator(head)
    H @ u
    H.diagonal()
    H.trace()
    H.factors()
    check()


@pytest.mark.parametrize("name", ["input", "linear_weight", "target", "linear_bias", "row_weight"])
def test_a_change_in_place_of_what_was_given_raises(name):
    given = {
        "input": torch.randn(N, D),
        "linear_weight": torch.randn(5, D),
        "target": torch.zeros(N, dtype=torch.int64),
        "linear_bias": torch.randn(5),
        "row_weight": torch.rand(N),
    }
    H = HeadHessian(**given)
    H.trace()
    given[name] += 1
    with pytest.raises(RuntimeError, match=f"^{name} must not be changed in place"):
        H.trace()


COPIES = {
    "copy": lambda value: shallow(value),
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": lambda value: saved_and_loaded(value),
}
every_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())


def shallow(value):
    """A copy of an operator, or of each of a tuple, whose tensors are the same."""
    return tuple(map(copy.copy, value)) if isinstance(value, tuple) else copy.copy(value)


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_copy
def test_a_copy_is_the_same_operator(head, copied):
    for tensor in (head.input, head.linear_weight):
        tensor.mul_(1.5)  # so that changes were counted before
    H, u = operator(head), head.direction(2)
    assert_identical(copied(H) @ u, H @ u)


@every_copy
def test_a_change_in_place_of_what_was_copied_raises(copied):
    given = {"input": torch.randn(N, D), "linear_weight": torch.nn.Parameter(torch.randn(5, D))}
    given |= {"target": torch.zeros(N, dtype=torch.int64), "row_weight": torch.rand(N)}
    with torch.no_grad():
        given["linear_weight"].mul_(1.5)
    for name in given:
        H, tensors = copied((HeadHessian(**given), given))
        H.trace()
        with torch.no_grad():
            tensors[name].mul_(1)
        with pytest.raises(RuntimeError, match=rf"^{name} must not be changed"):
            H.trace()


@every_copy
def test_a_change_in_place_before_a_copy_raises(copied):
    W = torch.randn(5, D)
    H = HeadHessian(torch.randn(N, D), W)
    W += 1
    with pytest.raises(RuntimeError, match=r"^linear_weight must not be changed"):
        copied(H).trace()


@pytest.mark.parametrize("changed", [0, 1], ids=["the original", "the copy"])
def test_a_deep_copy_and_its_original_know_nothing_of_one_another(changed):
    W = torch.randn(5, D)
    H = HeadHessian(torch.randn(N, D), W)
    both = (H, W), copy.deepcopy((H, W))
    expected = H.trace()
    both[changed][1].add_(1)
    assert_identical(both[1 - changed][0].trace(), expected)


def test_features_of_a_model_are_watched_and_may_be_copied():
    x = torch.randn(N, D, requires_grad=True).tanh()
    H = HeadHessian(x, torch.randn(5, D))
    assert_identical(copy.deepcopy(H).trace(), H.trace())
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"^input must not be changed"):
        H.trace()


def test_tensors_of_inference_mode_are_fine():
    with torch.inference_mode():
        x, W = torch.randn(N, D), torch.randn(5, D)
        assert_same(HeadHessian(x, W).trace(), HeadHessian(x.clone(), W.clone()).trace())


# Dtypes.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("classes", [5, 40])
def test_low_precision_errs_no_more_than_dense(dtype, classes):
    ours, dense = 0.0, 0.0
    for seed in range(8):
        torch.manual_seed(seed)
        x, W, u = torch.randn(N, D), torch.randn(classes, D), torch.randn(classes, D)
        x, W, u = (t.to(dtype) for t in (x, W, u))
        exact = dense_hessian(x.double(), W.double()) @ u.double().flatten()

        def loss(W, x=x):
            return F.cross_entropy(F.linear(x, W), torch.zeros(N, dtype=torch.int64))

        _, by_dense = torch.func.jvp(torch.func.grad(loss), (W,), (u,))
        by_us = HeadHessian(x, W) @ u
        assert by_us.dtype == torch.float32
        ours += (by_us.flatten() - exact).square().sum()
        dense += (by_dense.flatten() - exact).square().sum()
    assert ours <= 1.2 * dense


def test_an_input_in_float64_makes_results_so(plain):
    H = HeadHessian(plain.input, plain.linear_weight.float())
    assert H.dtype == torch.float64
    assert (H @ plain.direction()).dtype == torch.float64


def test_autocast_changes_nothing(plain):
    u = plain.direction().float()
    H = HeadHessian(plain.input.float(), plain.linear_weight.float())
    expected = H @ u
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(H @ u, expected)


# Memory and products.


@pytest.mark.parametrize(
    ("result", "products"),
    [
        (lambda H, u: H @ u(), 3),
        (lambda H, u: H @ u(7), 15),
        (lambda H, u: H.diagonal(), 2),
        (lambda H, u: H.trace(), 1),
    ],
    ids=["one direction", "seven directions", "diagonal", "trace"],
)
def test_as_many_products_as_are_claimed(plain, result, products):
    H = operator(plain)
    with Products() as counted:
        result(H, plain.direction)
    assert counted.number == products


@pytest.mark.parametrize(
    "result", [lambda H, u: H @ u, lambda H, u: H.diagonal(), lambda H, u: H.trace()]
)
def test_logits_are_held_a_chunk_at_a_time(result):
    rows, classes, chunk = 41, 37, 7
    H = HeadHessian(torch.randn(rows, D), torch.randn(classes, D), chunk_size=chunk)
    with NewTensors() as new:
        result(H, torch.randn(classes, D))
    assert max(new.sizes) == chunk * classes


# What can't be right raises.


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("reduction", "none", ValueError),
        ("weight_decay", -1.0, ValueError),
        ("row_weight", torch.ones(N + 1), ValueError),
        ("row_weight", torch.ones(N).long(), TypeError),
        ("linear_bias", torch.ones(N + 1), ValueError),
        ("chunk_size", 0, ValueError),
        ("ignore_index", 1.5, TypeError),
        ("target", torch.full((N,), 40), ValueError),
        ("target", torch.zeros(N + 1).long(), ValueError),
        ("linear_weight", torch.ones(40, D + 1), ValueError),
        ("linear_weight", torch.ones(40, 2, D), ValueError),
        ("linear_weight", torch.ones(0, D), ValueError),
        ("linear_weight", torch.ones(40, 0), ValueError),
        ("linear_weight", None, TypeError),
        ("input", 3, TypeError),
    ],
)
def test_an_unfit_argument_is_named(plain, name, value, error):
    arguments = {"input": plain.input, "linear_weight": plain.linear_weight, name: value}
    named = "input" if getattr(value, "shape", None) == (40, D + 1) else name
    with pytest.raises(error, match=rf"^{named} must "):
        HeadHessian(**arguments)


@pytest.mark.parametrize("name", ["target", "row_weight"])
def test_what_belongs_to_batches_must_come_with_them(plain, name):
    with pytest.raises(ValueError, match=f"^{name} must come with each batch"):
        HeadHessian([plain.input], plain.linear_weight, **{name: torch.ones(N)})


@pytest.mark.parametrize("batch", [{}, (1, 2, 3, 4), torch.zeros(2, D + 1), torch.zeros(2).long()])
def test_an_unfit_batch_is_named(plain, batch):
    with pytest.raises((TypeError, ValueError), match=r"^input must "):
        HeadHessian([batch], plain.linear_weight).trace()


def test_a_batch_of_a_wider_dtype_is_refused(plain):
    with pytest.raises(TypeError, match="input must have batches of a dtype"):
        HeadHessian([plain.input], plain.linear_weight.float()).trace()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("u", "error"),
    [
        (torch.ones(5, D + 1), ValueError),
        (torch.ones(5 * D), ValueError),
        (torch.ones(5, D).long(), (TypeError, ValueError)),
        ((torch.ones(5, D), torch.ones(4)), ValueError),
        ((torch.ones(2, 5, D), torch.ones(5)), ValueError),
        ((torch.ones(5, D),) * 3, ValueError),
        (torch.ones(5, D, requires_grad=True), ValueError),
        (3, (TypeError, ValueError)),
    ],
)
def test_an_unfit_direction_is_named(u, error, bias):
    H = HeadHessian(torch.ones(2, D), torch.ones(5, D), linear_bias=torch.ones(5) if bias else None)
    with pytest.raises(error, match=r"^a direction must "):
        H @ u


def test_a_transform_is_refused(plain):
    H = operator(plain)
    with pytest.raises(NotImplementedError, match="must be used outside of"):
        torch.func.vmap(lambda u: H @ u)(plain.direction(2))
    with pytest.raises(ValueError, match="must not require a gradient"):
        torch.func.grad(lambda u: (H @ u).sum())(plain.direction())
