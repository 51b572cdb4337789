"""One loop over chunks of rows for any function of their logits, and its twin of second order.

A row function takes a row's logits z = x Wᵀ + b, of one layer or several, and what belongs to the
row to numbers. With a cotangent for each of them and g = ∂/∂z of the function alone,

    ∂/∂x = g W,  ∂/∂W = gᵀ x,  ∂/∂b = Σ_n g,

and along a direction, in which the logits move by u = ux Wᵀ + x uWᵀ + ub and g by h,

    ∂/∂x changes by h W + g uW,  ∂/∂W by hᵀ x + gᵀ ux,  ∂/∂b by Σ_n h.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._autograd import Mask, Tensors, merge, select, split
from ._chunked import (
    Plan,
    Rows,
    Sum,
    Total,
    chunks_of_rows,
    cut,
    empty_rows,
    slices,
    sum_of_products,
    write,
)
from ._dtypes import accumulation_dtype, cast
from ._formulas import Across
from ._products import (
    add_multiplied_,
    add_pulled_to_classes_,
    add_pulled_to_rows_,
    multiplied_in,
    multiply,
    pull_to_rows,
)

# Logits that fit a core's own cache beside a few passes over them, measured on a CPU; and the cores
# that share a block, so that it stays small beside a chunk.
_CACHED_LOGITS = 2**17
_MOST_CORES = 32
# On other devices few large kernels are better, in memory that stays below 2²⁶ logits.
_LAUNCHED_LOGITS = 2**26
# Up to this many classes, W xᵀ is a faster product than x Wᵀ.
FEW_CLASSES = 32


class Layer(NamedTuple):
    """A linear layer with what it is applied to, or one thing for each of these."""

    x: Any  # (N, D); or without a W, the logits (N, K) themselves
    W: Any = None  # (K, D)
    b: Any = None  # (K,)


class Operands(NamedTuple):
    """What a row function is applied to, or one thing for each of these."""

    layers: tuple[Layer, ...]
    others: tuple[Any, ...]

    def flat(self) -> tuple[Any, ...]:
        """All in one tuple, as a plan takes them."""
        return (*(t for layer in self.layers for t in layer), *self.others)


@dataclass(frozen=True)
class How:
    """How the logits are computed.

    Args:
        step: The number of rows of a chunk.
        dtype: The dtype of S and of the numbers of a row.
        logits_dtype: The dtype of the logits, as they come out of the layer's products.
    """

    step: int
    dtype: torch.dtype
    logits_dtype: torch.dtype


class Parts(NamedTuple):
    """Tensors of some rows: one for each layer's logits, each other tensor and each result.

    A row function is given logits and others with the cotangents of its results; a direction has a
    change of each of these. It returns gradients, or their changes, and its results. A mask of this
    form says which of them are needed, and None is one that is not.
    """

    logits: tuple[Any, ...]  # (n, K); changes along M directions are (n, M, K)
    others: tuple[Any, ...]  # (n, ...) of those with rows
    results: tuple[Any, ...] = ()  # (n, ...), changes (n, M); a cotangent may be a number for all


class RowFunction:
    """A function of the logits of some rows, with what is known of its derivatives by hand.

    A call is the definition, in operations that autograd differentiates to any order; `first` and
    `second` are faster, and equal to it.
    """

    layers = 1  # whose logits it takes
    has_second = False  # whether there is a `second`, with `point` and `gradient`
    rows_in: Mask = ()  # which of the tensors beside the logits have rows
    results: int = 1  # their number; each has rows
    across: Across | None = None  # how sums over sharded classes are combined

    @property
    def has_rows(self) -> Mask:
        """Which of its operands have rows."""
        return (*(*Layer(True, False, False),) * self.layers, *self.rows_in)

    def __call__(self, logits: tuple[Tensor, ...], others: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The results (n, ...) for logits (n, K)."""
        raise NotImplementedError

    def first(self, at: Parts, needed: Parts) -> Parts:
        """The gradients and results that are needed; a layer's logits may be written to."""
        raise NotImplementedError

    def point(self, at: Parts) -> Any:
        """What `second` and `gradient` have to know of some rows, along whatever direction."""
        raise NotImplementedError

    def second(self, point: Any, at: Parts, along: Parts, needed: Mask) -> Parts:
        """How the gradients change along directions, and the results that are needed."""
        raise NotImplementedError

    def gradient(self, point: Any, at: Parts) -> tuple[Tensor, ...]:
        """The gradient by each layer's logits, (n, K)."""
        raise NotImplementedError

    def told(self) -> tuple[list[str], list[float]]:
        """The words and numbers that tell the function, for an operator."""
        raise NotImplementedError

    @classmethod
    def from_told(cls, words: list[str], numbers: list[float]) -> "RowFunction":
        """The function that is told by words and numbers."""
        raise NotImplementedError

    def operands(self, values: Any) -> Operands:
        """The operands that a flat tuple holds."""
        each = len(Layer._fields)
        of_layers, others = split(values, self.layers * each)
        starts = range(0, self.layers * each, each)
        return Operands(tuple(Layer(*of_layers[i : i + each]) for i in starts), others)


