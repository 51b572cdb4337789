"""A Hessian as an operator of SciPy, of the extra [curvature], and its spectrum by Lanczos."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import UserError
from ..optim._hessian import Layer

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def linear_operator(
    multiply: Callable[[Layer], Layer], layer: Layer, dtype: torch.dtype
) -> "LinearOperator":
    """A symmetric operator, by its products with M directions of a layer, on vectors W and then b.

    This is the order of `torch.nn.utils.parameters_to_vector`.
    """
    if find_spec("scipy") is None:
        raise UserError('as_linear_operator needs scipy: pip install "torch_softmax[curvature]"')
    from scipy.sparse.linalg import LinearOperator

    def columns(matrix: Any) -> Any:
        """The product with a matrix (P, M)."""
        u = torch.from_numpy(matrix.T.copy()).to(W.device, dtype)
        weight, bias = u[:, : W.numel()].unflatten(1, W.shape), u[:, W.numel() :]
        product = multiply(Layer(weight, None if b is None else bias))
        return torch.cat([t.flatten(1) for t in product if t is not None], 1).cpu().numpy().T

    def column(vector: Any) -> Any:
        return columns(vector.reshape(-1, 1))[:, 0]

    W, b = layer
    size = W.numel() + (0 if b is None else b.numel())
    products = {"matvec": column, "rmatvec": column, "matmat": columns, "rmatmat": columns}
    return LinearOperator((size, size), dtype=torch.empty(0, dtype=dtype).numpy().dtype, **products)


def largest_eigenvalues(operator: "LinearOperator", k: int) -> Tensor:
    """The k largest eigenvalues of a symmetric operator, from the largest on."""
    from scipy.sparse.linalg import eigsh

    # A start of its own, so that the same operator has the same eigenvalues to the last bit.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    v0 = start.numpy().astype(operator.dtype)
    product = torch.from_numpy(operator.matvec(v0))
    if not bool(product.isfinite().all()):
        raise ValueError("the Hessian must be of finite rows and parameters, got others")
    if not bool(product.any()):  # a random vector has this product with a matrix of zeros alone
        return product[:k]
    values = eigsh(operator, k, which="LA", v0=v0, return_eigenvectors=False)
    return torch.from_numpy(values).sort(descending=True).values
