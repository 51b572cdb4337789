"""Cross-entropy of given logits, whose gradient is S − y."""

import math

from torch import Tensor

from .. import _checks as checks
from ._cross_entropy import loss_of
from ._dtypes import accumulation_dtype, cast, loss_dtype, widest
from ._sweeps import How, Inputs, logits_step
from ._targets import Options, check_classes, fold


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
    inputs = Inputs(z, None, None, *terms.y, terms.keep)
    loss = loss_of(inputs, terms, options.reduction, How(logits_step(z), dtype, dtype))
    return cast(loss.reshape(shape) if options.reduction == "none" else loss, returned)
