"""A function of one row of a layer's logits in chunks: what it is for all logits, or it raises."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F

from tests.helpers import NewTensors, assert_differentiable, assert_same, randn
from torch_softmax.functional import map_logits

N, D, K = 7, 3, 40

every_chunk = pytest.mark.parametrize("chunk_size", [1, 3, N, 100])
every_reduction = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


def one(z, label, factor, scale):
    """A number, of the row's own and of what all rows share."""
    return torch.logsumexp(z * scale, 0) * factor - z[label]


def two(z, label, factor, scale):
    """That, and as many numbers as there are classes."""
    return one(z, label, factor, scale), z.tanh()


FUNCTIONS = [one, two]


def reduced(rows, reduction):
    return {"none": rows, "sum": rows.sum(0), "mean": rows.mean(0)}[reduction]


def problem(classes=K):
    """Input, weight, bias, a factor for each row, and one for each class."""
    return randn(N, D), randn(classes, D), randn(classes), randn(N), randn(classes)


def in_chunks(fn, label, **options):
    def applied(x, W, b, factor, scale):
        return map_logits(fn, x, W, label, factor, linear_bias=b, shared=(scale,), **options)

    return applied


def at_once(fn, label, reduction="none"):
    def applied(x, W, b, factor, scale):
        each = zip(F.linear(x, W, b), label, factor, strict=True)
        results = [fn(*row, scale) for row in each]
        if isinstance(results[0], tuple):
            results = tuple(map(torch.stack, zip(*results, strict=True)))
        else:
            results = torch.stack(results)
        if reduction == "none":
            return results
        every = results if isinstance(results, tuple) else (results,)
        reduced = tuple(r.sum(0) if reduction == "sum" else r.mean(0) for r in every)
        return reduced if isinstance(results, tuple) else reduced[0]

    return applied


@every_chunk
@every_reduction
@pytest.mark.parametrize("fn", FUNCTIONS)
@pytest.mark.parametrize("classes", [5, K])
def test_results_are_those_for_all_logits_at_once(classes, fn, reduction, chunk_size):
    inputs, label = problem(classes), torch.arange(N) % classes
    actual = in_chunks(fn, label, reduction=reduction, chunk_size=chunk_size)(*inputs)
    assert_same(actual, at_once(fn, label, reduction)(*inputs))


@every_chunk
@every_reduction
def test_gradients_are_those_for_all_logits_at_once(reduction, chunk_size):
    inputs, label = problem(), torch.arange(N) % K
    actual = in_chunks(one, label, reduction=reduction, chunk_size=chunk_size)(*inputs)
    expected = at_once(one, label, reduction)(*inputs)
    upstream = torch.randn_like(actual)
    assert_same(*(torch.autograd.grad(r, inputs, upstream) for r in (actual, expected)))


@every_reduction
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_derivatives_to_second_order_in_either_mode(fn, reduction):
    label = torch.arange(N) % 5
    function = in_chunks(fn, label, reduction=reduction, chunk_size=4)
    assert_differentiable(function, *problem(5), fast_mode=True)


def test_a_third_derivative():
    inputs, label = problem(), torch.arange(N) % K

    def third(function):
        derivative = function(*inputs).sum()
        for _ in range(3):
            (by_W,) = torch.autograd.grad(derivative, inputs[1], create_graph=True)
            derivative = by_W.square().sum()
        return derivative

    assert_same(third(in_chunks(one, label, chunk_size=3)), third(at_once(one, label)))


def test_leading_dimensions_are_those_of_the_results():
    x, W = randn(2, 3, D), randn(K, D)
    assert_same(map_logits(torch.tanh, x, W), (x @ W.t()).tanh())


@every_reduction
def test_no_rows_at_all(reduction):
    x, W = randn(0, D), randn(K, D)
    result = map_logits(lambda z: z.sum(), x, W, reduction=reduction)
    assert result.numel() == (reduction != "none")
    assert not torch.autograd.grad(result.sum(), W)[0].any()


