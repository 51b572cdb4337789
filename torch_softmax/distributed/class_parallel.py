"""A style that shards the classes of a model's head over a device mesh, in one line."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from ._sharded import check_mesh

__all__ = ["ClassParallel"]


class ClassParallel(ParallelStyle):
    """A style for `parallelize_module` that shards the classes of a linear layer over a mesh.

    Rank p holds rows of W, and of b: z_p = x W_pᵀ + b_p. `SoftmaxRegression.loss`,
    `LinearCrossEntropyLoss` and `functional.linear_cross_entropy` take it from there: given the
    same rows on every rank they return the same loss on every rank, and the gradients of all of
    x and of the rank's own W_p and b_p. The ranks exchange three numbers a row for the loss (a
    maximum and two sums) and add up ∂L/∂x once, in float32 at least; logits and weights stay where
    they are.

    The ranks must be called alike, and raise together where they were not: where dtypes, shapes,
    options, class indices or what requires a gradient differ; and where rows, probabilities or
    class weights differ by more than ranks may that round in another order (of the whole, some 10⁻³
    in length in float32, and two percent in direction or in half precision). Less than that goes
    unnoticed, such as one row of many that is slightly different. Exact checks cost a hash of all
    bytes, and are asked for as torch's own are, with `TORCH_DISTRIBUTED_DEBUG=DETAIL`.

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
        check_mesh("device_mesh", device_mesh)
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
