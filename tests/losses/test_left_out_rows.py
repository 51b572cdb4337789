"""Rows that don't count are never multiplied, and change nothing, whatever they hold."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import NewTensors, assert_identical, assert_same
from torch_softmax.functional import (
    cross_entropy,
    linear_cross_entropy,
    linear_distillation,
    linear_log_prob,
)

N, D, K, CHUNK = 23, 6, 40, 5
COUNTS = torch.tensor([n % 4 == 1 or n in (6, 7, 8) for n in range(N)])
LABEL = torch.arange(N) % K


def ignoring(label, counts):
    return label.masked_fill(~counts, -100)


def loss_of_labels(x, W, b, label, counts, **options):
    return linear_cross_entropy(
        x, W, ignoring(label, counts), linear_bias=b, chunk_size=CHUNK, **options
    )


def loss_of_weights(x, W, b, label, counts, **options):
    weight = torch.where(counts, torch.linspace(0.5, 2, len(x)).double(), 0)
    target = torch.linspace(0, 1, K).double().softmax(0).expand(len(x), K)
    return linear_cross_entropy(
        x, W, target, linear_bias=b, row_weight=weight, count=3, chunk_size=CHUNK, **options
    )


def log_probs(x, W, b, label, counts):
    outputs = linear_log_prob(x, W, ignoring(label, counts), linear_bias=b, chunk_size=CHUNK)
    log_prob, entropy, logsumexp, _ = outputs
    return log_prob + 2 * entropy + 3 * logsumexp


def distillation(x, W, b, label, counts, **options):
    return linear_distillation(
        x, W, x.detach().cos(), W.detach() * 0.5, linear_bias=b, mask=counts, chunk_size=CHUNK,
        divergence="jsd", **options,
    )  # fmt: skip


LOSSES = {
    "mean": loss_of_labels,
    "sum": lambda *at: loss_of_labels(*at, reduction="sum"),
    "none": lambda *at: loss_of_labels(*at, reduction="none"),
    "smoothed": lambda *at: loss_of_labels(*at, label_smoothing=0.2),
    "capped": lambda *at: loss_of_labels(*at, softcap=2.0, z_loss=0.1),
    "row weights": loss_of_weights,
    "row weights, none": lambda *at: loss_of_weights(*at, reduction="none"),
    "log-probabilities": log_probs,
    "distillation": distillation,
    "distillation, none": lambda *at: distillation(*at, reduction="none"),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture
def layer():
    return tuple(torch.randn(*s).double().requires_grad_() for s in ((N, D), (K, D), (K,)))


def derivatives(loss, x, W, b, label, counts):
    """The loss, its gradients and Hessian products."""
    value = loss(x, W, b, label, counts)
    at = (x, W, b)
    gradients = torch.autograd.grad(value.sum(), at, create_graph=True)
    directions = [torch.linspace(-1, 1, t.numel()).double().view_as(t) for t in at]
    along = sum((g * u).sum() for g, u in zip(gradients[1:], directions[1:], strict=True))
    return value, gradients, torch.autograd.grad(along, at)


def alone(loss, x, W, b, label, counts):
    """The derivatives for the rows that count alone, put among zeros."""
    index = counts.nonzero().squeeze(1)

    def restored(t):
        return t.new_zeros(len(counts), *t.shape[1:]).index_copy(0, index, t)

    x = x.detach()[index].requires_grad_()
    value, (by_x, *gradients), (along_x, *products) = derivatives(
        loss, x, W, b, label[index], counts[index]
    )
    value = restored(value) if value.dim() else value
    return value, (restored(by_x), *gradients), (restored(along_x), *products)


@pytest.mark.parametrize("name", [name for name in LOSSES if "row weights" not in name])
def test_results_are_those_of_the_rows_that_count_to_the_last_bit(layer, name):
    assert_identical(
        derivatives(LOSSES[name], *layer, LABEL, COUNTS), alone(LOSSES[name], *layer, LABEL, COUNTS)
    )


@every_loss
@pytest.mark.parametrize("held", [torch.nan, torch.inf])
def test_it_does_not_matter_what_they_hold(layer, loss, held):
    x, W, b = layer
    dirty = x.detach().masked_fill(~COUNTS.unsqueeze(1), held).requires_grad_()
    assert_identical(
        derivatives(loss, dirty, W, b, LABEL, COUNTS), derivatives(loss, x, W, b, LABEL, COUNTS)
    )


@every_loss
@pytest.mark.parametrize("counts", [COUNTS, torch.zeros(N, dtype=torch.bool)], ids=["some", "none"])
def test_only_rows_that_count_are_multiplied(layer, loss, counts):
    def flops(counts):
        with FlopCounterMode(display=False) as counter:
            derivatives(loss, *layer, LABEL, counts)
        return counter.get_total_flops()

    every = torch.ones(N, dtype=torch.bool)
    assert flops(counts) * N == flops(every) * int(counts.sum())


@every_loss
def test_no_copy_of_all_rows_is_made(loss):
    rows = 4096
    counts = torch.ones(rows, dtype=torch.bool)
    counts[5] = False
    x = torch.randn(rows, D).double()
    W, b = torch.randn(K, D).double().requires_grad_(), torch.randn(K).double()
    with NewTensors() as new:
        loss(x, W, b, torch.arange(rows) % K, counts).sum().backward()
    cosines = 1 if "distillation" in str(loss) else 0  # the test's own
    assert sum(size >= x.numel() for size in new.sizes) <= cosines + 1


def test_a_row_weight_of_0_that_requires_a_gradient_gets_it(layer):
    x, W, b = layer
    weight = torch.zeros(N).double().requires_grad_()
    loss = linear_cross_entropy(x, W, LABEL, linear_bias=b, row_weight=weight, reduction="sum")
    (by_weight,) = torch.autograd.grad(loss, weight)
    assert_same(by_weight, cross_entropy(x @ W.t() + b, LABEL, reduction="none").detach())


def test_targets_that_a_vmap_is_over(layer):
    x, W, b = layer
    targets = torch.stack([ignoring(LABEL, COUNTS), ignoring(LABEL, ~COUNTS)])

    def loss(target):
        return linear_cross_entropy(x, W, target, linear_bias=b, chunk_size=CHUNK)

    assert_same(torch.vmap(loss)(targets), torch.stack([loss(target) for target in targets]))
