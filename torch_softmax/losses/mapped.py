"""Any function of a linear layer's logits, which are never held for more than a few rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _checks as checks
from .._transforms import is_differentiated, is_in_func, is_moving
from ._autograd import Tensors
from ._cross_entropy import mean_over
from ._dtypes import accumulation_dtype, outside_autocast, product_dtype, widest
from ._mapped import RowFunction, logits_of, logits_of_few, results_of, total_of
from ._sweeps import How
from ._targets import REDUCTIONS
from .linear import Layer, default_chunk_size


def map_logits(
    fn: Callable[..., Any],
    layers: Sequence[Layer],
    rows: Tensors,
    shared: Sequence[Tensor | None] = (),
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
    checks.one_of("reduction", reduction, REDUCTIONS)
    _check(layers, rows, shared)
    first, *_ = layers
    *shape, _ = first.input.shape
    count = math.prod(shape)
    flat = (t if t is None else t.reshape(count, *t.shape[len(shape) :]) for t in rows)
    tensors = (*tensors_of(layers), *flat, *shared)
    rows_in = (*(True for _ in rows), *(False for _ in shared))
    of = RowFunction(_checked(fn), len(layers), rows_in, 0, how_of(layers, chunk_size))
    with outside_autocast(first.input):
        trial = _tried(fn, of, tensors)
        of = replace(of, results=len(trial.dims))
        if reduction != "none" and trial == _Trial((1,), True):
            values: tuple[Tensor, ...] = (total_of(of, tensors),)
        else:
            values = results_of(of, tensors)
            if reduction == "none":
                values = tuple(value.reshape((*shape, *value.shape[1:])) for value in values)
            else:
                values = tuple(value.sum(0) for value in values)
        if reduction == "mean":
            values = tuple(mean_over(value, count) for value in values)
    return values[0] if trial.is_alone else values


def tensors_of(layers: Sequence[Layer]) -> Tensors:
    """The x (N, D), W and b of each layer, in the dtype that each has its products in."""
    return tuple(t for layer in layers for t in layer.to(product_dtype(*layer)).flat())


def how_of(layers: Sequence[Layer], chunk_size: int | None) -> How:
    """How the logits of some layers are worked out: those of half precision in float32."""
    first, *_ = layers
    classes, features = first.linear_weight.shape
    dtype = accumulation_dtype(widest(*(product_dtype(*layer) for layer in layers)))
    step = chunk_size or default_chunk_size(classes, features, first.input.device)
    return How(step, dtype, dtype)


def _check(layers: Sequence[Layer], rows: Tensors, shared: Sequence[Tensor | None]) -> None:
    """Raise unless the arguments fit together."""
    first, *_ = layers
    shape = first.input.shape[:-1]
    for layer in layers:
        checks.layer_of_two_dimensions(*layer)
        checks.leading("input", layer.input, shape)
    for name, tensors in (("rows", rows), ("shared", shared)):
        for tensor in tensors:
            if tensor is not None and not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must hold tensors, got {type(tensor).__name__}")
    for row in rows:
        if row is not None:
            checks.leading("rows", row, shape)


def _checked(fn: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """A function whose results are a tuple, each with a row for each row of logits."""

    def checked(logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
        results = fn(logits, *others)
        results = tuple(results) if isinstance(results, (tuple, list)) else (results,)
        if not results:
            raise TypeError("fn must return a tensor or some, got none")
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


class _Trial(NamedTuple):
    """What a function was seen to return."""

    dims: tuple[int, ...]  # of each result
    is_alone: bool  # whether it returns one tensor, and no tuple


def _tried(fn: Callable[..., Any], of: RowFunction, tensors: Tensors) -> _Trial:
    """What a function returns for two rows, the first and the last.

    Raises:
        ValueError: It depends on a tensor that it was not given and that is differentiated, whose
            gradient would silently be 0; it draws random numbers, which would be others when it
            is worked out again; or a row's result is another beside other rows.
    """
    layers, others = of.parts([None if t is None else t.detach() for t in tensors])
    pairs = zip(others, of.rows_in, strict=True)
    can_look = _can_look(tensors)
    logits = logits_of_few if can_look else logits_of
    given = (
        *(logits(_two(x), W, b, of.how) for x, W, b in layers),
        *(_two(t) if t is not None and is_row else t for t, is_row in pairs),
    )
    will_differentiate = is_differentiated()
    state = torch.get_rng_state() if can_look else None
    with torch.enable_grad():
        results = fn(*given)
        every = _checked(lambda *_: results)(*given)
        if will_differentiate and any(map(is_moving, every)):
            raise ValueError(
                "fn must not depend on a tensor that is differentiated and that it is not given: "
                "pass it in shared, or in rows where it has a row for each row"
            )
    if state is not None:
        again = of.fn(*given)
        is_random = not torch.equal(state, torch.get_rng_state())
        if is_random or not all(map(_are_same, every, again)):
            raise ValueError(
                "fn must return the same for the same rows, and not write to them, as it is worked "
                "out again for gradients, got other numbers: pass random numbers in rows"
            )
        of_rows = (*(True for _ in layers), *of.rows_in)
        row = (t if t is None or not r else t[:1] for t, r in zip(given, of_rows, strict=True))
        for alone, beside in zip(of.fn(*row), every, strict=True):
            if not _are_close(alone, beside[:1]):
                raise ValueError(
                    "fn must work out each row for itself, got other numbers for a row alone than "
                    "for the same row beside another"
                )
    return _Trial(tuple(result.dim() for result in every), isinstance(results, Tensor))


def _can_look(tensors: Tensors) -> bool:
    """Whether there are numbers to look at: outside of a compiler and of torch.func."""
    if torch.compiler.is_compiling() or is_in_func():
        return False
    return not any(t is not None and (t.is_meta or isinstance(t, FakeTensor)) for t in tensors)


def _two(tensor: Tensor) -> Tensor:
    """The first and the last row of a tensor, or zeros where it has none."""
    if not len(tensor):
        return tensor.new_zeros(2, *tensor.shape[1:])
    return torch.stack([tensor[0], tensor[-1]])


def _are_same(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same numbers, or both nan."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _are_close(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same numbers but for rounding."""
    if a.dtype != b.dtype or a.shape != b.shape or not a.is_floating_point():
        return a.dtype == b.dtype and _are_same(a, b)
    relative = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(a, b, rtol=relative, atol=relative / 10, equal_nan=True)
