"""What holds for the loss of softmax regression, whatever its shapes, options and magnitudes."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from torch_softmax.functional import cross_entropy, linear_cross_entropy, softmax

LOSSES = {
    "logits": cross_entropy,
    # With the identity for a weight, the inputs are the logits.
    "fused": lambda z, target, **options: linear_cross_entropy(
        z, torch.eye(z.shape[1]).to(z), target, chunk_size=2, **options
    ),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
quick = settings(max_examples=25, derandomize=True, deadline=None, database=None)


class Draw:
    """Logits (N, K) of any magnitude, and further random numbers to go with them."""

    def __init__(self, rows, classes, magnitude, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.rows, self.classes = rows, classes
        self.magnitude = magnitude
        self.z = self.logits()
        self.labels = torch.randint(classes, (rows,), generator=self.generator)
        self.weight = torch.rand(classes, generator=self.generator, dtype=torch.float64) + 0.5

    def logits(self):
        """Logits of the same shape and magnitude, new each time."""
        numbers = torch.randn(self.rows, self.classes, generator=self.generator)
        return self.magnitude * numbers.double()

    def distributions(self):
        """A distribution over the classes for each row."""
        return torch.softmax(torch.randn(self.rows, self.classes, generator=self.generator), 1)

    def permutation(self, size):
        return torch.randperm(size, generator=self.generator)

    def assert_close(self, actual, expected, magnitude=0.0):
        """Equal but for roundings of numbers as large as the logits, or as some other magnitude."""
        largest = max(1.0, float(self.z.abs().max()), magnitude)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14 * largest)


draws = st.builds(
    Draw,
    rows=st.integers(1, 5),
    classes=st.integers(1, 6),
    magnitude=st.sampled_from([1e-6, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
smoothings = st.sampled_from([0.0, 0.1, 1.0])


def gradient(loss, z, *args, **options):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z, *args, reduction="sum", **options), z)[0]


@quick
@given(draw=draws)
def test_softmax_is_a_distribution(draw):
    S = softmax(draw.z, 1)
    assert (S >= 0).all()
    draw.assert_close(S.sum(1), torch.ones(draw.rows).double())


@every_loss
@quick
@given(draw=draws, smoothing=smoothings)
def test_loss_of_a_distribution_is_not_negative(loss, draw, smoothing):
    p = draw.distributions().double()
    assert (loss(draw.z, p, label_smoothing=smoothing, reduction="none") >= 0).all()


@every_loss
@quick
@given(draw=draws, smoothing=smoothings)
def test_gradient_of_a_row_sums_to_0(loss, draw, smoothing):
    rows = gradient(loss, draw.z, draw.labels, weight=draw.weight, label_smoothing=smoothing)
    torch.testing.assert_close(rows.sum(1), torch.zeros(draw.rows).double(), rtol=0, atol=1e-14)


@quick
@given(draw=draws)
def test_gradient_of_weight_and_bias_sums_to_0_over_classes(draw):
    W = torch.randn(draw.classes, draw.classes, generator=draw.generator).double().requires_grad_()
    b = torch.randn(draw.classes, generator=draw.generator).double().requires_grad_()
    loss = linear_cross_entropy(draw.z, W, draw.labels, linear_bias=b, chunk_size=2)
    for derivative in torch.autograd.grad(loss, (W, b)):
        total = derivative.sum(0)
        draw.assert_close(total, torch.zeros_like(total))


@every_loss
@quick
@given(draw=draws, smoothing=smoothings, constant=st.floats(-1e4, 1e4))
def test_a_constant_added_to_the_logits_changes_nothing(loss, draw, smoothing, constant):
    options = {"label_smoothing": smoothing, "reduction": "none"}
    moved = loss(draw.z + constant, draw.labels, **options)
    draw.assert_close(moved, loss(draw.z, draw.labels, **options), 2 * abs(constant))


@every_loss
@quick
@given(draw=draws, smoothing=smoothings)
def test_permuting_the_classes_permutes_the_gradient(loss, draw, smoothing):
    order = draw.permutation(draw.classes)
    permuted = gradient(
        loss,
        draw.z[:, order],
        order.argsort()[draw.labels],
        weight=draw.weight[order],
        label_smoothing=smoothing,
    )
    plain = gradient(loss, draw.z, draw.labels, weight=draw.weight, label_smoothing=smoothing)
    draw.assert_close(permuted, plain[:, order])


@every_loss
@quick
@given(draw=draws)
def test_permuting_the_rows_permutes_the_losses(loss, draw):
    order = draw.permutation(draw.rows)
    permuted = loss(draw.z[order], draw.labels[order], weight=draw.weight, reduction="none")
    plain = loss(draw.z, draw.labels, weight=draw.weight, reduction="none")
    draw.assert_close(permuted, plain[order])


@every_loss
@quick
@given(draw=draws, smoothing=smoothings)
def test_mean_is_the_sum_over_the_number_of_rows(loss, draw, smoothing):
    mean = loss(draw.z, draw.labels, label_smoothing=smoothing)
    total = loss(draw.z, draw.labels, label_smoothing=smoothing, reduction="sum")
    draw.assert_close(mean, total / draw.rows)


@every_loss
@quick
@given(draw=draws, smoothing=smoothings)
def test_weighted_mean_is_the_sum_over_the_weights_of_the_labels(loss, draw, smoothing):
    options = {"weight": draw.weight, "label_smoothing": smoothing}
    mean = loss(draw.z, draw.labels, **options)
    total = loss(draw.z, draw.labels, reduction="sum", **options)
    draw.assert_close(mean, total / sum(draw.weight[label] for label in draw.labels))


@every_loss
@quick
@given(draw=draws)
def test_an_ignored_row_is_as_if_it_were_not_there(loss, draw):
    kept = draw.labels != draw.labels[0]
    without = gradient(loss, draw.z[kept], draw.labels[kept])
    ignored = gradient(loss, draw.z, draw.labels, ignore_index=int(draw.labels[0]))
    draw.assert_close(ignored[kept], without)
    assert not ignored[~kept].any()


@every_loss
@quick
@given(draw=draws)
def test_a_class_of_weight_0_gives_nothing(loss, draw):
    draw.weight[draw.labels[0]] = 0
    rows = draw.labels == draw.labels[0]
    losses = loss(draw.z, draw.labels, weight=draw.weight, reduction="none")
    assert not losses[rows].any()
    assert not gradient(loss, draw.z, draw.labels, weight=draw.weight)[rows].any()


@every_loss
@quick
@given(draw=draws)
def test_smoothing_of_1_is_the_uniform_target(loss, draw):
    uniform = torch.full_like(draw.z, 1 / draw.classes)
    smooth = loss(draw.z, draw.labels, label_smoothing=1.0, reduction="none")
    draw.assert_close(smooth, loss(draw.z, uniform, reduction="none"))


@every_loss
@quick
@given(draw=draws, smoothing=smoothings, t=st.floats(0, 1))
def test_loss_is_convex_along_a_line(loss, draw, smoothing, t):
    def at(z):
        return loss(z, draw.labels, weight=draw.weight, label_smoothing=smoothing, reduction="none")

    end = draw.logits()
    chord = (1 - t) * at(draw.z) + t * at(end)
    rounding = 1e-14 * (1 + float(draw.z.abs().max() + end.abs().max()))
    assert (at((1 - t) * draw.z + t * end) <= chord + rounding).all()


@every_loss
@quick
@given(draw=draws, smoothing=smoothings)
def test_hessian_is_symmetric_and_positive_semidefinite(loss, draw, smoothing):
    def total(z):
        options = {"weight": draw.weight, "label_smoothing": smoothing, "reduction": "sum"}
        return loss(z.reshape(draw.rows, draw.classes), draw.labels, **options)

    hessian = torch.func.hessian(total)(draw.z.flatten())
    torch.testing.assert_close(hessian, hessian.t(), rtol=0, atol=1e-14)
    assert torch.linalg.eigvalsh(hessian).min() >= -1e-14
