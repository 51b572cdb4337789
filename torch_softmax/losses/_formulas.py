"""The mathematics of the softmax, its loss and their derivatives, as plain tensor functions.

    n, k      a row of N, a class of K
    z         the logits of a row
    top       its largest logit, a constant to all derivatives: it cancels
    S         softmax(z)
    p         the target as it was given: a class index, which is one-hot, or probabilities
    y         the target distribution: y = hot p + floor of an index, y = scale ∘ p + floor else
    m         its mass Σ_k y_k, which is 1 unless there are class weights
    u         a change of z

A row is known by a few numbers, each relative to its largest logit, as m log Σ_k e^{z_k} − y · z
would lose every digit at logits of 8000:

    log_sum   log Σ_k e^{z_k − top}          ∂/∂z = S
    gap       Σ_k y_k (top − z_k)            ∂/∂z = −y
    mean_gap  Σ_k S_k (top − z_k)            ∂/∂z = S ∘ (top − z − mean_gap − 1)
    square    lse², lse = log_sum + top      ∂/∂z = 2 lse S
    top       max_k z_k
    is_top    whether the label is the likeliest class

All that is public is arithmetic on these: the loss is m log_sum + gap + ζ square, the
log-probability −(log_sum + gap), the entropy log_sum + mean_gap.

With a factor for each number, T = Σ_n s log_sum + t gap + h mean_gap + r square has

    ∂T/∂z = S ∘ q − t y  with  q = s + 2 r lse + h (top − z − mean_gap − 1),

which is S − y where s = t = 1 and h = r = 0. Along u, with δe = S·((top − z − mean_gap − 1) ∘ u),

    ∂²T u = S ∘ ((u − S·u) ∘ q + 2 r S·u − h (u + δe)),

and the numbers change by S·u, −y·u, δe and 2 lse S·u. By the target, ∂T/∂y = t (top − z).

A name that ends in an underscore says, as in torch, that a function writes into its first argument.
"""

from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# torch's kernel for the last dimension is fast from this many numbers on.
_FEW = 16
# e to minus this is 0 in every dtype: a logit of −∞ has no share of anything, while 0 · ∞ is nan.
_FAR_BELOW = 1e4


class Across(Protocol):
    """How numbers are combined where the classes of a row are sharded over ranks."""

    def largest(self, value: Tensor) -> Tensor:
        """The elementwise maximum over all ranks."""

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The sum over all ranks, of each of some tensors of one shape."""


Factor = Tensor | float  # of a number: one for each row (n,), or one for all rows


class Numbers(NamedTuple):
    """One thing for each number of a row, such as its factor in T; 0 for a number that is not."""

    log_sum: Any = 0.0
    gap: Any = 0.0
    mean_gap: Any = 0.0
    square: Any = 0.0
    top: Any = 0.0
    is_top: Any = 0.0


def is_zero(factor: Factor) -> bool:
    """Whether a factor is 0 for all rows, so that nothing of it needs to be computed."""
    return not isinstance(factor, Tensor) and factor == 0


def product(factor: Tensor, value: Tensor) -> Tensor:
    """The product of a factor and a value, where 0 · ∞ is 0: what counts 0 times adds nothing."""
    return torch.where((factor == 0) & value.isinf(), 0, factor * value)


def per_row(factor: Factor, like: Tensor) -> Factor:
    """A factor (n,) with the dimensions of a tensor (n, ..., K), to be multiplied with it."""
    if not isinstance(factor, Tensor):
        return factor
    return factor.view(factor.shape[0], *(1 for _ in like.shape[1:]))


class Target(NamedTuple):
    """The target distribution y of each row; of the classes of this rank, where they are sharded.

    With class weights w and label smoothing ε, hot = (1 − ε) w at the label (0 where another rank
    has it), scale = (1 − ε) w, and floor = ε w / K.
    """

    target: Tensor  # p: (N,) class indices in [0, K), or (N, K) probabilities
    hot: Tensor | None = None  # (N,), None for 1
    scale: Tensor | None = None  # (K,), None for 1
    floor: Tensor | None = None  # (K,), None for 0

    def is_dense(self) -> bool:
        """Whether p is given in full."""
        return self.target.is_floating_point()

    def scaled(self, dp: Tensor) -> Tensor:
        """What a change of probabilities does to y, dy = scale ∘ dp; it is its own transpose."""
        return dp if self.scale is None else dp * self.scale

    def below(self, top: Tensor | float, z: Tensor) -> Tensor:
        """The gap Σ_k y_k (top − z_k), (n, ...), of logits (n, ..., K); for a change u, −y · u."""
        between = (1 for _ in z.shape[2:])
        if self.is_dense():
            y = self.scaled(self.target.to(z.dtype))
            total = product(y.view(y.shape[0], *between, y.shape[1]), top - z).sum(-1)
        else:
            label = self.target.view(self.target.shape[0], *between, 1).expand(*z.shape[:-1], 1)
            total = (top - z.gather(-1, label)).squeeze(-1)
            if self.hot is not None:
                total = product(per_row(self.hot, total), total)  # type: ignore[arg-type]
        if self.floor is None:
            return total
        return total + ((top - z).masked_fill(self.floor == 0, 0) * self.floor).sum(-1)

    def subtract_from_(self, gradient: Tensor, t: Factor) -> Tensor:
        """Subtract t y from a gradient (n, K), in place."""
        if is_zero(t):
            return gradient
        if self.is_dense():
            gradient -= self.scaled(self.target.to(gradient.dtype)) * per_row(t, gradient)
        elif not isinstance(t, Tensor) and self.hot is None:
            subtract_one_hot_(gradient, self.target, 1, t)
        else:
            label = self.target.unsqueeze(1)
            minus = gradient.new_full((1, 1), -1).expand_as(label) * per_row(t, gradient)
            if self.hot is not None:
                minus = minus * self.hot.unsqueeze(1)
            gradient.scatter_add_(1, label, minus)
        if self.floor is not None:
            gradient -= self.floor * per_row(t, gradient)
        return gradient


def subtract_one_hot_(gradient: Tensor, label: Tensor, dim: int, by: float = 1) -> Tensor:
    """Subtract a number at the label of each row (N,), in place; `dim` has the classes."""
    return gradient.scatter_(dim, label.unsqueeze(dim), -by, reduce="add")


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


def jacobian_diagonal(softmax: Tensor) -> Tensor:
    """The diagonal of the softmax's Jacobian, S_i (1 − S_i)."""
    return (1 - softmax).mul_(softmax)


