"""Validation at the public boundary, and the wording of every error that it raises."""

import math
import numbers
import operator

import torch
from torch import Tensor


class UserError(RuntimeError):
    """Something that a user gave can't be used; the message is one line that says why."""


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless a named option is one of some words."""
    if value not in choices:
        words = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise ValueError(f"{name} must be {words}, got {value!r}")


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


def positive(name: str, value: object) -> None:
    """Raise unless a named argument is an int of at least 1."""
    if integer(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def seed(name: str, value: object) -> None:
    """Raise unless a named argument is an int that every generator of torch takes as its seed."""
    if not 0 <= integer(name, value) < 2**63:
        raise ValueError(f"{name} must be from 0 to 2**63 - 1, got {value}")


def integer(name: str, value: object) -> int:
    """Return a named argument as an int, or raise: NumPy's integers and 0-d tensors will do."""
    try:
        if isinstance(value, (bool, float)):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def number(name: str, value: object) -> float:
    """Return a named argument as a float, or raise: NumPy's numbers and 0-d tensors will do."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} must not require a gradient, for it gets none")
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.dim() == 0):
        return float(value)
    raise TypeError(f"{name} must be a float, got {value!r}")


def finite(name: str, value: float, *, above_zero: bool = False) -> None:
    """Raise unless a named number is finite and at least 0, or above it if so asked."""
    if not (0 < value < math.inf or (value == 0 and not above_zero)):
        bound = "above 0" if above_zero else "of at least 0"
        raise ValueError(f"{name} must be a finite number {bound}, got {value}")


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
