"""A map over chunks of rows that is closed under differentiation, and the Functions that apply it.

If a function takes the rows of some tensors, and other tensors whole, to results of which some have
a row for each row and the others are added up, then so does its vector-Jacobian product: the
cotangent of a result with rows has rows, and the gradient of a tensor that all rows share is added
up over them. So every derivative of a chunked function is a chunked function, in either mode and of
any order, and takes memory for one chunk.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from .._transforms import is_differentiated, is_plain, refuse_inference_mode
from ._autograd import (
    Mask,
    Tensors,
    merge,
    nested_forward_mode,
    savable,
    select,
    settled,
    split,
    vjp,
)
from ._dtypes import accumulation_dtype, outside_autocast, sum_dtype
from ._formulas import product


def slices(rows: int, step: int) -> Iterator[slice]:
    """Cut a number of rows into slices of at most `step`; no rows at all are one empty slice."""
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))


def cut(tensor: Tensor, rows: slice) -> Tensor:
    """Some rows of a tensor; itself where a slice is all of them, as in a small batch."""
    return tensor if rows.start == 0 and rows.stop >= tensor.shape[0] else tensor[rows]


def read(tensor: Tensor, rows: slice, index: Tensor | None) -> Tensor:
    """Some of the rows that count, which an index names; a copy where there is one."""
    return cut(tensor, rows) if index is None else tensor.index_select(0, index[rows])


def restored(values: Tensor, index: Tensor | None, count: int) -> Tensor:
    """The values of the rows that count among 0 for each row that is left out, (N, ...)."""
    if index is None:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, index, values)


def put_back(
    results: tuple[Tensor, ...], has_rows: Mask, index: Tensor | None, count: int
) -> tuple[Tensor, ...]:
    """Results of the rows that count, of which those with rows are `restored`."""
    pairs = zip(results, has_rows, strict=True)
    return tuple(restored(result, index, count) if named else result for result, named in pairs)


def write(results: list[Tensor], rows: slice, parts: tuple[Tensor, ...], count: int) -> None:
    """Write the results of some rows, in order, among the results of all that count.

    Raises:
        ValueError: A part has another shape or dtype, and would be widened to fit.
    """
    # Made once: small tensors that stay between large ones that go would break up the heap.
    if not results:
        results += [part.new_empty(count, *part.shape[1:]) for part in parts]
    for result, part in zip(results, parts, strict=True):
        if (part.shape[1:], part.dtype) != (result.shape[1:], result.dtype):
            raise ValueError(
                "fn must return the same shape and dtype for any rows, "
                f"got {tuple(part.shape[1:])} of {part.dtype} beside {tuple(result.shape[1:])} of "
                f"{result.dtype} for each row before"
            )
        result[rows] = part


class Sweep(Protocol):
    """A faster way through all chunks of a plan, and of the plans of its derivatives."""

    def run(self, tensors: Tensors, index: Tensor | None) -> tuple[Tensor, ...]:
        """The results of the plan, up to rounding, with the rows that count alone."""

    def vjp(self, wanted: Mask) -> "Sweep | None":
        """The sweep of the plan's `vjp`, or None."""

    def jvp(self) -> "Sweep | None":
        """The sweep of the plan's `jvp`, or None."""

    def batch(self, batched: Mask, present: Mask) -> "Sweep | None":
        """The sweep of the plan for a batch of some of the tensors that are there, or None."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A function of tensors, to be evaluated a chunk of rows at a time.

    Args:
        fn: The results for a chunk, a tuple, in operations that can be differentiated.
        rows_in: Which tensors have a row for each row; each chunk gets the others whole.
        rows_out: Which results have a row for each row; the others are summed over the chunks.
        step: The number of rows of a chunk.
        sweep: A faster way to the same results.
        index: The rows that count, (n,) int64; None for all. The other rows are never read: their
            results and gradients are 0.
        known: The results, where they have been computed already.
    """

    fn: Callable[..., tuple[Tensor, ...]]
    rows_in: Mask
    rows_out: Mask
    step: int
    sweep: Sweep | None = None
    index: Tensor | None = None
    known: tuple[Tensor, ...] | None = None

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The results for all rows."""
        if self.known is not None:
            return tuple(result.detach() for result in self.known)
        pairs = zip(tensors, self.rows_in, strict=True)
        first = next(t for t, has_rows in pairs if has_rows and t is not None)
        with outside_autocast(first):
            if self.sweep is not None and all(map(is_plain, tensors)):
                results = self.sweep.run(tuple(map(settled, tensors)), self.index)
            else:
                number = len(first) if self.index is None else len(self.index)
                results = self._run_in_chunks(tensors, number)
        return put_back(results, self.rows_out, self.index, len(first))

    def _run_in_chunks(self, tensors: Tensors, number: int) -> tuple[Tensor, ...]:
        """The results by the function itself, with the rows that count alone."""
        are_shared = tuple(not has_rows for has_rows in self.rows_out)
        with_rows: list[Tensor] = []
        sums: list[Tensor] = []
        for rows in slices(number, self.step):
            pairs = zip(tensors, self.rows_in, strict=True)
            at = (read(t, rows, self.index) if r and t is not None else t for t, r in pairs)
            parts = self.fn(*at)
            write(with_rows, rows, select(parts, self.rows_out), number)
            shared = select(parts, are_shared)
            sums = sums or [torch.zeros_like(p, dtype=accumulation_dtype(p.dtype)) for p in shared]
            for total, part in zip(sums, shared, strict=True):
                total += part
        return merge(merge(are_shared, self.rows_out, with_rows), are_shared, sums)

    def vjp(self, wanted: Mask) -> "Plan":
        """The plan of the gradients of the wanted tensors.

        It takes the tensors, and then a cotangent for each result; None stands for 0.
        """

        def fn(*tensors: Any) -> tuple[Tensor, ...]:
            at, cotangents = split(tensors, len(wanted))
            given = tuple(cotangent is not None for cotangent in cotangents)

            def results(*moving: Tensor) -> tuple[Tensor, ...]:
                return select(self.fn(*merge(at, wanted, moving)), given)

            outputs, pull = vjp(results, *select(at, wanted))
            pairs = zip(outputs, select(cotangents, given), strict=True)
            gradients: tuple[Tensor, ...] = pull(tuple(c.to(o.dtype) for o, c in pairs))
            return gradients

        sweep = None if self.sweep is None else self.sweep.vjp(wanted)
        rows_in, rows_out = (*self.rows_in, *self.rows_out), select(self.rows_in, wanted)
        return Plan(fn, rows_in, rows_out, self.step, sweep, self.index)

    def jvp(self) -> "Plan":
        """The plan of the results' tangents.

        It takes the tensors, and then a tangent for each of them; None stands for 0.
        """

        def fn(*tensors: Any) -> tuple[Tensor, ...]:
            at, tangents = split(tensors, len(self.rows_in))
            moved = tuple(tangent is not None for tangent in tangents)

            def results(*moving: Tensor) -> tuple[Tensor, ...]:
                return tuple(self.fn(*merge(at, moved, moving)))

            # The vector-Jacobian product is linear, and its own is the Jacobian-vector product.
            # torch.func.jvp can't be called inside a level of forward mode.
            outputs, pull = vjp(results, *select(at, moved))
            _, push = vjp(pull, tuple(map(torch.zeros_like, outputs)))
            pairs = zip(select(at, moved), select(tangents, moved), strict=True)
            (pushed,) = push(tuple(tangent.to(t.dtype) for t, tangent in pairs))
            result: tuple[Tensor, ...] = pushed
            return result

        sweep = None if self.sweep is None else self.sweep.jvp()
        return Plan(fn, self.rows_in * 2, self.rows_out, self.step, sweep, self.index)

    def for_rows(self, index: Tensor | None) -> "Plan":
        """The plan for the rows that an index names."""
        return self if index is None else replace(self, index=index)

    def with_results(self, results: Tensors) -> "Plan":
        """The plan with its results, if all of them are known."""
        known = tuple(result for result in results if result is not None)
        return replace(self, known=known) if len(known) == len(results) else self

    def for_derivatives(self) -> "Plan":
        """The plan without its results, which may be large."""
        return self if self.known is None else replace(self, known=None)

    def pull(self, tensors: Tensors, cotangents: Tensors, wanted: Mask) -> Tensors:
        """The gradients of the wanted tensors, in backward."""
        nothing = (None,) * len(tensors)
        if all(cotangent is None for cotangent in cotangents):
            return nothing
        return merge(nothing, wanted, chunked(self.vjp(wanted), *tensors, *cotangents))

    def push(self, tensors: Tensors, tangents: Tensors) -> Tensors:
        """The tangents of the results, in forward mode."""
        return chunked(self.jvp(), *tensors, *tangents)

    def batch(self, size: int, dims: tuple[int | None, ...], tensors: Tensors) -> Tensors:
        """The results for each element of a batch: at once, as more rows, or in a loop."""
        batched = tuple(dim is not None for dim in dims)
        at_once = self._at_once(size, batched, tuple(t is not None for t in tensors))
        if at_once is not None:
            at = (
                t if d is None or t is None else t.movedim(d, 0)
                for t, d in zip(tensors, dims, strict=True)
            )
            outputs = zip(chunked(at_once, *at), self.rows_out, strict=True)
            return tuple(r.movedim(1, 0) if has_rows else r for r, has_rows in outputs)
        pairs = list(zip(tensors, dims, self.rows_in, strict=True))
        is_shared = any(d is not None and not has_rows for _, d, has_rows in pairs)
        if size == 0 or not all(self.rows_out) or is_shared or self.index is not None:
            return self._in_a_loop(size, dims, tensors)

        def fold(tensor: Tensor | None, dim: int | None, has_rows: bool) -> Tensor | None:
            if tensor is None or not has_rows:
                return tensor
            each = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return each.flatten(0, 1)

        results = chunked(self, *(fold(*pair) for pair in pairs))
        return tuple(result.unflatten(0, (size, -1)) for result in results)

    def _at_once(self, size: int, batched: Mask, present: Mask) -> "Plan | None":
        """The plan for a batch of tensors without rows, (size, ...), where a sweep knows it.

        A result is (size, ...), or (N, size, ...) if it has rows.
        """
        sweep = None if self.sweep is None else self.sweep.batch(batched, present)
        if size == 0 or sweep is None:
            return None
        fn = torch.vmap(
            self.fn,
            tuple(0 if has_batch else None for has_batch in batched),
            tuple(1 if has_rows else 0 for has_rows in self.rows_out),
        )
        # Where the function itself is called, it holds all elements of a chunk at a time.
        step = max(1, self.step // size)
        return Plan(fn, self.rows_in, self.rows_out, step, sweep, self.index)

    def _in_a_loop(self, size: int, dims: tuple[int | None, ...], tensors: Tensors) -> Tensors:
        """The results for each element of a batch, one after another."""
        pairs = list(zip(tensors, dims, strict=True))

        def element(i: int) -> tuple[Tensor, ...]:
            at = (t if d is None or t is None else t.select(d, i) for t, d in pairs)
            return chunked(self, *at)

        if size == 0:
            # The shapes are those for an element of zeros.
            zeros = (
                t if d is None or t is None else t.new_zeros(t.movedim(d, 0).shape[1:])
                for t, d in pairs
            )
            return tuple(result.new_empty((0, *result.shape)) for result in chunked(self, *zeros))
        return tuple(map(torch.stack, zip(*map(element, range(size)), strict=True)))


class Chunked(Function):
    """A plan applied to tensors: the plan knows its own derivatives."""

    @staticmethod
    def forward(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return plan.run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        plan, *tensors = inputs
        ctx.plan = plan.for_derivatives()
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        _, *wanted = ctx.needs_input_grad
        return None, *ctx.plan.pull(ctx.saved_tensors, cotangents, tuple(wanted))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        with nested_forward_mode(ctx.saved_tensors) as tensors:
            return ctx.plan.push(tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Plan, *tensors: Tensor | None) -> Any:
        _, *dims = in_dims
        results = plan.batch(info.batch_size, tuple(dims), tensors)
        return results, tuple(None if result is None else 0 for result in results)


# Function.apply asks for this at every call, and without it, inspect works it out anew each time.
Chunked.forward.__signature__ = inspect.signature(Chunked.forward)  # type: ignore[attr-defined]


def chunked(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Apply a plan, so that its results can be differentiated."""
    # Without gradients there is nothing to record. And a compiler drops a Function's jvp, and takes
    # its backward for the end of differentiation (pytorch/pytorch#192985).
    if torch.compiler.is_compiling() or not is_differentiated():
        return plan.run(*tensors)
    refuse_inference_mode()
    results: tuple[Tensor, ...] = Chunked.apply(plan, *map(savable, tensors))
    return results


