"""Conjugate gradients for the linear systems of Newton's method, with a preconditioner that learns.

Throughout, u, d, r, ... are directions of the parameters of a linear layer, all of shape (K, P).
"""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_MAX_PRODUCTS = 200  # for one linear system: what is reached by then is a descent as well
_MAX_DIRECTIONS = 50  # that one linear system leaves to the next
# Along a direction of less than this part of the curvature expected, as where S is one-hot for all
# examples, a system's solution lies far beyond where it means anything. MNIST stays above 0.01.
_FLAT = 1e-3


def dot(a: Tensor, b: Tensor) -> float:
    """The sum Σ a ∘ b over all their numbers."""
    return float(torch.dot(a.flatten(), b.flatten()))


class Known(NamedTuple):
    """Directions d, each a row of (M, K P), and their products H d, scaled so that dᵀH d = 1."""

    directions: Tensor
    products: Tensor


class Preconditioner:
    """An inverse of H ≈ c I ⊗ X̃ᵀX̃/N + λ, with c the mean curvature, that knows some products.

    The products are those of the Newton step before. Their directions dᵢ are conjugate, and
    (I − Σ dᵢ(H dᵢ)ᵀ) A⁻¹ (I − Σ (H dᵢ)dᵢᵀ) + Σ dᵢdᵢᵀ, with A⁻¹ the inverse above, is exact on them.

    Source: Morales and Nocedal, Automatic preconditioning by limited memory quasi-Newton updating
    (2000).
    """

    def __init__(
        self, gram: Tensor, curvature: float, weight_decay: float, known: Known | None
    ) -> None:
        epsilon = torch.finfo(gram.dtype).eps
        self.matrix = gram * max(curvature, epsilon)
        # Rounding must not make a matrix indefinite whose columns depend on one another.
        ridge = weight_decay + 10 * epsilon * float(self.matrix.trace())
        self.matrix.diagonal().add_(ridge)
        self.factor = torch.linalg.cholesky(self.matrix)
        self.known = known

    def __call__(self, r: Tensor) -> Tensor:
        if self.known is None:
            return self.solve(r)
        d, Hd = self.known
        flat = r.flatten()
        along = d @ flat
        z = self.solve((flat - along @ Hd).view_as(r)).flatten()
        return (z + (along - Hd @ z) @ d).view_as(r)

    def curvature(self, d: Tensor) -> float:
        """The curvature dᵀA d to expect along a direction d, (K, P)."""
        return dot(d, d @ self.matrix)

    def solve(self, r: Tensor) -> Tensor:
        """A⁻¹ r, with the same symmetric matrix for each class, a row of r."""
        return torch.cholesky_solve(r.t(), self.factor).t()


class Solution(NamedTuple):
    """Of a linear system: u, what was learnt of H on the way, and the number of products."""

    u: Tensor
    known: Known | None
    products: int


def solve(
    hessian: Callable[[Tensor], Tensor], gradient: Tensor, precondition: Preconditioner, stop: float
) -> Solution:
    """Conjugate gradients for H u = −∇f, until the residual's norm is at most `stop`."""
    u, residual = torch.zeros_like(gradient), gradient.clone()
    z = precondition(residual)
    d, size = -z, dot(residual, z)
    known: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MAX_DIRECTIONS)
    products = 0
    while products < _MAX_PRODUCTS:
        Hd = hessian(d)
        products += 1
        curvature = dot(d, Hd)
        if not curvature > _FLAT * precondition.curvature(d):
            if products == 1:
                u = d
            break
        known.append((d.flatten() / math.sqrt(curvature), Hd.flatten() / math.sqrt(curvature)))
        u.add_(d, alpha=size / curvature)
        residual.add_(Hd, alpha=size / curvature)
        if float(residual.norm()) <= stop:
            break
        z = precondition(residual)
        previous, size = size, dot(residual, z)
        d = d * (size / previous) - z
    if not known:
        return Solution(u, None, products)
    directions, images = zip(*known, strict=True)
    return Solution(u, Known(torch.stack(directions), torch.stack(images)), products)
