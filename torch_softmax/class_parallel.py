"""Classes sharded over a device mesh: what each rank holds, and how to set a model up for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.functional import pad

from ._spread import Spread
from ._targets import Targets

__all__ = ["ClassParallel", "ClassShard"]


class ClassParallel(ParallelStyle):
    """A style for `parallelize_module` that shards the classes of a linear layer over a mesh.

    Rank p holds rows of W, and of b: z_p = x W_pᵀ + b_p. `SoftmaxRegression.loss`,
    `LinearCrossEntropyLoss` and `functional.linear_cross_entropy` take it from there: given the
    same rows on every rank they return the same loss on every rank, and the gradients of all of
    x and of the rank's own W_p and b_p. The ranks exchange three numbers a row for the loss (a
    maximum and two sums) and add up ∂L/∂x once; logits and weights stay where they are.

    Raises:
        TypeError: The module has no weight for each class.
        ValueError: The mesh has more than one dimension.

    Example:
        parallelize_module(model, init_device_mesh("cuda", (8,)), {"head": ClassParallel()})

    Source: Shoeybi et al., Megatron-LM (2019), section 3, for the parallel cross-entropy.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        check_mesh(device_mesh)
        if getattr(module, "out_features", None) and isinstance(module.out_features, tuple):
            raise ValueError(
                f"module must have one loss for each input, got out_features={module.out_features}"
            )
        linear = getattr(module, "linear", module)
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                "module must be a linear layer, SoftmaxRegression or LinearCrossEntropyLoss, "
                f"got {type(module).__name__}"
            )
        for name, parameter in list(linear.named_parameters(recurse=False)):
            sharded = distribute_tensor(parameter.detach(), device_mesh, [Shard(0)])
            linear.register_parameter(name, nn.Parameter(sharded, parameter.requires_grad))
        return module


def check_mesh(mesh: DeviceMesh) -> None:
    """Raise unless a mesh is one line of ranks."""
    if mesh.ndim != 1:
        raise ValueError(
            "linear_weight must be sharded over a mesh of one dimension, "
            f"got one of {mesh.ndim}: take the part of the mesh that shards the classes"
        )


@dataclass(frozen=True)
class ClassShard:
    """The classes `start` to `stop` of all, which are those of this rank.

    A rank without any class holds one whose logit is the lowest number, and so has no share.
    """

    mesh: DeviceMesh
    step: int  # the classes of a rank that has its full share
    start: int
    stop: int

    @classmethod
    def of(cls, linear_weight: object) -> "ClassShard":
        """The classes of this rank's part of a weight (K, D)."""
        if not isinstance(linear_weight, DTensor):
            raise TypeError(
                "linear_weight must be a DTensor where another argument is one, "
                f"got {type(linear_weight).__name__}"
            )
        check_mesh(linear_weight.device_mesh)
        _check_sharded("linear_weight", linear_weight, 0)
        mesh, classes = linear_weight.device_mesh, linear_weight.shape[0]
        step = -(-classes // mesh.size())
        start = min(mesh.get_local_rank() * step, classes)
        stop = min(start + step, classes)
        local = linear_weight.to_local().shape[0]
        if local != stop - start:
            raise ValueError(
                f"linear_weight must hold {stop - start} of its {classes} classes on rank "
                f"{mesh.get_local_rank()} of {mesh.size()}, as torch.chunk deals them out, "
                f"got {local}"
            )
        return cls(mesh, step, start, stop)

    def parameters(
        self, linear_weight: Tensor, linear_bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """W_p and b_p, in the dtype of the products."""
        W = _local("linear_weight", linear_weight, 0).to(dtype)
        b = None if linear_bias is None else _local("linear_bias", linear_bias, 0).to(dtype)
        if self.stop == self.start:
            W = pad(W, (0, 0, 0, 1))
            b = W.new_empty(0) if b is None else b
            b = pad(b, (0, 1), value=torch.finfo(dtype).min)
        return W, b

    def rows(
        self, input: Tensor, target: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """All of x, labels and class weights; and of probabilities (..., K) this rank's classes."""
        input = _replicated("input", input)
        weight = None if weight is None else _replicated("weight", weight)
        if not target.is_floating_point():
            return input, _replicated("target", target), weight
        if target.requires_grad:
            raise NotImplementedError(
                "target must not require a gradient where linear_weight is sharded"
            )
        if isinstance(target, DTensor):
            target = _local("target", target, target.dim() - 1)
        else:
            target = target[..., self.start : self.stop]
        return input, self._columns(target), weight

    def targets(self, y: Targets, accumulate: torch.dtype) -> Targets:
        """This rank's part of the targets, where class weights and labels are of all classes."""
        here = slice(self.start, self.stop)
        scale, floor = (None if v is None else self._columns(v[here]) for v in (y.scale, y.floor))
        group = self.mesh.get_group()
        if y.is_dense():
            part = Targets(y.target, scale, floor)
            mass = part.mass(y.target.to(accumulate))
            assert mass is not None
            return part._replace(spread=Spread(group, None, Spread(group, None, None).sum_(mass)))
        inside = (y.target >= self.start) & (y.target < self.stop)
        target = (y.target - self.start).masked_fill(~inside, 0)
        mass = y.mass(y.target)
        return Targets(target, scale, floor, Spread(group, inside.to(accumulate), mass))

    def _columns(self, values: Tensor) -> Tensor:
        """Values of this rank's classes, the last dimension, with the one that stands for none."""
        return pad(values, (0, 1)) if self.stop == self.start else values

    def agree(self, **options: float) -> None:
        """Raise on all ranks unless all were called alike, for else they'd wait for ever."""
        if torch.compiler.is_compiling():
            return
        values = torch.tensor(list(options.values()), dtype=torch.float64)
        bounds = torch.cat((values, -values)).to(self.mesh.device_type)
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.mesh.get_group())
        highest, lowest = bounds.cpu().chunk(2)
        differ = [
            name for name, high, low in zip(options, highest, lowest, strict=True) if high != -low
        ]
        if differ:
            raise ValueError(
                f"{', '.join(differ)} must be the same on every rank of the mesh, "
                f"got {[options[name] for name in differ]} on rank {self.mesh.get_local_rank()}"
            )


def _replicated(name: str, value: Tensor) -> Tensor:
    """A tensor that every rank has in full: a plain one, or a DTensor that is replicated."""
    if not isinstance(value, DTensor):
        return value
    if not all(placement.is_replicate() for placement in value.placements):
        raise ValueError(
            f"{name} must be replicated where linear_weight is sharded, got {value.placements}"
        )
    return value.to_local(grad_placements=[Replicate()] * value.device_mesh.ndim)


def _check_sharded(name: str, value: DTensor, dim: int) -> None:
    placements: Sequence[Any] = value.placements
    # A subclass of Shard deals its rows out in another order.
    if len(placements) != 1 or type(placements[0]) is not Shard or placements[0].dim != dim:
        raise ValueError(f"{name} must be sharded on dimension {dim}, got {tuple(placements)}")


def _local(name: str, value: Tensor, dim: int) -> Tensor:
    """This rank's part of a tensor that is sharded on a dimension."""
    if not isinstance(value, DTensor):
        raise TypeError(f"{name} must be a DTensor as linear_weight is, got {type(value).__name__}")
    _check_sharded(name, value, dim)
    return value.to_local()