def test_hessian_by_func():
    x, _, b, factor, scale = (t.detach() for t in problem())
    W, label = randn(K, D).detach(), torch.arange(N) % K

    def hessian(function):
        return torch.func.hessian(lambda W: function(x, W, b, factor, scale))(W)

    ours = hessian(in_chunks(one, label, reduction="mean", chunk_size=2))
    assert_same(ours, hessian(at_once(one, label, "mean")))


@pytest.mark.usefixtures("fresh_compiler")
@every_reduction
def test_compiles_whole(reduction):
    inputs, label = problem(), torch.arange(N) % K
    function = in_chunks(one, label, reduction=reduction, chunk_size=4)
    results = [
        f(*inputs) for f in (torch.compile(function, backend="aot_eager", fullgraph=True), function)
    ]
    assert_same(*results)
    assert_same(*(torch.autograd.grad(r.sum(), inputs) for r in results))


@every_reduction
@pytest.mark.parametrize("shape", [(1,), (2, 3)], ids=str)
def test_results_with_further_dimensions(shape, reduction):
    x, W = randn(*shape, D), randn(K, D)
    results = (
        map_logits(lambda z: z[:2].sin(), x, W, reduction=reduction, chunk_size=2),
        reduced((x @ W.t())[..., :2].sin().flatten(0, -2), reduction),
    )
    results = [result.reshape(results[0].shape) for result in results]
    assert_same(*results)
    assert_same(*(torch.autograd.grad(r.square().sum(), (x, W)) for r in results))


def test_one_row_alone():
    x, W = randn(D), randn(K, D)
    assert_same(map_logits(lambda z: z[:2], x, W), (W @ x)[:2])


def test_forward_mode_over_vmap():
    x, W = randn(2, N, D).detach(), randn(K, D).detach()

    def batch(of):
        return torch.func.jvp(lambda x: torch.vmap(of)(x), (x,), (x,))

    ours = batch(lambda x: map_logits(torch.sin, x, W, chunk_size=3))
    assert_same(ours, batch(lambda x: (x @ W.t()).sin()))


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode])
def test_no_numbers_are_looked_at_where_there_are_none(mode):
    with mode():
        x, W = torch.empty(N, D), torch.empty(K, D)
        assert map_logits(lambda z: z.sum(), x, W).shape == (N,)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_number_for_each_row_is_worked_out_once_with_its_gradients(reduction):
    chunks = []

    def fn(z):
        chunks.append(z.shape)
        return z.sin().sum()

    loss = map_logits(fn, randn(N, D), randn(K, D), reduction=reduction, chunk_size=3)
    before = list(chunks)
    loss.backward()
    assert chunks == before


def test_results_may_be_a_list():
    x, W = randn(N, D), randn(K, D)
    results = map_logits(lambda z: [z.sin(), z.sum()], x, W)
    assert_same(results, ((x @ W.t()).sin(), (x @ W.t()).sum(1)))


def test_results_may_be_whole_numbers():
    x, W = randn(N, D), randn(K, D)
    assert torch.equal(map_logits(lambda z: z.argmax(), x, W), (x @ W.t()).argmax(1))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sums_and_means_of_whole_numbers_and_flags(reduction):
    x, W, label = randn(N, D), randn(K, D), torch.arange(N) % 3
    for fn in (lambda z, y: z.argmax(), lambda z, y: z[y] < z.mean()):
        each = map_logits(fn, x, W, label)
        expected = each.sum() if reduction == "sum" else each.double().mean().float()
        assert_same(map_logits(fn, x, W, label, reduction=reduction, chunk_size=3), expected)


@pytest.mark.parametrize("chunk_size", [3, N])
def test_results_share_no_memory(chunk_size):
    x, W, row = randn(N, D), randn(K, D), torch.zeros(N)
    fn = lambda z, r: (r, z, z, torch.ones(3))  # noqa: E731
    results = map_logits(fn, x, W, row, chunk_size=chunk_size)
    for result in results:
        result.add_(1)
    assert row.sum() == 0
    assert_same(results[1], x @ W.T + 1)
    assert_same(results[2], results[1])
    assert (results[3] == 2).all()


