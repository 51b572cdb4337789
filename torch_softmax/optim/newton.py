"""Newton's method for softmax regression with an L2 penalty: steps by conjugate gradients."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ..distributed.data_parallel import Ranks
from ..losses._dtypes import outside_autocast
from ..modules import SoftmaxRegression
from ._descent import Descent, Goal, Result
from ._hessian import Layer, alone
from ._objective import Objective
from ._rows import Rows, memory_of

__all__ = ["Result", "minimize"]

ALONE = Ranks()
IGNORED = -100  # the class index that leaves an example out, torch's default
_MATRICES = 4  # (D, D) in float64, that are there at once


@torch.no_grad()
def minimize(
    model: SoftmaxRegression,
    input: Tensor | Rows,
    target: Tensor,
    weight_decay: float,
    *,
    sample_weight: Tensor | None = None,
    tolerance: float = 1e-4,
    weight_tolerance: float | None = None,
    max_steps: int = 100,
    report: Callable[[Result], None] = lambda result: None,
    ranks: Ranks = ALONE,
) -> Result:
    """Bring a model to the least mean loss with an L2 penalty on its weight, in place.

    f(W, b) = 1/Σw Σ_n w_n L_n + λ/2 ‖W‖². A step of v = (W, b) is v ← v + α u with
    ∇²f(v) u ≈ −∇f(v). f is convex and every step descends, so that the start matters little: it is
    v = 0 where f is less there than at the model, and what all classes have in common, which
    changes no probability, is subtracted. Neither the units nor the means of the features change
    the steps. Where rounding hides the descent from products in float32, gradients are computed in
    float64, and only the rounding of the parameters themselves is left.

    Args:
        model: With float32 or float64 parameters of its own, which are updated after every step.
        input: x, all examples, (..., D) of the model's dtype and on its device. Or `Rows` of any
            dtype, also of memory-mapped NumPy arrays, of which a few at a time are read.
        target: Class indices (...), of which -100 leaves its example out; or probabilities
            (..., K).
        weight_decay: λ, at least 0, of the weight alone: 1 / (C Σw) for the C of scikit-learn's
            `LogisticRegression`, and 2 / (C Σw) for two classes, for which scikit-learn has the one
            vector W₁ − W₀.
        sample_weight: w (...), at least 0; None for 1. A weight of 2 counts an example twice.
        tolerance: The gradient norm to reach.
        weight_tolerance: The distance to the optimum to reach besides, ‖W − W*‖ ≤ this ‖W‖, or
            None. As f is λ-strongly convex in W, a gradient norm of λ ‖W‖ times this is enough.
            Without a penalty the gradient norm to reach is this part of the tolerance.
        max_steps: The Newton steps to give up after; 0 for the start alone.
        report: Is called with the result so far after every step, once the model is updated.
        ranks: The processes that each hold some of the examples, and the same model.

    Returns:
        The result. Where `converged` is False, max_steps were done or rounding hid any further
        descent, and the model is at the last point reached. This takes memory for N K softmax
        outputs, or a quarter of what the device has if that is less, for some matrices
        (D + 1, D + 1), and for some hundred times the model.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes don't fit, a number is out of range, no example is left, the sample
            weights have no finite mean, the model's weight is computed from others (as by
            `weight_norm`) or on 'meta', the loss is not finite at the start, or the squares of the
            input are not, or its features are more than memory has room for.

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
    goal = goal_of(tolerance, weight_tolerance, max_steps)
    descent = begin(model, Data(input, target, sample_weight, ranks), weight_decay)
    return run(descent, model, goal, report)


class Data(NamedTuple):
    """The examples of this process, as they were given."""

    input: Tensor | Rows
    target: Tensor
    sample_weight: Tensor | None
    ranks: Ranks


def goal_of(tolerance: float, weight_tolerance: float | None, max_steps: int) -> Goal:
    """When to stop, checked."""
    checks.finite("tolerance", tolerance, above_zero=True)
    if weight_tolerance is not None:
        checks.finite("weight_tolerance", weight_tolerance, above_zero=True)
    checks.count("max_steps", max_steps)
    return Goal(tolerance, weight_tolerance, max_steps)


