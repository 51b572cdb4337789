"""Any function of one row of a linear layer's logits, of which a few rows are held at a time.

`torch.vmap` maps the function over rows. So a row can't see another one, and noise or a branch on
the data raises. A tensor that the function captures, and that requires a gradient, is in the graph
of the results.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks
from .._transforms import is_batched, is_differentiated, is_moving
from ._autograd import Mask, Tensors, captured_leaves, detached, merge, pulled_back, select, split
from ._dtypes import accumulation_dtype, cast, outside_autocast, product_dtype
from ._rows import How, Layer, Operands, Parts, RowFunction
from ._targets import REDUCTIONS, Counted
from .linear import as_multiplied, default_chunk_size
from .logits import rows_or_total

# What torch's errors say of a function that can't be mapped, and what it may do instead.
_ADVICE = {
    "random operation": "draw random numbers: pass them in rows",
    "data-dependent control flow": "branch on numbers: use torch.where",
    "calling .item()": "read a number out of a tensor: use torch.where for a branch",
    "dynamic shape": "have a shape that depends on numbers: use torch.where",
    "doesn't have storage": "read numbers out of a tensor: use operations of torch",
    "vmap: inplace": "write to a tensor from outside",
    "leaf Variable that requires grad": "write to a tensor from outside",
    "Inplace update to inference tensor": "write to what it is given",
    "setup_context": "call a Function of the older form: give it setup_context and a vmap rule",
    "generate_vmap_rule": "call a Function that vmap can't map: give it a vmap rule",
}


@dataclass(frozen=True, eq=False)
class MappedRows(RowFunction):
    """A function of one row, mapped over rows.

    Args:
        fn: A tensor, or a tuple of them, for the logits (K,) of a row, an element of each tensor
            that has rows, and all of the others.
        rows_in: Which tensors have rows.
        number: How many tensors it returns.
        is_strict: Whether what it captures must not be differentiated.
    """

    fn: Callable[..., Any]
    rows_in: Mask
    number: int = 1
    is_strict: bool = False

    @property
    def results(self) -> int:
        return self.number

    def __call__(self, logits: tuple[Tensor, ...], others: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The results (n, ...) for logits (n, K)."""
        results = self.mapped(logits, others)
        if len(results) != self.number:
            raise ValueError(
                "fn must return as many tensors for any row, "
                f"got {len(results)} beside {self.number} before"
            )
        return results

    def mapped(self, logits: tuple[Tensor, ...], others: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The results of the rows, as many as the function returns."""
        (z,) = logits
        if z.shape[0] == 0:  # which vmap refuses
            pairs = zip(others, self.rows_in, strict=True)
            one = tuple(_zero_row(t) if has_rows and t is not None else t for t, has_rows in pairs)
            return tuple(result[:0] for result in self.mapped((_zero_row(z),), one))
        dims = tuple(
            0 if r and t is not None else None for t, r in zip(others, self.rows_in, strict=True)
        )
        given = (z, *others)
        versions = [_version(t) for t in given]
        try:
            results = torch.vmap(self._of_a_row, (0, *dims), randomness="error")(*given)
        except RuntimeError as error:
            advice = [advice for words, advice in _ADVICE.items() if words in str(error)]
            if not advice:
                raise
            raise ValueError(f"fn, which is mapped over rows, must not {advice[0]}") from error
        if versions != [_version(t) for t in given]:
            raise ValueError("fn, which is mapped over rows, must not write to what it is given")
        return tuple(results)

    def _of_a_row(self, *given: Any) -> tuple[Tensor, ...]:
        results = self.fn(*given)
        results = tuple(results) if isinstance(results, (tuple, list)) else (results,)
        if not results:
            raise TypeError("fn must return a tensor or some, got none")
        for result in results:
            if not isinstance(result, Tensor):
                raise TypeError(f"fn must return tensors, got {type(result).__name__}")
        return results

    def first(self, at: Parts, needed: Parts) -> Parts:
        """The results, and the gradients that are needed, by autograd."""
        mask = (*needed.logits, *needed.others)
        others = (None if t is None else detached(t) for t in at.others)
        tensors = (*(z.contiguous() for z in at.logits), *others)

        def fn(*moving: Tensor) -> tuple[Tensor, ...]:
            return self(*split(merge(tensors, mask, moving), self.layers))

        values, leaves, pull = pulled_back(fn, *select(tensors, mask))
        if self.is_strict:
            self.refuse(captured_leaves(values, leaves))
        gradients: Tensors = ()
        if any(mask):
            pairs = zip(values, at.results, strict=True)
            gradients = pull(
                tuple(
                    cast(c, v.dtype) if isinstance(c, Tensor) else torch.full_like(v, c)
                    for v, c in pairs
                )
            )
        by_all = merge((None,) * len(mask), mask, gradients)
        return Parts(*split(by_all, self.layers), tuple(value.detach() for value in values))

    def refuse(self, captured: Sequence[Tensor]) -> None:
        """Raise if a tensor was captured that no transform would see: its gradient would be 0."""
        if captured:
            known = list(_captured_by(self.fn))
            found = {id(tensor) for tensor in captured}
            names = [name for name, tensor in known if id(tensor) in found]
            names = names or [name for name, t in known if is_moving(t) or is_batched(t)]
            raise ValueError(
                "fn must not depend on a tensor that is differentiated, or mapped by vmap, and "
                f"that it is not given, got {', '.join(names) or 'one without a name'}: pass it "
                "in shared, or in rows where it has a row for each row"
            )


def _zero_row(tensor: Tensor) -> Tensor:
    """One row of zeros like the rows of a tensor."""
    return torch.zeros((1, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)


def _version(tensor: Any) -> int | None:
    """How often a tensor was changed in place, where that is counted."""
    if tensor is None or torch.compiler.is_compiling() or tensor.is_inference():
        return None
    version: int = tensor._version
    return version


def _captured_by(fn: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a function refers to, and modules' parameters, by their names."""
    if isinstance(fn, functools.partial):
        positional = {f"argument {i}": value for i, value in enumerate(fn.args)}
        values: dict[str, Any] = {**positional, **fn.keywords}
        yield from _captured_by(fn.func)
    elif inspect.isfunction(fn) or inspect.ismethod(fn):
        found = inspect.getclosurevars(fn)
        values = {**found.globals, **found.nonlocals, "self": getattr(fn, "__self__", None)}
    else:
        values = {"fn": fn} if isinstance(fn, torch.nn.Module) else getattr(fn, "__dict__", {})
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, torch.nn.Module):
            for inner, parameter in value.named_parameters():
                yield f"{name}.{inner}", parameter


