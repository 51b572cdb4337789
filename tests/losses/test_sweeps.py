"""Each hand-written sweep is the generic evaluation of its plan, whatever is asked of it."""

from dataclasses import replace

import pytest
import torch

from tests.helpers import random_target
from torch_softmax.losses._chunked import Plan
from torch_softmax.losses._plan import plan_of
from torch_softmax.losses._sweeps import OF_ROWS, How, Inputs
from torch_softmax.losses._targets import fold, options_of

N, D, K = 7, 3, 5
DIFFERENTIABLE = ("x", "W", "b", "p")

every_kind = pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
every_step = pytest.mark.parametrize("step", [1, 3, 7, 100])
every_layer = pytest.mark.parametrize("layer", ["logits", "layer", "layer with bias"])
every_weighting = pytest.mark.parametrize("weighted", [False, True])
every_smoothing = pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def inputs(kind, layer, weighted, label_smoothing, dtype):
    weight = torch.rand(K).double() + 0.5 if weighted else None
    target = random_target(kind, (N,), K).detach()
    work = torch.promote_types(dtype, torch.float32)
    options = options_of(weight, -100, "sum", label_smoothing)
    rows = fold(target, options, K, work, may_ignore=kind == "ignored")
    if layer == "logits":
        return Inputs(torch.randn(N, K).to(dtype), None, None, *rows.y, rows.keep)
    b = torch.randn(K).to(dtype) if layer == "layer with bias" else None
    return Inputs(torch.randn(N, D).to(dtype), torch.randn(K, D).to(dtype), b, *rows.y, rows.keep)


def mask_of(inputs):
    """Which of the inputs can be differentiated."""
    given = inputs._asdict()
    return tuple(
        name in DIFFERENTIABLE and given[name] is not None and given[name].is_floating_point()
        for name in Inputs._fields
    )


def like(tensors, mask, dtype=None):
    """A random direction for each of those that a mask names."""
    return [
        torch.randn(t.shape, dtype=torch.float64).to(dtype or t.dtype)
        for t, named in zip(tensors, mask, strict=True)
        if named
    ]


def assert_as_the_plan(plan, *tensors):
    """The sweep's results are the plan's, as exact as the dtype of the inputs allows."""
    assert plan.sweep is not None
    generic = replace(plan, sweep=None).run(*tensors)
    x, *_ = tensors
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2}[x.dtype]
    for actual, expected in zip(plan.run(*tensors), generic, strict=True):
        scale = 1 + expected.abs().max() if expected.numel() else 1
        torch.testing.assert_close(
            actual.double() / scale, expected.double() / scale, rtol=0, atol=tolerance
        )


def plan_for(inputs, step):
    work = torch.promote_types(inputs.x.dtype, torch.float32)
    return plan_of(How(step, work, inputs.x.dtype)), work


@every_kind
@every_step
@every_layer
@every_weighting
@every_smoothing
@every_dtype
def test_numbers_gradient_and_hessian(inputs, step):
    plan, work = plan_for(inputs, step)
    wanted, both = mask_of(inputs), (True, True)
    assert_as_the_plan(plan, *inputs)

    weights = [torch.randn(N, dtype=work) for _ in both]
    gradient = plan.vjp(wanted, both)
    assert_as_the_plan(gradient, *inputs, *weights)
    assert_as_the_plan(plan.jvp(wanted), *inputs, *like(inputs, wanted))

    directions = like(inputs, wanted)
    of_gradient = gradient.vjp((*wanted, True, True), (True,) * len(directions))
    assert_as_the_plan(of_gradient, *inputs, *weights, *directions)
    changes = [torch.randn(N, dtype=work) for _ in both]
    along = gradient.jvp((*wanted, True, True))
    assert_as_the_plan(along, *inputs, *weights, *directions, *changes)


@every_kind
@pytest.mark.parametrize("layer", ["logits", "layer with bias"])
@pytest.mark.parametrize(("weighted", "label_smoothing"), [(True, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("given", [(True, False), (False, True)], ids=["log_sum", "gap"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_of_each(inputs, given, name):
    """The derivative of one number alone by one input alone, and along it."""
    wanted = tuple(m and n == name for m, n in zip(mask_of(inputs), Inputs._fields, strict=True))
    if not any(wanted):
        pytest.skip("the input is not there, or can't be differentiated")
    plan, work = plan_for(inputs, 3)
    weights = [torch.randn(N, dtype=work)]
    gradient = plan.vjp(wanted, given)
    assert_as_the_plan(gradient, *inputs, *weights)
    assert_as_the_plan(plan.jvp(wanted), *inputs, *like(inputs, wanted))
    everything = (*mask_of(inputs), True)
    assert_as_the_plan(gradient.vjp(everything, (True,)), *inputs, *weights, *like(inputs, wanted))
    moved = like((*inputs, *weights), everything)
    assert_as_the_plan(gradient.jvp(everything), *inputs, *weights, *moved)


@every_kind
@every_step
@pytest.mark.parametrize("layer", ["layer", "layer with bias"])
@pytest.mark.parametrize(("weighted", "label_smoothing"), [(True, 0.1)])
@every_dtype
def test_many_directions_of_a_layer(inputs, step):
    plan, work = plan_for(inputs, step)
    layer = tuple(
        n in ("W", "b") and i is not None for n, i in zip(Inputs._fields, inputs, strict=True)
    )
    weights = [torch.randn(N, dtype=work) for _ in range(2)]
    directions = [torch.stack([u, -2 * u, u.cos()]) for u in like(inputs, layer)]
    none = [False] * len(inputs)

    of_gradient = plan.vjp(layer, (True, True)).vjp((*layer, True, True), (True,) * sum(layer))
    batched = (*none, False, False, *(True for _ in directions))
    assert_as_the_plan(of_gradient._at_once(3, batched), *inputs, *weights, *directions)
    of_numbers = plan.jvp(layer)
    batched = (*none, *(True for _ in directions))
    assert_as_the_plan(of_numbers._at_once(3, batched), *inputs, *directions)


@pytest.mark.parametrize("kind", ["indices"])
@pytest.mark.parametrize("layer", ["layer"])
@pytest.mark.parametrize(("weighted", "label_smoothing"), [(False, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64])
def test_a_plan_of_any_function(inputs):
    """A map over chunks and its derivatives are those of the function of all rows at once."""

    def fn(x, W):
        z = x @ W.t()
        return z.logsumexp(1) + z.square().sum(1), z.sin().sum()

    plan = Plan(fn, (True, False), (True, False), 3)
    x, W = inputs.x.clone().requires_grad_(), inputs.W.clone().requires_grad_()
    rows, total = plan.run(x, W)
    expected_rows, expected_total = fn(x, W)
    torch.testing.assert_close((rows, total), (expected_rows, expected_total))
    upstream = torch.randn(N).double(), torch.tensor(2.0).double()
    ours = plan.vjp((True, True), (True, True)).run(x, W, *upstream)
    theirs = torch.autograd.grad((expected_rows, expected_total), (x, W), upstream)
    torch.testing.assert_close(ours, theirs)


def test_rows_are_told_from_what_is_shared():
    assert [n for n, r in zip(Inputs._fields, OF_ROWS, strict=True) if r] == [
        "x",
        "p",
        "hot",
        "keep",
    ]