def test_results_may_be_nan():
    assert map_logits(lambda z: z.sum() * math.nan, randn(N, D), randn(K, D)).isnan().all()


def test_half_precision_comes_as_logits_in_float32():
    x, W = (torch.randn(n, D).bfloat16() for n in (N, K))
    assert_same(map_logits(lambda z: z, x, W), x.float() @ W.float().t())


def test_autocast_rounds_what_is_multiplied_and_nothing_else():
    x, W, V = torch.randn(N, D), torch.randn(K, D), torch.randn(K, 2)
    with torch.autocast("cpu", torch.bfloat16):
        result = map_logits(lambda z, V: z @ V, x, W, shared=(V,))
    torch.testing.assert_close(result, x.bfloat16().float() @ W.bfloat16().float().t() @ V)


@every_reduction
def test_a_weight_in_half_precision_is_not_widened_as_a_whole(reduction):
    classes = 3 * 2**12  # widened some at a time
    x, W = (torch.randn(n, D).bfloat16() for n in (N, classes))
    with NewTensors() as new:
        map_logits(lambda z: z.sum(), x, W, reduction=reduction, chunk_size=1)
    assert (classes, D) not in new.shapes


# What can't be right raises.


CAPTURED = "fn must not depend on a tensor that is differentiated"


def of_captured(t):
    x, W = randn(N, D).detach(), randn(K, D).detach()
    return map_logits(lambda z: z.sum() * t, x, W).sum()


def by_input_of_captured(t):
    W = randn(K, D).detach()

    def of_input(x):
        return map_logits(lambda z: z.sum() * t, x, W).sum()

    return torch.func.grad(of_input)(randn(N, D).detach()).sum()


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda t: of_captured(t.requires_grad_()),
        lambda t: torch.func.grad(of_captured)(t),
        lambda t: torch.func.jvp(of_captured, (t,), (t,)),
        lambda t: torch.func.grad(by_input_of_captured)(t),
        lambda t: torch.func.jvp(by_input_of_captured, (t,), (t,)),
        lambda t: torch.func.jvp(
            torch.vmap(of_captured, randomness="same"), (t.expand(2),), (t.expand(2),)
        ),
    ],
    ids=["requires_grad", "grad", "jvp", "an outer grad", "an outer jvp", "jvp of vmap"],
)
def test_a_captured_tensor_that_is_differentiated_raises(differentiate):
    with pytest.raises(ValueError, match=CAPTURED):
        differentiate(torch.tensor(2.0, dtype=torch.float64))


def test_a_captured_dual_raises():
    t = torch.tensor(2.0, dtype=torch.float64)
    with forward_ad.dual_level(), pytest.raises(ValueError, match=CAPTURED):
        of_captured(forward_ad.make_dual(t, t))


@pytest.mark.parametrize("derivative", [lambda fn: fn, torch.func.grad, torch.func.jacrev])
def test_a_captured_tensor_that_vmap_maps_raises(derivative):
    W, factors = randn(K, D).detach(), randn(N, K).detach()

    def of_captured(factor):
        def loss(x):
            return map_logits(lambda z: (z * factor).sum(), x, W, reduction="sum")

        return derivative(loss)(randn(N, D).detach())

    with pytest.raises(ValueError, match=f"{CAPTURED}, or mapped by vmap"):
        torch.vmap(of_captured, randomness="same")(factors)


def test_a_branch_on_a_shared_tensor_that_vmap_maps_raises():
    x, W, factors = randn(N, D).detach(), randn(K, D).detach(), randn(N).detach()

    def of_shared(factor):
        def fn(z, f):
            return z.sum() if f == 0 else z.sum() * factor

        return map_logits(fn, x, W, shared=(factor,))

    with pytest.raises(ValueError, match=ONE_ROW):
        torch.vmap(of_shared)(factors)


def test_a_captured_parameter_is_fine_without_gradients():
    with torch.no_grad():
        assert of_captured(torch.tensor(2.0, requires_grad=True)).isfinite()


