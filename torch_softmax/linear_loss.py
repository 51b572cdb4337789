"""Cross-entropy of a linear layer, a chunk of rows at a time, with all its derivatives."""

import functools
import sys
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear

from . import _checks as checks
from ._chunks import accumulation_dtype, loss_dtype, slices
from ._functions import applier, loop_over_batch, nested_forward_mode
from ._spread import Spread
from ._sweeps import Derivatives, Needs, curvature, loss_and_gradients
from ._targets import Targets, fold_options
from .logits_loss import cross_entropy, row_losses

# The Functions take these first, which together say Σ_n r_n L_n:
#   x (N, D), W (K, D), b (K) or None, target, scale and floor as in Targets, r (N) or None for 1.

_NOTHING: Derivatives = (None, None, None, None)


class LinearCrossEntropyFunction(Function):
    """Σ_n r_n L_n / divisor, or r_n L_n for each row where the divisor is None.

    For a sum, the gradients are taken along in the forward pass, while the logits are at hand:
    three matrix products in all. They come as further outputs, which are not for the caller.
    """

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        target: Tensor,
        scale: Tensor | None,
        floor: Tensor | None,
        r: Tensor | None,
        divisor: Tensor | None,
        chunk_size: int,
        spread: Spread | None,
        take_x: bool,
        take_W: bool,
        take_b: bool,
        take_p: bool,
    ) -> tuple[Tensor | None, ...]:
        y, take = Targets(target, scale, floor, spread), Needs(take_x, take_W, take_b, take_p)
        losses, gradients = loss_and_gradients(x, W, b, y, r, chunk_size, take)
        if r is not None:
            losses = losses.masked_fill(r == 0, 0)
        return losses if divisor is None else losses.sum() / divisor, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:8])
        ctx.save_for_forward(*inputs[:8])
        ctx.options = inputs[8:10]
        ctx.gradients = output[1:]
        ctx.mark_non_differentiable(*(g for g in ctx.gradients if g is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> Any:
        rest = (None,) * 10
        if upstream is None:
            return *rest[:4], *rest
        *at, r, divisor = ctx.saved_tensors
        options = *ctx.options, *ctx.needs_input_grad[:4]
        if divisor is None:
            r = upstream if r is None else r * upstream
            return *linear_gradients(*at, r, *options, *_NOTHING), *rest
        scale = upstream / divisor
        taken, needed = ctx.gradients, ctx.needs_input_grad
        if any(need and g is None for g, need in zip(taken, needed[:4], strict=True)):
            taken = _NOTHING
        if torch.is_grad_enabled():  # for a further derivative, which starts from the inputs
            gradients = linear_gradients(*at, r, *options, *taken)
            return *(None if g is None else g * scale for g in gradients), *rest
        # The first backward scales in place what the forward pass took along, and gives it away.
        # A second one works it out anew.
        ctx.gradients = _NOTHING
        if taken is _NOTHING:
            taken = linear_gradients(*at, r, *options, *_NOTHING)
        return *(None if g is None else g.mul_(scale) for g in taken), *rest

    @staticmethod
    @nested_forward_mode
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        *at, r, divisor = saved
        *_, slope = linear_curvature(*at, r, *tangents[:4], *ctx.options, *[False] * 4)
        tangent = slope if r is None else slope * r
        if divisor is not None:
            tangent = tangent.sum() / divisor
        return tangent, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over_batch(LinearCrossEntropyFunction, info, in_dims, *args)


class LinearCrossEntropyGradient(Function):
    """The gradient of Σ_n r_n L_n, as far as it is needed; or a copy where it was taken before.

    Either way its own derivatives come from the inputs.
    """

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        target: Tensor,
        scale: Tensor | None,
        floor: Tensor | None,
        r: Tensor | None,
        chunk_size: int,
        spread: Spread | None,
        needs_x: bool,
        needs_W: bool,
        needs_b: bool,
        needs_p: bool,
        dx: Tensor | None,
        dW: Tensor | None,
        db: Tensor | None,
        dp: Tensor | None,
    ) -> Derivatives:
        taken = dx, dW, db, dp
        if any(g is not None for g in taken):
            dx, dW, db, dp = (None if g is None else g.clone() for g in taken)
            return dx, dW, db, dp
        y, needs = Targets(target, scale, floor, spread), Needs(needs_x, needs_W, needs_b, needs_p)
        _, gradients = loss_and_gradients(x, W, b, y, r, chunk_size, needs)
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.save_for_forward(*inputs[:7])
        ctx.options = inputs[7:13]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *direction: Tensor | None) -> Any:
        options = *ctx.options[:2], *ctx.needs_input_grad[:4]
        *along, slope = linear_curvature(*ctx.saved_tensors, *direction, *options)
        return *along, None, None, slope if ctx.needs_input_grad[6] else None, *[None] * 10

    @staticmethod
    @nested_forward_mode
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        # The Hessian is symmetric: along a direction, forward and reverse mode are one.
        *along, _ = linear_curvature(*saved, *tangents[:4], *ctx.options)
        dr = tangents[6]
        if dr is None:
            return tuple(along)
        more = linear_gradients(*saved[:6], dr, *ctx.options, *_NOTHING)  # it is linear in r
        return tuple(None if m is None else a + m for a, m in zip(along, more, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over_batch(LinearCrossEntropyGradient, info, in_dims, *args)


class LinearCrossEntropyCurvature(Function):
    """The derivatives of Σ_n r_n D_n, with D_n the slope of L_n along a direction; and each D_n."""

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        target: Tensor,
        scale: Tensor | None,
        floor: Tensor | None,
        r: Tensor | None,
        ux: Tensor | None,
        uW: Tensor | None,
        ub: Tensor | None,
        up: Tensor | None,
        chunk_size: int,
        spread: Spread | None,
        needs_x: bool,
        needs_W: bool,
        needs_b: bool,
        needs_p: bool,
    ) -> tuple[Tensor | None, ...]:
        y, needs = Targets(target, scale, floor, spread), Needs(needs_x, needs_W, needs_b, needs_p)
        along, slope = curvature(x, W, b, y, r, ux, uW, ub, up, chunk_size, needs)
        return *along, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:11])
        ctx.save_for_forward(*inputs[:11])
        ctx.chunk_size, ctx.spread, *ctx.needs = inputs[11:]
        ctx.set_materialize_grads(False)

    # What follows is third order, or forward mode twice: from the logits loss, chunk by chunk.

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        _check_not_spread(ctx.spread)
        saved = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        parts = []
        for rows in slices(len(saved[0]), ctx.chunk_size):
            function, at = _curvature_of(_of_rows(saved, _ROW_INPUTS, rows), wanted, given)
            pull_back: Any = torch.func.vjp(function, *at)[1]
            part = _of_rows(cotangents, _ROW_OUTPUTS, rows)
            parts.append(pull_back(tuple(part[i] for i in given)))
        joined = _joined(parts, [i in _ROW_INPUTS for i in wanted])
        return tuple(_replaced([None] * 17, wanted, joined))

    @staticmethod
    @nested_forward_mode
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        _check_not_spread(ctx.spread)
        moved = [i for i, tangent in enumerate(tangents) if tangent is not None]
        present = [i for i, needed in enumerate((*ctx.needs, True)) if needed]
        parts = []
        for rows in slices(len(saved[0]), ctx.chunk_size):
            function, at = _curvature_of(_of_rows(saved, _ROW_INPUTS, rows), moved, present)
            part = _of_rows(tangents, _ROW_INPUTS, rows)
            parts.append(torch.func.jvp(function, at, tuple(part[i] for i in moved))[1])
        joined = _joined(parts, [i in _ROW_OUTPUTS for i in present])
        return tuple(_replaced([None] * 5, present, joined))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over_batch(LinearCrossEntropyCurvature, info, in_dims, *args)


