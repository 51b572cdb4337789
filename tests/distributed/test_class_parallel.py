"""Classes sharded over processes: everything equals torch's dense loss of all classes in one."""

import functools
import os
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from scripts.benchmark.parallel import Traffic
from tests.distributed.world import (  # after that, for what it tells the fork server
    RankError,
    World,
)
from tests.helpers import (
    ORDERS,
    assert_identical,
    assert_same,
    cast,
    dense_linear_cross_entropy,
    directions_like,
    every_option,
    loss_and_gradients,
    of_differentiable,
    options_of,
    randn,
    random_target,
    upstream_like,
)
from torch_softmax.functional import linear_cross_entropy

N, D, K = 6, 3, 7


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{}ranks".format)
def world(request):
    with World(request.param) as world:
        yield world


# Uneven shards, and at three and four ranks empty ones.
every_class_count = pytest.mark.parametrize("classes", [K, 2])
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
every_order = pytest.mark.parametrize("order", ["first", "second"])
every_kind = pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])


def problem(kind="indices", shape=(N,), classes=K, bias=True):
    """Input, weight, target and maybe bias, of which all but the target require a gradient."""
    target = random_target(kind, shape, classes).detach()
    inputs = randn(*shape, D), randn(classes, D), target
    return (*inputs, randn(classes)) if bias else inputs


def applied(function, options):
    def loss(x, W, target, b=None):
        return function(x, W, target, linear_bias=b, **options)

    return loss


def placed(tensor, mesh, placement):
    """A leaf on the mesh."""
    leaf = distribute_tensor(tensor.detach(), mesh, [placement])
    return leaf.requires_grad_(tensor.requires_grad)


def shard(mesh, inputs):
    """The inputs with weight and bias sharded, as leaves."""
    x, W, target, *b = inputs
    x = x.detach().requires_grad_(x.requires_grad)
    return x, placed(W, mesh, Shard(0)), target, *(placed(p, mesh, Shard(0)) for p in b)


