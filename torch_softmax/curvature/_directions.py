"""Directions of a head's parameters: as they are given, as they are worked with, and flat."""

from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks
from ..optim._hessian import Layer

Direction = Tensor | tuple[Tensor, Tensor]


def directions_of(name: str, u: Any, layer: Layer, dtype: torch.dtype) -> tuple[Layer, bool]:
    """A weight (M, C, D) and a bias (M, C) of directions, and whether but one was given, M = 1.

    Raises:
        TypeError: A part is no tensor of a floating-point dtype.
        ValueError: It has another shape or device than the layer's, or requires a gradient.
    """
    classes, features = layer.W.shape
    parts = tuple(u) if isinstance(u, (tuple, list)) else (u,)
    if len(parts) != sum(t is not None for t in layer):
        form = (
            f"a tensor ({classes}, {features})"
            if layer.b is None
            else f"a pair ({classes}, {features}) and ({classes},), as there is a linear_bias"
        )
        got = type(u).__name__ if len(parts) == 1 else f"{len(parts)} tensors"
        raise ValueError(f"{name} must be {form}, or M of them, got {got}")
    W, *b = parts
    for part in parts:
        checks.floating(name, part)
        if part.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, for it gets none: detach it")
        if part.device != layer.W.device:
            raise ValueError(f"{name} must be on {layer.W.device}, got {part.device}")
    number = W.shape[:1] if W.dim() == 3 else ()
    checks.shape(name, W, (*number, classes, features), "as linear_weight has")
    for part in b:
        checks.shape(name, part, (*number, classes), "as linear_bias has")
    W, *b = (part.detach().to(dtype) for part in parts)
    if not number:
        W, b = W.unsqueeze(0), [part.unsqueeze(0) for part in b]
    return Layer(W, *b) if b else Layer(W, None), not number


def as_given(directions: Layer, single: bool) -> Direction:
    """Directions in the form that `directions_of` takes."""
    W, b = (None if t is None else t[0] if single else t for t in directions)
    assert W is not None
    return W if b is None else (W, b)


def joined(directions: Layer) -> Tensor:
    """Directions v (M, C, P), of which the last column is the bias, if there is one."""
    W, b = directions
    return W if b is None else torch.cat([W, b.unsqueeze(2)], 2)


def parted(v: Tensor, layer: Layer) -> Layer:
    """The directions of v (M, C, P), as views."""
    features = layer.W.shape[1]
    return Layer(v[..., :features], None if layer.b is None else v[..., features])


def flat(directions: Layer) -> Tensor:
    """Directions (M, P), in the order of `torch.nn.utils.parameters_to_vector`: W and then b."""
    return torch.cat([t.flatten(1) for t in directions if t is not None], 1)


def unflat(vectors: Tensor, layer: Layer) -> Layer:
    """The directions of vectors (M, P)."""
    W, b = layer
    u = vectors[:, : W.numel()].unflatten(1, W.shape)
    return Layer(u, None if b is None else vectors[:, W.numel() :])
