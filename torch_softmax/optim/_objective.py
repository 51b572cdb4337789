"""The objective of softmax regression: the mean loss over all examples, with an L2 penalty.

    f(v) = 1/Σw Σ_n w_n L_n + λ/2 ‖W‖²

v = (W, b) are the parameters of a linear layer, (K, P): with P = D + 1, the last column for b, or
with P = D where there is no bias. The weights w of the examples are 1 unless they are given. v and
sums over examples are in float64 where the device has that, and products in the dtype of x.

A point holds its logits, as far as there is room, and the Hessian at the point takes S from them.
The logits at a step's end are computed anew, so that no rounding adds up from step to step, and a
shorter step interpolates: no trial of the line search takes a product.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses._chunked import slices
from ..losses._formulas import Numbers, Row, Target
from ._hessian import (
    Batch,
    Chunk,
    Held,
    Layer,
    Logits,
    Moments,
    Softmaxes,
    add_products_,
    add_pulled_,
    alone,
    blocks,
    layout_of,
    moments_of,
    rows_to_hold,
)
from ._rows import Rows

# Features whose mean is this many of their standard deviations from 0 are multiplied about it.
_FAR = 8


class Point(NamedTuple):
    """Parameters v (K, P), and what is known of f there."""

    v: Tensor
    value: float  # f(v)
    loss: float  # the mean loss alone
    gradient: Tensor  # ∇f(v), (K, P)
    logits: Held

    @property
    def norm(self) -> float:
        """‖∇f(v)‖₂."""
        return float(self.gradient.norm())


class Objective:
    """f over all examples, of which every process may hold some.

    Args:
        x: The examples of this process.
        target: Their class indices (N,), int64, or probabilities (N, K).
        classes: K.
        weight_decay: λ.
        bias: Whether there is a b.
        weight: w of these examples, (N,); None for 1.
        total: Adds up a tensor over all processes.
    """

    def __init__(
        self,
        x: Tensor | Rows,
        target: Tensor,
        classes: int,
        weight_decay: float,
        bias: bool,
        weight: Tensor | None = None,
        total: Callable[[Tensor], Tensor] = alone,
    ) -> None:
        self.x = x if isinstance(x, Rows) else Rows(x).to(x.device, x.dtype)
        self.y, self.bias, self.total = target, bias, total
        device = self.x.device
        self.sums = self.x.dtype if device.type == "mps" else torch.float64
        self.layout = layout_of((classes, self.x.features), self.x.dtype, device)
        self.weight, self.divisor = self._in_means(weight)
        self.mass = self._mass()
        # The logits of a point and S, or the logits of two points, are there at once.
        self.rows_to_hold = min(len(self.x), rows_to_hold(self.layout, device) // 2)
        self._set_decay(weight_decay)

    def _in_means(self, weight: Tensor | None) -> tuple[Tensor | None, float]:
        """Weights in parts of their mean over all ranks, which fit any dtype, and all examples."""
        x, sums = self.x, self.sums
        w = None if weight is None else weight.to(x.device, sums)
        here = torch.tensor([len(x), len(x)], dtype=sums, device=x.device)
        if w is not None:
            here[1] = w.sum()
        count, weights = self.total(here).tolist()
        mean = weights / count if count else 1.0
        if not 0 < mean < math.inf:
            raise ValueError(f"sample_weight must have a finite mean above 0, got {mean:g}")
        if w is None:  # here, but there may be some in another process
            w = None if mean == 1 else torch.ones(len(x), dtype=sums, device=x.device)
        return None if w is None else (w / mean).to(x.dtype), count

    def _mass(self) -> Tensor | None:
        """What the log-sum of each example is multiplied with, w Σ_k y_k, (N,); None for 1."""
        if not self.y.is_floating_point():
            return self.weight
        mass = self.y.sum(1, dtype=self.x.dtype)
        return mass if self.weight is None else mass * self.weight

    def wide(self) -> "Objective":
        """This objective with products in the dtype of sums, which round less."""
        other, sums = copy.copy(self), self.sums
        other.x = self.x.to(self.x.device, sums)
        other.layout = replace(self.layout, dtype=sums)
        other.rows_to_hold = self.rows_to_hold * self.x.dtype.itemsize // sums.itemsize
        other.weight = None if self.weight is None else self.weight.to(sums)
        other.mass = other._mass()
        return other

    def with_decay(self, weight_decay: float) -> "Objective":
        """This objective with another λ."""
        other = copy.copy(self)
        other._set_decay(weight_decay)
        return other

    def _set_decay(self, weight_decay: float) -> None:
        self.weight_decay, features = weight_decay, self.x.features
        self.decay = self.zeros(features + self.bias)  # of each parameter of a class
        self.decay[:features] = weight_decay

    def about_mean(self, moments: Moments) -> "Objective":
        """This objective, with rows x − μ where a mean μ is so large that it hides how they differ.

        W x + b = W (x − μ) + (b + W μ).
        """
        mean = moments.mean
        if mean is None or not bool((mean.square() > _FAR**2 * moments.second.diagonal()).any()):
            return self
        other = copy.copy(self)
        other.x = replace(self.x, centre=mean.to(self.x.dtype))
        return other

    # Parameters

    def split(self, v: Tensor) -> Layer:
        """(W, b) as views of v (..., K, P)."""
        return Layer.split(v, self.x.features)

    def layer(self, v: Tensor) -> Layer:
        """(W, b + W μ) in the dtype of the products."""
        W, b = self.split(v)
        if b is not None and self.x.centre is not None:
            b = b + W @ self.x.centre.to(v.dtype)
        return Layer(W, b).map(lambda t: t.to(self.x.dtype))

    def rounded(self, v: Tensor) -> Tensor:
        """Parameters as they are in the dtype of the products, which is the model's."""
        return v.to(self.x.dtype).to(v.dtype)

    def mean(self, sums: Layer) -> Tensor:
        """The mean over all examples, by v (..., K, P), of derivatives by (W, b + W μ)."""
        by_W, by_b = sums
        if by_b is not None and self.x.centre is not None:
            by_W = by_W + by_b.unsqueeze(-1) * self.x.centre.to(by_W.dtype)
        return self.total(Layer(by_W, by_b).join()) / self.divisor

    def zeros(self, *shape: int) -> Tensor:
        """Zeros for sums over examples."""
        return torch.zeros(shape, dtype=self.sums, device=self.x.device)

    # Values and derivatives

    @property
    def batches(self) -> list[Batch]:
        """The examples, each with the factor of its softmax."""
        return [Batch(self.x, self.mass)]

    def hold(self) -> Held:
        """Where the logits of a point, or S, are held."""
        return Held(self.rows_to_hold, self.layout, self.x.device)

    def at(self, v: Tensor) -> Point:
        """Value and gradient."""
        return self.point(v, self.hold())

    def point(self, v: Tensor, known: Held, loss: float | None = None) -> Point:
        """Value and gradient where the logits of the first chunks, or the mean loss, are known."""
        layer, logits, total = self.layer(v), Logits(self.layout), self.zeros(1)
        sums = layer.map(lambda t: self.zeros(*t.shape))
        chunks = self.layout.chunks(self.batches)
        for chunk, z in known.over(chunks, lambda _, chunk: logits.at(chunk.x, *layer)):
            g = torch.empty_like(z)
            for row, factors, gradient in self.rows(chunk, z, g):
                if loss is None:
                    add_losses_(total, row, factors)
                gradient.copy_(row.gradient(factors, in_place=True))
                if sums.b is not None:
                    sums.b.add_(gradient.sum(0))
            add_pulled_(sums.W, g, chunk.x)
        loss = self.mean_loss(total) if loss is None else loss
        return self._penalized(v, loss, self.mean(sums), known)

    def rows(self, chunk: Chunk, z: Tensor, g: Tensor) -> Iterator[tuple[Row, Numbers, Tensor]]:
        """The rows of a chunk's blocks, the factors of their numbers, and their part of g."""
        y, weight = self.y[chunk.part], None if self.weight is None else self.weight[chunk.part]
        for block, (here, gradient) in blocks(z, g):
            mass, w = (1.0 if f is None else f[block] for f in (chunk.factor, weight))
            yield Row(here, Target(y[block])), Numbers(log_sum=mass, gap=w), gradient

    def mean_loss(self, total: Tensor) -> float:
        """The mean over all examples of losses whose total in this process is given."""
        return float(self.total(total)) / self.divisor

    def with_penalty(self, point: Point, before: "Objective") -> Point:
        """A point of an objective with another λ, as one of this."""
        by_loss = point.gradient - before.decay * point.v
        return self._penalized(point.v, point.loss, by_loss, point.logits)

    def penalty(self, v: Tensor) -> float:
        """λ/2 ‖W‖²."""
        return 0.5 * float((self.decay * v * v).sum())

    def _penalized(self, v: Tensor, loss: float, by_loss: Tensor, logits: Held) -> Point:
        return Point(v, loss + self.penalty(v), loss, by_loss + self.decay * v, logits)

    def hessian(self, point: Point) -> "Hessian":
        """∇²f at a point of this objective, or of one with other products."""
        return Hessian(self, point)

    def moments(self, curvature: Tensor | None = None) -> Moments:
        """The moments of the examples, each by its weight; or by its curvature where S is known."""
        batch = Batch(self.x, self.weight if curvature is None else curvature)
        zeros = self.zeros(self.x.features)
        found = moments_of([batch], self.layout, zeros, bias=self.bias, total=self.total)
        if found.mean is None or self.x.centre is None:
            return found
        return found._replace(mean=found.mean + self.x.centre.to(self.sums))

    def largest(self) -> float:
        """The largest magnitude in the rows of this process."""
        parts = slices(len(self.x), self.layout.step)
        return max(float(self.x.read(part).abs().max()) for part in parts)


