"""How a row function is applied: eagerly by its plan, and in compiled code as an operator of torch.

A compiler calls an operator and never looks into a loop, so that one graph serves every number of
rows. The operators differentiate one another: the gradient of the values is the operator of the
gradients, whose gradient is the operator of second order, whose gradient raises.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.checkpoint import checkpoint

from .._transforms import is_plain, is_transformed
from ._autograd import Mask, Tensors, may_take_gradients, merge, select, split
from ._chunked import chunked, put_back, sum_of_products, taken_along
from ._dtypes import accumulation_dtype
from ._rows import How, Operands, RowFunction
from ._sweeps import LoopSweep, Work, plan_of, results_sweep, sum_with_gradients, total_of
from ._targets import Counted

_FUNCTIONS: dict[str, type[RowFunction]] = {}  # that an operator can name


def named_in_operators(function: type[RowFunction]) -> type[RowFunction]:
    """Let operators name a row function: its words and numbers tell it, as `RowFunction.told`."""
    _FUNCTIONS[function.__name__] = function
    return function


def results_of(
    function: RowFunction, how: How, operands: Operands, counted: Counted
) -> tuple[Tensor, ...]:
    """The results of all rows, to be differentiated to any order; 0 where a row is left out."""
    tensors = _read_rows(function, operands, counted)
    if not torch.compiler.is_compiling():
        return chunked(plan_of(function, how).for_rows(counted.index), *tensors)
    first, *_ = operands.layers
    # A compiler fuses the passes over given logits by itself. It takes what is differentiated in a
    # Function or an operator for the end of differentiation, but not plain operations.
    if first.W is None or is_transformed():
        return function.definition(how)(*tensors)
    if _is_named(function):
        return run_sweep(results_sweep(function, how), operands.flat(), counted.mask)
    return _in_a_graph(function, how, tensors)


def sum_of(
    function: RowFunction, how: How, operands: Operands, factors: Tensors, counted: Counted
) -> Tensor:
    """Σ_n Σ_i f_ni r_ni, with its gradients taken along where they will be asked for.

    There is a factor (N,) for each result; None stands for 1.
    """
    needed = any(t is not None and t.requires_grad for t in operands.flat())
    if needed and torch.is_grad_enabled() and all(map(is_plain, (*operands.flat(), *factors))):
        if not torch.compiler.is_compiling() and may_take_gradients():
            tensors = _read_rows(function, operands, counted)
            (total,) = taken_along(total_of(function, how, counted.index), *tensors, *factors)
            return total
        if torch.compiler.is_compiling() and _is_named(function) and not is_transformed():
            return run_total(function, how, operands, factors, counted.mask)
    results = map(counted.select, results_of(function, how, operands, counted))
    read = (None if factor is None else counted.select(factor) for factor in factors)
    return sum_of_products(tuple(results), tuple(read))


def _read_rows(function: RowFunction, operands: Operands, counted: Counted) -> Tensors:
    """The operands, with other rows in place of those that a mask leaves out, which may hold nan.

    A function by hand is finite at rows of 0, and any other one at rows that count.
    """
    if counted.mask is None:
        return operands.flat()
    read = counted.read_zeros if _is_named(function) else counted.read_others
    return tuple(
        read(t) if has_rows and t is not None else t
        for t, has_rows in zip(operands.flat(), function.has_rows, strict=True)
    )


def _is_named(function: RowFunction) -> bool:
    return type(function).__name__ in _FUNCTIONS


def _in_a_graph(function: RowFunction, how: How, tensors: Tensors) -> tuple[Tensor, ...]:
    """The results in plain operations, which a compiler differentiates, for each chunk anew."""
    first = next(tensor for tensor in tensors if tensor is not None)
    fn, pieces = function.definition(how), []
    # A graph is for one number of chunks, and all numbers of rows that have as many.
    for i in range(max(1, -(-first.shape[0] // how.step))):
        rows = slice(i * how.step, (i + 1) * how.step)
        pairs = zip(tensors, function.has_rows, strict=True)
        part = (t[rows] if has_rows and t is not None else t for t, has_rows in pairs)
        pieces.append(checkpoint(fn, *part, use_reentrant=False))
    return tuple(map(torch.cat, zip(*pieces, strict=True)))


# The sweeps as operators. A list that holds None is not differentiated, so that a mask names the
# tensors that are there. Words and numbers tell the sweep.
_SCHEMA = (
    "(Tensor[] tensors, Tensor? counted, bool[] present, str[] words, float[] numbers, int step, "
    "ScalarType dtype, ScalarType logits_dtype) -> Tensor[]"
)


def _described(sweep: LoopSweep, tensors: Tensors, counted: Tensor | None) -> tuple[Any, ...]:
    """A sweep and its tensors, in what an operator takes."""
    function, how = sweep.function, sweep.how
    words, numbers = function.told()
    masks = (sweep.wanted, sweep.moved, (sweep.has_factors, sweep.many))
    texts = ["".join("1" if named else "0" for named in mask) for mask in masks]
    return (
        [tensor for tensor in tensors if tensor is not None],
        counted,
        [tensor is not None for tensor in tensors],
        [type(function).__name__, str(sweep.order), *texts, *words],
        numbers,
        how.step,
        how.dtype,
        how.logits_dtype,
    )


def _read(
    tensors: Any,
    counted: Any,
    present: list[bool],
    words: list[str],
    numbers: list[float],
    *how: Any,
) -> tuple[LoopSweep, Tensors]:
    """The sweep that was described, and all its tensors."""
    (name, order), rest = split(words, 2)
    texts, told = split(rest, 3)
    function = _FUNCTIONS[name].from_told(list(told), numbers)
    masks = (tuple(named == "1" for named in text) for text in texts)
    wanted, moved, (has_factors, many) = masks
    sweep = LoopSweep(function, How(*how), int(order), wanted, moved, has_factors, many)
    return sweep, merge([None] * len(present), tuple(present), tensors)


def _index(counted: Tensor | None) -> Tensor | None:
    return None if counted is None else Counted.of(counted).index


def _like_results(sweep: LoopSweep, tensors: Tensors) -> list[Tensor]:
    """Tensors of the shapes and dtypes of gradients by operands, or of results."""
    operands, of_results = split(sweep.wanted, sweep.operands)
    at, _ = split(tensors, sweep.operands)
    gradients = [
        torch.empty_like(
            t,
            dtype=t.dtype if has_rows else accumulation_dtype(t.dtype),
            memory_format=torch.contiguous_format,
        )
        for t, has_rows in select(zip(at, sweep.function.has_rows, strict=True), operands)
    ]
    first = next(tensor for tensor in at if tensor is not None)
    row = first.new_empty(first.shape[:1], dtype=sweep.how.dtype)
    return [*gradients, *(torch.empty_like(row) for wanted in of_results if wanted)]


@custom_op("torch_softmax::sweep", mutates_args=(), schema=_SCHEMA)
def _run(*description: Any) -> list[Tensor]:
    """The results of a sweep."""
    sweep, tensors = _read(*description)
    _, counted, *_ = description
    index, (first, *_) = _index(counted), tensors
    assert first is not None
    return list(put_back(sweep.run(tensors, index), sweep.rows_out, index, len(first)))


@_run.register_fake
def _(*description: Any) -> list[Tensor]:
    sweep, tensors = _read(*description)
    return _like_results(sweep, tensors)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, counted, *ctx.description = inputs
    ctx.save_for_backward(*tensors, counted)


def _saved(ctx: Any) -> tuple[LoopSweep, Tensors, Tensor | None]:
    """The sweep, all its tensors and which rows count, as they were saved."""
    *tensors, counted = ctx.saved_tensors
    return *_read(tensors, counted, *ctx.description), counted


def _needed(ctx: Any) -> Mask:
    """Which of all tensors need a gradient."""
    of_present, *_ = ctx.needs_input_grad
    present, *_ = ctx.description
    return merge((False,) * len(present), tuple(present), of_present)


def _gradients(ctx: Any, gradients: Tensors) -> Any:
    """Gradients of all tensors, in what an operator's backward returns."""
    present, *_ = ctx.description
    return list(select(gradients, tuple(present))), None, *(None for _ in ctx.description)


