"""The log-probability of each row's label, with what else is read off the row's logits.

    log S_label = z_label − lse,  lse = log Σ_k e^{z_k},  H = −Σ_k S_k log S_k = lse − Σ_k S_k z_k

with logits z that are scaled and capped first. All are worked out relative to the largest logit.
Their gradients, with e_label for 1 at the label:

    ∂log S_label/∂z = e_label − S,  ∂H/∂z = −S ∘ (log S + H),  ∂lse/∂z = S
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from . import _formulas as formulas
from ._autograd import Tensors
from ._capped import change, changed
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


class _Row(NamedTuple):
    """What the results of some rows are made from, relative to the largest logit."""

    top: Tensor  # (n, 1)
    gap: Tensor  # (n,), top − z_label
    below: Tensor  # (n, K), z − top
    shares: Tensor  # (n, K), e^{z − top}
    total: Tensor  # (n,), their sum
    entropy: Tensor  # (n,)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The log-probability, entropy and lse of each row, (n,)."""
        log_sum = self.total.log()
        return -(log_sum + self.gap), self.entropy, log_sum + self.top.squeeze(1)

    def is_first(self, z: Tensor, label: Tensor) -> Tensor:
        """1 where the label is the likeliest class, (n,)."""
        return ((z.argmax(1) == label) & ~self.gap.isnan()).to(z.dtype)


def _row_of(z: Tensor, label: Tensor) -> _Row:
    """What the results of logits (n, K) are made from."""
    top = formulas.top_of(z)
    # A class whose logit is −∞ has no share of anything, while 0 · ∞ would be nan.
    below = (z - top).clamp(min=_NOTHING)
    shares = below.exp()
    total = shares.sum(1)
    entropy = total.log() - (shares * below).sum(1) / total
    return _Row(top, Target(label).below(top, z), below, shares, total, entropy)


def row_log_probs(options: LogitOptions, z: Tensor, label: Tensor) -> tuple[Tensor, ...]:
    """The log-probability, entropy and lse of each row, (n,), and 1 where the label is first."""
    z = changed(z, options)
    row = _row_of(z, label)
    return *row.results(), row.is_first(z, label)


def row_log_probs_by_hand(
    options: LogitOptions, z: Tensor, label: Tensor, cotangents: Tensors | None = None
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """The same, with the gradient by z."""
    to = change(z, options, into=z)
    row = _row_of(to.z, label)
    if cotangents is None:
        return (*row.results(), row.is_first(to.z, label)), None
    by_log_prob, by_entropy, by_lse, _ = cotangents
    # S ∘ (l − a − h (log S + H)) + a e_label, for the cotangents a, h and l in this order
    slope = torch.zeros_like(row.total) if by_lse is None else by_lse
    if by_log_prob is not None:
        slope = slope - by_log_prob
    gradient = row.shares.div_(row.total.unsqueeze(1))
    if by_entropy is None:
        gradient *= slope.unsqueeze(1)
    else:
        slope = slope - by_entropy * (row.entropy - row.total.log())
        gradient *= row.below.mul_(-by_entropy.unsqueeze(1)).add_(slope.unsqueeze(1))
    if by_log_prob is not None:
        gradient = Target(label).subtract_from_(gradient, -by_log_prob)
    # Whether the label is first has no gradient, and takes as long as the exponentials.
    return (*row.results(), None), to.pull_(gradient)


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
    fn = functools.partial(row_log_probs, options)
    by_hand = functools.partial(row_log_probs_by_hand, options)
    of = RowFunction(fn, 1, (True,), len(LogProb._fields), how, by_hand)
    x, W, b = tensors_of([layer])
    with outside_autocast(layer.input):
        results = results_of(of, (kept(Inputs(x, keep=terms.keep)), W, b, terms.y.target))
    if terms.keep is not None:
        results = tuple(result.masked_fill(~terms.keep, 0) for result in results)
    log_prob, entropy, logsumexp, is_first = (result.reshape(target.shape) for result in results)
    return LogProb(log_prob, entropy, logsumexp, is_first != 0)
