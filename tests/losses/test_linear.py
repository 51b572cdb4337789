"""linear_cross_entropy: values, derivatives of every order, corner cases, dtypes and errors."""

import gc
import itertools
import math
import shutil
import weakref

import pytest
import torch
from torch.nn import functional as F

from tests import reference
from tests.helpers import (
    SECOND_ORDER,
    arguments_of,
    assert_differentiable,
    assert_identical,
    assert_same,
    cast,
    dense_linear_cross_entropy,
    double_gradients,
    errors,
    every_nesting,
    every_option,
    every_order,
    loss_and_gradients,
    options_of,
    randn,
    random_target,
    slope,
    untouched,
    upstream_like,
)
from torch_softmax.functional import linear_cross_entropy

N, D, K = 4, 2, 3
KINDS = ["indices", "ignored", "probabilities"]
CHUNK_SIZES = [1, 3, None]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
every_chunk_size = pytest.mark.parametrize("chunk_size", CHUNK_SIZES)


def problem(kind="indices", bias=True, rows=N, features=D, classes=K):
    """An input, a weight, a target and perhaps a bias, in the order of `applied`."""
    inputs = randn(rows, features), randn(classes, features), random_target(kind, (rows,), classes)
    return (*inputs, randn(classes)) if bias else inputs


def applied(function=linear_cross_entropy, **options):
    """A loss as a function of its tensors alone."""

    def loss(input, linear_weight, target, linear_bias=None):
        return function(input, linear_weight, target, linear_bias=linear_bias, **options)

    return loss


# Values and derivatives.


@every_option
@every_chunk_size
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_torch(
    bias, chunk_size, kind, weighted, label_smoothing, reduction
):
    options = options_of(K, weighted, label_smoothing, reduction)
    inputs = problem(kind, bias)
    ours = loss_and_gradients(applied(chunk_size=chunk_size, **options), *inputs)
    theirs = loss_and_gradients(applied(dense_linear_cross_entropy, **options), *inputs)
    assert_same(ours, theirs)


@every_option
def test_values_and_gradients_are_those_of_the_oracle(kind, weighted, label_smoothing, reduction):
    options = options_of(K, weighted, label_smoothing, reduction)
    inputs = problem(kind)
    ours = loss_and_gradients(applied(chunk_size=3, **options), *inputs)
    assert_same(
        ours, loss_and_gradients(applied(reference.linear_cross_entropy, **options), *inputs)
    )


@every_kind
@every_reduction
@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 1.0}, {"weight": torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)}],
    ids=["all smoothing", "a class of no weight"],
)
def test_options_at_their_bounds(options, reduction, kind):
    inputs = problem(kind, rows=6)
    ours = loss_and_gradients(applied(reduction=reduction, chunk_size=4, **options), *inputs)
    theirs = applied(dense_linear_cross_entropy, reduction=reduction, **options)
    assert_same(ours, loss_and_gradients(theirs, *inputs))


@every_kind
@every_reduction
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 32, 33, 100])
@every_order
def test_any_number_of_classes(order, classes, bias, reduction, kind):
    options = options_of(classes, True, 0.1, reduction)
    inputs = problem(kind, bias, classes=classes)
    theirs = order(applied(dense_linear_cross_entropy, **options), inputs)
    assert_same(order(applied(chunk_size=3, **options), inputs), theirs)


@every_option
@pytest.mark.parametrize(("bias", "chunk_size"), [(False, None), (True, 2)])
def test_first_and_second_derivatives(bias, chunk_size, kind, weighted, label_smoothing, reduction):
    options = options_of(K, weighted, label_smoothing, reduction)
    inputs = problem(kind, bias, rows=3)
    # In full where there are chunks and all of the options, and else along random directions.
    in_full = bias and weighted and label_smoothing > 0
    loss = applied(chunk_size=chunk_size, **options)
    assert_differentiable(loss, *inputs, fast_mode=not in_full)


@every_kind
@every_nesting
def test_nested_derivatives_are_those_of_the_oracle(modes, kind):
    options = options_of(K, True, 0.1, "mean")
    inputs = problem(kind, rows=3)
    expected = slope(applied(reference.linear_cross_entropy, **options), inputs, modes)
    assert_same(slope(applied(chunk_size=2, **options), inputs, modes), expected)


