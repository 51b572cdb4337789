"""Linear systems with a Hessian, of many right-hand sides at once, by Newton's conjugate gradients.

M systems H u_m = g_m are one system, with M blocks H on the diagonal. It has the eigenvalues of H,
so that it takes as many steps as one system, each with a product of M directions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import UserError
from ..optim._conjugate_gradients import Accuracy, Preconditioner, solve

_MAX_ROUNDS = 10  # of some hundred steps each, as long as the residual falls


def solved(
    multiply: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Preconditioner,
    tolerance: float,
) -> Tensor:
    """The u (M, C, P) whose product is the right-hand side, each within a part of its norm.

    Raises:
        ValueError: The right-hand side is not finite.
        UserError: Rounding, or a matrix without an inverse, keeps it from that.
    """
    if not bool(right.isfinite().all()):
        raise ValueError("g must hold finite numbers, got others")
    largest = right.abs().amax((1, 2), keepdim=True)
    # The squares of a norm would leave the range of float32 where the numbers do not.
    g = right / torch.where(largest > 0, largest, 1)
    norms = g.norm(dim=(1, 2), keepdim=True)
    g = g / torch.where(norms > 0, norms, 1)
    u, residual, products, worst = torch.zeros_like(g), g, 0, 1.0

    def stacked(v: Tensor) -> Tensor:
        return multiply(v.view_as(g)).flatten(0, 1)

    # Conjugate gradients know their residual only as they carry it along; here it is looked at.
    for _ in range(_MAX_ROUNDS):
        accuracy = Accuracy(relative=0.0, absolute=tolerance / 2)
        step = solve(stacked, -residual.flatten(0, 1), precondition, accuracy, learn=False)
        u = u + step.u.view_as(g)
        residual = g - multiply(u)
        products += step.products
        before, worst = worst, float(residual.flatten(1).norm(dim=1).amax())
        if worst <= tolerance:
            return u.mul_(norms).mul_(largest)
        if not worst < before:
            break
    raise UserError(
        f"damping must be larger, or tolerance: after {products} products a residual is still "
        f"{worst:.1e} of its right-hand side"
    )
