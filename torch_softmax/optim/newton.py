"""Newton's method for softmax regression with an L2 penalty: steps by conjugate gradients."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ..losses._dtypes import outside_autocast
from ..losses._objective import IGNORED, Objective, Point
from ..modules import SoftmaxRegression
from ._conjugate_gradients import Accuracy, Preconditioner, dot, solve

__all__ = ["Result", "minimize"]

# A linear system is solved until its residual is this part of what it was.
_FORCING = 0.25
_MAX_HALVINGS = 40  # of a step


class Result(NamedTuple):
    """How far `minimize` has come.

    Args:
        objective: f, the mean loss with the penalty.
        loss: The mean loss alone.
        gradient_norm: ‖∇f‖₂, over weight and bias together.
        steps: The Newton steps done.
        products: The Hessian-vector products done.
        converged: Whether gradient_norm is at most the tolerance.
    """

    objective: float
    loss: float
    gradient_norm: float
    steps: int
    products: int
    converged: bool


@torch.no_grad()
def minimize(
    model: SoftmaxRegression,
    input: Tensor,
    target: Tensor,
    weight_decay: float,
    *,
    tolerance: float = 1e-4,
    max_steps: int = 100,
    report: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Bring a model to the least mean loss with an L2 penalty on its weight, in place.

    f(W, b) = 1/N Σ_n L_n + λ/2 ‖W‖². A step of v = (W, b) is v ← v + α u with ∇²f(v) u ≈ −∇f(v).

    f is convex and every step descends. Where f is less at v = 0 than at the model given, whose
    softmax may be one-hot and without any curvature, that is where it starts. So the start matters
    little. What all classes have in common in W and b changes no probability, and is taken off at
    first. Neither the units of the features nor where they lie make a difference to the steps.

    Args:
        model: With float32 or float64 parameters of its own, which are updated after every step.
        input: x, all examples, (..., D) of the model's dtype.
        target: Class indices (...), of which -100 leaves its example out; or probabilities
            (..., K).
        weight_decay: λ, at least 0, of the weight alone. It is 1 / (C N) for the C of
            scikit-learn's `LogisticRegression`, and 2 / (C N) for two classes: it has one vector
            for these, W₁ − W₀, which is twice as long as ours are.
        tolerance: The gradient norm to reach.
        max_steps: The Newton steps to give up after.
        report: Is called with the result so far after every step, once the model is updated.

    Returns:
        The result. Where `converged` is False, max_steps were done or rounding hid any further
        descent, and the model is at the last point reached. On the way it takes memory for N K
        softmax outputs, for some matrices (D + 1, D + 1), and for some hundred times the model.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes don't fit, a number is out of range, no example is left, the model's
            weight is computed from others (as by `weight_norm`) or on 'meta', the loss is not
            finite at the start, or the squares of the input are not.

    Example:
        >>> input = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> model = SoftmaxRegression(1, 2)
        >>> result = minimize(model, input, torch.tensor([0, 1, 0, 1]), weight_decay=0.01)
        >>> result.converged, round(result.objective, 4)
        (True, 0.5889)

    Source: Nocedal and Wright, Numerical Optimization (2006), algorithm 7.1; Dembo, Eisenstat and
    Steihaug, Inexact Newton methods (1982).
    """
    checks.finite("weight_decay", weight_decay)
    checks.finite("tolerance", tolerance, above_zero=True)
    checks.positive("max_steps", max_steps)
    _check_model(model)
    x, y = _examples(model, input, target)
    with outside_autocast(x):
        objective = Objective(x, y, weight_decay, model.bias is not None)
        point = _start(model, objective)
        _update(model, point.v)
        result = _result(point, 0, 0, tolerance)
        if result.converged:
            return result

        moments, known = objective.moments(), None
        if not bool(moments.second.isfinite().all()):
            raise ValueError(
                f"input must hold numbers whose squares are finite in {x.dtype}, "
                f"got one of {float(x.abs().max()):.3g}"
            )
        for step in range(1, max_steps + 1):
            hessian = objective.hessian(point.v)
            precondition = Preconditioner(moments, hessian.mean_curvature(), weight_decay, known)
            # The last system is solved no further than the tolerance asks for.
            accuracy = Accuracy(_FORCING, 0.8 * tolerance)
            u, known, products = solve(hessian, point.gradient, precondition, accuracy)
            descended = _descend(objective, point, u)
            if descended is None:
                break
            point = descended
            _update(model, point.v)
            result = _result(point, step, result.products + products, tolerance)
            report(result)
            if result.converged:
                break
    return result