@every_kind
@every_reduction
@every_chunk_size
def test_double_backward_is_that_of_the_oracle(chunk_size, reduction, kind):
    options = options_of(K, True, 0.1, reduction)
    inputs = problem(kind)
    expected = double_gradients(applied(reference.linear_cross_entropy, **options), inputs)
    assert_same(double_gradients(applied(chunk_size=chunk_size, **options), inputs), expected)


@every_kind
@every_nesting
def test_nested_derivatives_of_many_classes_are_those_of_torch(modes, kind):
    inputs = problem(kind, classes=40)
    expected = slope(applied(dense_linear_cross_entropy), inputs, modes)
    assert_same(slope(applied(chunk_size=3), inputs, modes), expected)


@every_nesting
@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (0, 2)], ids=["x", "W", "b", "x and p"])
def test_nested_derivatives_of_some_inputs_alone(wanted, modes):
    inputs = problem("probabilities", rows=3)
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i in wanted)
    expected = slope(applied(reference.linear_cross_entropy), inputs, modes)
    assert_same(slope(applied(chunk_size=2), inputs, modes), expected)


@pytest.mark.parametrize("outer", [torch.func.jacfwd, torch.func.jacrev])
@pytest.mark.parametrize("inner", [torch.func.jacfwd, torch.func.jacrev])
def test_hessian_by_any_two_modes(outer, inner):
    x, W, target = problem(bias=False)
    ours = outer(inner(applied(chunk_size=3), 1), 1)(x, W, target)
    assert_same(ours, torch.func.hessian(dense_linear_cross_entropy, 1)(x, W, target))


def test_hessian_vector_product_of_autograd():
    x, W, target, b = problem()
    directions = tuple(torch.randn_like(t) for t in (x, W, b))

    def product(loss):
        return torch.autograd.functional.hvp(
            lambda x, W, b: loss(x, W, target, b), (x, W, b), directions
        )

    ours = product(applied(chunk_size=3))
    assert_same(ours, product(applied(dense_linear_cross_entropy)))


def test_hessian_of_autograd():
    inputs = problem("probabilities")
    ours = torch.autograd.functional.hessian(applied(chunk_size=3), inputs)
    theirs = torch.autograd.functional.hessian(applied(dense_linear_cross_entropy), inputs)
    assert_same(ours, theirs)


@every_kind
@every_reduction
def test_tangent_in_forward_mode(reduction, kind):
    inputs = problem(kind)

    def tangent(loss):
        with torch.autograd.forward_ad.dual_level():
            duals = [
                torch.autograd.forward_ad.make_dual(i, i.detach().cos()) if i.requires_grad else i
                for i in inputs
            ]
            return torch.autograd.forward_ad.unpack_dual(loss(*duals)).tangent

    ours = tangent(applied(reduction=reduction, chunk_size=3))
    assert_same(ours, tangent(applied(dense_linear_cross_entropy, reduction=reduction)))


@every_kind
def test_vmap_of_the_gradient_of_the_weight_for_each_example(kind):
    x, W, target = problem(kind, bias=False)
    gradient = torch.func.grad(linear_cross_entropy, 1)
    ours = torch.func.vmap(gradient, (0, None, 0))(x, W, target)
    assert_same(ours, torch.stack([gradient(x[n], W, target[n]) for n in range(N)]))


def test_vmap_of_the_gradient_for_each_layer_of_an_ensemble():
    x, _, target = problem(bias=False)
    layers, biases = randn(5, K, D), randn(5, K)
    gradient = torch.func.grad(applied(chunk_size=3), 1)
    ours = torch.func.vmap(gradient, (None, 0, None, 0))(x, layers, target, biases)
    each = [gradient(x, W, target, b) for W, b in zip(layers, biases, strict=True)]
    assert_same(ours, torch.stack(each))


def test_vmap_of_hessian_vector_products():
    x, W, target = problem(bias=False)
    directions = torch.randn(5, K, D, dtype=torch.float64)

    def product(direction):
        gradient = torch.func.grad(lambda W: linear_cross_entropy(x, W, target, chunk_size=3))
        return torch.func.jvp(gradient, (W,), (direction,))[1]

    assert_same(torch.func.vmap(product)(directions), torch.stack([product(d) for d in directions]))


def test_batched_backward_is_refused():
    """Autograd's own vmap, older than torch.func's, passes by a Function's rule for it."""
    x, W, target = problem(bias=False)
    losses = linear_cross_entropy(x, W, target, reduction="none")
    with pytest.raises(RuntimeError, match="vmap"):
        torch.autograd.grad(losses, W, torch.eye(N).double(), is_grads_batched=True)


