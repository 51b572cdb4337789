"""A vmap of Hessian-vector products of a layer: one pass for all of them, and dense numbers."""

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap
from torch.nn import functional as F

from tests.helpers import NewTensors, assert_same, random_target
from tests.scripts.benchmark.test_benchmark import Products
from torch_softmax.functional import linear_cross_entropy

N, D, K, M = 11, 3, 40, 5

every_kind = pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
every_way = pytest.mark.parametrize("way", ["forward over reverse", "reverse over reverse"])


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


class Head:
    """A layer's loss, as ours and as torch's, functions of its parameters: W, or W and b."""

    def __init__(self, bias=True, kind="ignored", classes=K, **options):
        self.x, self.W = double(N, D), double(classes, D)
        self.b = double(classes) if bias else None
        self.target = random_target(kind, (N,), classes).detach()
        self.options = options
        self.upstream = double(N)

    @property
    def parameters(self):
        return (self.W,) if self.b is None else (self.W, self.b)

    def directions(self, *number):
        return tuple(double(*number, *t.shape) for t in self.parameters)

    def ours(self, W, b=None):
        loss = linear_cross_entropy(
            self.x, W, self.target, linear_bias=b, chunk_size=4, **self.options
        )
        return loss if loss.dim() == 0 else loss @ self.upstream

    def dense(self, W, b=None):
        options = dict(self.options)
        row_weight = options.pop("row_weight", None)
        reduction = options.pop("reduction", "mean")
        z = F.linear(self.x, W, b)
        if row_weight is None:
            loss = F.cross_entropy(z, self.target, reduction=reduction, **options)
            return loss if loss.dim() == 0 else loss @ self.upstream
        assert reduction == "sum"
        return F.cross_entropy(z, self.target, reduction="none", **options) @ row_weight


def product(loss, at, way="forward over reverse"):
    """The Hessian of a loss times a direction, as a function of the direction."""
    gradient = grad(loss, tuple(range(len(at))))
    if way == "forward over reverse":
        return lambda *u: jvp(gradient, at, u)[1]
    return lambda *u: vjp(gradient, *at)[1](u)


def one_by_one(function, directions):
    each = [function(*u) for u in zip(*directions, strict=True)]
    return tuple(map(torch.stack, zip(*each, strict=True)))


def assert_as_dense(head, way="forward over reverse"):
    u = head.directions(M)
    expected = one_by_one(product(head.dense, head.parameters), u)
    assert_same(vmap(product(head.ours, head.parameters, way))(*u), expected)


@every_kind
@every_reduction
@every_way
@pytest.mark.parametrize(("label_smoothing", "weighted"), [(0.0, False), (0.2, True)])
@pytest.mark.parametrize("classes", [5, K], ids=["few classes", "many classes"])
def test_products_are_those_of_torch(
    kind, reduction, label_smoothing, weighted, bias, classes, way
):
    weight = torch.rand(classes, dtype=torch.float64) + 0.5 if weighted else None
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "weight": weight}
    assert_as_dense(Head(bias, kind, classes, **options), way)


@every_kind
@every_way
def test_row_weights_count(kind, bias, way):
    row_weight = torch.rand(N, dtype=torch.float64)
    assert_as_dense(Head(bias, kind, reduction="sum", row_weight=row_weight), way)


@every_way
@pytest.mark.parametrize("classes", [5, K], ids=["few classes", "many classes"])
def test_chunks_that_no_cache_holds_are_gone_over_in_blocks(classes, way, monkeypatch):
    monkeypatch.setattr("torch_softmax.losses._sweeps.cached_rows", lambda _: 3)
    assert_as_dense(Head(classes=classes, reduction="none"), way)


@pytest.mark.parametrize(
    ("way", "products"),
    [
        # The loss and its slopes, its gradient, and the changes of this.
        ("forward over reverse", 1 + (1 + M) + 2 + (1 + 2 * M)),
        ("reverse over reverse", 1 + 2 + (1 + 2 * M)),
    ],
)
def test_logits_are_made_once_for_all_directions(way, products, bias):
    head = Head(bias)
    head.ours = lambda W, b=None: linear_cross_entropy(head.x, W, head.target, linear_bias=b)
    with Products() as counted:
        vmap(product(head.ours, head.parameters, way))(*head.directions(M))
    assert counted.number == products


def test_a_pulled_back_gradient_takes_as_many_products_as_the_operator():
    head = Head(bias=False)
    _, pull = vjp(grad(lambda W: linear_cross_entropy(head.x, W, head.target)), head.W)
    with Products() as counted:
        vmap(pull)(*head.directions(M))
    assert counted.number == 1 + 2 * M


