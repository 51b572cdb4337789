"""The loss of a layer whose classes are sharded: what each rank holds, and that all agree."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import pad

from .. import _checks as checks
from .._transforms import is_in_func
from ..losses._dtypes import product_dtype
from ..losses._formulas import Target
from ..losses._rows import Layer
from ..losses._targets import Options, Terms, fold
from ..losses.linear import check, default_chunk_size, dtypes_and_chunks, loss_of_layer

# By how much the marks of floating-point values may differ: ranks may round in another order.
_ROUNDING = 0.02


@dataclass(frozen=True)
class RanksOfGroup:
    """How the ranks of a group combine their numbers.

    All ranks have the same rows, and call each method in the same order, with the same shapes.
    """

    group: Any  # the ProcessGroup; its class is missing where torch was built without it

    def largest(self, value: Tensor) -> Tensor:
        """The largest value of all ranks."""
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return value

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The sum of each value over all ranks, in one message."""
        message = torch.stack(values)
        dist.all_reduce(message, dist.ReduceOp.SUM, group=self.group)
        return message.unbind()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sharded_cross_entropy(
    layer: Layer, target: Tensor, options: Options, chunk_size: int | None
) -> Tensor:
    """`linear_cross_entropy` where the weight is sharded by classes over a mesh.

    Each rank has the same rows, and works out its own classes. The ranks agree first on what they
    were called with.
    """
    check(layer, target, options)
    if is_in_func():
        raise NotImplementedError(
            "torch.func needs all classes in one process, got a linear_weight that is sharded"
        )
    shard = ClassShard.of(layer.W)
    dtype = product_dtype(*layer)
    shard.agree(
        {
            "input": layer.x,
            "linear_weight": layer.W,
            "linear_bias": layer.b,
            "target": target,
            "weight": options.weight,
        },
        dtype=(dtype, options.dtype),
        reduction=options.reduction,
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        chunk_size=chunk_size,
    )
    step = chunk_size or default_chunk_size(shard.step, layer.W.shape[-1], layer.x.device)
    returned, how = dtypes_and_chunks(layer, target, options, step)
    local = shard.layer(layer, dtype)
    terms = shard.terms(target, options, how.dtype)
    loss = loss_of_layer(local, terms, options.reduction, how, across=shard.ranks)
    return loss.to(returned)


