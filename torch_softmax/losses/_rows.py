"""A function of the logits of a row, and what it is applied to: the terms of the loops."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._autograd import Mask, split
from ._dtypes import cast
from ._formulas import Across


class Layer(NamedTuple):
    """A linear layer with what it is applied to, or one thing for each of these."""

    x: Any  # (N, D); or without a W, the logits (N, K) themselves
    W: Any = None  # (K, D)
    b: Any = None  # (K,)


class Operands(NamedTuple):
    """What a row function is applied to, or one thing for each of these."""

    layers: tuple[Layer, ...]
    others: tuple[Any, ...]

    def flat(self) -> tuple[Any, ...]:
        """All in one tuple, as a plan takes them."""
        return (*(t for layer in self.layers for t in layer), *self.others)


@dataclass(frozen=True)
class How:
    """How the logits are computed.

    Args:
        step: The number of rows of a chunk.
        dtype: The dtype of S and of the numbers of a row.
        logits_dtype: The dtype of the logits, as they come out of the layer's products.
    """

    step: int
    dtype: torch.dtype
    logits_dtype: torch.dtype


class Parts(NamedTuple):
    """Tensors of some rows: one for each layer's logits, each other tensor and each result.

    A row function is given logits and others with the cotangents of its results; a direction has a
    change of each of these. It returns gradients, or their changes, and its results. A mask of this
    form says which of them are needed, and None is one that is not.
    """

    logits: tuple[Any, ...]  # (n, K); changes along M directions are (n, M, K)
    others: tuple[Any, ...]  # (n, ...) of those with rows
    results: tuple[Any, ...] = ()  # (n, ...), changes (n, M); a cotangent may be a number for all


class RowFunction:
    """A function of the logits of some rows, with what is known of its derivatives by hand.

    A call is the definition, in operations that autograd differentiates to any order; `first` and
    `second` are faster, and equal to it.
    """

    layers = 1  # whose logits it takes
    has_second = False  # whether there is a `second`, with `point` and `gradient`
    rows_in: Mask = ()  # which of the tensors beside the logits have rows
    across: Across | None = None  # how sums over sharded classes are combined

    @property
    def results(self) -> int:
        """The number of its results, each of which has rows."""
        return 1

    @property
    def has_rows(self) -> Mask:
        """Which of its operands have rows."""
        return (*(True, False, False) * self.layers, *self.rows_in)

    def __call__(self, logits: tuple[Tensor, ...], others: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The results (n, ...) for logits (n, K)."""
        raise NotImplementedError

    def first(self, at: Parts, needed: Parts) -> Parts:
        """The gradients and results that are needed; a layer's logits may be written to."""
        raise NotImplementedError

    def point(self, at: Parts) -> Any:
        """What `second` and `gradient` have to know of some rows, along whatever direction."""
        raise NotImplementedError

    def second(self, point: Any, at: Parts, along: Parts, needed: Mask) -> Parts:
        """How the gradients change along directions, and the results that are needed."""
        raise NotImplementedError

    def gradient(self, point: Any, at: Parts) -> tuple[Tensor, ...]:
        """The gradient by each layer's logits, (n, K)."""
        raise NotImplementedError

    def told(self) -> tuple[list[str], list[float]]:
        """The words and numbers that tell the function, for an operator."""
        raise NotImplementedError

    @classmethod
    def from_told(cls, words: list[str], numbers: list[float]) -> "RowFunction":
        """The function that is told by words and numbers."""
        raise NotImplementedError

    def operands(self, values: Any) -> Operands:
        """The operands that a flat tuple holds."""
        each = len(Layer._fields)
        of_layers, others = split(values, self.layers * each)
        starts = range(0, self.layers * each, each)
        return Operands(tuple(Layer(*of_layers[i : i + each]) for i in starts), others)

    def definition(self, how: How) -> Callable[..., tuple[Tensor, ...]]:
        """The function of its operands, in operations that can be differentiated to any order."""

        def fn(*tensors: Any) -> tuple[Tensor, ...]:
            if self.across is not None:
                raise NotImplementedError(
                    "a third derivative, which torch.autograd.functional.hvp takes and vhp does "
                    "not, needs all classes in one process, got a linear_weight that is sharded"
                )
            layers, others = self.operands(tensors)
            return self(tuple(_logits_of(layer, how) for layer in layers), others)

        return fn


def _logits_of(layer: Layer, how: How) -> Tensor:
    x, W, b = layer
    if W is not None:
        dtype = how.logits_dtype
        x = linear(cast(x, dtype), cast(W, dtype), None if b is None else cast(b, dtype))
    return cast(x, how.dtype)
