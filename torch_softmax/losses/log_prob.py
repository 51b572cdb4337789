"""The log-probability of each row's label, with what else is read off the row's logits.

    log S_label = z_label − lse,  lse = log Σ_k e^{z_k},  H = −Σ_k S_k log S_k = lse − Σ_k S_k z_k

with logits z that are scaled and capped first. All are worked out relative to the largest logit.
"""

import functools
from typing import NamedTuple

from torch import Tensor

from .. import _checks as checks
from . import _formulas as formulas
from ._capped import changed
from ._dtypes import outside_autocast
from ._formulas import Target
from ._mapped import RowFunction, results_of
from ._sweeps import Inputs, kept
from ._targets import NO_OPTIONS, LogitOptions, fold
from .linear import Layer
from .mapped import how_of, tensors_of

_NOTHING = -1e4  # e to this power is 0 in every dtype


class LogProb(NamedTuple):
    """What a language model says of the labels of some rows, each of their shape.

    Args:
        log_prob: log S_label.
        entropy: H = −Σ_k S_k log S_k, in nats.
        logsumexp: log Σ_k e^{z_k}.
        correct: Whether the label is the likeliest class, a bool.
    """

    log_prob: Tensor
    entropy: Tensor
    logsumexp: Tensor
    correct: Tensor


def row_log_probs(options: LogitOptions, z: Tensor, label: Tensor) -> tuple[Tensor, ...]:
    """The log-probability, entropy and lse of each row, (n,), and 1 where the label is first."""
    z = changed(z, options)
    top = formulas.top_of(z)
    gap = Target(label).below(top, z)
    # A class whose logit is −∞ has no share of anything, while 0 · ∞ would be nan.
    below = (z - top).clamp(min=_NOTHING)
    shares = below.exp()
    total = shares.sum(1)
    log_sum = total.log()
    entropy = log_sum - (shares * below).sum(1) / total
    is_first = ((z.argmax(1) == label) & ~gap.isnan()).to(z.dtype)
    return -(log_sum + gap), entropy, log_sum + top.squeeze(1), is_first


def linear_log_prob(
    layer: Layer,
    target: Tensor,
    options: LogitOptions,
    ignore_index: int,
    chunk_size: int | None,
) -> LogProb:
    """What a layer's logits say of class indices (...), to be differentiated to any order."""
    checks.layer_of_two_dimensions(*layer)
    checks.class_indices(target, layer.input.shape[:-1])
    may_ignore = checks.labels(target, len(layer.linear_weight), ignore_index)
    how = how_of([layer], chunk_size)
    of_labels = NO_OPTIONS._replace(ignore_index=ignore_index)
    terms = fold(target, of_labels, len(layer.linear_weight), how.dtype, may_ignore=may_ignore)
    of = RowFunction(
        functools.partial(row_log_probs, options), 1, (True,), len(LogProb._fields), how
    )
    x, W, b = tensors_of([layer])
    with outside_autocast(layer.input):
        results = results_of(of, (kept(Inputs(x, keep=terms.keep)), W, b, terms.y.target))
    if terms.keep is not None:
        results = tuple(result.masked_fill(~terms.keep, 0) for result in results)
    log_prob, entropy, logsumexp, is_first = (result.reshape(target.shape) for result in results)
    return LogProb(log_prob, entropy, logsumexp, is_first != 0)
