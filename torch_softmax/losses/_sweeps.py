"""One loop over chunks of rows for any function of their logits, and its twin of second order.

A row function takes a row's logits z = x Wᵀ + b, of one layer or several, and what belongs to the
row to numbers. With a cotangent for each of them and g = ∂/∂z of the function alone,

    ∂/∂x = g W,  ∂/∂W = gᵀ x,  ∂/∂b = Σ_n g,

and along a direction, in which the logits move by u = ux Wᵀ + x uWᵀ + ub and g by h,

    ∂/∂x changes by h W + g uW,  ∂/∂W by hᵀ x + gᵀ ux,  ∂/∂b by Σ_n h.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from ._autograd import Mask, Tensors, merge, select, split
from ._chunked import Plan, Sum, Total, cut, put_back, read, slices, sum_of_products, write
from ._dtypes import accumulation_dtype, cast
from ._products import (
    add_multiplied_,
    add_pulled_to_classes_,
    add_pulled_to_rows_,
    multiplied_in,
    multiply,
    pull_to_rows,
)
from ._rows import How, Layer, Operands, Parts, RowFunction

# Logits that fit a core's own cache beside a few passes over them, measured on a CPU; and the cores
# that share a block, so that it stays small beside a chunk.
_CACHED_LOGITS = 2**17
_MOST_CORES = 32
# On other devices few large kernels are better, in memory that stays below 2²⁶ logits.
_LAUNCHED_LOGITS = 2**26
# Up to this many classes, W xᵀ is a faster product than x Wᵀ.
FEW_CLASSES = 32


def cached_rows(classes: int) -> int:
    """The number of rows whose logits the caches of all cores hold, as many for each."""
    # A compiler, which fuses the passes itself, can't go on from the number of cores.
    cores = 1 if torch.compiler.is_compiling() else min(torch.get_num_threads(), _MOST_CORES)
    return cores * max(1, _CACHED_LOGITS // max(1, classes))


def logits_step(z: Tensor) -> int:
    """The number of rows of given logits (N, K) to work on at a time."""
    classes = z.shape[1]
    on_cpu = z.device.type == "cpu"
    return cached_rows(classes) if on_cpu else max(1, _LAUNCHED_LOGITS // max(1, classes))


@dataclass(frozen=True)
class Work:
    """What a loop goes over: the rows that an index (n,) names, or all."""

    function: RowFunction
    how: How
    operands: Operands
    index: Tensor | None = None

    @property
    def count(self) -> int:
        """The number of rows that count, n."""
        first, *_ = self.operands.layers
        return len(first.x) if self.index is None else len(self.index)

    def blocks(self, chunk: slice, z: Tensor) -> list[tuple[slice, slice]]:
        """A chunk in parts whose logits a CPU finds in cache: their rows in the chunk, and in all.

        Ranks wait for one another at every part, so that one is enough for them.
        """
        one = z.device.type != "cpu" or self.function.across is not None
        blocks = slices(len(z), len(z) or 1 if one else cached_rows(z.shape[1]))
        return [(b, slice(chunk.start + b.start, chunk.start + b.stop)) for b in blocks]

    def parts(
        self, logits: Iterable[Tensor], rows: slice, others: Tensors, factors: Iterable[Any]
    ) -> Parts:
        """The logits of some rows with what else is theirs."""
        pairs = zip(others, self.function.rows_in, strict=True)
        dtype = self.how.dtype
        return Parts(
            tuple(cast(z, dtype) for z in logits),
            tuple(read(t, rows, self.index) if r and t is not None else t for t, r in pairs),
            tuple(
                cast(read(f, rows, self.index), dtype) if isinstance(f, Tensor) else f
                for f in factors
            ),
        )

    def like(self, tensor: Tensor, has_rows: bool) -> Tensor:
        """Where the gradient of a tensor goes: rows to be written, or a sum that starts at 0."""
        if has_rows:
            return tensor.new_empty(self.count, *tensor.shape[1:])
        return torch.zeros_like(tensor, dtype=accumulation_dtype(tensor.dtype))

    def like_others(self, needed: tuple[Any, ...]) -> list[Any]:
        """Where the needed gradients of other tensors go."""
        triples = zip(self.operands.others, self.function.rows_in, needed, strict=True)
        return [self.like(t, has_rows) if wanted else None for t, has_rows, wanted in triples]

    def add_to_others(self, totals: list[Any], gradients: tuple[Any, ...], rows: slice) -> None:
        """Write the gradients of rows, and add up the gradients of what all rows share."""
        for total, gradient, has_rows in zip(totals, gradients, self.function.rows_in, strict=True):
            if total is not None and has_rows:
                total[rows] = gradient
            elif total is not None:
                total.add_(gradient)


class _Buffer:
    """The logits of a chunk, in memory that all chunks share.

    Fresh memory costs a CPU more than the arithmetic done in it.
    """

    def __init__(self, layer: Layer, classes: int, work: Work) -> None:
        rows = min(work.how.step, work.count) if classes > FEW_CLASSES else 0
        self.dtype = work.how.logits_dtype
        self.memory = layer.x.new_empty(rows, classes, dtype=self.dtype)

    def logits(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The logits x Wᵀ + b, (n, K)."""
        if len(W) <= FEW_CLASSES:
            W, x = cast(W, self.dtype), cast(x, self.dtype)
            b = None if b is None else cast(b, self.dtype)
            return (W @ x.t() if b is None else torch.addmm(b.unsqueeze(1), W, x.t())).t()
        return multiply(x, W, b, self.memory[: len(x), : len(W)])