@dataclass(frozen=True)
class ClassShard:
    """The classes `start` to `stop` of all, which are those of this rank.

    A rank without any class holds one whose logit is the lowest number, and so has no share.
    """

    mesh: DeviceMesh
    classes: int  # all
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
        check_mesh("linear_weight", mesh)
        step = -(-classes // mesh.size())
        start = min(mesh.get_local_rank() * step, classes)
        return cls(mesh, classes, step, start, min(start + step, classes))

    @property
    def ranks(self) -> RanksOfGroup:
        """The ranks that have the other classes."""
        return RanksOfGroup(self.mesh.get_group())

    def layer(self, layer: Layer, dtype: torch.dtype) -> Layer:
        """All of x, and W_p and b_p in the dtype of the products."""
        x, W, b = layer
        if W.dim() > 2:
            raise ValueError(
                "linear_weight must have the shape (C, D) where it is sharded, "
                f"got {tuple(W.shape)}"
            )
        W = self._local("linear_weight", W, 0).to(dtype)
        b = None if b is None else self._local("linear_bias", b, 0).to(dtype)
        if self.stop == self.start:
            W = pad(W, (0, 0, 0, 1))
            b = W.new_empty(0) if b is None else b
            b = pad(b, (0, 1), value=torch.finfo(dtype).min)
        return Layer(self._whole("input", x), W, b)

    def terms(self, target: Tensor, options: Options, dtype: torch.dtype) -> Terms:
        """The terms of the loss, with this rank's part of their target distributions."""
        if options.weight is not None:
            options = options._replace(weight=self._whole("weight", options.weight))
        if target.is_floating_point():
            return self._of_probabilities(target, options, dtype)
        target = self._whole("target", target)
        # No kernel would notice a label that no rank has; and `agree` has waited for all already.
        may_ignore = checks.labels(target, self.classes, options.ignore_index, wait=True)
        terms = fold(target, options, self.classes, dtype, may_ignore=may_ignore)
        label, hot, _, floor = terms.y
        inside = (label >= self.start) & (label < self.stop)
        return terms._replace(
            y=Target(
                (label - self.start).masked_fill(~inside, 0),
                inside.to(dtype) if hot is None else hot * inside,
                None,
                None if floor is None else self._columns(floor[self.start : self.stop]),
            )
        )

    def _of_probabilities(self, target: Tensor, options: Options, dtype: torch.dtype) -> Terms:
        """The terms of probabilities (..., K), or of this rank's part of them."""
        if target.requires_grad:
            raise NotImplementedError(
                "target must not require a gradient where linear_weight is sharded"
            )
        if isinstance(target, DTensor):
            target = self._local("target", target, target.dim() - 1)
        else:
            target = target[..., self.start : self.stop]
        if options.weight is not None or options.label_smoothing:
            weight = options.weight
            weight = target.new_ones(self.classes, dtype=dtype) if weight is None else weight
            options = options._replace(weight=self._columns(weight[self.start : self.stop]))
        terms = fold(self._columns(target), options, self.classes, dtype, may_ignore=False)
        assert terms.mass is not None
        (mass,) = self.ranks.total(terms.mass)
        return terms._replace(mass=mass)

    def agree(self, tensors: dict[str, Tensor | None], **options: object) -> None:
        """Raise on all ranks unless all were called alike: else they'd wait for ever, or be wrong.

        That is how rows are noticed that a sampler, or FSDP, deals out to the ranks.

        Args:
            tensors: By the names of the arguments; those that are sharded differ in their values.
            options: By the names of the arguments.
        """
        kinds = {name: _kind(tensor) for name, tensor in tensors.items()} | options
        marks = [(name, got, Mark(float(crc32(repr(got).encode())))) for name, got in kinds.items()]
        for name, tensor in tensors.items():
            marks += [(name, "other values", mark) for mark in _marks(tensor)]
        values = torch.tensor(
            [mark.value for *_, mark in marks], dtype=torch.float64, device=self.mesh.device_type
        )
        bounds = torch.cat((values, -values))
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.mesh.get_group())
        differences = bounds.view(2, -1).sum(0).tolist()
        for (name, got, mark), difference in zip(marks, differences, strict=True):
            if difference > mark.rounding:
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


class Mark(NamedTuple):
    """A number that tells values apart, and by how much it may differ for those that are alike."""

    value: float
    rounding: float = 0.0


def _marks(tensor: Tensor | None) -> list[Mark]:
    """Two marks of a tensor's values; 0 where each rank has a part.

    They are a hash of the bytes for integers, and for all where torch's own checks between ranks
    are asked for. Else they are log ‖x‖ and Σ_n Σ_d cos(n) cos(d) x_nd / ‖x‖ of numbers (N, D).
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local() if tensor.placements[0].is_replicate() else None
    if tensor is None or tensor.numel() == 0:
        return [Mark(0.0), Mark(0.0)]
    tensor = tensor.detach()
    if not tensor.is_floating_point() or _is_detailed():
        content: Any = tensor.reshape(-1).view(torch.uint8).cpu().numpy()
        digest = blake2b(content, digest_size=8).digest()
        return [Mark(float(int.from_bytes(half, "big"))) for half in (digest[:4], digest[4:])]
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    n, d = (torch.arange(size, device=rows.device).double().cos() for size in rows.shape)
    length = torch.linalg.vector_norm(rows, dtype=torch.float64)
    direction = n @ (rows @ d.to(rows.dtype)).double() / length
    rounding = min(_ROUNDING, torch.finfo(rows.dtype).eps ** 0.5)
    return [Mark(float(length.log()), rounding), Mark(float(direction), _ROUNDING)]


def _is_detailed() -> bool:
    """Whether torch is asked for its own checks between ranks."""
    level = dist.get_debug_level()  # type: ignore[attr-defined]
    return bool(level == dist.DebugLevel.DETAIL)  # type: ignore[attr-defined]


def check_mesh(name: str, mesh: DeviceMesh) -> None:
    """Raise unless a mesh is one line of ranks."""
    if mesh.ndim != 1:
        raise ValueError(
            f"{name} must be of one dimension, got {mesh.ndim}: take the part of the mesh that "
            "shards the classes"
        )