def _check_model(model: SoftmaxRegression) -> None:
    """Raise unless a model's parameters can be updated in place."""
    if not isinstance(model, SoftmaxRegression):
        raise TypeError(f"model must be a SoftmaxRegression, got {type(model).__name__}")
    own = dict(model.named_parameters(recurse=False))
    for name in ("weight", "bias"):
        value = getattr(model, name)
        if value is not None and name not in own:
            raise ValueError(
                f"model must hold its {name} as a parameter, got one that is computed from others"
            )
    if model.weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"model must have float32 or float64 parameters, got {model.weight.dtype}")
    if model.weight.is_meta:
        raise ValueError("model must be on a device that holds numbers, got 'meta'")


def _start(model: SoftmaxRegression, objective: Objective) -> Point:
    """The model, without what all classes have in common, or v = 0 where f is less there."""
    v = _parameters(model)
    point = objective.at(v - v.mean(0))
    if math.isnan(point.value):
        raise ValueError(
            "model, input and target must hold finite numbers of a moderate size, "
            f"got a loss of {point.value} at the start"
        )
    if not bool(point.v.any()):
        return point
    zero = objective.at(torch.zeros_like(v))
    return zero if zero.value < point.value else point


def _result(point: Point, steps: int, products: int, tolerance: float) -> Result:
    norm = point.norm
    return Result(point.value, point.loss, norm, steps, products, norm <= tolerance)


def _examples(model: SoftmaxRegression, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The examples that are not left out, checked: x (N, D) and class indices or probabilities."""
    dtype, classes = model.weight.dtype, model.num_classes
    checks.linear_layer(input, model.weight, model.bias)
    if input.device != model.weight.device:
        raise ValueError(
            f"input must be on the device of the model, {model.weight.device}, got {input.device}"
        )
    if input.dtype != dtype:
        raise TypeError(f"input must have the dtype of the model, {dtype}, got {input.dtype}")
    checks.target(target, tuple(input.shape[:-1]), (*input.shape[:-1], classes))
    x = input.reshape(-1, input.shape[-1]).contiguous()
    if target.is_floating_point():
        y = target.reshape(-1, classes)
        if bool((y < 0).any()):
            raise ValueError("target must hold class probabilities of at least 0, got one below")
    else:
        y = target.reshape(-1).long()
        checks.labels(y, classes, IGNORED)
        keep = y != IGNORED
        if not bool(keep.all()):
            x, y = x[keep], y[keep]
    if len(x) == 0:
        raise ValueError("input must hold at least one example that is not left out, got none")
    return x, y


def _parameters(model: SoftmaxRegression) -> Tensor:
    """A copy of (W, b), (K, P)."""
    if model.bias is None:
        return model.weight.clone()
    return torch.cat([model.weight, model.bias.unsqueeze(1)], 1)


def _update(model: SoftmaxRegression, v: Tensor) -> None:
    """Write (W, b) into a model."""
    model.weight.copy_(v[:, : model.in_features])
    if model.bias is not None:
        model.bias.copy_(v[:, -1])


def _descend(objective: Objective, point: Point, u: Tensor) -> Point | None:
    """The first point below v, of v + u, v + u/2, v + u/4, ...; None where there is none.

    It is below by Armijo's condition, f(v + α u) ≤ f(v) + 10⁻⁴ α ∇f(v)·u. Or the slope along u is
    not yet positive there: then a convex f has fallen all the way, even if rounding hides it.
    """
    slope = dot(point.gradient, u)
    if not slope < 0:
        return None
    for halvings in range(_MAX_HALVINGS):
        length = 0.5**halvings
        trial = objective.at(point.v + length * u)
        if trial.value <= point.value + 1e-4 * length * slope or dot(trial.gradient, u) <= 0:
            return trial
    return None