class _Head:
    """A layer on its way through a loop, with its logits and where its gradients go."""

    def __init__(self, layer: Layer, needed: Layer, work: Work, number: int = 0) -> None:
        self.layer = layer
        x, W, b = layer
        self.classes = x.shape[1] if W is None else len(W)
        self.buffer = None if W is None else _Buffer(layer, self.classes, work)
        sums, many = accumulation_dtype(x.dtype), (number,) if number else ()
        self.out = Layer(
            x=work.like(x, has_rows=True) if needed.x else None,
            W=x.new_zeros((*many, *W.shape), dtype=sums) if needed.W else None,
            b=x.new_zeros((*many, *b.shape), dtype=sums) if needed.b else None,
        )

    def load(self, rows: slice, work: Work) -> Tensor:
        """The logits of a chunk, which the next chunk writes over."""
        self.rows, self.x = rows, read(self.layer.x, rows, work.index)
        _, W, b = self.layer
        self.z = self.x if self.buffer is None else self.buffer.logits(self.x, W, b)
        return self.z

    def add(
        self, out: Layer, block: slice, gradient: Tensor, to: Tensor, kept: Tensor | None
    ) -> Tensor | None:
        """Add the gradient of b, and put the gradient by a block's logits where it is pulled from.

        Given logits have it as their own gradient. Otherwise it is written over some of the same
        shape, unless it is all of the chunk's, and returned for the chunk.
        """
        if out.b is not None:
            out.b.add_(gradient.sum(0))
        if self.layer.W is None and out.x is not None:
            out.x[self.rows][block] = gradient.flatten(1)
        if self.layer.W is None or (out.x is None and out.W is None):
            return kept
        gradient = gradient.flatten(1)
        if gradient.shape == to.shape and gradient.dtype == to.dtype:
            return gradient
        to[block] = gradient
        return to

    def pull_back(self, out: Layer, g: Tensor | None) -> None:
        """Write the gradient of the chunk's x, and add the gradient of W."""
        if g is None:
            return
        g = self.multiplied(g)
        if out.x is not None:
            pull_to_rows(g, self.layer.W, out.x[self.rows])
        if out.W is not None:
            add_pulled_to_classes_(out.W, g, self.x)

    def multiplied(self, g: Tensor) -> Tensor:
        """A gradient by logits in the dtype of the products."""
        W = self.layer.W
        return cast(g, multiplied_in(W.dtype, W.device))

    def sums(self, work: Work) -> Layer:
        """The gradients, of which x has its sum over all ranks that hold classes."""
        x, ranks = self.out.x, work.function.across
        if x is None or ranks is None:
            return self.out
        (total,) = ranks.total(x.to(accumulation_dtype(x.dtype)))
        return self.out._replace(x=total.to(x.dtype))


