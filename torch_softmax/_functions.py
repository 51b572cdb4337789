"""What the autograd Functions share: how they are applied, differentiated forward, and vmapped."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


class _ByPosition(inspect.Signature):
    """The signature of a forward that is given every argument by position.

    Function.apply binds the arguments to the signature at every call, and to do that in general
    costs more than the softmax of a small batch.
    """

    class Bound(NamedTuple):
        args: tuple[Any, ...]
        kwargs: dict[str, Any]

        def apply_defaults(self) -> None:
            """Leave the arguments as they are: none is missing."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments as they come."""
        return self.Bound(args, kwargs)


def applier(function: type[Function]) -> Callable[..., Any]:
    """The plain function that applies an autograd Function, eagerly or while compiling."""
    # torch.compile refuses a Function that has a jvp, for which a compiled graph has no use, and
    # goes by the signature that forward was written with.
    members = {name: member for name, member in vars(function).items() if name != "jvp"}
    without_jvp = type(function.__name__, (Function,), members)

    forward: Any = function.forward
    by_position: Any = types.FunctionType(forward.__code__, forward.__globals__)
    by_position.__signature__ = _ByPosition()
    function.forward = staticmethod(by_position)  # type: ignore[method-assign]

    def apply(*args: Any) -> Any:
        chosen: Any = without_jvp if torch.compiler.is_compiling() else function
        return chosen.apply(*args)

    return apply


def nested_forward_mode(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate jvp(ctx, saved, *tangents), so that forward mode nests, as in a jvp of a jvp.

    PyTorch calls a Function's jvp with forward mode switched off at all levels, and the derivative
    of an outer level would silently be 0. This switches it on again, and hands over the saved
    tensors without the tangents of the level at work, which the jvp itself accounts for.
    """

    @functools.wraps(jvp)
    def nested(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            level = forward_ad._current_level
            saved = [
                None if tensor is None else forward_ad.unpack_dual(tensor, level=level).primal
                for tensor in ctx.saved_tensors
            ]
            return jvp(ctx, saved, *tangents)

    return nested


def loop_over_batch(function: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    """A vmap rule: apply the Function to each element of the batch, and stack what it returns."""
    if info.batch_size == 0:
        raise ValueError("vmap must map over at least one element, got a dimension of size 0")
    results = []
    for i in range(info.batch_size):
        element = (a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))
        results.append(function.apply(*element))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    outputs = tuple(None if o[0] is None else torch.stack(o) for o in zip(*results, strict=True))
    return outputs, tuple(None if o is None else 0 for o in outputs)


def fold_batch_into_rows(function: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    """A vmap rule: (B, N, ...) becomes (B·N, ...), for a Function that treats each row alone.

    Its arguments are row-wise tensors, but for `scale` and `floor`, which all rows share.
    """
    z, target, scale, floor, *rest = args
    if in_dims[2] is not None or in_dims[3] is not None or info.batch_size == 0:
        return loop_over_batch(function, info, in_dims, *args)

    def fold(arg: Any, dim: int | None) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        batch = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        return batch.flatten(0, 1)

    def unfold(output: Tensor | None) -> Tensor | None:
        return None if output is None else output.unflatten(0, (info.batch_size, -1))

    folded = [fold(a, d) for a, d in zip(rest, in_dims[4:], strict=True)]
    result = function.apply(fold(z, in_dims[0]), fold(target, in_dims[1]), scale, floor, *folded)
    if isinstance(result, Tensor):
        return unfold(result), 0
    outputs = tuple(unfold(output) for output in result)
    return outputs, tuple(None if o is None else 0 for o in outputs)
