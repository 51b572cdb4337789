"""The shortcut for small batches: the same numbers as the sweeps, and only where it may be."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from tests.helpers import assert_same
from torch_softmax import SoftmaxRegression, functional
from torch_softmax.functional import cross_entropy, linear_cross_entropy
from torch_softmax.losses import _small

ROWS, FEATURES, CLASSES = 7, 5, 3


def randn(*shape, **options):
    return torch.randn(shape, **{"dtype": torch.float64, "requires_grad": True, **options})


@pytest.fixture
def layer():
    return randn(ROWS, FEATURES), randn(CLASSES, FEATURES), randn(CLASSES)


@pytest.fixture
def label():
    return torch.randint(CLASSES, (ROWS,))


@pytest.fixture
def taken(monkeypatch):
    """Whether each loss was that of a small batch."""
    answers = []

    def is_small(batch, options, known=_small._is_small):
        answers.append(known(batch, options))
        return answers[-1]

    monkeypatch.setattr(_small, "_is_small", is_small)
    return answers


@pytest.fixture
def by_the_sweeps(monkeypatch):
    """Work a loss out as if no batch were small."""

    def work_out(loss):
        with monkeypatch.context() as patch:
            patch.setattr(functional, "loss_if_small", lambda batch, options: None)
            return loss()

    return work_out


# The numbers


@pytest.mark.parametrize("scale", [1, 1e3])  # the latter are extreme logits
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_loss_and_gradients_are_those_of_the_sweeps(
    layer, label, taken, by_the_sweeps, wanted, reduction, scale
):
    layer = [(t * scale).detach().requires_grad_(i in wanted) for i, t in enumerate(layer)]
    x, W, b = layer

    def loss_and_gradients():
        loss = linear_cross_entropy(x, W, label, linear_bias=b, reduction=reduction)
        return loss, *torch.autograd.grad(loss * 3, [layer[i] for i in wanted])

    expected = by_the_sweeps(loss_and_gradients)
    assert_same(loss_and_gradients(), expected)
    assert taken == [True]


@pytest.mark.parametrize("scale", [1, 1e3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logits_too(label, taken, by_the_sweeps, reduction, scale):
    z = (randn(ROWS, CLASSES) * scale).detach().requires_grad_()

    def loss_and_gradient():
        loss = cross_entropy(z, label, reduction=reduction)
        return loss, *torch.autograd.grad(loss * 3, z)

    expected = by_the_sweeps(loss_and_gradient)
    assert_same(loss_and_gradient(), expected)
    assert taken == [True]


def test_a_class_of_no_chance(by_the_sweeps):
    z = torch.tensor([[0.0, -torch.inf], [1.0, -torch.inf]], requires_grad=True)

    def loss_and_gradient(label):
        loss = cross_entropy(z, torch.tensor(label))
        return loss, *torch.autograd.grad(loss, z)

    for label in ([0, 0], [0, 1]):
        expected = by_the_sweeps(lambda label=label: loss_and_gradient(label))
        torch.testing.assert_close(loss_and_gradient(label), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
def test_first_and_second_derivatives(layer, label, taken, bias, reduction):
    x, W, b = layer

    def loss(x, W, b=None):
        return linear_cross_entropy(x, W, label, linear_bias=b, reduction=reduction)

    inputs = (x, W, b) if bias else (x, W)
    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)
    assert all(taken)


def test_a_second_backward_is_the_first_to_the_last_bit(layer, label):
    x, W, b = layer
    loss = linear_cross_entropy(x, W, label, linear_bias=b)
    first = torch.autograd.grad(loss, layer, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    assert all(map(torch.equal, torch.autograd.grad(loss, layer), kept))


def test_without_gradients_it_is_the_loss_alone(layer, label, taken):
    x, W, b = layer
    with torch.no_grad():
        loss = linear_cross_entropy(x, W, label, linear_bias=b)
    assert not loss.requires_grad
    assert_same(loss, linear_cross_entropy(x, W, label, linear_bias=b).detach())
    assert taken == [True, True]


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
    ],
    ids=lambda options: next(iter(options)),
)
def test_no_option(layer, taken, options):
    x, W, _ = layer
    linear_cross_entropy(x, W, torch.arange(ROWS) % CLASSES, **options)
    assert taken == [False]


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
def test_no_other_batch(taken, x, W, label):
    linear_cross_entropy(x, W, label)
    assert taken == [False]


def test_no_transform(layer, label, taken):
    x, W, _ = layer
    torch.func.grad(lambda W: linear_cross_entropy(x, W, label))(W)
    assert taken == [False]


def test_no_checkpoint(layer, label, taken):
    x, W, _ = layer
    checkpoint(lambda W: linear_cross_entropy(x, W, label), W, use_reentrant=False)
    assert taken == [False]


def test_no_autocast(layer, label, taken):
    x, W, _ = layer
    with torch.autocast("cpu"):
        linear_cross_entropy(x, W, label)
    assert taken == [False]


@pytest.mark.parametrize("label", [[0, 3], [-1, 0]])
def test_a_label_out_of_range_is_an_error(label):
    with pytest.raises(ValueError, match="target must hold class indices in"):
        linear_cross_entropy(randn(2, 5), randn(3, 5), torch.tensor(label))
