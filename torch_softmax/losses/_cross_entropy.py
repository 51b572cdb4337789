"""From inputs and options to a loss: what the losses of logits and of a linear layer share."""

import functools
import math

import torch
from torch import Tensor

from .._transforms import is_plain, is_transformed
from ._autograd import Mask, Sum, Tensors, chunked, may_take_gradients, taken_along
from ._chunked import Total, sum_of_products
from ._formulas import Factors, Numbers, product
from ._operators import run_numbers, run_total
from ._plan import plan_of, row_numbers
from ._sweeps import How, Inputs, numbers_and_gradients
from ._targets import Terms


def numbers_of(inputs: Inputs, how: How) -> Numbers:
    """log_sum and gap of each row, to be differentiated to any order."""
    if not torch.compiler.is_compiling():
        return Numbers(*chunked(plan_of(how), *inputs))
    # A compiler fuses the passes over given logits by itself. It takes what is differentiated in a
    # Function or an operator for the end of differentiation, but not plain operations.
    if inputs.W is None or is_transformed():
        return row_numbers(inputs, how)
    return run_numbers(inputs, how)


def total_of(inputs: Inputs, factors: Factors, how: How) -> Tensor:
    """T = Σ_n s_n log_sum_n + t_n gap_n, with its gradients taken along where one will be asked."""
    wanted = Inputs(*(t is not None and t.requires_grad for t in inputs))
    if any(wanted) and torch.is_grad_enabled() and all(map(is_plain, inputs)):
        if torch.compiler.is_compiling():
            if not is_transformed():
                return run_total(inputs, factors, wanted, how)
        elif may_take_gradients():
            (total,) = taken_along(_total_of(how), *inputs, *factors)
            return total
    return sum_of_products(numbers_of(inputs, how), factors)


@functools.lru_cache(maxsize=32)
def _total_of(how: How) -> Total:
    """T, a function of the inputs and their factors."""

    def run(tensors: Tensors, wanted: Mask) -> Sum:
        (*given, s, t), (*of_inputs, of_s, of_t) = tensors, wanted
        inputs, factors = Inputs(*given), Factors(s, t)
        numbers, by = numbers_and_gradients(inputs, factors, Inputs(*of_inputs), how)
        assert numbers is not None
        log_sum, gap = numbers
        by_factors = (log_sum if of_s else None, gap if of_t else None)
        return Sum(sum_of_products(numbers, factors), (*by, *by_factors))

    return Total(plan_of(how), run, complete=lambda tensors: tensors)


def loss_of(inputs: Inputs, terms: Terms, reduction: str, how: How) -> Tensor:
    """The loss L = m log_sum + gap of each row, (N,), or their sum or mean.

    Three matrix products are the least for a layer with its gradients, and only for a sum is it
    known beforehand what the gradients are weighted with. Given logits need none.
    """
    if reduction == "none" or inputs.W is None:
        log_sum, gap = numbers_of(inputs, how)
        loss = gap + (log_sum if terms.mass is None else terms.mass * log_sum)
        loss = weighted(loss, terms)
        return loss if reduction == "none" else reduced(loss.sum(), terms, reduction)
    return reduced(total_of(inputs, _factors(terms, how), how), terms, reduction)


def weighted(loss: Tensor, terms: Terms) -> Tensor:
    """The losses of rows (N,) times what these count for."""
    factor = None if terms.factor is None else terms.factor_of_kept(loss.dtype)
    if factor is not None:
        loss = product(factor, loss)
    return loss if terms.keep is None else loss.masked_fill(~terms.keep, 0)


def reduced(total: Tensor, terms: Terms, reduction: str) -> Tensor:
    """The sum of all losses, or their mean."""
    return total if reduction == "sum" else mean_over(total, terms.divisor, terms.of_none)


def mean_over(total: Tensor, count: Tensor | int, of_none: float = math.nan) -> Tensor:
    """A total over a count; the mean over none is mostly nan, as torch has it, its gradient 0."""
    if isinstance(count, int) and count > 0:
        return total / count
    empty = torch.as_tensor(count, device=total.device) == 0
    return (total / torch.where(empty, 1, count)).masked_fill(empty, of_none)


def _factors(terms: Terms, how: How) -> Factors:
    """With s = m and t = 1 for the rows that count, and both 0 for the others, T is Σ L."""
    t = terms.factor_of_kept(how.dtype)
    if t is None:
        return Factors(terms.mass, None)
    return Factors(t if terms.mass is None else t * terms.mass, t)
