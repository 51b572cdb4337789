"""The softmax, with its Jacobian S_i (δ_ij − S_j) in closed form."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._transforms import refuse_inference_mode
from . import _formulas as formulas
from ._autograd import nested_forward_mode
from ._dtypes import accumulation_dtype


class SoftmaxFunction(Function):
    """S_i = e^{z_i} / Σ_j e^{z_j} along one dimension."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dim: int) -> Tensor:
        return formulas.softmax(input, dim).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.dim = inputs
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _jacobian_product(ctx.saved_tensors, gradient, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        with nested_forward_mode(ctx.saved_tensors) as saved:
            return _jacobian_product(saved, tangent, ctx.dim)


def _jacobian_product(saved: Any, u: Tensor, dim: int) -> Tensor:
    (softmax,) = saved
    wide = accumulation_dtype(softmax.dtype)
    return formulas.jacobian_product(softmax.to(wide), u.to(wide), dim).to(softmax.dtype)


def softmax(input: Tensor, dim: int) -> Tensor:
    """The softmax along a dimension, to be differentiated to any order."""
    if torch.compiler.is_compiling():  # which differentiates torch's own to any order
        return formulas.softmax(input, dim).contiguous()
    refuse_inference_mode()
    result: Tensor = SoftmaxFunction.apply(input, dim)
    return result