def first_order(
    work: Work, factors: tuple[Any, ...], needed: Operands, *, values_too: bool = True
) -> tuple[tuple[Tensor, ...], Operands]:
    """The results of the rows that count, if asked for, with the gradients that are needed.

    There is a factor for each result, its cotangent: one for each row, or one for all.
    """
    function, given = work.function, work.operands.others
    pairs = zip(work.operands.layers, needed.layers, strict=True)
    heads = [_Head(*pair, work) for pair in pairs]
    by_logits = tuple(map(any, needed.layers))
    needs = Parts(by_logits, needed.others, (values_too,) * function.results)
    results: list[Tensor] = []
    others = work.like_others(needed.others)
    for chunk in slices(work.count, work.how.step):
        logits = [head.load(chunk, work) for head in heads]
        g: list[Tensor | None] = [None] * len(heads)
        for block, rows in work.blocks(chunk, logits[-1]):
            at = work.parts((cut(z, block) for z in logits), rows, given, factors)
            first = function.first(at, needs)
            if values_too:
                write(results, rows, first.results, work.count)
            for i, (head, gradient) in enumerate(zip(heads, first.logits, strict=True)):
                if gradient is not None:
                    g[i] = head.add(head.out, block, gradient, head.z, g[i])
            work.add_to_others(others, first.others, rows)
            del at, first  # before the next ones are made, which may be as large as a chunk
        for head, gradient in zip(heads, g, strict=True):
            head.pull_back(head.out, gradient)
    return tuple(results), Operands(tuple(head.sums(work) for head in heads), tuple(others))


