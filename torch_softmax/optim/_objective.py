"""The objective of softmax regression: the mean loss over all examples, with an L2 penalty.

    f(v) = 1/Σw Σ_n w_n L_n + λ/2 ‖W‖²

v = (W, b) are the parameters of a linear layer, (K, P): with P = D + 1, the last column for b, or
with P = D where there is no bias. The weights w of the examples are 1 but where they are given.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses._chunked import slices
from ..losses._formulas import Factors
from ..losses._sweeps import How, Inputs, numbers_and_gradients
from ..losses._targets import NO_OPTIONS, fold
from ._hessian import Examples, MeanHessian
from ._rows import Rows

IGNORED = -100  # the class index that leaves an example out, torch's default
_OPTIONS = NO_OPTIONS._replace(ignore_index=IGNORED, reduction="sum")

# Numbers of x to work out at a time, so that a CPU finds them in its cache for the second product.
_CACHED_INPUT = 2**20
# Other devices want few large kernels.
_LAUNCHED_INPUT = 2**26
# Features whose mean is this many of their standard deviations from 0 are multiplied about it.
_FAR = 8


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
    """The first and second moments of examples x, that may be weighted.

    Where there is a bias, the second moments are those of x − mean, which are not lost in rounding
    where the mean is large; and otherwise those of x.
    """

    mean: Tensor | None  # (D,), where there is a bias
    second: Tensor  # (D, D)
    made_in: torch.dtype | None = None  # the dtype of the products, where it is another


def alone(sums: Tensor) -> Tensor:
    """The sums over all processes, where there is one."""
    return sums


class Objective:
    """f over all examples, of which every process may hold some.

    Args:
        x: The examples of this process.
        target: Their class indices (N,) or probabilities (N, K).
        weight_decay: λ.
        bias: Whether there is a b.
        weight: w of these examples, (N,); None for 1.
        total: Adds up a tensor over all processes.
    """

    def __init__(
        self,
        x: Tensor | Rows,
        target: Tensor,
        weight_decay: float,
        bias: bool,
        weight: Tensor | None = None,
        total: Callable[[Tensor], Tensor] = alone,
    ) -> None:
        rows = x if isinstance(x, Rows) else Rows(x).to(x.device, x.dtype)
        self.y = fold(target, _OPTIONS, target.shape[-1], rows.dtype, may_ignore=False).y
        on_cpu = rows.device.type == "cpu"
        numbers = _CACHED_INPUT if on_cpu else _LAUNCHED_INPUT
        step = max(256, numbers // rows.features)
        parts = torch.get_num_threads() if on_cpu else 1
        self.examples = Examples(rows, None, 1.0, bias, step, parts, total)
        self.weight, count = self._in_means(weight)
        self.examples = replace(self.examples, mass=self._mass(), divisor=count)
        self.weight_decay = weight_decay
        self.decay = self._decay()

    def _in_means(self, weight: Tensor | None) -> tuple[Tensor | None, float]:
        """Weights in parts of their mean over all processes, and the examples that there are.

        However small or large they are, they are none of that in the dtype of the products.
        """
        x, sums = self.examples.x, self.examples.sums
        w = None if weight is None else weight.to(x.device, sums)
        total = len(x) if w is None else float(w.sum())
        count, total = self._sum(torch.tensor([len(x), total], dtype=sums)).tolist()
        mean = total / count if count else 1.0
        if not 0 < mean < math.inf:
            raise ValueError(f"sample_weight must have a finite mean above 0, got {mean:g}")
        if w is None:  # here, but there may be some in another process
            w = None if mean == 1 else torch.ones(len(x), dtype=sums, device=x.device)
        return None if w is None else (w / mean).to(x.dtype), count

    def _mass(self) -> Tensor | None:
        """What the log-sum of each example is multiplied with, (N,); None for 1."""
        if not self.y.target.is_floating_point():
            return self.weight
        mass = self.y.target.sum(1, dtype=self.examples.x.dtype)
        return mass if self.weight is None else mass * self.weight

    def wide(self) -> "Objective":
        """The same with products in the dtype of sums, for what rounding hides in that of x."""
        other, x, sums = copy.copy(self), self.examples.x, self.examples.sums
        other.weight = None if self.weight is None else self.weight.to(sums)
        other.examples = replace(self.examples, x=x.to(x.device, sums))
        other.examples = replace(other.examples, mass=other._mass())
        return other

    def with_decay(self, weight_decay: float) -> "Objective":
        """The same with another λ."""
        other = copy.copy(self)
        other.weight_decay = weight_decay
        other.decay = other._decay()
        return other

    def about_mean(self, moments: Moments) -> "Objective":
        """The same, multiplied about the mean of the rows where that is far from 0."""
        if moments.mean is None:
            return self
        if not bool((moments.mean.square() > _FAR**2 * moments.second.diagonal()).any()):
            return self
        other, x = copy.copy(self), self.examples.x
        centre = moments.mean.to(x.dtype)
        other.examples = replace(self.examples, x=replace(x, centre=centre))
        return other

    def rounded(self, v: Tensor) -> Tensor:
        """Parameters as they are in the dtype of the products, which is the model's."""
        return v.to(self.examples.x.dtype).to(v.dtype)

    def at(self, v: Tensor) -> Point:
        """Value and gradient."""
        examples = self.examples
        x, (W, b) = examples.x, examples.inward(v)
        wanted = Inputs(False, True, examples.bias, False)
        how = How(examples.step, x.dtype, x.dtype)
        by_W, loss = torch.zeros_like(v[:, : x.features]), v.new_zeros(())
        by_b = None if b is None else v.new_zeros(len(v))
        for rows in slices(len(x), examples.step):
            s, t = (None if f is None else f[rows] for f in (examples.mass, self.weight))
            inputs = Inputs(x.read(rows), W, b, *self.y.rows(rows))
            numbers, by = numbers_and_gradients(inputs, Factors(s, t), wanted, how)
            assert numbers is not None
            loss += (numbers.gap if t is None else t * numbers.gap).sum(dtype=v.dtype)
            loss += (numbers.log_sum if s is None else s * numbers.log_sum).sum(dtype=v.dtype)
            by_W += by.W
            if by_b is not None:
                by_b += by.b
        flat = torch.cat([examples.outward(by_W, by_b).flatten(), loss.view(1)])
        sums = examples.total(flat) / examples.divisor
        return self._point(v, float(sums[-1]), sums[:-1].view_as(v))

    def with_penalty(self, point: Point, decay: Tensor) -> Point:
        """A point of the same objective with another decay, as one of this."""
        return self._point(point.v, point.loss, point.gradient - decay * point.v)

    def _point(self, v: Tensor, loss: float, by_loss: Tensor) -> Point:
        pull = self.decay * v
        return Point(v, loss + 0.5 * float((pull * v).sum()), loss, by_loss + pull)

    def hessian(self, v: Tensor) -> "Hessian":
        """∇²f(v)."""
        return Hessian(MeanHessian(self.examples, v), self.decay)

    def moments(self, curvature: Tensor | None = None) -> Moments:
        """Those of the examples, each by its weight; or by its curvature where S is known."""
        x, sums = self.examples.x, self.examples.sums
        weight = self.weight if curvature is None else curvature
        count = self._sum(len(x) if weight is None else weight.sum(dtype=sums))
        mean = None
        if self.examples.bias:
            total = torch.zeros(x.features, dtype=sums, device=x.device)
            for rows, read in self._read():
                total += read.sum(0) if weight is None else weight[rows] @ read
            mean = self._sum(total) / count
        second = torch.zeros(x.features, x.features, dtype=sums, device=x.device)
        for rows, read in self._read():
            read = read if mean is None else read - mean.to(read.dtype)
            second += read.t() @ (read if weight is None else weight[rows].unsqueeze(1) * read)
        if mean is not None and x.centre is not None:
            mean = mean + x.centre.to(mean.dtype)
        return Moments(mean, self._sum(second) / count, x.dtype)

    def largest(self) -> float:
        """The largest magnitude in the rows of this process."""
        return max(float(read.abs().max()) for _, read in self._read())

    def _read(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in slices(len(self.examples.x), self.examples.step):
            yield rows, self.examples.x.read(rows)

    def _sum(self, value: Tensor | float) -> Tensor:
        """The sum of a value over all processes."""
        tensor = torch.as_tensor(value, dtype=self.examples.sums, device=self.examples.x.device)
        return self.examples.total(tensor)

    def _decay(self) -> Tensor:
        """λ of each parameter of a class, (P,): that of the bias is 0."""
        x, size = self.examples.x, self.examples.x.features + self.examples.bias
        decay = torch.full((size,), self.weight_decay, dtype=self.examples.sums, device=x.device)
        decay[x.features :] = 0
        return decay


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
