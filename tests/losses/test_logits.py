"""cross_entropy: values, derivatives of every order, corner cases, dtypes and errors."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests import reference
from tests.helpers import (
    SECOND_ORDER,
    NewTensors,
    arguments_of,
    assert_differentiable,
    assert_identical,
    assert_same,
    cast,
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
)
from torch_softmax.functional import cross_entropy

N, K = 4, 3
SHAPES = [(N, K), (2, K, 2), (2, K, 1, 2)]
KINDS = ["indices", "ignored", "probabilities"]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def target_for(kind, shape):
    """A target for logits of a shape (N, K, ...)."""
    return random_target(kind, (shape[0], *shape[2:]), shape[1], class_dim=1)


# Values and derivatives.


@every_option
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", [reference.cross_entropy, F.cross_entropy])
def test_values_and_gradients(other, shape, kind, weighted, label_smoothing, reduction):
    options = options_of(K, weighted, label_smoothing, reduction)
    z, target = randn(*shape), target_for(kind, shape)
    ours = loss_and_gradients(lambda z, t: cross_entropy(z, t, **options), z, target)
    assert_same(ours, loss_and_gradients(lambda z, t: other(z, t, **options), z, target))


@every_kind
@every_reduction
@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 1.0}, {"weight": torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)}],
    ids=["all smoothing", "a class of no weight"],
)
def test_options_at_their_bounds(options, reduction, kind):
    z, target = randn(6, K), random_target(kind, (6,), K)
    ours = loss_and_gradients(
        lambda z, t: cross_entropy(z, t, reduction=reduction, **options), z, target
    )
    theirs = loss_and_gradients(
        lambda z, t: F.cross_entropy(z, t, reduction=reduction, **options), z, target
    )
    assert_same(ours, theirs)


def test_where_all_targets_have_no_weight_the_mean_is_nan_and_its_gradient_zero():
    weight = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    z, target = randn(2, K), torch.tensor([0, 0])
    loss, gradient = loss_and_gradients(lambda z, t: cross_entropy(z, t, weight), z, target)
    assert loss.isnan()
    assert_identical(gradient, torch.zeros_like(z))


@every_option
@pytest.mark.parametrize("shape", [(2, K), (2, K, 2)])
def test_first_and_second_derivatives(shape, kind, weighted, label_smoothing, reduction):
    options = options_of(K, weighted, label_smoothing, reduction)
    z, target = randn(*shape), target_for(kind, shape)
    # In full for a plain batch and all of the options, and else along random directions.
    in_full = len(shape) == 2 and weighted and label_smoothing > 0
    assert_differentiable(
        lambda z, t: cross_entropy(z, t, **options), z, target, fast_mode=not in_full
    )


@every_reduction
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_logits_without_a_batch(kind, reduction):
    z, target = randn(K), random_target(kind, (), K)
    ours = loss_and_gradients(lambda z, t: cross_entropy(z, t, reduction=reduction), z, target)
    theirs = loss_and_gradients(lambda z, t: F.cross_entropy(z, t, reduction=reduction), z, target)
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_first_and_second_derivatives_without_a_batch(kind):
    assert_differentiable(cross_entropy, randn(K), random_target(kind, (), K))


@every_kind
@every_nesting
def test_nested_derivatives_are_those_of_the_oracle(modes, kind):
    options = options_of(K, True, 0.1, "mean")
    inputs = randn(2, K), random_target(kind, (2,), K)
    expected = slope(lambda z, t: reference.cross_entropy(z, t, **options), inputs, modes)
    assert_same(slope(lambda z, t: cross_entropy(z, t, **options), inputs, modes), expected)


@every_kind
@every_reduction
def test_double_backward_is_that_of_the_oracle(reduction, kind):
    options = options_of(K, True, 0.1, reduction)
    inputs = randn(2, K), random_target(kind, (2,), K)
    expected = double_gradients(lambda z, t: reference.cross_entropy(z, t, **options), inputs)
    assert_same(double_gradients(lambda z, t: cross_entropy(z, t, **options), inputs), expected)


def test_hessian_is_the_closed_form():
    """The Hessian of one row is diag(S) − S Sᵀ."""
    z = randn(K)
    ours = torch.func.hessian(cross_entropy)(z, torch.tensor(1))
    assert_same(ours, reference.softmax_jacobian(z).detach())


@pytest.mark.parametrize("outer", [torch.func.jacfwd, torch.func.jacrev])
@pytest.mark.parametrize("inner", [torch.func.jacfwd, torch.func.jacrev])
def test_hessian_by_any_two_modes(outer, inner):
    z, target = randn(2, K), torch.tensor([0, 2])
    ours = outer(inner(cross_entropy))(z, target)
    assert_same(ours, torch.func.hessian(F.cross_entropy)(z, target))


def test_hessian_vector_product_of_autograd():
    z, target, v = randn(N, K), torch.randint(K, (N,)), torch.randn(N, K, dtype=torch.float64)
    _, ours = torch.autograd.functional.hvp(lambda z: cross_entropy(z, target), z, v)
    _, theirs = torch.autograd.functional.hvp(lambda z: F.cross_entropy(z, target), z, v)
    assert_same(ours, theirs)


@every_kind
def test_vmap_of_the_gradient_is_that_of_each_element(kind):
    z, target = randn(5, 2, K), random_target(kind, (5, 2), K)
    gradient = torch.func.grad(cross_entropy)
    ours = torch.func.vmap(gradient)(z, target)
    assert_same(ours, torch.stack([gradient(*pair) for pair in zip(z, target, strict=True)]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_over_targets_alone(reduction):
    z, targets = randn(2, K), torch.randint(K, (5, 2))

    def loss(target):
        return cross_entropy(z, target, reduction=reduction)

    assert_same(torch.func.vmap(loss)(targets), torch.stack([loss(t) for t in targets]))


def test_vmap_over_class_weights():
    z, target, weights = randn(2, K), torch.tensor([0, 1]), torch.rand(5, K, dtype=torch.float64)

    def gradient(weight):
        return torch.func.grad(cross_entropy)(z, target, weight)

    assert_same(torch.func.vmap(gradient)(weights), torch.stack([gradient(w) for w in weights]))


def test_vmap_of_vmap():
    z, target = randn(2, 3, 2, K), torch.randint(K, (2, 3, 2))
    ours = torch.func.vmap(torch.func.vmap(torch.func.grad(cross_entropy)))(z, target)
    flat = torch.func.vmap(torch.func.grad(cross_entropy))(z.flatten(0, 1), target.flatten(0, 1))
    assert_same(ours.flatten(0, 1), flat)


def test_vmap_of_the_hessian():
    z, target = randn(4, K), torch.randint(K, (4,))
    ours = torch.func.vmap(torch.func.hessian(cross_entropy))(z, target)
    assert_same(ours, torch.stack([reference.softmax_jacobian(row).detach() for row in z]))


def test_batched_backward_is_refused():
    """autograd's own vmap, older than torch.func's, passes by a Function's rule for it."""
    z, target = randn(2, K), torch.tensor([0, 1])
    losses = cross_entropy(z, target, reduction="none")
    with pytest.raises(RuntimeError, match="vmap"):
        torch.autograd.grad(losses, z, torch.eye(2).double(), is_grads_batched=True)


