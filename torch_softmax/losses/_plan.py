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
from ._many import hessians_along, slopes_along
from ._sweeps import OF_ROWS, How, Inputs, hessian_along, kept, numbers_and_gradients

# Masks of the inputs and of the factors s and t.
NO_INPUTS: Mask = (False,) * len(OF_ROWS)
OF_LAYER: Mask = Inputs(*NO_INPUTS)._replace(W=True, b=True)
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


class SecondOrderSweep(CrossEntropySweep):
    """How T's gradient changes. The derivatives of that are the plan's own."""

    def vjp(self, wanted: Mask, given: Mask) -> None:
        """None."""

    def jvp(self, moved: Mask) -> None:
        """None."""


class HessianSweep(SecondOrderSweep):
    """The change along a direction."""

    def run(self, *tensors: Any) -> tuple[Tensor, ...]:
        """The changes, of the shapes of what they are by."""
        inputs, factors, direction, of_factors = self.point(tensors)
        wanted = Inputs(*self.of_inputs)
        changes, slopes = hessian_along(inputs, factors, direction, of_factors, wanted, self.how)
        return select((*changes, *slopes), self.asked)

    def batch(self, batched: Mask) -> "HessiansSweep | None":
        """The same along many directions of W, or of W and b, if nothing else is batched."""
        directions = sum(self.moved)
        if (
            self.how.across is None
            and Inputs(*self.moved[:-2]).W
            and all(select((*OF_LAYER, *NEITHER), self.moved))
            and all(select((*OF_LAYER, *BOTH), self.asked))
            and not any(batched[:-directions])
            and all(batched[-directions:])
        ):
            return HessiansSweep(self.how, self.given, self.moved, self.asked)
        return None


class HessiansSweep(SecondOrderSweep):
    """The changes along many directions of W (M, K, D), and of b (M, K)."""

    def run(self, *tensors: Any) -> tuple[Tensor, ...]:
        """The changes (M, ...) of gradients, and the slopes (N, M)."""
        inputs, factors, directions, _ = self.point(tensors)
        wanted = Inputs(*self.of_inputs)
        of_numbers = self.asked[len(NO_INPUTS) :]
        results: tuple[Tensor, ...] = ()
        if any(wanted):
            changes = hessians_along(inputs, factors, directions, wanted, self.how)
            results = select(changes, self.of_inputs)
        if any(of_numbers):
            slopes = slopes_along(inputs, directions, self.how)
            results = (*results, *select(slopes, of_numbers))
        return results