def add_losses_(total: Tensor, row: Row, factors: Numbers) -> None:
    """Add the losses of some rows."""
    losses = factors.log_sum * row.log_sum + factors.gap * row.gap
    total += losses.sum(dtype=total.dtype)


class Line:
    """f along a step u from a point, v + α u.

    The first value is f(v + u), for which the logits at the end are computed. Logits in between are
    interpolated. Where there is no room for a chunk's logits, every trial computes them.
    """

    def __init__(self, objective: Objective, start: Point, u: Tensor) -> None:
        self.objective, self.start, self.u = objective, start, u
        self.end, self.length = objective.hold(), 1.0  # the logits at v + length u
        self.loss = math.nan  # at the last trial

    def value(self, length: float) -> float:
        """f(v + α u)."""
        objective, v = self.objective, self.start.v + length * self.u
        layer, logits, total = objective.layer(v), Logits(objective.layout), objective.zeros(1)

        def make(number: int, chunk: Chunk) -> Tensor:
            z, end = self.start.logits.get(number), self.end.get(number)
            if z is None or end is None:
                return logits.at(chunk.x, *layer)
            return torch.lerp(z, end, length / self.length)

        held = self.end if length == self.length else Held(0, objective.layout, v.device)
        for chunk, z in held.over(objective.layout.chunks(objective.batches), make):
            for row, factors, _ in objective.rows(chunk, z, z):
                add_losses_(total, row, factors)
        self.loss = objective.mean_loss(total)
        return self.loss + objective.penalty(v)

    def to(self, length: float) -> Point:
        """The point v + α u, whose value was the last to be asked for; it owns the logits."""
        if length != self.length:
            both = zip(self.start.logits.chunks, self.end.chunks, strict=False)
            weight = length / self.length
            self.end.chunks = [torch.lerp(z, end, weight, out=end) for z, end in both]
            self.length = length
        return self.objective.point(self.start.v + length * self.u, self.end, self.loss)