# Gradients that are asked for, and how often.


@pytest.mark.parametrize("wanted", ["logits", "probabilities"])
def test_only_the_gradient_that_is_asked_for(wanted):
    z, target = randn(N, K), random_target("probabilities", (N,), K)
    z.requires_grad_(wanted == "logits")
    target.requires_grad_(wanted == "probabilities")
    cross_entropy(z, target).backward()
    assert (z.grad is None, target.grad is None) == (wanted != "logits", wanted == "logits")


def test_forward_allocates_less_than_the_logits():
    z, target = randn(2000, 1000), torch.randint(1000, (2000,))
    with NewTensors() as new:
        cross_entropy(z, target)
    assert max(new.sizes) < z.numel()


def test_backward_allocates_one_tensor_of_the_size_of_the_logits():
    z, target = randn(2000, 1000), torch.randint(1000, (2000,))
    loss = cross_entropy(z, target)
    with NewTensors() as new:
        torch.autograd.grad(loss, z)
    assert [size for size in new.sizes if size >= z.numel()] == [z.numel()]


@every_kind
def test_backward_twice_is_the_same_to_the_last_bit(kind):
    z, target = randn(N, K), random_target(kind, (N,), K)
    inputs = [i for i in (z, target) if i.requires_grad]
    loss = cross_entropy(z, target)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [g.clone() for g in first]
    assert_identical(torch.autograd.grad(loss, inputs), first)
    assert_identical(kept, list(first))


