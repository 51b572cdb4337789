"""What the Hessian's parts come to, added up over all rows in tensors that are given."""

from typing import NamedTuple

from torch import Tensor

from ..losses import _formulas as formulas
from ..losses._chunked import cut
from ..losses._dtypes import cast
from ..optim._hessian import Layer, Softmaxes, add_pulled_, by_row, put, sum_of_rows


def add_diagonal_(out: Layer, softmaxes: Softmaxes) -> None:
    """Add the diagonal Σ r S (1 − S) x̃²."""
    for chunk, S in softmaxes:
        a = S
        for block in chunk.layout.blocks(S):
            diagonals = chunk.weighted(formulas.jacobian_diagonal(cut(S, block)), block)
            if out.b is not None:
                out.b.add_(sum_of_rows(diagonals))
            a = put(S, block, diagonals)
        # In the wider dtype: a square has twice the digits.
        add_pulled_(out.W, a, cast(chunk.x, S.dtype).square())


class Traces(NamedTuple):
    """The trace of the Hessian and that of Σ r J, each a number in float64."""

    whole: Tensor  # Σ r (1 − S·S) ‖x̃‖²
    of_classes: Tensor  # Σ r (1 − S·S)


def add_traces_(out: Traces, softmaxes: Softmaxes) -> None:
    """Add the traces."""
    for chunk, S in softmaxes:
        squares = cast(chunk.x, S.dtype).square().sum(-1, keepdim=True)
        squares = squares if S.dim() == 2 else squares.transpose(1, 2)
        if softmaxes.layer.b is not None:
            squares += 1
        for block in chunk.layout.blocks(S):
            traces = formulas.jacobian_diagonal(cut(S, block)).sum(1, keepdim=True)
            traces = chunk.weighted(traces, block).double()
            out.of_classes.add_(traces.sum())
            out.whole.add_((traces * cut(squares, block)).sum())


class Outer(NamedTuple):
    """The sums that Kronecker factors are made of."""

    of_input: Tensor  # Σ r x xᵀ, (D, D)
    of_ones: Tensor  # Σ r x, (D,)
    diagonal: Tensor  # Σ r S (1 − S), (K,)
    of_classes: Tensor | None  # Σ r S Sᵀ, (K, K); None for the diagonal alone
    weight: Tensor  # Σ r, (), in float64


def add_outer_(out: Outer, softmaxes: Softmaxes) -> None:
    """Add the sums of Kronecker factors."""
    for chunk, S in softmaxes:
        x, whole = cast(chunk.x, S.dtype).flatten(0, -2), slice(0, len(S))
        r = by_row(chunk.weighted(S.new_ones(()).expand_as(S[:, :1]), whole))
        out.of_input.addmm_((r * x).t(), x)
        out.of_ones.add_((r * x).sum(0))
        out.weight.add_(r.double().sum())
        if out.of_classes is not None:
            out.of_classes.addmm_((r * by_row(S)).t(), by_row(S))
        for block in chunk.layout.blocks(S):
            diagonals = formulas.jacobian_diagonal(cut(S, block))
            out.diagonal.add_(sum_of_rows(chunk.weighted(diagonals, block)))
