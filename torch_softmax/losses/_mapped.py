"""A function of the logits of a few rows, as a plan for the logits of all.

z = x Wᵀ + b goes to r = fn(z, rows, shared), a row at a time. With a cotangent c for each result
and g = ∂(c · r)/∂z of the function alone, ∂/∂x = g W, ∂/∂W = gᵀ x and ∂/∂b = Σ_n g.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from ._autograd import (
    Mask,
    Sum,
    Tensors,
    chunked,
    is_plain,
    is_transformed,
    may_take_gradients,
    merge,
    select,
    taken_along,
)
from ._chunked import Plan, Total, cut, slices
from ._dtypes import accumulation_dtype, cast
from ._products import add_pulled_to_classes_, multiplied_in, pull_to_rows
from ._sweeps import How, Inputs, Logits, later, put

# The layer's own tensors: x, which has rows, and W and b, which all rows share.
_OF_LAYER: Mask = (True, False, False)


@dataclass(frozen=True, eq=False)
class RowFunction:
    """A function that takes logits to numbers for each row, with what it is told beside them.

    Args:
        fn: The results (n, ...) for logits (n, K), the same rows of some tensors, and others whole.
        rows_in: Which of the tensors after the logits have rows.
        results: How many there are.
        dtype: That of the logits it is given.
        how: How the logits are worked out.
    """

    fn: Callable[..., tuple[Tensor, ...]]
    rows_in: Mask
    results: int
    dtype: torch.dtype
    how: How

    def plan(self) -> Plan:
        """The function of the layer and of the other tensors: this is the definition."""

        def fn(x: Tensor, W: Tensor, b: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
            logits = self.how.logits_dtype
            z = linear(cast(x, logits), cast(W, logits), None if b is None else cast(b, logits))
            return self.fn(cast(z, self.dtype), *others)

        return Plan(
            fn,
            (*_OF_LAYER, *self.rows_in),
            (True,) * self.results,
            self.how.step,
            _Values(self),
        )

    def total(self) -> Total:
        """The sum of its only result over all rows."""

        def run(tensors: Tensors, wanted: Mask) -> Sum:
            if not any(wanted):
                (values,) = _values(self, tensors)
                return Sum(values.sum(), (None,) * len(tensors))
            (values,), gradients = _values_and_gradients(self, tensors, (None,), wanted)
            return Sum(values.sum(), gradients)

        return Total(self.plan(), run, complete=lambda tensors: (*tensors, None))


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
        of = replace(self.of, fn=lambda *given: select(self.of.fn(*given), self.given))
        _, gradients = _values_and_gradients(of, at, cotangents, self.wanted)
        return select(gradients, self.wanted)

    def vjp(self, wanted: Mask, given: Mask) -> None:
        """None."""

    def jvp(self, moved: Mask) -> None:
        """None."""


class _Rows:
    """What a function is given of some rows, beside their logits."""

    def __init__(self, others: Tensors, rows_in: Mask) -> None:
        self.pairs = list(zip(others, rows_in, strict=True))

    def at(self, rows: slice) -> tuple[Tensor, ...]:
        """The rows of the tensors that have some, and the others whole."""
        values: Any = (t if t is None or not of_rows else cut(t, rows) for t, of_rows in self.pairs)
        return tuple(values)


def _write(results: list[Tensor], parts: tuple[Tensor, ...], rows: slice, count: int) -> None:
    """Write the results of some rows among those of all."""
    if not results:
        results += [part.new_empty((count, *part.shape[1:])) for part in parts]
    for result, part in zip(results, parts, strict=True):
        result[rows] = part


def _values(of: RowFunction, tensors: Tensors) -> tuple[Tensor, ...]:
    """The results of all rows."""
    x, W, b, *others = tensors
    assert x is not None
    rows_of, results = _Rows(tuple(others), of.rows_in), list[Tensor]()
    logits = Logits(Inputs(x, W, b), of.how)
    for rows in slices(len(x), of.how.step):
        z = logits.of(cut(x, rows), W, b)
        for block in logits.blocks(z):
            part = later(rows, block)
            here = cast(cut(z, block), of.dtype).contiguous()
            _write(results, of.fn(here, *rows_of.at(part)), part, len(x))
    return tuple(results)


def _values_and_gradients(
    of: RowFunction, tensors: Tensors, cotangents: Tensors, wanted: Mask
) -> tuple[tuple[Tensor, ...], Tensors]:
    """The results of all rows, with the gradients of the tensors wanted.

    There is a cotangent for each result, of which None stands for ones.
    """
    x, W, b, *others = tensors
    by_x, by_W, by_b, *by_others = wanted
    assert x is not None
    assert W is not None
    sums = accumulation_dtype(x.dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if by_x else None
    dW = torch.zeros_like(W, dtype=sums, memory_format=torch.contiguous_format) if by_W else None
    db = x.new_zeros(len(W), dtype=sums) if by_b else None
    by_logits = by_x or by_W or by_b
    mask = (by_logits, *by_others)
    d_others = [
        _gradient_like(other, of_rows) if by else None
        for other, of_rows, by in zip(others, of.rows_in, by_others, strict=True)
    ]
    rows_of, results = _Rows(tuple(others), of.rows_in), list[Tensor]()
    logits = Logits(Inputs(x, W, b), of.how)
    for rows in slices(len(x), of.how.step):
        here = cut(x, rows)
        z = logits.of(here, W, b)
        g = z
        for block in logits.blocks(z):
            part = later(rows, block)
            at = (cast(cut(z, block), of.dtype).contiguous(), *rows_of.at(part))

            def fn(*moving: Tensor, at: tuple[Tensor, ...] = at) -> tuple[Tensor, ...]:
                return of.fn(*merge(at, mask, moving))

            values, pull = torch.func.vjp(fn, *select(at, mask))  # type: ignore[misc]
            _write(results, values, part, len(x))
            gradients = merge(
                (None,) * len(mask), mask, pull(_cotangents(values, cotangents, part))
            )
            by_z, *of_others = gradients
            if db is not None:
                db.add_(by_z.sum(0))
            if by_x or by_W:
                g = put(z, block, by_z)
            for total, gradient, of_rows in zip(d_others, of_others, of.rows_in, strict=True):
                if total is not None and of_rows:
                    total[part] = gradient
                elif total is not None:
                    total.add_(gradient)
            del at, values, pull, gradients, by_z, of_others  # before the next ones are made
        g = cast(g, multiplied_in(W.dtype, W.device))
        if dx is not None:
            pull_to_rows(g, W, dx[rows])
        if dW is not None:
            add_pulled_to_classes_(dW, g, here)
    return tuple(results), (dx, dW, db, *d_others)


def _gradient_like(tensor: Tensor | None, of_rows: bool) -> Tensor:
    """Where the gradient of a tensor goes: rows to be written, or a sum that starts at 0."""
    assert tensor is not None
    if of_rows:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return torch.zeros_like(tensor, dtype=accumulation_dtype(tensor.dtype))


def _cotangents(values: tuple[Tensor, ...], cotangents: Tensors, rows: slice) -> tuple[Tensor, ...]:
    """Those of some rows, in the dtypes of their values."""

    def of_rows(value: Tensor, cotangent: Tensor | None) -> Tensor:
        return torch.ones_like(value) if cotangent is None else cast(cotangent[rows], value.dtype)

    return tuple(map(of_rows, values, cotangents))


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
