"""Every touch of PyTorch's own machinery, each with its reason."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import compress, islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from .._transforms import has_saved_tensors_hooks, is_in_func, is_plain, is_transformed

Tensors = tuple[Tensor | None, ...]
Mask = tuple[bool, ...]

vjp: Any = torch.func.vjp  # typed by torch as if it gave an auxiliary result too


def savable(tensor: Tensor | None) -> Tensor | None:
    """A tensor that autograd can save: the memory of an inference tensor as an ordinary one."""
    if tensor is None or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        if not is_plain(tensor) or is_in_func():
            return tensor.clone()
        layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        return tensor.new_empty(0).set_(tensor.untyped_storage(), *layout)


@contextmanager
def nested_forward_mode(tensors: Tensors) -> Iterator[Tensors]:
    """The saved tensors for a Function's jvp, whose own derivatives are taken within the block.

    PyTorch calls a jvp with forward mode switched off at all levels, so that the derivative of an
    outer level would silently be 0 (pytorch/pytorch#197867). It is switched on again, and the saved
    tensors come without the tangents of the level at work, which the jvp itself accounts for.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        level = forward_ad._current_level
        yield tuple(
            None if tensor is None else forward_ad.unpack_dual(tensor, level=level).primal
            for tensor in tensors
        )


def detached(tensor: Tensor) -> Tensor:
    """A tensor without its graph, that autograd can save."""
    kept = savable(tensor)
    assert kept is not None
    return kept.detach()


Pull = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


def pulled_back(
    fn: Callable[..., tuple[Tensor, ...]], *at: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Pull]:
    """What `torch.func.vjp` gives, in half of its time; and the leaves of the results' graph.

    Raises:
        RuntimeError: Autograd records nothing here.
    """
    # Inference mode that is switched off brings autograd back, within a custom operator too.
    with torch.inference_mode(False), torch.enable_grad():
        leaves = tuple((t.clone() if t.is_inference() else t.detach()).requires_grad_() for t in at)
        if any(not leaf.view_as(leaf).requires_grad for leaf in leaves):
            raise RuntimeError(
                "map_logits can't be differentiated here, where autograd records nothing: every "
                "gradient would be 0"
            )
        values = fn(*leaves)

    def pull(cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        moving = tuple(value.requires_grad for value in values)
        if not any(moving):  # by what is recorded, none depends on a leaf
            return tuple(map(torch.zeros_like, leaves))
        outputs, upstream = select(values, moving), select(cotangents, moving)
        with torch.inference_mode(False):
            upstream = tuple(map(detached, upstream))
            return torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)

    return values, leaves, pull


def captured_leaves(values: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """The leaves that require a gradient in the graph of some values, apart from some of them."""
    known, captured = {id(leaf) for leaf in leaves}, []
    nodes = [value.grad_fn for value in values]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            captured.append(leaf)
        nodes += [inner for inner, _ in node.next_functions]
    return captured


def settled(tensor: Tensor | None) -> Tensor | None:
    """A tensor that can be worked with; forward mode has zeros that are not there."""
    return tensor.clone() if tensor is not None and tensor._is_zerotensor() else tensor


def may_take_gradients() -> bool:
    """Whether a plain backward alone will ask for gradients, as far as can be foreseen."""
    # The transforms differentiate every gradient again, from the inputs. And whoever sets hooks on
    # what is saved, as activation checkpoints and save_on_cpu do, wants nothing held beside that.
    return torch.is_grad_enabled() and not is_transformed() and not has_saved_tensors_hooks()


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
    """The values that a mask names."""
    return tuple(compress(values, mask))


def merge(values: Any, mask: Mask, replacements: Any) -> tuple[Any, ...]:
    """Values, of which those that a mask names are replaced, in their order."""
    rest = iter(replacements)
    return tuple(next(rest) if named else v for v, named in zip(values, mask, strict=True))


def split(values: Any, count: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The first `count` of some values, and the others."""
    rest = iter(values)
    return tuple(islice(rest, count)), tuple(rest)
