"""A student's distance from a teacher, against torch's dense functions."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import assert_differentiable, assert_same, randn
from torch_softmax.functional import linear_distillation

N, D, E = 7, 3, 4

every_reduction = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
every_size = pytest.mark.parametrize("classes", [1, 5, 40])
every_divergence = pytest.mark.parametrize(
    "options",
    [
        {"divergence": "forward"},
        {"divergence": "reverse", "temperature": 2.0},
        {"divergence": "jsd", "beta": 0.3, "temperature": 0.5},
    ],
    ids=lambda options: options["divergence"],
)


def written_out(x, W, tx, tW, b=None, tb=None, mask=None, reduction="mean", **options):
    T, beta = options.get("temperature", 1.0), options.get("beta", 0.5)
    q, p = (F.softmax(F.linear(*layer) / T, -1) for layer in ((x, W, b), (tx, tW, tb)))
    m = beta * p + (1 - beta) * q

    def kl(p, q):
        return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)

    divergence = (
        T**2
        * {
            "forward": lambda: kl(p, q),
            "reverse": lambda: kl(q, p),
            "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        }[options["divergence"]]()
    )
    if mask is not None:
        divergence = torch.where(mask, divergence, 0)
    count = divergence.numel() if mask is None else mask.sum()
    total = divergence.sum()
    return {"none": divergence, "sum": total, "mean": total / count}[reduction]


def problem(classes, *shape):
    """The student's x, W and b, and the teacher's."""
    shape = shape or (N,)
    student = randn(*shape, D), randn(classes, D), randn(classes)
    return *student, randn(*shape, E), randn(classes, E), randn(classes)


def ours(x, W, b, tx, tW, tb, **options):
    return linear_distillation(
        x, W, tx, tW, linear_bias=b, teacher_bias=tb, chunk_size=3, **options
    )


def dense(x, W, b, tx, tW, tb, **options):
    return written_out(x, W, tx, tW, b, tb, **options)


@every_reduction
@every_divergence
@every_size
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradients(masked, classes, options, reduction):
    inputs = problem(classes)
    mask = torch.arange(N) % 3 > 0 if masked else None
    results = [f(*inputs, mask=mask, reduction=reduction, **options) for f in (ours, dense)]
    assert_same(*results)
    upstream = torch.randn_like(results[0])
    assert_same(*(torch.autograd.grad(r, inputs, upstream) for r in results))


@every_reduction
@every_divergence
def test_derivatives_to_second_order_in_either_mode(options, reduction):
    def function(*inputs):
        return ours(*inputs, reduction=reduction, **options)

    assert_differentiable(function, *problem(5, 4), fast_mode=True)


@every_divergence
@pytest.mark.parametrize("masked", [False, True])
def test_leading_dimensions_are_those_of_the_result(masked, options):
    inputs = problem(5, 2, 3)
    mask = torch.tensor([[True, False, True], [False, True, True]]) if masked else None
    assert_same(*(f(*inputs, mask=mask, reduction="none", **options) for f in (ours, dense)))


@every_reduction
def test_a_frozen_teacher_gets_no_gradient(reduction):
    x, W, b, *teacher = problem(40)
    frozen = [t.detach() for t in teacher]
    ours(x, W, b, *frozen, reduction=reduction).sum().backward()
    assert all(t.grad is not None for t in (x, W, b))
    assert all(t.grad is None for t in frozen)


@every_reduction
@every_divergence
def test_a_row_that_is_masked_adds_nothing_whatever_it_holds(options, reduction):
    x, W, b, tx, tW, tb = problem(5)
    mask = torch.arange(N) > 0
    with torch.no_grad():
        x[0], tx[0] = math.nan, math.inf
    loss = ours(x, W, b, tx, tW, tb, mask=mask, reduction=reduction, **options).sum()
    leaves = [t.detach()[1:].requires_grad_() for t in (x, tx)]
    expected = dense(leaves[0], W, b, leaves[1], tW, tb, reduction=reduction, **options).sum()
    assert_same(loss, expected)
    by_x, by_tx, *of_others = torch.autograd.grad(loss, (x, tx, W, b, tW, tb))
    rest = torch.autograd.grad(expected, (*leaves, W, b, tW, tb))
    assert_same((by_x[1:], by_tx[1:], *of_others), rest)
    assert not by_x[0].any()
    assert not by_tx[0].any()


@every_divergence
def test_a_class_that_both_have_masked_adds_nothing(options):
    inputs = problem(5)
    hidden = [t.detach().clone().requires_grad_() for t in inputs]
    with torch.no_grad():
        hidden[2][0] = hidden[5][0] = -math.inf
    loss = ours(*hidden, **options)
    x, W, b, tx, tW, tb = inputs
    fewer = (x, W[1:], b[1:], tx, tW[1:], tb[1:])
    assert_same(loss, dense(*fewer, **options))
    assert_same(
        torch.autograd.grad(loss, hidden[:2] + hidden[3:5]),
        torch.autograd.grad(dense(*fewer, **options), (x, W, tx, tW)),
    )


@pytest.mark.parametrize(
    ("divergence", "bias"), [("forward", 5), ("reverse", 2), ("jsd", 2), ("jsd", 5)]
)
def test_a_class_that_one_of_them_has_masked_counts_for_the_other(divergence, bias):
    def of(function, logit):
        inputs = [t.detach().clone().requires_grad_() for t in given]
        with torch.no_grad():
            inputs[bias][0] = logit
        loss = function(*inputs, divergence=divergence)
        return loss, *torch.autograd.grad(loss, inputs)

    given = problem(5)
    assert_same(of(ours, -math.inf), of(dense, -200.0))  # as good as masked, to float64


@every_divergence
def test_logits_far_apart_have_finite_gradients(options):
    inputs = [t.detach().mul(1000).requires_grad_() for t in problem(5)]
    loss = ours(*inputs, **options)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, inputs))


@every_divergence
def test_the_mean_over_no_rows_is_nan_and_its_gradient_0(options):
    inputs = problem(5)
    loss = ours(*inputs, mask=torch.zeros(N, dtype=torch.bool), **options)
    assert loss.isnan()
    assert not any(g.any() for g in torch.autograd.grad(loss, inputs))


def test_the_gradient_hardly_depends_on_the_size_of_a_high_temperature():
    x, W, _, tx, tW, _ = problem(5)
    norms = [
        torch.autograd.grad(linear_distillation(x, W, tx, tW, temperature=T), W)[0].norm()
        for T in (100.0, 1000.0)
    ]
    torch.testing.assert_close(*norms, rtol=0.05, atol=0)


def test_a_teacher_may_be_of_another_dtype():
    x, W = randn(N, D, dtype=torch.float32), randn(40, D, dtype=torch.float32)
    tx, tW = randn(N, E).detach().bfloat16(), randn(40, E).detach().bfloat16()
    loss = linear_distillation(x, W, tx, tW)
    expected = written_out(x, W, tx.float(), tW.float(), divergence="forward")
    torch.testing.assert_close(loss, expected)


@every_divergence
@every_reduction
def test_a_wider_dtype_that_is_asked_for(options, reduction):
    inputs = [t.detach().float() for t in problem(40)]
    wide = ours(*inputs, dtype=torch.float64, reduction=reduction, **options)
    exact = dense(*(t.double() for t in inputs), reduction=reduction, **options)
    assert_same(wide, exact)


@every_divergence
def test_autocast_rounds_what_is_multiplied_and_nothing_else(options):
    inputs, along = (tuple(t.detach().float() for t in problem(40)) for _ in range(2))
    rounded, along = (tuple(t.bfloat16().float() for t in each) for each in (inputs, along))
    with torch.autocast("cpu", torch.bfloat16):
        loss, slope = torch.func.jvp(lambda *i: ours(*i, **options), inputs, along)
    expected = torch.func.jvp(lambda *i: dense(*i, **options), rounded, along)
    torch.testing.assert_close((loss, slope), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@every_divergence
def test_compiles_whole(options):
    inputs = problem(40, 4)

    def function(*inputs):
        return ours(*inputs, **options)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = [f(*inputs) for f in (compiled, function)]
    assert_same(*results)
    assert_same(*(torch.autograd.grad(r, inputs) for r in results))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"divergence": "kl"}, ValueError, "divergence must be 'forward', 'reverse' or 'jsd'"),
        ({"beta": 1.0}, ValueError, "beta must lie between 0 and 1"),
        ({"beta": 0.0}, ValueError, "beta must lie between 0 and 1"),
        ({"temperature": 0.0}, ValueError, "temperature must "),
        ({"temperature": math.inf}, ValueError, "temperature must "),
        ({"reduction": "batchmean"}, ValueError, "reduction must be"),
        ({"mask": torch.ones(N)}, TypeError, "mask must have the dtype torch.bool"),
        ({"mask": torch.ones(N - 1).bool()}, ValueError, "mask must have shape"),
        ({"teacher_weight": torch.zeros(6, E)}, ValueError, "teacher_weight must have 5 classes"),
        ({"teacher_weight": torch.zeros(5, D)}, ValueError, "teacher_input must have a last dim"),
        ({"teacher_input": torch.zeros(N - 1, E)}, ValueError, "teacher_input must have shape"),
        ({"teacher_bias": torch.zeros(4)}, ValueError, "teacher_bias must have shape"),
        ({"linear_weight": torch.zeros(5, 2, D)}, ValueError, "linear_weight must have the shape"),
    ],
)
def test_an_unfit_argument_is_named(changes, error, message):
    fit = {
        "input": torch.zeros(N, D),
        "linear_weight": torch.zeros(5, D),
        "teacher_input": torch.zeros(N, E),
        "teacher_weight": torch.zeros(5, E),
    }
    with pytest.raises(error, match=f"^{message}"):
        linear_distillation(**{**fit, **changes})
