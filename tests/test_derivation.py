"""The derivation of softmax regression, an equation a test."""

import pytest
import torch
from torch.autograd.functional import jacobian

from tests import reference
from tests.helpers import assert_same, randn
from torch_softmax import SoftmaxRegression
from torch_softmax.functional import cross_entropy, softmax
from torch_softmax.mnist.training import batch_update

K, D, B = 4, 3, 5
LABEL = 2
LEARNING_RATE = 0.3


@pytest.fixture
def z():
    """The logits of one example."""
    return randn(K)


@pytest.fixture
def x():
    """The features of one example."""
    return torch.randn(D, dtype=torch.float64)


@pytest.fixture
def model():
    return SoftmaxRegression(D, K, dtype=torch.float64)


def residual(model, x, label):
    """S − y of one example, by hand."""
    z = torch.stack([w_k @ x + b_k for w_k, b_k in zip(model.weight, model.bias, strict=True)])
    return (reference.softmax(z) - reference.one_hot(label, K)).detach()


def test_softmax(z):
    """S_i = e^{z_i} / Σ_j e^{z_j}."""
    total = sum(z_j.exp() for z_j in z)
    assert_same(softmax(z), torch.stack([z_i.exp() / total for z_i in z]))


def test_softmax_jacobian(z):
    """∂S_i/∂z_j = S_i (δ_ij − S_j)."""
    S = reference.softmax(z).detach()
    delta = torch.eye(K, dtype=torch.float64)
    expected = [[S[i] * (delta[i, j] - S[j]) for j in range(K)] for i in range(K)]
    assert_same(jacobian(softmax, z), torch.tensor(expected))


def test_loss(z):
    """L = −Σ_k y_k log S_k, which is −log S of the right class."""
    S, y = reference.softmax(z), reference.one_hot(LABEL, K)
    expected = -sum(y[k] * S[k].log() for k in range(K))
    assert_same(cross_entropy(z, torch.tensor(LABEL)), expected)


def test_gradient_of_loss_by_logits(z):
    """∂L/∂z = S − y."""
    cross_entropy(z, torch.tensor(LABEL)).backward()
    assert_same(z.grad, (reference.softmax(z) - reference.one_hot(LABEL, K)).detach())


def test_gradient_of_logits_by_weight(model, x):
    """∂z_i/∂w_jd = δ_ij x_d."""

    def logits(weight):
        return torch.func.functional_call(model, {"weight": weight}, x)

    expected = torch.zeros(K, K, D, dtype=torch.float64)
    for k in range(K):
        expected[k, k] = x
    assert_same(jacobian(logits, model.weight), expected)


def test_gradient_of_loss_by_weight(model, x):
    """∂L/∂w = (S − y) xᵀ."""
    expected = torch.outer(residual(model, x, LABEL), x)
    model.loss(x, torch.tensor(LABEL)).backward()
    assert_same(model.weight.grad, expected)


def test_gradient_of_loss_by_bias(model, x):
    """∂L/∂b = S − y."""
    expected = residual(model, x, LABEL)
    model.loss(x, torch.tensor(LABEL)).backward()
    assert_same(model.bias.grad, expected)


def test_update_for_one_example(model, x):
    """The weight w becomes w − α (S − y) xᵀ."""
    step = torch.outer(residual(model, x, LABEL), x)
    expected = model.weight.detach() - LEARNING_RATE * step
    batch_update(model, x.unsqueeze(0), torch.tensor([LABEL]), LEARNING_RATE)
    assert_same(model.weight.detach(), expected)


def test_update_for_a_batch(model):
    """The weight w becomes w − α 1/B Σ_i (S(z_i) − y_i) x_iᵀ."""
    X, labels = torch.randn(B, D, dtype=torch.float64), torch.randint(K, (B,))
    step = sum(torch.outer(residual(model, X[i], labels[i]), X[i]) for i in range(B)) / B
    expected = model.weight.detach() - LEARNING_RATE * step
    batch_update(model, X, labels, LEARNING_RATE)
    assert_same(model.weight.detach(), expected)


def test_update_of_the_bias_for_a_batch(model):
    """The bias b becomes b − α 1/B Σ_i (S(z_i) − y_i)."""
    X, labels = torch.randn(B, D, dtype=torch.float64), torch.randint(K, (B,))
    step = sum(residual(model, X[i], labels[i]) for i in range(B)) / B
    expected = model.bias.detach() - LEARNING_RATE * step
    batch_update(model, X, labels, LEARNING_RATE)
    assert_same(model.bias.detach(), expected)
