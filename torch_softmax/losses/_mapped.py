"""A function of the logits of a few rows, as a plan for the logits of all.

z = x Wᵀ + b goes to r = fn(z, rows, shared), a row at a time; or several layers' logits do, each of
its own x, W and b. With a cotangent c for each result and g = ∂(c · r)/∂z of the function alone,
∂/∂x = g W, ∂/∂W = gᵀ x and ∂/∂b = Σ_n g.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from .._transforms import is_plain, is_transformed
from ._autograd import (
    Mask,
    Sum,
    Tensors,
    chunked,
    may_take_gradients,
    merge,
    pulled_back,
    select,
    taken_along,
)
from ._chunked import Plan, Total, cut, slices, split, write
from ._dtypes import accumulation_dtype, cast
from ._products import add_pulled_to_classes_, multiplied_in, multiply, pull_to_rows
from ._sweeps import How, Inputs, Logits, later, put, sums_of

# A layer's own tensors: x, which has rows, and W and b, which all rows share.
_OF_LAYER: Mask = (True, False, False)


class Parts(NamedTuple):
    """The tensors of a function of logits, or one thing for each of them."""

    layers: list[tuple[Any, Any, Any]]  # x, W and b of each
    others: tuple[Any, ...]


class ByHand(Protocol):
    """A function of one layer's logits with its gradient in closed form."""

    def __call__(
        self, z: Tensor, *others: Any, cotangents: Tensors | None = None
    ) -> tuple[tuple[Any, ...], Tensor | None]:
        """The results for logits (n, K), which it may write to, and the gradient by these.

        There is no gradient without cotangents (n,), of which None stands for 0. A result of such
        a one is not asked for, and may be None too.
        """


@dataclass(frozen=True, eq=False)
class RowFunction:
    """A function that takes logits to numbers for each row, with what it is told beside them.

    Args:
        fn: The results (n, ...) for the logits (n, K) of each layer, the same rows of some tensors,
            and others whole.
        layers: How many there are.
        rows_in: Which of the tensors after the logits have rows.
        results: How many there are.
        how: How the logits are worked out. They are given in its dtype.
        by_hand: The same by hand, for the gradient by the logits alone; None where autograd does.
    """

    fn: Callable[..., tuple[Tensor, ...]]
    layers: int
    rows_in: Mask
    results: int
    how: How
    by_hand: ByHand | None = None

    def parts(self, values: Any) -> Parts:
        """The tensors of the layers, and the others; or one thing for each of them."""
        each = len(_OF_LAYER)
        starts = range(0, self.layers * each, each)
        layers: Any = [tuple(values[i : i + each]) for i in starts]
        return Parts(layers, tuple(values[self.layers * each :]))

    def plan(self) -> Plan:
        """The function of the layers and of the other tensors: this is the definition."""

        def fn(*tensors: Any) -> tuple[Tensor, ...]:
            layers, others = self.parts(tensors)
            return self.fn(*(logits_of(*layer, self.how) for layer in layers), *others)

        return Plan(
            fn,
            (*_OF_LAYER * self.layers, *self.rows_in),
            (True,) * self.results,
            self.how.step,
            _Values(self),
        )

    def only(self, given: Mask) -> "RowFunction":
        """The same function with some of its results alone."""
        whole, by_hand = self.fn, self.by_hand

        def fn(*tensors: Any) -> tuple[Tensor, ...]:
            return select(whole(*tensors), given)

        def fn_by_hand(
            z: Tensor, *others: Any, cotangents: Tensors | None = None
        ) -> tuple[tuple[Any, ...], Tensor | None]:
            assert by_hand is not None
            if cotangents is not None:
                cotangents = merge((None,) * len(given), given, cotangents)
            values, gradient = by_hand(z, *others, cotangents=cotangents)
            return select(values, given), gradient

        return replace(self, fn=fn, by_hand=fn_by_hand if by_hand else None)

    def total(self) -> Total:
        """The sum of its only result over all rows."""

        def run(tensors: Tensors, wanted: Mask) -> Sum:
            if not any(wanted):
                (values,) = _values(self, tensors)
                return Sum(values.sum(), (None,) * len(tensors))
            (values,), gradients = _values_and_gradients(self, tensors, (None,), wanted)
            return Sum(values.sum(), gradients)

        return Total(self.plan(), run, complete=lambda tensors: (*tensors, None))


def logits_of(x: Tensor, W: Tensor, b: Tensor | None, how: How) -> Tensor:
    """The logits of all rows of a layer."""
    dtype = how.logits_dtype
    z = linear(cast(x, dtype), cast(W, dtype), None if b is None else cast(b, dtype))
    return cast(z, how.dtype)


