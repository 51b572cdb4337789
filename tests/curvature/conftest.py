"""Heads to take the Hessian of: with and without a bias, of few and of many classes."""

import pytest
import torch

from tests.helpers import random_target

N, D = 11, 3


class Head:
    """A layer with its rows and options, to be given to an operator and to the oracle alike."""

    def __init__(self, classes, bias, kind, options):
        self.input = torch.randn(N, D, dtype=torch.float64)
        self.linear_weight = torch.randn(classes, D, dtype=torch.float64)
        self.linear_bias = torch.randn(classes, dtype=torch.float64) if bias else None
        self.target = None if kind == "none" else random_target(kind, (N,), classes).detach()
        self.options = options

    def arguments(self):
        """Those of either."""
        given = (self.input, self.linear_weight, self.target)
        return given, {"linear_bias": self.linear_bias, **self.options}

    def direction(self, *number):
        """A random direction of the parameters, or a number of them."""
        W = torch.randn(*number, *self.linear_weight.shape, dtype=torch.float64)
        if self.linear_bias is None:
            return W
        return W, torch.randn(*number, *self.linear_bias.shape, dtype=torch.float64)


@pytest.fixture(params=["none", "indices", "ignored", "probabilities"])
def kind(request):
    return request.param


@pytest.fixture(params=["mean", "weighted sum"])
def options(request):
    if request.param == "mean":
        return {}
    weight = torch.rand(N, dtype=torch.float64)
    return {"reduction": "sum", "weight_decay": 0.3, "row_weight": weight}


@pytest.fixture(params=[5, 40], ids=["few classes", "many classes"])
def head(request, bias, kind, options):
    return Head(request.param, bias, kind, options)
