"""The optimum for each of many penalties, each begun where the one before has come to."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ..distributed.data_parallel import Ranks
from ..modules import SoftmaxRegression
from ._descent import Descent, Goal
from ._rows import Rows
from .newton import ALONE, Data, Result, begin, goal_of, run

__all__ = ["Fitted", "penalty_path"]


class Fitted(NamedTuple):
    """A model at the optimum for one penalty, and how far it has come there."""

    weight_decay: float
    model: SoftmaxRegression
    result: Result


def penalty_path(
    model: SoftmaxRegression,
    input: Tensor | Rows,
    target: Tensor,
    weight_decays: Iterable[float],
    *,
    sample_weight: Tensor | None = None,
    tolerance: float = 1e-4,
    weight_tolerance: float | None = None,
    max_steps: int = 100,
    report: Callable[[Result], None] = lambda result: None,
    ranks: Ranks = ALONE,
) -> Iterator[Fitted]:
    """Fit a model for each of some penalties, from the strongest to the weakest.

    Every fit begins at the optimum of the penalty before.

    Args:
        model: Where the first one begins; it is left as it is.
        input: As `newton.minimize` takes it, and all arguments that have a name in common.
        target: Class indices or probabilities.
        weight_decays: λ of each, in any order.
        sample_weight: The weight of each example.
        tolerance: The gradient norm to reach at each λ.
        weight_tolerance: The distance to each optimum to reach besides.
        max_steps: The Newton steps to give up after at each λ.
        report: Is called with the result so far after every step.
        ranks: The processes that each hold some of the examples.

    Returns:
        An iterator that fits as it goes: each λ with a model of its own, and the result, in
        falling order of λ.

    Raises:
        TypeError, ValueError: As `newton.minimize` does, and if there is no λ.

    Example:
        >>> input = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> target = torch.tensor([0, 1, 0, 1])
        >>> for fitted in penalty_path(SoftmaxRegression(1, 2), input, target, [0.01, 1.0]):
        ...     print(f"{fitted.weight_decay:.2f} {fitted.result.loss:.4f}")
        1.00 0.6306
        0.01 0.5869
    """
    penalties = sorted((checks.number("weight_decays", w) for w in weight_decays), reverse=True)
    if not penalties:
        raise ValueError("weight_decays must hold at least one number, got none")
    for weight_decay in penalties:
        checks.finite("weight_decays", weight_decay)
    goal = goal_of(tolerance, weight_tolerance, max_steps)
    with torch.no_grad():
        descent = begin(model, Data(input, target, sample_weight, ranks), penalties[0])
    return _along(penalties, descent, model, goal, report)


@torch.no_grad()
def _along(
    penalties: list[float],
    descent: Descent,
    model: SoftmaxRegression,
    goal: Goal,
    report: Callable[[Result], None],
) -> Iterator[Fitted]:
    for weight_decay in penalties:
        descent.change_decay(weight_decay)
        fitted = copy.deepcopy(model)
        result = run(descent, fitted, goal, report)
        yield Fitted(weight_decay, fitted, result)
