"""How far one layer's softmax is from another's: a student's q from a teacher's p.

With q = softmax(z / T) and p = softmax(z' / T) for the logits z of the student and z' of the
teacher, and a temperature T:

    forward  T² KL(p ‖ q)
    reverse  T² KL(q ‖ p)
    jsd      T² (β KL(p ‖ m) + (1 − β) KL(q ‖ m)),  m = β p + (1 − β) q

where KL(p ‖ q) = Σ_k p_k ρ_k with ρ = log p − log q. With J = diag p − p pᵀ, the Jacobian of p,

    ∂KL(p ‖ q)/∂z' = J ρ / T,  ∂KL(p ‖ q)/∂z = (q − p) / T,

and in the gradient of 'jsd' what is by m adds up to 0: it is T β J (log p − log m) by z', and so by
z. A product J ρ = p ∘ (ρ − p·ρ) changes by δp ∘ (ρ − p·ρ) + p ∘ (δρ − δp·ρ − p·δρ).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ._autograd import Mask
from ._dtypes import accumulation_dtype, cast, outside_autocast, product_dtype, widest
from ._formulas import per_row
from ._operators import named_in_operators, results_of, sum_of
from ._rows import How, Layer, Operands, Parts, RowFunction
from ._targets import REDUCTIONS, Counted
from .linear import as_multiplied, default_chunk_size
from .logits import mean_over

DIVERGENCES = ("forward", "reverse", "jsd")


class _Side(NamedTuple):
    """One of the two distributions of some rows; or how its parts change along directions."""

    log: Tensor  # log p, (n, K)
    p: Tensor
    ratio: Tensor  # ρ, the logarithm of p over what it is compared with; finite where p is 0


class _Pair(NamedTuple):
    """What is known of some rows: the distributions of student and teacher."""

    student: _Side
    teacher: _Side


@named_in_operators
@dataclass(frozen=True)
class Divergence(RowFunction):
    """The divergence of each row, by the names that its options have in the loss."""

    layers = 2  # student and teacher
    has_second = True

    divergence: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0

    def told(self) -> tuple[list[str], list[float]]:
        """The name, β and T."""
        return [self.divergence], [self.beta, self.temperature]

    @classmethod
    def from_told(cls, words: list[str], numbers: list[float]) -> "Divergence":
        """The divergence of this name, β and T."""
        (divergence,), (beta, temperature) = words, numbers
        return Divergence(divergence, beta, temperature)

    def __call__(self, logits: tuple[Tensor, ...], others: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The divergence (n,) by its definition."""
        log_q, log_p = (torch.log_softmax(z / self.temperature, 1) for z in logits)
        if self.divergence == "forward":
            value = kl(log_p, log_q)
        elif self.divergence == "reverse":
            value = kl(log_q, log_p)
        else:
            log_m = log_mean(log_p, log_q, self.beta)
            value = self.beta * kl(log_p, log_m) + (1 - self.beta) * kl(log_q, log_m)
        return (self.temperature**2 * value,)

    def first(self, at: Parts, needed: Parts) -> Parts:
        """The divergence and its gradients by hand."""
        pair = self.point(at)
        values: tuple[Tensor, ...] = ()
        if all(needed.results):
            terms = zip(pair, self._shares(), strict=True)
            shared = [share * (side.p * side.ratio).sum(1) for side, share in terms if share]
            values = (self.temperature**2 * torch.stack(shared).sum(0),)
        if not any(needed.logits):
            return Parts((None, None), (), values)
        return Parts(self._gradients(pair, at, needed.logits), (), values)

    def point(self, at: Parts) -> _Pair:
        """Both distributions."""
        log_q, log_p = (torch.log_softmax(z / self.temperature, 1) for z in at.logits)
        of_q, of_p = log_p, log_q
        if self.divergence == "jsd":
            of_q = of_p = log_mean(log_p, log_q, self.beta)
        return _Pair(_side(log_q, of_q), _side(log_p, of_p))

    def second(self, point: _Pair, at: Parts, along: Parts, needed: Mask) -> Parts:
        """The changes by hand."""
        moved = [
            _moved_side(side, u / self.temperature)
            for side, u in zip(point, along.logits, strict=True)
        ]
        of_q, of_p = moved[1].log, moved[0].log
        if self.divergence == "jsd":
            of_q = of_p = self._moved_mean(point, moved[0].log, moved[1].log)
        changes = _Pair(
            moved[0]._replace(ratio=moved[0].log - of_q),
            moved[1]._replace(ratio=moved[1].log - of_p),
        )
        (factor,), (change_of_factor,) = at.results, along.results
        slopes = self._slopes(point)
        by_logits = []
        for i, share in enumerate(self._shares()):
            side, change = point[i], changes[i]
            if share:
                h = share * _moved_product(side, change)
            else:
                other = changes[1 - i]
                h = change.p - other.p
            h = self.temperature * h * per_row(factor, h)
            g = slopes[i].unsqueeze(1)
            by_logits.append(h + g * per_row(change_of_factor, g))
        values = sum(
            (slope.unsqueeze(1) * u).sum(2) for slope, u in zip(slopes, along.logits, strict=True)
        )
        return Parts(tuple(by_logits), (), (values,) if all(needed) else ())

    def gradient(self, point: _Pair, at: Parts) -> tuple[Tensor, ...]:
        """The gradients by the logits of student and teacher."""
        return self._gradients(point, at, (True, True))

    def _gradients(self, pair: _Pair, at: Parts, needed: Mask) -> tuple[Any, ...]:
        (factor,) = at.results
        slopes = self._slopes(pair, needed)
        return tuple(None if g is None else g.mul_(per_row(factor, g)) for g in slopes)

    def _shares(self) -> tuple[float, float]:
        """What KL of the student's q, and of the teacher's p, count for in the divergence."""
        return {"forward": (0.0, 1.0), "reverse": (1.0, 0.0)}.get(
            self.divergence, (1 - self.beta, self.beta)
        )

    def _slopes(self, pair: _Pair, needed: Mask = (True, True)) -> tuple[Any, ...]:
        """The gradients of the divergence alone, (n, K)."""

        def slope(i: int, share: float) -> Tensor:
            side, other = pair[i], pair[1 - i]
            by_logits = share * _product(side) if share else side.p - other.p
            return self.temperature * by_logits

        return tuple(
            slope(i, share) if needed[i] else None for i, share in enumerate(self._shares())
        )

    def _moved_mean(self, pair: _Pair, of_q: Tensor, of_p: Tensor) -> Tensor:
        """The change of log m, β p/m ∘ δlog p + (1 − β) q/m ∘ δlog q."""
        q_over_m, p_over_m = (_over(side).unsqueeze(1) for side in pair)
        return self.beta * p_over_m * of_p + (1 - self.beta) * q_over_m * of_q