linear_losses = applier(LinearCrossEntropyFunction)
linear_gradients = applier(LinearCrossEntropyGradient)
linear_curvature = applier(LinearCrossEntropyCurvature)


def curvature_by_logits(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Targets,
    r: Tensor | None,
    ux: Tensor | None,
    uW: Tensor | None,
    ub: Tensor | None,
    up: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The same as `curvature`, but itself differentiable to any order; it holds its logits."""
    at: dict[str, Tensor] = {"x": x, "W": W, "r": x.new_ones(len(x)) if r is None else r}
    if b is not None:
        at["b"] = b
    if y.is_dense():
        at["p"] = y.target
    moved = {"x": ux, "W": uW, "b": ub, "p": up}

    def total(at: dict[str, Tensor]) -> Tensor:
        z = linear(at["x"], at["W"], at.get("b"))
        losses: Tensor = row_losses(z, at.get("p", y.target), y.scale, y.floor)
        return (at["r"] * losses).sum()

    directions = {}
    for name, value in at.items():
        direction = moved.get(name)
        directions[name] = torch.zeros_like(value) if direction is None else direction
    along: Any = torch.func.jvp(torch.func.grad(total), (at,), (directions,))[1]
    return along["x"], along["W"], along.get("b"), along.get("p"), along["r"]


def _check_not_spread(spread: Spread | None) -> None:
    """Raise where the classes are spread over ranks, as the third order would be wrong there."""
    if spread is not None:
        raise NotImplementedError(
            "a third derivative, which torch.autograd.functional.hvp takes and vhp does not, "
            "needs all classes in one process, got a linear_weight that is sharded"
        )


def _curvature_of(
    saved: Any, inputs: list[int], outputs: list[int]
) -> tuple[Any, tuple[Tensor, ...]]:
    """`curvature_by_logits` as a function of some of its inputs, for some outputs; and those."""

    def function(*values: Tensor) -> tuple[Any, ...]:
        x, W, b, target, scale, floor, r, *direction = _replaced(saved, inputs, values)
        result = curvature_by_logits(x, W, b, Targets(target, scale, floor), r, *direction)
        return tuple(result[i] for i in outputs)

    return function, tuple(saved[i] for i in inputs)


# The inputs and outputs of LinearCrossEntropyCurvature that have a row for each row of x.
_ROW_INPUTS = (0, 3, 6, 7, 10)
_ROW_OUTPUTS = (0, 3, 4)


def _of_rows(tensors: Any, row_wise: tuple[int, ...], rows: slice) -> list[Any]:
    """Some rows of those tensors that are row-wise, and the others whole."""
    return [t[rows] if i in row_wise and t is not None else t for i, t in enumerate(tensors)]


def _joined(parts: list[Any], row_wise: list[bool]) -> list[Tensor]:
    """The results of all chunks: those of rows one after another, the others added up."""
    return [
        torch.cat(chunks) if of_rows else functools.reduce(torch.add, chunks)
        for chunks, of_rows in zip(zip(*parts, strict=True), row_wise, strict=True)
    ]


def _replaced(values: Any, positions: list[int], replacements: Any) -> list[Any]:
    """A list of values, of which those at some positions are replaced."""
    result = list(values)
    for position, replacement in zip(positions, replacements, strict=True):
        result[position] = replacement
    return result


def default_chunk_size(classes: int) -> int:
    """The rows of a chunk: as many as give 2²⁴ logits, but at least 512."""
    # Each chunk adds a product to ∂L/∂W, and goes over its K·D numbers for that: with fewer rows
    # than these the additions, and not the products, would set the pace.
    return max(512, 2**24 // classes)


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
) -> Tensor:
    """Cross-entropy of a linear layer's logits, which are never held for more than a few rows.

    The same as `cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`, with
    z = x Wᵀ + b, S = softmax(z), ∂L/∂x = Wᵀ(S − y) and ∂L/∂W = (S − y) xᵀ, in memory for
    `chunk_size` rows of logits. Double backward, Hessian-vector products, forward mode and
    `torch.func` are computed in chunks as well, up to the third order.

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
        ignore_index: A class index whose rows add nothing to loss and gradient; None stands for
            -100, and is what class probabilities require.
        label_smoothing: The share of the target, in [0, 1], that is spread evenly over all classes.
        chunk_size: The rows whose logits are held at a time. It changes speed and memory, not the
            result. None stands for as many as give 2²⁴ logits, but at least 512.

    Returns:
        The loss, in the dtype that `input` and `linear_weight` promote to (float32 under
        autocast): a scalar, or the shape of the class indices for 'none'. The mean over no rows
        at all is nan, and its gradient 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes don't fit, a class index is out of range, or an option is unknown.

    Example:
        >>> input = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> linear_weight = torch.zeros(3, 2, requires_grad=True)
        >>> loss = linear_cross_entropy(input, linear_weight, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> linear_weight.grad.round(decimals=4)
        tensor([[-0.3333, -0.5000],
                [ 0.1667,  0.5000],
                [ 0.1667,  0.0000]])

    Source: Bishop, Pattern Recognition and Machine Learning (2006), equations 4.108 to 4.110.
    """
    checks.linear_layer(input, linear_weight, linear_bias)
    *shape, features = input.shape
    classes, *extra = linear_weight.shape[:-1]
    labels_shape, probabilities_shape = (*shape, *extra), (*shape, classes, *extra)
    checks.target(target, labels_shape, probabilities_shape)
    if ignore_index is None:
        ignore_index = -100
    elif target.is_floating_point():
        raise ValueError(f"ignore_index must be None for class probabilities, got {ignore_index!r}")
    checks.options(classes, weight, ignore_index, reduction, label_smoothing)
    checks.chunk_size(chunk_size)

    dtype = _product_dtype(input, linear_weight, linear_bias)
    shard = _class_shard(input, linear_weight, linear_bias, target, weight)
    if shard is not None:
        shard.agree(
            {
                "input": input,
                "linear_weight": linear_weight,
                "target": target,
                "linear_bias": linear_bias,
                "weight": weight,
            },
            dtype=dtype,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            chunk_size=chunk_size,
        )
        linear_weight, linear_bias = shard.parameters(linear_weight, linear_bias, dtype)
        input, target, weight = shard.rows(input, target, weight)
    x, W = input.to(dtype).reshape(-1, features), linear_weight.to(dtype)
    b = None if linear_bias is None else linear_bias.to(dtype)
    if extra:
        flat_bias = None if b is None else b.flatten()
        logits = linear(x, W.flatten(0, -2), flat_bias).unflatten(1, (classes, *extra))
        return cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing)

    ignored = None
    if target.is_floating_point():
        target = target.reshape(-1, len(W))
    else:
        ignored = ignore_index if checks.labels(target, classes, ignore_index) else None
        target = target.reshape(-1)
    accumulate = accumulation_dtype(dtype)
    rows = fold_options(target, classes, accumulate, weight, ignored, label_smoothing)
    r = None if rows.keep is None else rows.keep.to(accumulate)
    divisor = None if reduction == "none" else rows.divisor
    if reduction == "sum":
        divisor = torch.ones_like(rows.divisor)
    takes = reduction != "none" and _takes_gradients()
    take = [takes and t is not None and t.requires_grad for t in (x, W, b, target)]
    held = classes if shard is None else shard.step
    step = default_chunk_size(held) if chunk_size is None else chunk_size
    y = rows.targets
    if shard is not None:
        y = shard.targets(y, accumulate)
    *at, spread = y
    loss: Tensor = linear_losses(x, W, b, *at, r, divisor, step, spread, *take)[0]
    if reduction == "none":
        loss = loss.reshape(shape)
    elif reduction == "mean" and rows.empty is not None:
        loss = loss.masked_fill(rows.empty, nan)
    return loss.to(loss_dtype(x))


def _class_shard(*tensors: Tensor | None) -> Any:
    """This rank's share of the classes, where they are sharded, or None."""
    # Whoever made a DTensor has imported this, and nobody else should wait for it.
    module = sys.modules.get("torch.distributed.tensor")
    transformed = _transformed()
    given = [_unwrapped(tensor) for tensor in tensors] if transformed else tensors
    if module is None or not any(isinstance(tensor, module.DTensor) for tensor in given):
        return None
    if transformed:
        raise NotImplementedError(
            "torch.func needs all classes in one process, got a linear_weight that is sharded"
        )
    from .class_parallel import ClassShard

    return ClassShard.of(tensors[1])


def _unwrapped(tensor: Any) -> Any:
    """A tensor without what the transforms of torch.func put around it."""
    while tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _product_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of a linear layer's products: what its tensors promote to, or autocast's."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in given})
    device = given[0].device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _takes_gradients() -> bool:
    """Whether a plain backward will ask for gradients, as far as can be foreseen."""
    # The transforms of torch.func differentiate every gradient again, from the inputs.
    return torch.is_grad_enabled() and not _transformed()


def _transformed() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()