def logits_of_few(x: Tensor, W: Tensor, b: Tensor | None, how: How) -> Tensor:
    """The same for a few rows at rest, without a copy of W in another dtype."""
    z = multiply(x, W, b, x.new_empty(len(x), len(W), dtype=how.logits_dtype))
    return cast(z, how.dtype)


# The same as sweeps: logits in a buffer, and products that are added up where they belong.


@dataclass(frozen=True)
class _Values:
    """The results of all rows."""

    of: RowFunction

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The results, (N, ...)."""
        return _values(self.of, tensors)

    def vjp(self, wanted: Mask, given: Mask) -> "_Gradients":
        """Of the gradients."""
        return _Gradients(self.of, wanted, given)

    def jvp(self, moved: Mask) -> None:
        """None."""


@dataclass(frozen=True)
class _Gradients:
    """The gradients of all results, for cotangents of those given."""

    of: RowFunction
    wanted: Mask
    given: Mask

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Those of the tensors wanted."""
        count = len(self.wanted)
        at, cotangents = tensors[:count], tensors[count:]
        of = self.of.only(self.given)
        _, gradients = _values_and_gradients(of, at, cotangents, self.wanted)
        return select(gradients, self.wanted)

    def vjp(self, wanted: Mask, given: Mask) -> None:
        """None."""

    def jvp(self, moved: Mask) -> None:
        """None."""


class _Chunk(NamedTuple):
    """Some rows, with the logits of each layer."""

    rows: slice
    logits: list[Tensor]
    blocks: list[slice]  # of these rows, that a CPU finds in its cache


def _chunks(of: RowFunction, parts: Parts) -> Iterator[_Chunk]:
    """All rows a chunk at a time; the logits are in buffers that the next chunk writes over."""
    buffers = [Logits(Inputs(*layer), of.how) for layer in parts.layers]
    (x, *_), *_ = parts.layers
    for rows in slices(len(x), of.how.step):
        pairs = zip(buffers, parts.layers, strict=True)
        logits = [buffer.of(cut(x, rows), W, b) for buffer, (x, W, b) in pairs]
        yield _Chunk(rows, logits, list(buffers[0].blocks(logits[0])))


def _at(of: RowFunction, parts: Parts, chunk: _Chunk, block: slice) -> tuple[Any, ...]:
    """What the function is given of a block of a chunk's rows."""
    part = later(chunk.rows, block)
    pairs = zip(parts.others, of.rows_in, strict=True)
    return (
        *(cast(cut(z, block), of.how.dtype).contiguous() for z in chunk.logits),
        *(t if t is None or not of_rows else cut(t, part) for t, of_rows in pairs),
    )


def _write(results: list[Tensor], values: tuple[Tensor, ...], rows: slice, count: int) -> None:
    """Write the results of some rows among those of all."""
    if not results:
        results += [value.new_empty((count, *value.shape[1:])) for value in values]
    for result, value in zip(results, values, strict=True):
        write(result, rows, value)


def _values(of: RowFunction, tensors: Tensors) -> tuple[Tensor, ...]:
    """The results of all rows."""
    parts, results = of.parts(tensors), list[Tensor]()
    (x, *_), *_ = parts.layers
    for chunk in _chunks(of, parts):
        for block in chunk.blocks:
            at = _at(of, parts, chunk, block)
            values = of.fn(*at) if of.by_hand is None else of.by_hand(*at)[0]
            _write(results, values, later(chunk.rows, block), len(x))
    return tuple(results)


