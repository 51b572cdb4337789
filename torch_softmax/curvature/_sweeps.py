"""Sums over all rows that make up parts of the Hessian, added to tensors that are given."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from ..losses._dtypes import cast
from ..losses._formulas import jacobian_diagonal
from ..optim._hessian import Layer, Softmaxes, add_pulled_, blocks


def add_diagonal_(out: Layer, softmaxes: Softmaxes) -> None:
    """Add the diagonal Σ r S (1 − S) x̃²."""
    for chunk, S in softmaxes:
        a = S.new_empty(S.shape)
        for block, (softmax, diagonals) in blocks(S, a):
            diagonals.copy_(chunk.weighted(jacobian_diagonal(softmax), block))
            if out.b is not None:
                out.b.add_(diagonals.sum(0))
        # In the wider dtype: a square has twice the digits.
        add_pulled_(out.W, a, cast(chunk.x, S.dtype).square())


class Traces(NamedTuple):
    """The trace of the Hessian and the trace of Σ r J, each a number in float64."""

    whole: Tensor  # Σ r (1 − S·S) ‖x̃‖²
    of_classes: Tensor  # Σ r (1 − S·S)


def add_traces_(out: Traces, softmaxes: Softmaxes) -> None:
    """Add the traces."""
    for chunk, S in softmaxes:
        squares = cast(chunk.x, S.dtype).square().sum(-1, keepdim=True).flatten(0, -2)
        if softmaxes.layer.b is not None:
            squares += 1
        for block, (softmax,) in blocks(S):
            traces = jacobian_diagonal(softmax).sum(1, keepdim=True)
            traces = chunk.weighted(traces, block).double()
            out.of_classes.add_(traces.sum())
            out.whole.add_((traces * squares[block]).sum())


class Outer(NamedTuple):
    """The sums that Kronecker factors are made of."""

    of_input: Tensor  # Σ r x̃ x̃ᵀ, (P, P)
    diagonal: Tensor  # Σ r S (1 − S), (K,)
    of_classes: Tensor | None  # Σ r S Sᵀ, (K, K); None for the diagonal alone
    weight: Tensor  # Σ r, (), in float64


def add_outer_(out: Outer, softmaxes: Softmaxes) -> None:
    """Add the sums of Kronecker factors."""
    for chunk, S in softmaxes:
        x = cast(chunk.x, S.dtype).flatten(0, -2)
        x = x if softmaxes.layer.b is None else pad(x, (0, 1), value=1)
        whole = slice(0, len(x))
        out.of_input.addmm_(chunk.weighted(x, whole).t(), x)
        out.weight.add_(chunk.weighted(x.new_ones(len(x), 1), whole).double().sum())
        for block, (softmax,) in blocks(S):
            out.diagonal.add_(chunk.weighted(jacobian_diagonal(softmax), block).sum(0))
            if out.of_classes is not None:
                out.of_classes.addmm_(chunk.weighted(softmax, block).t(), softmax)