def begin(model: SoftmaxRegression, data: Data, weight_decay: float) -> Descent:
    """Check a model and examples, and start at the model."""
    ranks = data.ranks
    with ranks.together():
        _check_model(model)
        x, y, w = _examples(model, data)
        needed, there = _MATRICES * 8 * x.features**2, memory_of(x.device)
        if needed > there:  # rather than be killed
            raise ValueError(
                f"input must have features of which {_MATRICES} matrices (D, D) fit in memory, got "
                f"{x.features}, for {needed / 2**30:.1f} GiB of {there / 2**30:.1f}"
            )
    with outside_autocast(model.weight):
        total = ranks.sum if ranks.size > 1 else alone
        bias = model.bias is not None
        objective = Objective(x, y, model.num_classes, weight_decay, bias, w, total)
        if not objective.divisor > 0:
            kind = "that is not left out" if w is None else "of a weight above 0"
            raise ValueError(f"input must hold at least one example {kind}, got none")
        v = Layer(model.weight, model.bias).join()
        return Descent(objective, v.to(objective.sums, copy=True))


def run(
    descent: Descent, model: SoftmaxRegression, goal: Goal, report: Callable[[Result], None]
) -> Result:
    """Go to the optimum, and update the model at every step."""

    def follow(result: Result, v: Tensor) -> None:
        W, b = Layer.split(v, model.in_features)
        model.weight.copy_(W)
        if model.bias is not None and b is not None:
            model.bias.copy_(b)
        if result.steps > 0:
            report(result)

    with outside_autocast(model.weight):
        return descent.run(goal, follow)


def _check_model(model: SoftmaxRegression) -> None:
    """Raise unless a model's parameters can be updated in place."""
    if not isinstance(model, SoftmaxRegression):
        raise TypeError(f"model must be a SoftmaxRegression, got {type(model).__name__}")
    own = dict(model.named_parameters(recurse=False))
    for name in ("weight", "bias"):
        if getattr(model, name) is not None and name not in own:
            raise ValueError(
                f"model must hold its {name} as a parameter, got one that is computed from others"
            )
    if model.weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"model must have float32 or float64 parameters, got {model.weight.dtype}")
    if model.weight.is_meta:
        raise ValueError("model must be on a device that holds numbers, got 'meta'")


def _examples(model: SoftmaxRegression, data: Data) -> tuple[Rows, Tensor, Tensor | None]:
    """The examples that are not left out, checked: x (N, D), their targets and weights."""
    target, classes = data.target, model.num_classes
    shape, x = _rows(model, data.input)
    checks.target(target, shape, (*shape, classes))
    w = _weights(data.sample_weight, shape)
    keep = torch.ones(len(x), dtype=torch.bool) if w is None else (w != 0).cpu()
    if target.is_floating_point():
        y = target.reshape(-1, classes)
        if bool((y < 0).any()):
            raise ValueError("target must hold class probabilities of at least 0, got one below")
    else:
        y = target.reshape(-1).long()
        checks.labels(y, classes, IGNORED)
        keep &= (y != IGNORED).cpu()
    if not bool(keep.all()):
        x, y = x.take(keep), y[keep.to(y.device)]
        w = None if w is None else w[keep.to(w.device)]
    return x, y.to(model.weight.device), w


def _rows(model: SoftmaxRegression, input: Tensor | Rows) -> tuple[tuple[int, ...], Rows]:
    """The shape of the examples (...), and all of them as rows."""
    device, dtype = model.weight.device, model.weight.dtype
    if isinstance(input, Rows):
        if input.features != model.in_features:
            raise ValueError(
                f"input must have {model.in_features} features, as the model has, "
                f"got {input.features}"
            )
        return (len(input),), input.to(device, dtype)
    checks.linear_layer(input, model.weight, model.bias)
    if input.device != device:
        raise ValueError(f"input must be on the device of the model, {device}, got {input.device}")
    if input.dtype != dtype:
        raise TypeError(f"input must have the dtype of the model, {dtype}, got {input.dtype}")
    x = input.detach().reshape(-1, input.shape[-1]).contiguous()
    return tuple(input.shape[:-1]), Rows(x).to(device, dtype)


def _weights(value: object, shape: tuple[int, ...]) -> Tensor | None:
    """The weights of the examples as floating-point numbers, (N,), checked."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"sample_weight must be a tensor, got {type(value).__name__}")
    checks.shape("sample_weight", value, shape, "for one weight an example")
    w = value.detach().reshape(-1)
    if w.is_complex():
        raise TypeError(f"sample_weight must hold real numbers, got {w.dtype}")
    w = w if w.is_floating_point() else w.double()
    if not bool((w.isfinite() & (w >= 0)).all()):
        raise ValueError("sample_weight must hold finite numbers of at least 0, got another")
    return w
