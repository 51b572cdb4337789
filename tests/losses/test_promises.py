"""No wrong number in silence: each way to differentiate, compiled, nested, repeated or at −∞.

Each is held against torch's dense loss, or where that is wrong itself, against what is right.
"""

import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from tests.helpers import (
    ON_TORCH_2_6,
    assert_identical,
    assert_same,
    dense_linear_cross_entropy,
    randn,
    random_target,
)
from torch_softmax import _transforms
from torch_softmax.functional import cross_entropy, linear_cross_entropy, softmax

N, D, K = 5, 4, 7

every_kind = pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
# A compiler sees no number, so that with and without an ignored row it makes the same graph.
every_compiled_kind = pytest.mark.parametrize("kind", ["ignored", "probabilities"])
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
every_backend = pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # Where the compiler leaves a graph, it looks at the grad of all tensors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


class OnLogits:
    """Our loss of given logits, and torch's, as functions of a tensor z (N, K)."""

    def __init__(self, kind="indices", **options):
        self.target = random_target(kind, (N,), K).detach()
        self.options = options
        self.at = randn(N, K)

    def ours(self, z):
        return self.weighted(cross_entropy(z, self.target, **self.options))

    def theirs(self, z):
        return self.weighted(F.cross_entropy(z, self.target, **self.options))

    @staticmethod
    def weighted(loss):
        """A scalar that depends on every row."""
        return loss if loss.dim() == 0 else (loss * torch.linspace(0.5, 2, N).to(loss)).sum()


class OfLayer(OnLogits):
    """The same of a linear layer in ragged chunks, as functions of its weight W (K, D)."""

    def __init__(self, kind="indices", **options):
        super().__init__(kind, **options)
        self.x, self.at = torch.randn(N, D).double(), randn(K, D)

    def ours(self, W):
        loss = linear_cross_entropy(self.x, W, self.target, chunk_size=2, **self.options)
        return self.weighted(loss)

    def theirs(self, W):
        return self.weighted(dense_linear_cross_entropy(self.x, W, self.target, **self.options))


class OfSoftmax(OnLogits):
    """The softmax, squared and summed."""

    def ours(self, z):
        return softmax(z).square().sum()

    def theirs(self, z):
        return F.softmax(z, -1).square().sum()


PROBLEMS = {"logits": OnLogits, "layer": OfLayer}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
every_function = pytest.mark.parametrize(
    "problem", [*PROBLEMS.values(), OfSoftmax], ids=[*PROBLEMS, "softmax"]
)


def direction_like(at):
    return torch.linspace(-1, 1, at.numel()).to(at).reshape(at.shape)


# Derivatives of a function f at a point, as functions of that point.


def hvp_by_grad_of_grad(f):
    return lambda at: torch.func.grad(
        lambda at: (torch.func.grad(f)(at) * direction_like(at)).sum()
    )(at)


def forward_over_reverse(f):
    return lambda at: torch.func.jvp(torch.func.grad(f), (at,), (direction_like(at),))[1]


def reverse_over_forward(f):
    return torch.func.grad(lambda at: torch.func.jvp(f, (at,), (direction_like(at),))[1])


def vmap_of_grad(f):
    return lambda at: torch.vmap(torch.func.grad(f))(torch.stack([at, at / 2]))


def third_order(f):
    def along(f):
        return lambda at: (torch.func.grad(f)(at) * direction_like(at)).sum()

    return torch.func.grad(along(along(f)))


def jvp(f):
    return lambda at: torch.func.jvp(f, (at,), (direction_like(at),))[1]


