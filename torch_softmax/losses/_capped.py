"""Cross-entropy of logits that are scaled, capped, and penalised where their softmax is not normal.

    z' = c tanh(a z / c),  L = Σ_k y_k (lse − z'_k) + ζ lse²  with  lse = log Σ_k e^{z'_k}

for a cap c, a scale a, and a factor ζ. With S = softmax(z') and the mass m = Σ_k y_k:

    ∂L/∂z' = (m + 2 ζ lse) S − y,  ∂z'/∂z = a (1 − tanh²(a z / c))
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _formulas as formulas
from ._autograd import Tensors
from ._cross_entropy import reduced, weighted
from ._formulas import Factors, Numbers, Target
from ._mapped import RowFunction, results_of, total_of
from ._sweeps import How, Inputs, kept
from ._targets import LogitOptions, Terms

# The tensors beside the logits: p, hot, mass and factor have rows, scale and floor do not.
_ROWS_IN = (True, True, True, True, False, False)


class Changed(NamedTuple):
    """Logits z' with what their derivative by z is made from."""

    z: Tensor  # z'
    tanh: Tensor | None  # None where there is no cap
    scale: float

    def pull_(self, gradient: Tensor) -> Tensor:
        """A gradient by z' times ∂z'/∂z, in place where that is faster."""
        if self.tanh is not None:
            gradient = torch.ops.aten.tanh_backward(gradient, self.tanh)
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


def change(z: Tensor, options: LogitOptions, into: Tensor | None = None) -> Changed:
    """The logits z' that z become, first scaled and then capped, with what leads back to z.

    It may be z itself that is written into: fresh memory costs more than the arithmetic.
    """
    cap, scale = options.softcap, options.logit_scale
    if cap is None:
        return Changed(z if scale == 1 else torch.mul(z, scale, out=into), None, scale)
    tanh = torch.tanh(torch.mul(z, scale / cap, out=into), out=into)
    return Changed(tanh * cap, tanh, scale)


def changed(z: Tensor, options: LogitOptions) -> Tensor:
    """The logits z' alone."""
    return change(z, options).z


def row_losses(options: LogitOptions, z: Tensor, *others: Any) -> tuple[Tensor]:
    """The loss of each row times its factor, (N,)."""
    p, hot, mass, factor, scale, floor = others
    z = changed(z, options)
    top = formulas.top_of(z)
    numbers = formulas.row_numbers(z, Target(p, hot, scale, floor), top)
    return (_loss(numbers, numbers.log_sum + top.squeeze(1), mass, factor, options.z_loss),)


def row_losses_by_hand(
    options: LogitOptions, z: Tensor, *others: Any, cotangents: Tensors | None = None
) -> tuple[tuple[Tensor], Tensor | None]:
    """The same, with the gradient by z."""
    p, hot, mass, factor, scale, floor = others
    y, to = Target(p, hot, scale, floor), change(z, options, into=z)
    S, top, numbers = formulas.softmax_and_numbers(to.z, y, None)
    lse = numbers.log_sum + top.squeeze(1)
    values = (_loss(numbers, lse, mass, factor, options.z_loss),)
    if cotangents is None:
        return values, None
    (t,) = cotangents
    assert t is not None
    t = t if factor is None else t * factor
    s = (1 if mass is None else mass) + 2 * options.z_loss * lse
    return values, to.pull_(formulas.gradient_(S, y, Factors(t * s, t)))


def _loss(
    numbers: Numbers, lse: Tensor, mass: Tensor | None, factor: Tensor | None, z_loss: float
) -> Tensor:
    """The loss of each row times its factor, from the row's numbers."""
    log_sum, gap = numbers
    loss = gap + (log_sum if mass is None else mass * log_sum)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss if factor is None else formulas.product(factor, loss)


def loss_of_capped(
    layer: tuple[Tensor, Tensor, Tensor | None],
    terms: Terms,
    options: LogitOptions,
    reduction: str,
    how: How,
) -> Tensor:
    """The loss of a layer's rows x (N, D), (N,) for 'none'."""
    x, W, b = layer
    x = kept(Inputs(x, keep=terms.keep))
    fn = functools.partial(row_losses, options)
    by_hand = functools.partial(row_losses_by_hand, options)
    of = RowFunction(fn, 1, _ROWS_IN, 1, how, by_hand)
    p, hot, scale, floor = terms.y
    if reduction == "none":
        (loss,) = results_of(of, (x, W, b, p, hot, terms.mass, None, scale, floor))
        return weighted(loss, terms)
    factor = terms.factor_of_kept(how.dtype)
    total = total_of(of, (x, W, b, p, hot, terms.mass, factor, scale, floor))
    return reduced(total, terms, reduction)
