"""The mathematics of the softmax, its loss and their derivatives, as plain tensor functions.

    n, k     a row of N, a class of K
    z        the logits of a row
    top      its largest logit, a constant to all derivatives: it cancels
    S        softmax(z)
    p        the target as it was given: a class index, which is one-hot, or probabilities
    y        the target distribution, y = hot p + floor of an index, y = scale ∘ p + floor else
    m        its mass Σ_k y_k, which is 1 but for class weights
    log_sum  log Σ_k e^{z_k − top}
    gap      Σ_k y_k (top − z_k), by how much the target's logits lie below the largest
    s, t     the factors of log_sum and gap in T
    u        a change of z; dp, ds and dt those of p, s and t

A row is known by log_sum and gap, as its loss is L = −Σ_k y_k log S_k = m log_sum + gap. Both are
relative to the top: m log Σ_k e^{z_k} − y · z would lose every digit at logits of 8000.

With the factors, T = Σ_n s_n log_sum_n + t_n gap_n. All derivatives follow from ∂log_sum/∂z = S
and ∂gap/∂z = −y:

    ∂T/∂z = s S − t y, which is S − y where s = t = 1
    ∂T/∂s = log_sum,  ∂T/∂t = gap,  ∂T/∂y = t (top − z)
    ∂²T u = s S ∘ (u − S · u), the softmax's own Jacobian

A name that ends in an underscore says, as in torch, that a function writes into its first argument.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# torch's kernel for the last dimension is fast from this many numbers on.
_FEW = 16


class Across(Protocol):
    """How numbers are combined where the classes of a row are spread over several places."""

    def largest(self, value: Tensor) -> Tensor:
        """The largest of all places."""

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The sum over all places, of each of some tensors of one shape."""


class Numbers(NamedTuple):
    """One number for each of log_sum and gap: themselves (N,), their factors s and t, or slopes."""

    log_sum: Tensor
    gap: Tensor


class Factors(NamedTuple):
    """The factors s and t of log_sum and gap, (N,); None stands for 1."""

    s: Tensor | None = None
    t: Tensor | None = None


def product(factor: Tensor, value: Tensor) -> Tensor:
    """The product of a factor and a value, where 0 · ∞ is 0: what counts 0 times adds nothing."""
    return torch.where((factor == 0) & value.isinf(), 0, factor * value)


def times(value: Tensor, factor: Tensor | None) -> Tensor:
    """Each row of a value (N, ·) times its factor (N,), where None stands for 1."""
    return value if factor is None else value * factor.unsqueeze(1)


class Target(NamedTuple):
    """The target distribution y of each row. Where the classes are spread, of those in this place.

    With class weights w and label smoothing ε, hot = (1 − ε) w at the label (0 where it lies in
    another place), scale = (1 − ε) w, and floor = ε w / K.
    """

    target: Tensor  # p: (N,) class indices in [0, K), or (N, K) probabilities
    hot: Tensor | None = None  # (N,), None for 1
    scale: Tensor | None = None  # (K,), None for 1
    floor: Tensor | None = None  # (K,), None for 0

    def is_dense(self) -> bool:
        """Whether p is given in full."""
        return self.target.is_floating_point()

    def rows(self, rows: slice) -> "Target":
        """The target of some rows."""
        hot = None if self.hot is None else self.hot[rows]
        return Target(self.target[rows], hot, self.scale, self.floor)

    def push_forward(self, dp: Tensor) -> Tensor:
        """What a change of probabilities does to y, dy = scale ∘ dp; and its own transpose."""
        return dp if self.scale is None else dp * self.scale

    def below(self, top: Tensor | float, z: Tensor) -> Tensor:
        """The gap Σ_k y_k (top − z_k), (N,), for a top (N, 1); and of a change u from 0, −y · u."""
        if self.is_dense():
            y = self.push_forward(self.target.to(z.dtype))
            total = product(y, top - z).sum(1)
        else:
            total = (top - z.gather(1, self.target.unsqueeze(1))).squeeze(1)
            if self.hot is not None:
                total = product(self.hot, total)
        if self.floor is None:
            return total
        return total + ((top - z).masked_fill(self.floor == 0, 0) * self.floor).sum(1)

    def subtract_from_(self, gradient: Tensor, t: Tensor | None) -> Tensor:
        """Take t y off a gradient (N, K), in place."""
        if self.is_dense():
            gradient -= times(self.push_forward(self.target.to(gradient.dtype)), t)
        elif t is None and self.hot is None:
            subtract_one_hot_(gradient, self.target, 1)
        else:
            label = self.target.unsqueeze(1)
            minus = gradient.new_full((1, 1), -1).expand_as(label)
            for factor in (t, self.hot):
                minus = times(minus, factor)
            gradient.scatter_add_(1, label, minus)
        if self.floor is not None:
            gradient -= times(self.floor.expand_as(gradient), t)
        return gradient


def subtract_one_hot_(gradient: Tensor, label: Tensor, dim: int) -> Tensor:
    """Take 1 off a gradient at the label of each row (N,), in place; `dim` is that of classes."""
    return gradient.scatter_(dim, label.unsqueeze(dim), -1, reduce="add")


