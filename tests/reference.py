"""The oracle: softmax and losses in their most naive form, in float64, a row and a class at a time.

All of it can be differentiated, so that autograd gives a derivative of any order to compare with.
"""

import itertools
from typing import Any

import torch
from torch import Tensor


def softmax(z: Tensor) -> Tensor:
    """S_i = e^{z_i} / Σ_j e^{z_j}, for one row of logits."""
    total = torch.stack([z_j.exp() for z_j in z]).sum()
    return torch.stack([z_i.exp() / total for z_i in z])


def softmax_jacobian(z: Tensor) -> Tensor:
    """∂S_i/∂z_j = S_i (δ_ij − S_j), for one row of logits."""
    S = softmax(z)
    jacobian = torch.zeros(len(z), len(z), dtype=torch.float64)
    for i, j in itertools.product(range(len(z)), repeat=2):
        jacobian[i, j] = S[i] * ((1 if i == j else 0) - S[j])
    return jacobian


def one_hot(label: Tensor | int, classes: int) -> Tensor:
    """1 for the class of the label, 0 for the others."""
    y = torch.zeros(classes, dtype=torch.float64)
    y[label] = 1
    return y


def row_loss(z: Tensor, y: Tensor) -> Tensor:
    """L = −Σ_k y_k log S_k."""
    terms = [y_k * S_k.log() for y_k, S_k in zip(y, softmax(z), strict=True)]
    return -torch.stack(terms).sum()


def losses(
    logits: Tensor,
    target: Tensor,
    class_dim: int,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of logits that have their classes at `class_dim`, row by row."""
    rows = logits.double().movedim(class_dim, -1)
    *shape, classes = rows.shape
    by_index = not target.is_floating_point()
    targets = target if by_index else target.double().movedim(class_dim, -1)
    class_weight = torch.ones(classes).double() if weight is None else weight.double()

    results: list[Tensor] = []
    divisor = torch.zeros((), dtype=torch.float64)
    for position in itertools.product(*map(range, shape)):
        z, y = rows[position], targets[position]
        if by_index and y == ignore_index:
            results.append(0 * z.sum())
            continue
        divisor = divisor + (class_weight[y] if by_index else 1.0)
        y = one_hot(y, classes) if by_index else y
        y = (1 - label_smoothing) * y + label_smoothing / classes
        results.append(row_loss(z, class_weight * y))
    if reduction == "none":
        return torch.stack(results).reshape(shape)
    total = torch.stack(results).sum()
    return total / divisor if reduction == "mean" else total


def cross_entropy(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The loss of logits (C), (N, C) or (N, C, d1, ...)."""
    return losses(input, target, min(1, input.dim() - 1), **options)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The loss of the logits of a linear layer (C, d1, ..., D), for inputs (..., D)."""
    logits = torch.tensordot(input.double(), linear_weight.double(), dims=([-1], [-1]))
    if linear_bias is not None:
        logits = logits + linear_bias.double()
    return losses(logits, target, input.dim() - 1, **options)
