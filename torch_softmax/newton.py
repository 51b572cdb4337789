"""Newton's method with conjugate gradients for softmax regression with an L2 penalty."""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from .losses._formulas import Weights
from .losses._hessian import Examples, MeanHessian, cut
from .losses._sweeps import How, Inputs, numbers_and_gradients
from .losses._targets import Options, fold
from .modules import SoftmaxRegression

# Throughout, v = (W, b) are the parameters and u, d, ... directions, all of shape (K, P): with
# P = D + 1, the last column for b, or with P = D where there is no bias.

IGNORED = -100  # the class index that leaves an example out, torch's default
_OPTIONS = Options(
    weight=None, ignore_index=IGNORED, reduction="sum", label_smoothing=0, dtype=None
)

# Numbers of x to work out at a time, so that a CPU finds them in its cache for the second product.
_CACHED_INPUT = 2**20
# A linear system is solved until its residual is this part of what it was. On MNIST that takes 88
# products in all; a tenth 93, a half 96, and so does min(½, √‖∇f‖), the usual choice.
_FORCING = 0.25
_MAX_PRODUCTS = 200  # for one linear system: what is reached by then is a descent as well
_MAX_DIRECTIONS = 50  # that one linear system leaves to the next
# Along a direction of less than this part of the curvature expected, as where S is one-hot for all
# examples, a system's solution lies far beyond where it means anything. MNIST stays above 0.01.
_FLAT = 1e-3
_MAX_HALVINGS = 40  # of a step


class Result(NamedTuple):
    """How far `minimize` has come.

    Args:
        objective: f, the mean loss with the penalty.
        gradient_norm: ‖∇f‖₂, over weight and bias together.
        steps: the Newton steps done.
        products: the Hessian-vector products done.
        converged: whether gradient_norm is at most the tolerance.
    """

    objective: float
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
    r"""Bring a model to the least mean loss with an L2 penalty on its weight, in place.

    .. math::
        f(W, b) = \frac{1}{N} \sum_n L_n + \frac{\lambda}{2} \lVert W \rVert^2, \qquad
        v \leftarrow v + \alpha u, \quad \nabla^2 f(v)\, u \approx -\nabla f(v)

    f is convex and every step descends, so that the start matters little. What all classes have
    in common in W and b changes no probability, and is taken off at first.

    Args:
        model: with float32 or float64 parameters, which are updated after every step.
        input: x, all examples, (..., D) of the model's dtype.
        target: class indices (...), of which -100 leaves its example out; or probabilities
            (..., K).
        weight_decay: λ, at least 0, of the weight alone. It is 1 / (C N) for the C of
            scikit-learn's `LogisticRegression`.
        tolerance: the gradient norm to reach.
        max_steps: the Newton steps to give up after.
        report: is called with the result so far after every step, once the model is updated.

    Returns:
        The result. Where `converged` is False, max_steps were done or rounding hid any further
        descent, and the model is at the last point reached. On the way it takes memory for N K
        softmax outputs, for some matrices (D + 1, D + 1), and for some hundred times the model.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes don't fit, a number is out of range, no example is left, or the
            loss is not finite at the start.

    Example:
        >>> input = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> model = SoftmaxRegression(1, 2)
        >>> result = minimize(model, input, torch.tensor([0, 1, 0, 1]), weight_decay=0.01)
        >>> result.converged, round(result.objective, 4)
        (True, 0.5889)

    Source: Nocedal and Wright, Numerical Optimization (2006), algorithm 7.1; Dembo, Eisenstat and
    Steihaug, Inexact Newton methods (1982).
    """
    _check_number("weight_decay", weight_decay, "at least 0", weight_decay >= 0)
    _check_number("tolerance", tolerance, "above 0", tolerance > 0)
    checks.positive("max_steps", max_steps)
    objective = _Objective(*_examples(model, input, target), weight_decay, model.bias is not None)
    v = _parameters(model)
    point = objective.at(v - v.mean(0))
    if not math.isfinite(point.value):
        raise ValueError(
            "model, input and target must hold finite numbers of a moderate size, "
            f"got a loss of {point.value} at the start"
        )
    _update(model, point.v)
    result = Result(point.value, point.norm, 0, 0, point.norm <= tolerance)
    if result.converged:
        return result

    gram, known = objective.gram(), None
    for step in range(1, max_steps + 1):
        hessian = objective.hessian(point.v)
        curvature = hessian.of_losses.mean_curvature()
        precondition = _Preconditioner(gram, curvature, weight_decay, known)
        # The last system is solved no further than the tolerance asks for.
        stop = max(_FORCING * point.norm, 0.8 * tolerance)
        u, known, products = _solve(hessian, point.gradient, precondition, stop)
        descended = _descend(objective, point, u)
        if descended is None:
            break
        point = descended
        _update(model, point.v)
        result = Result(
            point.value, point.norm, step, result.products + products, point.norm <= tolerance
        )
        report(result)
        if result.converged:
            break
    return result


