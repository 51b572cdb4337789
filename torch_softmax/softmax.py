"""The softmax, with its Jacobian S_i (δ_ij − S_j) in closed form."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from . import _checks as checks
from . import _formulas as formulas
from ._chunks import accumulation_dtype
from ._functions import applier, nested_forward_mode


class SoftmaxFunction(Function):
    """S_i = e^{z_i} / Σ_j e^{z_j} along one dimension."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dim: int) -> Tensor:
        return formulas.softmax(input, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _jacobian_product(ctx.saved_tensors, gradient, ctx.dim), None

    @staticmethod
    @nested_forward_mode
    def jvp(ctx: Any, saved: Any, tangent: Tensor, _: None) -> Tensor:
        return _jacobian_product(saved, tangent, ctx.dim)


def _jacobian_product(saved: Any, u: Tensor, dim: int) -> Tensor:
    (softmax,) = saved
    wide = accumulation_dtype(softmax.dtype)
    return formulas.jacobian_product(softmax.to(wide), u.to(wide), dim).to(softmax.dtype)


_softmax = applier(SoftmaxFunction)


def softmax(input: Tensor, dim: int = -1) -> Tensor:
    """Softmax along one dimension, whose derivatives of every order are in closed form.

    S_i = e^{z_i} / Σ_j e^{z_j}, with the Jacobian ∂S_j/∂z_i = S_i (δ_ij − S_j).

    Args:
        input: Logits z of any shape and a floating-point dtype.
        dim: The dimension along which the result sums to 1.

    Returns:
        A tensor of the shape and dtype of `input` (float32 under autocast).

    Raises:
        TypeError: `input` is no tensor of a floating-point dtype.
        IndexError: `input` has no dimension `dim`.

    Example:
        >>> import torch
        >>> softmax(torch.tensor([0.0, 1.0, 1.0]))
        tensor([0.1554, 0.4223, 0.4223])

    Source: Bishop, Pattern Recognition and Machine Learning (2006), equations 4.104 and 4.106.
    """
    checks.floating("input", input)
    result: Tensor = _softmax(input, dim)
    return result
