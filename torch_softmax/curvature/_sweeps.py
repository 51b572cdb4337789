"""What the Hessian's parts come to, a chunk of rows at a time, added up in tensors that are given.

With a row's x, S = softmax(W x + b), J = diag S − S Sᵀ, and r what its loss is multiplied with, the
Hessian of Σ r L by W and b is Σ r J ⊗ x̃ x̃ᵀ, where x̃ is x, with a 1 for the bias behind it. J is
positive semi-definite and knows nothing of the label: this is the Gauss-Newton and the Fisher
matrix too.

Source: Böhning, Multinomial logistic regression algorithm (1992), equation 2.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ..losses import _formulas as formulas
from ..losses._chunked import cut, slices
from ..losses._dtypes import accumulation_dtype, cast
from ..losses._many import Directions, add_hessians_
from ..losses._products import add_pulled_to_classes_, multiplied_in
from ..losses._sweeps import How, Inputs, Logits, put
from ..losses.linear import default_chunk_size
from ..optim._hessian import rows_to_hold
from ._rows import Layer, Rows

# Numbers of x that a CPU finds in its cache for the next product with them.
_CACHED_INPUT = 2**20


class Chunk(NamedTuple):
    """Some rows with their softmax, which is in a buffer that the next chunk writes over."""

    x: Tensor  # (n, D), 0 where a row is left out
    softmax: Tensor  # (n, K)
    factor: Tensor | None  # (n,)
    blocks: list[slice]  # of these rows, that a CPU finds in its cache

    def weighted(self, values: Tensor, block: slice | None = None) -> Tensor:
        """What rows of this chunk have, (n, ·), times their factors."""
        if self.factor is None:
            return values
        return formulas.times(values, self.factor if block is None else self.factor[block])


def how_of(layer: Layer, chunk_size: int | None) -> How:
    """How logits are worked out: in float32 at least, whatever the layer's dtype."""
    classes, features = layer.W.shape
    step = chunk_size or default_chunk_size(classes, features, layer.W.device)
    if chunk_size is None and layer.W.device.type == "cpu":
        step = min(step, max(512, _CACHED_INPUT // max(1, features)))
    dtype = accumulation_dtype(layer.W.dtype)
    return How(step, dtype, dtype)


class Held:
    """S of the first rows, each chunk's once it was made, for more passes over the same rows."""

    def __init__(self, layer: Layer, how: How) -> None:
        self.rows = rows_to_hold(len(layer.W), how.dtype, layer.W.device)
        self.softmaxes: dict[int, Tensor] = {}  # by the first row of a chunk


def chunks(layer: Layer, rows: Rows, how: How, held: Held | None = None) -> Iterator[Chunk]:
    """The rows a chunk at a time. What is held must not be written over."""
    inputs = Inputs(rows.x, *layer, keep=rows.keep)
    logits = Logits(inputs, how)
    for part in slices(len(rows.x), how.step):
        here = inputs.rows(part)
        S = None if held is None else held.softmaxes.get(part.start)
        if S is None:
            S = logits.softmax_of(here.x, *layer)
            if held is not None and part.stop <= held.rows:
                S = held.softmaxes[part.start] = S.clone()
        factor = None if rows.factor is None else rows.factor[part]
        yield Chunk(here.x, S, factor, list(logits.blocks(S)))


def add_products_(
    out: Layer, layer: Layer, rows: Rows, how: How, u: Layer, held: Held | None = None
) -> None:
    """Add the products Σ r J (u x̃) x̃ᵀ with M directions u: W (M, K, D) and b (M, K).

    The logits of a chunk are made once, so that it takes 1 + 2 M products of the layer; and 2 M
    where S is held.
    """
    W = cast(u.W, multiplied_in(rows.x.dtype, rows.x.device))
    directions = Directions(rows.x, W, None if u.b is None else cast(u.b, how.logits_dtype), how)
    for chunk in chunks(layer, rows, how, held):
        add_hessians_(Inputs(None, *out), chunk.x, chunk.softmax, chunk.factor, directions)


def add_diagonal_(out: Layer, layer: Layer, rows: Rows, how: How) -> None:
    """Add the diagonal Σ r S (1 − S) x̃²."""
    for chunk in chunks(layer, rows, how):
        a = chunk.softmax
        for block in chunk.blocks:
            diagonals = formulas.jacobian_diagonal(cut(chunk.softmax, block))
            diagonals = chunk.weighted(diagonals, block)
            if out.b is not None:
                out.b.add_(diagonals.sum(0))
            a = put(chunk.softmax, block, diagonals)
        # In the wider dtype: a square has twice the digits.
        add_pulled_to_classes_(out.W, a, cast(chunk.x, a.dtype).square())


class Traces(NamedTuple):
    """Of the Hessian, and of the J alone, each a number in float64."""

    whole: Tensor  # Σ r (1 − S·S) ‖x̃‖²
    of_classes: Tensor  # Σ r (1 − S·S)


def add_traces_(out: Traces, layer: Layer, rows: Rows, how: How, held: Held | None = None) -> None:
    """Add the traces."""
    for chunk in chunks(layer, rows, how, held):
        squares = cast(chunk.x, how.dtype).square().sum(1, keepdim=True)
        if layer.b is not None:
            squares += 1
        for block in chunk.blocks:
            traces = formulas.jacobian_diagonal(cut(chunk.softmax, block)).sum(1, keepdim=True)
            traces = chunk.weighted(traces, block)
            out.of_classes.add_(traces.double().sum())
            out.whole.add_((traces * squares[block]).double().sum())


class Outer(NamedTuple):
    """The sums that Kronecker factors are made of."""

    of_input: Tensor  # Σ r x xᵀ, (D, D)
    of_ones: Tensor  # Σ r x, (D,)
    diagonal: Tensor  # Σ r S (1 − S), (K,)
    of_classes: Tensor | None  # Σ r S Sᵀ, (K, K); None for the diagonal alone
    weight: Tensor  # Σ r, (), in float64


def add_outer_(out: Outer, layer: Layer, rows: Rows, how: How) -> None:
    """Add the sums of Kronecker factors."""
    for chunk in chunks(layer, rows, how):
        x, S = cast(chunk.x, how.dtype), chunk.softmax
        weighted = chunk.weighted(x)
        out.of_input.addmm_(weighted.t(), x)
        out.of_ones.add_(weighted.sum(0))
        out.weight.add_(chunk.weighted(x.new_ones(len(x), 1)).double().sum())
        if out.of_classes is not None:
            out.of_classes.addmm_(chunk.weighted(S).t(), S)
        for block in chunk.blocks:
            diagonals = formulas.jacobian_diagonal(cut(S, block))
            out.diagonal.add_(chunk.weighted(diagonals, block).sum(0))
