"""The functions: drop-ins for those of `torch.nn.functional`, and more of a linear layer's."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from ._transforms import unwrapped
from .losses import distillation, linear, logits, mapped
from .losses._autograd import overridable
from .losses._rows import Layer
from .losses._small import small_loss
from .losses._targets import logit_options_of, options_of, row_options_of
from .losses.linear import LogProb

__all__ = [
    "LogProb",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_log_prob",
    "map_logits",
    "softmax",
]


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
    return logits.softmax(input, dim)


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
    batch, numbers = (input, None, None, target), (ignore_index, label_smoothing, 1.0, 0.0)
    if small := small_loss(batch, reduction, numbers, (weight, dtype)):
        return small[0]
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
            hold; None stands for -100, and is what class probabilities require. These rows are not
            multiplied: on a GPU, a call with class indices waits once for their number, except
            while a CUDA graph is captured.
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
            and a floating-point dtype. It gets a gradient where it requires one; otherwise rows of
            weight 0 are not multiplied. A mean still divides by the weights of the targets, or by
            `count`.
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
    ignored = -100 if ignore_index is None else ignore_index
    numbers = (ignored, label_smoothing, logit_scale, z_loss)
    others = (weight, dtype, chunk_size, softcap, row_weight, count)
    batch = (input, linear_weight, linear_bias, target)
    if small := small_loss(batch, reduction, numbers, others):
        return small[0]
    extra = linear.Extra(
        row_options_of(row_weight, count), logit_options_of(softcap, logit_scale, z_loss)
    )
    layer = Layer(input, linear_weight, linear_bias)
    if ignore_index is not None and isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError(f"ignore_index must be None for class probabilities, got {ignore_index!r}")
    options = options_of(weight, ignored, reduction, label_smoothing, dtype)
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


@overridable
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
    entropy: bool = True,
) -> LogProb:
    """The log-probability of each label, with the entropy of its row, a few rows at a time.

    log S_label and H = −Σ_k S_k log S_k with S = softmax(z) and z = x Wᵀ + b. Gradients of each,
    alone or together, are computed in chunks as well, to any order.

    Args:
        input: x, (..., D) with any leading dimensions, of a floating-point dtype.
        linear_weight: W, (C, D).
        target: Class indices in [0, C), of an integer dtype and shape (...).
        linear_bias: b, (C).
        softcap: c, above 0, which the logits are kept within by c tanh(z / c), after their scale.
        logit_scale: What the logits are multiplied with first; 1 / temperature of a sampler.
        ignore_index: A class index whose rows have 0, 0, 0 and False, and gradient 0, whatever
            they hold. They are not multiplied; on a GPU, a call waits once for their number.
        chunk_size: The rows whose logits are held at a time; None for as many as give 2²⁴ logits,
            but at least 512.
        dtype: The dtype of the logits and of what is returned; None for float32 (float64 for
            float64).
        entropy: Whether to compute the entropy, which takes a pass over the logits.

    Returns:
        `(log_prob, entropy, logsumexp, correct)`, each of the shape of `target`: the first three in
        `dtype`, in nats, and last whether the label is the likeliest class. The entropy is nan
        where it was not asked for.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes don't fit, a class index is out of range, or an option is unfit.
        NotImplementedError: `linear_weight` is sharded.

    Example:
        >>> input, linear_weight = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
        >>> of = linear_log_prob(input, linear_weight, torch.tensor([1, 0]))
        >>> of.log_prob, of.correct
        (tensor([-0.3133, -2.1269]), tensor([ True, False]))
        >>> of.entropy
        tensor([0.5822, 0.3653])

    Source: Cover and Thomas, Elements of Information Theory (2006), equation 2.1, for the entropy.
    """
    layer = Layer(input, linear_weight, linear_bias)
    options = logit_options_of(softcap, logit_scale, 0.0)
    ignore_index = checks.integer("ignore_index", ignore_index)
    chunk_size = checks.chunk_size(chunk_size)
    _refuse_sharded("linear_log_prob", *layer, target)
    if dtype is not None:
        checks.floating_dtype("dtype", dtype)
    return linear.linear_log_prob(
        layer, target, options, ignore_index, chunk_size, dtype, entropy=entropy
    )


@overridable
def linear_distillation(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reduction: str = "mean",
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """How far a student's distribution is from a teacher's, a few rows of both logits at a time.

    With the student's q = softmax(z / T), the teacher's p, and KL(p ‖ q) = Σ_k p_k log(p_k / q_k),
    the divergence of a row is

    - 'forward': T² KL(p ‖ q),
    - 'reverse': T² KL(q ‖ p),
    - 'jsd': T² (β KL(p ‖ m) + (1 − β) KL(q ‖ m)) with m = β p + (1 − β) q.

    The factor T² keeps the size of the gradients, which T scales with 1/T²; divide by it where
    another code has none. Gradients go to the teacher too where it requires them.

    Args:
        input: The student's x, (..., D) with any leading dimensions, of a floating-point dtype.
        linear_weight: Its W, (C, D).
        teacher_input: The teacher's x, (..., E), with the same leading dimensions.
        teacher_weight: Its W, (C, E).
        divergence: 'forward', 'reverse' or 'jsd'.
        beta: β, strictly between 0 and 1, of 'jsd'.
        temperature: T, above 0, which both logits are divided by.
        linear_bias: The student's b, (C).
        teacher_bias: The teacher's b, (C).
        reduction: 'mean' (over the rows that count), 'sum' or 'none'.
        mask: Which rows count, a bool (...); the others are not multiplied and add nothing,
            whatever they hold. On a GPU a call waits once for their number. None for all of them.
        chunk_size: The rows whose logits are held at a time; None for as many as give 2²⁴ logits
            of either, but at least 512.
        dtype: The dtype of the logits and of the divergence; None for float32 (float64 for
            float64).

    Returns:
        The divergence in `dtype`, in nats: a scalar, or (...) for 'none'. Rounding may make one
        near 0 negative, by no more than the rounding of its terms p_k log(p_k / q_k). The mean over
        no rows at all is nan, and its gradient 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes don't fit, or an option is unknown or unfit.
        NotImplementedError: A weight is sharded, or compiled code takes a second derivative.

    Example:
        >>> rows, weight = torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
        >>> linear_distillation(rows, weight, rows, weight).item()
        0.0
        >>> linear_distillation(rows, weight, 2 * rows, weight, divergence="reverse")
        tensor(0.1601)

    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015), section
    2; Agarwal et al., On-Policy Distillation of Language Models (2024), equation 1, for 'jsd'.
    """
    options = distillation.divergence_of(divergence, beta, temperature)
    student = Layer(input, linear_weight, linear_bias)
    teacher = Layer(teacher_input, teacher_weight, teacher_bias)
    chunk_size = checks.chunk_size(chunk_size)
    _refuse_sharded("linear_distillation", *student, *teacher, mask)
    if dtype is not None:
        checks.floating_dtype("dtype", dtype)
    return distillation.linear_distillation(
        student, teacher, options, reduction, mask, chunk_size, dtype
    )


@overridable
def map_logits(
    fn: Callable[..., Any],
    input: Tensor,
    linear_weight: Tensor,
    *rows: Tensor | None,
    linear_bias: Tensor | None = None,
    shared: Sequence[Tensor | None] = (),
    mask: Tensor | None = None,
    reduction: str = "none",
    chunk_size: int | None = None,
) -> Any:
    """Any function of one row of a linear layer's logits, differentiated a few rows at a time.

    `fn(z_n, *rows_n, *shared)` for each row n of z = x Wᵀ + b, which is never held for more than
    `chunk_size` rows. Its derivatives are computed in chunks too, of every order and in every mode
    that `fn` has, for all the tensors that it is given.

    Args:
        fn: A function of one row, that returns a tensor, such as a number (), or a tuple of
            tensors. It is given the row's logits (C), the row's element of each of `rows`, and each
            of `shared` whole. `torch.vmap` maps it over rows, so that it can't branch on numbers
            (use `torch.where`) nor draw random ones (pass them in `rows`). It is called once for
            each chunk, and again for derivatives. Half precision comes as float32 logits.
        input: x, (..., D) with any leading dimensions, of a floating-point dtype.
        linear_weight: W, (C, D).
        rows: Tensors with these leading dimensions, and any further ones; or None.
        linear_bias: b, (C).
        shared: Tensors that all rows need, such as a weight for each class; or None. Parameters
            that get a gradient must be here.
        mask: Which rows count, a bool (...). The others are not multiplied, whatever they hold, and
            have results of 0. On a GPU the number of these is waited for. None for all rows.
        reduction: 'none', or 'sum' or 'mean' over the rows that count. Where `fn` returns one
            number, these take the gradients along in the forward pass, for three matrix products.
        chunk_size: The rows whose logits are held at a time; None for as many as give 2²⁴ logits,
            but at least 512.

    Returns:
        What `fn` returns, with the leading dimensions of `input` in front; or without them where it
        is reduced. The mean over no rows at all is nan, and its gradient 0.

    Raises:
        TypeError: An argument, or what `fn` returns, has the wrong type or dtype.
        ValueError: Shapes don't fit; `fn` can't be mapped over rows, or writes to what it is given;
            or it depends on a tensor that is differentiated and that it was not given.
        NotImplementedError: `linear_weight` is sharded.

    Example:
        >>> def focal(logits, label):  # (1 − S_label)² (−log S_label)
        ...     log_prob = logits.log_softmax(0)[label]
        ...     return (1 - log_prob.exp()) ** 2 * -log_prob
        >>> input, linear_weight = torch.eye(2), torch.zeros(3, 2, requires_grad=True)
        >>> loss = map_logits(focal, input, linear_weight, torch.tensor([0, 2]), reduction="mean")
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.4883

    Source: Lin et al., Focal Loss for Dense Object Detection (2017), equation 4, for the example.
    """
    if isinstance(shared, Tensor):
        raise TypeError("shared must be a tuple of tensors, got a tensor")
    layer = Layer(input, linear_weight, linear_bias)
    chunk_size = checks.chunk_size(chunk_size)
    _refuse_sharded("map_logits", *layer, *rows, *shared, mask)
    return mapped.map_logits(
        fn, layer, rows, shared, reduction=reduction, mask=mask, chunk_size=chunk_size
    )


def _any_sharded(*tensors: Any) -> bool:
    """Whether a tensor lies on a device mesh, as a DTensor."""
    # Whoever made one has imported this, and nobody else should wait for it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(unwrapped(t), module.DTensor) for t in tensors)


def _refuse_sharded(name: str, *tensors: Any) -> None:
    """Raise where a tensor is sharded, of which a rank would see only a part."""
    if _any_sharded(*tensors):
        raise NotImplementedError(f"{name} needs whole tensors, got one that is sharded")