# Shapes.


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@every_reduction
def test_any_leading_dimensions(reduction, kind, shape):
    inputs = randn(*shape, D), randn(K, D), random_target(kind, shape, K), randn(K)
    ours = loss_and_gradients(applied(reduction=reduction, chunk_size=2), *inputs)
    expected = applied(reference.linear_cross_entropy, reduction=reduction)
    assert_same(ours, loss_and_gradients(expected, *inputs))


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_first_and_second_derivatives_with_leading_dimensions(shape, kind):
    inputs = randn(*shape, D), randn(K, D), random_target(kind, shape, K)
    assert_differentiable(applied(chunk_size=3), *inputs)


def many_outputs_problem(kind, outputs):
    """As `problem`, for a weight (C, *outputs, D)."""
    target = random_target(kind, (N, *outputs), K, class_dim=1)
    return randn(N, D), randn(K, *outputs, D), target, randn(K, *outputs)


@every_option
@pytest.mark.parametrize("outputs", [(2,), (1, 2)])
def test_weight_with_further_dimensions(outputs, kind, weighted, label_smoothing, reduction):
    options = options_of(K, weighted, label_smoothing, reduction)
    inputs = many_outputs_problem(kind, outputs)
    ours = loss_and_gradients(applied(**options), *inputs)
    assert_same(
        ours, loss_and_gradients(applied(reference.linear_cross_entropy, **options), *inputs)
    )


@every_kind
def test_first_and_second_derivatives_of_a_weight_with_further_dimensions(kind):
    assert_differentiable(applied(), *many_outputs_problem(kind, (2,)))


# Chunks.


@every_kind
@every_reduction
@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
def test_chunk_size_does_not_change_loss_or_gradients(chunk_size, reduction, kind):
    inputs = problem(kind, rows=12)
    ours = loss_and_gradients(applied(chunk_size=chunk_size, reduction=reduction), *inputs)
    assert_same(ours, loss_and_gradients(applied(reduction=reduction), *inputs))


@every_kind
@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
@pytest.mark.parametrize(
    "modes", [*SECOND_ORDER, ("backward", "backward", "backward")], ids="-".join
)
def test_chunk_size_does_not_change_higher_derivatives(modes, chunk_size, kind):
    inputs = problem(kind, rows=12)
    ours = slope(applied(chunk_size=chunk_size), inputs, modes)
    assert_same(ours, slope(applied(), inputs, modes))


def test_chunks_that_exceed_a_cache():
    inputs = problem(rows=700, features=3, classes=3000)
    ours = loss_and_gradients(applied(chunk_size=300), *inputs)
    assert_same(ours, loss_and_gradients(applied(dense_linear_cross_entropy), *inputs))


def test_sums_over_mini_batches_divided_by_the_tokens_are_the_gradient_of_one_batch():
    x, W, target = problem("ignored", bias=False, rows=9)
    linear_cross_entropy(x, W, target).backward()
    whole, W.grad = W.grad, None
    tokens = (target != -100).sum()
    for rows in (slice(0, 2), slice(2, 6), slice(6, 9)):
        loss = linear_cross_entropy(x[rows], W, target[rows], reduction="sum") / tokens
        loss.backward()
    assert_same(W.grad, whole)


@pytest.mark.usefixtures("two_threads")
@every_order
def test_two_runs_are_the_same_to_the_last_bit(order):
    inputs = torch.randn(300, 64), torch.randn(2000, 64), torch.randint(2000, (300,))
    inputs = [i.requires_grad_(i.is_floating_point()) for i in inputs]
    loss = applied(chunk_size=128)
    assert_identical(order(loss, inputs), order(loss, inputs))


# Gradients that are asked for, and how often.


@every_reduction
@pytest.mark.parametrize(
    "wanted", [w for n in (1, 2, 3) for w in itertools.combinations(range(4), n)]
)
def test_only_the_gradients_that_are_asked_for(wanted, reduction):
    inputs = problem("probabilities")
    full = loss_and_gradients(applied(reduction=reduction), *inputs)
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i in wanted)
    loss = applied(reduction=reduction)(*inputs)
    loss.backward(upstream_like(loss))
    for i, (tensor, expected) in enumerate(zip(inputs, full[1:], strict=True)):
        assert_same(tensor.grad, expected if i in wanted else None)


