"""The modules: their parameters and state, and that they pass all options on."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import (
    NewTensors,
    arguments_of,
    assert_differentiable,
    assert_identical,
    assert_same,
    dense_linear_cross_entropy,
    double_gradients,
    loss_and_gradients,
    randn,
    random_target,
)
from torch_softmax import CrossEntropyLoss, LinearCrossEntropyLoss, SoftmaxRegression
from torch_softmax.functional import linear_cross_entropy

N, D, K = 5, 3, 4
OPTIONS = {
    "defaults": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weight": {"weight": torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)},
    "ignore_index": {"ignore_index": 1},
    "label_smoothing": {"label_smoothing": 0.2},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture
def x():
    return randn(N, D)


@pytest.fixture
def target():
    return torch.tensor([0, 1, 2, 3, 1])


# SoftmaxRegression.


@pytest.fixture
def model():
    return SoftmaxRegression(D, K, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
def test_state_of_softmax_regression_loads_into_linear(bias, x):
    ours, theirs = SoftmaxRegression(D, K, bias), nn.Linear(D, K, bias)
    theirs.load_state_dict(ours.state_dict())
    assert_identical(theirs(x.float()), ours(x.float()))


@pytest.mark.parametrize("bias", [False, True])
def test_state_of_linear_loads_into_softmax_regression(bias, x):
    ours, theirs = SoftmaxRegression(D, K, bias), nn.Linear(D, K, bias)
    ours.load_state_dict(theirs.state_dict())
    assert_identical(ours(x.float()), theirs(x.float()))


def test_softmax_regression_starts_as_linear_does():
    torch.manual_seed(3)
    ours = SoftmaxRegression(D, K)
    torch.manual_seed(3)
    assert_identical(dict(ours.state_dict()), dict(nn.Linear(D, K).state_dict()))


def test_softmax_regression_takes_device_and_dtype():
    model = SoftmaxRegression(D, K, device="meta", dtype=torch.float16)
    assert (model.weight.device.type, model.weight.dtype) == ("meta", torch.float16)


def test_number_of_classes(model):
    assert model.num_classes == K


@every_option
def test_loss_of_softmax_regression_is_that_of_its_logits(options, model, x, target):
    ours = loss_and_gradients(lambda x: model.loss(x, target, **options), x)
    assert_same(ours, loss_and_gradients(lambda x: F.cross_entropy(model(x), target, **options), x))


def test_loss_of_softmax_regression_trains_its_parameters(model, x, target):
    parameters = list(model.parameters())
    ours = torch.autograd.grad(model.loss(x, target), parameters)
    assert_same(ours, torch.autograd.grad(F.cross_entropy(model(x), target), parameters))


def test_loss_of_softmax_regression_never_holds_all_logits(model):
    x, target = torch.randn(40, D, dtype=torch.float64), torch.randint(K, (40,))
    with NewTensors() as new:
        model.loss(x, target, chunk_size=5).backward()
    assert 40 * K not in new.sizes


def test_loss_of_softmax_regression_of_soft_targets(model, x):
    target = random_target("probabilities", (N,), K)
    ours = loss_and_gradients(model.loss, x, target)
    theirs = loss_and_gradients(lambda x, t: F.cross_entropy(model(x), t), x, target)
    assert_same(ours, theirs)


def test_loss_of_softmax_regression_of_sequences(model, x, target):
    ours = model.loss(x.unsqueeze(1).expand(N, 2, D), target.unsqueeze(1).expand(N, 2))
    assert_same(ours, model.loss(x, target))


def test_loss_of_softmax_regression_has_second_derivatives(model, x, target):
    parameters = list(model.parameters())
    ours = double_gradients(lambda *_: model.loss(x, target), parameters)
    theirs = double_gradients(lambda *_: F.cross_entropy(model(x), target), parameters)
    assert_same(ours, theirs)


def test_probabilities_are_the_softmax_of_the_logits(model, x):
    assert_same(model.predict_proba(x), torch.softmax(model(x), 1))


def test_probabilities_can_be_differentiated(model, x):
    ours = loss_and_gradients(model.predict_proba, x)
    assert_same(ours, loss_and_gradients(lambda x: torch.softmax(model(x), 1), x))


@pytest.mark.parametrize("shape", [(), (N,), (2, 3)])
def test_prediction_is_the_class_of_the_largest_logit(shape, model):
    x = torch.randn(*shape, D, dtype=torch.float64)
    assert_identical(model.predict(x), model(x).argmax(-1))


@pytest.mark.parametrize("argument", ["in_features", "num_classes"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [(0, ValueError, "at least 1, got 0"), (2.5, TypeError, "an int, got 2.5")],
)
def test_sizes_of_softmax_regression(value, error, message, argument):
    sizes = {"in_features": D, "num_classes": K, argument: value}
    with pytest.raises(error, match=f"{argument} must be {message}"):
        SoftmaxRegression(**sizes)


def test_loss_of_softmax_regression_names_a_label_out_of_range(model, x):
    with pytest.raises(ValueError, match=r"class indices in \[0, 4\) or ignore_index=-100, got 9"):
        model.loss(x, torch.tensor([0, 1, 9, 0, 0]))


# CrossEntropyLoss.


@every_option
def test_cross_entropy_loss_is_that_of_torch(options, target):
    z = randn(N, K)
    ours = loss_and_gradients(CrossEntropyLoss(**options), z, target)
    assert_same(ours, loss_and_gradients(nn.CrossEntropyLoss(**options), z, target))


def test_arguments_of_cross_entropy_loss_are_those_of_torch():
    *ours, dtype = arguments_of(CrossEntropyLoss)
    assert ours == arguments_of(nn.CrossEntropyLoss)
    assert dtype[0] == "dtype"


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("legacy", [{"size_average": False}, {"reduce": False}])
def test_cross_entropy_loss_takes_the_legacy_arguments(legacy, target):
    z = randn(N, K)
    assert_same(CrossEntropyLoss(**legacy)(z, target), nn.CrossEntropyLoss(**legacy)(z, target))


def test_state_of_cross_entropy_loss_is_that_of_torch():
    weight = torch.rand(K)
    ours, theirs = CrossEntropyLoss(torch.ones(K)), nn.CrossEntropyLoss(weight)
    ours.load_state_dict(theirs.state_dict())
    assert_identical(ours.weight, weight)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"reduction": "avg"}, ValueError, "reduction must be 'none', 'mean' or 'sum', got 'avg'"),
        ({"label_smoothing": 2}, ValueError, r"label_smoothing must lie in \[0, 1\], got 2"),
        ({"ignore_index": "x"}, TypeError, "ignore_index must be an int, got 'x'"),
        ({"weight": torch.ones(K).long()}, TypeError, "weight must have a floating-point dtype"),
    ],
)
def test_options_of_cross_entropy_loss_are_checked_when_it_is_made(wrong, error, message):
    with pytest.raises(error, match=message):
        CrossEntropyLoss(**wrong)


# LinearCrossEntropyLoss.

needs_torch_head = pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has no such module"
)
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "weight": {"weight": torch.tensor([0.5, 1.0, 2.0, 1.5])},
    "out_features": {"out_features": (2, 3), "bias": True},
}
every_head = pytest.mark.parametrize("arguments", HEADS.values(), ids=HEADS.keys())


@needs_torch_head
@every_head
def test_state_of_linear_cross_entropy_loss_loads_into_that_of_torch(arguments):
    ours = LinearCrossEntropyLoss(D, K, **arguments)
    theirs = nn.LinearCrossEntropyLoss(D, K, **arguments)
    theirs.load_state_dict(ours.state_dict())
    assert_identical(dict(theirs.state_dict()), dict(ours.state_dict()))


@needs_torch_head
@every_head
def test_state_of_torch_loads_into_linear_cross_entropy_loss(arguments):
    ours = LinearCrossEntropyLoss(D, K, **arguments)
    theirs = nn.LinearCrossEntropyLoss(D, K, **arguments)
    ours.load_state_dict(theirs.state_dict())
    outputs = arguments.get("out_features", ())
    x, target = torch.randn(N, D), torch.randint(K, (N, *outputs))
    torch.testing.assert_close(ours(x, target), theirs(x, target), rtol=1e-6, atol=0)


@needs_torch_head
def test_linear_cross_entropy_loss_starts_as_that_of_torch():
    torch.manual_seed(3)
    ours = LinearCrossEntropyLoss(D, K, bias=True)
    torch.manual_seed(3)
    theirs = nn.LinearCrossEntropyLoss(D, K, bias=True)
    assert_identical(dict(ours.state_dict()), dict(theirs.state_dict()))


@needs_torch_head
def test_arguments_of_linear_cross_entropy_loss_begin_with_those_of_torch_but_for_the_chunk_size():
    *theirs, options = arguments_of(nn.LinearCrossEntropyLoss)
    assert options[0] == "options"
    ours = arguments_of(LinearCrossEntropyLoss)
    assert ours[: len(theirs)] == theirs
    assert ours[len(theirs)][0] == "chunk_size"


@every_option
@pytest.mark.parametrize("chunk_size", [2, None])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_loss_is_that_of_its_logits(bias, chunk_size, options, x, target):
    head = LinearCrossEntropyLoss(
        D, K, bias=bias, dtype=torch.float64, chunk_size=chunk_size, **options
    )
    ours = loss_and_gradients(head, x, target)
    theirs = loss_and_gradients(
        lambda x, t: F.cross_entropy(head.linear(x), t, **options), x, target
    )
    assert_same(ours, theirs)


def test_linear_cross_entropy_loss_with_further_outputs(x):
    head = LinearCrossEntropyLoss(D, K, out_features=(2,), bias=True, dtype=torch.float64)
    target = torch.randint(K, (N, 2))
    weight, bias = head.linear.weight.unflatten(0, (K, 2)), head.linear.bias.unflatten(0, (K, 2))
    expected = dense_linear_cross_entropy(x, weight, target, linear_bias=bias)
    assert_same(head(x, target), expected)


def test_linear_cross_entropy_loss_takes_device_and_dtype():
    head = LinearCrossEntropyLoss(D, K, device="meta", dtype=torch.float16)
    assert (head.linear.weight.device.type, head.linear.weight.dtype) == ("meta", torch.float16)


def test_class_weights_move_with_the_module():
    head = LinearCrossEntropyLoss(D, K, weight=torch.rand(K)).double()
    assert head.weight.dtype == torch.float64


def test_a_copy_gives_the_same_loss(x, target):
    head = LinearCrossEntropyLoss(D, K, dtype=torch.float64, label_smoothing=0.1)
    assert_identical(copy.deepcopy(head)(x, target), head(x, target))


def test_linear_cross_entropy_loss_has_second_derivatives(x, target):
    head = LinearCrossEntropyLoss(D, K, bias=True, dtype=torch.float64, chunk_size=2)

    def loss(weight, bias):
        parameters = {"linear.weight": weight, "linear.bias": bias}
        return torch.func.functional_call(head, parameters, (x, target))

    assert_differentiable(loss, *head.parameters())


CHANGES = {"softcap": 2.0, "logit_scale": 0.5, "z_loss": 0.1}


def test_linear_cross_entropy_loss_has_the_options_that_torch_lacks(x):
    head = LinearCrossEntropyLoss(D, K, dtype=torch.float64, **CHANGES)
    target, rows = torch.arange(N) % K, {"row_weight": torch.rand(N).double(), "count": 3}
    expected = linear_cross_entropy(x, head.linear.weight, target, **CHANGES, **rows)
    assert_same(head(x, target, **rows), expected)


def test_representation_says_the_options_that_torch_lacks_where_they_are_given():
    assert "softcap" not in repr(LinearCrossEntropyLoss(D, K))
    words = "softcap=2.0, logit_scale=0.5, z_loss=0.1"
    assert words in repr(LinearCrossEntropyLoss(D, K, **CHANGES))


def test_representation_says_the_options():
    head = LinearCrossEntropyLoss(D, K, reduction="sum", label_smoothing=0.1)
    assert "reduction='sum', label_smoothing=0.1" in repr(head)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.5}, TypeError, "num_classes must be an int, got 2.5"),
        ({"reduction": "avg"}, ValueError, "reduction must be 'none', 'mean' or 'sum', got 'avg'"),
        ({"label_smoothing": 2}, ValueError, r"label_smoothing must lie in \[0, 1\], got 2"),
        ({"ignore_index": "x"}, TypeError, "ignore_index must be an int, got 'x'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"softcap": 0.0}, ValueError, "softcap must "),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be finite, got nan"),
        ({"z_loss": -1.0}, ValueError, "z_loss must "),
        (
            {"weight": torch.ones(3)},
            ValueError,
            r"weight must have shape \(4,\) for one weight a class, got \(3,\)",
        ),
    ],
)
def test_options_of_linear_cross_entropy_loss_are_checked_when_it_is_made(wrong, error, message):
    arguments = {"in_features": D, "num_classes": K, **wrong}
    with pytest.raises(error, match=message):
        LinearCrossEntropyLoss(**arguments)


# Compilers.

LOSSES = {
    "CrossEntropyLoss": (CrossEntropyLoss, K),
    "LinearCrossEntropyLoss": (
        lambda: LinearCrossEntropyLoss(D, K, dtype=torch.float64, chunk_size=2),
        D,
    ),
}
every_loss = pytest.mark.parametrize(("make", "features"), LOSSES.values(), ids=LOSSES.keys())


@every_loss
@pytest.mark.usefixtures("fresh_compiler")
def test_losses_compile_whole(make, features, target):
    loss, x = make(), randn(N, features)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(compiled, x, target), loss_and_gradients(loss, x, target))


@every_loss
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False])
def test_losses_export(strict, make, features, target):
    loss, x = make(), torch.randn(N, features, dtype=torch.float64)
    exported = torch.export.export(loss, (x, target), strict=strict).module()
    assert_same(exported(x, target), loss(x, target))
