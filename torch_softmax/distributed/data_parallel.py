"""Data-parallel training: every process takes part of each batch, and they average as one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The processes that share the batches: one alone, or all that torchrun has started.

    All ranks call each method in the same order.

    Args:
        rank: The number of this process, from 0.
        size: How many there are.

    Example:
        >>> Ranks(rank=1, size=3).part(torch.arange(5))
        tensor([1, 4])
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process reports and writes, which one must do alone."""
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """This rank's share of a batch; the shares differ by at most one example."""
        return batch[self.rank :: self.size]

    def mean(self, weight: Tensor, *values: Tensor) -> list[Tensor]:
        """Average values over the ranks by weight, in one message: Σ_p n_p v_p / Σ_p n_p.

        Args:
            weight: n, a scalar, such as the number of targets that count.
            values: v, of one dtype, and of the same shapes on every rank. They are left out where
                the weight is 0, even if they are nan, as is the mean loss of no rows.

        Returns:
            The averages, which are 0 where all weights are.
        """
        if self.size == 1:
            return list(values)
        flat = torch.cat([value.flatten() for value in values])
        flat = torch.where(weight > 0, flat * weight, 0)
        sums = torch.cat([flat, weight.to(flat.dtype).view(1)])
        dist.all_reduce(sums)
        means = sums[:-1] / sums[-1].clamp(min=1)
        parts = means.split([value.numel() for value in values])
        return [part.view_as(value) for part, value in zip(parts, values, strict=True)]

    def total(self, *counts: Tensor | int) -> list[Tensor | int]:
        """Add up counts over the ranks, in one message."""
        if self.size == 1:
            return list(counts)
        totals = torch.tensor([int(count) for count in counts])
        if dist.get_backend() == "nccl":
            totals = totals.cuda()
        dist.all_reduce(totals)
        return [int(total) for total in totals]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do the block on every rank, and raise on all of them what it raises on one."""
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        self._raise_any(error)

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """Let the first rank do the block, and then the others, who find what it has made.

        What it raises on one rank is raised on all of them, so that none waits in vain.
        """
        if not self.is_first:
            self._raise_any(None)
        with self.together():
            yield
        if self.is_first:
            self._raise_any(None)

    def _raise_any(self, error: Exception | None) -> None:
        """Wait for all ranks, and raise the error of the first of them that has one."""
        errors = [error]
        if self.size > 1:
            errors = [None] * self.size
            dist.all_gather_object(errors, error)
        for first in filter(None, errors):
            raise error or first


@contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, within the block; or be one alone.

    Args:
        device: That of the training, a CPU or a GPU of which each process takes its own.

    Raises:
        ValueError: Processes can't talk to one another from such a device.
    """
    if "WORLD_SIZE" not in os.environ:
        yield Ranks()
        return
    backends = {"cpu": "gloo", "cuda": "nccl"}
    if device.type not in backends:
        raise ValueError(f"device must be cpu or cuda under torchrun, got {device.type!r}")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backends[device.type])
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
