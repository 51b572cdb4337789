"""The log-probability of each row's label, with what else is read off the row's numbers.

    log S_label = −(log_sum + gap),  lse = log_sum + top,  H = −Σ_k S_k log S_k = log_sum + mean_gap

with logits that are scaled and capped first; the numbers and their derivatives are in `_formulas`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ._dtypes import accumulation_dtype, cast, outside_autocast, product_dtype
from ._formulas import Numbers
from ._numbers import RowNumbers
from ._operators import results_of
from ._rows import Layer, Operands
from ._targets import NO_OPTIONS, Counted, LogitOptions, fold
from .linear import as_multiplied, dtypes_and_chunks


class LogProb(NamedTuple):
    """What a language model says of the labels of some rows, each of their shape.

    Args:
        log_prob: log S_label.
        entropy: H = −Σ_k S_k log S_k, in nats; nan where it was not asked for.
        logsumexp: log Σ_k e^{z_k}.
        correct: Whether the label is the likeliest class, a bool.
    """

    log_prob: Tensor
    entropy: Tensor
    logsumexp: Tensor
    correct: Tensor


def linear_log_prob(
    layer: Layer,
    target: Tensor,
    options: LogitOptions,
    ignore_index: int,
    chunk_size: int | None,
    dtype: torch.dtype | None,
    *,
    entropy: bool,
) -> LogProb:
    """What a layer's logits say of class indices (...), to be differentiated to any order."""
    checks.layer_of_two_dimensions(*layer)
    checks.class_indices(target, layer.x.shape[:-1])
    may_ignore = checks.labels(target, len(layer.W), ignore_index)
    given = NO_OPTIONS._replace(
        ignore_index=ignore_index, dtype=dtype or accumulation_dtype(product_dtype(*layer))
    )
    returned, how = dtypes_and_chunks(layer, target, given, chunk_size)
    terms = fold(target, given, len(layer.W), how.dtype, may_ignore=may_ignore)
    asked = ("log_sum", "gap", "top", "is_top", *(("mean_gap",) if entropy else ()))
    function = RowNumbers(asked, options.softcap, options.logit_scale)
    flat, counted = as_multiplied(layer), Counted.of(terms.keep)
    with outside_autocast(flat.x):
        values = results_of(function, how, Operands((flat,), tuple(terms.y)), counted)
    numbers = Numbers(**dict(zip(asked, values, strict=True)))
    uncertainty = torch.full_like(numbers.gap, torch.nan)
    if entropy:
        uncertainty = numbers.log_sum + numbers.mean_gap
    results = (
        -(numbers.log_sum + numbers.gap),
        uncertainty,
        numbers.log_sum + numbers.top.detach(),
        numbers.is_top.detach(),
    )
    log_prob, uncertainty, logsumexp, is_top = (
        cast(counted.read_zeros(result), returned).reshape(target.shape) for result in results
    )
    return LogProb(log_prob, uncertainty, logsumexp, is_top != 0)
