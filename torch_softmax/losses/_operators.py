"""The sweeps as operators of torch, for a compiler: it calls them, and never looks into a loop.

So one compiled graph serves every number of rows. The operators differentiate one another: the
numbers' gradient is the gradient's operator, whose gradient is the Hessian's, whose raises.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ._autograd import Mask, Tensors, merge, select
from ._chunked import sum_of_products
from ._dtypes import accumulation_dtype
from ._formulas import Factors, Numbers
from ._plan import (
    BOTH,
    NEITHER,
    NO_INPUTS,
    CrossEntropySweep,
    GradientSweep,
    HessianSweep,
    NumbersSweep,
)
from ._sweeps import How, Inputs, numbers_and_gradients

_KINDS: dict[str, type[CrossEntropySweep]] = {
    kind.__name__: kind for kind in (NumbersSweep, GradientSweep, HessianSweep)
}
# A list that holds None is not differentiated, so that those present are named by a mask.
_SCHEMA = (
    "(Tensor[] tensors, bool[] present, str kind, bool[] masks, int step, ScalarType dtype, "
    "ScalarType logits_dtype) -> Tensor[]"
)


def _described(sweep: Any, tensors: Tensors) -> tuple[Any, ...]:
    """A sweep and the tensors it is for, in what an operator takes."""
    present = [tensor is not None for tensor in tensors]
    masks = [*sweep.given, *sweep.moved, *sweep.asked]
    how = sweep.how
    given = list(select(tensors, tuple(present)))
    return given, present, type(sweep).__name__, masks, how.step, how.dtype, how.logits_dtype


def _read(tensors: Any, *description: Any) -> tuple[Any, Tensors]:
    """The sweep that was described so, and all its tensors."""
    present, kind, masks, *how = description
    values = iter(masks)
    like: tuple[Mask, ...] = (NEITHER, (*NO_INPUTS, *NEITHER), (*NO_INPUTS, *NEITHER))
    read = (tuple(next(values) for _ in mask) for mask in like)
    return _KINDS[kind](How(*how), *read), merge([None] * len(present), present, tensors)


def _empty_results(sweep: CrossEntropySweep, tensors: Tensors) -> list[Tensor]:
    """Tensors of the shapes and dtypes of a sweep's results."""
    inputs, _, _, _ = sweep.point(tensors)
    x, W, p, dtype = inputs.x, inputs.W, inputs.p, sweep.how.dtype
    sums, of_rows = accumulation_dtype(x.dtype), x.new_empty(x.shape[:1], dtype=dtype)
    results = Inputs(
        x=torch.empty_like(x, memory_format=torch.contiguous_format),
        W=x.new_empty(W.shape, dtype=sums),
        b=x.new_empty(W.shape[:1], dtype=sums),
        p=x.new_empty(p.shape, dtype=dtype),
    )
    return list(select((*results, of_rows, torch.empty_like(of_rows)), sweep.asked))


@custom_op("torch_softmax::sweep", mutates_args=(), schema=_SCHEMA)
def _run(*description: Any) -> list[Tensor]:
    """The results of a sweep."""
    sweep, tensors = _read(*description)
    return list(sweep.run(*tensors))


@_run.register_fake
def _(*description: Any) -> list[Tensor]:
    return _empty_results(*_read(*description))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, *ctx.description = inputs
    ctx.save_for_backward(*tensors)


def _pull(ctx: Any, cotangents: list[Tensor]) -> Any:
    """Apply the operator of the derivative."""
    of_present, *_ = ctx.needs_input_grad
    sweep, tensors = _read(ctx.saved_tensors, *ctx.description)
    present, *_ = ctx.description
    wanted = merge([False] * len(present), present, of_present)
    derivative = sweep.vjp(wanted, (True,) * len(cotangents))
    if derivative is None:
        raise NotImplementedError(
            "compiled code has the derivatives of a linear layer's loss to second order, got a "
            "third one: differentiate outside of torch.compile, or by torch.func inside of it"
        )
    results = iter(run_sweep(derivative, *tensors, *cotangents))
    gradients = [next(results) if w else None for w in of_present]
    return gradients, *(None for _ in ctx.description)


_run.register_autograd(_pull, setup_context=_save)


def run_sweep(sweep: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The results of a sweep, by its operator."""
    return tuple(_run(*_described(sweep, tensors)))


# T with its gradients, which are taken along while the logits are at hand.


@custom_op("torch_softmax::total", mutates_args=(), schema=_SCHEMA)
def _total(*description: Any) -> list[Tensor]:
    """T, and its gradient by the inputs that the sweep's `asked` names."""
    sweep, tensors = _read(*description)
    inputs, factors, _, _ = sweep.point(tensors)
    wanted = Inputs(*sweep.of_inputs)
    numbers, gradients = numbers_and_gradients(inputs, factors, wanted, sweep.how)
    assert numbers is not None
    return [sum_of_products(numbers, factors), *select(gradients, wanted)]


@_total.register_fake
def _(*description: Any) -> list[Tensor]:
    sweep, tensors = _read(*description)
    inputs, _, _, _ = sweep.point(tensors)
    return [inputs.x.new_empty((), dtype=sweep.how.dtype), *_empty_results(sweep, tensors)]


def _save_total(ctx: Any, inputs: Any, output: Any) -> None:
    _save(ctx, inputs, output)
    _, *ctx.taken = output


def _pull_total(ctx: Any, cotangents: list[Tensor]) -> Any:
    """Scale the gradients, or where they are to be differentiated, their operator's."""
    upstream, *_ = cotangents
    sweep, tensors = _read(ctx.saved_tensors, *ctx.description)
    of_present, *_ = ctx.needs_input_grad
    present, *_ = ctx.description
    wanted = merge([False] * len(present), present, of_present)
    *of_inputs, of_s, of_t = wanted
    taken = ctx.taken
    # Whoever differentiates an exported graph may ask for more than was asked when it was traced.
    if torch.is_grad_enabled() or any(
        w and not a for w, a in zip(wanted, sweep.asked, strict=True)
    ):
        sweep = GradientSweep(sweep.how, sweep.given, asked=(*of_inputs, *NEITHER))
        taken = run_sweep(sweep, *tensors)
    by = merge([None] * len(sweep.of_inputs), sweep.of_inputs, taken)
    numbers: Any = Factors()
    if of_s or of_t:
        inputs, _, _, _ = sweep.point(tensors)
        numbers = run_sweep(NumbersSweep(sweep.how), *inputs)
    gradients = zip((*by, *numbers), wanted, strict=True)
    all_of_them = [gradient * upstream if w else None for gradient, w in gradients]
    return list(select(all_of_them, present)), *(None for _ in ctx.description)


_total.register_autograd(_pull_total, setup_context=_save_total)


def run_total(inputs: Inputs, factors: Factors, wanted: Inputs, how: How) -> Tensor:
    """T, with the gradients that are wanted taken along, by its operator."""
    sweep = GradientSweep(how, BOTH, asked=(*wanted, *NEITHER))
    total: Tensor
    total, *_ = _total(*_described(sweep, (*inputs, *factors)))
    return total


def run_numbers(inputs: Inputs, how: How) -> Numbers:
    """The numbers of each row, by their operator."""
    return Numbers(*run_sweep(NumbersSweep(how), *inputs))
