"""What linear_cross_entropy allocates: never all logits, and no gradient that nobody asks for."""

import pytest
import torch

from tests.helpers import (
    NewTensors,
    every_nesting,
    every_order,
    randn,
    random_target,
    slope,
)
from torch_softmax.functional import linear_cross_entropy

# No two products of these are the same, so that a size says what a tensor is.
ROWS, FEATURES, CLASSES, CHUNK = 41, 4, 37, 7

every_kind = pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
every_smoothing = pytest.mark.parametrize("label_smoothing", [0.0, 0.1])


@pytest.fixture
def inputs(kind):
    """Input, weight, target and bias; given probabilities want no gradient, which has N·K."""
    target = random_target(kind, (ROWS,), CLASSES).detach()
    return randn(ROWS, FEATURES), randn(CLASSES, FEATURES), target, randn(CLASSES)


def loss_with(**options):
    weight = torch.rand(CLASSES, dtype=torch.float64)

    def loss(x, W, target, b):
        return linear_cross_entropy(
            x, W, target, linear_bias=b, weight=weight, chunk_size=CHUNK, **options
        )

    return loss


def assert_chunked(new):
    """Nothing is larger than the logits of a chunk, which is larger than x, W and b."""
    assert max(new.sizes) == CHUNK * CLASSES


@every_kind
@every_reduction
@every_smoothing
def test_loss_without_gradients_holds_a_chunk(label_smoothing, reduction, inputs):
    with torch.no_grad(), NewTensors() as new:
        loss_with(label_smoothing=label_smoothing, reduction=reduction)(*inputs)
    assert_chunked(new)


@every_kind
@every_reduction
@every_smoothing
@every_order
def test_gradients_hold_a_chunk(order, label_smoothing, reduction, inputs):
    loss = loss_with(label_smoothing=label_smoothing, reduction=reduction)
    with NewTensors() as new:
        order(loss, inputs)
    assert_chunked(new)


@pytest.mark.parametrize("kind", ["ignored", "probabilities"])
@every_nesting
def test_nested_derivatives_hold_a_chunk(modes, inputs):
    with NewTensors() as new:
        slope(loss_with(label_smoothing=0.1), inputs, modes)
    assert_chunked(new)


@pytest.mark.parametrize("kind", ["indices"])
@every_reduction
def test_loss_without_gradients_allocates_none(reduction, inputs):
    with torch.no_grad(), NewTensors() as new:
        loss_with(reduction=reduction)(*inputs)
    assert not {ROWS * FEATURES, CLASSES * FEATURES} & set(new.sizes)


@pytest.mark.parametrize("kind", ["indices"])
@every_reduction
@every_order
@pytest.mark.parametrize(
    ("wanted", "other_size"), [(0, CLASSES * FEATURES), (1, ROWS * FEATURES)], ids=["x", "W"]
)
def test_a_gradient_that_is_not_asked_for_is_not_allocated(
    wanted, other_size, order, reduction, inputs
):
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i == wanted)
    loss = loss_with(reduction=reduction)
    with NewTensors() as new:
        order(loss, inputs)
    assert other_size not in new.sizes
