"""One fit of an estimator by Newton's method, and what its user has to know of it."""

from typing import Any

import torch

from .. import _checks as checks
from ..modules import SoftmaxRegression
from ..optim import Result, minimize
from ._data import Examples

# A mean loss this small is that of classes that a plane separates: one example in N on the wrong
# side has log 2 / N at least.
_SEPARATED = 1e-6


def check_parameters(estimator: Any) -> None:
    """Raise unless the parameters that both estimators have are in range."""
    checks.finite("tol", checks.number("tol", estimator.tol), above_zero=True)
    checks.count("max_iter", estimator.max_iter)


def model_at(start: SoftmaxRegression | None, examples: Examples, bias: bool) -> SoftmaxRegression:
    """A model of zeros, or of the parameters of another where that has the same shape."""
    rows, classes = examples.rows, len(examples.y.classes)
    model = SoftmaxRegression(rows.features, classes, bias, rows.device, rows.dtype)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.zero_()
            if start is not None and start.weight.shape == model.weight.shape:
                value.copy_(getattr(start, name))
    return model


def fit_model(model: SoftmaxRegression, examples: Examples, C: float, estimator: Any) -> Result:
    """Bring a model to the optimum."""
    return minimize(
        model,
        examples.rows,
        examples.y.codes,
        examples.penalty(C),
        sample_weight=examples.weight,
        tolerance=estimator.tol,
        weight_tolerance=estimator.tol,
        max_steps=estimator.max_iter,
    )


def shortcoming(result: Result, examples: Examples, C: float, tol: float) -> str | None:
    """What a user has to know of a result, if anything."""
    # Where rounding stops it, the gradient is what scikit-learn would ask for.
    if not result.converged and not (result.reachable and result.gradient_norm <= tol):
        advice = "raise max_iter or tol, or scale X, as by StandardScaler"
        if examples.rows.dtype == torch.float32:
            advice += ", or pass dtype='float64'"
        if absent := examples.absent():  # whose intercept has no finite optimum
            advice = f"leave out the class {absent[0]!r}, which no example of a weight above 0 has"
        return (
            f"not converged at C={C:g} after {result.steps} Newton steps, with a gradient norm of "
            f"{result.gradient_norm:.1e}: {advice}"
        )
    if examples.penalty(C) == 0 and result.loss < _SEPARATED:
        return (
            "the classes can be told apart without an error, so that without a penalty the "
            "coefficients have no finite optimum: choose a finite C"
        )
    return None
