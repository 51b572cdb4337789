"""What the options of a loss mean: each is folded into a target distribution or a row's weight."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from .._transforms import is_batched, is_fake, is_moving, is_plain, unwrapped
from ._chunked import restored
from ._formulas import Target

REDUCTIONS = ("none", "mean", "sum")


class Options(NamedTuple):
    """The options of a loss, by the names that they have in `torch.nn.functional`."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    dtype: torch.dtype | None  # of logits, losses and sums; None for those of torch


NO_OPTIONS = Options(None, -100, "mean", 0.0, None)  # torch's defaults


class RowOptions(NamedTuple):
    """What rows count for."""

    weight: Tensor | None = None  # (...), which may require a gradient; None for 1
    divisor: Tensor | float | None = None  # of a mean; None for the weights of the targets


class LogitOptions(NamedTuple):
    """What is done with logits before their softmax, by the names that it has in the losses."""

    softcap: float = math.inf  # for no cap
    logit_scale: float = 1.0
    z_loss: float = 0.0


def options_of(
    weight: Tensor | None,
    ignore_index: object,
    reduction: str,
    label_smoothing: object,
    dtype: torch.dtype | None = None,
) -> Options:
    """The options of a loss, checked as far as no other argument is needed for that.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: It is out of range, or unknown.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    if weight is not None:
        checks.floating("weight", weight)
        if is_moving(weight):
            raise ValueError("weight must not require a gradient, for the loss gives it none")
    if dtype is not None:
        checks.floating_dtype("dtype", dtype)
    smoothing = checks.number("label_smoothing", label_smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    return Options(
        weight, checks.integer("ignore_index", ignore_index), reduction, smoothing, dtype
    )


def row_options_of(row_weight: object, count: object) -> RowOptions:
    """What rows count for, checked as far as no other argument is needed for that."""
    if row_weight is not None:
        checks.floating("row_weight", row_weight)
    assert row_weight is None or isinstance(row_weight, Tensor)
    if count is None:
        return RowOptions(row_weight, None)
    if isinstance(count, Tensor) and count.dim() == 0:
        if is_moving(count):
            raise ValueError("count must not require a gradient, for the loss gives it none")
        if count.is_complex():
            raise TypeError(f"count must be a real number, got {count.dtype}")
        return RowOptions(row_weight, count.detach())
    number = checks.number("count", count)
    checks.finite("count", number)
    return RowOptions(row_weight, number)


def logit_options_of(softcap: object, logit_scale: object, z_loss: object) -> LogitOptions:
    """What is done with logits, checked."""
    scale, penalty = checks.number("logit_scale", logit_scale), checks.number("z_loss", z_loss)
    if not abs(scale) < math.inf:  # nor for nan; a compiler may not know isfinite
        raise ValueError(f"logit_scale must be finite, got {scale}")
    checks.finite("z_loss", penalty)
    cap = math.inf
    if softcap is not None:
        cap = checks.number("softcap", softcap)
        checks.finite("softcap", cap, above_zero=True)
    return LogitOptions(cap, scale, penalty)


def check_classes(classes: int, weight: Tensor | None) -> None:
    """Raise unless there is a class, and a weight for each where there are any."""
    if classes == 0:
        raise ValueError("input must have at least one class, got none")
    if weight is not None:
        checks.shape("weight", weight, (classes,), "for one weight a class")


@dataclass(frozen=True)
class Counted:
    """Which rows count: those of an index, which are selected; or those of a mask.

    Only the numbers of a mask tell how many rows count. Compiled code, `vmap` over targets and a
    CUDA graph can't wait for that, and multiply all rows, of which the others are 0.
    """

    index: Tensor | None = None  # (n,) int64; None for all rows
    mask: Tensor | None = None  # (N,) bool, where the index can't be known

    @classmethod
    def of(cls, mask: Tensor | None) -> "Counted":
        """The rows of a mask (N,); on a GPU this waits for its numbers."""
        if mask is None:
            return cls()
        if not has_numbers(mask):
            return cls(mask=mask)
        index = unwrapped(mask.nonzero()).squeeze(1)
        return cls() if index.shape == mask.shape else cls(index)

    def number(self, count: int) -> Tensor | int:
        """How many of all rows count."""
        if self.mask is not None:
            return self.mask.sum()
        return count if self.index is None else self.index.shape[0]

    def read_zeros(self, rows: Tensor) -> Tensor:
        """All rows, 0 where a mask leaves one out, whatever it holds."""
        if self.mask is None:
            return rows
        return rows.masked_fill(~self.mask.view(rows.shape[0], *(1 for _ in rows.shape[1:])), 0)

    def read_others(self, rows: Tensor) -> Tensor:
        """All rows, the first that counts in place of each that a mask leaves out; 0 if none is."""
        assert self.mask is not None
        every = torch.arange(rows.shape[0], device=rows.device)
        first = self.mask.int().argmax()
        return rows[torch.where(self.mask, every, first)].masked_fill(~self.mask.any(), 0)

    def select(self, values: Tensor) -> Tensor:
        """The values of the rows that count, where their index is known."""
        return values if self.index is None else values[self.index]

    def restore(self, values: Tensor, count: int) -> Tensor:
        """Selected values among 0 for each row that is left out, (N, ...)."""
        return restored(self.read_zeros(values), self.index, count)


def has_numbers(mask: Tensor) -> bool:
    """Whether the numbers of a mask can be looked at."""
    if torch.compiler.is_compiling() or mask.is_meta or not is_plain(mask) or is_fake(mask):
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not is_batched(mask)


class Terms(NamedTuple):
    """What the loss of each row is made from, with every option folded in."""

    y: Target
    mass: Tensor | None  # (N,), Σ_k y_k; None for 1
    keep: Tensor | None  # (N,) bool, False where the target is ignored; None where none can be
    divisor: Tensor | int  # what a mean divides by: the weight of all targets
    mean_of_no_rows: float = math.nan
    factor: Tensor | None = None  # (N,), what the loss of a row is multiplied with; None for 1

    def with_rows(self, rows: RowOptions, dtype: torch.dtype) -> "Terms":
        """The terms with what rows count for; a weight of 0 that gets no gradient leaves out."""
        terms = self
        if rows.weight is not None:
            factor = rows.weight.flatten()
            if not is_moving(factor):
                counts = factor != 0
                terms = terms._replace(keep=counts if self.keep is None else counts & self.keep)
            terms = terms._replace(factor=factor.to(dtype))
        if rows.divisor is not None:
            count = torch.as_tensor(rows.divisor, dtype=dtype, device=self.y.target.device)
            terms = terms._replace(divisor=count, mean_of_no_rows=0.0)
        return terms


def fold(
    target: Tensor, options: Options, classes: int, dtype: torch.dtype, *, may_ignore: bool
) -> Terms:
    """Fold the options of a loss, checked before, into its terms.

    Args:
        target: Class indices (...), or probabilities (..., K), of N rows.
        options: Those of the loss.
        classes: K.
        dtype: That of the work.
        may_ignore: Whether a class index may be `options.ignore_index`.
    """
    weight = None if options.weight is None else options.weight.to(dtype)
    if target.is_floating_point():
        p = target.reshape(math.prod(target.shape[:-1]), target.shape[-1])
        return _of_probabilities(p, weight, options.label_smoothing, classes, dtype)
    label = target.reshape(math.prod(target.shape)).long()
    keep = label != options.ignore_index if may_ignore else None
    if keep is not None:
        label = label.masked_fill(~keep, 0)
    return _of_labels(label, keep, weight, options.label_smoothing, classes, dtype)


def _of_probabilities(
    p: Tensor, weight: Tensor | None, smoothing: float, classes: int, dtype: torch.dtype
) -> Terms:
    """Terms of y = (1 − ε) w ∘ p + ε w / K. A mean divides by their number."""
    count, columns = p.shape  # which are not all classes, where these are spread
    scale, floor = weight, None
    if smoothing:
        ones = torch.ones(columns, dtype=dtype, device=p.device)
        floor = (ones if weight is None else weight) * (smoothing / classes)
        scale = (ones if weight is None else weight) * (1 - smoothing)
    mass = p.sum(1, dtype=dtype) if scale is None else p.to(dtype) @ scale
    if floor is not None:
        mass = mass + floor.sum()
    return Terms(Target(p, None, scale, floor), mass, None, count)


def _of_labels(
    label: Tensor,
    keep: Tensor | None,
    weight: Tensor | None,
    smoothing: float,
    classes: int,
    dtype: torch.dtype,
) -> Terms:
    """Terms of y = (1 − ε) w at the label + ε w / K. A mean divides by the w of all labels."""
    hot = mass = None if weight is None else weight[label]
    divisor = label.shape[0] if keep is None else keep.sum(dtype=dtype)
    if hot is not None:
        divisor = (hot if keep is None else hot * keep).sum()
    floor = None
    if smoothing:
        ones = torch.ones(classes, dtype=dtype, device=label.device)
        floor = (ones if weight is None else weight) * (smoothing / classes)
        hot = (torch.ones_like(label, dtype=dtype) if hot is None else hot) * (1 - smoothing)
        mass = None if weight is None else hot + floor.sum()
    return Terms(Target(label, hot, None, floor), mass, keep, divisor)
