"""Validation at the public boundary, and the wording of every error that it raises."""

import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from ._transforms import is_moving

# Those that need no torch are there by this name too.
from ._values import UserError as UserError
from ._values import count as count
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
    if isinstance(value, Tensor) and is_moving(value):
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
    if isinstance(value, Tensor) and value.is_floating_point():
        shape("target", value, probabilities_shape, "for class probabilities")
    else:
        _class_indices(value, labels_shape, " or a floating-point dtype for class probabilities")


def class_indices(value: object, expected: tuple[int, ...]) -> None:
    """Raise unless a target holds class indices in a shape."""
    _class_indices(value, expected, "")


def _class_indices(value: object, expected: tuple[int, ...], or_else: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"target must be a tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(
            f"target must have an integer dtype for class indices{or_else}, got {value.dtype}"
        )
    shape("target", value, expected, "for class indices")


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


class LayerNames(NamedTuple):
    """What the arguments that are a linear layer are called."""

    input: str = "input"
    linear_weight: str = "linear_weight"
    linear_bias: str = "linear_bias"


OF_LAYER = LayerNames()


def linear_layer(
    input: object, linear_weight: object, linear_bias: object, names: LayerNames = OF_LAYER
) -> None:
    """Raise unless an input and the weight and bias of a linear layer fit together."""
    floating(names.input, input)
    floating(names.linear_weight, linear_weight)
    assert isinstance(input, Tensor)
    assert isinstance(linear_weight, Tensor)
    if linear_weight.dim() < 2:
        raise ValueError(
            f"{names.linear_weight} must have at least the two dimensions (C, D), "
            f"got shape {tuple(linear_weight.shape)}"
        )
    features = linear_weight.shape[-1]
    if input.dim() == 0 or input.shape[-1] != features:
        raise ValueError(
            f"{names.input} must have a last dimension of {features}, as {names.linear_weight} "
            f"has, got shape {tuple(input.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() != 2:
        raise ValueError(
            f"{names.input} must have the shape (N, D) for a {names.linear_weight} of more than "
            f"two dimensions, got {tuple(input.shape)}"
        )
    if linear_bias is not None:
        floating(names.linear_bias, linear_bias)
        assert isinstance(linear_bias, Tensor)
        expected, reason = linear_weight.shape[:-1], f"as {names.linear_weight} without D"
        shape(names.linear_bias, linear_bias, expected, reason)


def layer_of_two_dimensions(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    names: LayerNames = OF_LAYER,
) -> None:
    """Raise unless the arguments are a linear layer of at least one class, with a W (C, D)."""
    linear_layer(input, linear_weight, linear_bias, names)
    if linear_weight.dim() != 2 or len(linear_weight) == 0:
        raise ValueError(
            f"{names.linear_weight} must have the shape (C, D) with at least one class, "
            f"got {tuple(linear_weight.shape)}"
        )


def leading(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless a named tensor begins with the dimensions that the rows of input have."""
    if tuple(value.shape[: len(expected)]) != tuple(expected):
        raise ValueError(
            f"{name} must have the leading dimensions of input, {tuple(expected)}, "
            f"got shape {tuple(value.shape)}"
        )


def mask(value: object, expected: tuple[int, ...]) -> None:
    """Raise unless a mask holds a bool for each row."""
    if not isinstance(value, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"mask must have the dtype torch.bool, got {value.dtype}")
    shape("mask", value, expected, "as input without D")


def chunk_size(value: object) -> int | None:
    """Return a number of rows as an int, or None as it is; or raise unless it is at least 1."""
    if value is None:
        return None
    positive("chunk_size", value)
    return integer("chunk_size", value)
