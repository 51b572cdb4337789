"""A Hessian as an operator of SciPy, of the extra [curvature], and its spectrum by Lanczos."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import UserError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

_SEED = 0


def linear_operator(
    multiply: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype, device: torch.device
) -> "LinearOperator":
    """A symmetric operator, by its products with vectors (M, P) on a device."""
    if find_spec("scipy") is None:
        raise UserError('as_linear_operator needs scipy: pip install "torch_softmax[curvature]"')
    from scipy.sparse.linalg import LinearOperator

    def columns(matrix: Any) -> Any:
        """The product with a matrix (P, M)."""
        vectors = torch.from_numpy(matrix.T.copy()).to(device, dtype)
        return multiply(vectors).cpu().numpy().T

    def column(vector: Any) -> Any:
        return columns(vector.reshape(-1, 1))[:, 0]

    numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
    return LinearOperator(
        (size, size),
        matvec=column,
        rmatvec=column,
        matmat=columns,
        rmatmat=columns,
        dtype=numpy_dtype,
    )


def largest_eigenvalues(operator: "LinearOperator", k: int) -> Tensor:
    """The k largest eigenvalues of a symmetric operator, from the largest on."""
    from scipy.sparse.linalg import eigsh

    size, _ = operator.shape
    # A start of its own, so that the same operator has the same eigenvalues to the last bit.
    start = torch.randn(size, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    v0 = start.numpy().astype(operator.dtype)
    product = torch.from_numpy(operator.matvec(v0))
    if not bool(product.isfinite().all()):
        raise ValueError("the Hessian must be of finite rows and parameters, got others")
    if not bool(product.any()):  # which a random vector has of a matrix of zeros alone
        return product[:k]
    values = eigsh(operator, k, which="LA", v0=v0, return_eigenvectors=False)
    return torch.from_numpy(values).sort(descending=True).values
