"""The last-layer Laplace approximation: how uncertain the logits of new inputs are."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks as checks
from ..losses._chunked import slices
from ..losses._dtypes import cast, outside_autocast
from .hessian import HeadHessian

STRUCTURES = ("kronecker", "kronecker-diagonal", "diagonal")


@torch.no_grad()
def predictive_variance(
    hessian: HeadHessian,
    input: Tensor,
    prior_precision: float,
    *,
    structure: str = "kronecker",
) -> Tensor:
    """The variance of each logit of new inputs, under the Laplace approximation of a linear layer.

        W, b ~ N(of the head, Σ) with Σ⁻¹ = H + τ I,  and so  var z_k = x̃ᵀ Σ_kk x̃

    H is the Hessian of the sum of all losses, or its diagonal, or its Kronecker approximation.

    The probit approximation of the mean prediction is then softmax(z / √(1 + π/8 var z)).

    Args:
        hessian: The Hessian of the training rows, of either reduction, without weight decay.
        input: New x, (..., D).
        prior_precision: τ, above 0, of each number of W and b. For a mean loss with a weight decay
            λ over N rows it is N λ.
        structure: 'kronecker', with the eigenvectors of a matrix (C, C); 'kronecker-diagonal', with
            the diagonal of that matrix, for many classes; or 'diagonal'.

    Returns:
        The variances, (..., C), in the dtype of the Hessian.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes don't fit, a number is out of range, or the Hessian has a weight decay,
            negative row weights or numbers that are not finite.

    Example:
        >>> hessian = HeadHessian(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))
        >>> predictive_variance(hessian, torch.tensor([[0.0], [1.0]]), 1.0)
        tensor([[0.0000, 0.0000],
                [0.6429, 0.6429]])

    Source: Daxberger et al., Laplace redux: effortless Bayesian deep learning (2021), section 3;
    Kristiadi, Hein and Hennig, Being Bayesian, even just a bit, fixes overconfidence in ReLU
    networks (2020).
    """
    if not isinstance(hessian, HeadHessian):
        raise TypeError(f"hessian must be a HeadHessian, got {type(hessian).__name__}")
    if hessian.weight_decay:
        raise ValueError(
            "hessian must have no weight_decay, for prior_precision stands for it, "
            f"got {hessian.weight_decay}"
        )
    checks.one_of("structure", structure, STRUCTURES)
    precision = checks.number("prior_precision", prior_precision)
    checks.finite("prior_precision", precision, above_zero=True)
    rows = hessian.data.batch(input).rows
    summed = copy.copy(hessian)
    summed.reduction = "sum"
    make = _diagonal if structure == "diagonal" else _kronecker
    with outside_autocast(input):
        variance_of = make(summed, precision, structure)
        if hessian.data.has_negative:  # such a matrix may not be positive
            raise ValueError("hessian must have row weights of at least 0, got one below")
        variances = [
            variance_of(cast(rows.read(part), hessian.dtype))
            for part in slices(len(rows), hessian.layout.step)
        ]
    return torch.cat(variances).reshape(*input.shape[:-1], len(hessian.layer.W))


def _diagonal(hessian: HeadHessian, precision: float, _: str) -> Callable[[Tensor], Tensor]:
    """The variance by the diagonal h of H, var z_k = Σ_d x̃_d² / (h_kd + τ)."""
    diagonal = hessian.diagonal()
    W, *b = diagonal if isinstance(diagonal, tuple) else (diagonal,)
    by_W, by_b = 1 / (W + precision), sum(1 / (part + precision) for part in b)
    return lambda x: x.square() @ by_W.t() + by_b


def _kronecker(
    hessian: HeadHessian, precision: float, structure: str
) -> Callable[[Tensor], Tensor]:
    """The variance by Kronecker factors, var z_k = Σ_ij V_ki² (x̃ U)_j² / (b_i a_j + τ).

    Their eigenvalues and eigenvectors are A = U diag(a) Uᵀ and B = V diag(b) Vᵀ.
    """
    A, B = hessian.factors(diagonal=structure == "kronecker-diagonal")
    if not all(bool(factor.isfinite().all()) for factor in (A, B)):
        raise ValueError("hessian must be of finite rows and parameters, got others")
    a, U = torch.linalg.eigh(A.double())
    b, V = (B.double(), None) if B.dim() == 1 else torch.linalg.eigh(B.double())
    # Rounding makes some eigenvalues negative that are 0.
    scale = 1 / (torch.outer(a.clamp(min=0), b.clamp(min=0)) + precision)
    features = hessian.layer.W.shape[1]
    U, scale = U.to(hessian.dtype), scale.to(hessian.dtype)
    of_classes = None if V is None else V.square().t().to(hessian.dtype)

    def variance_of(x: Tensor) -> Tensor:
        along = x @ U[:features]
        if hessian.layer.b is not None:
            along += U[features]
        variance: Tensor = along.square() @ scale
        return variance if of_classes is None else variance @ of_classes

    return variance_of
