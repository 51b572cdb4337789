"""Cross-entropy and log-probabilities of a linear layer, of whose logits a few rows are held.

    log S_label = −(log_sum + gap),  lse = log_sum + top,  H = −Σ_k S_k log S_k = log_sum + mean_gap

for the numbers of a row in `_formulas`, of logits that are scaled and capped first.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import _checks as checks
from ._dtypes import accumulation_dtype, cast, loss_dtype, outside_autocast, product_dtype, widest
from ._formulas import Across, Numbers
from ._numbers import RowNumbers
from ._operators import results_of
from ._products import multiplied_in
from ._rows import How, Layer, Operands
from ._targets import (
    NO_OPTIONS,
    Counted,
    LogitOptions,
    Options,
    RowOptions,
    Terms,
    check_classes,
    fold,
)
from .logits import PLAIN, cross_entropy, loss_of


def default_chunk_size(classes: int, features: int, device: torch.device) -> int:
    """The rows of a chunk: of 2²⁴ logits on a CPU, but at least 512; else D, but at least 1024."""
    # Each chunk adds a product to ∂L/∂W, and goes over its K·D numbers for that: with fewer rows
    # than these the additions, and not the products, would set the pace.
    if device.type == "cpu":
        return max(512, 2**24 // classes)
    return max(1024, features)


class Extra(NamedTuple):
    """The options that torch's function does not have."""

    rows: RowOptions = RowOptions()
    logits: LogitOptions = LogitOptions()

    def given(self) -> str:
        """The name of one that is not left out, or ''."""
        are_given = {
            "row_weight": self.rows.weight is not None,
            "count": self.rows.divisor is not None,
            "softcap": self.logits.softcap != math.inf,
            "logit_scale": self.logits.logit_scale != 1,
            "z_loss": self.logits.z_loss != 0,
        }
        return next((name for name, is_given in are_given.items() if is_given), "")


def linear_cross_entropy(
    layer: Layer, target: Tensor, options: Options, extra: Extra, chunk_size: int | None
) -> Tensor:
    """The loss of a layer's logits, to be differentiated to any order."""
    check(layer, target, options)
    classes, *further = layer.W.shape[:-1]
    if further:
        if extra.given():
            raise ValueError(
                f"{extra.given()} must be left out for a linear_weight of more than two "
                f"dimensions, got shape {tuple(layer.W.shape)}"
            )
        return cross_entropy(_all_logits(layer), target, options)
    if extra.rows.weight is not None:
        shape = tuple(layer.x.shape[:-1])
        checks.shape("row_weight", extra.rows.weight, shape, "as input without D")
    may_ignore = checks.labels(target, classes, options.ignore_index)
    returned, how = dtypes_and_chunks(layer, target, options, chunk_size)
    terms = fold(target, options, classes, how.dtype, may_ignore=may_ignore)
    terms = terms.with_rows(extra.rows, how.dtype)
    loss = loss_of_layer(layer, terms, options.reduction, how, extra.logits)
    return cast(loss, returned)


def check(layer: Layer, target: Tensor, options: Options) -> None:
    """Raise unless the arguments fit together."""
    checks.linear_layer(*layer)
    *shape, _ = layer.x.shape
    classes, *extra = layer.W.shape[:-1]
    check_classes(classes, options.weight)
    checks.target(target, (*shape, *extra), (*shape, classes, *extra))


def dtypes_and_chunks(
    layer: Layer,
    target: Tensor,
    options: Options,
    chunk_size: int | None,
) -> tuple[torch.dtype, How]:
    """The dtype of the loss, and how its logits are worked out."""
    products = product_dtype(*layer)
    returned = options.dtype or loss_dtype(products, target, options.weight)
    logits = multiplied_in(widest(products, options.dtype), layer.x.device)
    dtype = accumulation_dtype(widest(logits, returned))
    classes, *_, features = layer.W.shape
    step = chunk_size or default_chunk_size(classes, features, layer.x.device)
    return returned, How(step, dtype, logits)


def loss_of_layer(
    layer: Layer,
    terms: Terms,
    reduction: str,
    how: How,
    options: LogitOptions = PLAIN,
    across: Across | None = None,
) -> Tensor:
    """The loss of a layer (C, D) from its terms, of any leading dimensions for 'none'."""
    flat = as_multiplied(layer)
    with outside_autocast(flat.x):
        loss = loss_of(flat, terms, reduction, how, options, across)
    return loss.reshape(layer.x.shape[:-1]) if reduction == "none" else loss


def as_multiplied(layer: Layer) -> Layer:
    """A layer in the dtype of its products, with one dimension of rows."""
    *shape, features = layer.x.shape
    dtype = product_dtype(*layer)
    x, W, b = (None if t is None else cast(t, dtype) for t in layer)
    assert x is not None
    return Layer(x.reshape(math.prod(shape), features), W, b)


def _all_logits(layer: Layer) -> Tensor:
    """The logits (N, C, d1, ...) of a layer (C, d1, ..., D)."""
    dtype = product_dtype(*layer)
    x, W, b = (None if t is None else cast(t, dtype) for t in layer)
    assert x is not None
    assert W is not None
    flat_bias = None if b is None else b.flatten()
    logits: Tensor = linear(x, W.flatten(0, -2), flat_bias).unflatten(1, W.shape[:-1])
    return logits


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
