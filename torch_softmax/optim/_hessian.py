"""The Hessian of a linear layer's mean loss by its weights, for many products at one point.

The sweeps work S out again for each direction. This holds it where it fits, and so takes two
products of the layer where they take three, for memory of N K numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses import _formulas as formulas
from ..losses._chunked import slices
from ._rows import Rows, memory_of

_HELD = 0.25  # of the memory of a device, for S


def rows_to_hold(classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """The rows whose S may be held, in a share of a device's memory."""
    return int(_HELD * memory_of(device)) // (classes * dtype.itemsize)


class Piece(NamedTuple):
    """Some examples in equal parts, one for each core.

    A product for each core takes a quarter less time than one that all cores share.
    """

    x: Tensor  # (parts, n, D)
    mass: Tensor | None  # what the loss's log-sum is multiplied with, (parts, 1, n); None for 1


@dataclass(frozen=True)
class Examples:
    """All examples, and what the parameters v = (W, b) of a layer do to them.

    v is (K, P): with P = D + 1, the last column for b, or with P = D where there is no bias. It is
    in the dtype of sums, and products are in that of the rows. Rows that lie far from 0 are
    multiplied as x − μ, with W x + b = W (x − μ) + (b + W μ), as rounding would hide the rest.

    Args:
        x: The rows of this process.
        mass: What each log-sum is multiplied with, (N,), None for 1.
        divisor: What sums over all examples are divided by.
        bias: Whether there is a b.
        step: The rows of a part.
        parts: In how many parts to multiply a piece.
        total: Adds up a tensor over all processes that have some of the rows.
    """

    x: Rows
    mass: Tensor | None
    divisor: float
    bias: bool
    step: int
    parts: int
    total: Callable[[Tensor], Tensor]

    def pieces(self) -> Iterator[Piece]:
        """The examples, a few at a time."""
        for rows in slices(len(self.x), self.step * self.parts):
            x = self.x.read(rows)
            mass = None if self.mass is None else self.mass[rows]
            equal = self.parts if len(x) % self.parts == 0 else 1
            yield Piece(
                x.reshape(equal, len(x) // equal, self.x.features),
                None if mass is None else mass.view(equal, 1, len(mass) // equal),
            )

    @property
    def sums(self) -> torch.dtype:
        """The dtype of v and of sums over rows: float64, where the device has that."""
        return self.x.dtype if self.x.device.type == "mps" else torch.float64

    def split(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """(W, b) as views of v."""
        D = self.x.features
        return v[:, :D], v[:, D] if self.bias else None

    def moved(self, v: Tensor, sign: int) -> Tensor:
        """(W, b + W μ) of v = (W, b) for a sign of 1, and back for −1."""
        if not self.bias or self.x.centre is None:
            return v
        W, b = self.split(v)
        assert b is not None
        shift = W @ self.x.centre.to(v.dtype)
        return torch.cat([W, (b + sign * shift).unsqueeze(1)], 1)

    def inward(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """(W, b + W μ) in the dtype of the products."""
        return self.split(self.moved(v, 1).to(self.x.dtype))

    def outward(self, by_W: Tensor, by_b: Tensor | None) -> Tensor:
        """A derivative by v, (K, P), made of those by W and b + W μ."""
        if by_b is None:
            return by_W
        if self.x.centre is not None:
            by_W = by_W + by_b.unsqueeze(1) * self.x.centre.to(by_W.dtype)
        return torch.cat([by_W, by_b.unsqueeze(1)], 1)


class MeanHessian:
    """∇² 1/N Σ_n L_n at the parameters v, which multiplies a direction.

    It holds S of the rows for which a share of the memory suffices, and works out the others' again
    for each product.
    """

    def __init__(self, examples: Examples, v: Tensor) -> None:
        self.examples = examples
        self.W, self.b = examples.inward(v)
        x, classes = examples.x, len(self.W)
        # Made once: small tensors that stay between large ones that go would break up the heap.
        fitting = rows_to_hold(classes, x.dtype, x.device)
        held = self.W.new_empty(min(len(x), fitting) * classes)
        self.held: list[Tensor | None] = []  # (parts, K, n) for each piece
        # m (1 − Σ S²) / (K − 1) of each example: the mean eigenvalue of m J, apart from one of 0
        self.curvature = self.W.new_empty(len(x))
        done = 0
        for piece, mass in examples.pieces():
            parts, rows, _ = piece.shape
            room = held[done * classes : (done + parts * rows) * classes]
            fits = len(room) == parts * rows * classes
            softmax = self._softmax(piece, room.view(parts, classes, rows) if fits else None)
            self.held.append(softmax if fits else None)
            traces = (1 - softmax.square().sum(1, keepdim=True)) / max(1, classes - 1)
            traces = traces if mass is None else traces * mass
            self.curvature[done : done + parts * rows] = traces.flatten()
            done += parts * rows

    def __call__(self, u: Tensor) -> Tensor:
        """1/N Σ_n m_n J_n (u x_n) x_nᵀ, with J the softmax's Jacobian, (K, P)."""
        examples = self.examples
        W, b = examples.inward(u)
        by_W = torch.zeros_like(u[:, : examples.x.features])
        by_b = None if b is None else u.new_zeros(len(u))
        for (x, mass), softmax in zip(examples.pieces(), self.held, strict=True):
            softmax = self._softmax(x) if softmax is None else softmax
            a = formulas.jacobian_product(softmax, _logits(W, b, x), 1)
            a = a if mass is None else a * mass
            by_W += torch.bmm(a, x).sum(0)
            if by_b is not None:
                by_b += a.sum((0, 2))
        return examples.total(examples.outward(by_W, by_b)) / examples.divisor

    def mean_curvature(self) -> float:
        """The mean of the examples' curvatures."""
        total = self.curvature.sum(dtype=self.examples.sums)
        return float(self.examples.total(total)) / self.examples.divisor

    def _softmax(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.softmax(_logits(self.W, self.b, x), 1, out=out)


def _logits(W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
    """W xᵀ + b of each part, (parts, K, n)."""
    z = torch.bmm(W.expand(len(x), -1, -1), x.transpose(1, 2))
    return z if b is None else z.add_(b.unsqueeze(1))