def test_no_grad():
    z, target = randn(N, K), torch.randint(K, (N,))
    with torch.no_grad():
        loss = cross_entropy(z, target)
    assert not loss.requires_grad
    assert_identical(loss, cross_entropy(z, target).detach())


@every_kind
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_never_writes_into_its_inputs(layout, kind):
    base = randn(K, N).detach()
    z = {
        "contiguous": base.t().contiguous(),
        "transposed": base.t(),
        "expanded": base[:, :1].t().expand(N, K),
    }[layout].requires_grad_()
    target, weight = random_target(kind, (N,), K), torch.rand(K, dtype=torch.float64)
    inputs = [i for i in (z, target) if i.requires_grad]
    check = untouched(z, target, weight)
    gradients = torch.autograd.grad(cross_entropy(z, target, weight), inputs, create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)
    check()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_layout_changes_nothing(layout):
    base = randn(2 * K, 2 * N).detach()
    z = {
        "transposed": base[:K, :N].t(),
        "expanded": base[:K, :1].t().expand(N, K),
        "strided": base.t()[::2, ::2],
    }[layout]
    target = torch.randint(K, (N,))
    contiguous = z.contiguous().requires_grad_()
    ours = loss_and_gradients(cross_entropy, z.requires_grad_(), target)
    assert_same(ours, loss_and_gradients(cross_entropy, contiguous, target))


@pytest.mark.usefixtures("two_threads")
def test_two_runs_are_the_same_to_the_last_bit():
    z, target = randn(300, 5000, dtype=torch.float32), torch.randint(5000, (300,))
    first = loss_and_gradients(cross_entropy, z, target)
    assert_identical(loss_and_gradients(cross_entropy, z, target), first)


@pytest.mark.parametrize("shape", [(700, 3000), (3, 1_000_000)])
def test_logits_that_exceed_a_cache(shape):
    z, target = randn(*shape), torch.randint(shape[1], (shape[0],))
    ours = loss_and_gradients(cross_entropy, z, target)
    assert_same(ours, loss_and_gradients(F.cross_entropy, z, target))


# Corner cases.


@every_reduction
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype, kind, reduction):
    z = (1e4 * torch.randint(-1, 2, (N, K))).to(dtype).requires_grad_()
    target = random_target(kind, (N,), K)
    if kind == "probabilities":
        target = target.to(dtype).detach().requires_grad_()

    def loss(function, inputs):
        return loss_and_gradients(lambda z, t: function(z, t, reduction=reduction), *inputs)

    ours, exact = (
        loss(cross_entropy, (z, target)),
        loss(F.cross_entropy, cast((z, target), torch.float64)),
    )
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6, check_dtype=False)


def minus_infinity_problem(kind):
    """Logits whose last class has −∞ and no share in the target; and both without that class."""
    finite = randn(2, K).detach()
    z = torch.cat([finite, torch.full((2, 1), -math.inf, dtype=torch.float64)], 1)
    target = random_target(kind, (2,), K).detach()
    wide = target if kind != "probabilities" else F.pad(target, (0, 1))
    return z.requires_grad_(), wide, finite.requires_grad_(), target


@every_kind
def test_a_class_at_minus_infinity_is_as_good_as_absent(kind):
    z, wide, finite, target = minus_infinity_problem(kind)
    loss, gradient = loss_and_gradients(cross_entropy, z, wide)
    expected_loss, expected = loss_and_gradients(cross_entropy, finite, target)
    assert_same(loss, expected_loss)
    assert_same(gradient, F.pad(expected, (0, 1)))