def row_numbers(z: Tensor, y: Target) -> Numbers:
    """The numbers of each row (N,): the definition, which autograd differentiates to any order.

    What else stands here is the same by hand.
    """
    top = z.amax(1, keepdim=True).detach()
    log_sum = (z - top).exp().sum(1).log()
    below = (top - z).clamp(max=_FAR_BELOW)
    mean_gap = (torch.softmax(z, 1) * below).sum(1)
    lse = log_sum + top.squeeze(1)
    gap = y.below(top, z)
    return Numbers(log_sum, gap, mean_gap, lse.square(), top.squeeze(1), is_top(z, y, gap))


def is_top(z: Tensor, y: Target, gap: Tensor) -> Tensor:
    """1 for each row whose label is the first of its largest logits, else 0, (N,)."""
    if y.is_dense():
        return torch.zeros_like(gap)
    return ((z.argmax(1) == y.target) & ~gap.isnan()).to(z.dtype)


class Row:
    """The numbers of some rows of logits (n, K), each computed when it is first asked for."""

    def __init__(self, z: Tensor, y: Target, across: Across | None = None) -> None:
        self.z, self.y, self.across = z, y, across

    @cached_property
    def largest(self) -> Tensor:
        """The largest logit, (n, 1)."""
        top = self.z.amax(1, keepdim=True)
        return top if self.across is None else self.across.largest(top)

    @cached_property
    def _summed(self) -> tuple[Tensor, Tensor, Tensor]:
        """S, log_sum and gap over all ranks, which exchange both sums in one message."""
        assert self.across is not None
        exponentials = (self.z - self.largest).exp_()
        gap = self.y.below(self.largest, self.z)
        total, gap = self.across.total(exponentials.sum(1), gap)
        # Forward mode takes no result that is a view of the message.
        return exponentials.div_(total.unsqueeze(1)), total.log(), gap.clone()

    @cached_property
    def softmax(self) -> Tensor:
        """S, (n, K)."""
        return softmax(self.z, 1) if self.across is None else self._summed[0]

    @cached_property
    def log_sum(self) -> Tensor:
        """Log Σ_k e^{z_k − top}, (n,)."""
        # S at the top is 1 / Σ_k e^{z_k − top}: no exponential is taken again.
        return -self.softmax.amax(1).log() if self.across is None else self._summed[1]

    @cached_property
    def gap(self) -> Tensor:
        """Σ_k y_k (top − z_k), (n,)."""
        return self.y.below(self.largest, self.z) if self.across is None else self._summed[2]

    @cached_property
    def below(self) -> Tensor:
        """Top − z, (n, K), which is finite."""
        return (self.largest - self.z).clamp_(max=_FAR_BELOW)

    @cached_property
    def mean_gap(self) -> Tensor:
        """Σ_k S_k (top − z_k), (n,)."""
        return (self.softmax * self.below).sum(1)

    @cached_property
    def top(self) -> Tensor:
        """The largest logit, (n,)."""
        return self.largest.squeeze(1)

    @cached_property
    def lse(self) -> Tensor:
        """Log Σ_k e^{z_k}, (n,)."""
        return self.log_sum + self.top

    @cached_property
    def square(self) -> Tensor:
        """The square of lse, (n,)."""
        return self.lse.square()

    @cached_property
    def is_top(self) -> Tensor:
        """1 where the label is the likeliest class, (n,)."""
        return is_top(self.z, self.y, self.gap)

    def slopes(self, factors: Numbers) -> Factor:
        """The part of q that a row has for all its classes, s + 2 r lse − h (mean_gap + 1)."""
        q: Factor = factors.log_sum
        if not is_zero(factors.square):
            q = q + 2 * factors.square * self.lse
        if not is_zero(factors.mean_gap):
            q = q - factors.mean_gap * (self.mean_gap + 1)
        return q

    def gradient(self, factors: Numbers, *, in_place: bool = False) -> Tensor:
        """∂T/∂z = S ∘ q − t y, (n, K); where s = t = 1 and h = r = 0 this is S − y.

        It may be written into S itself, which is gone then.
        """
        q = per_row(self.slopes(factors), self.z)
        if not is_zero(factors.mean_gap):
            q = q + per_row(factors.mean_gap, self.z) * self.below
        if not in_place:
            gradient = self.softmax * q
        elif isinstance(q, Tensor) or q != 1:
            gradient = self.softmax.mul_(q)
        else:
            gradient = self.softmax
        return self.y.subtract_from_(gradient, factors.gap)

    def target_gradient(self, t: Factor) -> Tensor:
        """∂T/∂p = t scale ∘ (top − z), (n, K), for probabilities p."""
        by_y = self.largest - self.z
        by_p = by_y if self.y.scale is None else product(self.y.scale, by_y)
        return by_p if not isinstance(t, Tensor) and t == 1 else product(_column(t, by_p), by_p)


