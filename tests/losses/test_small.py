"""The shortcut for small batches: the same numbers as the sweeps, and only where it may be."""

from contextlib import contextmanager

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.helpers import assert_same
from torch_softmax import SoftmaxRegression
from torch_softmax.functional import cross_entropy, linear_cross_entropy

ROWS, FEATURES, CLASSES = 7, 5, 3


def randn(*shape, **options):
    return torch.randn(shape, **{"dtype": torch.float64, "requires_grad": True, **options})


@pytest.fixture
def layer():
    return randn(ROWS, FEATURES), randn(CLASSES, FEATURES), randn(CLASSES)


@pytest.fixture
def label():
    return torch.randint(CLASSES, (ROWS,))


class Operators(TorchDispatchMode):
    """The names of the operators that reach the kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def small(expected=True):
    """Every loss within the block is one of a small batch; or none is.

    A small batch has torch's own kernel for the losses of its labels, which no sweep calls.
    """
    with Operators() as operators:
        yield
    assert any(name.startswith("nll_loss") for name in operators.names) is expected


# The numbers


@pytest.mark.parametrize("scale", [1, 1e3])  # the latter are extreme logits
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_loss_and_gradients_are_those_of_the_sweeps(layer, label, wanted, reduction, scale):
    layer = [(t * scale).detach().requires_grad_(i in wanted) for i, t in enumerate(layer)]
    x, W, b = layer

    def loss_and_gradients(**sweeps):
        loss = linear_cross_entropy(x, W, label, linear_bias=b, reduction=reduction, **sweeps)
        return loss, *torch.autograd.grad(loss * 3, [layer[i] for i in wanted])

    with small(False):
        expected = loss_and_gradients(chunk_size=ROWS)
    with small():
        assert_same(loss_and_gradients(), expected)


@pytest.mark.parametrize("scale", [1, 1e3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logits_too(label, reduction, scale):
    z = (randn(ROWS, CLASSES) * scale).detach().requires_grad_()

    def loss_and_gradient(**sweeps):
        loss = cross_entropy(z, label, reduction=reduction, **sweeps)
        return loss, *torch.autograd.grad(loss * 3, z)

    with small(False):
        expected = loss_and_gradient(dtype=z.dtype)
    with small():
        assert_same(loss_and_gradient(), expected)


@pytest.mark.parametrize("label", [[0, 0], [0, 1]])
def test_a_class_of_no_chance(label):
    z = torch.tensor([[0.0, -torch.inf], [1.0, -torch.inf]], requires_grad=True)

    def loss_and_gradient(**sweeps):
        loss = cross_entropy(z, torch.tensor(label), **sweeps)
        return loss, *torch.autograd.grad(loss, z)

    torch.testing.assert_close(loss_and_gradient(), loss_and_gradient(dtype=z.dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
def test_first_and_second_derivatives(layer, label, bias, reduction):
    x, W, b = layer

    def loss(x, W, b=None):
        return linear_cross_entropy(x, W, label, linear_bias=b, reduction=reduction)

    inputs = (x, W, b) if bias else (x, W)
    with small():
        loss(*inputs)
    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


def test_a_second_backward_is_the_first_to_the_last_bit(layer, label):
    x, W, b = layer
    loss = linear_cross_entropy(x, W, label, linear_bias=b)
    first = torch.autograd.grad(loss, layer, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    assert all(map(torch.equal, torch.autograd.grad(loss, layer), kept))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_loss_alone(layer, label, mode):
    x, W, b = layer
    with mode(), small():
        loss = linear_cross_entropy(x, W, label, linear_bias=b)
    assert not loss.requires_grad
    assert_same(loss, linear_cross_entropy(x, W, label, linear_bias=b).detach())


# The classes predicted


@pytest.mark.parametrize("label", [[0, 2], [0, -100]], ids=["small", "ignored"])
def test_a_model_predicts_beside_its_loss(label):
    model = SoftmaxRegression(FEATURES, CLASSES)
    x, target = torch.randn(2, FEATURES), torch.tensor(label)
    loss, predicted = model.loss_and_predicted(x, target)
    torch.testing.assert_close(loss, model.loss(x, target))
    assert torch.equal(predicted, model.predict(x))
    assert not predicted.requires_grad


def test_of_equal_logits_the_first_is_predicted():
    model = SoftmaxRegression(FEATURES, CLASSES)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    _, predicted = model.loss_and_predicted(torch.randn(9, FEATURES), torch.ones(9).long())
    assert torch.equal(predicted, torch.zeros(9).long())


# Whatever else is asked for is left to the others


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"weight": torch.ones(CLASSES, dtype=torch.float64)},
        {"label_smoothing": 0.1},
        {"dtype": torch.float64},
        {"ignore_index": 1},
        {"chunk_size": ROWS},
        {"softcap": 5.0},
        {"logit_scale": 2.0},
        {"z_loss": 0.1},
        {"row_weight": torch.ones(ROWS, dtype=torch.float64)},
        {"count": ROWS},
    ],
    ids=lambda options: next(iter(options)),
)
def test_no_option(layer, options):
    x, W, _ = layer
    with small(False):
        linear_cross_entropy(x, W, torch.arange(ROWS) % CLASSES, **options)


@pytest.mark.parametrize(
    ("x", "W", "label"),
    [
        (randn(2, 4, 5), randn(3, 5), torch.zeros(2, 4).long()),
        (randn(4, 5), randn(3, 5), torch.rand(4, 3)),
        (randn(4, 5), randn(3, 5), torch.zeros(4, dtype=torch.int32)),
        (randn(4, 5), randn(33, 5), torch.zeros(4).long()),
        (randn(0, 5), randn(3, 5), torch.zeros(0).long()),
        (randn(4, 5, dtype=torch.half), randn(3, 5, dtype=torch.half), torch.zeros(4).long()),
        (randn(4, 5), randn(3, 5, dtype=torch.float32), torch.zeros(4).long()),
        (randn(2**18, 1), randn(3, 1), torch.zeros(2**18).long()),
    ],
    ids=["dims", "shares", "int32", "classes", "none", "half", "mixed", "many"],
)  # fmt: skip
def test_no_other_batch(x, W, label):
    with small(False):
        linear_cross_entropy(x, W, label)


def test_no_transform(layer, label):
    x, W, _ = layer
    with small(False):
        torch.func.grad(lambda W: linear_cross_entropy(x, W, label))(W)


def test_no_checkpoint(layer, label):
    x, W, _ = layer
    with small(False):
        checkpoint(lambda W: linear_cross_entropy(x, W, label), W, use_reentrant=False)


def test_no_autocast(layer, label):
    x, W, _ = layer
    with torch.autocast("cpu"), small(False):
        linear_cross_entropy(x, W, label)


def test_no_level_of_forward_mode(layer, label):
    x, W, _ = layer
    with forward_ad.dual_level(), small(False):
        linear_cross_entropy(x, forward_ad.make_dual(W, W), label)


@pytest.mark.parametrize("name", ["label_smoothing", "logit_scale", "z_loss"])
def test_a_number_that_requires_a_gradient_is_an_error(layer, label, name):
    x, W, _ = layer
    linear_cross_entropy(x, W, label)
    usual = 1.0 if name == "logit_scale" else 0.0
    with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
        linear_cross_entropy(x, W, label, **{name: torch.tensor(usual, requires_grad=True)})


def test_a_known_batch_does_not_let_a_wrong_type_pass(layer, label):
    x, W, _ = layer
    linear_cross_entropy(x, W, label, ignore_index=-100)
    with pytest.raises(TypeError, match="ignore_index"):
        linear_cross_entropy(x, W, label, ignore_index=-100.0)


# Labels


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 1, CLASSES])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("layered", [True, False])
def test_ignored_labels_count_for_nothing(layer, label, reduction, ignore_index, mode, layered):
    x, W, _ = layer
    label[[0, 3]] = ignore_index
    keep = label != ignore_index
    given = {"reduction": reduction, "ignore_index": ignore_index}
    with mode():
        loss = (
            linear_cross_entropy(x, W, label, **given)
            if layered
            else cross_entropy(x @ W.t(), label, **given)
        )
    expected = torch.nn.functional.cross_entropy(x[keep] @ W.t(), label[keep], reduction=reduction)
    torch.testing.assert_close(loss, expected, check_dtype=True)
    if loss.requires_grad:
        pairs = (torch.autograd.grad(value, (x, W)) for value in (loss, expected))
        torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("label", [[0, 3], [-1, 0]])
def test_a_label_out_of_range_is_an_error(label, mode):
    with mode(), pytest.raises(ValueError, match="target must hold class indices in"):
        linear_cross_entropy(randn(2, 5), randn(3, 5), torch.tensor(label))


@pytest.mark.parametrize("changed", ["input", "weight", "target"])
def test_a_tensor_changed_before_the_backward_raises(layer, label, changed):
    x, W, b = layer
    with small():
        loss = linear_cross_entropy(x, W, label, linear_bias=b)
    with torch.no_grad():
        {"input": x, "weight": W, "target": label}[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
