"""The options that torch's layer does not have, against a loss written out in torch's functions."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import randn, random_target
from torch_softmax.functional import linear_cross_entropy

N, D = 7, 3


def written_out(x, W, target, b, reduction, options):
    z = (x @ W.t() + b) * options.get("logit_scale", 1.0)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    loss = F.cross_entropy(z, target, reduction="none")
    loss = loss + options.get("z_loss", 0.0) * torch.logsumexp(z, 1).square()
    loss = loss * options.get("row_weight", 1.0)
    keep = torch.ones(N, dtype=torch.bool) if target.is_floating_point() else target != -100
    loss = torch.where(keep, loss, 0)
    count = options.get("count", keep.sum())
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / count}[reduction]


@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize(
    "names", [("softcap", "logit_scale"), ("z_loss",), ("row_weight", "count")]
)
def test_value_and_derivatives_to_second_order(names, classes, reduction, kind):
    every = {
        "softcap": 2.0,
        "logit_scale": 0.5,
        "z_loss": 0.1,
        "row_weight": torch.rand(N, dtype=torch.float64).requires_grad_(),
        "count": torch.tensor(3.0, dtype=torch.float64),
    }
    options = {name: every[name] for name in names}
    x, W, b, target = (
        randn(N, D),
        randn(classes, D),
        randn(classes),
        random_target(kind, (N,), classes),
    )
    leaves = [t for t in (x, W, b, target, *options.values()) if getattr(t, "requires_grad", False)]
    results = []
    for loss in (
        linear_cross_entropy(
            x, W, target, linear_bias=b, reduction=reduction, chunk_size=3, **options
        ),
        written_out(x, W, target, b, reduction, options),
    ):
        torch.manual_seed(0)
        gradients = torch.autograd.grad(loss, leaves, torch.randn_like(loss), create_graph=True)
        directions = [torch.randn_like(gradient) for gradient in gradients]
        results.append((loss, gradients, torch.autograd.grad(gradients, leaves, directions)))
    torch.testing.assert_close(*results)


def test_a_mean_over_a_count_of_0_is_0():
    W = randn(5, D)
    loss = linear_cross_entropy(randn(N, D).detach(), W, torch.zeros(N).long(), count=0)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, W)[0].any()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("softcap", 0.0, ValueError),
        ("logit_scale", float("nan"), ValueError),
        ("z_loss", -1.0, ValueError),
        ("count", -1, ValueError),
        ("count", torch.tensor(2 + 1j), TypeError),
        ("row_weight", torch.ones(N + 1), ValueError),
        ("row_weight", torch.ones(N).long(), TypeError),
    ],
)
def test_an_unfit_option_is_named(name, value, error):
    with pytest.raises(error, match=f"^{name} must "):
        linear_cross_entropy(randn(N, D), randn(5, D), torch.zeros(N).long(), **{name: value})


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["", "softcap"])
def test_an_ignored_row_adds_nothing_whatever_it_holds(options, reduction):
    x, W, weight = randn(N, D), randn(5, D), torch.rand(N, dtype=torch.float64)
    target = torch.arange(N) % 5
    target[0] = -100
    with torch.no_grad():
        x[0] = weight[0] = math.nan
    weight.requires_grad_()
    loss = linear_cross_entropy(
        x, W, target, reduction=reduction, row_weight=weight, chunk_size=3, **options
    )
    upstream = torch.ones_like(loss)
    if reduction == "none":
        upstream[0] = math.inf
    of_x, of_W, of_weight = torch.autograd.grad(loss, (x, W, weight), upstream)
    kept = [t.detach()[1:].requires_grad_() for t in (x, weight)]
    expected = linear_cross_entropy(
        kept[0], W, target[1:], reduction=reduction, row_weight=kept[1], **options
    )
    leaves = (kept[0], W, kept[1])
    gradients = torch.autograd.grad(expected, leaves, torch.ones_like(expected))
    torch.testing.assert_close((of_x[1:], of_W, of_weight[1:]), gradients)
    assert not of_x[0].any()
    assert of_weight[0] == 0


def by_backward(function, value):
    return function(value.requires_grad_())


def by_forward_mode(function, value):
    return torch.func.jvp(function, (value,), (value,))


def by_nested_forward_mode(function, value):
    def outer(value):
        return torch.func.grad(lambda x: x * function(value))(value)

    return torch.func.jvp(outer, (value,), (value,))


@pytest.mark.parametrize("differentiate", [by_backward, by_forward_mode, by_nested_forward_mode])
@pytest.mark.parametrize(
    "name", ["softcap", "logit_scale", "z_loss", "count", "label_smoothing", "weight"]
)
def test_an_option_that_is_differentiated_is_refused(name, differentiate):
    def loss(value):
        target = torch.arange(N) % 5
        return linear_cross_entropy(randn(N, D), randn(5, D), target, **{name: value})

    value = torch.ones(5 if name == "weight" else (), dtype=torch.float64)
    with pytest.raises(ValueError, match=f"^{name} must not require a gradient"):
        differentiate(lambda value: loss(value).sum(), value)
