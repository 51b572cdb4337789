"""The Hessian of a linear layer's mean loss by its weights, for many products at one point.

The sweeps work S out again for each direction. This holds it, and so takes two products of the
layer where they take three, for memory of N K numbers.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _formulas as formulas
from ._chunked import slices


class Piece(NamedTuple):
    """Some examples in equal parts, one for each core.

    A product for each core takes a quarter less time than one that all cores share.
    """

    x: Tensor  # (parts, n, D)
    mass: Tensor | None  # of their targets, (parts, 1, n), None for 1


def cut(x: Tensor, mass: Tensor | None, rows: int, parts: int) -> Iterator[Piece]:
    """Cut examples x (N, D) into pieces of a number of parts, each of at most some rows."""
    for piece in slices(len(x), rows * parts):
        x_piece, m_piece = x[piece], None if mass is None else mass[piece]
        equal = parts if len(x_piece) % parts == 0 else 1
        yield Piece(
            x_piece.view(equal, -1, x.shape[1]),
            None if m_piece is None else m_piece.view(equal, 1, -1),
        )


class Examples(NamedTuple):
    """All examples in pieces, and what the parameters v = (W, b) of a layer do to them.

    v is (K, P): with P = D + 1, the last column for b, or with P = D where there is no bias.
    """

    pieces: list[Piece]
    number: int
    features: int
    bias: bool

    def split(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """(W, b) as views of v."""
        return v[:, : self.features], v[:, self.features] if self.bias else None

    def logits(self, v: Tensor, x: Tensor) -> Tensor:
        """W xᵀ + b of each part, (parts, K, n)."""
        W, b = self.split(v)
        z = torch.bmm(W.expand(len(x), -1, -1), x.transpose(1, 2))
        return z if b is None else z.add_(b.unsqueeze(1))

    def add_mean_(self, total: Tensor, a: Tensor, x: Tensor) -> None:
        """Add 1/N Σ a xᵀ to a total (K, P), over all parts of a (parts, K, n) and of x."""
        W, b = self.split(total)
        W.add_(torch.bmm(a, x).sum(0), alpha=1 / self.number)
        if b is not None:
            b.add_(a.sum((0, 2)), alpha=1 / self.number)


class MeanHessian:
    """∇² 1/N Σ_n L_n at the parameters v, which multiplies a direction; it holds S of all rows."""

    def __init__(self, examples: Examples, v: Tensor) -> None:
        self.examples = examples
        # (parts, K, n) for each piece
        self.softmaxes = [torch.softmax(examples.logits(v, x), 1) for x, _ in examples.pieces]

    def __call__(self, u: Tensor) -> Tensor:
        """1/N Σ_n m_n J_n (u x_n) x_nᵀ, with J the softmax's Jacobian, (K, P)."""
        examples, product = self.examples, torch.zeros_like(u)
        for (x, mass), softmax in zip(examples.pieces, self.softmaxes, strict=True):
            a = formulas.jacobian_product(softmax, examples.logits(u, x), 1)
            examples.add_mean_(product, a if mass is None else a * mass, x)
        return product

    def mean_curvature(self) -> float:
        """The mean eigenvalue of 1/N Σ_n m_n J_n, apart from its eigenvalue 0, by J's trace."""
        total = 0.0
        for (_, mass), softmax in zip(self.examples.pieces, self.softmaxes, strict=True):
            traces = 1 - softmax.square().sum(1, keepdim=True)
            total += float((traces if mass is None else traces * mass).sum())
        return total / self.examples.number / max(1, softmax.shape[1] - 1)
