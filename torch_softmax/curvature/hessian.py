"""The Hessian of a softmax head's loss by its weights, as an operator."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import _checks as checks
from .._transforms import is_transformed
from ..losses._dtypes import accumulation_dtype, outside_autocast
from ..optim._conjugate_gradients import Preconditioner
from ..optim._hessian import (
    Held,
    Layer,
    Moments,
    Softmaxes,
    add_products_,
    layout_of,
    moments_of,
    rows_to_hold,
)
from ._directions import Direction, as_given, directions_of
from ._rows import Batches, Data, layer_of
from ._scipy import largest_eigenvalues, linear_operator
from ._solve import solved
from ._sweeps import Outer, Traces, add_diagonal_, add_outer_, add_traces_
from ._watched import Watched

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Given = TypeVar("Given", Tensor, tuple[Tensor, Tensor])
Sums = TypeVar("Sums", Layer, Outer, Traces)


class Kronecker(NamedTuple):
    """The factors of H ≈ classes ⊗ input, or diag(classes) ⊗ input.

    Args:
        input: A = Σ r x̃ x̃ᵀ / Σ r, (P, P), where x̃ is x with a 1 behind it where there is a bias.
        classes: B, the mean or sum of diag S − S Sᵀ, (C, C); or its diagonal, (C,).
    """

    input: Tensor
    classes: Tensor


class HeadHessian:
    """The Hessian of a linear layer's cross-entropy by its weight and bias, as an operator.

        H = 1/N Σ_n r_n (diag S_n − S_n S_nᵀ) ⊗ x̃_n x̃_nᵀ,  S = softmax(x Wᵀ + b)

    where x̃ is x, with a 1 for the bias. H is the Gauss-Newton and the Fisher matrix too. It is
    never held: each result is one pass over the rows, in memory for `chunk_size` rows of logits.
    `solve` and `eigenvalues` take many passes. For a tensor without a `chunk_size`, they hold S of
    as many rows as fit in a quarter of the memory.

    `H @ u` multiplies a direction u of the parameters: (C, D), or a pair (C, D) and (C) where there
    is a bias. M directions at once, (M, C, D), or a pair (M, C, D) and (M, C), share the logits:
    they take 1 + 2 M matrix products of the layer, where one by one they take 3 M.

    Results are float32, or float64 where the layer or the input is, and have no gradient. No
    tensor that is given may be changed in place while the operator is used. Batches may come in
    any order, but rows, their weights and which of them count must be the same in every pass.

    Args:
        input: x, (..., D); or an iterable of batches that can be repeated, as a DataLoader: each is
            x, or a tuple (x, target) or (x, target, row_weight).
        linear_weight: W, (C, D), of a floating-point dtype.
        target: Class indices (...) or probabilities (..., C), or None. They only tell which rows
            count: `ignore_index` leaves its row out, and probabilities count by their sum.
        linear_bias: b, (C).
        reduction: 'mean', over the rows that count, or 'sum'.
        weight_decay: λ, at least 0, which adds λ/2 ‖W‖² to the loss. The bias has none.
        row_weight: r, (...), what the loss of each row is multiplied with. A mean still divides by
            the number of rows.
        ignore_index: The class index that leaves its row out.
        chunk_size: The rows whose logits are held at a time; None for a number that is fast.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes don't fit, a class index is out of range, or an option is unknown; or
            after a pass, if its batches are not the batches of the first pass.
        NotImplementedError: `linear_weight` is sharded.
        RuntimeError: At a pass, if a tensor that was given has been changed in place.

    Example:
        >>> H = HeadHessian(torch.eye(2), torch.zeros(3, 2))
        >>> H.shape
        (6, 6)
        >>> H @ torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        tensor([[ 0.1111,  0.0000],
                [-0.0556,  0.0000],
                [-0.0556,  0.0000]])
        >>> H.trace()
        tensor(0.6667)

    Source: Böhning, Multinomial logistic regression algorithm (1992), equation 2; Martens, New
    insights and perspectives on the natural gradient method (2020), section 9.2.
    """

    def __init__(
        self,
        input: Tensor | Batches,
        linear_weight: Tensor,
        target: Tensor | None = None,
        *,
        linear_bias: Tensor | None = None,
        reduction: str = "mean",
        weight_decay: float = 0.0,
        row_weight: Tensor | None = None,
        ignore_index: int = -100,
        chunk_size: int | None = None,
    ) -> None:
        checks.one_of("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction
        self.weight_decay = _finite("weight_decay", weight_decay)
        self.layer = layer_of(linear_weight, linear_bias, input)
        dtype = accumulation_dtype(self.layer.W.dtype)
        size = checks.chunk_size(chunk_size)
        self.layout = layout_of(self.layer.W.shape, dtype, self.layer.W.device, size)
        self.data = Data(input, target, row_weight, ignore_index, self.layer)
        # Batches may come in another order each time, and whoever gives a size wants no more held.
        self.may_hold = self.data.are_given and chunk_size is None
        layer = {"linear_weight": linear_weight, "linear_bias": linear_bias}
        self.given = Watched(input=input, target=target, row_weight=row_weight, **layer)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P), for the P numbers of weight and bias."""
        size = sum(t.numel() for t in self.layer if t is not None)
        return size, size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the results."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        """The device of the results."""
        return self.layer.W.device

    def __repr__(self) -> str:
        size, _ = self.shape
        return f"HeadHessian({size} x {size}, {self.dtype}, {self.device})"

    def __matmul__(self, u: Given) -> Given:
        """The product with a direction, or with M of them at once, of the same shape."""
        directions, single = directions_of("a direction", u, self.layer, self.dtype)
        return as_given(self._products(directions), single)  # type: ignore[return-value]

    def diagonal(self) -> Direction:
        """The diagonal, (C, D), or a pair (C, D) and (C): 1/N Σ r S (1 − S) x̃², and λ for W.

        It takes one matrix product more than the logits.

        Example:
            >>> HeadHessian(torch.eye(2), torch.zeros(2, 2), linear_bias=torch.zeros(2)).diagonal()
            (tensor([[0.1250, 0.1250],
                    [0.1250, 0.1250]]), tensor([0.2500, 0.2500]))
        """
        out = self.layer.map(lambda t: self._zeros(*t.shape))
        W, b = self._sum(add_diagonal_, out)
        W.add_(self.weight_decay)
        return W if b is None else (W, b)

    def trace(self) -> Tensor:
        """The sum of the diagonal, a scalar, without any tensor of the size of W."""
        return (self._traces().whole + self.weight_decay * self.layer.W.numel()).to(self.dtype)

    def factors(self, *, diagonal: bool = False) -> Kronecker:
        """The factors of the Kronecker approximation H ≈ classes ⊗ input, as of K-FAC.

        It is exact where all rows have the same x or the same S. Weight decay is left out.

        Args:
            diagonal: Whether to take only the diagonal of the factor of the classes, which is
                (C, C) otherwise.

        Raises:
            ValueError: The row weights add up to 0.

        Example:
            >>> A, B = HeadHessian(torch.eye(2), torch.zeros(2, 2)).factors()
            >>> A
            tensor([[0.5000, 0.0000],
                    [0.0000, 0.5000]])
            >>> B
            tensor([[ 0.2500, -0.2500],
                    [-0.2500,  0.2500]])

        Source: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
        curvature (2015), section 3.
        """
        classes, features = self.layer.W.shape
        size = features + (self.layer.b is not None)
        zeros = Outer(
            self._zeros(size, size),
            self._zeros(classes),
            None if diagonal else self._zeros(classes, classes),
            self._zeros(dtype=torch.float64),
        )
        of_input, of_classes, squares, weight = self._sum(add_outer_, zeros)
        if squares is not None:
            # On the diagonal, S − S² would be a small difference of large numbers.
            squares.neg_().diagonal().copy_(of_classes)
            of_classes = squares
        weight = weight.to(self.dtype)
        is_weighted = self.data.has_negative is not None
        if is_weighted and not bool(weight) and bool(of_input.any() | of_classes.any()):
            raise ValueError("row_weight must not add up to 0, which the factors are divided by")
        return Kronecker(of_input / torch.where(weight == 0, 1, weight), of_classes)

    def solve(self, g: Given, damping: float = 0.0, *, tolerance: float = 1e-4) -> Given:
        """The u with (H + δ) u = g, by conjugate gradients, for one direction g or M at once.

        Without damping, g must lie in the range of H, as gradients of the loss do.

        Args:
            g: A direction, or M of them, as `H @ u` takes them.
            damping: δ, at least 0, which is added to the whole diagonal.
            tolerance: The norm of each residual, as a part of the norm of its g.

        Raises:
            ValueError: g, or what the Hessian is of, is not finite.
            UserError: The tolerance can't be reached: without damping there may be no solution, and
                float32 may be too coarse where float64 is not.

        Example:
            >>> H = HeadHessian(torch.eye(2), torch.zeros(2, 2), weight_decay=0.25)
            >>> H.solve(torch.eye(2)).round(decimals=4)
            tensor([[3., 1.],
                    [1., 3.]])

        Source: Nocedal and Wright, Numerical Optimization (2006), algorithm 5.3.
        """
        damping = _finite("damping", damping)
        tolerance = _finite("tolerance", tolerance, above_zero=True)
        right, single = directions_of("g", g, self.layer, self.dtype)
        held, (classes, features) = self._to_hold(), self.layer.W.shape
        with torch.no_grad(), outside_autocast(self.layer.W):
            curvature = float(self._traces(held).of_classes) / max(1, classes - 1)
            precondition = Preconditioner(
                self._moments(), curvature, self.weight_decay + damping, None
            )

            def multiply(v: Tensor) -> Tensor:
                product = self._products(Layer.split(v, features), held)
                return torch.add(product.join(), v, alpha=damping)

            u = solved(multiply, right.join(), precondition, tolerance)
        return as_given(Layer.split(u, features), single)  # type: ignore[return-value]

    def as_linear_operator(self) -> "LinearOperator":
        """This operator as a `scipy.sparse.linalg.LinearOperator`, of the extra [curvature].

        Its vectors are those of `torch.nn.utils.parameters_to_vector([W, b])`. A matrix of M
        columns is multiplied as M directions at once.

        Raises:
            UserError: SciPy is not installed.
        """
        return linear_operator(self._products, self.layer, self.dtype)

    def eigenvalues(self, k: int = 6) -> Tensor:
        """The k largest eigenvalues, (k), from the largest on, by SciPy's Lanczos.

        Args:
            k: Fewer than the numbers of weight and bias together.

        Raises:
            ValueError: What the Hessian is of is not finite.
            UserError: SciPy is not installed.

        Example:
            >>> HeadHessian(torch.eye(2), torch.zeros(2, 2)).eigenvalues(1)
            tensor([0.2500])

        Source: Lehoucq, Sorensen and Yang, ARPACK users' guide (1998).
        """
        checks.positive("k", k)
        size, _ = self.shape
        if k >= size:
            raise ValueError(f"k must be less than {size}, the order of the Hessian, got {k}")
        held = self._to_hold()
        operator = linear_operator(lambda u: self._products(u, held), self.layer, self.dtype)
        return largest_eigenvalues(operator, checks.integer("k", k))

    # The passes over all rows.

    def _to_hold(self) -> Held | None:
        """Where S is held for more than one pass, or None."""
        if not self.may_hold:
            return None
        rows = sum(len(batch.rows) for batch in self.data.batches)
        rows = min(rows, rows_to_hold(self.layout, self.device))
        return Held(rows, self.layout, self.device)

    def _products(self, directions: Layer, held: Held | None = None) -> Layer:
        """The products with directions of a weight (M, C, D) and bias (M, C)."""
        zeros = directions.map(lambda t: self._zeros(*t.shape))
        out = self._sum(add_products_, zeros, directions, held=held)
        if self.weight_decay:
            out.W.add_(directions.W, alpha=self.weight_decay)
        return out

    def _traces(self, held: Held | None = None) -> Traces:
        zeros = Traces(*self._zeros(2, dtype=torch.float64))
        return self._sum(add_traces_, zeros, held=held)

    def _moments(self) -> Moments:
        """The moments of all rows, in the dtype of the products."""
        zeros = self._zeros(self.layer.W.shape[1], dtype=torch.float64)
        bias = self.layer.b is not None
        mean, second, made_in = moments_of(self.data, self.layout, zeros, bias=bias)
        mean = None if mean is None else mean.to(self.dtype)
        return Moments(mean, second.to(self.dtype), made_in)

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    @torch.no_grad()
    def _sum(
        self, add_: Callable[..., None], out: Sums, *others: Layer, held: Held | None = None
    ) -> Sums:
        """The sums or means over all rows, which are added to zeros."""
        if is_transformed():
            raise NotImplementedError(
                "HeadHessian must be used outside of torch.func and of forward mode: it multiplies "
                "M directions as (M, C, D), and what is to be differentiated is a product by "
                "torch.func of functional.linear_cross_entropy"
            )
        self.given.check()
        with outside_autocast(self.layer.W):
            add_(out, Softmaxes(self.data, self.layer, self.layout, held), *others)
        if self.reduction == "mean":
            for total in out:
                if total is not None:
                    total.div_(self.data.number or 1)
        return out


def _finite(name: str, value: object, *, above_zero: bool = False) -> float:
    """A named number, checked."""
    number = checks.number(name, value)
    checks.finite(name, number, above_zero=above_zero)
    return number