@every_kind
@every_reduction
def test_backward_twice_is_the_same_to_the_last_bit(reduction, kind):
    inputs = problem(kind)
    wanted = [i for i in inputs if i.requires_grad]
    loss = applied(reduction=reduction, chunk_size=3)(*inputs)
    upstream = upstream_like(loss)
    first = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    assert_identical(torch.autograd.grad(loss, wanted, upstream), first)
    assert_identical(list(first), kept)


@every_reduction
def test_backward_twice_accumulates(reduction):
    x, W, target = problem(bias=False)
    loss = linear_cross_entropy(x, W, target, reduction=reduction, chunk_size=3)
    (once,) = torch.autograd.grad(loss, W, upstream_like(loss), retain_graph=True)
    loss.backward(upstream_like(loss), retain_graph=True)
    loss.backward(upstream_like(loss))
    assert_identical(W.grad, 2 * once)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_after_double_backward_is_the_same(reduction):
    x, W, target = problem(bias=False)
    loss = linear_cross_entropy(x, W, target, reduction=reduction, chunk_size=3)
    upstream = upstream_like(loss)
    (first,) = torch.autograd.grad(loss, W, upstream, create_graph=True)
    torch.autograd.grad(first.square().sum(), W, retain_graph=True)
    assert_identical(torch.autograd.grad(loss, W, upstream)[0], first.detach())


def test_gradients_one_after_the_other_are_those_of_one_backward():
    x, W, target, b = problem()
    loss = linear_cross_entropy(x, W, target, linear_bias=b, chunk_size=3)
    each = [torch.autograd.grad(loss, t, retain_graph=True)[0] for t in (x, W, b)]
    assert_same(each, list(torch.autograd.grad(loss, (x, W, b))))


def test_a_second_backward_without_retain_graph_is_refused():
    x, W, target = problem(bias=False)
    loss = linear_cross_entropy(x, W, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_loss_frees_what_it_holds_without_the_garbage_collector():
    x, W, target = problem(bias=False)
    held = weakref.ref(x)
    loss = linear_cross_entropy(x, W, target)
    gc.disable()
    try:
        del x, loss
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_the_same(mode):
    x, W, target, b = problem()
    with mode():
        loss = linear_cross_entropy(x, W, target, linear_bias=b)
    assert not loss.requires_grad
    assert_same(loss.clone(), linear_cross_entropy(x, W, target, linear_bias=b).detach())


def test_inside_an_activation_checkpoint():
    inputs = problem()

    def checkpointed(*inputs):
        return torch.utils.checkpoint.checkpoint(applied(), *inputs, use_reentrant=False)

    assert_same(loss_and_gradients(checkpointed, *inputs), loss_and_gradients(applied(), *inputs))


@every_kind
@every_reduction
@pytest.mark.parametrize("chunk_size", [3, None])
def test_never_writes_into_its_inputs(chunk_size, reduction, kind):
    inputs = problem(kind)
    weight = torch.rand(K, dtype=torch.float64)
    check = untouched(*inputs, weight)
    double_gradients(applied(weight=weight, reduction=reduction, chunk_size=chunk_size), inputs)
    check()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_layout_changes_nothing(layout):
    def laid_out(rows, columns):
        base = torch.randn(2 * columns, 2 * rows, dtype=torch.float64)
        return {
            "transposed": base[:columns, :rows].t(),
            "expanded": base[:columns, :1].t().expand(rows, columns),
            "strided": base.t()[::2, ::2],
        }[layout]

    x, W, target = laid_out(N, D), laid_out(K, D), torch.randint(K, (N,))
    contiguous = [t.contiguous().requires_grad_() for t in (x, W)]
    inputs = [t.requires_grad_() for t in (x, W)]
    check = untouched(*inputs)
    ours = loss_and_gradients(applied(chunk_size=3), *inputs, target)
    assert_same(ours, loss_and_gradients(applied(chunk_size=3), *contiguous, target))
    check()


# Corner cases.


@every_reduction
@pytest.mark.parametrize("offset", [-1e4, -50.0, 50.0, 1e4])
def test_bias_far_from_zero(offset, reduction):
    x, W, target, b = problem("probabilities")
    far = (b.detach() + offset * torch.tensor([1, 1, -1])).requires_grad_()
    ours = loss_and_gradients(applied(reduction=reduction, chunk_size=3), x, W, target, far)
    exact = applied(dense_linear_cross_entropy, reduction=reduction)
    assert_same(ours, loss_and_gradients(exact, x, W, target, far))


@every_kind
@every_reduction
def test_extreme_logits(reduction, kind):
    _, W, target, b = problem(kind)
    x = (1e4 * torch.randn(N, D, dtype=torch.float64)).requires_grad_()
    ours = loss_and_gradients(applied(reduction=reduction, chunk_size=3), x, W, target, b)
    exact = applied(dense_linear_cross_entropy, reduction=reduction)
    assert_same(ours, loss_and_gradients(exact, x, W, target, b))


def with_absent_class(kind):
    """A problem, and the same with one class more, whose bias is −∞."""
    x, W, target, b = problem(kind)
    target = target.detach()
    wide_W = F.pad(W.detach(), (0, 0, 0, 1), value=1.0).requires_grad_()
    wide_b = F.pad(b.detach(), (0, 1), value=-math.inf)
    wide_target = F.pad(target, (0, 1)) if kind == "probabilities" else target
    return (x, W, target, b.detach()), (x, wide_W, wide_target, wide_b)


@every_kind
@every_chunk_size
def test_a_class_at_minus_infinity_is_as_good_as_absent(chunk_size, kind):
    narrow, wide = with_absent_class(kind)
    expected_loss, expected_dx, expected_dW = loss_and_gradients(applied(), *narrow)
    loss, dx, dW = loss_and_gradients(applied(chunk_size=chunk_size), *wide)
    assert_same((loss, dx), (expected_loss, expected_dx))
    assert_same(dW, F.pad(expected_dW, (0, 0, 0, 1)))


@every_kind
def test_second_order_beside_a_class_at_minus_infinity(kind):
    narrow, wide = with_absent_class(kind)
    for inputs in (narrow, wide):
        inputs[1].requires_grad_(False)
    expected = double_gradients(applied(), narrow)
    assert_same(double_gradients(applied(chunk_size=3), wide), expected)


ALL_IGNORED = torch.full((N,), -100)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("mean", torch.tensor(math.nan)), ("sum", torch.tensor(0.0)), ("none", torch.zeros(N))],
)
def test_loss_where_all_is_ignored(reduction, expected):
    x, W, _, b = problem()
    loss = linear_cross_entropy(x, W, ALL_IGNORED, linear_bias=b, reduction=reduction)
    torch.testing.assert_close(loss, expected.double(), rtol=0, atol=0, equal_nan=True)


