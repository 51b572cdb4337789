"""Any function of a linear layer's logits, which are never held for more than a few rows."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import _checks as checks
from ._autograd import Tensors, at_rest, is_in_func, is_moving
from ._dtypes import accumulation_dtype, cast, outside_autocast, product_dtype
from ._mapped import RowFunction, results_of, total_of
from ._products import multiplied_in
from ._sweeps import How
from .linear import Layer, default_chunk_size

# Rows that a function is tried on, to see what it returns.
_TRIED = 2


def map_logits(
    fn: Callable[..., Any],
    layer: Layer,
    rows: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    reduction: str,
    chunk_size: int | None,
) -> Any:
    """What a function returns for a layer's logits, a tensor or a tuple, checked and reduced."""
    _check(layer, rows, shared)
    *shape, features = layer.input.shape
    count = math.prod(shape)
    x, W, b = layer.to(product_dtype(*layer))
    flat = tuple(row.reshape(count, *row.shape[len(shape) :]) for row in rows)
    tensors = (x.reshape(count, features), W, b, *flat, *shared)
    step = chunk_size or default_chunk_size(len(W), features, x.device)
    logits = multiplied_in(x.dtype, x.device)
    how = How(step, accumulation_dtype(x.dtype), logits)
    rows_in = (*(True for _ in rows), *(False for _ in shared))
    with outside_autocast(x):
        results, is_alone = _tried(fn, how, tensors, rows_in)
        of = RowFunction(_checked(fn), rows_in, results, how.dtype, how)
        if reduction != "none" and is_alone:
            reduced = total_of(of, tensors)
            return reduced / count if reduction == "mean" else reduced
        values = results_of(of, tensors)
    if reduction == "none":
        values = tuple(value.reshape(*shape, *value.shape[1:]) for value in values)
    else:
        values = tuple(value.sum(0) for value in values)
        if reduction == "mean":
            values = tuple(value / count for value in values)
    return values[0] if is_alone else values


def _check(layer: Layer, rows: tuple[Tensor, ...], shared: tuple[Tensor, ...]) -> None:
    """Raise unless the arguments fit together."""
    checks.linear_layer(*layer)
    if layer.linear_weight.dim() != 2:
        raise ValueError(
            f"linear_weight must have shape (C, D), got {tuple(layer.linear_weight.shape)}"
        )
    shape = layer.input.shape[:-1]
    for name, tensors in (("rows", rows), ("shared", shared)):
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must hold tensors, got {type(tensor).__name__}")
    for row in rows:
        if row.shape[: len(shape)] != shape:
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


def _tried(
    fn: Callable[..., Any], how: How, tensors: Tensors, rows_in: tuple[bool, ...]
) -> tuple[int, bool]:
    """How many results a function has, and whether it is one alone, for the first few rows.

    Raises:
        ValueError: It depends on a tensor that it was not given and that is differentiated, whose
            gradient would silently be 0; or it draws random numbers, which would be others when it
            is worked out again.
    """
    x, W, b, *others = (None if tensor is None else at_rest(tensor) for tensor in tensors)
    assert x is not None
    of_rows = min(_TRIED, len(x)) or _TRIED
    layer = (None if t is None else cast(t, how.logits_dtype) for t in (_first(x, of_rows), W, b))
    z = cast(linear(*layer), how.dtype)  # type: ignore[arg-type]
    pairs = zip(others, rows_in, strict=True)
    given = [_first(t, of_rows) if t is not None and is_row else t for t, is_row in pairs]
    with torch.enable_grad():
        results = fn(z, *given)
        is_alone = isinstance(results, Tensor)
        every = _checked(lambda *_: results)(z)
        for result in every:
            if is_moving(result):
                raise ValueError(
                    "fn must not depend on a tensor that is differentiated and that it is not "
                    "given: pass it in shared, or in rows where it has a row for each row"
                )
    if not torch.compiler.is_compiling():
        again = _checked(fn)(z, *given)
        if not is_in_func() and not all(map(_are_same, every, again)):
            raise ValueError(
                "fn must return the same for the same rows, as it is worked out again for "
                "gradients, got other numbers: pass random numbers in rows"
            )
    return len(every), is_alone


def _first(tensor: Tensor, count: int) -> Tensor:
    """The first few rows of a tensor, or zeros where it has none."""
    return tensor[:count] if len(tensor) else tensor.new_zeros(count, *tensor.shape[1:])


def _are_same(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same numbers, or both nan."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