# A sum is differentiated while its logits are at hand.


class Sum(NamedTuple):
    """A sum with what was computed beside it."""

    value: Tensor
    gradients: Tensors  # by each tensor, None where no gradient is needed
    others: tuple[Tensor, ...] = ()  # without a gradient of their own


@dataclass(frozen=True, eq=False)
class Total:
    """The sum of a plan's results, each times a factor for its row, with its gradients.

    Args:
        plan: A plan whose results all have rows.
        run: The sum for some tensors, with the gradients of the wanted ones.
        complete: The plan's tensors for these, and then a factor (N,) for each of its results;
            None stands for 1.
    """

    plan: Plan
    run: Callable[[Tensors, Mask], Sum]
    complete: Callable[[Tensors], Tensors]

    def pull(
        self, tensors: Tensors, known: Tensors | None, upstream: Tensor, wanted: Mask
    ) -> Tensors:
        """The gradients times the upstream one, so that they can be differentiated.

        The gradients of the plan's tensors are its derivative at the factors, and the gradients of
        the factors are its results.
        """
        every = self.complete(tensors)
        masks = (*wanted, *(False,) * (len(every) - len(wanted)))
        (at, factors), (by_plan, by_factors), (of_plan, of_factors) = (
            split(values, len(self.plan.rows_in))
            for values in (every, masks, known or (None,) * len(every))
        )
        gradients: Tensors = ()
        if any(by_plan):
            derivative = self.plan.vjp(by_plan).with_results(select(of_plan, by_plan))
            first = next(t for t in at if t is not None)
            like = next((f for f in factors if f is not None), None)
            dtype = accumulation_dtype(first.dtype) if like is None else like.dtype
            one = first.new_ones((), dtype=dtype).expand(len(first))
            gradients = chunked(derivative, *at, *(one if f is None else f for f in factors))
        if any(by_factors):
            results = chunked(self.plan.with_results(of_factors), *at)
            gradients = (*gradients, *select(results, by_factors))
        return merge((None,) * len(wanted), wanted, scaled_(gradients, upstream))


