"""Losses of a linear layer by others, each called as its documentation recommends."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .measure import UnavailableError

CHUNKS = 8  # torchtune's default


def require(module: str, install: str = '"torch_softmax[bench]"') -> Any:
    """Import a module, or say how it is installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise UnavailableError(f"not installed: pip install {install}") from None


def torch_chunked(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    """Torch's own, whose options choose the chunks and the dtype of sums by themselves."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise UnavailableError(f"torch {torch.__version__} doesn't have it yet")
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, W, target, options=options)


def cut_cross_entropy(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    """Its kernel, which is for half precision on a GPU, or else what it lets torch compile."""
    is_for_kernel = x.is_cuda and x.dtype != torch.float32
    impl = "cce" if is_for_kernel else "torch_compile"
    loss: Tensor = require("cut_cross_entropy").linear_cross_entropy(x, W, target, impl=impl)
    return loss


def liger(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    """Its kernel, for a GPU."""
    package = require("liger_kernel.transformers.fused_linear_cross_entropy")
    if not x.is_cuda:
        raise UnavailableError("needs a GPU")
    loss: Tensor = package.LigerFusedLinearCrossEntropyLoss()(W, x, target)
    return loss


@cache
def compiled_torchtune() -> Callable[[list[Tensor], Tensor], Tensor]:
    """Its loss, of which it says to compile this method and no more."""
    package = require("torchtune.modules.loss", "torchtune torchao")
    loss = package.CEWithChunkedOutputLoss(CHUNKS)
    loss.compute_cross_entropy = torch.compile(loss.compute_cross_entropy, dynamic=True)
    compiled: Callable[[list[Tensor], Tensor], Tensor] = loss
    return compiled


def torchtune(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    """Chunks of logits, which it makes from chunks of one sequence's positions."""
    chunks = [F.linear(chunk, W)[None] for chunk in x.chunk(CHUNKS)]
    return compiled_torchtune()(chunks, target[None])


RIVALS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "torch chunked": torch_chunked,
    "cut-cross-entropy": cut_cross_entropy,
    "Liger": liger,
    "torchtune": torchtune,
}
