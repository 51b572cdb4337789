"""Cross-entropy of logits that are scaled, capped, and penalised where their softmax is not normal.

    z' = c tanh(a z / c),  L = Σ_k y_k (lse − z'_k) + ζ lse²  with  lse = log Σ_k e^{z'_k}

for a cap c, a scale a, and a factor ζ.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import _formulas as formulas
from ._cross_entropy import reduced, weighted
from ._formulas import Target
from ._mapped import RowFunction, results_of, total_of
from ._sweeps import How, Inputs, kept
from ._targets import LogitOptions, Terms

# The tensors beside the logits: p, hot, mass and factor have rows, scale and floor do not.
_ROWS_IN = (True, True, True, True, False, False)


def changed(z: Tensor, options: LogitOptions) -> Tensor:
    """The logits z' that z become, first scaled and then capped."""
    cap, scale = options.softcap, options.logit_scale
    if cap is not None:
        return torch.tanh(z * (scale / cap)) * cap
    return z if scale == 1 else z * scale


def row_losses(options: LogitOptions, z: Tensor, *others: Any) -> tuple[Tensor]:
    """The loss of each row times its factor, (N,)."""
    p, hot, mass, factor, scale, floor = others
    z = changed(z, options)
    top = formulas.top_of(z)
    log_sum, gap = formulas.row_numbers(z, Target(p, hot, scale, floor), top)
    loss = gap + (log_sum if mass is None else mass * log_sum)
    if options.z_loss:
        loss = loss + options.z_loss * (log_sum + top.squeeze(1)).square()
    return (loss if factor is None else formulas.product(factor, loss),)


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
    of = RowFunction(functools.partial(row_losses, options), 1, _ROWS_IN, 1, how)
    p, hot, scale, floor = terms.y
    if reduction == "none":
        (loss,) = results_of(of, (x, W, b, p, hot, terms.mass, None, scale, floor))
        return weighted(loss, terms)
    factor = terms.factor_of_kept(how.dtype)
    total = total_of(of, (x, W, b, p, hot, terms.mass, factor, scale, floor))
    return reduced(total, terms, reduction)
