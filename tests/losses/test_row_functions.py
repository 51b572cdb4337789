"""What is done by hand is the evaluation of the plan, for every row function and what is asked."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.helpers import random_target
from torch_softmax.losses._chunked import Plan
from torch_softmax.losses._numbers import RowNumbers
from torch_softmax.losses._rows import How, Layer, Operands
from torch_softmax.losses._sweeps import plan_of
from torch_softmax.losses._targets import fold, options_of
from torch_softmax.losses.distillation import Divergence

N, D, E, K = 7, 3, 4, 5
NUMBERS = ("log_sum", "gap", "mean_gap", "square", "top", "is_top")
FUNCTIONS = {
    "loss": RowNumbers(),
    "every number": RowNumbers(NUMBERS),
    "capped": RowNumbers(NUMBERS, softcap=2.0, logit_scale=-1.5),
    "scaled": RowNumbers(("log_sum", "gap", "square"), logit_scale=0.5),
    "forward": Divergence("forward", temperature=1.5),
    "reverse": Divergence("reverse", temperature=0.7),
    "jsd": Divergence("jsd", beta=0.3, temperature=1.5),
}
LAYERS = ["logits", "layer", "layer with bias"]
TARGETS = ["indices", "weighted indices", "smoothed indices", "probabilities", "weighted shares"]
INDICES = [None, [0, 2, 3, 6], []]

NUMBERS_OF_A_ROW = [name for name, fn in FUNCTIONS.items() if isinstance(fn, RowNumbers)]

every_function = pytest.mark.parametrize("name", FUNCTIONS)
every_step = pytest.mark.parametrize("step", [1, 3, 100])


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def target_of(kind):
    """The target of each row, in all that a loss is told of it."""
    weight = torch.rand(K).double() + 0.5 if "weighted" in kind else None
    dense = "shares" in kind or "probabilities" in kind
    target = random_target("probabilities" if dense else "indices", (N,), K).detach()
    smoothing = 0.2 if "smoothed" in kind or "shares" in kind else 0.0
    options = options_of(weight, -100, "sum", smoothing)
    return fold(target, options, K, torch.float64, may_ignore=False).y


def layer_of(kind, features, dtype):
    if kind == "logits":
        return Layer(randn(N, K, dtype=dtype))
    b = randn(K, dtype=dtype) if "bias" in kind else None
    return Layer(randn(N, features, dtype=dtype), randn(K, features, dtype=dtype), b)


def problem(name, layer="layer with bias", target="indices", dtype=torch.float64):
    """A row function and its operands."""
    function = FUNCTIONS[name]
    if isinstance(function, Divergence):
        layers = (layer_of(layer, D, dtype), layer_of(layer, E, dtype))
        return function, Operands(layers, ())
    return function, Operands((layer_of(layer, D, dtype),), tuple(target_of(target)))


def plan_for(function, step, index=None, dtype=torch.float64):
    work = torch.promote_types(dtype, torch.float32)
    plan = plan_of(function, How(step, work, dtype))
    return plan.for_rows(None if index is None else torch.tensor(index, dtype=torch.int64))


def moving(function, operands):
    """Which of the operands can be differentiated: those of layers, and probabilities."""
    layers = tuple(t is not None for layer in operands.layers for t in layer)
    others = (False,) * len(operands.others)
    if operands.others:
        p, *rest = operands.others
        others = (p.is_floating_point(), *(False for _ in rest))
    return (*layers, *others)


def like(tensors, mask):
    """A random direction for each tensor that a mask names, None for the others."""
    return [
        randn(*t.shape, dtype=t.dtype) if named else None
        for t, named in zip(tensors, mask, strict=True)
    ]


def given(values):
    return [value for value in values if value is not None]


def assert_as_the_plan(plan, *tensors, tolerance=1e-11):
    """The sweep's results are the plan's own evaluation."""
    assert plan.sweep is not None
    generic = replace(plan, sweep=None).run(*tensors)
    for actual, expected in zip(plan.run(*tensors), generic, strict=True):
        scale = 1 + expected.abs().max() if expected.numel() else 1
        torch.testing.assert_close(
            actual.double() / scale, expected.double() / scale, rtol=0, atol=tolerance
        )


def assert_all_orders(function, operands, plan, tolerance=1e-11):
    """Values, gradients, tangents, and the changes of gradients along either kind of direction."""
    at, mask = operands.flat(), moving(function, operands)
    assert_as_the_plan(plan, *at, tolerance=tolerance)
    cotangents = [randn(N) for _ in range(function.results)]
    gradient = plan.vjp(mask)
    assert_as_the_plan(gradient, *at, *cotangents, tolerance=tolerance)
    if not function.has_second:
        return
    assert_as_the_plan(plan.jvp(), *at, *like(at, mask), tolerance=tolerance)
    every = (*mask, *(True for _ in cotangents))
    directions = given(like(at, mask))
    changes = gradient.vjp(every)
    assert_as_the_plan(changes, *at, *cotangents, *directions, tolerance=tolerance)
    tangents = like((*at, *cotangents), every)
    assert_as_the_plan(gradient.jvp(), *at, *cotangents, *tangents, tolerance=tolerance)


@every_function
@every_step
@pytest.mark.parametrize("index", INDICES, ids=["all rows", "some rows", "no row"])
def test_all_orders(name, step, index):
    function, operands = problem(name)
    assert_all_orders(function, operands, plan_for(function, step, index))


@pytest.mark.parametrize(
    ("name", "target"),
    [*product(NUMBERS_OF_A_ROW, TARGETS), *((name, "") for name in ("forward", "reverse", "jsd"))],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_and_target(name, target, layer):
    function, operands = problem(name, layer, target)
    assert_all_orders(function, operands, plan_for(function, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["loss", "capped", "jsd"])
def test_lower_precision(name, dtype):
    function, operands = problem(name, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert_all_orders(function, operands, plan_for(function, 3, dtype=dtype), tolerance)


@pytest.mark.parametrize("name", NUMBERS_OF_A_ROW)
@pytest.mark.parametrize("target", ["smoothed indices", "weighted shares"])
def test_one_operand_and_one_result_alone(name, target):
    """The derivative of one result by one operand, and along it."""
    function, operands = problem(name, target=target)
    at, mask = operands.flat(), moving(function, operands)
    plan = plan_for(function, 3)
    for place, result in product(range(len(mask)), range(function.results)):
        one = tuple(m and i == place for i, m in enumerate(mask))
        if not any(one):
            continue
        cotangents = [randn(N) if i == result else None for i in range(function.results)]
        gradient = plan.vjp(one)
        assert_as_the_plan(gradient, *at, *cotangents)
        assert_as_the_plan(plan.jvp(), *at, *like(at, one))
        every = (*mask, *(c is not None for c in cotangents))
        assert_as_the_plan(gradient.vjp(every), *at, *cotangents, *given(like(at, one)))
        tangents = like((*at, *cotangents), every)
        assert_as_the_plan(gradient.jvp(), *at, *cotangents, *tangents)


@pytest.mark.parametrize("name", NUMBERS_OF_A_ROW)
@every_step
@pytest.mark.parametrize("layer", LAYERS[1:])
def test_many_directions_of_a_layer(name, layer, step):
    function, operands = problem(name, layer)
    at = operands.flat()
    of_layers = tuple(t is not None for _, *Wb in operands.layers for t in (None, *Wb))
    mask = (*of_layers, *(False for _ in operands.others))
    cotangents = [randn(N) for _ in range(function.results)]
    directions = [None if u is None else torch.stack([u, -2 * u, u.cos()]) for u in like(at, mask)]

    for plan, tensors in (
        (plan_for(function, step).vjp(mask).vjp((*mask, *(True for _ in cotangents))), cotangents),
        (plan_for(function, step).jvp(), []),
    ):
        moved = directions if not tensors else given(directions)
        tensors = [*at, *tensors, *moved]
        batched = (*(False for _ in tensors[len(moved) :]), *(u is not None for u in moved))
        at_once = plan._at_once(3, batched, tuple(t is not None for t in tensors))
        assert_as_the_plan(at_once, *tensors)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_divergences_beside_a_logit_of_minus_infinity(name, side):
    """What is by hand is finite where the definition is, and the same."""
    function, operands = problem(name)
    layers = list(operands.layers)
    b = layers[side].b.clone()
    b[2] = -torch.inf
    layers[side] = layers[side]._replace(b=b)
    if name != "jsd":  # one of the two is infinite where only one side has no share
        layers[1 - side] = layers[1 - side]._replace(b=b)
    operands = Operands(tuple(layers), ())
    plan, at = plan_for(function, 3), operands.flat()
    mask = tuple(t is not None for t in at)
    assert all(result.isfinite().all() for result in plan.run(*at))
    assert_as_the_plan(plan, *at)
    gradient = plan.vjp(mask)
    assert_as_the_plan(gradient, *at, randn(N))
    changes = gradient.vjp((*mask, True)).run(*at, randn(N), *given(like(at, mask)))
    assert all(change.isfinite().all() for change in changes)


def test_a_plan_of_any_function():
    """A map over chunks and its derivatives are those of the function of all rows at once."""

    def fn(x, W):
        z = x @ W.t()
        return z.logsumexp(1) + z.square().sum(1), z.sin().sum()

    plan = Plan(fn, (True, False), (True, False), 3)
    x, W = (randn(n, D).requires_grad_() for n in (N, K))
    rows, total = plan.run(x, W)
    expected_rows, expected_total = fn(x, W)
    torch.testing.assert_close((rows, total), (expected_rows, expected_total))
    upstream = randn(N), torch.tensor(2.0).double()
    ours = plan.vjp((True, True)).run(x, W, *upstream)
    theirs = torch.autograd.grad((expected_rows, expected_total), (x, W), upstream)
    torch.testing.assert_close(ours, theirs)


def test_a_plan_reads_only_the_rows_of_its_index():
    x, W = randn(N, D), randn(K, D)
    x[1] = torch.nan
    index = torch.tensor([0, 2, 5])
    plan = Plan(lambda x, W: ((x @ W.t()).exp().sum(1),), (True, False), (True,), 2, index=index)
    (rows,) = plan.run(x, W)
    expected = torch.zeros(N).double()
    expected[index] = (x[index] @ W.t()).exp().sum(1)
    torch.testing.assert_close(rows, expected)
    by_x, by_W = plan.vjp((True, True)).run(
        x, W, torch.full((N,), torch.nan).index_fill(0, index, 1)
    )
    assert by_W.isfinite().all()
    assert not by_x[[1, 3, 4, 6]].any()
