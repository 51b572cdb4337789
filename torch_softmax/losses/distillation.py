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
    """One of the two distributions of some rows, (n, K) each."""

    log: Tensor  # log p
    p: Tensor
    ratio: Tensor  # ρ, the logarithm of p over what it is compared with; 0 where p is 0

    def product(self) -> Tensor:
        """J ρ."""
        return self.p * (self.ratio - (self.p * self.ratio).sum(1, keepdim=True))

    def moved_log(self, u: Tensor) -> Tensor:
        """How log p changes along u, (n, M, K)."""
        return u - (self.p.unsqueeze(1) * u).sum(2, keepdim=True)

    def moved_product(self, of_log: Tensor, of_ratio: Tensor) -> Tensor:
        """How J ρ changes where log p and ρ do, (n, M, K)."""
        p, ratio = self.p.unsqueeze(1), self.ratio.unsqueeze(1)
        of_p = p * of_log
        of_mean = (of_p * ratio + p * of_ratio).sum(2, keepdim=True)
        return of_p * (ratio - (p * ratio).sum(2, keepdim=True)) + p * (of_ratio - of_mean)


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
        return [self.divergence], [self.beta, self.temperature]

    @classmethod
    def from_told(cls, words: list[str], numbers: list[float]) -> "Divergence":
        (divergence,), (beta, temperature) = words, numbers
        return Divergence(divergence, beta, temperature)

    @property
    def shares(self) -> tuple[float, float]:
        """What the KL of the student's q counts for, and that of the teacher's p."""
        only = {"forward": (0.0, 1.0), "reverse": (1.0, 0.0)}
        return only.get(self.divergence, (1 - self.beta, self.beta))

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

    def point(self, at: Parts) -> tuple[_Side, ...]:
        """Both distributions, each compared with the other or with m."""
        logs = [torch.log_softmax(z / self.temperature, 1) for z in at.logits]
        if self.divergence == "jsd":
            others = [log_mean(logs[1], logs[0], self.beta)] * 2
        else:
            others = logs[::-1]
        return tuple(
            _Side(log, log.exp(), (log - other).masked_fill(log == -torch.inf, 0))
            for log, other in zip(logs, others, strict=True)
        )

    def first(self, at: Parts, needed: Parts) -> Parts:
        """The divergence and its gradients by hand."""
        sides, values = self.point(at), tuple[Tensor, ...]()
        if all(needed.results):
            pairs = zip(sides, self.shares, strict=True)
            terms = [share * (side.p * side.ratio).sum(1) for side, share in pairs if share]
            values = (self.temperature**2 * torch.stack(terms).sum(0),)
        return Parts(self._gradients(sides, at, needed.logits), (), values)

    def gradient(self, point: tuple[_Side, ...], at: Parts) -> tuple[Any, ...]:
        """The gradients by the logits of student and teacher."""
        return self._gradients(point, at, (True, True))

    def _gradients(self, sides: tuple[_Side, ...], at: Parts, needed: Mask) -> tuple[Any, ...]:
        """The gradients by the logits that are needed, for the factor of each row."""

        def slope(side: _Side, other: _Side, share: float) -> Tensor:
            by_logits = share * side.product() if share else side.p - other.p
            (factor,) = at.results
            return self.temperature * by_logits * per_row(factor, by_logits)

        triples = zip(sides, sides[::-1], self.shares, strict=True)
        return tuple(
            slope(*triple) if wanted else None
            for triple, wanted in zip(triples, needed, strict=True)
        )

    def second(self, point: tuple[_Side, ...], at: Parts, along: Parts, needed: Mask) -> Parts:
        """The changes by hand."""
        pairs = zip(point, along.logits, strict=True)
        of_logs = [side.moved_log(u / self.temperature) for side, u in pairs]
        of_ps = [side.p.unsqueeze(1) * v for side, v in zip(point, of_logs, strict=True)]
        of_others = of_logs[::-1]
        if self.divergence == "jsd":  # log m changes by Σ share p/m ∘ δlog p
            triples = zip(point, of_logs, self.shares, strict=True)
            parts = [share * _over(side) * of_log for side, of_log, share in triples]
            of_others = [torch.stack(parts).sum(0)] * 2
        (factor,), (moved_factor,) = at.results, along.results
        alone = self._gradients(point, at._replace(results=(1.0,)), (True, True))

        def change(i: int, share: float) -> Tensor:
            if share:
                h = share * point[i].moved_product(of_logs[i], of_logs[i] - of_others[i])
            else:
                h = of_ps[i] - of_ps[1 - i]
            g: Tensor = alone[i].unsqueeze(1)
            return self.temperature * h * per_row(factor, h) + g * per_row(moved_factor, h)

        by_logits = tuple(change(i, share) for i, share in enumerate(self.shares))
        slope = sum((g.unsqueeze(1) * u).sum(2) for g, u in zip(alone, along.logits, strict=True))
        return Parts(by_logits, (), (slope,) if all(needed) else ())


def _over(side: _Side) -> Tensor:
    """The quotient p / m, (n, 1, K), 0 where p is 0."""
    return side.ratio.exp().masked_fill(side.log == -torch.inf, 0).unsqueeze(1)


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
