"""The problems of the losses: who contends in them, and how many matrix products they need."""

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_softmax.functional import cross_entropy, linear_cross_entropy

from .measure import Place, Problem, Results, Run, Shape
from .rivals import RIVALS

SMALL_CHUNK = 128

Loss = Callable[..., Tensor]


def dense(x: Tensor, W: Tensor, target: Tensor, b: Tensor | None = None) -> Tensor:
    """What most write: logits (N, K), and their cross-entropy."""
    return F.cross_entropy(F.linear(x, W, b), target)


def ours(x: Tensor, W: Tensor, target: Tensor, b: Tensor | None = None) -> Tensor:
    """The fused layer."""
    return linear_cross_entropy(x, W, target, linear_bias=b)


def ours_in_small_chunks(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    """The fused layer with a quarter of the rows that it would choose for many classes."""
    return linear_cross_entropy(x, W, target, chunk_size=SMALL_CHUNK)


def value(loss: Loss, *inputs: Tensor) -> Results:
    """A loss alone."""
    return (loss(*inputs),)


def gradients(loss: Loss, *inputs: Tensor) -> Results:
    """A loss, and its gradients with respect to the inputs that require them."""
    result = loss(*inputs)
    leaves = [input for input in inputs if input.requires_grad]
    return result.detach(), *torch.autograd.grad(result, leaves)


def hvp_by_double_backward(loss: Loss, x: Tensor, W: Tensor, target: Tensor, v: Tensor) -> Results:
    """The gradient with respect to W and the Hessian times v, by autograd."""
    leaf = W.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, leaf, target), leaf, create_graph=True)
    return gradient.detach(), *torch.autograd.grad(gradient, leaf, v)


def hvp_by_func(loss: Loss, x: Tensor, W: Tensor, target: Tensor, v: Tensor) -> Results:
    """The same by `torch.func`."""
    gradient: Callable[[Tensor], Tensor] = torch.func.grad(lambda W: loss(x, W, target))
    with warnings.catch_warnings():
        # Torch scripts its formulas for forward mode when they are first asked for.
        warnings.filterwarnings("ignore", "`torch.jit.script")
        results: Results = torch.func.jvp(gradient, (W,), (v,))
    return results


def products(x_W: int, z_W: int, zt_x: int, x: Tensor, W: Tensor, *others: Tensor) -> Run:
    """Bare matrix products, as many of each kind as named: x Wᵀ, z W and zᵀ x.

    They write into memory that is there already, as fresh memory takes a CPU a while to hand out.
    """
    x, W = x.detach(), W.detach()
    z, dx, dW = x @ W.t(), torch.empty_like(x), torch.empty_like(W)

    def run() -> None:
        for _ in range(x_W):
            torch.mm(x, W.t(), out=z)
        for _ in range(z_W):
            torch.mm(z, W, out=dx)
        for _ in range(zt_x):
            torch.mm(z.t(), x, out=dW)

    return run


def logits(shape: Shape, place: Place) -> Results:
    """Logits and targets."""
    return place.randn(shape.N, shape.K).requires_grad_(), place.classes(shape)


def layer(shape: Shape, place: Place) -> Results:
    """Rows and weights, of which the logits' variance is 1, and targets."""
    x, W = place.randn(shape.N, shape.D), place.randn(shape.K, shape.D) / shape.D**0.5
    return x, W, place.classes(shape)


def layer_with_gradients(shape: Shape, place: Place) -> Results:
    """The same, in the midst of a model."""
    x, W, target = layer(shape, place)
    return x.requires_grad_(), W.requires_grad_(), target


def whole_model(shape: Shape, place: Place) -> Results:
    """The same as the whole model: with a bias, and no gradient of the rows."""
    x, W, target = layer(shape, place)
    return x, W.requires_grad_(), target, place.randn(shape.K).requires_grad_()


def layer_and_direction(shape: Shape, place: Place) -> Results:
    """A layer, and a direction of its weights."""
    return *layer(shape, place), place.randn(shape.K, shape.D)


LOGITS = Problem(
    section="logits",
    inputs=logits,
    floors={},
    contestants={
        "torch": partial(gradients, F.cross_entropy),
        "ours": partial(gradients, cross_entropy),
    },
    reference="torch",
    yardstick="torch",
)

LINEAR = Problem(
    section="linear",
    inputs=layer_with_gradients,
    floors={"three products": partial(products, 1, 1, 1)},
    contestants={
        "torch dense": partial(gradients, dense),
        "ours": partial(gradients, ours),
        f"ours, chunk_size={SMALL_CHUNK}": partial(gradients, ours_in_small_chunks),
        **{name: partial(gradients, loss) for name, loss in RIVALS.items()},
    },
    reference="torch dense",
    yardstick="three products",
)

FORWARD = Problem(
    section="forward",
    inputs=layer,
    floors={"one product": partial(products, 1, 0, 0)},
    contestants={"torch dense": partial(value, dense), "ours": partial(value, ours)},
    reference="torch dense",
    yardstick="one product",
)

# Torch's chunked path is no contestant: it is documented to be slower where N < D.
MNIST_STEP = Problem(
    section="mnist-step",
    inputs=whole_model,
    floors={"two products": partial(products, 1, 0, 1)},
    contestants={"torch dense": partial(gradients, dense), "ours": partial(gradients, ours)},
    reference="torch dense",
    yardstick="torch dense",
)

# Five products by double backward: two for the gradient (x Wᵀ, zᵀ x), and three for its change
# along v (x Wᵀ again, x vᵀ, zᵀ x). Eight by torch.func: the loss, its slope (two), the gradient
# (two), and the three.
HVP = Problem(
    section="hvp",
    inputs=layer_and_direction,
    floors={
        "five products": partial(products, 3, 0, 2),
        "eight products": partial(products, 6, 0, 2),
    },
    contestants={
        "dense, double backward": partial(hvp_by_double_backward, dense),
        "ours, double backward": partial(hvp_by_double_backward, ours),
        "dense, torch.func": partial(hvp_by_func, dense),
        "ours, torch.func": partial(hvp_by_func, ours),
    },
    reference="dense, double backward",
    yardstick="five products",
)
