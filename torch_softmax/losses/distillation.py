"""How far one layer's softmax is from another's: a student's q from a teacher's p.

With q = softmax(z / T) and p = softmax(z' / T) for the logits z of the student and z' of the
teacher, and a temperature T:

    forward  T² KL(p ‖ q)
    reverse  T² KL(q ‖ p)
    jsd      T² (β KL(p ‖ m) + (1 − β) KL(q ‖ m)),  m = β p + (1 − β) q

where KL(p ‖ q) = Σ_k p_k (log p_k − log q_k).
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ._cross_entropy import mean_over
from ._dtypes import outside_autocast
from ._mapped import RowFunction, results_of, total_of
from ._sweeps import Inputs, kept
from ._targets import REDUCTIONS
from .linear import Layer
from .mapped import how_of, tensors_of

DIVERGENCES = ("forward", "reverse", "jsd")


class Divergence(NamedTuple):
    """Which divergence, by the names that its options have in the loss."""

    divergence: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0


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
    ratio = (log_p - log_q).masked_fill(log_p == -torch.inf, 0)
    return (log_p.exp() * ratio).sum(1)


def log_mean(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The logarithm of β p + (1 − β) q; of a class without a share of either, anything finite."""
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    of_p, of_q = (log.masked_fill(neither, 0) for log in (log_p, log_q))
    return torch.logaddexp(of_p + math.log(beta), of_q + math.log(1 - beta))


def row_divergences(
    options: Divergence, z: Tensor, of_teacher: Tensor, keep: Tensor | None
) -> tuple[Tensor]:
    """The divergence of each row, (n,), 0 where it is left out."""
    kind, beta, temperature = options
    log_q, log_p = (torch.log_softmax(logits / temperature, 1) for logits in (z, of_teacher))
    if kind == "forward":
        divergence = kl(log_p, log_q)
    elif kind == "reverse":
        divergence = kl(log_q, log_p)
    else:
        log_m = log_mean(log_p, log_q, beta)
        divergence = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    divergence = temperature**2 * divergence
    return (divergence if keep is None else divergence.masked_fill(~keep, 0),)


def linear_distillation(
    student: Layer,
    teacher: Layer,
    options: Divergence,
    reduction: str,
    mask: Tensor | None,
    chunk_size: int | None,
) -> Tensor:
    """The divergence of each row of two layers (...), or their sum or mean, to any order."""
    _check(student, teacher, reduction, mask)
    layers = (student, teacher)
    shape = student.input.shape[:-1]
    keep = None if mask is None else mask.flatten()
    x, W, b, teacher_x, teacher_W, teacher_b = tensors_of(layers)
    x, teacher_x = (kept(Inputs(rows, keep=keep)) for rows in (x, teacher_x))
    row_function = functools.partial(row_divergences, options)
    of = RowFunction(row_function, len(layers), (True,), 1, how_of(layers, chunk_size))
    with outside_autocast(student.input):
        tensors = (x, W, b, teacher_x, teacher_W, teacher_b, keep)
        if reduction == "none":
            (divergences,) = results_of(of, tensors)
            return divergences.reshape(shape)
        total = total_of(of, tensors)
    if reduction == "sum":
        return total
    return mean_over(total, math.prod(shape) if keep is None else keep.sum())


def _check(student: Layer, teacher: Layer, reduction: str, mask: Tensor | None) -> None:
    """Raise unless the arguments fit together."""
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.layer_of_two_dimensions(*student)
    names = checks.LayerNames("teacher_input", "teacher_weight", "teacher_bias")
    checks.layer_of_two_dimensions(*teacher, names)
    shape = student.input.shape[:-1]
    checks.shape(
        names.input, teacher.input[..., 0], shape, "without its last dimension, as input has"
    )
    classes, of_teacher = (len(layer.linear_weight) for layer in (student, teacher))
    if classes != of_teacher:
        raise ValueError(
            f"{names.linear_weight} must have {classes} classes, as linear_weight has, "
            f"got {of_teacher}"
        )
    if mask is not None:
        checks.mask(mask, shape)
