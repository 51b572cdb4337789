"""Directions of a head's parameters, as they are given and as a layer's weight and bias."""

from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks
from ..optim._hessian import Layer

Direction = Tensor | tuple[Tensor, Tensor]


def directions_of(name: str, u: Any, layer: Layer, dtype: torch.dtype) -> tuple[Layer, bool]:
    """A weight (M, C, D) and a bias (M, C) of directions, and whether only one was given, M = 1.

    Raises:
        TypeError: A part is not a tensor of a floating-point dtype.
        ValueError: It has another shape or device than the layer's, or requires a gradient.
    """
    classes, features = layer.W.shape
    W, *b = parts = tuple(u) if isinstance(u, (tuple, list)) and u else (u,)
    if len(b) != (layer.b is not None) or not all(isinstance(part, Tensor) for part in parts):
        form = f"a tensor ({classes}, {features})"
        if layer.b is not None:
            form = f"a pair ({classes}, {features}) and ({classes},), as there is a linear_bias"
        got = " and ".join(type(part).__name__ for part in parts)
        raise ValueError(f"{name} must be {form}, or M of them, got {got}")
    number = W.shape[:1] if W.dim() == 3 else ()
    shapes = ((*number, classes, features), (*number, classes))
    for part, like, shape in zip(parts, ("linear_weight", "linear_bias"), shapes, strict=False):
        checks.floating(name, part)
        checks.shape(name, part, shape, f"as {like} has")
        if part.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, for it gets none: detach it")
        if part.device != layer.W.device:
            raise ValueError(f"{name} must be on {layer.W.device}, got {part.device}")
    given = Layer(W, *b or (None,)).map(lambda t: t.detach().to(dtype))
    return (given if number else given.map(lambda t: t.unsqueeze(0))), not number


def as_given(directions: Layer, single: bool) -> Direction:
    """Directions in the form that `directions_of` takes."""
    W, b = directions.map(lambda t: t.squeeze(0)) if single else directions
    return W if b is None else (W, b)