def softmax(z: Tensor, dim: int) -> Tensor:
    """The softmax along a dimension, S_i = e^{z_i} / Σ_j e^{z_j}."""
    # Across rows, few classes take a tenth of the time that they take along each row.
    if z.dim() == 2 and dim in (1, -1) and z.shape[1] < _FEW:
        return torch.softmax(z.t(), 0).t()
    return torch.softmax(z, dim)


def jacobian_product(softmax: Tensor, u: Tensor, dim: int) -> Tensor:
    """The softmax's Jacobian, ∂S_j/∂z_i = S_i (δ_ij − S_j), times u; it is symmetric."""
    # S ∘ u − S (S · u) = S ∘ (u − S · u)
    return softmax * (u - (softmax * u).sum(dim, keepdim=True))


def top_of(z: Tensor) -> Tensor:
    """The top of each row, (N, 1), a constant."""
    return z.amax(1, keepdim=True).detach()


def row_numbers(z: Tensor, y: Target, top: Tensor | None = None) -> Numbers:
    """The numbers of each row, log Σ_k e^{z_k − top} and Σ_k y_k (top − z_k).

    This is the definition: autograd differentiates it to any order, and what else stands here, and
    in the sweeps, is the same by hand.
    """
    top = top_of(z) if top is None else top
    return Numbers((z - top).exp().sum(1).log(), y.below(top, z))


class Row(NamedTuple):
    """What the first pass over the logits of some rows finds out."""

    softmax: Tensor  # (N, K)
    top: Tensor  # (N, 1)
    numbers: Numbers


def softmax_and_numbers(z: Tensor, y: Target, across: Across | None) -> Row:
    """S with the row's numbers, of which several places need two sums and a maximum of another."""
    top = z.amax(1, keepdim=True)
    if across is None:
        S = softmax(z, 1)
        # S at the top is 1 / Σ_k e^{z_k − top}: no exponential is taken again.
        return Row(S, top, Numbers(-S.amax(1).log(), y.below(top, z)))
    top = across.largest(top)
    exponentials = (z - top).exp_()
    total, gap = across.total(exponentials.sum(1), y.below(top, z))
    return Row(exponentials.div_(total.unsqueeze(1)), top, Numbers(total.log(), gap))


def softmax_alone(z: Tensor, y: Target, across: Across | None) -> tuple[Tensor, Tensor | None]:
    """S, and the top (N, 1) where a derivative by probabilities may want it."""
    if across is not None:
        S, top, _ = softmax_and_numbers(z, y, across)
        return S, top
    return softmax(z, 1), z.amax(1, keepdim=True) if y.is_dense() else None


def gradient_(softmax: Tensor, y: Target, factors: Factors) -> Tensor:
    """∂T/∂z = s S − t y, into S; where s = t = 1 that is S − y."""
    if factors.s is not None:
        softmax *= factors.s.unsqueeze(1)
    return y.subtract_from_(softmax, factors.t)


def target_gradient(z: Tensor, top: Tensor, y: Target, t: Tensor | None) -> Tensor:
    """∂T/∂p = t scale ∘ (top − z), (N, K), for probabilities p."""
    by_y = top - z
    by_p = by_y if y.scale is None else product(y.scale, by_y)
    return by_p if t is None else product(t.unsqueeze(1), by_p)


class Change(NamedTuple):
    """A direction to differentiate T along; None for no change."""

    u: Tensor  # (N, K)
    dp: Tensor | None = None  # (N, K)
    ds: Tensor | None = None  # (N,)
    dt: Tensor | None = None  # (N,)


class HessianProduct(NamedTuple):
    """The derivatives, along a direction, of the gradient of T."""

    by_z: Tensor  # (N, K)
    by_p: Tensor | None  # (N, K), None for class indices
    by_factors: Numbers  # (N,), which are the slopes of log_sum and gap


class Point(NamedTuple):
    """Where second derivatives are taken."""

    z: Tensor  # (N, K)
    softmax: Tensor  # (N, K)
    top: Tensor | None  # (N, 1), for probabilities
    y: Target
    factors: Factors


def hessian_product(point: Point, change: Change, across: Across | None) -> HessianProduct:
    """Second order: how the gradient of T changes along a direction, in closed form."""
    z, S, top, y, factors = point
    u, dp = change.u, change.dp
    # log_sum changes by S · u, and gap by −y · u + dy · (top − z)
    mean, slope = (S * u).sum(1), y.below(0.0, u)
    dy = None if dp is None else y.push_forward(dp.to(z.dtype))
    if dy is not None and top is not None:
        slope = slope + product(dy, top - z).sum(1)
    if across is not None:
        mean, slope = across.total(mean, slope)
    # s S − t y changes by s S ∘ (u − S · u) + ds S − t dy − dt y
    by_z = times(u - mean.unsqueeze(1), factors.s)
    if change.ds is not None:
        by_z += change.ds.unsqueeze(1)
    by_z = S * by_z
    if dy is not None:
        by_z -= times(dy, factors.t)
    if change.dt is not None:
        by_z = y.subtract_from_(by_z, change.dt)
    by_p = None
    if y.is_dense():
        # t scale ∘ (top − z) changes by scale ∘ (dt (top − z) − t u)
        by_p = times(y.push_forward(-u), factors.t)
        if change.dt is not None and top is not None:
            by_p += target_gradient(z, top, y, change.dt)
    return HessianProduct(by_z, by_p, Numbers(mean, slope))
