"""Validation at the public boundary, and the wording of every error that it raises."""

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


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
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def options(
    classes: int | None,
    weight: Tensor | None,
    ignore_index: object,
    reduction: str,
    label_smoothing: object,
) -> None:
    """Raise unless the options of a loss are sound, for a number of classes where that is known."""
    one_of("reduction", reduction, REDUCTIONS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, type(None))):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing must be a float, got {label_smoothing!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    if classes == 0:
        raise ValueError("input must have at least one class, got none")
    if weight is not None:
        floating("weight", weight)
        if classes is not None:
            shape("weight", weight, (classes,), "for one weight a class")
        if weight.requires_grad:
            raise ValueError("weight must not require a gradient, for the loss gives it none")


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


def labels(value: Tensor, classes: int, ignore_index: int) -> bool:
    """Raise unless every class index lies in range; return whether some may be ignored.

    That is looked at only where it can be seen without waiting, which is on a CPU, outside of a
    compiler and of vmap. Elsewhere the kernels that gather by these indices check them.
    """
    if value.device.type != "cpu" or torch.compiler.is_compiling() or value.numel() == 0:
        return True
    try:
        low, high = (int(bound) for bound in value.aminmax())
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


def chunk_size(value: object) -> None:
    """Raise unless a number of rows is a positive int, or None."""
    if value is not None:
        positive("chunk_size", value)