@every_kind
@pytest.mark.parametrize("modes", SECOND_ORDER, ids="-".join)
def test_second_order_beside_a_class_at_minus_infinity(modes, kind):
    _, wide, finite, target = minus_infinity_problem(kind)

    def padded(rows):
        return cross_entropy(F.pad(rows, (0, 1), value=-math.inf), wide)

    expected = slope(lambda rows: cross_entropy(rows, target), (finite,), modes)
    assert_same(slope(padded, (finite,), modes), expected)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("mean", torch.tensor(math.nan)), ("sum", torch.tensor(0.0)), ("none", torch.zeros(2))],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_where_all_is_ignored(weighted, reduction, expected):
    weight = torch.rand(K) if weighted else None
    target = torch.tensor([-100, -100])
    loss = cross_entropy(torch.randn(2, K), target, weight, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)


@every_reduction
def test_gradient_where_all_is_ignored_is_zero(reduction):
    z, target = randn(2, K), torch.tensor([-100, -100])
    _, gradient = loss_and_gradients(
        lambda z, t: cross_entropy(z, t, reduction=reduction), z, target
    )
    assert_identical(gradient, torch.zeros_like(z))


@pytest.mark.parametrize("modes", SECOND_ORDER, ids="-".join)
def test_second_order_where_all_is_ignored_is_zero(modes):
    along = slope(lambda z: cross_entropy(z, torch.tensor([-100, -100])), (randn(2, K),), modes)
    assert along == 0


def test_an_ignored_row_adds_nothing_whatever_it_holds():
    z = torch.tensor([[math.nan, math.inf], [0.0, 0.0]])
    torch.testing.assert_close(cross_entropy(z, torch.tensor([-100, 0])).item(), math.log(2))


def test_ignore_index_within_the_classes():
    z, target = randn(N, K), torch.tensor([0, 1, 2, 1])
    ours = loss_and_gradients(lambda z, t: cross_entropy(z, t, ignore_index=1), z, target)
    theirs = loss_and_gradients(lambda z, t: F.cross_entropy(z, t, ignore_index=1), z, target)
    assert_same(ours, theirs)


@pytest.mark.parametrize("shape", [(0, K), (0, K, 2), (2, K, 0)])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@every_reduction
def test_empty_batch(reduction, kind, shape):
    z, target = randn(*shape), target_for(kind, shape)
    ours = loss_and_gradients(lambda z, t: cross_entropy(z, t, reduction=reduction), z, target)
    theirs = loss_and_gradients(lambda z, t: F.cross_entropy(z, t, reduction=reduction), z, target)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


# Dtypes.


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_class_indices_of_any_integer_dtype(dtype):
    z, target = randn(N, K), torch.randint(K, (N,))
    assert_identical(cross_entropy(z, target.to(dtype)), cross_entropy(z, target))