def _pull(ctx: Any, cotangents: list[Tensor]) -> Any:
    """Apply the operator of the derivative."""
    (sweep, tensors, counted), needed = _saved(ctx), _needed(ctx)
    derivative = sweep.vjp(needed)
    if derivative is None:
        raise NotImplementedError(
            "compiled code has derivatives of a linear layer's losses to second order, and of "
            "divergences to first order, got a further one: differentiate outside of "
            "torch.compile, or by torch.func inside of it"
        )
    results = run_sweep(derivative, (*tensors, *cotangents), counted)
    return _gradients(ctx, merge((None,) * len(needed), needed, results))


_run.register_autograd(_pull, setup_context=_save)


def run_sweep(sweep: LoopSweep, tensors: Tensors, counted: Tensor | None) -> tuple[Tensor, ...]:
    """The results of a sweep, by its operator."""
    return tuple(_run(*_described(sweep, tensors, counted)))


# A sum with its gradients, which are taken along while the logits are at hand.


@custom_op("torch_softmax::total", mutates_args=(), schema=_SCHEMA)
def _total(*description: Any) -> list[Tensor]:
    """The sum, and its gradient by the operands that the sweep wants."""
    sweep, tensors = _read(*description)
    _, counted, *_ = description
    at, factors = split(tensors, sweep.operands)
    work = Work(sweep.function, sweep.how, sweep.function.operands(at), _index(counted))
    wanted, by_factors = split(sweep.wanted, sweep.operands)
    value, gradients, _ = sum_with_gradients(work, factors, wanted, by_factors)
    return [value, *(gradient for gradient in gradients if gradient is not None)]


