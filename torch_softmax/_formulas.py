"""The mathematics of the softmax, its loss and their derivatives, as plain tensor functions.

Throughout, z (N, K) are the logits and S = softmax(z); y is the target distribution of each row
and m = Σ_k y_k its mass; r (N,) is a weight for each row. A name that ends in an underscore says,
as in torch, that the function writes into its first argument.
"""

import torch
from torch import Tensor

from ._targets import Targets


def centred(softmax: Tensor, u: Tensor, dim: int) -> Tensor:
    """What is left of u without its mean under S, u − S · u."""
    return u - (softmax * u).sum(dim, keepdim=True)


def jacobian_product(softmax: Tensor, u: Tensor, dim: int) -> Tensor:
    """The softmax's Jacobian, ∂S_j/∂z_i = S_i (δ_ij − S_j), times u; it is symmetric."""
    # S ∘ u − S (S · u) = S ∘ (u − S · u)
    return softmax * centred(softmax, u, dim)


def losses(z: Tensor, softmax: Tensor, y: Targets) -> Tensor:
    """The loss of each row, L = −Σ_k y_k log S_k = m log Σ_j e^{z_j} − y · z, (N,)."""
    # As log Σ_j e^{z_j} = max z − log max S, no exponential is taken again, and none overflows.
    top = z.amax(1, keepdim=True)
    return -y.mass(z) * softmax.amax(1).log() - y.dot(z, top)


def gradients_(softmax: Tensor, y: Targets, r: Tensor) -> Tensor:
    """The gradient of Σ_n r_n L_n, into S: ∂L/∂z = m S − y, which is S − y where y sums to 1."""
    # r (m S − y)
    softmax *= (r * y.mass(softmax)).unsqueeze(1)
    return y.subtract_from_(softmax, r)


def target_gradients(z: Tensor, y: Targets, r: Tensor) -> Tensor:
    """The gradient of Σ_n r_n L_n with respect to the given probabilities: ∂L/∂y = −log S."""
    return y.push_forward(-torch.log_softmax(z, 1, dtype=r.dtype)) * r.unsqueeze(1)


def curvature(
    z: Tensor, y: Targets, r: Tensor, u: Tensor | None, dp: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Second order: the derivatives of Σ_n r_n D_n, with D_n the slope of row n's loss.

    Along a change u of the logits and dp of the given probabilities (None for no change), with dy
    the change of y that dp makes, D = Σ_k ∂L/∂z_k u_k + Σ_k ∂L/∂y_k dy_k.

    Returns the derivatives of Σ_n r_n D_n with respect to
        z, (N, K): the Hessian times u, and how S and y move with the target;
        the given probabilities, (N, K), None for class indices;
        r, (N,): D itself.
    """
    z = z.to(r.dtype)
    u = torch.zeros_like(z) if u is None else u.to(r.dtype)
    softmax = torch.softmax(z, 1)
    mass, row = y.mass(z).unsqueeze(1), r.unsqueeze(1)
    # ∂D/∂y = S · u − u, and D = m (S · u) − y · u is y · ∂D/∂y, for y sums to m.
    along_y = -centred(softmax, u, 1)
    slope = y.dot(along_y)
    # ∂D/∂z = m (S ∘ u − S (S · u)) = −m S ∘ ∂D/∂y
    along_z = -(row * mass) * (softmax * along_y)
    if dp is not None:
        # D = … − Σ_k dy_k log S_k, which adds dm S − dy to ∂D/∂z.
        dy = y.push_forward(dp.to(r.dtype))
        slope = slope - (dy * torch.log_softmax(z, 1)).sum(1)
        along_z = along_z + row * (dy.sum(1, keepdim=True) * softmax - dy)
    return along_z, row * y.push_forward(along_y) if y.is_dense() else None, slope
