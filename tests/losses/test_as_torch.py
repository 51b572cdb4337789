"""What else torch's losses do, and ours do alike: dtypes, subclasses, tracing, hooks, odd sizes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import (
    assert_identical,
    assert_same,
    dense_linear_cross_entropy,
    loss_and_gradients,
    randn,
    random_target,
)
from torch_softmax import CrossEntropyLoss, LinearCrossEntropyLoss, SoftmaxRegression
from torch_softmax.functional import cross_entropy, linear_cross_entropy, softmax

N, D, K = 6, 4, 5
HALF = [torch.bfloat16, torch.float16]
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def problem(dtype=torch.float64):
    return randn(N, D, dtype=dtype), randn(K, D, dtype=dtype), torch.arange(N) % K


# dtype=


@every_reduction
@pytest.mark.parametrize("half", HALF)
def test_losses_of_half_precision_in_float32(half, reduction):
    x, W, target = problem(half)
    options = {"reduction": reduction, "dtype": torch.float32}
    loss, *gradients = loss_and_gradients(
        lambda x, W: linear_cross_entropy(x, W, target, chunk_size=4, **options), x, W
    )
    exact, *expected = loss_and_gradients(
        lambda x, W: dense_linear_cross_entropy(x, W, target, reduction=reduction),
        x.detach().double().requires_grad_(),
        W.detach().double().requires_grad_(),
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert [g.dtype for g in gradients] == [half, half]
    tolerance = 8 * torch.finfo(half).eps
    torch.testing.assert_close(
        [g.double() for g in gradients], expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("half", HALF)
def test_losses_of_half_logits_in_float32(half):
    z, target = randn(N, K, dtype=half), torch.arange(N) % K
    loss = cross_entropy(z, target, dtype=torch.float32)
    exact = F.cross_entropy(z.double(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(loss, z)[0].dtype == half


@pytest.mark.parametrize("classes", [K, 40])
def test_logits_in_float32_under_autocast(classes):
    x, W = randn(N, D, dtype=torch.float32), randn(classes, D, dtype=torch.float32)
    target = torch.arange(N) % K
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, W, target, dtype=torch.float32)
        (again,) = torch.autograd.grad(loss, W, create_graph=True)
        (curved,) = torch.autograd.grad(again.square().sum(), W)
    wide = [t.detach().bfloat16().double().requires_grad_() for t in (x, W)]
    exact = dense_linear_cross_entropy(*wide, target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(exact, wide[1], create_graph=True)
    (expected,) = torch.autograd.grad(gradient.square().sum(), wide[1])
    torch.testing.assert_close(curved.double(), expected, rtol=3e-2, atol=3e-2)


def test_modules_pass_the_dtype_on():
    x, W, target = problem(torch.bfloat16)
    head = LinearCrossEntropyLoss(D, K, dtype=torch.bfloat16, loss_dtype=torch.float32)
    assert head(x, target).dtype == torch.float32
    assert CrossEntropyLoss(dtype=torch.float32)(x @ W.t(), target).dtype == torch.float32
    model = SoftmaxRegression(D, K, dtype=torch.bfloat16)
    assert model.loss(x, target, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int64, "float32"])
def test_a_dtype_that_is_none(dtype):
    with pytest.raises(TypeError, match=r"dtype must be a floating-point torch\.dtype, got"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), dtype=dtype)


@pytest.mark.parametrize("of_target", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("of_input", [torch.float32, torch.bfloat16])
def test_probabilities_promote_the_loss(of_input, of_target):
    z, p = torch.randn(N, K).to(of_input), torch.rand(N, K).to(of_target)
    assert cross_entropy(z, p).dtype == F.cross_entropy(z, p).dtype
    x, W = torch.randn(N, D).to(of_input), torch.randn(K, D).to(of_input)
    assert linear_cross_entropy(x, W, p).dtype == F.cross_entropy(F.linear(x, W), p).dtype


# Options.


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": np.float32(0.5)},
        {"label_smoothing": torch.tensor(0.5)},
        {"ignore_index": np.int64(1)},
        {"ignore_index": torch.tensor(1)},
    ],
    ids=str,
)
def test_scalars_of_numpy_and_torch_for_options(options):
    z, target = randn(N, K), torch.arange(N) % K
    plain = {name: value.item() for name, value in options.items()}
    assert_same(cross_entropy(z, target, **options), F.cross_entropy(z, target, **plain))


def test_an_ignore_index_for_probabilities_is_refused_as_torch_does():
    with pytest.raises(ValueError, match="ignore_index must be left out for class probabilities"):
        cross_entropy(torch.zeros(2, 3), torch.ones(2, 3), ignore_index=1)


def test_no_ignore_index_is_refused():
    with pytest.raises(TypeError, match="ignore_index must be an int, got None"):
        CrossEntropyLoss(ignore_index=None)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_wide_unsigned_dtypes(dtype):
    x, W, target = problem()
    assert_identical(
        linear_cross_entropy(x, W, target.to(dtype)), linear_cross_entropy(x, W, target)
    )
    with pytest.raises(ValueError, match="got 5"):
        cross_entropy(torch.zeros(1, K), torch.tensor([5]).to(dtype))


# Odd sizes and devices.


@every_reduction
def test_no_features(reduction):
    x, W, b = randn(N, 0), randn(K, 0), randn(K)
    target = torch.arange(N) % K

    def ours(x, W, b):
        return linear_cross_entropy(x, W, target, linear_bias=b, reduction=reduction, chunk_size=4)

    def theirs(x, W, b):
        return dense_linear_cross_entropy(x, W, target, linear_bias=b, reduction=reduction)

    assert_same(loss_and_gradients(ours, x, W, b), loss_and_gradients(theirs, x, W, b))


def test_meta_tensors():
    x, W = (torch.randn(s, device="meta", requires_grad=True) for s in ((N, D), (K, D)))
    loss = linear_cross_entropy(x, W, torch.zeros(N, device="meta", dtype=torch.int64))
    assert (loss.device.type, loss.shape) == ("meta", ())
    assert [g.shape for g in torch.autograd.grad(loss, (x, W))] == [x.shape, W.shape]


@pytest.mark.parametrize("shared", [False, True])
def test_vmap_over_nothing(shared):
    W, none = torch.randn(K, D), torch.zeros(0, N, dtype=torch.int64)
    x = torch.zeros(N, D) if shared else torch.zeros(0, N, D)
    over = torch.vmap(lambda x, t: linear_cross_entropy(x, W, t), (None if shared else 0, 0))
    assert over(x, none).shape == (0,)


def test_softmax_is_contiguous_and_takes_a_dtype():
    z = torch.randn(8, 5)
    assert softmax(z).is_contiguous()
    assert SoftmaxRegression(D, K).predict_proba(torch.randn(N, D)).view(-1).shape == (N * K,)
    assert_identical(softmax(z.bfloat16(), dtype=torch.float32), softmax(z.bfloat16().float()))


def test_functions_are_what_their_names_say():
    import torch_softmax

    assert callable(torch_softmax.functional.softmax)
    assert not hasattr(torch_softmax, "softmax")


# Subclasses and tracing.


class Named(torch.Tensor):
    """A subclass without any behaviour."""


class Logged(torch.Tensor):
    """A subclass that sees the functions that it is given to."""

    seen: tuple = ()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Logged.seen = (*Logged.seen, getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", ["input", "linear_weight", "target", "weight"])
def test_a_subclass_keeps_its_class(which):
    x, W, target = problem(torch.float32)
    given = {"input": x, "linear_weight": W, "target": target, "weight": torch.rand(K)}
    expected = linear_cross_entropy(**given)
    given[which] = given[which].detach().as_subclass(Named)
    loss = linear_cross_entropy(**given)
    assert type(loss) is Named
    assert_identical(loss.as_subclass(torch.Tensor).detach(), expected.detach())


def test_a_subclass_can_stand_in_for_the_function():
    x, W, target = problem()
    linear_cross_entropy(x, W.detach().as_subclass(Logged), target)
    assert "linear_cross_entropy" in Logged.seen


def test_a_wrapper_of_tensors_is_worked_out_by_its_own_operators():
    from torch.testing._internal.two_tensor import TwoTensor

    x, W, target = (t.detach() for t in problem())
    twin = TwoTensor(W, 2 * W)
    loss = linear_cross_entropy(x, twin, target, chunk_size=4)
    assert_same(loss.a, linear_cross_entropy(x, W, target))
    assert_same(loss.b, linear_cross_entropy(x, 2 * W, target))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = LinearCrossEntropyLoss(D, K)
        self.layer = nn.Linear(D, K)
        self.loss = CrossEntropyLoss()

    def forward(self, x, target):
        return self.head(x, target) + self.loss(self.layer(x), target)


def test_symbolic_trace():
    model = Model()
    x, target = torch.randn(N, D), torch.arange(N) % K
    assert_identical(torch.fx.symbolic_trace(model)(x, target), model(x, target))


# Hooks on what is saved, and products.


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def number_of_products(step):
    with Products() as products:
        step()
    return products.number


def test_an_activation_checkpoint_takes_no_gradient_along():
    x, W, target = problem()

    def step():
        loss = torch.utils.checkpoint.checkpoint(
            linear_cross_entropy, x, W, target, use_reentrant=False
        )
        torch.autograd.grad(loss, (x, W))

    # One for the loss, one when that is done again, and three for the gradients.
    assert number_of_products(step) == 5
    assert (
        number_of_products(lambda: torch.autograd.grad(linear_cross_entropy(x, W, target), W)) == 3
    )


def test_hooks_see_all_that_is_saved():
    x, W, target = problem()
    seen = []

    def pack(tensor):
        seen.append(tensor.numel())
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = linear_cross_entropy(x, W, target)
    held = torch.autograd.grad(loss, (x, W))
    assert seen.count(K * D) == 1
    assert_same(held, torch.autograd.grad(dense_linear_cross_entropy(x, W, target), (x, W)))


def test_save_on_cpu():
    x, W, target = problem()
    with torch.autograd.graph.save_on_cpu():
        loss = linear_cross_entropy(x, W, target)
    expected = torch.autograd.grad(linear_cross_entropy(x, W, target), (x, W))
    assert_same(torch.autograd.grad(loss, (x, W)), expected)


@pytest.mark.parametrize("classes", [K, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_the_flop_counter_sees_every_product(bias, classes):
    x, W, target = randn(N, D), randn(classes, D), random_target("indices", (N,), classes)
    b = randn(classes) if bias else None
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(x, W, target, linear_bias=b, chunk_size=4)
        torch.autograd.grad(loss, (x, W))
    assert counter.get_total_flops() == 3 * 2 * N * D * classes
