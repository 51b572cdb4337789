"""Validation at the public boundary, and the wording of every error that it raises."""

import numbers

import torch
from torch import Tensor

# Those that need no torch are there by this name too.
from ._values import UserError as UserError
from ._values import finite as finite
from ._values import integer as integer
from ._values import one_of as one_of
from ._values import positive as positive
from ._values import seed as seed


def floating(name: str, value: object) -> None:
    """Raise unless a named argument is a tensor of real floating-point numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")


def shape(name: str, value: Tensor, expected: tuple[int, ...], reason: str) -> None:
    """Raise unless a named tensor has a shape; the reason says where that shape comes from."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name} must have shape {tuple(expected)} {reason}, got {tuple(value.shape)}"
        )


def number(name: str, value: object) -> float:
    """Return a named argument as a float, or raise: NumPy's numbers and 0-d tensors will do."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} must not require a gradient, for it gets none")
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.dim() == 0):
        return float(value)
    raise TypeError(f"{name} must be a float, got {value!r}")


def floating_dtype(name: str, value: object) -> None:
    """Raise unless a named argument is a dtype of real floating-point numbers."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(f"{name} must be a floating-point torch.dtype, got {value!r}")


def target(
    value: object, labels_shape: tuple[int, ...], probabilities_shape: tuple[int, ...]
) -> None:
    """Raise unless a target holds class indices or probabilities, in the shape for either."""
    if not isinstance(value, Tensor):
        raise TypeError(f"target must be a tensor, got {type(value).__name__}")
    if value.is_floating_point():
        shape("target", value, probabilities_shape, "for class probabilities")
    elif value.is_complex() or value.dtype == torch.bool:
        raise TypeError(
            "target must have an integer dtype for class indices or a floating-point dtype for "
            f"class probabilities, got {value.dtype}"
        )
    else:
        shape("target", value, labels_shape, "for class indices")


def labels(value: Tensor, classes: int, ignore_index: int, *, wait: bool = False) -> bool:
    """Raise unless every class index lies in range; return whether some may be ignored.

    That is looked at only where it can be seen without waiting for a device, unless asked to wait:
    on a CPU, outside of a compiler and of vmap. Elsewhere the kernels that gather by these indices
    check them.
    """
    if value.is_floating_point():
        return False
    can_see = value.device.type == "cpu" or (wait and not value.is_meta)
    if not can_see or torch.compiler.is_compiling() or value.numel() == 0:
        return True
    if value.dtype != torch.int64:  # aminmax knows few others
        value = value.long()
    try:
        lowest, highest = value.aminmax()
        low, high = lowest.item(), highest.item()
    except RuntimeError:  # under vmap, indices have no single value
        return True
    if low >= 0 and high < classes:
        return low <= ignore_index <= high
    outside = value[(value != ignore_index) & ((value < 0) | (value >= classes))]
    if outside.numel():
        raise ValueError(
            f"target must hold class indices in [0, {classes}) or ignore_index={ignore_index}, "
            f"got {int(outside[0])}"
        )
    return True


def linear_layer(input: object, linear_weight: object, linear_bias: object) -> None:
    """Raise unless an input and the weight and bias of a linear layer fit together."""
    floating("input", input)
    floating("linear_weight", linear_weight)
    assert isinstance(input, Tensor)
    assert isinstance(linear_weight, Tensor)
    if linear_weight.dim() < 2:
        raise ValueError(
            "linear_weight must have at least the two dimensions (C, D), "
            f"got shape {tuple(linear_weight.shape)}"
        )
    features = linear_weight.shape[-1]
    if input.dim() == 0 or input.shape[-1] != features:
        raise ValueError(
            f"input must have a last dimension of {features}, as linear_weight has, "
            f"got shape {tuple(input.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() != 2:
        raise ValueError(
            "input must have the shape (N, D) for a linear_weight of more than two dimensions, "
            f"got {tuple(input.shape)}"
        )
    if linear_bias is not None:
        floating("linear_bias", linear_bias)
        assert isinstance(linear_bias, Tensor)
        shape("linear_bias", linear_bias, linear_weight.shape[:-1], "as linear_weight without D")


def chunk_size(value: object) -> int | None:
    """Return a number of rows as an int, or None as it is; or raise unless it is at least 1."""
    if value is None:
        return None
    positive("chunk_size", value)
    return integer("chunk_size", value)
