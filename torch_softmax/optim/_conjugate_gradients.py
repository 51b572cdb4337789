"""Conjugate gradients for the linear systems of Newton's method, with a preconditioner that learns.

Throughout, u, d, r, ... are directions of the parameters of a linear layer, all of shape (K, P).
"""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._hessian import Moments

_MAX_PRODUCTS = 200  # for one linear system: what is reached by then is a descent as well
_MAX_DIRECTIONS = 50  # that one linear system leaves to the next


def dot(a: Tensor, b: Tensor) -> float:
    """The sum Σ a ∘ b over all their numbers."""
    return float(torch.dot(a.flatten(), b.flatten()))


class Known(NamedTuple):
    """Directions d, each a row of (M, K P), and their products H d, scaled so that dᵀH d = 1."""

    directions: Tensor
    products: Tensor


class Preconditioner:
    """An inverse of H ≈ c I ⊗ X̃ᵀX̃/N + λ, with c the mean curvature, that knows some products.

    X̃ is x with a column of ones for the bias, which has no λ. With the mean μ of x, the matrix C of
    its second moments about μ, and M = c C + λ, the inverse A⁻¹ takes r = (r_W, r_b) to
    W = M⁻¹ (r_W − r_b μᵀ) and b = r_b / c − W μ. M is scaled to a diagonal of ones, so that neither
    the means nor the units of the features make a difference.

    The known directions dᵢ of the Newton step before are conjugate, and
    (I − Σ dᵢ(H dᵢ)ᵀ) A⁻¹ (I − Σ (H dᵢ)dᵢᵀ) + Σ dᵢdᵢᵀ is exact on them.

    Source: Morales and Nocedal, Automatic preconditioning by limited memory quasi-Newton updating
    (2000).
    """

    def __init__(
        self, moments: Moments, curvature: float, weight_decay: float, known: Known | None
    ) -> None:
        self.mean, second, self.made_in = moments
        epsilon = torch.finfo(self.made_in).eps
        self.of_bias = max(curvature, epsilon)
        self.matrix = second * self.of_bias
        self.matrix.diagonal().add_(weight_decay)
        diagonal = self.matrix.diagonal()
        self.scale = torch.where(diagonal > 0, diagonal, 1).rsqrt()
        scaled = self.scale.unsqueeze(1) * self.matrix * self.scale
        if not bool(scaled.isfinite().all()):
            raise ValueError(
                "input, weights and penalty must be numbers whose products are finite in "
                f"{scaled.dtype}, got others"
            )
        # Rounding must not make a matrix indefinite whose columns depend on one another.
        added = 10 * epsilon * len(scaled)
        scaled.diagonal().add_(added)
        self.factor, failed = torch.linalg.cholesky_ex(scaled)
        while bool(failed):
            scaled.diagonal().add_(9 * added)
            added *= 10
            self.factor, failed = torch.linalg.cholesky_ex(scaled)
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
        if self.mean is None:
            return dot(d, d @ self.matrix)
        W, b = d[:, :-1], d[:, -1]
        at_mean = b + W @ self.mean
        return dot(W, W @ self.matrix) + self.of_bias * dot(at_mean, at_mean)

    def solve(self, r: Tensor) -> Tensor:
        """A⁻¹ r, with the same symmetric matrix for each class, a row of r."""
        if self.mean is None:
            return self._solve_weight(r)
        r_W, r_b = r[:, :-1], r[:, -1:]
        W = self._solve_weight(r_W - r_b * self.mean)
        return torch.cat([W, r_b / self.of_bias - (W @ self.mean).unsqueeze(1)], 1)

    def _solve_weight(self, r: Tensor) -> Tensor:
        """M⁻¹ r."""
        return torch.cholesky_solve((r * self.scale).t(), self.factor).t() * self.scale


class Solution(NamedTuple):
    """The solution of a linear system."""

    u: Tensor
    known: Known | None  # what was learnt of H on the way
    products: int  # how many it took


class Accuracy(NamedTuple):
    """How far to solve H u = −∇f, by the residual r = H u + ∇f: until either is reached."""

    relative: float  # √(rᵀA⁻¹r), as a part of √(∇fᵀA⁻¹∇f)
    absolute: float  # ‖r‖₂


def solve(
    hessian: Callable[[Tensor], Tensor],
    gradient: Tensor,
    precondition: Preconditioner,
    accuracy: Accuracy,
    *,
    learn: bool = True,
) -> Solution:
    """Conjugate gradients for H u = −∇f, with H positive semi-definite.

    What is learnt for the next preconditioner takes memory for some directions and their products.
    """
    u, residual = torch.zeros_like(gradient), gradient.clone()
    z = precondition(residual)
    d, size = -z, dot(residual, z)
    enough = accuracy.relative**2 * size
    # Rounding hides a curvature below this part of the expected one, as where S is one-hot for all
    # examples: a solution would be meaningless.
    flat = math.sqrt(torch.finfo(precondition.made_in).eps)
    known: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MAX_DIRECTIONS if learn else 0)
    products = 0
    while products < _MAX_PRODUCTS:
        Hd = hessian(d)
        products += 1
        curvature = dot(d, Hd)
        if not curvature > flat * precondition.curvature(d):
            if products == 1:
                u = d
            break
        known.append((d.flatten() / math.sqrt(curvature), Hd.flatten() / math.sqrt(curvature)))
        u.add_(d, alpha=size / curvature)
        residual.add_(Hd, alpha=size / curvature)
        if float(residual.norm()) <= accuracy.absolute:
            break
        z = precondition(residual)
        previous, size = size, dot(residual, z)
        if not size > enough:
            break
        d = d * (size / previous) - z
    if not known:
        return Solution(u, None, products)
    directions, images = zip(*known, strict=True)
    return Solution(u, Known(torch.stack(directions), torch.stack(images)), products)