@every_way
def test_no_more_than_a_chunk_of_logits_is_held(way):
    rows, classes, chunk = 411, 37, 100  # more of them than numbers in all directions
    x, W, target = double(rows, D), double(classes, D), torch.zeros(rows, dtype=torch.int64)

    def loss(W):
        return linear_cross_entropy(x, W, target, chunk_size=chunk)

    with NewTensors() as new:
        vmap(product(loss, (W,), way))(double(M, classes, D))
    assert max(new.sizes) == chunk * classes


@every_way
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_directions_may_lie_along_any_dimension(dim, way):
    head = Head(bias=False)
    (u,) = head.directions(M)
    of = product(head.ours, (head.W,), way)
    ours = vmap(of, in_dims=dim, out_dims=dim)(u.movedim(0, dim))
    assert_same(ours[0].movedim(dim, 0), vmap(of)(u)[0])


@every_way
def test_a_direction_of_the_bias_may_be_the_same_for_all(way):
    head = Head()
    W, b = head.directions(M)
    ours = vmap(product(head.ours, head.parameters, way), in_dims=(0, None))(W, b[0])
    every = b[:1].expand_as(b)
    assert_same(ours, one_by_one(product(head.dense, head.parameters), (W, every)))


@every_way
def test_a_direction_of_one_parameter_changes_both_gradients(way):
    head = Head()
    u, _ = head.directions(M)
    none = torch.zeros_like(head.b)
    ours = vmap(lambda u: product(head.ours, head.parameters, way)(u, none))(u)
    expected = one_by_one(lambda u: product(head.dense, head.parameters)(u, none), (u,))
    assert_same(ours, expected)


@every_way
def test_vmap_of_vmap(bias, way):
    head = Head(bias)
    u = head.directions(2, 3)
    ours = vmap(vmap(product(head.ours, head.parameters, way)))(*u)
    expected = one_by_one(product(head.dense, head.parameters), [part.flatten(0, 1) for part in u])
    assert_same([part.flatten(0, 1) for part in ours], list(expected))


@every_way
def test_vmap_over_layers_and_their_directions(way):
    head = Head(bias=False)
    layers, u = double(2, K, D), double(2, M, K, D)

    def products(loss):
        return lambda W, u: vmap(product(loss, (W,), way))(u)[0]

    expected = [
        one_by_one(product(head.dense, (W,)), (v,))[0] for W, v in zip(layers, u, strict=True)
    ]
    assert_same(vmap(products(head.ours))(layers, u), torch.stack(expected))


@every_way
@every_reduction
def test_derivatives_of_many_products(reduction, bias, way):
    head = Head(bias, reduction=reduction)
    u, v = head.directions(M), head.directions(M)

    def total(loss, many):
        def of(*at):
            results = many(product(loss, at, way), u)
            return sum((r * w).sum() for r, w in zip(results, v, strict=True))

        return of

    ours = total(head.ours, lambda function, u: vmap(function)(*u))
    dense = total(head.dense, one_by_one)
    every = tuple(range(len(head.parameters)))
    assert_same(grad(ours, every)(*head.parameters), grad(dense, every)(*head.parameters))
    along = head.directions()
    assert_same(jvp(ours, head.parameters, along), jvp(dense, head.parameters, along))


@every_way
def test_the_derivative_by_the_input(way):
    head = Head()
    u = head.directions(M)

    def total(name, many):
        def of(x):
            other = Head()
            other.x, other.target = x, head.target
            products = many(product(getattr(other, name), head.parameters, way), u)
            return sum(part.square().sum() for part in products)

        return of

    ours = grad(total("ours", lambda function, u: vmap(function)(*u)))(head.x)
    assert_same(ours, grad(total("dense", one_by_one))(head.x))


@every_way
@pytest.mark.parametrize("number", [0, 1])
def test_no_direction_and_one(number, bias, way):
    head = Head(bias, reduction="sum")
    u = head.directions(number)
    ours = vmap(product(head.ours, head.parameters, way))(*u)
    assert [tuple(part.shape) for part in ours] == [tuple(part.shape) for part in u]
    if number:
        assert_same(ours, one_by_one(product(head.dense, head.parameters), u))


def test_the_whole_hessian(bias):
    head = Head(bias, classes=7)
    every = tuple(range(len(head.parameters)))
    ours, dense = (
        torch.func.hessian(loss, every)(*head.parameters) for loss in (head.ours, head.dense)
    )
    assert_same(ours, dense)


def test_no_rows_have_no_curvature():
    head = Head(reduction="sum")
    head.x, head.target = head.x[:0], head.target[:0]
    for part in vmap(product(head.ours, head.parameters))(*head.directions(M)):
        assert not part.any()


def test_an_ignored_row_adds_nothing_whatever_it_holds():
    head = Head(reduction="sum")
    u = head.directions(M)
    expected = vmap(product(head.ours, head.parameters))(*u)
    head.x[0] = torch.nan
    assert_same(vmap(product(head.ours, head.parameters))(*u), expected)
