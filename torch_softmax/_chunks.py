"""How many rows to work out at a time, and in which dtypes."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Logits that fit a core's cache beside a few passes over them, measured on a CPU.
_CACHED_LOGITS = 2**19


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for exponentials and sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def loss_dtype(input: Tensor) -> torch.dtype:
    """The dtype of a loss: that of its input, or float32 for a narrower input under autocast."""
    if torch.is_autocast_enabled(input.device.type):
        return accumulation_dtype(input.dtype)
    return input.dtype


def slices(rows: int, step: int) -> Iterator[slice]:
    """Cut a number of rows into slices of at most `step`; no rows at all are one empty slice."""
    step = max(1, step)
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))


def cached_slices(z: Tensor) -> Iterator[slice]:
    """Cut logits (N, K) so that on a CPU the passes over a slice find it in the cache."""
    rows, classes = z.shape
    # Other devices want few large kernels, and a compiler fuses the passes by itself.
    if z.device.type != "cpu" or torch.compiler.is_compiling():
        return slices(rows, rows)
    return slices(rows, _CACHED_LOGITS // max(1, classes))