def full(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(direction, gradient):
    """A direction, on the mesh as the gradient is."""
    if isinstance(gradient, DTensor):
        return distribute_tensor(direction, gradient.device_mesh, gradient.placements)
    return direction


def double_gradients(function, inputs):
    """As that of the helpers, for gradients of which some are on a mesh."""
    _, inputs_wanted = of_differentiable(function, inputs)
    loss = function(*inputs)
    gradients = torch.autograd.grad(loss, inputs_wanted, upstream_like(loss), create_graph=True)
    directions = map(like, directions_like(gradients, seed=0), gradients)
    return torch.autograd.grad(gradients, inputs_wanted, list(directions))


SHARDED_ORDERS = {"first": ORDERS["first"], "second": double_gradients}


def sharded(mesh, inputs, options, order="first"):
    """The derivatives of an order, in full, with the classes sharded."""
    loss = applied(linear_cross_entropy, options)
    return tuple(map(full, SHARDED_ORDERS[order](loss, shard(mesh, inputs))))


def dense(inputs, options, order="first"):
    return tuple(ORDERS[order](applied(dense_linear_cross_entropy, options), inputs))


def assert_same_as_dense(world, inputs, options, order="first"):
    expected = dense(inputs, options, order)
    for actual in world.run(sharded, inputs, options, order):
        assert_same(actual, expected)


# Loss and gradients


@every_option
@every_class_count
def test_loss_and_gradients(world, classes, kind, weighted, label_smoothing, reduction):
    options = options_of(classes, weighted, label_smoothing, reduction)
    assert_same_as_dense(world, problem(kind, classes=classes), options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("classes", [1, 3, 12])
@every_order
def test_other_class_counts_and_no_bias(world, order, classes, bias):
    assert_same_as_dense(world, problem(classes=classes, bias=bias), {}, order)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@every_class_count
@every_reduction
@every_kind
def test_double_gradients(world, kind, reduction, classes, label_smoothing):
    options = options_of(classes, True, label_smoothing, reduction)
    assert_same_as_dense(world, problem(kind, classes=classes), options, "second")


def with_sharded_target(mesh, inputs, options):
    x, W, target, b = inputs
    on_mesh = distribute_tensor(target, mesh, [Shard(target.dim() - 1)])
    return sharded(mesh, (x, W, on_mesh, b), options)


@pytest.mark.parametrize("shape", [(N,), (2, 3)], ids=str)
@every_class_count
def test_probabilities_that_are_sharded(world, classes, shape):
    options = options_of(classes, True, 0.2, "mean")
    x, W, target, b = problem("probabilities", shape, classes)
    flat = x.reshape(-1, D), W, target.reshape(-1, classes), b
    loss, dx, *rest = dense(flat, options)
    for actual in world.run(with_sharded_target, (x, W, target, b), options):
        assert_same(actual, (loss, dx.reshape(x.shape), *rest))


def all_replicated(mesh, inputs, options):
    x, W, target, b = inputs
    on_mesh = {**options, "weight": distribute_tensor(options["weight"], mesh, [Replicate()])}
    x, target = placed(x, mesh, Replicate()), distribute_tensor(target, mesh, [Replicate()])
    W, b = placed(W, mesh, Shard(0)), placed(b, mesh, Shard(0))
    results = loss_and_gradients(applied(linear_cross_entropy, on_mesh), x, W, target, b)
    assert [type(result) for result in results] == [torch.Tensor, DTensor, DTensor, DTensor]
    return tuple(map(full, results))


def test_input_target_and_class_weights_on_the_mesh(world):
    inputs, options = problem(), options_of(K, True, 0.2, "mean")
    expected = dense(inputs, options)
    for actual in world.run(all_replicated, inputs, options):
        assert_same(actual, expected)


@pytest.mark.parametrize(("reduction", "mean"), [("mean", torch.nan), ("sum", 0), ("none", 0)])
def test_all_ignored(world, reduction, mean):
    x, W, target, b = problem()
    inputs = x, W, torch.full_like(target, -100), b
    for loss, *gradients in world.run(sharded, inputs, {"reduction": reduction}):
        torch.testing.assert_close(loss, torch.full_like(loss, mean), equal_nan=True)
        for gradient in gradients:
            assert_identical(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_order
def test_chunks(world, order, reduction, chunk_size):
    options = {"reduction": reduction, "chunk_size": chunk_size, "label_smoothing": 0.2}
    assert_same_as_dense(world, problem("ignored"), options, order)


@every_class_count
def test_extreme_logits(world, classes):
    x, W, target, b = problem("ignored", classes=classes)
    with torch.no_grad():
        W *= 1e5
        b -= 1e5
    assert_same_as_dense(world, (x, W, target, b), {"label_smoothing": 0.2})


@pytest.mark.parametrize("shape", [(), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_leading_dimensions(world, reduction, shape):
    x, W, target, b = problem(shape=shape)
    options = {"reduction": reduction}
    loss, dx, *rest = dense((x.reshape(-1, D), W, target.reshape(-1), b), options)
    expected = loss.reshape(() if reduction == "sum" else shape), dx.reshape(x.shape), *rest
    for actual in world.run(sharded, (x, W, target, b), options):
        assert_same(actual, expected)


@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (0, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_order
def test_only_some_require_a_gradient(world, order, reduction, wanted):
    inputs = [
        t.detach().requires_grad_(i in wanted) if t.is_floating_point() else t
        for i, t in enumerate(problem())
    ]
    assert_same_as_dense(world, inputs, {"reduction": reduction}, order)


def several(mesh, draws, options, order):
    return [sharded(mesh, inputs, options, order) for inputs in draws]


def several_under_autocast(mesh, draws):
    with torch.autocast("cpu", torch.bfloat16):
        return several(mesh, draws, {}, "first")


def draw_in(dtype):
    return [cast(problem(shape=(12,), classes=40), dtype) for _ in range(16)]


def errors(results, draws, options, order="first"):
    """How far each kind of result is from what float64 gives, over all draws."""
    exact = [dense(cast(inputs, torch.float64), options, order) for inputs in draws]
    squares = [
        torch.stack([(a.double() - e).square().sum() for a, e in zip(*pair, strict=True)])
        for pair in zip(results, exact, strict=True)
    ]
    return sum(squares).sqrt()


@every_order
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_error_in_half_precision_is_no_worse_than_that_of_torch(world, reduction, order):
    draws, options = draw_in(torch.bfloat16), {"reduction": reduction}
    of_torch = errors([dense(inputs, options, order) for inputs in draws], draws, options, order)
    for results in world.run(several, draws, options, order):
        assert (errors(results, draws, options, order) <= 1.1 * of_torch).all()


def test_error_under_autocast_is_close_to_that_of_torch(world):
    draws = draw_in(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        of_torch = errors([dense(inputs, {}) for inputs in draws], draws, {})
    for results in world.run(several_under_autocast, draws):
        # Each rank rounds its part of ∂L/∂x.
        allowed = torch.tensor([1.1, 1.25, 1.1, 1.1])
        assert (errors(results, draws, {}) <= allowed * of_torch).all()


@every_order
def test_ranks_have_the_same_bits(world, order):
    first, *others = world.run(sharded, problem(), {}, order)
    for results in others:
        assert all(map(torch.equal, results, first))


def compiled(mesh, inputs, options):
    loss = torch.compile(applied(linear_cross_entropy, options), backend="aot_eager")
    return tuple(map(full, loss_and_gradients(loss, *shard(mesh, inputs))))


@pytest.mark.parametrize("kind", ["ignored", "probabilities"])
def test_compiles_in_parts(two, kind):
    inputs, options = problem(kind), options_of(K, True, 0.2, "mean")
    expected = dense(inputs, options)
    for actual in two.run(compiled, inputs, options):
        assert_same(actual, expected)


def twice(mesh, inputs):
    x, W, target, b = shard(mesh, inputs)
    loss = linear_cross_entropy(x, W, target, linear_bias=b)
    loss.backward(upstream_like(loss), retain_graph=True)
    loss.backward(upstream_like(loss))
    return tuple(full(t.grad) for t in (x, W, b))


def test_a_graph_that_is_retained(world):
    inputs = problem()
    _, *gradients = dense(inputs, {})
    for actual in world.run(twice, inputs):
        assert_same(actual, tuple(2 * g for g in gradients))


# Higher derivatives, by other ways


def along_a_direction(mesh, inputs, directions):
    """The Hessian times a direction, by the gradient of a sum of which parts are on the mesh."""
    x, W, target, b = shard(mesh, inputs)
    loss = linear_cross_entropy(x, W, target, linear_bias=b)
    gradients = torch.autograd.grad(loss, (x, W, b), create_graph=True)
    products = (g * like(d, g) for g, d in zip(gradients, directions, strict=True))
    slope = sum(full(product.sum()) for product in products)
    return tuple(map(full, torch.autograd.grad(slope, (x, W, b))))


def vector_hessian_product(mesh, inputs, directions):
    x, W, target, b = shard(mesh, inputs)
    _, product = torch.autograd.functional.vhp(
        lambda x, W, b: linear_cross_entropy(x, W, target, linear_bias=b),
        (x, W, b),
        tuple(like(d, t) for d, t in zip(directions, (x, W, b), strict=True)),
    )
    return tuple(map(full, product))


@pytest.mark.parametrize("product", [along_a_direction, vector_hessian_product])
def test_hessian_times_a_vector(world, product):
    x, W, target, b = inputs = problem()
    directions = directions_like((x, W, b), seed=0)
    _, expected = torch.autograd.functional.vhp(
        lambda x, W, b: dense_linear_cross_entropy(x, W, target, linear_bias=b),
        (x, W, b),
        tuple(directions),
    )
    for actual in world.run(product, inputs, directions):
        assert_same(actual, expected)


def gradient_by_upstream(mesh, inputs, upstream):
    x, W, target, b = shard(mesh, inputs)
    losses = linear_cross_entropy(x, W, target, linear_bias=b, reduction="none")
    gradients = torch.autograd.grad(losses, (x, W, b), upstream, create_graph=True)
    ones = [like(torch.ones(g.shape, dtype=g.dtype), g) for g in gradients]
    return torch.autograd.grad(gradients, upstream, ones)[0]


def test_gradient_by_the_gradient_from_above(world):
    x, W, target, b = inputs = problem()
    upstream = randn(N)
    losses = dense_linear_cross_entropy(x, W, target, linear_bias=b, reduction="none")
    gradients = torch.autograd.grad(losses, (x, W, b), upstream, create_graph=True)
    (expected,) = torch.autograd.grad(sum(g.sum() for g in gradients), upstream)
    for actual in world.run(gradient_by_upstream, inputs, upstream):
        assert_same(actual, expected)


def forward_mode(mesh, inputs, direction):
    x, W, target, b = shard(mesh, inputs)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        loss = linear_cross_entropy(dual, W, target, linear_bias=b)
        return forward_ad.unpack_dual(loss).tangent.detach()


def test_forward_mode_along_the_input(world):
    x, W, target, b = inputs = problem()
    direction = torch.randn_like(x)

    def loss(x):
        return dense_linear_cross_entropy(x, W, target, linear_bias=b)

    _, expected = torch.func.jvp(loss, (x,), (direction,))
    for actual in world.run(forward_mode, inputs, direction):
        assert_same(actual, expected.detach())


# What can't be differentiated so


def transformed_by_weight(transform, mesh, inputs):
    x, W, target, _ = shard(mesh, inputs)
    transform(lambda W: linear_cross_entropy(x, W, target))(W.detach())


def transformed_by_input(transform, mesh, inputs):
    x, W, target, _ = shard(mesh, inputs)
    transform(lambda x: linear_cross_entropy(x, W, target))(x.detach())


def batched(mesh, inputs):
    x, W, target, _ = shard(mesh, inputs)
    torch.func.vmap(lambda x: linear_cross_entropy(x, W, target))(x[None])


def forward_mode_by_weight(mesh, inputs):
    x, W, target, _ = shard(mesh, inputs)
    with forward_ad.dual_level():
        linear_cross_entropy(x, forward_ad.make_dual(W.detach(), W.detach()), target)


def third_order(mesh, inputs):
    x, W, target, _ = shard(mesh, inputs)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(x, W, target), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x, create_graph=True)
    torch.autograd.grad(second.sum(), x)


def hessian_by_the_double_trick(mesh, inputs):
    x, W, target, _ = shard(mesh, inputs)
    torch.autograd.functional.hvp(lambda x: linear_cross_entropy(x, W, target), x, x.detach())


def gradient_of_the_target(mesh, inputs):
    x, W, target, _ = shard(mesh, inputs)
    p = F.one_hot(target, len(W)).double().requires_grad_()
    linear_cross_entropy(x, W, p)


def error_of(mesh, function, *args):
    """What a call raises."""
    with pytest.raises(Exception) as raised:  # noqa: PT011, its type and text are looked at later
        function(mesh, *args)
    return type(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (functools.partial(transformed_by_weight, torch.func.grad), "torch.func needs all classes"),
        (functools.partial(transformed_by_input, torch.func.grad), "torch.func needs all classes"),
        (batched, "torch.func needs all classes"),
        (forward_mode_by_weight, "does not have a sharding strategy"),  # says DTensor itself
        (third_order, "a third derivative"),
        (hessian_by_the_double_trick, "a third derivative"),
        (gradient_of_the_target, "target must not require a gradient"),
    ],
    ids=lambda value: getattr(getattr(value, "func", value), "__name__", ""),
)
def test_other_derivatives_raise(world, function, message):
    for error, text in world.run(error_of, function, problem()):
        assert error is NotImplementedError
        assert message in text


# What the ranks exchange


def exchanged(mesh, inputs, options):
    loss = applied(linear_cross_entropy, options)
    inputs = shard(mesh, inputs)
    with Traffic() as traffic:
        loss_and_gradients(loss, *inputs)
    return traffic.messages


@pytest.mark.parametrize("classes", [K, 1000])
def test_messages_are_of_rows_alone(two, classes):
    for start, *messages in two.run(exchanged, problem(classes=classes), {}):
        assert messages == [("allreduce_", N), ("allreduce_", 2 * N), ("allreduce_", N * D)]
        assert start == ("allreduce_", 40)  # do all ranks agree on what is asked for?


@pytest.mark.parametrize("rows", [1, N, 100])
def test_the_first_message_has_one_length(two, rows):
    for start, *_ in two.run(exchanged, problem(shape=(rows,)), {}):
        assert start == ("allreduce_", 40)


def test_messages_of_probabilities_have_their_mass_too(two):
    for _, *messages in two.run(exchanged, problem("probabilities"), {}):
        assert [numbers for _, numbers in messages] == [N, N, 2 * N, N * D]


def test_messages_of_an_input_without_gradient(two):
    x, *rest = problem()
    for _, *messages in two.run(exchanged, (x.detach(), *rest), {}):
        assert [numbers for _, numbers in messages] == [N, 2 * N]


def bytes_exchanged(mesh, inputs):
    inputs = shard(mesh, inputs)
    with Traffic() as traffic:
        loss_and_gradients(applied(linear_cross_entropy, {}), *inputs)
    return [message.nbytes for message in traffic.sent[1:]]


def test_numbers_of_half_precision_are_added_in_single(two):
    for sent in two.run(bytes_exchanged, cast(problem(), torch.bfloat16)):
        assert sent == [4 * N, 4 * 2 * N, 4 * N * D]


def test_messages_of_chunks(two):
    for _, *messages in two.run(exchanged, problem(), {"chunk_size": 4}):
        assert [numbers for _, numbers in messages] == [4, 8, 2, 4, N * D]


# Bad input


class Refusal(NamedTuple):
    """Arguments that are refused, as a function of the mesh, and how."""

    arguments: object
    error: type
    message: str


def call(mesh, arguments):
    x, W, target, b = shard(mesh, problem())
    given = {"input": x, "linear_weight": W, "target": target, "linear_bias": b}
    return linear_cross_entropy(**given | arguments(mesh))


def weight_on_a_mesh_of_two_dimensions(mesh):
    grid = init_device_mesh("cpu", (1, mesh.size()))
    weight = distribute_tensor(torch.zeros(K, D), grid, [Replicate(), Shard(0)])
    return {"linear_weight": weight, "linear_bias": None}


def weight_by_features(mesh):
    return {"linear_weight": distribute_tensor(torch.zeros(K, D), mesh, [Shard(1)])}


def weight_replicated(mesh):
    return {"linear_weight": distribute_tensor(torch.zeros(K, D), mesh, [Replicate()])}


def weight_dealt_out_otherwise(mesh):
    local = torch.zeros(1 if mesh.get_local_rank() == 0 else K - 1, D)
    weight = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size((K, D)), stride=(D, 1))
    return {"linear_weight": weight}


def weight_plain(mesh):
    return {"linear_weight": torch.zeros(K, D)}


def weight_of_more_dimensions(mesh):
    weight = distribute_tensor(torch.zeros(K, 2, D), mesh, [Shard(0)])
    target = torch.zeros(N, 2, dtype=torch.int64)
    return {"linear_weight": weight, "linear_bias": None, "target": target}


def bias_plain(mesh):
    return {"linear_bias": torch.zeros(K)}


def bias_replicated(mesh):
    return {"linear_bias": distribute_tensor(torch.zeros(K), mesh, [Replicate()])}


def bias_on_another_mesh(mesh):
    other = init_device_mesh("cpu", (mesh.size(),), mesh_dim_names=("other",))
    return {"linear_bias": distribute_tensor(torch.zeros(K), other, [Shard(0)])}


def input_by_rows(mesh):
    return {"input": distribute_tensor(torch.zeros(N, D), mesh, [Shard(0)])}


def probabilities_by_rows(mesh):
    return {"target": distribute_tensor(torch.zeros(N, K), mesh, [Shard(0)])}


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(weight_on_a_mesh_of_two_dimensions, ValueError, "linear_weight must be of one dim"),
        Refusal(weight_by_features, ValueError, "linear_weight must be sharded on dimension 0"),
        Refusal(weight_replicated, ValueError, "linear_weight must be sharded on dimension 0"),
        Refusal(weight_dealt_out_otherwise, ValueError, "linear_weight must hold "),
        Refusal(weight_plain, TypeError, "linear_weight must be a DTensor"),
        Refusal(weight_of_more_dimensions, ValueError, "linear_weight must have the shape (C, D)"),
        Refusal(bias_plain, TypeError, "linear_bias must be a DTensor"),
        Refusal(bias_replicated, ValueError, "linear_bias must be sharded on dimension 0"),
        Refusal(bias_on_another_mesh, ValueError, "linear_bias must be on the mesh"),
        Refusal(input_by_rows, ValueError, "input must be replicated"),
        Refusal(probabilities_by_rows, ValueError, "target must be sharded on dimension 1"),
    ],
    ids=lambda refusal: refusal.arguments.__name__,
)
def test_bad_arguments(two, refusal):
    for error, text in two.run(error_of, call, refusal.arguments):
        assert error is refusal.error
        assert text.startswith(refusal.message)
        assert "\n" not in text


def differently(mesh, name, values):
    torch.manual_seed(0)
    call(mesh, lambda mesh: {name: values[mesh.get_local_rank()]})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("input", (torch.ones(N, D), -torch.ones(N, D))),
        ("input", (torch.ones(N, D), torch.ones(N, D).flip(1).cumsum(0))),
        ("input", (torch.ones(N, D), torch.ones(N, D).bfloat16())),
        ("input", (torch.ones(N, D), torch.ones(N, D).requires_grad_())),
        ("target", (torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([1, 0, 2, 3, 4, 5]))),
        ("target", (torch.tensor([0] * N), torch.tensor([0] * (N - 1) + [-100]))),
        ("target", (torch.tensor([3, 0, 0, 0, 0, 0]), torch.tensor([1, 1, 0, 0, 0, 0]))),
        ("target", (torch.ones(N, K), torch.eye(N, K))),
        ("target", (torch.ones(N, K), 2 * torch.ones(N, K))),
        ("input", (torch.ones(N, D), 1.01 * torch.ones(N, D))),
        ("weight", (torch.ones(K), 1.5 * torch.ones(K))),
        ("weight", (torch.ones(K), None)),
        ("weight", (torch.ones(K), torch.arange(1.0, K + 1))),
        ("reduction", ("mean", "sum")),
        ("ignore_index", (0, 1)),
        ("label_smoothing", (0.1, 0.2)),
        ("chunk_size", (2, 3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ranks_that_are_called_differently_all_raise(two, name, values):
    for error, text in two.run(error_of, differently, name, values):
        assert error is ValueError
        assert text.startswith(f"{name} must be the same on every rank")
        assert "\n" not in text


def with_one_number_slightly_different(mesh, level):
    x = torch.ones(N, D)
    x[0, 0] += 1e-6 * mesh.get_local_rank()
    usual = dist.get_debug_level()
    dist.set_debug_level(level)
    try:
        call(mesh, lambda mesh: {"input": x})
    finally:
        dist.set_debug_level(usual)


def test_values_are_compared_exactly_where_that_is_asked_for(two):
    for error, text in two.run(
        error_of, with_one_number_slightly_different, dist.DebugLevel.DETAIL
    ):
        assert error is ValueError
        assert text.startswith("input must be the same on every rank")


def test_ranks_may_round_in_another_order(two):
    two.run(with_one_number_slightly_different, dist.DebugLevel.OFF)


def compiled_with_rows_of_its_own(mesh):
    x, W, target = shard(mesh, problem(bias=False))
    loss = torch.compile(linear_cross_entropy, backend="aot_eager")
    loss(x + mesh.get_local_rank(), W, target)


def test_rows_of_each_rank_raise_in_compiled_code_too(two):
    for error, text in two.run(error_of, compiled_with_rows_of_its_own):
        assert error is ValueError
        assert text.startswith("input must be the same on every rank")


def bias_on_the_first_rank_alone(mesh):
    call(mesh, lambda mesh: {"linear_bias": None} if mesh.get_local_rank() else {})


def test_a_bias_on_one_rank_alone_raises_on_all(two):
    for error, text in two.run(error_of, bias_on_the_first_rank_alone):
        assert error is ValueError
        assert text.startswith("linear_bias must be the same on every rank")


def die_on_the_last_rank(mesh):
    if mesh.get_local_rank() == mesh.size() - 1:
        os._exit(1)
    call(mesh, lambda mesh: {})


def test_a_rank_that_dies_ends_the_others():
    with World(2) as world, pytest.raises(RankError) as raised:
        world.run(die_on_the_last_rank)
    failures = raised.value.failures
    assert failures[0].startswith("raised")  # its connection is closed, and it doesn't wait
    assert failures[1] == "died"
