"""In which dtypes a loss is worked out, and in which it is returned."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Dtypes = tuple[torch.dtype, ...]


def widest(*dtypes: torch.dtype | None) -> torch.dtype:
    """What some dtypes promote to, None left out."""
    different = {dtype for dtype in dtypes if dtype is not None}
    return functools.reduce(torch.promote_types, different)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype, which costs nothing where it is in that already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for exponentials and sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def sum_dtype(values: Tensor) -> torch.dtype | None:
    """The dtype to sum values in: at least float32 for floats; None for torch's own of integers."""
    return accumulation_dtype(values.dtype) if values.is_floating_point() else None


def product_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of a layer's products: what its tensors promote to, or autocast's."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = widest(*(tensor.dtype for tensor in given))
    device = given[0].device.type
    if is_autocast(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def is_autocast(device: str) -> bool:
    """Whether autocast is at work on a kind of device; 'meta' has none, and can't be asked."""
    return device != "meta" and torch.is_autocast_enabled(device)


def outside_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Within this, products are made in the dtypes that were chosen for them."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if is_autocast(device) else nullcontext()


def loss_dtype(logits: torch.dtype, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype that torch returns a loss in, for the dtype of the logits and a target.

    That is float32 under autocast. Probabilities and their class weights are multiplied with the
    logarithms of S, and promote as such.
    """
    if is_autocast(target.device.type):
        logits = accumulation_dtype(logits)
    if not target.is_floating_point():
        return logits
    return widest(logits, target.dtype, None if weight is None else weight.dtype)
