"""Examples as they are given, of which a few rows at a time are made ready to be multiplied."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import _checks as checks

# Of more digits than float32 has, so that they must not be rounded before a shift is taken off.
_WIDE = (torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64)
_LIMIT_OF_GROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Rows:
    """Examples (x − shift) ∘ scale, of which only the rows at work are moved, widened or scaled.

    Args:
        x: (N, D), a tensor or a NumPy array, memory-mapped or not, of any real dtype. It is never
            copied as a whole.
        shift, scale: Numbers, or one for each feature (D,).
        index: (n,) int64, the rows of x to take, in this order; None for all.

    Example:
        >>> pixels = torch.tensor([[0, 51], [255, 102]], dtype=torch.uint8)
        >>> Rows(pixels, scale=1 / 255).read(slice(0, 2))
        tensor([[0.0000, 0.2000],
                [1.0000, 0.4000]])
    """

    x: Tensor
    shift: Tensor | float = 0.0
    scale: Tensor | float = 1.0
    index: Tensor | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    centre: Tensor | None = None  # (D,), what is taken off last

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", as_tensor("x", self.x))
        if self.x.layout != torch.strided:
            raise TypeError(f"x must be dense, as its to_dense() is, got {self.x.layout}")
        if self.x.dim() != 2 or self.x.is_complex():
            raise ValueError(
                f"x must be real and of shape (N, D), got {self.x.dtype} {tuple(self.x.shape)}"
            )
        for name in ("shift", "scale"):
            value = getattr(self, name)
            if not isinstance(value, float | int):
                value = as_tensor(name, value)
                if value.dim() > 0:
                    checks.shape(name, value, self.x.shape[1:], "for one number a feature")
                object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.x) if self.index is None else len(self.index)

    @property
    def features(self) -> int:
        """D."""
        return self.x.shape[1]

    def take(self, index: Tensor) -> "Rows":
        """Some of the rows, (n,) int64 or (N,) bool."""
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        index = index.to(self.x.device if self.index is None else self.index.device)
        return replace(self, index=index if self.index is None else self.index[index])

    def to(self, device: torch.device, dtype: torch.dtype) -> "Rows":
        """The same, to be multiplied on a device and in a dtype."""
        return replace(self, device=device, dtype=dtype)

    def read(self, rows: slice) -> Tensor:
        """Some rows (n, D), in the dtype and on the device; a view of x where x is."""
        part = self.x[rows] if self.index is None else self.x[self.index[rows]]
        moves = isinstance(self.shift, Tensor) or self.shift != 0
        scales = isinstance(self.scale, Tensor) or self.scale != 1
        is_wide = part.dtype in _WIDE and self.device.type != "mps"  # which has no float64
        dtype = torch.float64 if is_wide and (moves or scales) else self.dtype
        part = part.to(self.device, dtype)
        if moves:
            part = part - _like(self.shift, part)
        if scales:
            part = part * _like(self.scale, part)
        part = part.to(self.dtype)
        return part if self.centre is None else part - self.centre


def _like(value: Tensor | float, part: Tensor) -> Tensor | float:
    """A shift or scale, to be worked with."""
    return value.to(part) if isinstance(value, Tensor) else value


def as_tensor(name: str, value: object) -> Tensor:
    """A tensor, or a view of an array as one, without a copy."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        with warnings.catch_warnings():
            # Of an array that must not be written to: nothing here does.
            warnings.simplefilter("ignore", UserWarning)
            return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or an array of numbers, got {error}") from None


def memory_of(device: torch.device) -> int:
    """The bytes of memory that this process may use on a device, as far as they can be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits: Sequence[int] = [2**33]  # where nothing can be told
    if hasattr(os, "sysconf"):
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_own_limits()]
    return min(limits)


def _own_limits() -> list[int]:
    """Those of the process and of its control group."""
    import resource  # not there on Windows

    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    limits = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    if _LIMIT_OF_GROUP.exists():
        text = _LIMIT_OF_GROUP.read_text().strip()
        limits += [int(text)] if text.isdigit() else []
    return limits
