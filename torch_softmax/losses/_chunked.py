"""A map over chunks of rows that is closed under differentiation.

If a function takes the rows of some tensors, and others whole, to results of which some have a row
for each row and the others are added up, then so does its vector-Jacobian product: the cotangent of
a result with rows has rows, and the gradient of a tensor that all rows share is added up over them.
So every derivative of a chunked function is a chunked function, in either mode and of any order,
and takes memory for one chunk.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .._transforms import is_plain
from ._autograd import Mask, Sum, Tensors, chunked, merge, scaled_, select, vjp
from ._dtypes import accumulation_dtype, outside_autocast
from ._formulas import product


def slices(rows: int, step: int) -> Iterator[slice]:
    """Cut a number of rows into slices of at most `step`; no rows at all are one empty slice."""
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))


def cut(tensor: Tensor, rows: slice) -> Tensor:
    """Some rows of a tensor; itself where these are all, as of a small batch."""
    return tensor if rows.start == 0 and rows.stop >= tensor.shape[0] else tensor[rows]


class Sweep(Protocol):
    """A faster way through all chunks of a plan, and through those of its derivatives."""

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The results of the plan, but for rounding."""

    def vjp(self, wanted: Mask, given: Mask) -> "Sweep | None":
        """That of the plan's `vjp`; None where there is none."""

    def jvp(self, moved: Mask) -> "Sweep | None":
        """That of the plan's `jvp`; None where there is none."""