@every_reduction
@every_chunk_size
def test_gradients_where_all_is_ignored_are_zero(chunk_size, reduction):
    x, W, _, b = problem()
    loss = applied(reduction=reduction, chunk_size=chunk_size)
    _, *gradients = loss_and_gradients(loss, x, W, ALL_IGNORED, b)
    assert_identical(gradients, [torch.zeros_like(t) for t in (x, W, b)])


@every_nesting
def test_higher_derivatives_where_all_is_ignored_are_zero(modes):
    x, W, _, b = problem()
    assert slope(applied(chunk_size=3), (x, W, ALL_IGNORED, b), modes) == 0


def test_a_chunk_where_all_is_ignored():
    x, W, _, b = problem()
    target = torch.tensor([-100, -100, 0, 1])
    ours = loss_and_gradients(applied(chunk_size=2), x, W, target, b)
    assert_same(ours, loss_and_gradients(applied(dense_linear_cross_entropy), x, W, target, b))


@pytest.mark.parametrize("ignore_index", [1, -1, 7, None])
def test_ignore_index(ignore_index):
    x, W, _ = problem(bias=False)
    ignored = -100 if ignore_index is None else ignore_index
    target = torch.tensor([0, ignored, 2, ignored])
    ours = loss_and_gradients(applied(ignore_index=ignore_index, chunk_size=3), x, W, target)
    exact = applied(dense_linear_cross_entropy, ignore_index=ignored)
    assert_same(ours, loss_and_gradients(exact, x, W, target))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@every_reduction
def test_empty_batch(reduction, kind, shape):
    x, W, b = randn(*shape, D), randn(K, D), randn(K)
    loss, *gradients = loss_and_gradients(
        applied(reduction=reduction), x, W, random_target(kind, shape, K).detach(), b
    )
    expected = {
        "mean": torch.tensor(math.nan),
        "sum": torch.tensor(0.0),
        "none": torch.zeros(shape),
    }
    torch.testing.assert_close(loss, expected[reduction].double(), equal_nan=True)
    assert_identical(gradients, [torch.zeros_like(t) for t in (x, W, b)])


