"""The autograd Functions, and every touch of PyTorch's own machinery, each with its reason."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import compress
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from .._transforms import (
    has_saved_tensors_hooks,
    is_differentiated,
    is_in_func,
    is_transformed,
    refuse_inference_mode,
)
from ._dtypes import outside_autocast

Tensors = tuple[Tensor | None, ...]
Mask = tuple[bool, ...]


class Differentiable(Protocol):
    """What `Chunked` applies: a function of tensors that brings its own derivatives."""

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The results, without a thought of derivatives."""

    def for_derivatives(self) -> "Differentiable":
        """What is kept of it for its derivatives, once it was run."""

    def pull(self, tensors: Tensors, cotangents: Tensors, wanted: Mask) -> Tensors:
        """The gradients of the wanted tensors; the others, and cotangents of nothing, are None."""

    def push(self, tensors: Tensors, tangents: Tensors) -> Tensors:
        """The tangents of the results; None for a tensor that does not move."""

    def batch(self, size: int, dims: tuple[int | None, ...], tensors: Tensors) -> Tensors:
        """The results for a batch of tensors, along a new first dimension."""


class Chunked(Function):
    """A plan applied to tensors: it saves, calls and returns, and the plan knows the rest."""

    @staticmethod
    def forward(plan: Differentiable, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return plan.run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        plan, *tensors = inputs
        ctx.plan = plan.for_derivatives()
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        _, *wanted = ctx.needs_input_grad
        return None, *ctx.plan.pull(ctx.saved_tensors, cotangents, tuple(wanted))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        with nested_forward_mode(ctx) as tensors:
            return ctx.plan.push(tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Differentiable, *tensors: Tensor | None) -> Any:
        _, *dims = in_dims
        results = plan.batch(info.batch_size, tuple(dims), tensors)
        return results, tuple(None if result is None else 0 for result in results)


class Sum(NamedTuple):
    """A sum with what was worked out beside it."""

    value: Tensor
    gradients: Tensors  # by each tensor, None where no one wants it
    others: tuple[Tensor, ...] = ()  # without a gradient of their own


class Summed(Protocol):
    """What `TakenAlong` applies: a sum that knows its gradients, and how to work them out anew."""

    @property
    def run(self) -> Callable[[Tensors, Mask], Sum]:
        """The sum of some tensors, with the gradients by those that are wanted."""

    def pull(self, tensors: Tensors, known: Tensors | None, upstream: Tensor, wanted: Mask) -> Any:
        """The wanted gradients times the one from above, so that they can be differentiated.

        They may be known already, from the forward pass.
        """


class TakenAlong(Function):
    """A sum whose gradients are worked out beside it.

    They are those of the first backward, which owns them from then on; any further one works them
    out again, and one that is to be differentiated has them from a plan.

    No transform comes here, so that it needs no `setup_context`, without which a call takes a
    third of the time.
    """

    @staticmethod
    def forward(ctx: Any, total: Summed, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        _, *wanted = ctx.needs_input_grad
        value, ctx.taken, others = total.run(tensors, tuple(wanted))
        ctx.total = total
        ctx.save_for_backward(*tensors)
        if others:
            ctx.mark_non_differentiable(*others)
        return value, *others

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        _, *wanted = ctx.needs_input_grad
        taken, ctx.taken = ctx.taken, None
        if is_differentiated():
            return None, *ctx.total.pull(ctx.saved_tensors, taken, upstream, tuple(wanted))
        if taken is None:
            with outside_autocast(upstream):
                _, taken, _ = ctx.total.run(ctx.saved_tensors, tuple(wanted))
        return None, *scaled_(taken, upstream)


# Function.apply asks for this at every call, and without it, inspect works it out anew each time.
Chunked.forward.__signature__ = inspect.signature(Chunked.forward)  # type: ignore[attr-defined]


@contextmanager
def nested_forward_mode(ctx: Any) -> Iterator[Tensors]:
    """The saved tensors for a Function's jvp, whose own derivatives are taken within the block.

    PyTorch calls a jvp with forward mode switched off at all levels, so that the derivative of an
    outer level would silently be 0 (pytorch/pytorch#197867). It is switched on again, and the saved
    tensors come without the tangents of the level at work, which the jvp itself accounts for.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        level = forward_ad._current_level
        yield tuple(
            None if tensor is None else forward_ad.unpack_dual(tensor, level=level).primal
            for tensor in ctx.saved_tensors
        )


def chunked(plan: Differentiable, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Apply a plan, so that what comes of it can be differentiated."""
    # Without gradients there is nothing to bring. And a compiler drops a Function's jvp, and takes
    # its backward for the end of differentiation (pytorch/pytorch#192985).
    if torch.compiler.is_compiling() or not is_differentiated():
        return plan.run(*tensors)
    refuse_inference_mode()
    results: tuple[Tensor, ...] = Chunked.apply(plan, *tensors)
    return results


vjp: Any = torch.func.vjp  # typed by torch as if it gave an auxiliary result too


def pulled_back(fn: Callable[..., tuple[Tensor, ...]], *at: Tensor) -> tuple[Any, Any]:
    """What `torch.func.vjp` gives, in half of its time, where no transform is at work."""
    if is_in_func():
        results: tuple[Any, Any] = vjp(fn, *at)
        return results
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in at]
        values = fn(*leaves)

    def pull(cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        moving = tuple(value.requires_grad for value in values)
        if not any(moving):
            return tuple(map(torch.zeros_like, leaves))
        return torch.autograd.grad(
            select(values, moving), leaves, select(cotangents, moving), materialize_grads=True
        )

    return tuple(value.detach() for value in values), pull


def taken_along(total: Summed, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The value of a sum, and what comes beside it but for its gradients."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        results: tuple[Tensor, ...] = TakenAlong.apply(total, *tensors)
        return results
    value, _, others = total.run(tensors, (False,) * len(tensors))
    return value, *others


def may_take_gradients() -> bool:
    """Whether a plain backward alone will ask for gradients, as far as can be foreseen."""
    # The transforms differentiate every gradient again, from the inputs. And whoever sets hooks on
    # what is saved, as activation checkpoints and save_on_cpu do, wants nothing held beside that.
    return torch.is_grad_enabled() and not is_transformed() and not has_saved_tensors_hooks()


def scaled_(gradients: Tensors, scale: Tensor) -> Tensors:
    """Gradients that nobody else has seen, times the one from above."""
    if is_differentiated() or torch.compiler.is_compiling():
        return tuple(None if gradient is None else gradient * scale for gradient in gradients)
    # A CPU knows its numbers, and for most losses this one is 1.
    if scale.is_cpu and scale.item() == 1:
        return gradients
    return tuple(None if gradient is None else gradient.mul_(scale) for gradient in gradients)


F = TypeVar("F", bound=Callable[..., Any])


def overridable(function: F) -> F:
    """Let a tensor's class stand in for a function, as it can for those of torch.nn.functional."""

    @functools.wraps(function)
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return handle_torch_function(dispatched, given, *args, **kwargs)
        return function(*args, **kwargs)

    return dispatched  # type: ignore[return-value]


def select(values: Any, mask: Mask) -> tuple[Any, ...]:
    """Those of some values that a mask names."""
    return tuple(compress(values, mask))


def merge(values: Any, mask: Mask, replacements: Any) -> tuple[Any, ...]:
    """Some values, of which those that a mask names are replaced, in their order."""
    rest = iter(replacements)
    return tuple(next(rest) if named else v for v, named in zip(values, mask, strict=True))
