"""The three functions, as drop-ins for those of `torch.nn.functional`."""

import sys
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from .losses import linear, logits
from .losses import softmax as _softmax
from .losses._autograd import overridable, unwrapped
from .losses._small import Batch, loss_if_small
from .losses._targets import Options, logit_options_of, options_of, row_options_of

__all__ = ["cross_entropy", "linear_cross_entropy", "softmax"]


@overridable
def softmax(input: Tensor, dim: int = -1, *, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax along one dimension, whose derivatives of every order are in closed form.

    S_i = e^{z_i} / Σ_j e^{z_j}, with the Jacobian ∂S_j/∂z_i = S_i (δ_ij − S_j).

    Args:
        input: Logits z of any shape and a floating-point dtype.
        dim: The dimension along which the result sums to 1.
        dtype: What the input is cast to first, and so that of the result; None for its own.

    Returns:
        A tensor of the shape of `input`, in `dtype` or that of `input` (float32 under autocast).

    Raises:
        TypeError: `input` is no tensor of a floating-point dtype, or `dtype` is none.
        IndexError: `input` has no dimension `dim`.

    Example:
        >>> import torch
        >>> softmax(torch.tensor([0.0, 1.0, 1.0]))
        tensor([0.1554, 0.4223, 0.4223])

    Source: Bishop, Pattern Recognition and Machine Learning (2006), equations 4.104 and 4.106.
    """
    checks.floating("input", input)
    if dtype is not None:
        checks.floating_dtype("dtype", dtype)
        input = input.to(dtype)
    return _softmax.softmax(input, dim)


@overridable
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
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
        ignore_index: A class index whose rows add nothing to loss and gradient, whatever they
            hold. For probabilities it must be left out.
        reduction: 'mean' (over the weights of the targets that are not ignored), 'sum' or 'none'.
        label_smoothing: The share of the target, in [0, 1], that is spread evenly over all classes.
        dtype: That of the loss, of the losses of rows, and of what they are scaled with; the
            gradients keep the dtype of the inputs. None is torch's: in half precision the loss is
            rounded to it, to three digits. `torch.float32` avoids that.

    Returns:
        The loss in `dtype`, or that of `input` (float32 under autocast), to which probabilities
        promote it: a scalar, or the shape of the class indices for 'none'. The mean over no rows at
        all is nan, and its gradient 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes don't fit, a class index is out of range, or an option is unknown.

    Example:
        >>> import torch
        >>> input = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
        >>> loss = cross_entropy(input, torch.tensor([0]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.4076
        >>> input.grad
        tensor([[-0.3348,  0.2447,  0.0900]])

    Source: Bishop, Pattern Recognition and Machine Learning (2006), equations 4.108 and 4.109.
    """
    given = Options(weight, ignore_index, reduction, label_smoothing, dtype)
    if (small := loss_if_small(Batch(input, None, None, target), given)) is not None:
        return small
    options = options_of(weight, ignore_index, reduction, label_smoothing, dtype)
    return logits.cross_entropy(input, target, options)


@overridable
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    """Cross-entropy of a linear layer's logits, which are never held for more than a few rows.

    The same as `cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`, with
    z = x Wᵀ + b, S = softmax(z), ∂L/∂x = Wᵀ(S − y) and ∂L/∂W = (S − y) xᵀ, in memory for
    `chunk_size` rows of logits. Double backward, Hessian-vector products, forward mode and
    `torch.func` are computed in chunks as well, to any order.

    Args:
        input: x, (D) or (..., D) with any leading dimensions, of a floating-point dtype.
        linear_weight: W, (C, D). With further dimensions, (C, d1, ..., D), each input (N, D) has
            a loss for each of d1, ...; in this case alone, all logits are held.
        target: Class indices of an integer dtype, (), (...) or (N, d1, ...); or the probabilities
            of the classes of a floating-point dtype, (C), (..., C) or (N, C, d1, ...).
            Probabilities get a gradient where they require one.
        linear_bias: b, of the shape of `linear_weight` without D.
        weight: A weight for each class, (C).
        reduction: 'mean' (over the weights of the targets that are not ignored), 'sum' or 'none'.
        ignore_index: A class index whose rows add nothing to loss and gradient, whatever they
            hold; None stands for -100, and is what class probabilities require.
        label_smoothing: The share of the target, in [0, 1], that is spread evenly over all classes.
        chunk_size: The rows whose logits are held at a time. It changes speed and memory, not the
            result. None stands for as many as give 2²⁴ logits, but at least 512.
        dtype: That of the logits, of the loss, of the losses of rows, and of what they are scaled
            with; the gradients keep the dtype of the inputs. None is torch's: in half precision
            logits and loss are rounded to it. `torch.float32` avoids that, and is what models in
            half precision should take.
        softcap: c, above 0, which the logits are kept within by c tanh(z / c), after their scale.
        logit_scale: What the logits are multiplied with first.
        z_loss: ζ, at least 0, which adds ζ (log Σ_k e^{z_k})² to the loss of each row that counts.
        row_weight: What the loss of each row is multiplied with, of the shape of the class indices
            and a floating-point dtype. It gets a gradient where it requires one. A mean still
            divides by the weights of the targets, or by `count`.
        count: What a mean divides by in place of these weights, a number or a tensor (), which is
            never waited for: micro-batches and ranks that share one add up to one mean. The mean
            over a count of 0 is 0, and so is its gradient.

    Returns:
        The loss, in `dtype` or the one that `input` and `linear_weight` promote to (float32 under
        autocast), and probabilities promote that: a scalar, or the shape of the class indices for
        'none'. The mean over no rows at all is nan, and its gradient 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes don't fit, a class index is out of range, or an option is unknown.
        NotImplementedError: An option that torch's function does not have is given, and
            `linear_weight` is sharded.

    Example:
        >>> input = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> linear_weight = torch.zeros(3, 2, requires_grad=True)
        >>> loss = linear_cross_entropy(input, linear_weight, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> linear_weight.grad.round(decimals=4)
        tensor([[-0.3333, -0.1667],
                [ 0.1667,  0.8333],
                [ 0.1667, -0.6667]])

    Source: Bishop, Pattern Recognition and Machine Learning (2006), equations 4.108 to 4.110.
    """
    extra = linear.NO_EXTRA
    # A tensor is looked at: it may require a gradient, which it would not get.
    are_floats = type(logit_scale) is float and type(z_loss) is float
    are_none = softcap is None and row_weight is None and count is None
    if not (are_none and are_floats and logit_scale == 1 and z_loss == 0):
        extra = linear.Extra(
            row_options_of(row_weight, count), logit_options_of(softcap, logit_scale, z_loss)
        )
    if chunk_size is None and extra is linear.NO_EXTRA:
        ignored = -100 if ignore_index is None else ignore_index
        given = Options(weight, ignored, reduction, label_smoothing, dtype)
        batch = Batch(input, linear_weight, linear_bias, target)
        if (small := loss_if_small(batch, given)) is not None:
            return small
    layer = linear.Layer(input, linear_weight, linear_bias)
    if ignore_index is None:
        ignore_index = -100
    elif isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError(f"ignore_index must be None for class probabilities, got {ignore_index!r}")
    options = options_of(weight, ignore_index, reduction, label_smoothing, dtype)
    chunk_size = checks.chunk_size(chunk_size)
    if _any_sharded(*layer, target, weight):
        from .distributed._sharded import sharded_cross_entropy

        if extra.given():
            raise NotImplementedError(
                f"{extra.given()} must be left out where linear_weight is sharded"
            )
        loss: Tensor = sharded_cross_entropy(layer, target, options, chunk_size)
        return loss
    return linear.linear_cross_entropy(layer, target, options, extra, chunk_size)


def _any_sharded(*tensors: Any) -> bool:
    """Whether a tensor lies on a device mesh, as a DTensor."""
    # Whoever made one has imported this, and nobody else should wait for it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(unwrapped(t), module.DTensor) for t in tensors)
