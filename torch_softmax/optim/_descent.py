"""Newton's method on an objective, and what one step or one penalty leaves to the next."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._conjugate_gradients import Accuracy, Known, Preconditioner, dot, solve
from ._hessian import Moments
from ._objective import Line, Objective, Point

# A linear system is solved until its residual is this part of what it was.
_FORCING = 0.25
_MAX_HALVINGS = 40  # of a step
_ROUNDING = 1e-4  # the part of a value that rounding may hide, at most
# A matrix of second moments takes the arithmetic of D / 2K products, in a third of their time. It
# is worth that where it saves a third of more products.
_WORTH = 0.25
_STALLED = 4  # steps in a row without a gain that rounding would not hide
_FEW = 10  # products of a system that needs no better matrix


class Result(NamedTuple):
    """How far `minimize` has come.

    Args:
        objective: f, the mean loss with the penalty.
        loss: The mean loss alone.
        gradient_norm: ‖∇f‖₂, over weight and bias together.
        steps: The Newton steps done.
        products: The Hessian-vector products done.
        converged: Whether gradient_norm is at most the tolerance.
        reachable: The gradient norm that rounding has left, where that is what ended it above the
            tolerance; otherwise 0.
    """

    objective: float
    loss: float
    gradient_norm: float
    steps: int
    products: int
    converged: bool
    reachable: float = 0.0


class Goal(NamedTuple):
    """When to stop."""

    gradient: float  # ‖∇f‖₂ to reach
    weight: float | None  # ‖W − W*‖ to reach, in parts of ‖W‖
    max_steps: int


class Descent:
    """Newton's method, step by step, from a point of an objective on.

    Where the rounding of float32 products hides the descent, values and gradients are computed in
    float64 from there: they say where the optimum is, and the Hessian only how to get there. This
    is iterative refinement. It costs four wide products a step or more, beside the tens of products
    of the linear system: two for the new point, and two for that point as the parameters keep it.
    """

    def __init__(self, objective: Objective, v: Tensor) -> None:
        self.objective = self.judge = objective  # the judge has values and gradients, the wide ones
        point = objective.at(v - v.mean(0))  # without what all classes have in common
        if math.isnan(point.value):
            raise ValueError(
                "model, input and target must hold finite numbers of a moderate size, "
                f"got a loss of {point.value} at the start"
            )
        zero = objective.at(torch.zeros_like(v)) if bool(point.v.any()) else point
        self.point = zero if zero.value < point.value else point
        self.size = zero.norm  # which tells how large the terms of a gradient are
        self.moments: Moments | None = None
        self.known: Known | None = None
        self.before: tuple[float, Tensor] | None = None  # another λ, and the optimum there
        self.products = 0  # of the last system

    def change_decay(self, weight_decay: float) -> None:
        """Go on with another λ, from the point reached or from where the path seems to lead.

        Between some penalties, v goes about straight on with log λ.
        """
        here, decay = self.point, self.objective.weight_decay
        if weight_decay == decay:
            return
        self.point = self.judge.with_decay(weight_decay).with_penalty(here, self.judge)
        self.objective, self.judge = (
            f.with_decay(weight_decay) for f in (self.objective, self.judge)
        )
        if self.before is not None and min(decay, self.before[0]) > 0:
            step, step_before = weight_decay / decay, decay / self.before[0]
            if min(step, step_before) > 0:  # which may be too small for a number
                length = math.log(step) / math.log(step_before)
                ahead = self.judge.at(here.v + length * (here.v - self.before[1]))
                self.point = min(self.point, ahead, key=lambda point: point.value)
        self.before = decay, here.v

    def run(self, goal: Goal, report: Callable[[Result, Tensor], None]) -> Result:
        """Go to the optimum; the start and every point on the way are reported."""
        result = best = self._result(0, 0, goal)
        report(result, self.point.v)
        stalled = 0
        while not result.converged and result.steps < goal.max_steps:
            products = self._step(goal)
            if products is not None:
                result = self._result(result.steps + 1, result.products + products, goal)
                report(result, self.point.v)
                fell = best.objective - result.objective > 4 * self._epsilon() * best.objective
                if fell or result.gradient_norm < best.gradient_norm / 2:
                    best, stalled = result, 0
                else:
                    stalled += 1
            if result.converged:
                break
            is_wide = self.judge.x.dtype == self.judge.sums
            lost = products is None or result.gradient_norm <= self._hidden()
            if not lost and stalled < (_STALLED if is_wide else 1):
                continue
            if is_wide:
                result = result._replace(reachable=result.gradient_norm)
                break
            self.judge = self.objective.wide()
            self.point = self.judge.at(self.point.v)
            result, stalled = self._result(result.steps, result.products, goal), 0
            best = result
        return self._rounded(result, goal)

    def _epsilon(self) -> float:
        """The rounding of values and gradients."""
        return torch.finfo(self.judge.x.dtype).eps

    def _hidden(self) -> float:
        """The gradient norm that rounding hides, be it of products or of the parameters."""
        of_products = self._epsilon() * self.size
        if self.judge.x.dtype == self.objective.x.dtype:
            return of_products
        kept = self.judge.at(self.objective.rounded(self.point.v))
        return max(of_products, float((kept.gradient - self.point.gradient).norm()))

    def _rounded(self, result: Result, goal: Goal) -> Result:
        """The result of the parameters as a model keeps them, in the dtype of the products."""
        v = self.objective.rounded(self.point.v)
        if torch.equal(v, self.point.v):
            return result
        point = self.judge.at(v)
        converged = result.converged and point.norm <= self._enough(goal)
        stopped = result.converged or result.reachable > 0
        return result._replace(
            objective=point.value,
            loss=point.loss,
            gradient_norm=point.norm,
            converged=converged,
            reachable=point.norm if stopped and not converged else 0.0,
        )

    def _step(self, goal: Goal) -> int | None:
        """Take a step, and count the products; None where nothing descends."""
        moments, objective = self._moments(), self.objective
        hessian = objective.hessian(self.point)
        features, classes = len(moments.second), len(self.point.v)
        curvature = hessian.mean_curvature()
        # Where all softmaxes are one-hot, no example has any weight.
        if self.products > max(_FEW, _WORTH * features / classes) and curvature > 0:
            weighted = objective.moments(hessian.curvature)
            if bool(weighted.second.isfinite().all()):
                self.moments = moments = weighted
        precondition = Preconditioner(moments, curvature, objective.weight_decay, self.known)
        # The last system is solved no further than the tolerance asks for.
        accuracy = Accuracy(_FORCING, 0.8 * self._enough(goal))
        u, self.known, products = solve(hessian, self.point.gradient, precondition, accuracy)
        self.products = products
        # No product sees what all classes have in common, which rounding lets grow.
        descended = descend(self.judge, self.point, u - u.mean(0))
        if descended is None:
            return None
        self.point = descended
        return products

    def _moments(self) -> Moments:
        """The moments of the examples, by whose mean the objective is centred once it is known."""
        if self.moments is None:
            self.moments = self.objective.moments()
            if not bool(self.moments.second.isfinite().all()):
                x, largest = self.objective.x, self.objective.largest()
                raise ValueError(
                    f"input must hold numbers whose squares are finite in {x.dtype}, "
                    f"got one of {largest:.3g}"
                )
            centred = self.objective.about_mean(self.moments)
            if centred is not self.objective:
                self.objective = self.judge = centred
                self.point = centred.at(self.point.v)
        return self.moments

    def _enough(self, goal: Goal) -> float:
        """The gradient norm to reach.

        f is λ-strongly convex in W, so that ‖W − W*‖ ≤ ‖∇f‖ / λ.
        """
        if goal.weight is None:
            return goal.gradient
        if self.objective.weight_decay == 0:
            return goal.gradient * goal.weight
        W, _ = self.objective.split(self.point.v)
        near = goal.weight * self.objective.weight_decay * float(W.norm())
        return min(goal.gradient, near)

    def _result(self, steps: int, products: int, goal: Goal) -> Result:
        point = self.point
        converged = point.norm <= self._enough(goal)
        return Result(point.value, point.loss, point.norm, steps, products, converged)


def descend(objective: Objective, point: Point, u: Tensor) -> Point | None:
    """The first point below v, of v + u, v + u/2, v + u/4, ...; None where there is none.

    It is below by Armijo's condition, f(v + α u) ≤ f(v) + 10⁻⁴ α ∇f(v)·u. Or the slope along u is
    not yet positive there: then a convex f has fallen all the way, even if rounding hides it.
    """
    slope = dot(point.gradient, u)
    if not slope < 0:
        return None
    line = Line(objective, point, u)
    for halvings in range(_MAX_HALVINGS):
        length = 0.5**halvings
        value = line.value(length)
        if value <= point.value + 1e-4 * length * slope:
            return line.to(length)
        # Where f is higher, and be it by more than rounding, its slope is positive.
        if value <= point.value + _ROUNDING * abs(point.value):
            trial = line.to(length)
            if dot(trial.gradient, u) <= 0:
                return trial
    return None
