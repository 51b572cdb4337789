"""What the options of a loss mean: each is folded into a target distribution or a row weight."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._spread import Spread


class Targets(NamedTuple):
    """The target distribution of each row: y = scale ∘ p + floor.

    p is one-hot for class indices, and else as given. With class weights w and label smoothing ε,
    scale = (1 − ε) w and floor = ε w / K. Where the classes are spread over ranks, all of this is
    about those of one rank, and labels that lie elsewhere are 0 here.
    """

    target: Tensor  # (N,) class indices in [0, K), or (N, K) probabilities
    scale: Tensor | None  # (K,), None for 1
    floor: Tensor | None  # (K,), None for 0
    spread: Spread | None = None

    def is_dense(self) -> bool:
        """Whether p is given in full."""
        return self.target.is_floating_point()

    def rows(self, rows: slice) -> "Targets":
        """The targets of some rows."""
        spread = None if self.spread is None else self.spread.rows(rows)
        return Targets(self.target[rows], self.scale, self.floor, spread)

    def hot(self) -> Tensor | None:
        """The part of y at each label, without the floor, (N,), for class indices; None for 1."""
        inside = None if self.spread is None else self.spread.inside
        if self.scale is None:
            return inside
        hot = self.scale[self.target]
        return hot if inside is None else hot * inside

    def push_forward(self, dp: Tensor) -> Tensor:
        """What a change of p does to y, which is linear in p; and its own transpose."""
        return dp if self.scale is None else dp * self.scale

    def mass(self, like: Tensor) -> Tensor | None:
        """The mass Σ_k y_k, (N,), in the dtype of `like`; None for 1, as of one-hot targets."""
        if self.spread is not None:
            return self.spread.mass
        if self.is_dense():
            mass: Tensor | None = self.push_forward(self.target.to(like.dtype)).sum(1)
        else:
            mass = self.hot()
        if mass is None or self.floor is None:
            return mass
        return mass + self.floor.sum()

    def dot(self, z: Tensor, top: Tensor | None = None) -> Tensor:
        """Σ_k y_k z_k, (N,); or given `top` (N, 1), Σ_k y_k (z_k − top), where z_k may be −∞."""
        if self.is_dense():
            p = self.push_forward(self.target.to(z.dtype))
            # A class without probability adds nothing, but a 0 here would lose ∂(y · z)/∂p_k.
            products = p * z if top is None else (p * (z - top)).masked_fill_(p == 0, 0)
            product = products.sum(1)
        else:
            at = z.gather(1, self.target.unsqueeze(1))
            product = (at if top is None else at - top).squeeze(1)
            hot = self.hot()
            if hot is not None:
                product = product * hot
        if self.floor is not None:
            product = product + ((z if top is None else z - top) * self.floor).sum(1)
        return product

    def subtract_from_(self, gradient: Tensor, r: Tensor | None) -> Tensor:
        """Take r y off a gradient (N, K), in place; None stands for an r of 1."""
        r = gradient.new_ones(()).expand(len(gradient)) if r is None else r
        if self.is_dense():
            p = self.push_forward(self.target.to(gradient.dtype))
            gradient.addcmul_(p, r.unsqueeze(1), value=-1)
        else:
            hot = self.hot()
            hot = r if hot is None else r * hot
            gradient.scatter_add_(1, self.target.unsqueeze(1), -hot.unsqueeze(1))
        if self.floor is not None:
            gradient.addr_(r, self.floor, alpha=-1)
        return gradient


class Rows(NamedTuple):
    """The rows of a loss, with every option folded in."""

    targets: Targets
    keep: Tensor | None  # (N,) bool, False where the target is ignored; None where none can be
    divisor: Tensor  # (), what a mean divides by: the weight of all targets, or 1 where that is 0
    empty: Tensor | None  # () bool, whether it is 0, and their mean nan; None where it can't be


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
    empty = None
    if weight is not None and not target.is_floating_point():
        weights = weight[target]
        divisor = (weights if keep is None else weights * keep).sum()
    elif keep is not None:
        divisor = keep.sum(dtype=dtype)
    else:
        divisor = torch.full((), target.shape[0], dtype=dtype, device=target.device)
    if weight is not None or keep is not None or target.shape[0] == 0:
        empty = divisor == 0
        divisor = divisor.masked_fill(empty, 1)
    return Rows(Targets(target, scale, floor), keep, divisor, empty)