def _column(factor: Factor, like: Tensor) -> Tensor:
    return torch.as_tensor(per_row(factor, like), dtype=like.dtype, device=like.device)


class Along(NamedTuple):
    """A direction to differentiate ∂T along, or how the gradients of T change along it."""

    z: Tensor  # (n, M, K)
    p: Tensor | None = None  # (n, K), where M = 1; None for no change, as of class indices
    numbers: Numbers = Numbers()  # of the factors, (n,), where M = 1; or of the numbers, (n, M)


def second_order(row: Row, factors: Numbers, along: Along, asked: tuple[str, ...]) -> Along:
    """How the gradient of T, and those of its numbers that are asked for, change."""
    u, dp, moved = along
    y = row.y
    dy = None if dp is None else y.scaled(dp.to(u.dtype))
    S = row.softmax.unsqueeze(1)
    below: Factor = 0.0
    has_mean_gap = not (is_zero(factors.mean_gap) and is_zero(moved.mean_gap))
    if has_mean_gap or "mean_gap" in asked:
        below = (row.below - (row.mean_gap + 1).unsqueeze(1)).unsqueeze(1)
    mean = (S * u).sum(2)
    slope = torch.zeros_like(mean)
    if "gap" in asked or row.across is not None:
        slope = y.below(0.0, u)
        if dy is not None:
            slope = slope + product(dy, row.largest - row.z).sum(1, keepdim=True)
    if row.across is not None:
        mean, slope = row.across.total(mean, slope)
    of_mean_gap = (S * below * u).sum(2) if isinstance(below, Tensor) else 0.0
    by_z = _change_of_gradient(row, factors, along, (mean, of_mean_gap), below)
    if dy is not None:
        by_z -= (dy * per_row(factors.gap, dy)).unsqueeze(1)
    if not is_zero(moved.gap):
        y.subtract_from_(by_z.squeeze(1), moved.gap)
    by_p = None
    if y.is_dense() and u.shape[1] == 1:
        # t scale ∘ (top − z) changes by scale ∘ (dt (top − z) − t u)
        by_p = y.scaled(-u.squeeze(1)) * per_row(factors.gap, row.z)
        if not is_zero(moved.gap):
            by_p = by_p + row.target_gradient(moved.gap)
    square = 2 * row.lse.unsqueeze(1) * mean if "square" in asked else 0.0
    nothing = torch.zeros_like(mean)
    return Along(by_z, by_p, Numbers(mean, slope, of_mean_gap, square, nothing, nothing))


def _change_of_gradient(
    row: Row,
    factors: Numbers,
    along: Along,
    slopes: tuple[Tensor, Factor],
    below: Factor,
) -> Tensor:
    """The change of S ∘ q, S ∘ ((u − S·u) ∘ q + δq)."""
    u, _, moved = along
    mean, of_mean_gap = slopes
    h = per_row(factors.mean_gap, u)
    q = per_row(row.slopes(factors._replace(mean_gap=0.0)), u)
    if not is_zero(factors.mean_gap):
        q = q + h * below
    by_z = (u - mean.unsqueeze(2)).mul_(q)
    if not is_zero(moved.log_sum):
        by_z += per_row(moved.log_sum, u)
    if not is_zero(factors.square):
        by_z += 2 * per_row(factors.square, u) * mean.unsqueeze(2)
    if not is_zero(moved.square):
        by_z += 2 * per_row(moved.square * row.lse, u)
    if not is_zero(factors.mean_gap):
        assert isinstance(of_mean_gap, Tensor)
        by_z -= h * (u + of_mean_gap.unsqueeze(2))
    if not is_zero(moved.mean_gap):
        by_z += per_row(moved.mean_gap, u) * below
    return by_z.mul_(row.softmax.unsqueeze(1))