class TakenAlong(Function):
    """A sum whose gradients are computed beside it, in the forward pass.

    The first backward takes these gradients and owns them from then on. Any further backward
    computes them again, and one that is to be differentiated has them from a plan.

    No transform comes here, so that it needs no `setup_context`, without which a call takes a
    third of the time.
    """

    @staticmethod
    def forward(ctx: Any, total: Total, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        _, *wanted = ctx.needs_input_grad
        value, ctx.taken, others = total.run(tensors, tuple(wanted))
        ctx.total = total
        ctx.save_for_backward(*tensors)
        if others:
            ctx.mark_non_differentiable(*others)
        return value, *others

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        _, *wanted = ctx.needs_input_grad
        taken, ctx.taken = ctx.taken, None
        tensors = ctx.saved_tensors
        if is_differentiated():
            return None, *ctx.total.pull(tensors, taken, upstream, tuple(wanted))
        if taken is None:
            with outside_autocast(upstream):
                _, taken, _ = ctx.total.run(tensors, tuple(wanted))
        return None, *scaled_(taken, upstream)


def taken_along(total: Total, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The value of a sum, and what was computed beside it apart from its gradients."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        results: tuple[Tensor, ...] = TakenAlong.apply(total, *map(savable, tensors))
        return results
    value, _, others = total.run(tensors, (False,) * len(tensors))
    return value, *others


def scaled_(gradients: Tensors, scale: Tensor) -> Tensors:
    """Gradients that nobody else has seen, times the upstream one."""
    if is_differentiated() or torch.compiler.is_compiling():
        return tuple(None if gradient is None else gradient * scale for gradient in gradients)
    # A CPU knows its numbers, and for most losses this one is 1.
    if scale.is_cpu and scale.item() == 1:
        return gradients
    return tuple(None if gradient is None else gradient.mul_(scale) for gradient in gradients)


def sum_of_products(results: tuple[Tensor, ...], factors: Tensors) -> Tensor:
    """Σ_n Σ_i f_ni r_ni, over rows n and results i; a factor of None is 1."""
    pairs = zip(results, factors, strict=True)
    terms = [result if factor is None else product(factor, result) for result, factor in pairs]
    total = functools.reduce(torch.add, terms)
    return total.sum(dtype=sum_dtype(total))
