"""What tests share: random problems, ways to compare derivatives, and what commands say."""

import inspect
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]

ON_TORCH_2_6 = torch.__version__.startswith("2.6.")
needs_fake_cuda = pytest.mark.skipif(
    ON_TORCH_2_6 and not torch.cuda.is_available(),
    reason="torch 2.6 asks the driver of fake CUDA tensors too, and aborts where there is none",
)

OPTIONS = {
    "reduction": ["mean", "sum", "none"],
    "label_smoothing": [0.0, 0.2],
    "weighted": [False, True],
    "kind": ["indices", "ignored", "probabilities"],
}


def every_option(test):
    """Run a test for each kind of target with each combination of the options."""
    for name, values in OPTIONS.items():
        test = pytest.mark.parametrize(name, values)(test)
    return test


def options_of(classes, weighted, label_smoothing, reduction):
    """The options of `every_option`, as a loss takes them."""
    weight = torch.rand(classes, dtype=torch.float64) + 0.5 if weighted else None
    return {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}


def randn(*shape, dtype=torch.float64):
    """Random numbers that require a gradient."""
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def random_target(kind, shape, classes, class_dim=-1):
    """Class indices of a shape, the first ignored if so asked; or probabilities, (*shape, C)."""
    if kind == "probabilities":
        # Their sum is not 1 and some are 0, and the losses must take neither for granted.
        p = torch.rand(*shape, classes, dtype=torch.float64)
        p[..., 0] *= torch.rand(shape) < 0.5
        return p.movedim(-1, class_dim).contiguous().requires_grad_()
    target = torch.randint(classes, shape)
    if kind == "ignored":
        target.view(-1)[0] = -100
    return target


def dense_linear_cross_entropy(
    input, linear_weight, target, *, linear_bias=None, ignore_index=-100, **options
):
    """Torch's own layer and loss, which hold all logits; chunks mean nothing to them."""
    options.pop("chunk_size", None)
    outputs = linear_weight.shape[:-1]
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    logits = logits.unflatten(-1, outputs)
    return F.cross_entropy(logits, target, ignore_index=ignore_index, **options)


def of_differentiable(function, inputs):
    """The function of only those inputs that require a gradient; and those."""
    wanted = tuple(i for i in inputs if i.requires_grad)

    def narrowed(*values):
        left = iter(values)
        return function(*(next(left) if i.requires_grad else i for i in inputs))

    return narrowed, wanted


def assert_same(actual, expected):
    """Equal but for a rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def assert_identical(actual, expected):
    """Equal to the last bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_differentiable(function, *inputs, fast_mode=False):
    """First and second derivatives, in either mode, are those of finite differences."""
    gradcheck(function, inputs, check_forward_ad=True, fast_mode=fast_mode)
    gradgradcheck(
        function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=fast_mode
    )


def upstream_like(loss):
    """A gradient to send back into a loss, of numbers that every dtype holds exactly."""
    return ((torch.arange(loss.numel()) % 8 - 3.5) / 4).to(loss.dtype).reshape(loss.shape)


def directions_like(tensors, seed):
    """A random direction for each tensor, of numbers that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(-8, 9, t.shape, generator=generator) / 4).to(t.dtype) for t in tensors]


def loss_and_gradients(function, *inputs):
    """The loss, and the gradients of the inputs that require one."""
    loss = function(*inputs)
    _, wanted = of_differentiable(function, inputs)
    return loss.detach(), *torch.autograd.grad(loss, wanted, upstream_like(loss))


def _forward(function, direction):
    def along(*inputs):
        return torch.func.jvp(function, inputs, direction)[1]

    return along


def _reverse(function, direction):
    def along(*inputs):
        gradients = torch.func.grad(function, tuple(range(len(inputs))))(*inputs)
        return sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))

    return along


def _backward(function, direction):
    def along(*inputs):
        gradients = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
        return sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))

    return along


_MODES = {"forward": _forward, "reverse": _reverse, "backward": _backward}


def slope(function, inputs, modes):
    """The derivative of a scalar along one random direction for each mode, one inside the other.

    The modes are 'forward' and 'reverse' of torch.func, and the 'backward' of autograd, which does
    not mix with them. Whatever they are, the number is the same.
    """
    function, inputs = of_differentiable(function, inputs)
    for seed, mode in enumerate(modes):
        function = _MODES[mode](function, tuple(directions_like(inputs, seed)))
    return function(*inputs).detach()


NESTINGS = [
    ("forward", "forward"),
    ("forward", "reverse"),
    ("reverse", "forward"),
    ("reverse", "reverse"),
    ("forward", "forward", "forward"),
    ("forward", "forward", "reverse"),
    ("forward", "reverse", "forward"),
    ("forward", "reverse", "reverse"),
    ("reverse", "forward", "forward"),
    ("reverse", "forward", "reverse"),
    ("reverse", "reverse", "forward"),
    ("reverse", "reverse", "reverse"),
    ("backward", "backward", "backward"),
]
SECOND_ORDER = [modes for modes in NESTINGS if len(modes) == 2]
every_nesting = pytest.mark.parametrize("modes", NESTINGS, ids="-".join)


def double_gradients(function, inputs):
    """The gradients of the gradients along random directions, by backward through backward."""
    function, inputs = of_differentiable(function, inputs)
    loss = function(*inputs)
    gradients = torch.autograd.grad(loss, inputs, upstream_like(loss), create_graph=True)
    return torch.autograd.grad(gradients, inputs, directions_like(gradients, seed=0))


def cast(inputs, dtype):
    """The same inputs, with their floating-point numbers in a dtype."""
    return [
        i.detach().to(dtype).requires_grad_(i.requires_grad) if i.is_floating_point() else i
        for i in inputs
    ]


ORDERS = {
    "first": lambda function, inputs: loss_and_gradients(function, *inputs),
    "second": double_gradients,
}
every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())


def errors(function, exact, draw, order=ORDERS["first"], seeds=range(8)):
    """How far each result of a function is from the exact one, over all seeds.

    Args:
        function: What is judged, in the dtypes of the inputs.
        exact: The same, for inputs in float64.
        draw: Gives the inputs.
        order: Which results: a value of `ORDERS`.
        seeds: One for each draw.
    """
    total = 0.0
    for seed in seeds:
        torch.manual_seed(seed)
        inputs = draw()
        pairs = zip(order(function, inputs), order(exact, cast(inputs, torch.float64)), strict=True)
        total = total + torch.stack([(a.double() - e).square().sum() for a, e in pairs])
    return total.sqrt()


class NewTensors(TorchDispatchMode):
    """Records the shape of each tensor that is allocated while this is active."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple) else (result,)
        for declared, value in zip(func._schema.returns, results, strict=False):
            if declared.alias_info is None:  # neither a view nor written into an argument
                tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
                self.shapes += [tuple(t.shape) for t in tensors]
        return result

    @property
    def sizes(self):
        """The number of elements of each."""
        return [torch.Size(shape).numel() for shape in self.shapes]


def arguments_of(function):
    """The name, kind and default of each argument."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters]


def untouched(*tensors):
    """A check, for later, that nothing has written into some tensors."""
    before = [(t, t._version, t.detach().clone()) for t in tensors]

    def check():
        for tensor, version, value in before:
            assert tensor._version == version
            assert_identical(tensor.detach(), value)

    return check


def one_line(capsys):
    """The only line on stderr, which must not tell of a traceback."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def texts(axes):
    """What is written in axes, or on a figure."""
    return [text.get_text() for text in axes.texts]
