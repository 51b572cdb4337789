"""Any function of a linear layer's logits, which are never held for more than a few rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks
from ._autograd import Tensors, at_rest, is_differentiated, is_in_func, is_moving
from ._dtypes import accumulation_dtype, outside_autocast, product_dtype
from ._mapped import RowFunction, logits_of, results_of, total_of
from ._products import multiplied_in
from ._sweeps import How
from .linear import Layer, default_chunk_size

# Rows that a function is tried on, to see what it returns.
_TRIED = 2


def map_logits(
    fn: Callable[..., Any],
    layers: Sequence[Layer],
    rows: tuple[Tensor | None, ...],
    shared: tuple[Tensor | None, ...] = (),
    *,
    reduction: str = "none",
    chunk_size: int | None = None,
) -> Any:
    """What a function of some layers' logits returns, a tensor or a tuple, in rows or reduced.

    The layers' inputs have the same leading dimensions, and the rows have them too.

    Raises:
        TypeError: A tensor is none.
        ValueError: Shapes don't fit, or the function can't be worked out in chunks; see `_tried`.
    """
    _check(layers, rows, shared)
    first, *_ = layers
    *shape, features = first.input.shape
    count, (classes, *_) = math.prod(shape), first.linear_weight.shape
    dtype = product_dtype(*(tensor for layer in layers for tensor in layer))
    step = chunk_size or default_chunk_size(classes, features, first.input.device)
    logits = multiplied_in(dtype, first.input.device)
    how = How(step, accumulation_dtype(dtype), logits)
    tensors = [t for layer in layers for t in layer.to(dtype).flat()]
    tensors += [t if t is None else t.reshape(count, *t.shape[len(shape) :]) for t in rows]
    every = (*tensors, *shared)
    rows_in = (*(True for _ in rows), *(False for _ in shared))
    of = RowFunction(_checked(fn), len(layers), rows_in, 0, how)
    with outside_autocast(first.input):
        results, is_alone = _tried(fn, of, every)
        of = replace(of, results=results)
        if reduction != "none" and is_alone:
            total = total_of(of, every)
            return total / count if reduction == "mean" else total
        values = results_of(of, every)
    if reduction == "none":
        values = tuple(value.reshape(*shape, *value.shape[1:]) for value in values)
    else:
        values = tuple(value.sum(0) for value in values)
        if reduction == "mean":
            values = tuple(value / count for value in values)
    return values[0] if is_alone else values


def _check(layers: Sequence[Layer], rows: Tensors, shared: Tensors) -> None:
    """Raise unless the arguments fit together."""
    first, *_ = layers
    shape = first.input.shape[:-1]
    for layer in layers:
        checks.linear_layer(*layer)
        if layer.linear_weight.dim() != 2:
            raise ValueError(
                f"linear_weight must have shape (C, D), got {tuple(layer.linear_weight.shape)}"
            )
    for name, tensors in (("rows", rows), ("shared", shared)):
        for tensor in tensors:
            if tensor is not None and not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must hold tensors, got {type(tensor).__name__}")
    for row in (*(layer.input[..., 0] for layer in layers), *rows):
        if row is not None and row.shape[: len(shape)] != shape:
            raise ValueError(
                f"rows must have the leading dimensions of input, {tuple(shape)}, "
                f"got shape {tuple(row.shape)}"
            )


def _checked(fn: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """A function whose results are a tuple, each with a row for each row of logits."""

    def checked(logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
        results = fn(logits, *others)
        results = tuple(results) if isinstance(results, (tuple, list)) else (results,)
        for result in results:
            if not isinstance(result, Tensor):
                raise TypeError(f"fn must return tensors, got {type(result).__name__}")
            if result.dim() == 0 or result.shape[0] != logits.shape[0]:
                raise ValueError(
                    "fn must return a number for each row of the logits it is given, "
                    f"got shape {tuple(result.shape)} for {logits.shape[0]} rows"
                )
        return results

    return checked


def _tried(fn: Callable[..., Any], of: RowFunction, tensors: Tensors) -> tuple[int, bool]:
    """How many results a function has, and whether it is one alone, for the first few rows.

    Raises:
        ValueError: It depends on a tensor that it was not given and that is differentiated, whose
            gradient would silently be 0; or it draws random numbers, which would be others when it
            is worked out again.
    """
    layers, others = of.parts([None if t is None else at_rest(t) for t in tensors])
    (x, *_), *_ = layers
    count = min(_TRIED, len(x)) or _TRIED
    pairs = zip(others, of.rows_in, strict=True)
    given = (
        *(logits_of(_first(x, count), W, b, of.how) for x, W, b in layers),
        *(_first(t, count) if t is not None and is_row else t for t, is_row in pairs),
    )
    will_differentiate = is_differentiated()
    with torch.enable_grad():
        results = fn(*given)
        every = _checked(lambda *_: results)(*given)
        if will_differentiate and any(map(is_moving, every)):
            raise ValueError(
                "fn must not depend on a tensor that is differentiated and that it is not given: "
                "pass it in shared, or in rows where it has a row for each row"
            )
    if not torch.compiler.is_compiling() and not is_in_func():
        again = of.fn(*given)
        if not all(map(_are_same, every, again)):
            raise ValueError(
                "fn must return the same for the same rows, as it is worked out again for "
                "gradients, got other numbers: pass random numbers in rows"
            )
    return len(every), isinstance(results, Tensor)


def _first(tensor: Tensor, count: int) -> Tensor:
    """The first few rows of a tensor, or zeros where it has none."""
    return tensor[:count] if len(tensor) else tensor.new_zeros(count, *tensor.shape[1:])


def _are_same(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same numbers, or both nan."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