TRANSFORMS = {
    "grad": torch.func.grad,
    "jvp": jvp,
    "grad of grad": hvp_by_grad_of_grad,
    "forward over reverse": forward_over_reverse,
    "reverse over forward": reverse_over_forward,
    "hessian": torch.func.hessian,
    "jacrev of jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "vmap of grad": vmap_of_grad,
    "third order": third_order,
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


def both_backends(graph, inputs):
    """A graph that was traced once, as the backends eager and aot_eager run it."""
    by_aot = torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    def run(*inputs):
        results = by_aot(*inputs)
        assert_same(results, graph(*inputs))
        return results

    return run


@every_transform
@every_function
def test_compiled_transforms(problem, transform):
    p = problem("ignored")
    compiled = torch.compile(transform(p.ours), backend=both_backends, fullgraph=True)
    assert_same(compiled(p.at.detach()), transform(p.theirs)(p.at.detach()))


@every_problem
@every_compiled_kind
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_transforms_of_options(reduction, kind, problem):
    p = problem(kind, reduction=reduction, label_smoothing=0.1)
    compiled = torch.compile(hvp_by_grad_of_grad(p.ours), backend="aot_eager", fullgraph=True)
    assert_same(compiled(p.at.detach()), hvp_by_grad_of_grad(p.theirs)(p.at.detach()))


@every_problem
def test_compiled_transforms_with_inductor(problem):
    """Its exponential of float64 is right to some nine digits, in torch's dense loss too."""
    p = problem()
    compiled = torch.compile(hvp_by_grad_of_grad(p.ours), fullgraph=True)
    expected = hvp_by_grad_of_grad(p.theirs)(p.at.detach())
    torch.testing.assert_close(compiled(p.at.detach()), expected, rtol=1e-6, atol=1e-7)


@every_transform
@every_function
@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        pytest.param(
            torch.inference_mode,
            marks=pytest.mark.skipif(
                ON_TORCH_2_6, reason="torch 2.6 gives 0 there, and ours raise"
            ),
        ),
    ],
)
def test_transforms_without_gradients_around_them(mode, problem, transform):
    p = problem("ignored")
    at = p.at.detach()
    with mode():
        ours = transform(p.ours)(at)
    assert_same(ours.clone(), transform(p.theirs)(at))


@pytest.mark.skipif(not ON_TORCH_2_6, reason="later transforms leave inference mode")
@every_transform
@every_function
def test_transforms_within_inference_mode_raise(problem, transform):
    p = problem()
    # Torch says the second one itself, of a hessian.
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"in inference mode|_make_dual"):
        transform(p.ours)(p.at.detach())


@pytest.mark.parametrize("problem", [OfLayer, OfSoftmax])
def test_inference_mode_that_transforms_do_not_end_raises(problem, monkeypatch):
    monkeypatch.setattr(_transforms, "_ends_inference_mode", lambda: False)
    p = problem()

    @torch.inference_mode()
    def inside(at):
        return p.ours(at)

    with pytest.raises(RuntimeError, match="every derivative would be 0"):
        torch.func.grad(inside)(p.at.detach())
    assert_same(torch.vmap(inside)(p.at.detach()[None])[0], p.theirs(p.at).detach())


# Several derivatives by autograd within compiled code.


def gradient_penalty(f, at):
    (gradient,) = torch.autograd.grad(f(at), at, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), at)[0]


def vhp(f, at):
    return torch.autograd.functional.vhp(f, at, direction_like(at))[1]


@every_problem
@every_reduction
@every_backend
def test_a_gradient_penalty_within_compiled_code(backend, reduction, problem):
    p = problem("ignored", reduction=reduction)
    compiled = torch.compile(lambda at: gradient_penalty(p.ours, at), backend=backend)
    # Other backends than the first end derivatives where the compiler leaves a graph.
    with torch._dynamo.config.patch(trace_autograd_ops=backend != "eager"):
        assert_same(compiled(p.at), gradient_penalty(p.theirs, p.at))


@every_problem
@every_reduction
def test_vhp_within_compiled_code(reduction, problem):
    """With other backends than this, torch's own loss gives 0."""
    p = problem("ignored", reduction=reduction)
    compiled = torch.compile(lambda at: vhp(p.ours, at), backend="eager")
    assert_same(compiled(p.at), vhp(p.theirs, p.at))


def test_a_third_derivative_within_compiled_code_raises():
    p = OfLayer()

    def third(at):
        (first,) = torch.autograd.grad(p.ours(at), at, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), at, create_graph=True)
        return torch.autograd.grad(second.square().sum(), at)[0]

    with (
        torch._dynamo.config.patch(trace_autograd_ops=True),
        pytest.raises(Exception, match="to second order"),
    ):
        torch.compile(third, backend="aot_eager")(p.at)


# A graph that is kept.


def retained(f, at):
    """Two backwards of one graph, with different gradients from above; and the first once more."""
    loss = f(at)
    (first,) = torch.autograd.grad(loss, at, torch.tensor(2.0).to(loss), retain_graph=True)
    before = first.clone()
    (second,) = torch.autograd.grad(loss, at, torch.tensor(3.0).to(loss), retain_graph=True)
    (third,) = torch.autograd.grad(loss, at)
    assert_identical(first, before)
    return first, second, third


