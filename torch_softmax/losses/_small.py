"""The loss of a small batch on a CPU in a handful of kernels, with its gradients.

    L = −c Σ_n log S_n,label  and  ∂L/∂z = c (S − y),  with c = 1/N for a mean and 1 for a sum

A step on so few logits spends its time in Python, not in kernels. So everything that decides
whether a batch is small is one key, and a cache holds the loss for each key.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .._transforms import has_saved_tensors_hooks, is_differentiated, is_in_func
from . import _formulas as formulas
from ._autograd import Mask, Tensors
from ._chunked import Sum, TakenAlong, Total
from ._numbers import RowNumbers
from ._rows import How
from ._sweeps import FEW_CLASSES, cached_rows, plan_of

_NUMBERS, _NONE = (int, float, float, float), {type(None)}
# x (N, D), W (K, D), b (K,) or None, and class indices (N,); or logits (N, K), None, None, and
# class indices. Anything else is no small batch.
Batch = tuple[Any, Any, Any, Any]


def small_loss(
    batch: Batch,
    reduction: Any,
    numbers: tuple[Any, ...],
    left_out: tuple[Any, ...] = (),
    *,
    predict: bool = False,
) -> tuple[Tensor, ...] | None:
    """The loss of a small batch as `(loss,)`, or `(loss, predicted)` with the likeliest classes.

    The numbers are ignore_index, label_smoothing, logit_scale and z_loss; the other options must be
    None. A result of None leaves the work, and the errors, to the general way.
    """
    grad = torch.is_grad_enabled()
    if (
        torch.compiler.is_compiling()
        # A tensor may require a gradient, which it would not get, and must not enter the cache.
        or tuple(map(type, numbers)) != _NUMBERS
        or not _NONE.issuperset(map(type, left_out))
        or torch.is_autocast_enabled("cpu")
        # A transform differentiates each gradient again, and hooks want nothing saved beside them.
        or is_in_func()
        or forward_ad._current_level >= 0
        or (grad and has_saved_tensors_hooks())
    ):
        return None
    x, W, b, label = batch
    try:
        total = _total_if_small(
            (type(x), x.shape, x.dtype, x.device),
            None if W is None else (type(W), W.shape, W.dtype, W.device),
            None if b is None else (type(b), b.shape, b.dtype, b.device),
            (type(label), label.shape, label.dtype, label.device),
            (reduction, numbers, predict),
            torch.get_num_threads(),
        )
        if total is None:
            return None
    except (AttributeError, TypeError, RuntimeError):  # an argument without a shape, or a hash
        return None
    try:
        if grad:
            results: tuple[Tensor, ...] = SmallLoss.apply(total, *batch)
            return results
        loss, _, predicted = total.run(batch, (False,) * 4)
        return loss, *predicted
    except (IndexError, RuntimeError):  # kernels refuse labels that are ignored or out of range
        return None


class SmallLoss(TakenAlong):
    """A sum with its gradients, of which most are for a plain backward of the loss itself."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *others: Tensor) -> Any:
        gradients = ctx.taken
        if gradients is None or is_differentiated() or upstream.item() != 1:
            return TakenAlong.backward(ctx, upstream, *others)
        ctx.taken = None
        ctx.saved_tensors  # noqa: B018  raises where one was changed in place
        return None, *gradients


@functools.lru_cache(maxsize=256)
def _total_if_small(x: Any, W: Any, b: Any, label: Any, options: Any, _: int) -> Total | None:
    """The loss as a function of a batch; None for arguments that are not a small batch."""
    (_, shape, dtype, device), (reduction, (ignored, *numbers), predict) = x, options
    count, classes = shape if len(shape) == 2 else (0, 0)
    K = classes if W is None else W[1][0] if W[1] else 0
    expected = [(x, (count, classes)), (W, (K, classes)), (b, (K,))]
    fits = (
        all(t is None or t[1:] == (size, dtype, device) for t, size in expected)
        and all(t is None or t[0] in (Tensor, torch.nn.Parameter) for t in (x, W, b, label))
        and label[1:] == ((count,), torch.int64, device)
        and device.type == "cpu"
        and dtype in (torch.float32, torch.float64)
        and (W is None or K <= FEW_CLASSES)
        and 0 < count <= cached_rows(K)
        and K > 0
    )
    # An ignored label that is a class would pass the kernels' check.
    plain = numbers == [0, 1, 0] and reduction in ("mean", "sum") and not 0 <= ignored < K
    return _total(count, dtype, reduction, predict, ignored) if fits and plain else None


def _total(
    count: int, dtype: torch.dtype, reduction: str, predict: bool, ignore_index: int
) -> Total:
    """The loss as a function of a batch; differentiated again, it is the plan's."""

    def run(batch: Any, needed: Mask) -> Sum:
        x, W, b, label = batch
        by_x, by_W, by_b, _ = needed
        # The classes come first where a layer makes the logits: W xᵀ is faster than x Wᵀ.
        z, dim = (x, 1) if W is None else (_logits(x, W, b), 0)
        predicted = (z.max(dim).indices,) if predict else ()  # faster than argmax
        log_S = torch.log_softmax(z, dim)
        of_rows = log_S if W is None else log_S.t()
        loss = F.nll_loss(of_rows, label, ignore_index=ignore_index, reduction=reduction)
        if not (by_x or by_W or by_b):
            return Sum(loss, (None,) * 4, predicted)
        g = formulas.subtract_one_hot_(log_S.exp_(), label, dim)
        if reduction == "mean":
            g.mul_(1 / count)
        if W is None:
            return Sum(loss, (g, None, None, None), predicted)
        by_layer = (g @ x if by_W else None, g.sum(1) if by_b else None)
        return Sum(loss, (g.t() @ W if by_x else None, *by_layer, None), predicted)

    def complete(batch: Tensors) -> Tensors:
        x, *_ = batch
        factor = _factors(x, reduction)
        return (*batch, None, None, None, factor, factor)

    return Total(plan_of(RowNumbers(), How(count, dtype, dtype)), run, complete)


def _factors(x: Any, reduction: str) -> Tensor | None:
    """The factor of each row, (N,); None stands for 1."""
    return x.new_full(x.shape[:1], 1 / x.shape[0]) if reduction == "mean" else None


def _logits(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """W xᵀ + b, (K, N)."""
    return W @ x.t() if b is None else torch.addmm(b.unsqueeze(1), W, x.t())
