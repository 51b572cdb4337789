"""Every loss of a layer in compiled and exported code: one graph for all numbers of rows."""

import pytest
import torch

from tests.helpers import assert_same, randn
from torch_softmax.functional import (
    linear_cross_entropy,
    linear_distillation,
    linear_log_prob,
)

D, K = 3, 40


def cross_entropy(**options):
    def loss(x, W, target):
        return linear_cross_entropy(x, W, target, chunk_size=3, **options)

    return loss


def weighted(x, W, target):
    return linear_cross_entropy(x, W, target, row_weight=x[:, 0].square(), count=7, chunk_size=3)


def log_probs(x, W, target):
    outputs = linear_log_prob(x, W, target, softcap=3.0, chunk_size=3)
    log_prob, entropy, logsumexp, correct = outputs
    return (log_prob + 2 * entropy + 3 * logsumexp).masked_fill(correct, 0)


def distillation(divergence):
    def loss(x, W, target):
        teacher = x.detach().cos(), W.detach() * 0.5
        return linear_distillation(
            x, W, *teacher, divergence=divergence, mask=target != -100, chunk_size=3
        )

    return loss


LOSSES = {
    "softcap and scale": cross_entropy(softcap=5.0, logit_scale=0.5),
    "z-loss": cross_entropy(z_loss=0.1, reduction="none"),
    "capped mean with z-loss": cross_entropy(softcap=5.0, z_loss=0.1),
    "row weights and count": weighted,
    "log-probabilities": log_probs,
    "forward": distillation("forward"),
    "jsd": distillation("jsd"),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


class Counter:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


def problem(rows):
    target = torch.arange(rows) % K
    target[0] = -100
    return randn(rows, D), randn(K, D), target


def results(loss, x, W, target):
    value = loss(x, W, target)
    upstream = torch.linspace(1, 2, value.numel()).double().view_as(value)
    return value, *torch.autograd.grad(value, (x, W), upstream)


@every_loss
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_for_all_numbers_of_rows(loss, dynamic):
    counter = Counter()
    compiled = torch.compile(loss, backend=counter, dynamic=dynamic, fullgraph=True)
    for rows in (2, 3, 4, 7, 12):
        at = problem(rows)
        assert_same(results(compiled, *at), results(loss, *at))
    assert counter.graphs <= 2


class Head(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.linear = torch.nn.Linear(D, K, bias=False, dtype=torch.float64)
        self.loss = loss

    def forward(self, x, target):
        return self.loss(x, self.linear.weight, target)


@every_loss
@pytest.mark.parametrize("strict", [True, False])
def test_exports_a_dynamic_batch_that_is_differentiated(loss, strict):
    head, batch = Head(loss), torch.export.Dim("batch", min=2, max=4096)
    shapes = {"x": {0: batch}, "target": {0: batch}}
    x, _, target = problem(4)
    exported = torch.export.export(head, (x, target), dynamic_shapes=shapes, strict=strict)
    for rows in (2, 9):
        x, _, target = problem(rows)

        def gradients(module, x=x, target=target):
            value = module(x, target)
            return value, *torch.autograd.grad(value.sum(), (x, *module.parameters()))

        assert_same(gradients(exported.module()), gradients(head))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_gradient_penalty_within_compiled_code(name):
    x, W, target = problem(7)

    def penalty(W):
        (gradient,) = torch.autograd.grad(LOSSES[name](x, W, target).sum(), W, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), W)[0]

    compiled = torch.compile(penalty, backend="aot_eager")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        if name in ("forward", "jsd"):
            with pytest.raises(RuntimeError, match="of divergences to first order"):
                compiled(W)
        else:
            assert_same(compiled(W), penalty(W))