class Hessian:
    """∇²f at a point, which multiplies a direction (K, P)."""

    def __init__(self, objective: Objective, point: Point) -> None:
        self.objective, x, layout = objective, objective.x, objective.layout
        layer, held = objective.layer(point.v), objective.hold()
        self.softmaxes = Softmaxes(objective.batches, layer, layout, held, point.logits)
        # m (1 − Σ S²) / (K − 1) of each example: the mean eigenvalue of m J, apart from one of 0
        self.curvature = torch.empty(len(x), dtype=layout.dtype, device=x.device)
        for chunk, softmaxes in self.softmaxes:
            for block, (S,) in blocks(softmaxes):
                traces = chunk.weighted(1 - S.square().sum(1, keepdim=True), block)
                here = self.curvature[chunk.part][block]
                torch.div(traces.squeeze(1), max(1, layout.classes - 1), out=here)

    def __call__(self, u: Tensor) -> Tensor:
        """∇²f u."""
        direction = self.objective.layer(u.unsqueeze(0))
        out = direction.map(lambda t: torch.zeros_like(t, dtype=u.dtype))
        add_products_(out, self.softmaxes, direction)
        return self.objective.mean(out)[0].addcmul_(self.objective.decay, u)

    def mean_curvature(self) -> float:
        """The mean curvature of the losses in a logit, without the direction that changes none."""
        total = self.curvature.sum(dtype=self.objective.sums)
        return float(self.objective.total(total)) / self.objective.divisor
