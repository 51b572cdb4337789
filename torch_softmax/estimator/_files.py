"""Examples in files: NumPy's .npz, a pair of .npy, or torch's .pt."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch

from .._checks import UserError
from ._data import as_array

_UNREADABLE = (
    *(ValueError, TypeError, AttributeError, RuntimeError, EOFError),
    *(UnpicklingError, zipfile.BadZipFile),
)


class File(NamedTuple):
    """What a file holds."""

    X: Any
    y: Any


def read_file(name: str) -> File:
    """Read X (N, D) and y (N,), memory-mapped where the format allows that.

    Args:
        name: A path to an .npz or .pt with `X` and `y`, or two paths to .npy with a comma between.

    Raises:
        UserError: A file can't be used; the message is a line.
    """
    try:
        if "," in name:
            X, y = (np.lib.format.open_memmap(path, mode="r") for path in name.split(",", 1))
        elif Path(name).suffix == ".pt":
            held = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
            X, y = _parts(name, held)
        else:
            with open(name, "rb") as file:
                X, y = _parts(name, np.load(file))
    except UserError:
        raise
    except _UNREADABLE as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} can't be read: {first}") from None
    if not _is_dense(X) or not _is_dense(y) or not _holds_numbers(X):
        raise UserError(f"{name} must hold X and y as dense tensors or arrays, X of real numbers")
    if X.ndim != 2 or y.ndim != 1 or len(X) != len(y):
        raise UserError(
            f"{name} must hold X (N, D) and y (N,), got {tuple(X.shape)} and {tuple(y.shape)}"
        )
    if len(X) == 0:
        raise UserError(f"{name} must hold at least one example, got none")
    return File(X, as_array(y))


def _parts(name: str, held: Any) -> tuple[Any, Any]:
    """X and y of what a file holds."""
    if not isinstance(held, Mapping):
        raise UserError(f"{name} must hold X and y, got one {type(held).__name__}")
    if not {"X", "y"} <= held.keys():
        raise UserError(f"{name} must hold X and y, got {', '.join(map(str, held))}")
    return held["X"], held["y"]


def _is_dense(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.layout == torch.strided
    return isinstance(value, np.ndarray)


def _holds_numbers(X: Any) -> bool:
    if isinstance(X, torch.Tensor):
        return not X.is_complex()
    return X.dtype.kind in "fiub"
