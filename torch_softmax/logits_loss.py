"""Cross-entropy of given logits: its gradient S − y and its Hessian, both in closed form."""

from math import nan
from typing import Any

from torch import Tensor
from torch.autograd import Function

from . import _checks as checks
from . import _formulas as formulas
from ._chunks import accumulation_dtype, cached_slices, loss_dtype
from ._functions import applier, fold_batch_into_rows, nested_forward_mode
from ._targets import Targets, fold_options


class CrossEntropyFunction(Function):
    """The loss of each row, L = m log Σ_j e^{z_j} − y · z."""

    @staticmethod
    def forward(z: Tensor, target: Tensor, scale: Tensor | None, floor: Tensor | None) -> Tensor:
        y = Targets(target, scale, floor)
        losses = z.new_empty(z.shape[0], dtype=accumulation_dtype(z.dtype))
        for rows in cached_slices(z):
            wide = z[rows].to(losses.dtype)
            losses[rows] = formulas.losses(wide, formulas.softmax(wide, 1), y.rows(rows))
        return losses

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> Any:
        needs_z, needs_p, *_ = ctx.needs_input_grad
        dz, dp = row_gradients(*ctx.saved_tensors, r, needs_z, needs_p)
        return dz, dp, None, None

    @staticmethod
    @nested_forward_mode
    def jvp(ctx: Any, saved: Any, dz: Tensor | None, dp: Tensor | None, *_: None) -> Tensor:
        z, *targets = saved
        wide = z.to(accumulation_dtype(z.dtype))
        return formulas.curvature(wide, Targets(*targets), None, dz, dp)[2]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return fold_batch_into_rows(CrossEntropyFunction, info, in_dims, *args)


class CrossEntropyGradient(Function):
    """The gradient of Σ_n r_n L_n with respect to z and to the probabilities, as asked for."""

    @staticmethod
    def forward(
        z: Tensor,
        target: Tensor,
        scale: Tensor | None,
        floor: Tensor | None,
        r: Tensor,
        needs_z: bool,
        needs_p: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        y = Targets(target, scale, floor)
        dz = z.new_empty(z.shape) if needs_z else None
        dp = target.new_empty(target.shape) if needs_p else None
        for rows in cached_slices(z):
            wide, y_part, r_part = z[rows].to(r.dtype), y.rows(rows), r[rows]
            if dz is not None:
                softmax = formulas.softmax(wide, 1)
                dz[rows] = formulas.gradients_(softmax, y_part, r_part)
            if dp is not None:
                dp[rows] = formulas.target_gradients(wide, y_part, r_part)
        return dz, dp

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *saved, ctx.needs_z, ctx.needs_p = inputs
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, dp: Tensor | None) -> Any:
        z, *targets, r = ctx.saved_tensors
        wide = z.to(r.dtype)
        along_z, along_p, along_r = formulas.curvature(wide, Targets(*targets), r, dz, dp)
        return along_z, along_p, None, None, along_r, None, None

    @staticmethod
    @nested_forward_mode
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        z, *targets, r = saved
        dz, dp, _, _, dr, *_ = tangents
        # The Hessian is symmetric: along a direction, forward and reverse mode are one.
        along_z: Tensor | None
        wide = z.to(r.dtype)
        along_z, along_p, _ = formulas.curvature(wide, Targets(*targets), r, dz, dp)
        if dr is not None:  # the gradient is linear in r
            more_z, more_p = row_gradients(z, *targets, dr, ctx.needs_z, ctx.needs_p)
            along_z = along_z + more_z if ctx.needs_z else None
            along_p = along_p + more_p if ctx.needs_p else None
        return (
            along_z.to(z.dtype) if along_z is not None and ctx.needs_z else None,
            along_p.to(targets[0].dtype) if along_p is not None and ctx.needs_p else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return fold_batch_into_rows(CrossEntropyGradient, info, in_dims, *args)


row_losses = applier(CrossEntropyFunction)
row_gradients = applier(CrossEntropyGradient)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy between logits and targets, a drop-in for `torch.nn.functional.cross_entropy`.

    L = −Σ_k y_k log S_k with S = softmax(input), and the gradient is S − y in closed form, to any
    order: double backward, forward mode and `torch.func` compute S ∘ u − S (S · u), and never
    differentiate through the steps of the loss.

    Args:
        input: Logits, (C), (N, C) or (N, C, d1, ...), of a floating-point dtype. Never written to.
        target: Class indices in [0, C), of an integer dtype and shape (), (N) or (N, d1, ...); or
            the probabilities of the classes, of a floating-point dtype and the shape of `input`.
            Probabilities get a gradient where they require one.
        weight: A weight for each class, (C).
        ignore_index: A class index whose rows add nothing to loss and gradient.
        reduction: 'mean' (over the weights of the targets that are not ignored), 'sum' or 'none'.
        label_smoothing: The share of the target, in [0, 1], that is spread evenly over all classes.

    Returns:
        The loss in the dtype of `input` (float32 under autocast): a scalar, or the shape of the
        class indices for 'none'. The mean over no rows at all is nan, and its gradient 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes don't fit, a class index is out of range, or an option is unknown.

    Example:
        >>> import torch
        >>> input = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
        >>> loss = cross_entropy(input, torch.tensor([0]))
        >>> loss.backward()
        >>> loss.item() == -torch.softmax(input, 1)[0, 0].log().item()
        True
        >>> input.grad
        tensor([[-0.3348,  0.2447,  0.0900]])

    Source: Bishop, Pattern Recognition and Machine Learning (2006), equations 4.108 and 4.109.
    """
    checks.floating("input", input)
    if input.dim() == 0:
        raise ValueError("input must have a dimension of classes, got a scalar")
    class_dim = 0 if input.dim() == 1 else 1
    z = input.movedim(class_dim, -1)
    shape, classes = z.shape[:-1], z.shape[-1]
    checks.options(classes, weight, ignore_index, reduction, label_smoothing)
    checks.target(target, shape, input.shape)
    ignored = None
    if target.is_floating_point():
        target = target.movedim(class_dim, -1).reshape(-1, classes)
    else:
        ignored = ignore_index if checks.labels(target, classes, ignore_index) else None
        target = target.reshape(-1)

    dtype = accumulation_dtype(input.dtype)
    rows = fold_options(target, classes, dtype, weight, ignored, label_smoothing)
    loss: Tensor = row_losses(z.reshape(-1, classes), *rows.targets[:3])
    if rows.keep is not None:
        loss = loss.masked_fill(~rows.keep, 0)
    loss = loss.reshape(shape) if reduction == "none" else loss.sum()
    if reduction == "mean":
        loss = loss / rows.divisor
        if rows.empty is not None:
            loss = loss.masked_fill(rows.empty, nan)
    return loss.to(loss_dtype(input))