def _check_number(name: str, value: float, expected: str, holds: bool) -> None:
    if not (holds and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number {expected}, got {value}")


def _examples(model: SoftmaxRegression, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The examples that are not left out, checked: x (N, D) and class indices or probabilities."""
    dtype, classes = model.weight.dtype, model.num_classes
    checks.linear_layer(input, model.weight, model.bias)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"model must have float32 or float64 parameters, got {dtype}")
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


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


class _Point(NamedTuple):
    """Parameters v (K, P) with f(v) and ∇f(v)."""

    v: Tensor
    value: float
    gradient: Tensor

    @property
    def norm(self) -> float:
        return float(self.gradient.norm())


class _Objective:
    """f over all examples."""

    def __init__(self, x: Tensor, target: Tensor, weight_decay: float, bias: bool) -> None:
        count, features = x.shape
        self.x = x
        self.rows = fold(target, _OPTIONS, target.shape[-1], x.dtype, may_ignore=False)
        self.decay = x.new_full((features + bias,), weight_decay)
        self.decay[features:] = 0
        # Other devices than a CPU want few large kernels.
        on_cpu = x.device.type == "cpu"
        self.chunk_size = max(256, _CACHED_INPUT // features) if on_cpu else count
        parts = torch.get_num_threads() if on_cpu else 1
        pieces = list(cut(x, self.rows.mass, self.chunk_size, parts))
        self.examples = Examples(pieces, count, features, bias)

    def at(self, v: Tensor) -> _Point:
        """Value and gradient."""
        y, mass, *_ = self.rows
        inputs = Inputs(self.x, *self.examples.split(v), *y)
        wanted = Inputs(False, True, self.examples.bias, False)
        how = How(self.chunk_size, v.dtype, v.dtype)
        numbers, by = numbers_and_gradients(inputs, Weights(mass), wanted, how)
        assert numbers is not None
        losses = numbers.gap + (numbers.log_sum if mass is None else mass * numbers.log_sum)
        gradient = self.decay * v
        value = float(losses.double().mean()) + 0.5 * _dot(gradient.double(), v.double())
        for part, of_losses in zip(self.examples.split(gradient), (by.W, by.b), strict=True):
            if part is not None:
                part.add_(of_losses, alpha=1 / len(self.x))
        return _Point(v, value, gradient)

    def hessian(self, v: Tensor) -> "_Hessian":
        """∇²f(v)."""
        return _Hessian(MeanHessian(self.examples, v), self.decay)

    def gram(self) -> Tensor:
        """X̃ᵀX̃ / N, (P, P), of X̃ = x with a column of ones for the bias."""
        count, features = self.x.shape
        gram = self.x.new_ones(len(self.decay), len(self.decay))
        gram[:features, :features] = (self.x.t() @ self.x) / count
        mean = self.x.mean(0)
        gram[:features, features:], gram[features:, :features] = mean.unsqueeze(1), mean
        return gram


class _Hessian(NamedTuple):
    """∇²f(v), that of the mean loss and of the penalty."""

    of_losses: MeanHessian
    decay: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        """Its product with a direction, (K, P)."""
        return self.of_losses(u).addcmul_(self.decay, u)


class _Known(NamedTuple):
    """Directions d, each a row of (M, K P), and their products H d, scaled so that dᵀH d = 1."""

    directions: Tensor
    products: Tensor


class _Preconditioner:
    """An inverse of H ≈ c I ⊗ X̃ᵀX̃/N + λ, with c the mean curvature, that knows some products.

    The products are those of the Newton step before. Their directions dᵢ are conjugate, and
    (I − Σ dᵢ(H dᵢ)ᵀ) A⁻¹ (I − Σ (H dᵢ)dᵢᵀ) + Σ dᵢdᵢᵀ, with A⁻¹ the inverse above, is exact on them.

    Source: Morales and Nocedal, Automatic preconditioning by limited memory quasi-Newton updating
    (2000).
    """

    def __init__(
        self, gram: Tensor, curvature: float, weight_decay: float, known: _Known | None
    ) -> None:
        epsilon = torch.finfo(gram.dtype).eps
        self.matrix = gram * max(curvature, epsilon)
        # Rounding must not make a matrix indefinite whose columns depend on one another.
        ridge = weight_decay + 10 * epsilon * float(self.matrix.trace())
        self.matrix.diagonal().add_(ridge)
        self.factor = torch.linalg.cholesky(self.matrix)
        self.known = known

    def __call__(self, r: Tensor) -> Tensor:
        if self.known is None:
            return self.solve(r)
        d, Hd = self.known
        flat = r.flatten()
        along = d @ flat
        z = self.solve((flat - along @ Hd).view_as(r)).flatten()
        return (z + (along - Hd @ z) @ d).view_as(r)

    def curvature(self, d: Tensor) -> float:
        """The curvature dᵀA d to expect along a direction d, (K, P)."""
        return _dot(d, d @ self.matrix)

    def solve(self, r: Tensor) -> Tensor:
        """A⁻¹ r, with the same symmetric matrix for each class, a row of r."""
        return torch.cholesky_solve(r.t(), self.factor).t()


class _Solution(NamedTuple):
    """Of a linear system: u, what was learnt of H on the way, and the number of products."""

    u: Tensor
    known: _Known | None
    products: int


def _solve(
    hessian: _Hessian, gradient: Tensor, precondition: _Preconditioner, stop: float
) -> _Solution:
    """Conjugate gradients for H u = −∇f, until the residual's norm is at most `stop`."""
    u, residual = torch.zeros_like(gradient), gradient.clone()
    z = precondition(residual)
    d, size = -z, _dot(residual, z)
    known: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MAX_DIRECTIONS)
    products = 0
    while products < _MAX_PRODUCTS:
        Hd = hessian(d)
        products += 1
        curvature = _dot(d, Hd)
        if not curvature > _FLAT * precondition.curvature(d):
            if products == 1:
                u = d
            break
        known.append((d.flatten() / math.sqrt(curvature), Hd.flatten() / math.sqrt(curvature)))
        u.add_(d, alpha=size / curvature)
        residual.add_(Hd, alpha=size / curvature)
        if float(residual.norm()) <= stop:
            break
        z = precondition(residual)
        previous, size = size, _dot(residual, z)
        d = d * (size / previous) - z
    if not known:
        return _Solution(u, None, products)
    directions, images = zip(*known, strict=True)
    return _Solution(u, _Known(torch.stack(directions), torch.stack(images)), products)


def _descend(objective: _Objective, point: _Point, u: Tensor) -> _Point | None:
    """The first point below v, of v + u, v + u/2, v + u/4, ...; None where there is none.

    It is below by Armijo's condition, f(v + α u) ≤ f(v) + 10⁻⁴ α ∇f(v)·u. Or the slope along u is
    not yet positive there: then a convex f has fallen all the way, even if rounding hides it.
    """
    slope = _dot(point.gradient, u)
    if not slope < 0:
        return None
    for halvings in range(_MAX_HALVINGS):
        length = 0.5**halvings
        trial = objective.at(point.v + length * u)
        if trial.value <= point.value + 1e-4 * length * slope or _dot(trial.gradient, u) <= 0:
            return trial
    return None
