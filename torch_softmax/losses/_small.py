"""The loss of a small batch in a handful of kernels, with its gradients taken along.

    L = −c Σ_n log S_n,label  and  ∂L/∂z = c (S − y),  with c = 1/N for a mean and 1 for a sum

It is what the sweeps come to for one block of logits, without an option to look after. For so few
logits it is Python, not arithmetic, that takes the time: this is tried before the arguments are
looked at any closer, and leaves to the others whatever it does not know.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as checks
from .._transforms import is_differentiated
from . import _formulas as formulas
from ._autograd import Mask, Tensors, may_take_gradients
from ._chunked import Sum, Total, taken_along
from ._dtypes import is_autocast
from ._numbers import RowNumbers
from ._sweeps import FEW_CLASSES, How, cached_rows, plan_of
from ._targets import Options

_DTYPES = (torch.float32, torch.float64)
_CLASSES = (Tensor, torch.nn.Parameter)


class Batch(NamedTuple):
    """What a loss was called with, of any type and shape; these are those of a small one."""

    x: Any  # (N, D); or without a W, the logits (N, K) themselves
    W: Any  # (K, D), of few classes; or None
    b: Any  # (K,), or None
    label: Any  # (N,), int64, all of them in range, and none ignored


def loss_if_small(batch: Batch, options: Options) -> Tensor | None:
    """The mean or sum of the losses of a small batch on a CPU; None for any other."""
    if not _is_small(batch, options):
        return None
    loss, *_ = taken_along(_total_of(batch.x, options.reduction), *batch)
    return loss


def loss_and_predicted_if_small(batch: Batch, options: Options) -> tuple[Tensor, Tensor] | None:
    """The same with the class of the largest logit of each row, (N,), int64."""
    if not _is_small(batch, options):
        return None
    loss, predicted = taken_along(_total_of(batch.x, options.reduction, predict=True), *batch)
    return loss, predicted


def _is_small(batch: Batch, options: Options) -> bool:
    """Whether it is; raises where only a label that is out of range speaks against it."""
    if torch.compiler.is_compiling() or not _are_left_out(options) or is_autocast("cpu"):
        return False
    if is_differentiated() and not may_take_gradients():
        return False
    classes = _classes_if_they_fit(*batch)
    if classes is None:
        return False
    return not checks.labels(batch.label, classes, options.ignore_index)


def _are_left_out(options: Options) -> bool:
    """Whether no option asks for more than a mean or a sum."""
    weight, ignore_index, reduction, label_smoothing, dtype = options
    return (
        weight is None
        and dtype is None
        and reduction in ("mean", "sum")
        and type(ignore_index) is int
        and type(label_smoothing) in (float, int)
        and label_smoothing == 0
    )


def _classes_if_they_fit(x: Any, W: Any, b: Any, label: Any) -> int | None:
    """K, if a batch's tensors fit together, on a CPU whose cache its logits fit."""
    if not (
        type(x) in _CLASSES
        and x.is_cpu
        and x.dtype in _DTYPES
        and x.dim() == 2
        and type(label) in _CLASSES
        and label.is_cpu
        and label.dtype == torch.int64
    ):
        return None
    count, classes = x.shape
    if W is not None:
        if not (_is_like(W, x) and W.dim() == 2 and W.shape[1] == classes):
            return None
        classes = W.shape[0]
        if classes > FEW_CLASSES or not (b is None or (_is_like(b, x) and b.shape == (classes,))):
            return None
    fits = label.shape == (count,) and count * classes > 0 and count <= cached_rows(classes)
    return classes if fits else None


def _is_like(tensor: Any, x: Tensor) -> bool:
    """Whether an argument is a tensor in the dtype of x, and on a CPU as well."""
    return type(tensor) in _CLASSES and tensor.is_cpu and tensor.dtype == x.dtype


def _total_of(x: Tensor, reduction: str, *, predict: bool = False) -> Total:
    return _total(x.shape[0], x.dtype, reduction, predict)


@functools.lru_cache(maxsize=32)
def _total(count: int, dtype: torch.dtype, reduction: str, predict: bool) -> Total:
    """The loss, a function of a batch; where it is differentiated again, it is the plan's."""
    scale = 1 / count if reduction == "mean" else 1

    def run(batch: Any, wanted: Mask) -> Sum:
        x, W, b, label = batch
        by_x, by_W, by_b, _ = wanted
        # The classes come first where a layer makes the logits: W xᵀ is faster than x Wᵀ.
        z, dim = (x, 1) if W is None else (_logits(x, W, b), 0)
        others = (z.max(dim).indices,) if predict else ()  # faster than argmax
        log_S = torch.log_softmax(z, dim)
        loss = F.nll_loss(log_S if W is None else log_S.t(), label, reduction=reduction)
        if not (by_x or by_W or by_b):
            return Sum(loss, (None,) * 4, others)
        g = formulas.subtract_one_hot_(log_S.exp_(), label, dim)
        if W is None:
            return Sum(loss, (g.mul_(scale), None, None, None), others)
        gradients = (
            torch.addmm(x, g.t(), W, beta=0, alpha=scale) if by_x else None,
            torch.addmm(W, g, x, beta=0, alpha=scale) if by_W else None,
            None if not by_b else g.mean(1) if reduction == "mean" else g.sum(1),
            None,
        )
        return Sum(loss, gradients, others)

    def complete(batch: Tensors) -> Tensors:
        x, *_ = batch
        assert x is not None
        factor = _factors(x, scale)
        return (*batch, None, None, None, factor, factor)

    return Total(plan_of(RowNumbers(), How(count, dtype, dtype)), run, complete)


def _factors(x: Tensor, scale: float) -> Tensor | None:
    """The scale as a factor of each row, (N,); None stands for 1."""
    return None if scale == 1 else x.new_full(x.shape[:1], scale)


def _logits(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """W xᵀ + b, (K, N)."""
    return W @ x.t() if b is None else torch.addmm(b.unsqueeze(1), W, x.t())
