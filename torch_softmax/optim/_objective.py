"""The objective of softmax regression: the mean loss over all examples, with an L2 penalty.

    f(v) = 1/Σw Σ_n w_n L_n + λ/2 ‖W‖²

v = (W, b) are the parameters of a linear layer, (K, P): with P = D + 1, the last column for b, or
with P = D where there is no bias. The weights w of the examples are 1 unless they are given. v and
sums over examples are in float64 where the device has that, and products in the dtype of x.

A point holds its logits, as far as there is room, and the Hessian at the point makes S of them. A
step's end has logits of its own, so that no rounding adds up from step to step, and a shorter step
has logits in between: no trial of the line search takes a product.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses import _formulas as formulas
from ..losses._chunked import cut, slices
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
    by_row,
    layout_of,
    moments_of,
    put,
    rows_to_hold,
    sum_of_rows,
)
from ._rows import Rows

IGNORED = -100  # the class index that leaves an example out, torch's default
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


class Targets(NamedTuple):
    """What the losses of some rows are made of, each in the layout of their logits."""

    y: Tensor  # class indices or probabilities
    weight: Tensor | None  # w; None for 1
    mass: Tensor | None  # w Σ_k y_k; None for 1

    def block(self, block: slice) -> "Targets":
        """The targets of a block of a chunk."""
        factors = (None if t is None else cut(t, block) for t in self[1:])
        return Targets(cut(self.y, block), *factors)

    def dot(self, z: Tensor) -> Tensor:
        """W Σ_k y_k z_k of each row."""
        if self.y.is_floating_point():
            total = (self.y * z).sum(1, keepdim=True)
        else:
            total = z.gather(1, self.y)
        return total if self.weight is None else self.weight * total

    def gradient(self, softmax: Tensor) -> Tensor:
        """The gradient of the losses by the logits, w (Σ_k y_k S − y)."""
        g = softmax if self.mass is None else softmax * self.mass
        if self.y.is_floating_point():
            return g - (self.y if self.weight is None else self.weight * self.y)
        ones = g.new_ones(()).expand(self.y.shape)
        return g.scatter_add(1, self.y, -(ones if self.weight is None else self.weight))


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
        # The logits of a point and S, or those of two points, are there at once.
        self.rows_to_hold = min(len(self.x), rows_to_hold(self.layout, device) // 2)
        self._set_decay(weight_decay)

    def _in_means(self, weight: Tensor | None) -> tuple[Tensor | None, float]:
        """Weights in parts of their mean over all processes, and the number of all examples.

        However small or large they are, they fit in the dtype of the products so.
        """
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
        """What the log-sum of each example is multiplied with, (N,); None for 1."""
        if not self.y.is_floating_point():
            return self.weight
        mass = self.y.sum(1, dtype=self.x.dtype)
        return mass if self.weight is None else mass * self.weight

    def wide(self) -> "Objective":
        """The same objective with products in the dtype of sums, which round less."""
        other, sums = copy.copy(self), self.sums
        other.x = self.x.to(self.x.device, sums)
        other.layout = replace(self.layout, dtype=sums)
        other.rows_to_hold = self.rows_to_hold * self.x.dtype.itemsize // sums.itemsize
        other.weight = None if self.weight is None else self.weight.to(sums)
        other.mass = other._mass()
        return other

    def with_decay(self, weight_decay: float) -> "Objective":
        """The same objective with another λ."""
        other = copy.copy(self)
        other._set_decay(weight_decay)
        return other

    def _set_decay(self, weight_decay: float) -> None:
        self.weight_decay, features = weight_decay, self.x.features
        self.decay = self.zeros(features + self.bias)  # of each parameter of a class
        self.decay[:features] = weight_decay

    def about_mean(self, moments: Moments) -> "Objective":
        """The same objective, multiplied about the mean of the rows where that is far from 0.

        Rows are multiplied as x − μ then, with W x + b = W (x − μ) + (b + W μ), as rounding would
        hide how they differ.
        """
        if moments.mean is None:
            return self
        if not bool((moments.mean.square() > _FAR**2 * moments.second.diagonal()).any()):
            return self
        other = copy.copy(self)
        other.x = replace(self.x, centre=moments.mean.to(self.x.dtype))
        return other

    # Parameters

    def split(self, v: Tensor) -> Layer:
        """(W, b) as views of v (..., K, P)."""
        D = self.x.features
        return Layer(v[..., :D], v[..., D] if self.bias else None)

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
        """The mean over all examples, by v (K, P), of derivatives by (W, b + W μ)."""
        by_W, by_b = sums
        if by_b is not None:
            if self.x.centre is not None:
                by_W = by_W + by_b.unsqueeze(-1) * self.x.centre.to(by_W.dtype)
            by_W = torch.cat([by_W, by_b.unsqueeze(-1)], -1)
        return self.total(by_W) / self.divisor

    def zeros(self, *shape: int) -> Tensor:
        """Zeros for sums over examples."""
        return torch.zeros(shape, dtype=self.sums, device=self.x.device)

    # Values and derivatives

    def at(self, v: Tensor) -> Point:
        """Value and gradient."""
        return self.point(v, self.hold())

    def hold(self) -> Held:
        """Where the logits of a point, or S, are held."""
        return Held(self.rows_to_hold, self.layout, self.x.device)

    def point(self, v: Tensor, known: Held, loss: float | None = None) -> Point:
        """Value and gradient where the logits of the first chunks, or the mean loss, are known."""
        layer, logits, total = self.layer(v), Logits(self.layout), self.zeros(1)
        sums = layer.map(lambda t: self.zeros(*t.shape))
        for number, (chunk, targets) in enumerate(self.chunks()):
            z = known.get(number)
            if z is None:
                z = known.add(number, logits.at(chunk.x, *layer))
            g = torch.empty_like(z)
            for block in self.layout.blocks(z):
                here, part = cut(z, block), targets.block(block)
                if loss is None:
                    total -= part.dot(here.log_softmax(1)).sum(dtype=self.sums)
                gradient = part.gradient(formulas.softmax(here, 1))
                if sums.b is not None:
                    sums.b.add_(sum_of_rows(gradient))
                g = put(g, block, gradient)
            add_pulled_(sums.W, g, chunk.x)
        if loss is None:
            loss = float(self.total(total)) / self.divisor
        return self._penalized(v, loss, self.mean(sums), known)

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

    def chunks(self) -> Iterator[tuple[Chunk, Targets]]:
        """The examples a chunk at a time, with their targets."""
        parts = slices(len(self.x), self.layout.step)
        chunks = self.layout.chunks([Batch(self.x, self.mass)])
        for chunk, part in zip(chunks, parts, strict=True):
            y = self.y[part]
            y = self.layout.spread(y.to(self.x.dtype) if y.is_floating_point() else y)
            weight = None if self.weight is None else self.layout.spread(self.weight[part])
            yield chunk, Targets(y, weight, chunk.factor)


class Line:
    """f along a step u from a point, v + α u.

    The logits at the end, v + u, are made once, and trials lie between these and the logits of the
    point. Where there is no room for a chunk's logits, they are made for every trial.
    """

    def __init__(self, objective: Objective, start: Point, u: Tensor) -> None:
        self.objective, self.start, self.u = objective, start, u
        self.end, self.loss = objective.hold(), math.nan
        logits, layer = Logits(objective.layout), objective.layer(start.v + u)
        for number, chunk in enumerate(objective.layout.chunks([Batch(objective.x, None)])):
            if not self.end.has_room(chunk.part.stop - chunk.part.start):
                break
            self.end.add(number, logits.at(chunk.x, *layer))

    def value(self, length: float) -> float:
        """f(v + α u)."""
        objective, v = self.objective, self.start.v + length * self.u
        logits, total = Logits(objective.layout), objective.zeros(1)
        for number, (chunk, targets) in enumerate(objective.chunks()):
            z, end = self.start.logits.get(number), self.end.get(number)
            if z is None or end is None:
                z = logits.at(chunk.x, *objective.layer(v))
            else:
                z = end if length == 1 else torch.lerp(z, end, length)
            for block in objective.layout.blocks(z):
                losses = targets.block(block).dot(cut(z, block).log_softmax(1))
                total -= losses.sum(dtype=total.dtype)
        self.loss = float(objective.total(total)) / objective.divisor
        return self.loss + objective.penalty(v)

    def to(self, length: float) -> Point:
        """The point v + α u, whose value was the last to be asked for. It takes the end's room."""
        if length != 1:
            both = zip(self.start.logits.chunks, self.end.chunks, strict=False)
            self.end.chunks = [torch.lerp(z, end, length, out=end) for z, end in both]
        return self.objective.point(self.start.v + length * self.u, self.end, self.loss)


class Hessian:
    """∇²f at a point, which multiplies a direction (K, P)."""

    def __init__(self, objective: Objective, point: Point) -> None:
        self.objective, layout = objective, objective.layout
        self.softmaxes = Softmaxes(
            [Batch(objective.x, objective.mass)],
            objective.layer(point.v),
            layout,
            objective.hold(),
            point.logits,
        )
        # m (1 − Σ S²) / (K − 1) of each example: the mean eigenvalue of m J, apart from one of 0
        self.curvature = torch.empty(
            len(objective.x), dtype=layout.dtype, device=objective.x.device
        )
        for chunk, S in self.softmaxes:
            traces = 1 - S.square().sum(1, keepdim=True)
            traces = chunk.weighted(traces, slice(0, len(S))) / max(1, layout.classes - 1)
            self.curvature[chunk.part] = by_row(traces).squeeze(1)

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