def logits_of(layer: Layer, how: How) -> Tensor:
    """The logits of all rows of a layer, to be differentiated."""
    x, W, b = layer
    if W is not None:
        dtype = how.logits_dtype
        x = linear(cast(x, dtype), cast(W, dtype), None if b is None else cast(b, dtype))
    return cast(x, how.dtype)


def definition_of(function: RowFunction, how: How) -> Callable[..., tuple[Tensor, ...]]:
    """A row function of its operands, in operations that can be differentiated to any order."""

    def fn(*tensors: Any) -> tuple[Tensor, ...]:
        if function.across is not None:
            raise NotImplementedError(
                "a third derivative, which torch.autograd.functional.hvp takes and vhp does not, "
                "needs all classes in one process, got a linear_weight that is sharded"
            )
        layers, others = function.operands(tensors)
        return function(tuple(logits_of(layer, how) for layer in layers), others)

    return fn


def plan_of(function: RowFunction, how: How) -> Plan:
    """The plan of a row function, with the loops as its sweeps."""
    fn, results = definition_of(function, how), (True,) * function.results
    return Plan(fn, function.has_rows, results, how.step, ValuesSweep(function, how))


def total_of(function: RowFunction, how: How, index: Tensor | None) -> Total:
    """The sum of all results, each times its factor, with gradients."""
    plan = plan_of(function, how).for_rows(index)

    def run(tensors: Tensors, wanted: Mask) -> Sum:
        at, factors = split(tensors, len(plan.rows_in))
        needed, by_factors = split(wanted, len(plan.rows_in))
        work = Work(function, how, function.operands(at), index)
        one = tuple(1.0 if factor is None else factor for factor in factors)
        values, gradients = first_order(work, one, function.operands(needed))
        pairs = zip(values, by_factors, strict=True)
        return Sum(
            sum_of_products(values, factors, index),
            (*gradients.flat(), *(value if wanted else None for value, wanted in pairs)),
        )

    return Total(plan, run, complete=lambda tensors: tensors)


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


