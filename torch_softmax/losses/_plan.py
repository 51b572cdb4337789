"""Cross-entropy as a plan, the definition of all its derivatives, with the sweeps hooked in."""

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from . import _formulas as formulas
from ._autograd import Mask, merge, select
from ._chunked import Plan
from ._formulas import Factors, Numbers
from ._sweeps import OF_ROWS, How, Inputs, hessian_along, kept, numbers_and_gradients

# Masks of the inputs and of the factors s and t.
NO_INPUTS: Mask = (False,) * len(OF_ROWS)
BOTH, NEITHER = (True, True), (False, False)


def row_numbers(inputs: Inputs, how: How) -> Numbers:
    """The numbers of each row: the definition, for all rows at once."""
    z = kept(inputs)
    if inputs.W is not None:
        b = None if inputs.b is None else inputs.b.to(how.logits_dtype)
        z = linear(z.to(how.logits_dtype), inputs.W.to(how.logits_dtype), b)
    return formulas.row_numbers(z.to(how.dtype), inputs.y)


@functools.lru_cache(maxsize=32)
def plan_of(how: How) -> Plan:
    """The plan of the numbers of each row, a function of `Inputs`."""

    def fn(*inputs: Any) -> Numbers:
        if how.across is not None:
            raise NotImplementedError(
                "a third derivative, which torch.autograd.functional.hvp takes and vhp does not, "
                "needs all classes in one process, got a linear_weight that is sharded"
            )
        return row_numbers(Inputs(*inputs), how)

    return Plan(fn, tuple(OF_ROWS), BOTH, how.step, NumbersSweep(how))


# The same as sweeps of the plan.


@dataclass(frozen=True)
class CrossEntropySweep:
    """What a sweep is about. A mask is one of the inputs, followed by one of the factors s and t.

    Args:
        how: How the logits are worked out.
        given: Which of the factors are given, after the inputs; the others are 0.
        moved: Along which of inputs and factors a direction is given, after these.
        asked: The derivatives by which of inputs and factors are the results.
    """

    how: How
    given: Mask = NEITHER
    moved: Mask = (*NO_INPUTS, *NEITHER)
    asked: Mask = (*NO_INPUTS, *NEITHER)

    @property
    def of_inputs(self) -> Mask:
        """The derivatives by which of the inputs are asked for."""
        return self.asked[: len(NO_INPUTS)]

    def point(self, tensors: tuple[Any, ...]) -> tuple[Inputs, Factors, Inputs, Factors]:
        """The inputs, their factors, and the direction of each."""
        values = iter(tensors)
        inputs = Inputs(*(next(values) for _ in Inputs._fields))

        def zeros() -> Tensor:
            like: Tensor = inputs.x
            return like.new_zeros(like.shape[0], dtype=self.how.dtype)

        factors = Factors(*(next(values) if given else zeros() for given in self.given))
        direction = [next(values) if moved else None for moved in self.moved]
        return inputs, factors, Inputs(*direction[:-2]), Factors(*direction[-2:])


@dataclass(frozen=True)
class NumbersSweep(CrossEntropySweep):
    """log_sum and gap."""

    asked: Mask = (*NO_INPUTS, *BOTH)

    def run(self, *tensors: Any) -> tuple[Tensor, ...]:
        """Both, (N,)."""
        nothing = Inputs(*NO_INPUTS)
        numbers, _ = numbers_and_gradients(Inputs(*tensors), Factors(), nothing, self.how)
        assert numbers is not None
        return numbers

    def vjp(self, wanted: Mask, given: Mask) -> "GradientSweep":
        """The gradient of T, for the factors that are the cotangents."""
        return GradientSweep(self.how, given, asked=(*wanted, *NEITHER))

    def jvp(self, moved: Mask) -> "HessianSweep":
        """The slopes of both, which are second derivatives of T: it is linear in its factors."""
        return HessianSweep(self.how, NEITHER, (*moved, *NEITHER), (*NO_INPUTS, *BOTH))


class GradientSweep(CrossEntropySweep):
    """The gradient of T by some of the inputs."""

    def run(self, *tensors: Any) -> tuple[Tensor, ...]:
        """The gradients, of the shapes of what they are by."""
        inputs, factors, _, _ = self.point(tensors)
        wanted = self.of_inputs
        _, gradients = numbers_and_gradients(
            inputs, factors, Inputs(*wanted), self.how, numbers_too=False
        )
        return select(gradients, wanted)

    def vjp(self, wanted: Mask, given: Mask) -> "HessianSweep":
        """The Hessian of T along the cotangents of the gradients."""
        moved = merge(self.asked, self.asked, given)
        return HessianSweep(self.how, self.given, moved, self._of_all(wanted))

    def jvp(self, moved: Mask) -> "HessianSweep":
        """The same along tangents: the Hessian is symmetric."""
        return HessianSweep(self.how, self.given, self._of_all(moved), self.asked)

    def _of_all(self, mask: Mask) -> Mask:
        """A mask of the inputs and the factors that are given, as one of inputs and factors."""
        return merge((*NO_INPUTS, *NEITHER), (*(True for _ in NO_INPUTS), *self.given), mask)


class HessianSweep(CrossEntropySweep):
    """The change of T's gradient along a direction. Its own derivatives are those of the plan."""

    def run(self, *tensors: Any) -> tuple[Tensor, ...]:
        """The changes, of the shapes of what they are by."""
        inputs, factors, direction, of_factors = self.point(tensors)
        wanted = Inputs(*self.of_inputs)
        changes, slopes = hessian_along(inputs, factors, direction, of_factors, wanted, self.how)
        return select((*changes, *slopes), self.asked)

    def vjp(self, wanted: Mask, given: Mask) -> None:
        """None."""

    def jvp(self, moved: Mask) -> None:
        """None."""