@every_function
@every_backend
def test_backwards_of_a_retained_graph_that_was_compiled(backend, problem):
    p = problem("ignored")
    compiled = torch.compile(p.ours, backend=backend)
    assert_same(retained(compiled, p.at), retained(p.theirs, p.at))


@every_problem
@every_reduction
def test_backwards_of_a_retained_graph(reduction, problem):
    p = problem("ignored", reduction=reduction)
    assert_same(retained(p.ours, p.at), retained(p.theirs, p.at))


@every_problem
@every_reduction
def test_a_gradient_that_its_owner_changes_changes_no_other(reduction, problem):
    p = problem(reduction=reduction)
    loss = p.ours(p.at)
    (first,) = torch.autograd.grad(loss, p.at, retain_graph=True)
    expected = first.clone()
    first.fill_(math.nan)
    assert_same(torch.autograd.grad(loss, p.at)[0], expected)


@every_problem
@every_reduction
def test_compiled_autograd_around_an_eager_loss(reduction, problem):
    p = problem("ignored", reduction=reduction)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        ours = retained(p.ours, p.at)
    assert_same(ours, retained(p.theirs, p.at))


@every_problem
def test_gradients_within_a_traced_step(problem):
    p = problem()

    def step(at):
        loss = p.ours(at)
        (first,) = torch.autograd.grad(loss, at, retain_graph=True)
        (second,) = torch.autograd.grad(3 * loss, at)
        return first, second

    first, second = torch.compile(step, backend="eager")(p.at)
    assert_same(second, 3 * first)
    assert_same(first, torch.autograd.grad(p.theirs(p.at), p.at)[0])


# Levels of forward mode.


@every_function
@every_kind
@pytest.mark.parametrize("create_graph", [False, True])
def test_forward_over_a_plain_backward(create_graph, kind, problem):
    p = problem(kind)
    at = p.at.detach().requires_grad_()

    def tangent(f):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(at, direction_like(at).detach())
            (gradient,) = torch.autograd.grad(f(dual), dual, create_graph=create_graph)
            return forward_ad.unpack_dual(gradient).tangent.detach()

    assert_same(tangent(p.ours), tangent(p.theirs))


@every_function
@every_kind
def test_reverse_over_forward_in_a_dual_level(kind, problem):
    p = problem(kind)
    at = p.at.detach().requires_grad_()

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(at, direction_like(at).detach())
        slope = forward_ad.unpack_dual(p.ours(dual)).tangent
        (ours,) = torch.autograd.grad(slope, at)
    # Torch's own softmax can't be differentiated so.
    assert_same(ours, reverse_over_forward(p.theirs)(at.detach()))


# Tensors that share their memory with themselves.


@every_problem
@every_kind
def test_third_derivatives_of_expanded_tensors(kind, problem):
    p = problem(kind, reduction="none")
    p.weighted = torch.sum
    if kind == "probabilities":
        p.target = torch.rand(1, K).double().expand(N, K)
    v = direction_like(p.at)
    ours = torch.autograd.functional.hvp(p.ours, p.at, v)
    assert_same(ours, torch.autograd.functional.hvp(p.theirs, p.at, v))


# Infinities.


def test_forward_mode_beside_a_logit_of_minus_infinity():
    p = torch.tensor([[0.5, 0.5, 0.0]]).double()
    z = torch.tensor([[0.0, 1.0, -math.inf]]).double()
    u = torch.tensor([[1.0, 0.0, 0.0]]).double()
    _, ours = torch.func.jvp(lambda z: cross_entropy(z, p), (z,), (u,))
    S = torch.softmax(z, 1)
    assert_same(ours, (S - p)[0, 0])