@_total.register_fake
def _(*description: Any) -> list[Tensor]:
    sweep, tensors = _read(*description)
    first = next(tensor for tensor in tensors if tensor is not None)
    total = first.new_empty((), dtype=sweep.how.dtype)
    return [total, *_like_results(sweep, tensors)]


def _save_total(ctx: Any, inputs: Any, output: Any) -> None:
    _save(ctx, inputs, output)
    _, *ctx.taken = output


def _pull_total(ctx: Any, cotangents: list[Tensor]) -> Any:
    """Scale the gradients; or those of the operator, where they are to be differentiated."""
    upstream, *_ = cotangents
    (sweep, tensors, counted), needed = _saved(ctx), _needed(ctx)
    at, factors = split(tensors, sweep.operands)
    of_operands, of_factors = split(needed, sweep.operands)
    taken, (wanted, _) = ctx.taken, split(sweep.wanted, sweep.operands)
    # Whoever differentiates an exported graph may ask for more than was asked when it was traced.
    more = any(n and not w for n, w in zip(of_operands, wanted, strict=True))
    if torch.is_grad_enabled() or more:
        first = next(tensor for tensor in at if tensor is not None)
        one = first.new_ones(first.shape[:1], dtype=sweep.how.dtype)
        given = tuple(one if factor is None else factor for factor in factors)
        wanted, derivative = of_operands, results_sweep(sweep.function, sweep.how).vjp(of_operands)
        assert derivative is not None
        taken = run_sweep(derivative, (*at, *given), counted)
    gradients = merge((None,) * len(at), wanted, taken)
    values: Tensors = (None,) * len(factors)
    if any(of_factors):
        values = run_sweep(results_sweep(sweep.function, sweep.how), at, counted)
    pairs = zip((*gradients, *values), needed, strict=True)
    return _gradients(ctx, tuple(g * upstream if w else None for g, w in pairs))


_total.register_autograd(_pull_total, setup_context=_save_total)


def run_total(
    function: RowFunction, how: How, operands: Operands, factors: Tensors, counted: Tensor | None
) -> Tensor:
    """The sum, with the gradients that are needed taken along, by its operator."""
    wanted = tuple(t is not None and t.requires_grad for t in operands.flat())
    sweep = results_sweep(function, how).vjp(wanted)
    assert sweep is not None
    total: Tensor
    total, *_ = _total(*_described(sweep, (*operands.flat(), *factors), counted))
    return total