# Dtypes.


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_class_indices_of_any_integer_dtype(dtype):
    x, W, target = problem(bias=False)
    narrow = loss_and_gradients(applied(chunk_size=3), x, W, target.to(dtype))
    assert_identical(narrow, loss_and_gradients(applied(chunk_size=3), x, W, target))


def test_ignore_index_does_not_wrap_around_in_a_narrow_dtype():
    """−100 is 156 in uint8, where it must not ignore class 156."""
    x, W, _ = problem(bias=False, rows=2, classes=200)
    target = torch.tensor([156, 3])
    narrow = linear_cross_entropy(x, W, target.to(torch.uint8))
    assert_identical(narrow, linear_cross_entropy(x, W, target))


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("narrow", ["input", "linear_weight"])
def test_double_backward_of_mixed_dtypes(narrow, half):
    x, W, target = problem(bias=False)
    dtypes = (half, torch.float32) if narrow == "input" else (torch.float32, half)
    inputs = [t.detach().to(d).requires_grad_() for t, d in zip((x, W), dtypes, strict=True)]
    results = double_gradients(applied(chunk_size=3), (*inputs, target))
    assert tuple(r.dtype for r in results) == dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_order
def test_probabilities_of_another_dtype(order, dtype):
    x, W, target = cast(problem("probabilities", bias=False), torch.float32)
    (other,) = cast([target], dtype)
    ours = order(applied(chunk_size=3), (x, W, other))
    expected = order(applied(chunk_size=3), (x, W, *cast([other], torch.float32)))
    assert ours[-1].dtype == dtype
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2, check_dtype=False)


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("modes", SECOND_ORDER, ids="-".join)
def test_nested_derivatives_in_half_precision(modes, half):
    inputs = cast(problem(), half)
    exact = slope(applied(dense_linear_cross_entropy), cast(inputs, torch.float64), modes)
    ours = slope(applied(chunk_size=3), inputs, modes)
    assert ours.dtype == half
    tolerance = 8 * torch.finfo(half).eps
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("narrow", ["input", "linear_weight"])
def test_mixed_dtypes_are_worked_out_in_the_wider_one(narrow, half):
    x, W, target = (
        randn(N, D, dtype=torch.float32),
        randn(K, D, dtype=torch.float32),
        torch.arange(N) % K,
    )
    with torch.no_grad():
        for tensor in (x, W):
            tensor.copy_(tensor.to(half))
    wide = loss_and_gradients(applied(chunk_size=3), x, W, target)
    narrowed = [t.detach().to(half).requires_grad_() for t in (x, W)]
    mixed = [narrowed[0], W] if narrow == "input" else [x, narrowed[1]]
    loss, dx, dW = loss_and_gradients(applied(chunk_size=3), *mixed, target)
    assert_identical(
        (loss, dx, dW), (wide[0], wide[1].to(mixed[0].dtype), wide[2].to(mixed[1].dtype))
    )


@pytest.fixture(params=["multiplied", "emulated"])
def products_of_halves(request, monkeypatch):
    """A CPU that has products in half precision, and one that has none."""
    emulated = set(HALF) if request.param == "emulated" else set()
    monkeypatch.setattr("torch_softmax.losses._products.EMULATED", emulated)


@pytest.mark.usefixtures("products_of_halves")
@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 12])
@every_order
def test_error_in_half_precision_is_no_worse_than_that_of_torch(
    order, chunk_size, bias, reduction, half
):
    """Of the loss, and of the gradients of the input, of the weight and of the bias."""

    def draw():
        return cast(problem(bias=bias, rows=12, features=16, classes=40), half)

    exact = applied(dense_linear_cross_entropy, reduction=reduction)
    ours = errors(applied(reduction=reduction, chunk_size=chunk_size), exact, draw, order)
    assert (ours <= 1.1 * errors(exact, exact, draw, order)).all()


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("chunk_size", [1, None])
def test_error_of_the_weight_gradient_over_many_rows_in_half_precision(chunk_size, half):
    def draw():
        return cast(problem(bias=False, rows=256, features=8, classes=10), half)

    exact = applied(dense_linear_cross_entropy)
    ours = errors(applied(chunk_size=chunk_size), exact, draw, seeds=range(3))
    assert (ours <= 1.1 * errors(exact, exact, draw, seeds=range(3))).all()


