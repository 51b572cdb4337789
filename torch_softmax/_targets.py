"""What the options of a loss mean: each is folded into a target distribution or a row weight."""

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """The target distribution of each row: y = scale ∘ p + floor.

    p is one-hot for class indices, and else as given. With class weights w and label smoothing ε,
    scale = (1 − ε) w and floor = ε w / K.
    """

    target: Tensor  # (N,) class indices in [0, K), or (N, K) probabilities
    scale: Tensor | None  # (K,), None for 1
    floor: Tensor | None  # (K,), None for 0

    def is_dense(self) -> bool:
        """Whether p is given in full."""
        return self.target.is_floating_point()

    def rows(self, rows: slice) -> "Targets":
        """The targets of some rows."""
        return Targets(self.target[rows], self.scale, self.floor)

    def push_forward(self, dp: Tensor) -> Tensor:
        """What a change of p does to y, which is linear in p; and its own transpose."""
        return dp if self.scale is None else dp * self.scale

    def mass(self, like: Tensor) -> Tensor:
        """The mass Σ_k y_k, (N,), which is 1 for a distribution without class weights."""
        if self.is_dense():
            mass = self.push_forward(self.target.to(like.dtype)).sum(1)
        elif self.scale is None:
            return like.new_ones(like.shape[0])
        else:
            mass = self.scale[self.target]
        return mass if self.floor is None else mass + self.floor.sum()

    def dot(self, z: Tensor, top: Tensor | None = None) -> Tensor:
        """Σ_k y_k z_k, (N,); or given `top` (N, 1), Σ_k y_k (z_k − top), where z_k may be −∞."""
        if self.is_dense():
            p = self.push_forward(self.target.to(z.dtype))
            # A class without probability adds nothing, but a 0 here would lose ∂(y · z)/∂p_k.
            products = p * z if top is None else (p * (z - top)).masked_fill_(p == 0, 0)
            product = products.sum(1)
        else:
            hot = z.gather(1, self.target.unsqueeze(1))
            product = (hot if top is None else hot - top).squeeze(1)
            if self.scale is not None:
                product = product * self.scale[self.target]
        if self.floor is not None:
            product = product + ((z if top is None else z - top) * self.floor).sum(1)
        return product

    def subtract_from_(self, gradient: Tensor, r: Tensor) -> Tensor:
        """Take r y off a gradient (N, K), in place."""
        if self.is_dense():
            p = self.push_forward(self.target.to(gradient.dtype))
            gradient.addcmul_(p, r.unsqueeze(1), value=-1)
        else:
            hot = r if self.scale is None else r * self.scale[self.target]
            gradient.scatter_add_(1, self.target.unsqueeze(1), -hot.unsqueeze(1))
        if self.floor is not None:
            gradient.addr_(r, self.floor, alpha=-1)
        return gradient


class Rows(NamedTuple):
    """The rows of a loss, with every option folded in."""

    targets: Targets
    keep: Tensor | None  # (N,) bool, False where the target is ignored; None where none can be
    divisor: Tensor  # (), what a mean divides by: the weight of all targets together


def fold_options(
    target: Tensor,
    classes: int,
    dtype: torch.dtype,
    weight: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
) -> Rows:
    """Fold the options of a loss, checked before, into its rows.

    The target is (N,) class indices or (N, K) probabilities, the dtype that of the work, and the
    options are those of `torch.nn.functional.cross_entropy`, with None to ignore no row.
    """
    scale = floor = None
    if weight is not None:
        scale = weight = weight.to(dtype)
    if label_smoothing:
        if scale is None:
            scale = torch.ones(classes, dtype=dtype, device=target.device)
        floor = scale * (label_smoothing / classes)
        scale = scale * (1 - label_smoothing)

    keep = None
    if not target.is_floating_point():
        target = target.long()
        if ignore_index is not None:
            keep = target != ignore_index
            target = target.masked_fill(~keep, 0)
    # A mean divides by the class weights of the targets that it keeps, but for probabilities.
    if weight is not None and not target.is_floating_point():
        weights = weight[target]
        divisor = (weights if keep is None else weights * keep).sum()
    elif keep is not None:
        divisor = keep.sum(dtype=dtype)
    else:
        divisor = torch.full((), target.shape[0], dtype=dtype, device=target.device)
    return Rows(Targets(target, scale, floor), keep, divisor)


def divide(total: Tensor, divisor: Tensor, *, by_zero: float) -> Tensor:
    """Divide a total by a divisor, with a result of one's choice for a divisor of 0.

    Then all derivatives are 0, for nothing was added up.
    """
    empty = divisor == 0
    return (total / divisor.masked_fill(empty, 1)).masked_fill(empty, by_zero)
