"""The mathematics of the softmax, its loss and their derivatives, as plain tensor functions.

Throughout, z (N, K) are the logits and S = softmax(z); y is the target distribution of each row
and m = Σ_k y_k its mass; r (N,) is a weight for each row, None for 1. A name that ends in an
underscore says, as in torch, that the function writes into its first argument.
"""

import torch
from torch import Tensor

from ._spread import Spread
from ._targets import Targets

# torch's kernel for the last dimension is fast from this many numbers on.
_FEW = 16


def softmax(z: Tensor, dim: int) -> Tensor:
    """The softmax along a dimension, S_i = e^{z_i} / Σ_j e^{z_j}."""
    # Across rows, few classes take a tenth of the time that they take along each row.
    if z.dim() == 2 and dim in (1, -1) and z.shape[1] < _FEW:
        return torch.softmax(z.t(), 0).t()
    return torch.softmax(z, dim)


def weigh(rows: Tensor, *weights: Tensor | None) -> Tensor:
    """Each row (N, ·) times weights of rows (N,), of which None stands for 1."""
    for weight in weights:
        if weight is not None:
            rows = rows * weight.unsqueeze(1)
    return rows


def centred(softmax: Tensor, u: Tensor, dim: int, spread: Spread | None = None) -> Tensor:
    """What is left of u without its mean under S, u − S · u."""
    mean = (softmax * u).sum(dim, keepdim=True)
    return u - (mean if spread is None else spread.sum_(mean))


def jacobian_product(softmax: Tensor, u: Tensor, dim: int) -> Tensor:
    """The softmax's Jacobian, ∂S_j/∂z_i = S_i (δ_ij − S_j), times u; it is symmetric."""
    # S ∘ u − S (S · u) = S ∘ (u − S · u)
    return softmax * centred(softmax, u, dim)


def losses(z: Tensor, softmax: Tensor, y: Targets) -> Tensor:
    """The loss of each row, L = −Σ_k y_k log S_k = m log Σ_j e^{z_j} − y · z, (N,)."""
    # As log Σ_j e^{z_j} = max z − log max S, no exponential is taken again, and none overflows.
    top, share = z.amax(1, keepdim=True), softmax.amax(1, keepdim=True)
    return -weigh(share.log(), y.mass(z)).squeeze(1) - y.dot(z, top)


def softmax_and_losses(z: Tensor, y: Targets) -> tuple[Tensor, Tensor]:
    """S and L together; and together with the other ranks, where the classes are spread.

    The ranks need two numbers a row of each other: the largest logit first, and then the sums
    Σ_j e^{z_j − max z} and y · (z − max z).
    """
    if y.spread is None:
        s = softmax(z, 1)
        return s, losses(z, s, y)
    top = y.spread.max_(z.amax(1, keepdim=True))
    s = (z - top).exp_()
    total, dot = y.spread.sum_(torch.stack((s.sum(1), y.dot(z, top)))).unsqueeze(2)
    s /= total
    # L = m log Σ_j e^{z_j − max z} − y · (z − max z)
    return s, (weigh(total.log(), y.mass(z)) - dot).squeeze(1)


def gradients_(softmax: Tensor, y: Targets, r: Tensor | None) -> Tensor:
    """The gradient of Σ_n r_n L_n, into S: ∂L/∂z = m S − y, which is S − y where y sums to 1."""
    # r (m S − y)
    for factor in (r, y.mass(softmax)):
        if factor is not None:
            softmax *= factor.unsqueeze(1)
    return y.subtract_from_(softmax, r)


def target_gradients(z: Tensor, y: Targets, r: Tensor | None) -> Tensor:
    """The gradient of Σ_n r_n L_n with respect to the given probabilities: ∂L/∂y = −log S."""
    return weigh(y.push_forward(-torch.log_softmax(z, 1)), r)


def curvature(
    z: Tensor, y: Targets, r: Tensor | None, u: Tensor | None, dp: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Second order: the derivatives of Σ_n r_n D_n, with D_n the slope of row n's loss.

    Along a change u of the logits and dp of the given probabilities (None for no change), with dy
    the change of y that dp makes, D = Σ_k ∂L/∂z_k u_k + Σ_k ∂L/∂y_k dy_k.

    Returns the derivatives of Σ_n r_n D_n with respect to
        z, (N, K): the Hessian times u, and how S and y move with the target;
        the given probabilities, (N, K), None for class indices;
        r, (N,): D itself.
    """
    u = torch.zeros_like(z) if u is None else u.to(z.dtype)
    s, _ = softmax_and_losses(z, y)
    # With c = u − S · u, as y sums to m: D = m (S · u) − y · u = −y · c, and ∂D/∂y = −c.
    c = centred(s, u, 1, y.spread)
    slope = -y.dot(c)
    if y.spread is not None:
        slope = y.spread.sum_(slope)
    # ∂D/∂z = m (S ∘ u − S (S · u)) = m S ∘ c
    along_z = weigh(s * c, y.mass(z))
    if dp is not None:
        # D = … − Σ_k dy_k log S_k, which adds dm S − dy to ∂D/∂z.
        dy = y.push_forward(dp.to(z.dtype))
        slope = slope - (dy * torch.log_softmax(z, 1)).sum(1)
        along_z = along_z + dy.sum(1, keepdim=True) * s - dy
    along_p = weigh(y.push_forward(-c), r) if y.is_dense() else None
    return weigh(along_z, r), along_p, slope