@runtime_checkable
class SweepOfMany(Sweep, Protocol):
    """A sweep whose plan has a faster way for many elements of a batch as well."""

    def batch(self, batched: Mask) -> Sweep | None:
        """That of the plan for a batch of some tensors; None where there is none."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A function of tensors, to be worked out a chunk of rows at a time.

    Args:
        fn: What a chunk's tensors come to, a tuple, in operations that can be differentiated.
        rows_in: Which tensors have a row for each row; the others come to each chunk whole.
        rows_out: Which results do; the others are added up over the chunks.
        step: The rows of a chunk.
        sweep: A faster way to the same results.
        known: The results, where they are known already.
    """

    fn: Callable[..., tuple[Tensor, ...]]
    rows_in: Mask
    rows_out: Mask
    step: int
    sweep: Sweep | None = None
    known: tuple[Tensor, ...] | None = None

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The results for all rows."""
        if self.known is not None:
            return tuple(result.detach() for result in self.known)
        first = next(tensor for tensor in tensors if tensor is not None)
        with outside_autocast(first):
            if self.sweep is not None and all(map(is_plain, tensors)):
                return self.sweep.run(*tensors)
            return self._run_in_chunks(*tensors)

    def _run_in_chunks(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The results by the function itself."""
        count = next(t.shape[0] for t in select(tensors, self.rows_in) if t is not None)
        results: list[Tensor] = []
        for rows in slices(count, self.step):
            pairs = zip(tensors, self.rows_in, strict=True)
            parts = self.fn(*(t[rows] if r and t is not None else t for t, r in pairs))
            results = results or [
                part.new_empty((count, *part.shape[1:]))
                if of_rows
                else torch.zeros_like(part, dtype=accumulation_dtype(part.dtype))
                for part, of_rows in zip(parts, self.rows_out, strict=True)
            ]
            for result, part, of_rows in zip(results, parts, self.rows_out, strict=True):
                if of_rows:
                    write(result, rows, part)
                else:
                    result += part
        return tuple(results)

    def vjp(self, wanted: Mask, given: Mask) -> "Plan":
        """The plan of the gradients of the wanted tensors.

        It takes the tensors, and then a cotangent for each of the given results, of which None
        stands for ones.
        """

        def fn(*tensors: Any) -> tuple[Tensor, ...]:
            at, cotangents = split(tensors, len(wanted))

            def results(*moving: Tensor) -> tuple[Tensor, ...]:
                return select(self.fn(*merge(at, wanted, moving)), given)

            outputs, pull = vjp(results, *select(at, wanted))
            pairs = zip(outputs, cotangents, strict=True)
            gradients: tuple[Tensor, ...] = pull(
                tuple(torch.ones_like(o) if c is None else c.to(o.dtype) for o, c in pairs)
            )
            return gradients

        return Plan(
            fn,
            (*self.rows_in, *select(self.rows_out, given)),
            select(self.rows_in, wanted),
            self.step,
            None if self.sweep is None else self.sweep.vjp(wanted, given),
        )

    def jvp(self, moved: Mask) -> "Plan":
        """The plan of the results' tangents: of the tensors, and then of those that move."""

        def fn(*tensors: Any) -> tuple[Tensor, ...]:
            at, tangents = split(tensors, len(moved))

            def results(*moving: Tensor) -> tuple[Tensor, ...]:
                return tuple(self.fn(*merge(at, moved, moving)))

            # The vector-Jacobian product is linear, and its own is the Jacobian-vector product.
            # torch.func.jvp can't be called inside a level of forward mode.
            outputs, pull = vjp(results, *select(at, moved))
            _, push = vjp(pull, tuple(map(torch.zeros_like, outputs)))
            pairs = zip(select(at, moved), tangents, strict=True)
            (pushed,) = push(tuple(tangent.to(t.dtype) for t, tangent in pairs))
            result: tuple[Tensor, ...] = pushed
            return result

        return Plan(
            fn,
            (*self.rows_in, *select(self.rows_in, moved)),
            self.rows_out,
            self.step,
            None if self.sweep is None else self.sweep.jvp(moved),
        )

    def with_results(self, results: Tensors) -> "Plan":
        """The same, with its results if all of them are known."""
        known = tuple(result for result in results if result is not None)
        return replace(self, known=known) if len(known) == len(results) else self

    def for_derivatives(self) -> "Plan":
        """The same without its results, which may be large."""
        return self if self.known is None else replace(self, known=None)

    def pull(self, tensors: Tensors, cotangents: Tensors, wanted: Mask) -> Tensors:
        """The gradients of the wanted tensors, in backward."""
        given = tuple(cotangent is not None for cotangent in cotangents)
        nothing = (None,) * len(tensors)
        if not any(given):
            return nothing
        gradients = chunked(self.vjp(wanted, given), *tensors, *select(cotangents, given))
        return merge(nothing, wanted, gradients)

    def push(self, tensors: Tensors, tangents: Tensors) -> Tensors:
        """The tangents of the results, in forward mode."""
        moved = tuple(tangent is not None for tangent in tangents)
        return chunked(self.jvp(moved), *tensors, *select(tangents, moved))

    def batch(self, size: int, dims: tuple[int | None, ...], tensors: Tensors) -> Tensors:
        """The results for each element of a batch: at once, as more rows, or in a loop."""
        at_once = self._at_once(size, tuple(dim is not None for dim in dims))
        if at_once is not None:
            at = (
                t if d is None or t is None else t.movedim(d, 0)
                for t, d in zip(tensors, dims, strict=True)
            )
            outputs = zip(chunked(at_once, *at), self.rows_out, strict=True)
            return tuple(r.movedim(1, 0) if of_rows else r for r, of_rows in outputs)
        pairs = list(zip(tensors, dims, self.rows_in, strict=True))
        if size == 0 or not all(self.rows_out) or any(d is not None and not r for _, d, r in pairs):
            return in_a_loop(self, size, dims, tensors)

        def fold(tensor: Tensor | None, dim: int | None, of_rows: bool) -> Tensor | None:
            if tensor is None or not of_rows:
                return tensor
            each = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return each.flatten(0, 1)

        results = chunked(self, *(fold(*pair) for pair in pairs))
        return tuple(result.unflatten(0, (size, -1)) for result in results)

    def _at_once(self, size: int, batched: Mask) -> "Plan | None":
        """The plan for a batch of tensors without rows, (size, ...), where a sweep knows it.

        Its results are (size, ...), or (N, size, ...) of those with rows.
        """
        sweep = self.sweep.batch(batched) if isinstance(self.sweep, SweepOfMany) else None
        if size == 0 or sweep is None:
            return None
        fn = torch.vmap(
            self.fn,
            tuple(0 if of_batch else None for of_batch in batched),
            tuple(1 if of_rows else 0 for of_rows in self.rows_out),
        )
        # Where the function itself is asked, all elements of a chunk are held at a time.
        return Plan(fn, self.rows_in, self.rows_out, max(1, self.step // size), sweep)


def in_a_loop(plan: Any, size: int, dims: tuple[int | None, ...], tensors: Tensors) -> Tensors:
    """The results of a plan for each element of a batch, one after another."""

    def element(i: int) -> tuple[Tensor, ...]:
        pairs = zip(tensors, dims, strict=True)
        return chunked(plan, *(t if d is None or t is None else t.select(d, i) for t, d in pairs))

    if size == 0:
        # The shapes are those for an element of zeros.
        pairs = zip(tensors, dims, strict=True)
        zeros = (
            t if d is None or t is None else t.new_zeros(t.movedim(d, 0).shape[1:])
            for t, d in pairs
        )
        return tuple(result.new_empty((0, *result.shape)) for result in chunked(plan, *zeros))
    return tuple(map(torch.stack, zip(*map(element, range(size)), strict=True)))


def write(result: Tensor, rows: slice, part: Tensor) -> None:
    """Write the result of some rows among those of all.

    Raises:
        ValueError: It is another kind of result, which would be widened to fit.
    """
    if (part.shape[1:], part.dtype) != (result.shape[1:], result.dtype):
        raise ValueError(
            "fn must return the same shape and dtype for any rows, "
            f"got {tuple(part.shape)} of {part.dtype} beside {tuple(result.shape[1:])} of "
            f"{result.dtype} for each row before"
        )
    result[rows] = part


@dataclass(frozen=True, eq=False)
class Total:
    """The sum of a plan's results, each times a factor for its row, with gradients taken along.

    Args:
        plan: Whose results all have rows.
        run: The sum of some tensors, with the gradients by those that are wanted.
        complete: The plan's tensors for these, and then a factor (N,) for each of its results, of
            which None stands for 1.
    """

    plan: Plan
    run: Callable[[Tensors, Mask], Sum]
    complete: Callable[[Tensors], Tensors]

    def pull(
        self, tensors: Tensors, known: Tensors | None, upstream: Tensor, wanted: Mask
    ) -> Tensors:
        """The gradients: those of the plan for its factors, and its results for the factors'."""
        every = self.complete(tensors)
        masks = (*wanted, *(False,) * (len(every) - len(wanted)))
        (at, _), (of_plan, of_factors), (by_plan, by_factors) = (
            split(values, len(self.plan.rows_in))
            for values in (every, masks, known or (None,) * len(every))
        )
        gradients: Tensors = ()
        if any(of_plan):
            derivative = self.plan.vjp(of_plan, (True,) * len(of_factors))
            gradients = chunked(derivative.with_results(select(by_plan, of_plan)), *every)
        if any(of_factors):
            results = chunked(self.plan.with_results(by_factors), *at)
            gradients = (*gradients, *select(results, of_factors))
        return merge((None,) * len(wanted), wanted, scaled_(gradients, upstream))


def sum_of_products(results: tuple[Tensor, ...], factors: Tensors) -> Tensor:
    """Σ_n Σ_i f_ni r_ni, over rows n and results i, where a factor of None is 1."""
    pairs = zip(results, factors, strict=True)
    terms = [result if factor is None else product(factor, result) for result, factor in pairs]
    return functools.reduce(torch.add, terms).sum()


def split(values: Any, count: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The first of some values, and the rest."""
    rest = iter(values)
    return tuple(islice(rest, count)), tuple(rest)