class Older(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.sum()


class WithoutRule(torch.autograd.Function):
    @staticmethod
    def forward(z):
        return z.sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


ONE_ROW = "fn, which is mapped over rows, must not"


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda z: 3, TypeError, "fn must return tensors, got int"),
        (lambda z: (), TypeError, "fn must return a tensor or some, got none"),
        (lambda z: F.dropout(z, 1e-3).sum(), ValueError, ONE_ROW),
        (lambda z: z.sum() if z[0] > 0 else z[0], ValueError, ONE_ROW),
        (lambda z: z[z > 0].sum(), ValueError, ONE_ROW),
        (lambda z: z.sum() * z[0].item(), ValueError, ONE_ROW),
        (lambda z: z.mul_(2).sum(), ValueError, "must not write to what it is given"),
        (Older.apply, ValueError, "give it setup_context and a vmap rule"),
        (WithoutRule.apply, ValueError, "give it a vmap rule"),
    ],
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_is_no_function_of_one_row_raises(fn, error, message, reduction, mode):
    with mode(), pytest.raises(error, match=message):
        map_logits(fn, randn(N, D), randn(K, D), reduction=reduction)


def test_an_error_of_the_function_itself_is_its_own():
    with pytest.raises(RuntimeError, match="size of tensor a"):
        map_logits(lambda z: z + torch.ones(3), randn(N, D), randn(K, D))


class Sneaky:
    """A function that does something else when it is called for the third time or later."""

    def __init__(self, usual, later):
        self.calls, self.usual, self.later = 0, usual, later

    def __call__(self, *row):
        self.calls += 1
        return (self.usual if self.calls < 3 else self.later)(*row)


@every_reduction
@pytest.mark.parametrize("needed", [True, False], ids=["with gradients", "of constants"])
def test_a_tensor_captured_in_one_chunk_alone_is_found(reduction, needed):
    t = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    fn = Sneaky(lambda z: z.sum(), lambda z: z.sum() * (3 * t).sin())
    x, W = (randn(n, D).requires_grad_(needed) for n in (N, K))
    with pytest.raises(ValueError, match=CAPTURED):
        map_logits(
            fn, x.detach().requires_grad_(needed), W.detach(), reduction=reduction, chunk_size=2
        )


@pytest.mark.parametrize(
    "later", [lambda z: F.dropout(z, 0.5).sum(), lambda z: z.sum() if z[0] > 0 else z[0]]
)
def test_noise_and_branches_in_one_chunk_alone_raise(later):
    with pytest.raises(ValueError, match=ONE_ROW):
        map_logits(Sneaky(lambda z: z.sum(), later), randn(N, D), randn(K, D), chunk_size=2)


def test_a_captured_tensor_is_named():
    head = torch.nn.Linear(K, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"got head\.weight, head\.bias: pass it in shared"):
        map_logits(lambda z: head(z).squeeze(0), randn(N, D), randn(K, D))


def test_logits_that_are_kept_can_not_be_read_later():
    kept = []

    def fn(z):
        kept.append(z)
        return z.sum()

    map_logits(fn, randn(N, D), randn(K, D), chunk_size=2)
    with pytest.raises(RuntimeError, match="escaped"):
        kept[1].sum()


# Rows that a mask leaves out.


@every_reduction
@every_chunk
@pytest.mark.parametrize("counts", ["some", "none"])
def test_a_mask_selects_rows(reduction, chunk_size, counts):
    x, W, b, factor, scale = problem()
    label, mask = torch.arange(N) % K, torch.arange(N) % 3 == 1
    mask = mask if counts == "some" else torch.zeros_like(mask)
    dirty = x.detach().masked_fill(~mask.unsqueeze(1), math.nan).requires_grad_()
    inputs = (dirty, W, b, factor, scale)
    actual = in_chunks(one, label, reduction=reduction, chunk_size=chunk_size, mask=mask)(*inputs)
    rows = torch.where(mask, at_once(one, label)(x, W, b, factor, scale), 0)
    expected = rows if reduction == "none" else rows.sum()
    if reduction == "mean":
        expected = expected / mask.sum() if mask.any() else expected * math.nan
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-12, atol=1e-12)
    if reduction != "mean" or mask.any():
        upstream = torch.randn_like(actual)
        theirs = torch.autograd.grad(expected, (x, *inputs[1:]), upstream)
        assert_same(torch.autograd.grad(actual, inputs, upstream), theirs)


