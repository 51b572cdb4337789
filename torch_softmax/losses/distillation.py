"""How far one layer's softmax is from another's: a student's q from a teacher's p.

With q = softmax(z / T) and p = softmax(z' / T) for the logits z of the student and z' of the
teacher, and a temperature T:

    forward  T² KL(p ‖ q)
    reverse  T² KL(q ‖ p)
    jsd      T² (β KL(p ‖ m) + (1 − β) KL(q ‖ m)),  m = β p + (1 − β) q

where KL(p ‖ q) = Σ_k p_k ρ_k with ρ = log p − log q. With J = diag p − p pᵀ, the Jacobian of p,

    ∂KL(p ‖ q)/∂z' = J ρ / T,  ∂KL(p ‖ q)/∂z = (q − p) / T,

and in the gradient of 'jsd' what is by m adds up to 0: it is T β J (log p − log m) by z', and so by
z.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks
from ._dtypes import accumulation_dtype, cast, outside_autocast, product_dtype, widest
from ._formulas import per_row
from ._operators import named_in_operators
from ._rows import How, Layer, Operands, Parts, RowFunction
from ._targets import REDUCTIONS, Counted
from .linear import as_multiplied, default_chunk_size
from .logits import rows_or_total

DIVERGENCES = ("forward", "reverse", "jsd")


@named_in_operators
@dataclass(frozen=True)
class Divergence(RowFunction):
    """The divergence of each row, by the names that its options have in the loss."""

    layers = 2  # student and teacher

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

    def first(self, at: Parts, needed: Parts) -> Parts:
        """The divergence and its gradients by hand."""
        log_q, log_p = logs = [torch.log_softmax(z / self.temperature, 1) for z in at.logits]
        others = logs[::-1]
        if self.divergence == "jsd":
            others = [log_mean(log_p, log_q, self.beta)] * 2
        both = [log.exp() for log in logs]
        terms: list[Tensor] = []
        gradients: list[Tensor | None] = []
        sides = zip(logs, others, both, both[::-1], self.shares, needed.logits, strict=True)
        for log, other, p, q, share, by_z in sides:
            g = p - q if by_z and not share else None
            if share and (by_z or all(needed.results)):
                ratio = (log - other).masked_fill(log == -torch.inf, 0)
                mean = (p * ratio).sum(1, keepdim=True)  # p·ρ, which is the KL itself
                terms.append(share * mean)
                g = p * (ratio - mean) * share if by_z else None  # J ρ
            gradients.append(g)
        values = tuple[Tensor, ...]()
        if all(needed.results):
            values = (self.temperature**2 * torch.stack(terms).sum(0).squeeze(1),)
        (factor,) = at.results
        by_logits = (
            None if g is None else self.temperature * g * per_row(factor, g) for g in gradients
        )
        return Parts(tuple(by_logits), (), values)


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
    # torch.logaddexp has no second derivative where one of both is −∞.
    top = torch.maximum(log_p, log_q).detach()
    neither = top == -torch.inf
    top = top.masked_fill(neither, 0)
    mean = beta * (log_p - top).exp() + (1 - beta) * (log_q - top).exp()
    return top + mean.masked_fill(neither, 1).log()


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
    products = widest(*(product_dtype(*layer) for layer in (student, teacher)))
    returned = dtype or accumulation_dtype(products)
    logits = widest(products, returned)
    classes, features = student.W.shape
    step = chunk_size or default_chunk_size(classes, features, student.x.device)
    how = How(step, accumulation_dtype(logits), logits)
    operands = Operands(layers, ())
    with outside_autocast(student.x):
        (result,) = rows_or_total(
            function, how, operands, counted, reduction, tuple(shape), is_number=True
        )
    return cast(result, returned)


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
