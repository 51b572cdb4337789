"""Classes spread over the ranks of a process group, and what their ranks work out together."""

from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """What one rank knows of the rows, beside the classes that are its own.

    All ranks have the same rows, and call each method in the same order, with the same shapes.
    """

    group: Any  # the ProcessGroup; its class is missing where torch was built without it
    inside: Tensor | None  # (N,) 1 where the label is a class of this rank, else 0; None for 1
    mass: Tensor | None  # (N,) the mass of each row's target over all ranks, None for 1

    def rows(self, rows: slice) -> "Spread":
        """The same of some rows."""
        inside = None if self.inside is None else self.inside[rows]
        mass = None if self.mass is None else self.mass[rows]
        return replace(self, inside=inside, mass=mass)

    def max_(self, value: Tensor) -> Tensor:
        """Replace a value by the largest of all ranks."""
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return value

    def sum_(self, value: Tensor) -> Tensor:
        """Replace a value by its sum over all ranks."""
        dist.all_reduce(value, dist.ReduceOp.SUM, group=self.group)
        return value