def test_rows_left_out_by_a_mask_that_is_mapped_are_no_rows_of_0():
    """Where the derivative of the function is infinite."""
    x, W, *_ = problem()
    masks = torch.stack([torch.arange(N) % 3 == 1, torch.arange(N) % 3 > 0])

    def loss(mask):
        return map_logits(lambda z: z.square().sum().sqrt(), x, W, mask=mask, reduction="sum")

    losses = (torch.vmap(loss)(masks), torch.stack([loss(mask) for mask in masks]))
    assert_same(*(torch.autograd.grad(loss.sum(), (x, W)) for loss in losses))


# Precision, and inference mode.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_of_half_precision_is_summed_in_float32(dtype):
    x, W = torch.zeros(9000, 2), torch.zeros(3, 2)
    mean = map_logits(lambda z: (z.sum() + 9).to(dtype), x, W, reduction="mean")
    pair = map_logits(lambda z: (z.sum(), (z.sum() + 9).to(dtype)), x, W, reduction="mean")
    assert_same([mean, pair[1]], [torch.tensor(9.0, dtype=dtype)] * 2)


@every_reduction
def test_a_backward_inside_inference_mode(reduction):
    inputs, label = problem(), torch.arange(N) % K
    result = in_chunks(one, label, reduction=reduction, chunk_size=3)(*inputs).sum()
    expected = torch.autograd.grad(result, inputs, retain_graph=True)
    with torch.inference_mode():
        actual = torch.autograd.grad(result, inputs)
    assert_same([t.clone() for t in actual], list(expected))


@every_reduction
def test_tensors_made_in_inference_mode(reduction):
    x, W, b, factor, scale = problem()
    label = torch.arange(N) % K
    with torch.inference_mode():
        made = factor.clone(), scale.clone()

    def gradient(factor, scale):
        result = in_chunks(one, label, reduction=reduction, chunk_size=3)(x, W, b, factor, scale)
        return torch.autograd.grad(result.sum(), (x, W))

    assert_same(gradient(*made), gradient(factor.detach(), scale.detach()))


def test_rows_of_another_number_raise():
    with pytest.raises(ValueError, match="rows must have the leading dimensions of input"):
        map_logits(lambda z, r: r, randn(N, D), randn(K, D), randn(N + 1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reduction": "avg"}, ValueError, "reduction must be 'none', 'mean' or 'sum', got 'avg'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"shared": (3,)}, TypeError, "shared must hold tensors, got int"),
        ({"shared": torch.ones(3)}, TypeError, "shared must be a tuple of tensors, got a tensor"),
        ({"shared": torch.ones(())}, TypeError, "shared must be a tuple of tensors, got a tensor"),
        ({"linear_bias": torch.zeros(4)}, ValueError, "linear_bias must have shape"),
        ({"mask": torch.ones(N)}, TypeError, "mask must have the dtype torch.bool"),
        ({"mask": torch.ones(3) > 0}, ValueError, "mask must have shape"),
    ],
)
def test_an_unfit_argument_is_named(changes, error, message):
    with pytest.raises(error, match=f"^{message}"):
        map_logits(lambda z, *_: z.sum(), randn(N, D), randn(K, D), **changes)


@pytest.mark.parametrize("later", [lambda z: (z.sum(), z.max()), lambda z: ()])
def test_another_number_of_results_for_other_rows_raises(later):
    fn = Sneaky(lambda z: z.sum(), later)
    with pytest.raises((ValueError, TypeError), match="fn must return"):
        map_logits(fn, randn(N, D), randn(K, D), chunk_size=3)


def test_a_result_of_another_width_for_other_rows_raises():
    fn = Sneaky(lambda z: z[:2], lambda z: z[:1])
    with pytest.raises(ValueError, match="fn must return the same shape and dtype for any rows"):
        map_logits(fn, randn(N, D), randn(K, D), chunk_size=3)
