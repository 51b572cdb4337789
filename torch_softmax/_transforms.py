"""What autograd and torch.func do with a tensor, which there is mostly no public way to ask."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    retrieve_current_functorch_interpreter,
)
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks


def is_in_func() -> bool:
    """Whether a transform of torch.func is at work, which there is no public way to ask."""
    return torch._C._are_functorch_transforms_active()


def is_transformed() -> bool:
    """Whether a transform of torch.func, or a level of forward mode, is at work."""
    return is_in_func() or forward_ad._current_level >= 0


def is_differentiated() -> bool:
    """Whether what is worked out now may be differentiated later."""
    return torch.is_grad_enabled() or is_transformed()


def refuse_inference_mode() -> None:
    """Raise where a transform would find nothing to differentiate, and its result would be 0."""
    if not torch.is_inference_mode_enabled() or not is_in_func() or _ends_inference_mode():
        return
    if any(level.key() != TransformType.Vmap for level in retrieve_all_functorch_interpreters()):
        raise RuntimeError(
            f"torch.func of torch {torch.__version__} can't differentiate in inference mode, where "
            "every derivative would be 0: use torch.no_grad instead"
        )


@functools.cache
def _ends_inference_mode() -> bool:
    """Whether a transform is at work outside of the inference mode around it."""
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch.is_inference_mode_enabled())
        return x

    with torch.inference_mode():
        torch.func.grad(look)(torch.zeros(()))
    return not any(seen)


# Torch 2.6 has no such function.
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def has_saved_tensors_hooks() -> bool:
    """Whether someone packs what is saved for a backward, as activation checkpoints do."""
    if _top_hooks is not None:
        return _top_hooks(True) is not None
    # Torch 2.6 can't be asked, but refuses to switch hooks off where there are any.
    try:
        with disable_saved_tensors_hooks("asked whether there are hooks"):
            return False
    except RuntimeError:
        return True


def is_moving(tensor: Tensor) -> bool:
    """Whether a tensor is differentiated, in either mode and at any level."""
    if tensor.requires_grad or (forward_ad._current_level >= 0 and _is_dual(tensor)):
        return True
    if torch.compiler.is_compiling() or not is_in_func():
        return False
    # A tangent is seen only from its own level: each one is left for the one below.
    level = retrieve_current_functorch_interpreter()
    if torch._C._functorch.maybe_get_level(tensor) == level.level():
        tensor = torch._C._functorch.get_unwrapped(tensor)
    with level.lower():
        return is_moving(tensor)


def _is_dual(tensor: Tensor) -> bool:
    # A batch can't be asked, but what it holds, once its level is left.
    if torch._C._functorch.is_batchedtensor(tensor):
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def is_plain(tensor: Tensor | None) -> bool:
    """Whether a tensor is no subclass with operators of its own, which buffers would not have."""
    if tensor is None or type(tensor) in (Tensor, torch.nn.Parameter):
        return True
    dispatch = type(tensor).__torch_dispatch__
    return dispatch is Tensor.__torch_dispatch__ or is_fake(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor stands for one without numbers, as while a program is traced."""
    return type(tensor).__name__ == "FakeTensor"


def is_batched(tensor: Tensor) -> bool:
    """Whether a `vmap` is at work over a tensor, at any level."""
    if not is_in_func():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def unwrapped(tensor: Any) -> Any:
    """A tensor without what the transforms of torch.func put around it, outside of a compiler."""
    if torch.compiler.is_compiling() or not is_in_func():
        return tensor
    while isinstance(tensor, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
