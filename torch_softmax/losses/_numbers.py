"""The numbers of a row as a row function, of logits that are scaled and capped first.

    z' = c tanh(a z / c)  for a scale a and a cap c,  with  d = ∂z'/∂z = a (1 − tanh²(a z / c))

With the gradient g of T by z' and its change h, both of `_formulas`, the gradient by z is d ∘ g.
Along u it changes by d ∘ h − 2a/c tanh(a z / c) ∘ d ∘ u ∘ g.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _formulas as formulas
from ._autograd import Mask, select
from ._formulas import Across, Along, Numbers, Row, Target
from ._operators import named_in_operators
from ._rows import Parts, RowFunction


class Changed(NamedTuple):
    """Logits z' with what their derivative by z is made from."""

    z: Tensor  # z', (n, K)
    tanh: Tensor | None  # None where there is no cap
    scale: float
    cap: float

    def times_slope(self, value: Tensor) -> Tensor:
        """A gradient by z' or a change of z, (n, ..., K), times d; it may be written to."""
        if self.tanh is not None:
            tanh = self.tanh if value.dim() == 2 else self.tanh.unsqueeze(1)
            value = torch.ops.aten.tanh_backward(value, tanh)
        return value if self.scale == 1 else value * self.scale

    def bend(self, gradient: Tensor, moved: Tensor) -> Tensor:
        """How d ∘ g changes by d alone, for a gradient g by z' and a change d ∘ u of z'."""
        assert self.tanh is not None
        return (-2 * self.scale / self.cap) * (self.tanh * gradient).unsqueeze(1) * moved


def changed(z: Tensor, cap: float, scale: float, *, out: Tensor | None = None) -> Changed:
    """The logits z' that z become, first scaled and then capped.

    They may be written over z itself: fresh memory costs more than the arithmetic.
    """
    if cap == math.inf:
        return Changed(z if scale == 1 else torch.mul(z, scale, out=out), None, scale, cap)
    tanh = torch.tanh(torch.mul(z, scale / cap, out=out), out=out)
    return Changed(tanh * cap, tanh, scale, cap)


@named_in_operators
@dataclass(frozen=True)
class RowNumbers(RowFunction):
    """The numbers of each row, those of `Numbers` that are asked for.

    Beside the logits it takes the fields of a `Target`.

    Args:
        asked: The names of the numbers.
        softcap: c; infinity for no cap.
        logit_scale: a.
        across: How the numbers are combined where the classes are sharded, or None.
    """

    has_second = True
    rows_in = (True, True, False, False)  # of the fields of a target

    asked: tuple[str, ...] = ("log_sum", "gap")
    softcap: float = math.inf
    logit_scale: float = 1.0
    across: Across | None = None

    @property
    def results(self) -> int:
        return len(self.asked)

    def __call__(self, logits: tuple[Tensor, ...], others: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The numbers (n,) by their definition."""
        (z,) = logits
        z, *_ = changed(z, self.softcap, self.logit_scale)
        return self._asked(formulas.row_numbers(z, Target(*others)))

    def first(self, at: Parts, needed: Parts) -> Parts:
        """The numbers and ∂T/∂z and ∂T/∂p by hand."""
        change, row = self._known(at, in_place=True)
        factors = self._numbers(at.results)
        numbers = self._asked(row) if all(needed.results) else ()
        by_p, *_ = needed.others
        by_target = row.target_gradient(factors.gap) if by_p else None
        by_z = None
        if any(needed.logits):
            by_z = change.times_slope(row.gradient(factors, in_place=True))
        return Parts((by_z,), (by_target, None, None, None), numbers)

    def point(self, at: Parts) -> tuple[Changed, Row]:
        """The logits and their row."""
        return self._known(at, in_place=False)

    def second(self, point: tuple[Changed, Row], at: Parts, along: Parts, needed: Mask) -> Parts:
        """The changes by hand."""
        change, row = point
        (u,) = along.logits
        dp, *_ = along.others
        moved = change.times_slope(u)
        factors = self._numbers(at.results)
        direction = Along(moved, dp, self._numbers(along.results))
        second = formulas.second_order(row, factors, direction, select(self.asked, needed))
        by_z = change.times_slope(second.z)
        if change.tanh is not None:
            by_z = by_z + change.bend(row.gradient(factors), moved)
        return Parts(
            (by_z,), (second.p, None, None, None), select(self._asked(second.numbers), needed)
        )

    def gradient(self, point: tuple[Changed, Row], at: Parts) -> tuple[Tensor, ...]:
        """∂T/∂z."""
        change, row = point
        return (change.times_slope(row.gradient(self._numbers(at.results))),)

    def told(self) -> tuple[list[str], list[float]]:
        """The names of the numbers, cap and scale."""
        return list(self.asked), [self.softcap, self.logit_scale]

    @classmethod
    def from_told(cls, words: list[str], numbers: list[float]) -> "RowNumbers":
        """The function of these names, cap and scale."""
        softcap, logit_scale = numbers
        return RowNumbers(tuple(words), softcap, logit_scale)

    def _known(self, at: Parts, *, in_place: bool) -> tuple[Changed, Row]:
        (z,) = at.logits
        change = changed(z, self.softcap, self.logit_scale, out=z if in_place else None)
        return change, Row(change.z, Target(*at.others), self.across)

    def _numbers(self, values: tuple[Any, ...]) -> Numbers:
        """A value for each of the numbers, 0 for one that is not asked for."""
        return Numbers(**dict(zip(self.asked, values, strict=True)))

    def _asked(self, numbers: Numbers | Row) -> tuple[Any, ...]:
        return tuple(getattr(numbers, name) for name in self.asked)