def test_ignore_index_does_not_wrap_around_in_a_narrow_dtype():
    """−100 is 156 in uint8, where it must not ignore class 156."""
    z, target = randn(2, 200), torch.tensor([156, 3])
    assert_identical(cross_entropy(z, target.to(torch.uint8)), cross_entropy(z, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_order
def test_error_in_half_precision_is_no_worse_than_that_of_torch(order, reduction, dtype):
    def draw():
        return 3 * randn(16, 40, dtype=dtype).detach().requires_grad_(), torch.randint(40, (16,))

    def ours(z, target):
        return cross_entropy(z, target, reduction=reduction, label_smoothing=0.1)

    def theirs(z, target):
        return F.cross_entropy(z, target, reduction=reduction, label_smoothing=0.1)

    error = errors(ours, theirs, draw, order)
    assert (error <= 1.1 * errors(theirs, theirs, draw, order)).all()


@every_kind
@pytest.mark.parametrize("modes", SECOND_ORDER, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nested_derivatives_in_half_precision(dtype, modes, kind):
    x, *rest = cast((randn(N, 2), randn(K, 2), random_target(kind, (N,), K)), dtype)

    def through_a_layer(loss):
        return lambda x, W, t: loss(F.linear(x, W), t)

    exact = slope(through_a_layer(F.cross_entropy), cast((x, *rest), torch.float64), modes)
    ours = slope(through_a_layer(cross_entropy), (x, *rest), modes)
    assert ours.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loss_and_gradient_have_the_dtype_of_the_input(dtype):
    loss, gradient = loss_and_gradients(
        cross_entropy, randn(N, K, dtype=dtype), torch.randint(K, (N,))
    )
    assert (loss.dtype, gradient.dtype) == (dtype, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dtypes_under_autocast_are_those_of_torch(reduction, dtype):
    z, target = randn(N, K, dtype=dtype), torch.randint(K, (N,))

    def dtypes(loss):
        with torch.autocast("cpu", torch.bfloat16):
            results = loss_and_gradients(lambda z, t: loss(z, t, reduction=reduction), z, target)
        return [result.dtype for result in results]

    assert dtypes(cross_entropy) == dtypes(F.cross_entropy)


# Compilers.


@pytest.mark.parametrize("kind", ["ignored", "probabilities"])
@every_reduction
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole(reduction, kind):
    options = options_of(K, True, 0.1, reduction)
    z, target = randn(N, K), random_target(kind, (N,), K)

    def loss(z, target):
        return cross_entropy(z, target, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(compiled, z, target), loss_and_gradients(loss, z, target))


class Loss(torch.nn.Module):
    def forward(self, z, target):
        return cross_entropy(z, target, label_smoothing=0.1)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_exports(kind, strict):
    z, target = randn(N, K), random_target(kind, (N,), K)
    exported = torch.export.export(Loss(), (z, target), strict=strict).module()
    assert_same(exported(z, target), Loss()(z, target))


# Arguments.


def test_arguments_are_those_of_torch_but_for_the_legacy_ones():
    theirs = [a for a in arguments_of(F.cross_entropy) if a[0] not in ("size_average", "reduce")]
    *ours, dtype = arguments_of(cross_entropy)
    assert ours == theirs
    assert dtype[0] == "dtype"


WRONG = {
    "a list for logits": ({"input": [[0.0]]}, TypeError, "input must be a tensor, got list"),
    "integer logits": (
        {"input": torch.zeros(2, 3).long()},
        TypeError,
        "input must have a floating-point dtype, got torch.int64",
    ),
    "a scalar of logits": (
        {"input": torch.tensor(1.0)},
        ValueError,
        "input must have a dimension of classes, got a scalar",
    ),
    "no classes": (
        {"input": torch.zeros(2, 0)},
        ValueError,
        "input must have at least one class, got none",
    ),
    "a list for a target": ({"target": [0, 1]}, TypeError, "target must be a tensor, got list"),
    "a bool target": (
        {"target": torch.tensor([True, False])},
        TypeError,
        "target must have an integer dtype for class indices or a floating-point dtype for "
        "class probabilities, got torch.bool",
    ),
    "a complex target": (
        {"target": torch.zeros(2, 3, dtype=torch.complex64)},
        TypeError,
        r"target must have an integer dtype .* got torch.complex64",
    ),
    "too many class indices": (
        {"target": torch.tensor([0, 1, 2])},
        ValueError,
        r"target must have shape \(2,\) for class indices, got \(3,\)",
    ),
    "class indices with a dimension of classes": (
        {"target": torch.zeros(2, 3).long()},
        ValueError,
        r"target must have shape \(2,\) for class indices, got \(2, 3\)",
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
    "a label that another ignore_index would ignore": (
        {"target": torch.tensor([-100, 5]), "ignore_index": 5},
        ValueError,
        r"target must hold class indices in \[0, 3\) or ignore_index=5, got -100",
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
    "negative smoothing": (
        {"label_smoothing": -0.1},
        ValueError,
        r"label_smoothing must lie in \[0, 1\], got -0.1",
    ),
    "smoothing that is nan": (
        {"label_smoothing": math.nan},
        ValueError,
        r"label_smoothing must lie in \[0, 1\], got nan",
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
}


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(wrong, error, message):
    arguments = {"input": torch.zeros(2, 3), "target": torch.tensor([0, 1]), **wrong}
    with pytest.raises(error, match=message):
        cross_entropy(**arguments)