@pytest.mark.parametrize("dp", [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("layer", [False, True])
def test_forward_mode_along_probabilities_beside_minus_infinity(layer, dp):
    p = torch.tensor([[0.5, 0.5, 0.0]]).double()
    z = torch.tensor([[0.0, 1.0, -math.inf]]).double()
    dp = torch.tensor([dp]).double()

    def loss(p):
        if not layer:
            return cross_entropy(z, p)
        x, W = torch.zeros(1, 2).double(), torch.zeros(3, 2).double()
        return linear_cross_entropy(x, W, p, linear_bias=z[0])

    _, ours = torch.func.jvp(loss, (p,), (dp,))
    log_S = torch.log_softmax(z[:, :2], 1)
    assert_same(ours, -(dp[:, :2] * log_S).sum())


def test_the_gradient_of_a_probability_at_minus_infinity_is_infinite():
    p = torch.tensor([[0.5, 0.5, 0.0]]).double().requires_grad_()
    z = torch.tensor([[0.0, 1.0, -math.inf]]).double()
    (ours,) = torch.autograd.grad(cross_entropy(z, p), p)
    assert_same(ours, -torch.log_softmax(z, 1))


@pytest.mark.parametrize("upstream", [math.inf, math.nan])
@every_problem
def test_an_upstream_of_infinity_at_an_ignored_row(upstream, problem):
    p = problem("ignored", reduction="none")
    weights = torch.ones(N).double()
    weights[0] = upstream
    p.weighted = lambda loss: loss

    def gradient(f):
        return torch.autograd.grad(f(p.at), p.at, weights)[0]

    assert_same(gradient(p.ours), gradient(p.theirs))


@pytest.mark.parametrize("held", [math.inf, -math.inf, math.nan])
@every_reduction
def test_an_ignored_row_adds_nothing_to_gradients_whatever_it_holds(reduction, held):
    x, W, target = torch.randn(N, D).double(), randn(K, D), random_target("ignored", (N,), K)
    dirty = x.clone()
    dirty[0] = held

    def results(x):
        x = x.clone().requires_grad_()
        loss = linear_cross_entropy(x, W, target, reduction=reduction, chunk_size=2)
        return loss, *torch.autograd.grad(loss.sum(), (x, W))

    assert_same(results(dirty), results(x))


@pytest.mark.parametrize("held", [math.inf, -math.inf, math.nan])
def test_ignored_logits_add_nothing_to_gradients_whatever_they_hold(held):
    target = random_target("ignored", (N,), K)
    z = torch.randn(N, K).double()
    dirty = z.clone()
    dirty[0] = held

    def results(z):
        z = z.clone().requires_grad_()
        loss = cross_entropy(z, target)
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        return loss, gradient, *torch.autograd.grad(gradient.square().sum(), z)

    assert_same(results(dirty), results(z))


# Numbers of rows that a compiler has not seen.


class Counter:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


@every_compiled_kind
@every_reduction
@every_problem
def test_one_compiled_graph_for_all_numbers_of_rows(problem, reduction, kind):
    p, counter = problem(), Counter()

    def ours(rows, parameters, target):
        if problem is OnLogits:
            return cross_entropy(rows, target, reduction=reduction)
        return linear_cross_entropy(rows, parameters, target, reduction=reduction, chunk_size=3)

    def theirs(rows, parameters, target):
        if problem is OnLogits:
            return F.cross_entropy(rows, target, reduction=reduction)
        return dense_linear_cross_entropy(rows, parameters, target, reduction=reduction)

    compiled = torch.compile(ours, backend=counter, dynamic=True, fullgraph=True)
    for count in (2, 3, 4, 7, 12):
        rows = randn(count, p.at.shape[1])
        target = random_target(kind, (count,), K).detach()

        def gradients(loss, rows=rows, target=target):
            total = loss(rows, p.at, target).sum()
            return total, *torch.autograd.grad(total, (rows, p.at), allow_unused=True)

        for actual, expected in zip(gradients(compiled), gradients(theirs), strict=True):
            if expected is not None:
                assert_same(actual, expected)
    assert counter.graphs <= 2


class Head(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.linear = torch.nn.Linear(D, K, dtype=torch.float64)
        self.layer = layer

    def forward(self, x, target):
        if self.layer:
            W, b = self.linear.weight, self.linear.bias
            return linear_cross_entropy(x, W, target, linear_bias=b, chunk_size=3)
        return cross_entropy(self.linear(x), target)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("layer", [False, True])
def test_exports_a_dynamic_batch_that_is_differentiated(layer, strict):
    head = Head(layer)
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "target": {0: batch}}
    example = torch.randn(4, D).double(), torch.randint(K, (4,))
    exported = torch.export.export(head, example, dynamic_shapes=shapes, strict=strict).module()
    for count in (2, 9):
        x, target = randn(count, D), random_target("ignored", (count,), K)

        def gradients(module, x=x, target=target):
            loss = module(x, target)
            return loss, *torch.autograd.grad(loss, (x, *module.parameters()))

        assert_same(gradients(exported), gradients(head))
