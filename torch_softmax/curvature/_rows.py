"""The layer that a Hessian is of, and the rows that it is a sum over, with what each counts."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from .._transforms import is_plain
from ..losses._dtypes import accumulation_dtype, cast, widest
from ..losses._targets import NO_OPTIONS, fold

Batches = Iterable[Any]

# The part of Σ |x| that an order of its terms may change: what is more are other rows.
_SAME = 1e-8


class Rows(NamedTuple):
    """Some rows of an input."""

    x: Tensor  # (n, D)
    keep: Tensor | None  # (n,) bool, False where a row is left out; None where none is
    factor: Tensor | None  # (n,), what the loss of a row is multiplied with; None for 1
    counted: int  # the rows that a mean is over


class Layer(NamedTuple):
    """A linear layer, z = x Wᵀ + b, in the dtype of its products; or a direction of it."""

    W: Tensor  # (K, D)
    b: Tensor | None  # (K,)


def layer_of(linear_weight: object, linear_bias: object, input: object) -> Layer:
    """A checked layer, in the dtype that it promotes to with an input, if that is a tensor."""
    checks.floating("linear_weight", linear_weight)
    assert isinstance(linear_weight, Tensor)
    named = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    for name, value in named.items():
        if isinstance(value, Tensor) and not is_plain(value):
            raise NotImplementedError(
                f"{name} must be whole in this process, as its full_tensor() is, "
                f"got a {type(value).__name__}"
            )
    if linear_weight.dim() != 2:
        raise ValueError(f"linear_weight must have shape (C, D), got {tuple(linear_weight.shape)}")
    if 0 in linear_weight.shape:
        raise ValueError(
            "linear_weight must have at least one class and one feature, "
            f"got {tuple(linear_weight.shape)}"
        )
    checks.linear_layer(linear_weight, linear_weight, linear_bias)
    assert linear_bias is None or isinstance(linear_bias, Tensor)
    given = [t for t in (linear_weight, linear_bias, input) if isinstance(t, Tensor)]
    dtype = widest(*(t.dtype for t in given if t.is_floating_point()))
    weight, bias = linear_weight.detach(), linear_bias
    return Layer(cast(weight, dtype), None if bias is None else cast(bias.detach(), dtype))


class Data:
    """All rows, to be gone over again and again.

    Args:
        input: x, (..., D), or batches of them: tensors, or tuples of such a tensor, its target
            and its row weights, of which the last ones may be left out.
        target: Of an input that is a tensor, as is the row weight.
        row_weight: (...).
        ignore_index: The class index that leaves its row out.
        layer: What the rows go through.
    """

    def __init__(
        self,
        input: Tensor | Batches,
        target: Tensor | None,
        row_weight: Tensor | None,
        ignore_index: int,
        layer: Layer,
    ) -> None:
        self.layer = layer
        self.options = NO_OPTIONS._replace(
            ignore_index=checks.integer("ignore_index", ignore_index)
        )
        self.number: int | None = None  # of rows, once they were gone over
        self.size = 0.0  # Σ |x| of these batches
        self.are_weighted = False  # whether some had a factor, once they were gone over
        self.may_be_negative = True  # the factors
        self.batches: Batches
        if isinstance(input, Tensor):
            self.batches = [self.rows(input, target, row_weight)]
            self.are_given = True
            return
        self.batches, self.are_given = input, False
        if not isinstance(input, Iterable):
            raise TypeError(
                f"input must be a tensor or an iterable of batches, got {type(input).__name__}"
            )
        if iter(input) is input:
            raise ValueError(
                "input must hold batches that can be gone over again, as a list or a DataLoader "
                f"does, got a {type(input).__name__}"
            )
        for name, value in (("target", target), ("row_weight", row_weight)):
            if value is not None:
                raise ValueError(f"{name} must come with each batch of the input, as (x, {name})")

    def __iter__(self) -> Iterator[Rows]:
        """The rows of each batch.

        Raises:
            ValueError: They are others than the time before.
        """
        number = 0
        sizes: list[Tensor] = []
        for batch in self.batches:
            rows = batch if self.are_given else self.rows(*_parts(batch))
            number += len(rows.x)
            if not self.are_given:
                sizes.append(rows.x.abs().sum(dtype=torch.float64))
            if rows.factor is not None:
                self.are_weighted = True
                if not self.may_be_negative and bool((rows.factor < 0).any()):
                    raise ValueError("hessian must have row weights of at least 0, got one below")
            yield rows
        if self.number not in (None, number):
            raise ValueError(
                "input must give the same rows each time, as one operator is a sum over them, "
                f"got {number} where there were {self.number}"
            )
        size = float(sum(sizes))
        if self.number is not None and abs(size - self.size) > _SAME * self.size:
            raise ValueError(
                "input must give the same rows each time, as one operator is a sum over them, got "
                "others: a DataLoader must not have both shuffle and drop_last"
            )
        self.number, self.size = number, size

    def rows(
        self, input: Tensor, target: Tensor | None = None, row_weight: Tensor | None = None
    ) -> Rows:
        """The rows of a batch, checked."""
        W, b = self.layer
        checks.linear_layer(input, W, b)
        if input.device != W.device:
            raise ValueError(
                f"input must be on the device of linear_weight, {W.device}, got {input.device}"
            )
        if widest(input.dtype, W.dtype) != W.dtype:
            raise TypeError(
                f"input must have batches of a dtype that {W.dtype} holds, as that of "
                f"linear_weight is, got {input.dtype}"
            )
        *shape, features = input.shape
        x = cast(input.detach(), W.dtype).reshape(-1, features)
        dtype = accumulation_dtype(W.dtype)
        terms = None
        if target is not None:
            checks.target(target, tuple(shape), (*shape, len(W)))
            may_ignore = checks.labels(target, len(W), self.options.ignore_index, wait=True)
            terms = fold(target.detach(), self.options, len(W), dtype, may_ignore=may_ignore)
        keep = None if terms is None else terms.keep
        factor = None if terms is None else terms.mass
        if row_weight is not None:
            checks.floating("row_weight", row_weight)
            checks.shape("row_weight", row_weight, tuple(shape), "as input without D")
            weight = row_weight.detach().flatten().to(dtype)
            factor = weight if factor is None else factor * weight
        if keep is not None:
            factor = keep.to(dtype) if factor is None else factor.masked_fill(~keep, 0)
        return Rows(x, keep, factor, len(x) if keep is None else int(keep.sum()))


def _parts(batch: Any) -> tuple[Any, ...]:
    """The input of a batch, its target and its row weights, as far as they are there."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 3:
        return tuple(batch)
    raise TypeError(
        "input must give batches that are tensors, or tuples of an input, a target and row "
        f"weights, got a {type(batch).__name__}"
    )
