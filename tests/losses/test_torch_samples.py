"""The samples by which PyTorch tests its own linear_cross_entropy, in float64, through ours."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import assert_differentiable, assert_same, loss_and_gradients
from torch_softmax.functional import linear_cross_entropy

# They come with torch, but need packages that it doesn't install, such as expecttest.
try:
    from torch.testing._internal.common_methods_invocations import op_db
except ImportError as error:
    pytest.skip(f"torch.testing needs {error.name}", allow_module_level=True)

OPERATORS = [
    op
    for op in op_db
    if op.name == "nn.functional.linear_cross_entropy" and op.variant_test_name == ""
]
if not OPERATORS:
    pytest.skip("torch has no linear_cross_entropy", allow_module_level=True)


def samples():
    """The tensors of each sample, and its other arguments."""
    torch.manual_seed(0)
    for sample in OPERATORS[0].sample_inputs("cpu", torch.float64, requires_grad=True):
        options = dict(sample.kwargs)
        bias = options.pop("linear_bias", None)
        tensors = [sample.input, *sample.args] + ([] if bias is None else [bias])
        shapes = "-".join("x".join(map(str, t.shape)) for t in tensors)
        yield pytest.param(tensors, options, id=f"{shapes}-{'-'.join(options)}")


def applied(function, options):
    """A loss as a function of a sample's tensors alone."""

    def loss(input, linear_weight, target, linear_bias=None):
        return function(input, linear_weight, target, linear_bias=linear_bias, **options)

    return loss


every_sample = pytest.mark.parametrize(("tensors", "options"), [*samples()])


@every_sample
def test_value_and_gradients(tensors, options):
    ours = loss_and_gradients(applied(linear_cross_entropy, options), *tensors)
    assert_same(ours, loss_and_gradients(applied(F.linear_cross_entropy, options), *tensors))


@every_sample
def test_first_and_second_derivatives(tensors, options):
    assert_differentiable(applied(linear_cross_entropy, options), *tensors, fast_mode=True)