@pytest.mark.parametrize("region", HALF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dtypes_under_autocast_are_those_of_torch(reduction, dtype, region):
    inputs = randn(N, D, dtype=dtype), randn(K, D, dtype=dtype), torch.randint(K, (N,))

    def dtypes(loss):
        with torch.autocast("cpu", region):
            results = loss_and_gradients(loss, *inputs)
        return [result.dtype for result in results]

    ours = dtypes(applied(reduction=reduction, chunk_size=3))
    assert ours == dtypes(applied(dense_linear_cross_entropy, reduction=reduction))


@pytest.mark.parametrize("region", HALF)
@pytest.mark.parametrize("chunk_size", [1, 12])
@every_order
def test_error_under_autocast_is_no_worse_than_that_of_torch(order, chunk_size, region):
    def draw():
        return cast(problem(rows=12, features=16, classes=40), torch.float32)

    def under_autocast(loss):
        def cast(*inputs):
            with torch.autocast("cpu", region):
                return loss(*inputs)

        return cast

    exact = applied(dense_linear_cross_entropy)
    ours = errors(under_autocast(applied(chunk_size=chunk_size)), exact, draw, order)
    assert (ours <= 1.1 * errors(under_autocast(exact), exact, draw, order)).all()


# Compilers.


@pytest.mark.parametrize("kind", ["ignored", "probabilities"])
@every_reduction
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole(reduction, kind):
    options = options_of(K, True, 0.1, reduction)
    inputs = problem(kind)
    loss = applied(chunk_size=3, **options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(compiled, *inputs), loss_and_gradients(loss, *inputs))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole_without_gradients():
    inputs = problem()
    compiled = torch.compile(applied(chunk_size=3), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(*inputs), applied()(*inputs))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole_under_autocast():
    inputs = (
        randn(N, D, dtype=torch.float32),
        randn(K, D, dtype=torch.float32),
        torch.randint(K, (N,)),
    )

    def loss(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(*inputs, chunk_size=3)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_identical(loss_and_gradients(compiled, *inputs), loss_and_gradients(loss, *inputs))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole_for_batches_of_several_sizes():
    compiled = torch.compile(applied(chunk_size=3), fullgraph=True, backend="aot_eager")
    for rows in (4, 5, 7):
        inputs = problem(rows=rows)
        assert_same(loss_and_gradients(compiled, *inputs), loss_and_gradients(applied(), *inputs))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler")
def test_compiles_with_inductor():
    inputs = problem()
    loss = applied(chunk_size=3)
    compiled = torch.compile(loss, fullgraph=True)
    assert_same(loss_and_gradients(compiled, *inputs), loss_and_gradients(loss, *inputs))


class Loss(torch.nn.Module):
    def __init__(self, reduction):
        super().__init__()
        self.linear = torch.nn.Linear(D, K, dtype=torch.float64)
        self.reduction = reduction

    def forward(self, x, target):
        return linear_cross_entropy(
            x,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            reduction=self.reduction,
            chunk_size=3,
        )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_exports(reduction, kind, strict):
    x, _, target = problem(kind, bias=False)
    module = Loss(reduction)
    exported = torch.export.export(module, (x, target), strict=strict).module()
    assert_same(exported(x, target), module(x, target))


# Arguments.


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has no such function")
def test_arguments_are_those_of_torch_and_then_our_own():
    *theirs, options = arguments_of(F.linear_cross_entropy)
    assert options[0] == "options"
    every = arguments_of(linear_cross_entropy)
    assert every[: len(theirs)] == theirs
    assert [name for name, *_ in every[len(theirs) :]] == [
        "chunk_size",
        "dtype",
        "softcap",
        "logit_scale",
        "z_loss",
        "row_weight",
        "count",
    ]


WRONG = {
    "a list for an input": ({"input": [[0.0]]}, TypeError, "input must be a tensor, got list"),
    "an integer input": (
        {"input": torch.zeros(2, 2).long()},
        TypeError,
        "input must have a floating-point dtype, got torch.int64",
    ),
    "an integer weight": (
        {"linear_weight": torch.zeros(3, 2).long()},
        TypeError,
        "linear_weight must have a floating-point dtype, got torch.int64",
    ),
    "a weight of one dimension": (
        {"linear_weight": torch.zeros(2)},
        ValueError,
        r"linear_weight must have at least the two dimensions \(C, D\), got shape \(2,\)",
    ),
    "an input of other features": (
        {"input": torch.zeros(2, 5)},
        ValueError,
        r"input must have a last dimension of 2, as linear_weight has, got shape \(2, 5\)",
    ),
    "a scalar input": (
        {"input": torch.tensor(0.0)},
        ValueError,
        r"input must have a last dimension of 2, as linear_weight has, got shape \(\)",
    ),
    "a single input for a weight with further dimensions": (
        {"input": torch.zeros(2), "linear_weight": torch.zeros(3, 4, 2)},
        ValueError,
        r"input must have the shape \(N, D\) for a linear_weight of more than two dimensions, "
        r"got \(2,\)",
    ),
    "an integer bias": (
        {"linear_bias": torch.zeros(3).long()},
        TypeError,
        "linear_bias must have a floating-point dtype, got torch.int64",
    ),
    "a bias of other classes": (
        {"linear_bias": torch.zeros(4)},
        ValueError,
        r"linear_bias must have shape \(3,\) as linear_weight without D, got \(4,\)",
    ),
    "no classes": (
        {"linear_weight": torch.zeros(0, 2)},
        ValueError,
        "must have at least one class, got none",
    ),
    "a list for a target": ({"target": [0, 1]}, TypeError, "target must be a tensor, got list"),
    "a bool target": (
        {"target": torch.tensor([True, False])},
        TypeError,
        "target must have an integer dtype for class indices or a floating-point dtype for "
        "class probabilities, got torch.bool",
    ),
    "too many class indices": (
        {"target": torch.tensor([0, 1, 2])},
        ValueError,
        r"target must have shape \(2,\) for class indices, got \(3,\)",
    ),
    "floats in the shape of class indices": (
        {"target": torch.zeros(2)},
        ValueError,
        r"target must have shape \(2, 3\) for class probabilities, got \(2,\)",
    ),
    "a label too large": (
        {"target": torch.tensor([0, 3])},
        ValueError,
        r"target must hold class indices in \[0, 3\) or ignore_index=-100, got 3",
    ),
    "a negative label": (
        {"target": torch.tensor([-1, 0])},
        ValueError,
        r"target must hold class indices in \[0, 3\) or ignore_index=-100, got -1",
    ),
    "an unknown reduction": (
        {"reduction": "avg"},
        ValueError,
        "reduction must be 'none', 'mean' or 'sum', got 'avg'",
    ),
    "too much smoothing": (
        {"label_smoothing": 1.5},
        ValueError,
        r"label_smoothing must lie in \[0, 1\], got 1.5",
    ),
    "smoothing that is no number": (
        {"label_smoothing": "0.1"},
        TypeError,
        "label_smoothing must be a float, got '0.1'",
    ),
    "an ignore_index that is no int": (
        {"ignore_index": 1.0},
        TypeError,
        "ignore_index must be an int, got 1.0",
    ),
    "an ignore_index for probabilities": (
        {"target": torch.zeros(2, 3), "ignore_index": -100},
        ValueError,
        "ignore_index must be None for class probabilities, got -100",
    ),
    "too many class weights": (
        {"weight": torch.ones(4)},
        ValueError,
        r"weight must have shape \(3,\) for one weight a class, got \(4,\)",
    ),
    "integer class weights": (
        {"weight": torch.ones(3).long()},
        TypeError,
        "weight must have a floating-point dtype, got torch.int64",
    ),
    "class weights that want a gradient": (
        {"weight": torch.ones(3, requires_grad=True)},
        ValueError,
        "weight must not require a gradient, for the loss gives it none",
    ),
    "a chunk of no rows": (
        {"chunk_size": 0},
        ValueError,
        "chunk_size must be at least 1, got 0",
    ),
    "a chunk of half rows": (
        {"chunk_size": 2.5},
        TypeError,
        "chunk_size must be an int, got 2.5",
    ),
    "a chunk of a bool": (
        {"chunk_size": True},
        TypeError,
        "chunk_size must be an int, got True",
    ),
}


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(wrong, error, message):
    arguments = {
        "input": torch.zeros(2, 2),
        "linear_weight": torch.zeros(3, 2),
        "target": torch.tensor([0, 1]),
        **wrong,
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)
