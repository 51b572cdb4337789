"""The objective of softmax regression: the mean loss over all examples, with an L2 penalty.

    f(v) = 1/N Σ_n L_n + λ/2 ‖W‖²

v = (W, b) are the parameters of a linear layer, (K, P): with P = D + 1, the last column for b, or
with P = D where there is no bias.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._chunked import slices
from ._formulas import Factors
from ._hessian import Examples, MeanHessian, cut
from ._sweeps import How, Inputs, numbers_and_gradients
from ._targets import NO_OPTIONS, fold

IGNORED = -100  # the class index that leaves an example out, torch's default
_OPTIONS = NO_OPTIONS._replace(ignore_index=IGNORED, reduction="sum")

# Numbers of x to work out at a time, so that a CPU finds them in its cache for the second product.
_CACHED_INPUT = 2**20


class Point(NamedTuple):
    """Parameters v (K, P), with what is known of f there."""

    v: Tensor
    value: float  # f(v)
    loss: float  # the mean loss alone
    gradient: Tensor  # ∇f(v), (K, P)

    @property
    def norm(self) -> float:
        """‖∇f(v)‖₂."""
        return float(self.gradient.norm())


class Moments(NamedTuple):
    """The first and second moments of examples x.

    Where there is a bias, the second moments are those of x − mean, which are not lost in rounding
    where the mean is large; and otherwise those of x.
    """

    mean: Tensor | None  # (D,), where there is a bias
    second: Tensor  # (D, D)


class Objective:
    """f over all examples."""

    def __init__(self, x: Tensor, target: Tensor, weight_decay: float, bias: bool) -> None:
        count, features = x.shape
        self.x = x
        self.terms = fold(target, _OPTIONS, target.shape[-1], x.dtype, may_ignore=False)
        self.decay = x.new_full((features + bias,), weight_decay)
        self.decay[features:] = 0
        # Other devices than a CPU want few large kernels.
        on_cpu = x.device.type == "cpu"
        self.chunk_size = max(256, _CACHED_INPUT // features) if on_cpu else count
        parts = torch.get_num_threads() if on_cpu else 1
        pieces = list(cut(x, self.terms.mass, self.chunk_size, parts))
        self.examples = Examples(pieces, count, features, bias)

    def at(self, v: Tensor) -> Point:
        """Value and gradient."""
        y, mass, *_ = self.terms
        inputs = Inputs(self.x, *self.examples.split(v), *y)
        wanted = Inputs(False, True, self.examples.bias, False)
        how = How(self.chunk_size, v.dtype, v.dtype)
        numbers, by = numbers_and_gradients(inputs, Factors(mass), wanted, how)
        assert numbers is not None
        losses = numbers.gap + (numbers.log_sum if mass is None else mass * numbers.log_sum)
        gradient = self.decay * v
        loss = float(losses.double().mean())
        penalty = 0.5 * float((gradient.double() * v.double()).sum())
        for part, of_losses in zip(self.examples.split(gradient), (by.W, by.b), strict=True):
            if part is not None:
                part.add_(of_losses, alpha=1 / len(self.x))
        return Point(v, loss + penalty, loss, gradient)

    def hessian(self, v: Tensor) -> "Hessian":
        """∇²f(v)."""
        return Hessian(MeanHessian(self.examples, v), self.decay)

    def moments(self) -> Moments:
        """Those of the examples."""
        mean, count = None, len(self.x)
        if self.examples.bias:
            total = self.x.new_zeros(self.x.shape[1], dtype=torch.float64)
            for rows in slices(count, self.chunk_size):
                total += self.x[rows].sum(0)
            mean = (total / count).to(self.x.dtype)
        second = self.x.new_zeros(self.x.shape[1], self.x.shape[1])
        for rows in slices(count, self.chunk_size):
            x = self.x[rows] if mean is None else self.x[rows] - mean
            second.addmm_(x.t(), x, alpha=1 / count)
        return Moments(mean, second)


@dataclass(frozen=True)
class Hessian:
    """∇²f(v), that of the mean loss and of the penalty."""

    of_losses: MeanHessian
    decay: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        """Its product with a direction, (K, P)."""
        return self.of_losses(u).addcmul_(self.decay, u)

    def mean_curvature(self) -> float:
        """The mean curvature of the losses in a logit, without the direction that changes none."""
        return self.of_losses.mean_curvature()