def map_logits(
    fn: Callable[..., Any],
    layer: Layer,
    rows: Tensors,
    shared: Sequence[Tensor | None],
    *,
    reduction: str,
    mask: Tensor | None,
    chunk_size: int | None,
) -> Any:
    """What a function of a row returns for each row (...), or their sum or mean.

    Raises:
        TypeError: A tensor is none, or the function returns none.
        ValueError: Shapes don't fit, or the function is none of one row.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    _check(layer, rows, shared, mask)
    shape = tuple(layer.x.shape[:-1])
    count = math.prod(shape)
    flat = tuple(None if t is None else t.reshape(count, *t.shape[len(shape) :]) for t in rows)
    operands = Operands((as_multiplied(layer),), (*flat, *shared))
    dtype = accumulation_dtype(product_dtype(*layer))
    classes, features = layer.W.shape
    step = chunk_size or default_chunk_size(classes, features, layer.x.device)
    how = How(step, dtype, dtype)
    counted = Counted.of(None if mask is None else mask.flatten())
    rows_in = (True,) * len(rows) + (False,) * len(shared)
    with outside_autocast(layer.x):
        function, like, is_alone = _seen(MappedRows(fn, rows_in), operands, dtype)
        first, *_ = like
        is_number = len(like) == 1 and first.dim() == 1 and first.is_floating_point()
        results = rows_or_total(
            function, how, operands, counted, reduction, shape, is_number=is_number
        )
        # A sum of integers is an integer, and a mean of them is a float, as torch has it.
        pairs = zip(results, like, strict=True)
        results = [cast(r, v.dtype) if v.is_floating_point() else r for r, v in pairs]
    return results[0] if is_alone else tuple(results)


def _seen(
    function: MappedRows, operands: Operands, dtype: torch.dtype
) -> tuple[MappedRows, tuple[Tensor, ...], bool]:
    """The function with the number of its results, these for a row of zeros, and if it is alone.

    No number of a row is looked at: the results show their form, and what the function captures.
    It can't branch on a row, nor on a tensor that an outer `vmap` maps, which is a row here.
    """
    (layer,), others = operands
    rows_in = tuple(
        has_rows or (t is not None and is_batched(t))
        for t, has_rows in zip(others, function.rows_in, strict=True)
    )
    triples = zip(others, function.rows_in, rows_in, strict=True)
    row = tuple(
        t if t is None else _zero_row(t if has_rows else t[None]) if is_row else t.detach()
        for t, has_rows, is_row in triples
    )
    logits = torch.zeros((1, layer.W.shape[0]), dtype=dtype, device=layer.x.device)
    are_alone = []

    def fn(*given: Any) -> Any:
        results = function.fn(*given)
        are_alone.append(isinstance(results, Tensor))
        return results

    with torch.enable_grad():
        like = replace(function, fn=fn, rows_in=rows_in).mapped((logits,), row)
    (is_alone,) = are_alone
    function = replace(function, number=len(like), is_strict=is_differentiated())
    # A compiler maps a captured tensor as it should be.
    is_compiled = torch.compiler.is_compiling()
    function.refuse(
        [
            value
            for value in like
            if (function.is_strict and is_moving(value)) or (not is_compiled and is_batched(value))
        ]
    )
    return function, like, is_alone


def _check(
    layer: Layer, rows: Tensors, shared: Sequence[Tensor | None], mask: Tensor | None
) -> None:
    """Raise unless the arguments fit together."""
    checks.layer_of_two_dimensions(*layer)
    shape = tuple(layer.x.shape[:-1])
    for name, tensors in (("rows", rows), ("shared", shared)):
        for tensor in tensors:
            if tensor is not None and not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must hold tensors, got {type(tensor).__name__}")
    for row in rows:
        if row is not None:
            checks.leading("rows", row, shape)
    if mask is not None:
        checks.mask(mask, shape)