def _values_and_gradients(
    of: RowFunction, tensors: Tensors, cotangents: Tensors, wanted: Mask
) -> tuple[tuple[Tensor, ...], Tensors]:
    """The results of all rows, with the gradients of the tensors wanted.

    There is a cotangent for each result, of which None stands for ones.
    """
    parts, by, results = of.parts(tensors), of.parts(wanted), list[Tensor]()
    (first, *_), *_ = parts.layers
    mask = (*map(any, by.layers), *by.others)
    outs = [_layer_sums(*pair) for pair in zip(parts.layers, by.layers, strict=True)]
    triples = zip(parts.others, of.rows_in, by.others, strict=True)
    of_others = [_gradient_like(other, of_rows) if w else None for other, of_rows, w in triples]
    is_by_hand = of.by_hand is not None and not any(by.others)
    pulled = _pulled_by_hand if is_by_hand else _pulled_by_autograd
    for chunk in _chunks(of, parts):
        gradients_of_logits = list(chunk.logits)
        for block in chunk.blocks:
            part = later(chunk.rows, block)
            at = _at(of, parts, chunk, block)
            values, by_logits, by_others = pulled(of, at, cotangents, mask, part)
            _write(results, values, part, len(first))
            for i, (gradient, out) in enumerate(zip(by_logits, outs, strict=True)):
                if out.b is not None:
                    out.b.add_(gradient.sum(0))
                if out.x is not None or out.W is not None:
                    gradients_of_logits[i] = put(chunk.logits[i], block, gradient)
            for total, gradient, of_rows in zip(of_others, by_others, of.rows_in, strict=True):
                if total is not None and of_rows:
                    total[part] = gradient
                elif total is not None:
                    total.add_(gradient)
            del at, values, by_logits, by_others  # before the next ones are made
        for (x, W, _), out, g in zip(parts.layers, outs, gradients_of_logits, strict=True):
            g = cast(g, multiplied_in(W.dtype, W.device))
            if out.x is not None:
                pull_to_rows(g, W, out.x[chunk.rows])
            if out.W is not None:
                add_pulled_to_classes_(out.W, g, cut(x, chunk.rows))
    layers = (out[: len(_OF_LAYER)] for out in outs)
    return tuple(results), (*(t for layer in layers for t in layer), *of_others)


def _layer_sums(layer: tuple[Any, Any, Any], wanted: tuple[Any, Any, Any]) -> Inputs:
    """Where the wanted gradients of a layer go."""
    return sums_of(Inputs(*layer), Inputs(*wanted, p=False), layer[0].dtype)


def _gradient_like(tensor: Tensor, of_rows: bool) -> Tensor:
    """Where the gradient of a tensor goes: rows to be written, or a sum that starts at 0."""
    if of_rows:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return torch.zeros_like(tensor, dtype=accumulation_dtype(tensor.dtype))


class _Pulled(NamedTuple):
    """The results of some rows, with the gradients by what the function is given, or None."""

    values: tuple[Any, ...]
    by_logits: tuple[Any, ...]
    by_others: tuple[Any, ...]


def _pulled_by_autograd(
    of: RowFunction, at: tuple[Any, ...], cotangents: Tensors, mask: Mask, rows: slice
) -> _Pulled:
    """What autograd makes of the function of some rows."""

    def fn(*moving: Tensor) -> tuple[Tensor, ...]:
        return of.fn(*merge(at, mask, moving))

    values, pull = pulled_back(fn, *select(at, mask))
    pairs = zip(values, cotangents, strict=True)
    pulled = pull(
        tuple(torch.ones_like(v) if c is None else cast(c[rows], v.dtype) for v, c in pairs)
    )
    return _Pulled(values, *split(merge((None,) * len(mask), mask, pulled), of.layers))


def _pulled_by_hand(
    of: RowFunction, at: tuple[Any, ...], cotangents: Tensors, mask: Mask, rows: slice
) -> _Pulled:
    """What the function's closed form says of some rows."""
    z, *others = at
    assert of.by_hand is not None
    of_rows = (z.new_ones(len(z)) if c is None else cast(c[rows], z.dtype) for c in cotangents)
    values, gradient = of.by_hand(z, *others, cotangents=tuple(of_rows))
    return _Pulled(values, (gradient,), (None,) * len(others))


# From here on a function is applied.


def results_of(of: RowFunction, tensors: Tensors) -> tuple[Tensor, ...]:
    """The results of all rows, to be differentiated to any order."""
    plan = of.plan()
    if torch.compiler.is_compiling():
        return _in_a_graph(plan, tensors)
    return chunked(plan, *tensors)


def total_of(of: RowFunction, tensors: Tensors) -> Tensor:
    """The sum of the only result, with its gradients taken along where one will be asked for."""
    if torch.compiler.is_compiling() or not may_take_gradients() or not all(map(is_plain, tensors)):
        (values,) = results_of(of, tensors)
        return values.sum(0)
    (total,) = taken_along(of.total(), *tensors)
    return total


def _in_a_graph(plan: Plan, tensors: Tensors) -> tuple[Tensor, ...]:
    """The results in plain operations, which a compiler differentiates, for each chunk anew."""
    if is_transformed():
        return plan.fn(*tensors)
    (x, *_) = tensors
    assert x is not None
    pieces = []
    for rows in slices(x.shape[0], plan.step):
        pairs = zip(tensors, plan.rows_in, strict=True)
        part = (t[rows] if of_rows and t is not None else t for t, of_rows in pairs)
        pieces.append(checkpoint(plan.fn, *part, use_reentrant=False))
    return tuple(map(torch.cat, zip(*pieces, strict=True)))