def _side(log_p: Tensor, log_other: Tensor) -> _Side:
    ratio = (log_p - log_other).masked_fill_(log_p == -torch.inf, 0)
    return _Side(log_p, log_p.exp(), ratio)


def _over(side: _Side) -> Tensor:
    """The quotient p / m, 0 where p is 0."""
    return side.ratio.exp().masked_fill_(side.log == -torch.inf, 0)


def _product(side: _Side) -> Tensor:
    """J ρ, (n, K)."""
    return side.p * (side.ratio - (side.p * side.ratio).sum(1, keepdim=True))


def _moved_side(side: _Side, u: Tensor) -> _Side:
    """How log p and p change along u (n, M, K)."""
    p = side.p.unsqueeze(1)
    of_log = u - (p * u).sum(2, keepdim=True)
    return _Side(of_log, p * of_log, of_log)


def _moved_product(side: _Side, change: _Side) -> Tensor:
    """How J ρ changes, (n, M, K)."""
    p, ratio = side.p.unsqueeze(1), side.ratio.unsqueeze(1)
    centred = ratio - (p * ratio).sum(2, keepdim=True)
    of_mean = (change.p * ratio + p * change.ratio).sum(2, keepdim=True)
    return change.p * centred + p * (change.ratio - of_mean)


def divergence_of(divergence: str, beta: object, temperature: object) -> Divergence:
    """A divergence, its options checked."""
    checks.one_of("divergence", divergence, DIVERGENCES)
    share, heat = checks.number("beta", beta), checks.number("temperature", temperature)
    if not 0 < share < 1:
        raise ValueError(f"beta must lie between 0 and 1, where jsd is 0, got {beta!r}")
    checks.finite("temperature", heat, above_zero=True)
    return Divergence(divergence, share, heat)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of each row, where a class without a share of p adds nothing."""
    nothing = log_p == -torch.inf
    ratio = torch.where(nothing, 0, torch.where(nothing, 0, log_p) - torch.where(nothing, 0, log_q))
    return (log_p.exp() * ratio).sum(1)


def log_mean(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The logarithm of β p + (1 − β) q; of a class without a share of either, anything finite."""
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    of_p, of_q = (log.masked_fill(neither, 0) for log in (log_p, log_q))
    return torch.logaddexp(of_p + math.log(beta), of_q + math.log(1 - beta))


def linear_distillation(
    student: Layer,
    teacher: Layer,
    function: Divergence,
    reduction: str,
    mask: Tensor | None,
    chunk_size: int | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """The divergence of each row of two layers (...), or their sum or mean, to any order."""
    _check(student, teacher, reduction, mask)
    shape = student.x.shape[:-1]
    layers = (as_multiplied(student), as_multiplied(teacher))
    counted = Counted.of(None if mask is None else mask.flatten())
    count = math.prod(shape)
    products = widest(*(product_dtype(*layer) for layer in (student, teacher)))
    returned = dtype or accumulation_dtype(products)
    logits = widest(products, returned)
    classes, features = student.W.shape
    step = chunk_size or default_chunk_size(classes, features, student.x.device)
    how = How(step, accumulation_dtype(logits), logits)
    with outside_autocast(student.x):
        if reduction == "none":
            (divergences,) = results_of(function, how, Operands(layers, ()), counted)
            return cast(counted.read_zeros(divergences), returned).reshape(shape)
        factors = (None if counted.mask is None else counted.mask.to(how.dtype),)
        total = sum_of(function, how, Operands(layers, ()), factors, counted)
    if reduction == "mean":
        total = mean_over(total, counted.number(count))
    return cast(total, returned)


def _check(student: Layer, teacher: Layer, reduction: str, mask: Tensor | None) -> None:
    """Raise unless the arguments fit together."""
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.layer_of_two_dimensions(*student)
    names = checks.LayerNames("teacher_input", "teacher_weight", "teacher_bias")
    checks.layer_of_two_dimensions(*teacher, names)
    shape = student.x.shape[:-1]
    checks.shape(names.input, teacher.x[..., 0], shape, "without its last dimension, as input has")
    classes, of_teacher = (len(layer.W) for layer in (student, teacher))
    if classes != of_teacher:
        raise ValueError(
            f"{names.linear_weight} must have {classes} classes, as linear_weight has, "
            f"got {of_teacher}"
        )
    if mask is not None:
        checks.mask(mask, shape)