class _MovingHead(_Head):
    """A layer whose logits move along M directions, with the changes of its gradients."""

    def __init__(self, layer: Layer, needed: Layer, along: Layer, work: Work) -> None:
        x, W, _ = layer
        # A direction is a gradient's cotangent, which float32 sums of half precision have in
        # float32.
        self.along = Layer(*(None if u is None else u.to(x.dtype) for u in along))
        self.number = next((len(u) for u in self.along[1:] if u is not None), 1)
        super().__init__(layer, needed, work, self.number)
        self.together = max(1, min(self.number, FEW_CLASSES // self.classes))
        width = self.classes * self.together
        self.changes = None if W is None else _Buffer(layer, width, work)
        moves, wanted = self.along, self.out
        self.crosses = W is not None and bool(
            (wanted.x is not None and moves.W is not None)
            or (wanted.W is not None and moves.x is not None)
        )

    def load(self, rows: slice, work: Work) -> Tensor:
        """The logits of a chunk, with the change of its x."""
        ux, *_ = self.along
        self.ux = None if ux is None else read(ux, rows, work.index)
        return super().load(rows, work)

    def move(self, group: slice) -> Tensor:
        """The changes u = x uWᵀ + ux Wᵀ + ub along some of the directions, (n, m K)."""
        ux = self.ux
        if self.changes is None:
            return torch.zeros_like(self.x) if ux is None else ux
        _, uW, ub = self.along
        uW, ub = (None if u is None else u[group].flatten(0, 1) for u in (uW, ub))
        if uW is not None:
            u = self.changes.logits(self.x, uW, ub)
            return u if ux is None else add_multiplied_(u, ux, self.layer.W)
        if ux is not None:
            return self.changes.logits(ux, self.layer.W, ub)
        width = (group.stop - group.start) * self.classes
        u = self.x.new_zeros(len(self.x), width, dtype=self.changes.dtype)
        return u if ub is None else u.add_(ub)

    def part(self, group: slice) -> Layer:
        """Where the changes along some of the directions go, of W as one matrix (m K, D)."""
        x, W, b = self.out
        return Layer(
            x, None if W is None else W[group].flatten(0, 1), None if b is None else b[group]
        )

    def add_crossed(self, out: Layer, g: Tensor) -> None:
        """Add g uW to the change of the chunk's ∂/∂x, and gᵀ ux to the change of ∂/∂W."""
        g = self.multiplied(g)
        if out.x is not None and self.along.W is not None:
            add_pulled_to_rows_(out.x[self.rows], g, self.along.W.squeeze(0))
        if out.W is not None and self.ux is not None:
            add_pulled_to_classes_(out.W, g, self.ux)


def second_order(
    work: Work,
    factors: tuple[Any, ...],
    along: tuple[Operands, tuple[Any, ...]],
    needed: Operands,
    asked: Mask,
) -> tuple[tuple[Tensor, ...], Operands]:
    """How gradients and results of one layer change along M directions: `first_order`'s twin.

    Args:
        work: What the loop goes over.
        factors: The cotangent of each result; 0 for none.
        along: A change of the operands, or M of them, and of the factors: a layer's W is (M, K, D)
            and its b (M, K). All else has its own shape, and moves only where M = 1. None is an
            operand that stays.
        needed: The gradients by which of the operands.
        asked: Which results.

    Returns:
        The changes of the results that are asked for, (N, M); and of the gradients that are needed,
        (M, ...) by W and b, and of its own shape by all else.
    """
    function, (moves, moved_factors) = work.function, along
    ((layer,), given), ((wanted,), wanted_others) = work.operands, needed
    ((along_layer,), along_others) = moves
    head = _MovingHead(layer, wanted, along_layer, work)
    results: list[Tensor] = []
    others = work.like_others(wanted_others)
    groups = list(slices(head.number, head.together))

    def point_of(block: slice, rows: slice) -> tuple[slice, slice, Parts, Any]:
        at = work.parts((cut(head.z, block),), rows, given, factors)
        return block, rows, at, function.point(at)

    for chunk in slices(work.count, work.how.step):
        points: Iterable[Any] = starmap(point_of, work.blocks(chunk, head.load(chunk, work)))
        points = points if len(groups) == 1 else list(points)
        for group in groups:
            change, out = head.move(group), head.part(group)
            h: Tensor | None = None
            g: Tensor | None = None
            for block, rows, at, point in points:
                u = cut(change, block).unflatten(1, (-1, head.classes))
                direction = work.parts((u,), rows, along_others, moved_factors)
                second = function.second(point, at, direction, asked)
                if not results:
                    shape = (work.count, head.number)
                    results += [slope.new_empty(shape) for slope in second.results]
                for result, slope in zip(results, second.results, strict=True):
                    result[rows, group] = slope
                work.add_to_others(others, second.others, rows)
                (change_of_g,) = second.logits
                h = head.add(out, block, change_of_g, change, h)
                if head.crosses:
                    (by_z,) = function.gradient(point, at)
                    g = head.add(out._replace(b=None), block, by_z, head.z, g)
                del at, point, second
            head.pull_back(out, h)
            if g is not None:
                head.add_crossed(out, g)
    return tuple(results), Operands((head.sums(work),), tuple(others))


# The loops as sweeps of a plan and of its derivatives.


@dataclass(frozen=True)
class LoopSweep:
    """A loop over all rows for the results, their gradients, or the changes of these.

    A mask has a place for each operand and one for each result behind. The plan itself has the
    derivatives of the second order.

    Args:
        function, how: The row function, and how its logits are computed.
        order: 0 for results, 1 for gradients, 2 for changes along a direction.
        wanted: The gradients by which operands, and which results.
        moved: Of which operands and cotangents the direction is given; None of it is what stays.
        has_factors: Whether a cotangent of each result is given; else all are 0.
        many: Whether the directions are M, of layers' W and b alone.
    """

    function: RowFunction
    how: How
    order: int
    wanted: Mask
    moved: Mask = ()
    has_factors: bool = True
    many: bool = False

    @property
    def operands(self) -> int:
        """The number of operands."""
        return len(self.function.has_rows)

    @property
    def rows_out(self) -> Mask:
        """Which of the gradients and results have rows."""
        has_rows = (*self.function.has_rows, *(True,) * self.function.results)
        return select(has_rows, self.wanted)

    def run(self, tensors: Tensors, index: Tensor | None) -> tuple[Tensor, ...]:
        """The results or gradients, of the shapes of what they are by."""
        function = self.function
        at, rest = split(tensors, self.operands)
        by_operands, of_results = split(self.wanted, self.operands)
        needed = function.operands(by_operands)
        work = Work(function, self.how, function.operands(at), index)
        if self.order == 2:
            slopes, changes = self._changes(work, rest, needed, of_results)
            return (*select(changes.flat(), by_operands), *slopes)
        factors = _zeros(rest or (None,) * function.results)
        values, gradients = first_order(work, factors, needed, values_too=self.order == 0)
        return values if self.order == 0 else select(gradients.flat(), by_operands)

    def _changes(
        self, work: Work, rest: Tensors, needed: Operands, asked: Mask
    ) -> tuple[tuple[Tensor, ...], Operands]:
        cotangents, given = split(rest, work.function.results if self.has_factors else 0)
        moves = merge((None,) * len(self.moved), self.moved, given)
        operands, moved_factors = split(moves, self.operands)
        factors = cotangents or (None,) * work.function.results
        ((x, *Wb),), others = work.function.operands(operands)
        if not self.many:
            Wb = [None if t is None else t.unsqueeze(0) for t in Wb]
        along = Operands((Layer(x, *Wb),), others), _zeros(moved_factors)
        slopes, changes = second_order(work, _zeros(factors), along, needed, asked)
        if self.many:
            return slopes, changes
        ((x, *Wb),), others = changes
        layer = Layer(x, *(None if t is None else t.squeeze(0) for t in Wb))
        return tuple(slope.squeeze(1) for slope in slopes), Operands((layer,), others)

    def vjp(self, wanted: Mask) -> "LoopSweep | None":
        """The sweep of the gradients, or of the changes along their cotangents."""
        if self.order == 0:
            return replace(self, order=1, wanted=(*wanted, *(False,) * self.function.results))
        if self.order == 1 and self.function.has_second:
            return replace(self, order=2, moved=self.wanted, wanted=wanted)
        return None

    def jvp(self) -> "LoopSweep | None":
        """The sweep of the changes along tangents: the Hessian is symmetric.

        Results are linear in factors, so that their tangents are changes of gradients too.
        """
        if self.order == 2 or not self.function.has_second:
            return None
        moved = (True,) * self.operands + (self.order == 1,) * self.function.results
        return replace(self, order=2, moved=moved, has_factors=self.order == 1)

    def batch(self, batched: Mask, present: Mask) -> "LoopSweep | None":
        """The sweep for M directions of W and b, if all that is given of them is batched."""
        function, given = self.function, sum(self.moved)
        if self.order != 2 or self.many or function.across is not None:
            return None
        at_rest = (False,) * (len(batched) - given)
        if batched != (*at_rest, *present[len(at_rest) :]):
            return None
        is_moving = merge((False,) * len(self.moved), self.moved, present[len(at_rest) :])
        moves, needed = (split(mask, self.operands) for mask in (is_moving, self.wanted))
        along, wanted = (function.operands(mask) for mask, _ in (moves, needed))
        of_rows = (layer.x for layer in (*along.layers, *wanted.layers))
        if any((*of_rows, *along.others, *wanted.others, *moves[1])) or not any(is_moving):
            return None
        return replace(self, many=True)


def _zeros(factors: Tensors) -> tuple[Any, ...]:
    return tuple(0.0 if factor is None else factor for factor in factors)


def results_sweep(function: RowFunction, how: How) -> LoopSweep:
    """The sweep of all results."""
    wanted = (False,) * len(function.has_rows) + (True,) * function.results
    return LoopSweep(function, how, 0, wanted)


def plan_of(function: RowFunction, how: How) -> Plan:
    """The plan of a row function, with the loops as its sweeps."""
    results = (True,) * function.results
    sweep = results_sweep(function, how)
    return Plan(function.definition(how), function.has_rows, results, how.step, sweep)


def total_of(function: RowFunction, how: How, index: Tensor | None) -> Total:
    """The sum of all results, each times its factor, with gradients."""
    plan = plan_of(function, how).for_rows(index)

    def run(tensors: Tensors, wanted: Mask) -> Sum:
        at, factors = split(tensors, len(plan.rows_in))
        needed, by_factors = split(wanted, len(plan.rows_in))
        return sum_with_gradients(
            Work(function, how, function.operands(at), index), factors, needed, by_factors
        )

    return Total(plan, run, complete=lambda tensors: tensors)


def sum_with_gradients(work: Work, factors: Tensors, needed: Mask, by_factors: Mask) -> Sum:
    """The sum over the rows that count, with the gradients of operands and of factors."""
    function, index = work.function, work.index
    one = tuple(1.0 if factor is None else factor for factor in factors)
    values, gradients = first_order(work, one, function.operands(needed))
    every = slice(0, work.count)
    counting = (None if factor is None else read(factor, every, index) for factor in factors)
    total = sum_of_products(values, tuple(counting))
    wanted, has_rows = (*needed, *by_factors), (*function.has_rows, *(True,) * function.results)
    present = select((*gradients.flat(), *values), wanted)
    (layer, *_), _ = work.operands
    present = put_back(present, select(has_rows, wanted), index, len(layer.x))
    return Sum(total, merge((None,) * len(wanted), wanted, present))
