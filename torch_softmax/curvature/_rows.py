"""The layer that a Hessian is of, and the rows that it is a sum over, with what each counts."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks
from .._transforms import is_plain
from ..losses._dtypes import accumulation_dtype, cast, widest
from ..losses._targets import NO_OPTIONS, fold
from ..optim._hessian import Batch, Layer
from ..optim._rows import Rows

Batches = Iterable[Any]

# How far the order of its terms may change a sum in float64, in parts of the sum of their sizes.
_SAME = 1e-8


def layer_of(linear_weight: object, linear_bias: object, input: object) -> Layer:
    """A checked layer, in the dtype that it promotes to with an input, if that is a tensor."""
    checks.floating("linear_weight", linear_weight)
    assert isinstance(linear_weight, Tensor)
    named = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    given = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    for name, value in given.items():
        if not is_plain(value):
            raise NotImplementedError(
                f"{name} must be whole in this process, as its full_tensor() is, "
                f"got a {type(value).__name__}"
            )
    if linear_weight.dim() != 2 or 0 in linear_weight.shape:
        raise ValueError(
            "linear_weight must have shape (C, D), with at least one class and one feature, "
            f"got {tuple(linear_weight.shape)}"
        )
    checks.linear_layer(linear_weight, linear_weight, linear_bias)
    dtype = widest(*(t.dtype for t in given.values() if t.is_floating_point()))
    return Layer(linear_weight, given.get("linear_bias")).map(lambda t: cast(t.detach(), dtype))


class Data:
    """All rows that count, to be gone over again and again.

    Args:
        input: x, (..., D), or batches of them: tensors, or tuples of such a tensor, its target
            and its row weights, of which the last ones may be left out.
        target: The target of an input that is a tensor.
        row_weight: The row weights of an input that is a tensor, (...).
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
        index = checks.integer("ignore_index", ignore_index)
        self.layer, self.options = layer, NO_OPTIONS._replace(ignore_index=index)
        self.number = 0  # of rows that count, in the last pass
        # Whether a factor is below 0, in the last pass; None where no row has one.
        self.has_negative: Tensor | None = None
        self.sums: Tensor | None = None  # what the batches of the first pass are known by
        self.are_given = isinstance(input, Tensor)
        self.batches: Batches = input
        if isinstance(input, Tensor):
            self.batches = [self.batch(input, target, row_weight)]
            return
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

    def __iter__(self) -> Iterator[Batch]:
        """The rows of each batch.

        Raises:
            ValueError: What enters the sum over all rows is not what it was in the first pass.
        """
        self.number, self.has_negative = 0, None
        sums = torch.zeros(2, 4, dtype=torch.float64)
        for given in self.batches:
            batch = given if self.are_given else self.batch(*_parts(given))
            self.number += len(batch.rows)
            if batch.factor is not None:
                here = ~(batch.factor >= 0).all()
                self.has_negative = here if self.has_negative is None else self.has_negative | here
            if not self.are_given:
                sums += _sums(batch)
            yield batch
        if self.are_given:
            return
        self.sums = sums if self.sums is None else self.sums
        (change, _), (_, sizes) = (sums - self.sums).abs(), sums
        if not bool((change <= _SAME * sizes).all()):
            raise ValueError(
                "input must give the same rows each time, with the same targets and row weights, "
                "as one operator is a sum over them, got others: a DataLoader must draw nothing "
                "but their order at random, and not have both shuffle and drop_last"
            )

    def batch(
        self, input: Tensor, target: Tensor | None = None, row_weight: Tensor | None = None
    ) -> Batch:
        """The rows of a batch that count, checked."""
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
        rows = Rows(input.detach().reshape(-1, features)).to(W.device, W.dtype)
        dtype, factor, keep = accumulation_dtype(W.dtype), None, None
        if target is not None:
            checks.target(target, tuple(shape), (*shape, len(W)))
            may_ignore = checks.labels(target, len(W), self.options.ignore_index, wait=True)
            terms = fold(target.detach(), self.options, len(W), dtype, may_ignore=may_ignore)
            factor, keep = terms.mass, terms.keep
        if row_weight is not None:
            checks.floating("row_weight", row_weight)
            checks.shape("row_weight", row_weight, tuple(shape), "as input without D")
            weight = row_weight.detach().flatten().to(dtype)
            factor = weight if factor is None else factor * weight
        if keep is not None:
            rows, factor = rows.take(keep), None if factor is None else factor[keep]
        return Batch(rows, factor)


def _sums(batch: Batch) -> Tensor:
    """What a batch is known by: sums over its rows, and the sums of the sizes of their terms.

    A row x that counts r adds 1, r, r s and r s², with the sine s of x along a fixed direction.
    Other rows, or other weights, have the same sums only by chance.
    """
    x = batch.rows.read(slice(0, len(batch.rows))).double()
    # A direction of whole numbers or of few digits would give chances: this one has many digits.
    direction = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device).sqrt().sin()
    s = (x @ direction).sin()
    r = torch.ones_like(s) if batch.factor is None else batch.factor.double()
    terms = torch.stack([torch.ones_like(r), r, r * s, r * s.square()])
    return torch.stack([terms.sum(1), terms.abs().sum(1)]).cpu()


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
