"""The softmax of logits, and their cross-entropy, which is made of the numbers of each row."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _checks as checks
from .._transforms import refuse_inference_mode
from . import _formulas as formulas
from ._autograd import Tensors, nested_forward_mode
from ._dtypes import accumulation_dtype, cast, loss_dtype, sum_dtype, widest
from ._formulas import Across, Numbers, product
from ._numbers import RowNumbers
from ._operators import results_of, sum_of
from ._rows import How, Layer, Operands, RowFunction
from ._sweeps import logits_step
from ._targets import Counted, LogitOptions, Options, Terms, check_classes, fold

PLAIN = LogitOptions()


class SoftmaxFunction(Function):
    """S_i = e^{z_i} / Σ_j e^{z_j} along one dimension."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dim: int) -> Tensor:
        return formulas.softmax(input, dim).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.dim = inputs
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _jacobian_product(ctx.saved_tensors, gradient, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        with nested_forward_mode(ctx.saved_tensors) as saved:
            return _jacobian_product(saved, tangent, ctx.dim)


def _jacobian_product(saved: Any, u: Tensor, dim: int) -> Tensor:
    (softmax,) = saved
    wide = accumulation_dtype(softmax.dtype)
    return formulas.jacobian_product(softmax.to(wide), u.to(wide), dim).to(softmax.dtype)


def softmax(input: Tensor, dim: int) -> Tensor:
    """The softmax along a dimension, to be differentiated to any order."""
    if torch.compiler.is_compiling():  # which differentiates torch's own to any order
        return formulas.softmax(input, dim).contiguous()
    refuse_inference_mode()
    result: Tensor = SoftmaxFunction.apply(input, dim)
    return result


def loss_of(
    layer: Layer,
    terms: Terms,
    reduction: str,
    how: How,
    options: LogitOptions = PLAIN,
    across: Across | None = None,
) -> Tensor:
    """The loss L = m log_sum + gap + ζ lse² of each row, (N,), or their sum or mean.

    Three matrix products are the least for a layer with its gradients, and only for a sum is it
    known beforehand what the gradients are weighted with. Given logits need none.
    """
    cap, scale, z_loss = options
    asked = ("log_sum", "gap", "square") if z_loss else ("log_sum", "gap")
    function = RowNumbers(asked, cap, scale, across)
    operands = Operands((layer,), tuple(terms.y))
    counted = Counted.of(terms.keep)
    count = layer.x.shape[0]
    if reduction == "none" or layer.W is None:
        numbers = results_of(function, how, operands, counted)
        losses = _losses(Numbers(**dict(zip(asked, numbers, strict=True))), terms, z_loss, counted)
        if reduction == "none":
            return counted.restore(losses, count)
        total = counted.read_zeros(losses).sum()
    else:
        factors = _factors(terms, z_loss, how.dtype, counted)
        total = sum_of(function, how, operands, factors, counted)
    return total if reduction == "sum" else mean_over(total, terms.divisor, terms.mean_of_no_rows)


def _losses(numbers: Numbers, terms: Terms, z_loss: float, counted: Counted) -> Tensor:
    """The losses of the rows that count, times their factors."""
    mass, factor = (None if t is None else counted.select(t) for t in (terms.mass, terms.factor))
    log_sum, loss = counted.select(numbers.log_sum), counted.select(numbers.gap)
    loss = loss + (log_sum if mass is None else mass * log_sum)
    if z_loss:
        loss = loss + z_loss * counted.select(numbers.square)
    return loss if factor is None else product(factor, loss)


def _factors(terms: Terms, z_loss: float, dtype: torch.dtype, counted: Counted) -> Tensors:
    """The factors m f, f and ζ f of log_sum, gap and square for a row's factor f.

    T is the sum of the losses with these.
    """
    mass, factor = terms.mass, terms.factor
    if counted.mask is not None:
        factor = counted.mask.to(dtype) if factor is None else counted.read_zeros(factor)
    of_log_sum = mass if factor is None else factor if mass is None else factor * mass
    if not z_loss:
        return of_log_sum, factor
    target = terms.y.target
    one = target.new_ones(target.shape[:1], dtype=dtype) if factor is None else factor
    return of_log_sum, factor, z_loss * one


def rows_or_total(
    function: RowFunction,
    how: How,
    operands: Operands,
    counted: Counted,
    reduction: str,
    shape: tuple[int, ...],
    *,
    is_number: bool,
) -> list[Tensor]:
    """Each result of the rows, (*shape, ...), or its sum or mean over the rows that count.

    A function whose only result is a number is summed while its gradients are taken along.
    """
    if reduction == "none":
        values = results_of(function, how, operands, counted)
        return [counted.read_zeros(v).reshape(*shape, *v.shape[1:]) for v in values]
    if is_number:
        factors = (None if counted.mask is None else counted.mask.to(how.dtype),)
        totals = [sum_of(function, how, operands, factors, counted)]
    else:
        totals = [
            counted.read_zeros(counted.select(values)).sum(0, dtype=sum_dtype(values))
            for values in results_of(function, how, operands, counted)
        ]
    if reduction == "sum":
        return totals
    number = counted.number(math.prod(shape))
    return [mean_over(total, number) for total in totals]


def mean_over(total: Tensor, count: Tensor | float, mean_of_no_rows: float = math.nan) -> Tensor:
    """A total over a count; the mean over none is mostly nan, as torch has it, its gradient 0."""
    if not isinstance(count, Tensor) and count > 0:
        return total / count
    empty = torch.as_tensor(count, device=total.device) == 0
    return (total / torch.where(empty, 1, count)).masked_fill(empty, mean_of_no_rows)


def cross_entropy(input: Tensor, target: Tensor, options: Options) -> Tensor:
    """The loss of logits (C), (N, C) or (N, C, d1, ...), to be differentiated to any order."""
    checks.floating("input", input)
    if input.dim() == 0:
        raise ValueError("input must have a dimension of classes, got a scalar")
    class_dim = 0 if input.dim() == 1 else 1
    shape = list(input.shape)
    classes = shape.pop(class_dim)
    check_classes(classes, options.weight)
    checks.target(target, tuple(shape), tuple(input.shape))
    if target.is_floating_point() and options.ignore_index >= 0:
        raise ValueError(
            "ignore_index must be left out for class probabilities, for it leaves out none, "
            f"got {options.ignore_index}"
        )
    may_ignore = checks.labels(target, classes, options.ignore_index)
    z = input.movedim(class_dim, -1).reshape(math.prod(shape), classes)
    p = target.movedim(class_dim, -1) if target.is_floating_point() else target
    returned = options.dtype or loss_dtype(input.dtype, target, options.weight)
    dtype = accumulation_dtype(widest(input.dtype, returned))
    terms = fold(p, options, classes, dtype, may_ignore=may_ignore)
    how = How(logits_step(z), dtype, dtype)
    loss = loss_of(Layer(z), terms, options.reduction, how)
    return cast(loss.reshape(shape) if options.reduction == "none" else loss, returned)
