"""The oracle of the curvature: whole Hessians by torch.func, of torch's own loss, in float64."""

import torch
from torch.nn import functional as F


def loss_of(
    input,
    target,
    *,
    reduction="mean",
    weight_decay=0.0,
    row_weight=None,
):
    """The loss of (W, b), or of (W,) alone, in torch's own functions."""
    x = input.flatten(0, -2)
    if target is None:
        target = torch.zeros(len(x), dtype=torch.int64)
    target = target.flatten(0, -2) if target.is_floating_point() else target.flatten()
    keep = torch.ones(len(x), dtype=torch.bool) if target.is_floating_point() else target != -100
    x, target = x[keep], target[keep]
    weight = torch.ones(len(x)) if row_weight is None else row_weight.flatten()[keep]

    def loss(W, b=None):
        losses = F.cross_entropy(F.linear(x, W, b), target, reduction="none")
        total = (losses * weight).sum()
        if reduction == "mean":
            total = total / max(1, len(x))
        return total + weight_decay / 2 * W.square().sum()

    return loss


def dense_hessian(input, linear_weight, target=None, *, linear_bias=None, **options):
    """The whole matrix (P, P), in the order of W and then b."""
    loss = loss_of(input, target, **options)
    shape, size = linear_weight.shape, linear_weight.numel()

    def of_vector(v):
        b = None if linear_bias is None else v[size:]
        return loss(v[:size].view(shape), b)

    parameters = [linear_weight.flatten(), *([] if linear_bias is None else [linear_bias])]
    return torch.func.hessian(of_vector)(torch.cat(parameters).detach())


def flat(direction):
    """A direction as a vector (P,), of W and then b; and many of them as a matrix (M, P)."""
    W, *b = direction if isinstance(direction, tuple) else (direction,)
    return torch.cat([W.flatten(-2), *b], -1)
