"""Classes sharded over a device mesh: what each rank holds, and how to set a model up for it."""

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.functional import pad

from ._spread import Spread
from ._targets import Targets

__all__ = ["ClassParallel", "ClassShard"]

# By how much `_weighted_sum` may differ between ranks: they may round in another order.
_ROUNDING = 0.02


class ClassParallel(ParallelStyle):
    """A style for `parallelize_module` that shards the classes of a linear layer over a mesh.

    Rank p holds rows of W, and of b: z_p = x W_pᵀ + b_p. `SoftmaxRegression.loss`,
    `LinearCrossEntropyLoss` and `functional.linear_cross_entropy` take it from there: given the
    same rows on every rank they return the same loss on every rank, and the gradients of all of
    x and of the rank's own W_p and b_p. The ranks exchange three numbers a row for the loss (a
    maximum and two sums) and add up ∂L/∂x once, in float32 at least; logits and weights stay where
    they are.

    Only who asks for logits themselves, by `forward`, `predict` or `predict_proba`, has them
    gathered: all classes of the rows given, on every rank.

    Raises:
        TypeError: The module has no weight for each class.
        ValueError: The mesh has more than one dimension, or the module more than one loss a row.

    Example:
        parallelize_module(model, init_device_mesh("cuda", (8,)), {"head": ClassParallel()})

    Source: Shoeybi et al., Megatron-LM (2019), section 3, for the parallel cross-entropy.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check_mesh("device_mesh", device_mesh)
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
        hooks: Any = _replicate_input, _gather_logits  # typed by torch as if they gave nothing back
        distribute_module(linear, device_mesh, _shard_classes, *hooks)
        return module


def _shard_classes(_: str, linear: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in list(linear.named_parameters(recurse=False)):
        sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        linear.register_parameter(name, nn.Parameter(sharded, parameter.requires_grad))


def _replicate_input(_: nn.Module, inputs: tuple[Tensor], mesh: DeviceMesh) -> tuple[Tensor]:
    (input,) = inputs
    if not isinstance(input, DTensor):
        input = DTensor.from_local(input, mesh, [Replicate()])
    return (input,)


def _gather_logits(_: nn.Module, logits: DTensor, mesh: DeviceMesh) -> Tensor:
    full: Tensor = logits.full_tensor()
    return full


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
        mesh, classes = linear_weight.device_mesh, linear_weight.shape[0]
        _check_mesh("linear_weight", mesh)
        step = -(-classes // mesh.size())
        start = min(mesh.get_local_rank() * step, classes)
        return cls(mesh, step, start, min(start + step, classes))

    def parameters(
        self, linear_weight: Tensor, linear_bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """W_p and b_p, in the dtype of the products."""
        if linear_weight.dim() > 2:
            raise ValueError(
                "linear_weight must have the shape (C, D) where it is sharded, "
                f"got {tuple(linear_weight.shape)}"
            )
        W = self._local("linear_weight", linear_weight, 0).to(dtype)
        b = None if linear_bias is None else self._local("linear_bias", linear_bias, 0).to(dtype)
        if self.stop == self.start:
            W = pad(W, (0, 0, 0, 1))
            b = W.new_empty(0) if b is None else b
            b = pad(b, (0, 1), value=torch.finfo(dtype).min)
        return W, b

    def rows(
        self, input: Tensor, target: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """All of x, labels and class weights; and of probabilities (..., K) this rank's classes."""
        input = self._whole("input", input)
        weight = None if weight is None else self._whole("weight", weight)
        if not target.is_floating_point():
            return input, self._whole("target", target), weight
        if target.requires_grad:
            raise NotImplementedError(
                "target must not require a gradient where linear_weight is sharded"
            )
        if isinstance(target, DTensor):
            target = self._local("target", target, target.dim() - 1)
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

    def agree(self, tensors: dict[str, Tensor | None], **options: object) -> None:
        """Raise on all ranks unless all were called alike: else they'd wait for ever, or be wrong.

        That is how rows are noticed that a sampler, or FSDP, deals out to the ranks.

        Args:
            tensors: by the names of the arguments; those that are sharded differ in their values.
            options: by the names of the arguments.
        """
        if torch.compiler.is_compiling():
            return
        kinds = {name: _kind(tensor) for name, tensor in tensors.items()} | options
        marks = [float(crc32(repr(kind).encode())) for kind in kinds.values()]
        sums = [_weighted_sum(tensor) for tensor in tensors.values()]
        values = torch.tensor(marks + sums, dtype=torch.float64, device=self.mesh.device_type)
        bounds = torch.cat((values, -values))
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.mesh.get_group())
        given = [*kinds.items(), *((name, "other values") for name in tensors)]
        for (name, got), difference in zip(given, bounds.view(2, -1).sum(0).tolist(), strict=True):
            if difference > _ROUNDING:
                raise ValueError(
                    f"{name} must be the same on every rank of the mesh that shards linear_weight, "
                    f"got {got} on rank {self.mesh.get_local_rank()}"
                )

    def _columns(self, values: Tensor) -> Tensor:
        """Values of this rank's classes, the last dimension, with the one that stands for none."""
        return pad(values, (0, 1)) if self.stop == self.start else values

    def _whole(self, name: str, value: Tensor) -> Tensor:
        """A tensor that every rank has in full: a plain one, or a DTensor that is replicated."""
        if not isinstance(value, DTensor):
            return value
        if not all(placement.is_replicate() for placement in value.placements):
            raise ValueError(
                f"{name} must be replicated where linear_weight is sharded, got {value.placements}"
            )
        return _to_local(value)

    def _local(self, name: str, value: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor that is sharded on a dimension, which is that of classes."""
        if not isinstance(value, DTensor):
            raise TypeError(
                f"{name} must be a DTensor as linear_weight is, got {type(value).__name__}"
            )
        placements: tuple[Any, ...] = value.placements
        # A subclass of Shard deals its rows out in another order.
        if [type(p) for p in placements] != [Shard] or placements[0].dim != dim:
            raise ValueError(f"{name} must be sharded on dimension {dim}, got {placements}")
        if value.device_mesh != self.mesh:
            raise ValueError(
                f"{name} must be on the mesh of linear_weight, {self.mesh}, got {value.device_mesh}"
            )
        local = _to_local(value)
        if local.shape[dim] != self.stop - self.start:
            raise ValueError(
                f"{name} must hold {self.stop - self.start} of its {value.shape[dim]} classes on "
                f"rank {self.mesh.get_local_rank()} of {self.mesh.size()}, as torch.chunk deals "
                f"them out, got {local.shape[dim]}"
            )
        return local


class _ToLocal(Function):
    """This rank's part of a DTensor, to be differentiated twice, as that of torch 2.6 can't be."""

    @staticmethod
    def forward(ctx: Any, value: DTensor) -> Tensor:
        ctx.layout = value.device_mesh, value.placements
        ctx.shape = value.shape
        local = value.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        stride = torch.empty(ctx.shape, device="meta").stride()
        return DTensor.from_local(
            gradient.contiguous(), *ctx.layout, shape=ctx.shape, stride=stride
        )


def _to_local(value: DTensor) -> Tensor:
    local: Tensor = _ToLocal.apply(value)
    return local


def _kind(tensor: Tensor | None) -> str:
    """What must be known of a tensor to go on alike, beside its values."""
    if tensor is None:
        return "None"
    gradient = " with a gradient" if tensor.requires_grad and torch.is_grad_enabled() else ""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}{gradient}"


def _weighted_sum(tensor: Tensor | None) -> float:
    """A sum that hardly any other values come to: exact for integers, else in units of ‖x‖.

    Σ_n n x_n of class indices, and Σ_n Σ_d cos(n) cos(d) x_nd of numbers (N, D); 0 where each rank
    has a part.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local() if tensor.placements[0].is_replicate() else None
    if tensor is None or tensor.numel() == 0:
        return 0.0
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    if not rows.is_floating_point():
        indices = rows.flatten()
        return float((indices * torch.arange(1, len(indices) + 1, device=rows.device)).sum())
    n, d = (torch.arange(size, device=rows.device).double().cos() for size in rows.shape)
    length = torch.linalg.vector_norm(rows, dtype=torch.float64)
    return float(n @ (rows @ d.to(rows.dtype)).double() / length)


def _check_mesh(name: str, mesh: DeviceMesh) -> None:
    """Raise unless a mesh is one line of ranks."""
    if mesh.ndim != 1:
        raise ValueError(
            f"{name} must be of one dimension, got {mesh.ndim}: take the part of the mesh that "
            "shards the classes"
        )