class Logits:
    """The logits of a chunk, in a buffer that all chunks share, and the blocks to go over them.

    Fresh memory costs a CPU more than the arithmetic done in it.
    """

    def __init__(self, rows: int, like: Tensor, classes: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.buffer = like.new_empty(rows if classes > FEW_CLASSES else 0, classes, dtype=dtype)

    def of(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The logits x Wᵀ + b, (n, K), which lie in the buffer where there are many classes."""
        if len(W) <= FEW_CLASSES:
            W, x = cast(W, self.dtype), cast(x, self.dtype)
            b = None if b is None else cast(b, self.dtype)
            return (W @ x.t() if b is None else torch.addmm(b.unsqueeze(1), W, x.t())).t()
        return multiply(x, W, b, self.buffer[: len(x), : len(W)])


def blocks_of(z: Tensor, ranks: Across | None = None) -> Iterator[slice]:
    """The rows of a chunk's logits to go over at a time, so that a CPU finds them in its cache."""
    # Ranks wait for one another at every block: one is enough.
    if z.device.type != "cpu" or ranks is not None:
        return slices(len(z), len(z) or 1)
    return slices(len(z), cached_rows(z.shape[1]))


class Work(NamedTuple):
    """What a loop goes over."""

    function: RowFunction
    how: How
    operands: Operands
    index: Tensor | None = None  # of the rows that count, (n,); None for all

    @property
    def count(self) -> int:
        """N."""
        first, *_ = self.operands.layers
        return len(first.x)

    def chunks(self) -> Iterator["Chunk"]:
        """The rows that count, with logits in buffers that the next chunk writes over."""
        how, layers, rows_of = self.how, self.operands.layers, self.index
        rows = min(how.step, self.count if rows_of is None else len(rows_of))
        buffers = [
            None if W is None else Logits(rows, x, len(W), how.logits_dtype) for x, W, _ in layers
        ]
        for part in chunks_of_rows(self.count, how.step, rows_of):
            inputs = [cut(layer.x, part) for layer in layers]
            logits = [
                x if buffer is None else buffer.of(x, layer.W, layer.b)
                for buffer, x, layer in zip(buffers, inputs, layers, strict=True)
            ]
            first, *_ = logits
            yield Chunk(part, inputs, logits, list(blocks_of(first, self.function.across)))

    def parts(self, chunk: "Chunk", block: slice, factors: tuple[Any, ...]) -> Parts:
        """What the row function is given of a block of a chunk's rows."""
        rows = chunk.rows_of(block)
        logits = tuple(cast(cut(z, block), self.how.dtype) for z in chunk.logits)
        return Parts(logits, *self.rows(rows, self.operands.others, factors))

    def rows(
        self, rows: Rows, others: tuple[Any, ...], factors: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The rows of other tensors, and of factors."""
        pairs = zip(others, self.function.rows_in, strict=True)
        return (
            tuple(t if t is None or not has_rows else cut(t, rows) for t, has_rows in pairs),
            tuple(
                cast(cut(f, rows), self.how.dtype) if isinstance(f, Tensor) else f for f in factors
            ),
        )


class Chunk(NamedTuple):
    """Some rows, with the input and the logits of each layer."""

    rows: Rows
    inputs: list[Tensor]
    logits: list[Tensor]
    blocks: list[slice]  # of these rows, that a CPU finds in its cache

    def rows_of(self, block: slice) -> Rows:
        """A block of these rows, counted among all rows."""
        if isinstance(self.rows, Tensor):
            return cut(self.rows, block)
        return slice(self.rows.start + block.start, self.rows.start + block.stop)


def first_order(
    work: Work, factors: tuple[Any, ...], needed: Operands, *, values_too: bool = True
) -> tuple[tuple[Tensor, ...], Operands]:
    """The results of all rows, if asked for, with the gradients that are needed.

    There is a factor for each result, its cotangent: one for each row, or one for all.
    """
    function, layers = work.function, work.operands.layers
    results: list[Tensor] = []
    out = _sums(work, needed)
    logits_needed = tuple(map(any, needed.layers))
    needs = Parts(logits_needed, needed.others, (values_too,) * function.results)
    for chunk in work.chunks():
        gradients = list(chunk.logits)
        for block in chunk.blocks:
            rows = chunk.rows_of(block)
            first = function.first(work.parts(chunk, block, factors), needs)
            if values_too:
                _write_among(results, first.results, rows, work)
            for i in compress(range(len(layers)), logits_needed):
                if layers[i].W is None:
                    _place(out.layers[i].x, rows, first.logits[i])
                else:
                    sums, z = out.layers[i], chunk.logits[i]
                    gradients[i] = _add_gradient(sums, z, block, first.logits[i])
            _add_to_others(out.others, first.others, work, rows)
            del first  # before the next one is made, as it may be as large as a chunk
        for layer, sums, x, g in zip(layers, out.layers, chunk.inputs, gradients, strict=True):
            _pull_back(sums, layer._replace(x=x), g, chunk.rows)
    return tuple(results), _over_ranks(out, work)


class Direction(NamedTuple):
    """A change of the operands and of the cotangents, or M of them.

    A layer's W is (M, K, D) and its b (M, K). All else has its own shape, and moves only where
    M = 1. What stays is None, or 0 for a cotangent.
    """

    operands: Operands
    factors: tuple[Any, ...]


def second_order(
    work: Work, factors: tuple[Any, ...], along: Direction, needed: Operands, asked: Mask
) -> tuple[tuple[Tensor, ...], Operands]:
    """How gradients and results change along M directions: the twin of `first_order`.

    Returns:
        The changes of the results that are asked for, (N, M); and of the gradients that are needed,
        (M, ...) by W and b, and of its own shape by all else.
    """
    second = _Second(work, factors, along, needed, asked)
    for chunk in work.chunks():
        parts = (work.parts(chunk, block, factors) for block in chunk.blocks)
        points: Any = ((at, work.function.point(at)) for at in parts)
        if len(second.groups) > 1:
            points = list(points)
        for group in second.groups:
            second.add(chunk, group, points)
    return tuple(second.results), _over_ranks(second.out, work)


class _Second:
    """The changes along M directions, on the way."""

    def __init__(
        self,
        work: Work,
        factors: tuple[Any, ...],
        along: Direction,
        needed: Operands,
        asked: Mask,
    ) -> None:
        self.work, self.along, self.asked = work, along, asked
        pairs = zip(work.operands.layers, along.operands.layers, strict=True)
        self.moves = [_Moves(*pair, work) for pair in pairs]
        self.number = max(move.number for move in self.moves)
        few = FEW_CLASSES // max(move.classes for move in self.moves)
        self.groups = list(slices(self.number, max(1, few)))
        self.out = _sums(work, needed, self.number)
        pairs = zip(self.moves, self.out.layers, strict=True)
        self.crosses = any(move.crosses(out) for move, out in pairs)
        self.results: list[Tensor] = []

    def add(self, chunk: "Chunk", group: slice, points: Iterable[tuple[Parts, Any]]) -> None:
        """Add what a chunk's rows come to along some of the directions."""
        function, layers = self.work.function, self.work.operands.layers
        pairs = zip(self.moves, chunk.inputs, strict=True)
        changes = [move.along(x, chunk.rows, group) for move, x in pairs]
        h, g = list(changes), list(chunk.logits)
        out = [_of_group(sums, group) for sums in self.out.layers]
        for block, (at, point) in zip(chunk.blocks, points, strict=True):
            rows = chunk.rows_of(block)
            second = function.second(point, at, self._moved(changes, block, rows), self.asked)
            self._write(second.results, rows, group)
            _add_to_others(self.out.others, second.others, self.work, rows)
            for i, change in enumerate(second.logits):
                if layers[i].W is None and out[i].x is not None:
                    _place(out[i].x, rows, change.squeeze(1))
                elif layers[i].W is not None:
                    h[i] = _add_gradient(out[i], changes[i], block, change)
            if self.crosses:
                for i, gradient in enumerate(function.gradient(point, at)):
                    g[i] = _put(chunk.logits[i], block, gradient)
            del second, point
        for i, move in enumerate(self.moves):
            layer = layers[i]._replace(x=chunk.inputs[i])
            _pull_back(out[i], layer, h[i], chunk.rows)
            if move.crosses(out[i]):
                _add_crossed(out[i], move, g[i], chunk.rows)

    def _moved(self, changes: list[Tensor], block: slice, rows: Rows) -> Parts:
        """The direction of a block of rows."""
        pairs = zip(changes, self.moves, strict=True)
        logits = tuple(
            cast(cut(u, block), self.work.how.dtype).unflatten(1, (-1, move.classes))
            for u, move in pairs
        )
        others, factors = self.along.operands.others, self.along.factors
        return Parts(logits, *self.work.rows(rows, others, factors))

    def _write(self, slopes: tuple[Tensor, ...], rows: Rows, group: slice) -> None:
        """Write how the results of some rows change along some of the directions."""
        if not self.results:
            shape = self.work.count, self.number
            self.results += [slope.new_zeros(shape) for slope in slopes]
        for result, slope in zip(self.results, slopes, strict=True):
            result[rows, group] = slope


class _Moves:
    """How a layer's logits move along M directions."""

    def __init__(self, layer: Layer, direction: Layer, work: Work) -> None:
        x, W, _ = layer
        self.layer = layer
        # A direction is a gradient's cotangent, which float32 sums of half precision have in
        # float32.
        self.x, self.W, self.b = (None if u is None else u.to(x.dtype) for u in direction)
        self.number = next((len(u) for u in (self.W, self.b) if u is not None), 1)
        self.classes = x.shape[1] if W is None else len(W)
        self.dtype = work.how.logits_dtype
        width = self.classes * max(1, min(self.number, FEW_CLASSES // self.classes))
        rows = min(work.how.step, work.count)
        self.buffer = None if W is None else Logits(rows, x, width, self.dtype)

    def crosses(self, out: Layer) -> bool:
        """Whether the layer's own g takes part in the changes of its gradients."""
        if self.layer.W is None:
            return False
        return (out.x is not None and self.W is not None) or (
            out.W is not None and self.x is not None
        )

    def along(self, x: Tensor, rows: Rows, group: slice) -> Tensor:
        """The changes u = x uWᵀ + ux Wᵀ + ub along some of the directions, (n, m K)."""
        ux = None if self.x is None else cut(self.x, rows)
        if self.buffer is None:
            return torch.zeros_like(x) if ux is None else ux
        uW, ub = (None if u is None else u[group].flatten(0, 1) for u in (self.W, self.b))
        if uW is not None:
            u = self.buffer.of(x, uW, ub)
            return u if ux is None else add_multiplied_(u, ux, self.layer.W)
        if ux is not None:
            return self.buffer.of(ux, self.layer.W, ub)
        u = x.new_zeros(len(x), (group.stop - group.start) * self.classes, dtype=self.dtype)
        return u if ub is None else u.add_(ub)


def _sums(work: Work, needed: Operands, number: int = 0) -> Operands:
    """Where needed gradients go, or their changes along a number of directions."""

    def of_layer(layer: Layer, wanted: Layer) -> Layer:
        x, W, b = layer
        sums, many = accumulation_dtype(x.dtype), (number,) if number else ()
        return Layer(
            x=_gradient_like(x, True, work.index) if wanted.x else None,
            W=x.new_zeros((*many, *W.shape), dtype=sums) if wanted.W else None,
            b=x.new_zeros((*many, *b.shape), dtype=sums) if wanted.b else None,
        )

    (layers, others), rows_in = work.operands, work.function.rows_in
    pairs = zip(layers, needed.layers, strict=True)
    triples = zip(others, rows_in, needed.others, strict=True)
    return Operands(
        tuple(of_layer(*pair) for pair in pairs),
        tuple(_gradient_like(t, r, work.index) if w else None for t, r, w in triples),
    )


def _of_group(out: Layer, group: slice) -> Layer:
    """Where the changes along some of the directions go, of W as one matrix (m K, D)."""
    return Layer(
        out.x,
        None if out.W is None else out.W[group].flatten(0, 1),
        None if out.b is None else out.b[group],
    )


def _gradient_like(tensor: Tensor, has_rows: bool, index: Tensor | None) -> Tensor:
    """Where the gradient of a tensor goes: rows to be written, or a sum that starts at 0."""
    if has_rows:
        return empty_rows(len(tensor), tensor, index)
    return torch.zeros_like(tensor, dtype=accumulation_dtype(tensor.dtype))


def _add_gradient(out: Layer, logits: Tensor, block: slice, gradient: Tensor) -> Tensor:
    """Add the gradient of b, and put the gradient of logits where the products find it."""
    if out.b is not None:
        out.b.add_(gradient.sum(0))
    if out.x is None and out.W is None:
        return logits
    return _put(logits, block, gradient.flatten(1))


def _add_to_others(
    totals: tuple[Any, ...], gradients: tuple[Any, ...], work: Work, rows: Rows
) -> None:
    """Write the gradients of rows, and add up the gradients of what all rows share."""
    for total, gradient, has_rows in zip(totals, gradients, work.function.rows_in, strict=True):
        if total is not None and has_rows:
            _place(total, rows, gradient)
        elif total is not None:
            total.add_(gradient)


def _place(total: Tensor, rows: Rows, values: Tensor) -> None:
    """Write the values of some rows."""
    total[rows] = cast(values, total.dtype)  # which only a slice would do by itself


def _put(into: Tensor, block: slice, value: Tensor) -> Tensor:
    """Write a block of a chunk's rows; or return the block where it is the whole chunk."""
    if value.shape == into.shape and value.dtype == into.dtype:
        return value
    into[block] = value
    return into


def _write_among(results: list[Tensor], values: tuple[Tensor, ...], rows: Rows, work: Work) -> None:
    """Write the results of some rows among the results of all rows."""
    if not results and isinstance(rows, slice) and rows.stop - rows.start >= work.count:
        results += values
        return
    # Made once: small tensors that stay between large ones that go would break up the heap.
    if not results:
        results += [empty_rows(work.count, value, work.index) for value in values]
    for result, value in zip(results, values, strict=True):
        write(result, rows, value)


def _pull_back(out: Layer, layer: Layer, g: Tensor, rows: Rows) -> None:
    """Write the gradient of a chunk's x, and add the gradient of W, for the gradient of logits."""
    x, W, _ = layer
    if W is None or (out.x is None and out.W is None):
        return
    g = cast(g, multiplied_in(W.dtype, W.device))
    if out.x is not None:
        by_x = out.x[rows] if isinstance(rows, slice) else torch.empty_like(x)
        pull_to_rows(g, W, by_x)
        if not isinstance(rows, slice):
            out.x[rows] = by_x
    if out.W is not None:
        add_pulled_to_classes_(out.W, g, x)


def _add_crossed(out: Layer, move: _Moves, g: Tensor, rows: Rows) -> None:
    """Add g uW to the change of a chunk's ∂/∂x, and gᵀ ux to the change of ∂/∂W."""
    g = cast(g, multiplied_in(move.layer.W.dtype, move.layer.W.device))
    if out.x is not None and move.W is not None:
        by_x = out.x[rows]  # a copy where the rows are an index
        add_pulled_to_rows_(by_x, g, move.W.squeeze(0))
        if not isinstance(rows, slice):
            out.x[rows] = by_x
    if out.W is not None and move.x is not None:
        add_pulled_to_classes_(out.W, g, cut(move.x, rows))


def _over_ranks(out: Operands, work: Work) -> Operands:
    """Gradients, of which x has its sum over all ranks that hold classes."""
    ranks = work.function.across
    if ranks is None:
        return out
    (layer,) = out.layers
    if layer.x is None:
        return out
    (x,) = ranks.total(layer.x.to(accumulation_dtype(layer.x.dtype)))
    return out._replace(layers=(layer._replace(x=x.to(layer.x.dtype)),))


# The loops as sweeps of a plan and of its derivatives.


@dataclass(frozen=True)
class ValuesSweep:
    """The results of all rows.

    Here and below, a mask has a place for each operand, and mostly one for each result behind.
    """

    function: RowFunction
    how: How

    @property
    def operands(self) -> int:
        """The number of operands."""
        return len(self.function.has_rows)

    @property
    def outputs(self) -> Mask:
        """Of which operands and results there are gradients, values or changes."""
        return self._mask(False, True)

    def _mask(self, of_operands: bool, of_results: bool) -> Mask:
        return (of_operands,) * self.operands + (of_results,) * self.function.results

    @property
    def masks(self) -> Mask:
        """What tells the sweep, for an operator."""
        return ()

    @classmethod
    def of_masks(cls, function: RowFunction, how: How, masks: Mask) -> "ValuesSweep":
        """The sweep of these masks."""
        return ValuesSweep(function, how)

    def run(self, tensors: Tensors, index: Tensor | None) -> tuple[Tensor, ...]:
        """The results, (N, ...)."""
        function = self.function
        nothing = function.operands((False,) * self.operands)
        work = Work(function, self.how, function.operands(tensors), index)
        values, _ = first_order(work, (), nothing)
        return values

    def vjp(self, wanted: Mask) -> "ValuesSweep | None":
        """The sweep of the gradients."""
        return GradientSweep(self.function, self.how, wanted)

    def jvp(self) -> "ValuesSweep | None":
        """The sweep of the tangents, which are second derivatives: T is linear in its factors."""
        if not self.function.has_second:
            return None
        moved, wanted = self._mask(True, False), self._mask(False, True)
        return SecondSweep(self.function, self.how, moved, wanted, has_factors=False)

    def batch(self, batched: Mask, present: Mask) -> "ValuesSweep | None":
        """No sweep for a batch."""
        return None


@dataclass(frozen=True)
class GradientSweep(ValuesSweep):
    """The gradients by the wanted operands, for cotangents of the results."""

    wanted: Mask = ()

    @property
    def outputs(self) -> Mask:
        """The gradients by operands."""
        return (*self.wanted, *(False,) * self.function.results)

    @property
    def masks(self) -> Mask:
        """The operands that are wanted."""
        return self.wanted

    @classmethod
    def of_masks(cls, function: RowFunction, how: How, masks: Mask) -> "ValuesSweep":
        """The sweep of these masks."""
        return GradientSweep(function, how, masks)

    def run(self, tensors: Tensors, index: Tensor | None) -> tuple[Tensor, ...]:
        """The gradients, each of the shape of its operand."""
        function = self.function
        at, cotangents = split(tensors, self.operands)
        factors = tuple(0.0 if c is None else c for c in cotangents)
        work = Work(function, self.how, function.operands(at), index)
        _, gradients = first_order(work, factors, function.operands(self.wanted), values_too=False)
        return select(gradients.flat(), self.wanted)

    def vjp(self, wanted: Mask) -> "ValuesSweep | None":
        """The sweep of the changes along the cotangents of the gradients."""
        if not self.function.has_second:
            return None
        return SecondSweep(self.function, self.how, self.outputs, wanted)

    def jvp(self) -> "ValuesSweep | None":
        """The sweep of the changes along tangents: the Hessian is symmetric."""
        if not self.function.has_second:
            return None
        return SecondSweep(self.function, self.how, self._mask(True, True), self.outputs)


@dataclass(frozen=True)
class SecondSweep(ValuesSweep):
    """The changes of gradients and results along a direction. The plan has their derivatives.

    Args:
        function, how: As above.
        moved: Of which operands and results the direction is given; None of it is what stays.
        wanted: The gradients by which operands change, and which results.
        has_factors: Whether a cotangent of each result is given; else there is none of any.
        many: Whether the directions are M, of a layer's W and b alone.
    """

    moved: Mask = ()
    wanted: Mask = ()
    has_factors: bool = True
    many: bool = False

    @property
    def outputs(self) -> Mask:
        """What is wanted."""
        return self.wanted

    @property
    def masks(self) -> Mask:
        """What moves and what is wanted, and what is given."""
        return (*self.moved, *self.wanted, self.has_factors, self.many)

    @classmethod
    def of_masks(cls, function: RowFunction, how: How, masks: Mask) -> "ValuesSweep":
        """The sweep of these masks."""
        *both, has_factors, many = masks
        moved, wanted = split(both, len(both) // 2)
        return SecondSweep(function, how, moved, wanted, has_factors, many)

    def run(self, tensors: Tensors, index: Tensor | None) -> tuple[Tensor, ...]:
        """The changes, each of the shape of what it is the change of."""
        function = self.function
        at, rest = split(tensors, self.operands)
        cotangents, given = split(rest, function.results if self.has_factors else 0)
        cotangents = cotangents or (None,) * function.results
        moves, moved_factors = split(
            merge((None,) * len(self.moved), self.moved, given), self.operands
        )
        direction = function.operands(moves)
        if not self.many:
            direction = direction._replace(layers=tuple(map(_one_of_many, direction.layers)))
        needed, asked = split(self.wanted, self.operands)
        slopes, changes = second_order(
            Work(function, self.how, function.operands(at), index),
            tuple(0.0 if c is None else c for c in cotangents),
            Direction(direction, tuple(0.0 if f is None else f for f in moved_factors)),
            function.operands(needed),
            asked,
        )
        if not self.many:
            changes = changes._replace(layers=tuple(map(_only, changes.layers)))
            slopes = tuple(slope.squeeze(1) for slope in slopes)
        return (*select(changes.flat(), needed), *slopes)

    def vjp(self, wanted: Mask) -> None:
        """No sweep of the third order."""

    def jvp(self) -> None:
        """No sweep of the third order."""

    def batch(self, batched: Mask, present: Mask) -> "ValuesSweep | None":
        """The sweep for M directions of W and b, if all that is given of them is batched."""
        function, given = self.function, sum(self.moved)
        is_moving = merge((False,) * len(self.moved), self.moved, present[-given:])
        operands, factors = split(is_moving, self.operands)
        if (
            self.many
            or function.across is not None
            or batched != (*(False,) * (len(batched) - given), *present[-given:])
        ):
            return None
        moves, (wanted, _) = function.operands(operands), split(self.wanted, self.operands)
        needed = function.operands(wanted)
        of_rows = (*(layer.x for layer in (*moves.layers, *needed.layers)), *moves.others)
        if any((*of_rows, *needed.others, *factors)) or not any(operands):
            return None
        return replace(self, many=True)


def _one_of_many(direction: Layer) -> Layer:
    x, W, b = direction
    return Layer(x, None if W is None else W.unsqueeze(0), None if b is None else b.unsqueeze(0))


def _only(change: Layer) -> Layer:
    x, W, b = change
    return Layer(x, None if W is None else W.squeeze(0), None if b is None else b.squeeze(0))
