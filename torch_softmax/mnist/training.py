"""The training loop, written out: batch update, epoch and evaluation."""

import math
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import _checks as checks
from .._checks import UserError
from ..distributed.data_parallel import Ranks
from ..modules import SoftmaxRegression
from .settings import Settings

ALONE = Ranks()
REPORT_EVERY = 50  # batches; each report waits for the device to catch up


class Batches(Sized, Iterable[tuple[Tensor, Tensor]], Protocol):
    """Batches of (input, target), such as a DataLoader or a list."""


class Score(NamedTuple):
    """The mean loss and the fraction of right predictions over some examples."""

    loss: float
    accuracy: float


@dataclass
class Tally:
    """Sums over the batches done, on their device until the score is needed."""

    batches: int = 0
    examples: int = 0
    loss_sum: Tensor | float = 0.0  # over the examples
    right: Tensor | int = 0  # correct predictions
    seconds: float = 0.0

    def add(self, mean_loss: Tensor, right: Tensor | int, examples: Tensor | int) -> None:
        """Count a batch."""
        self.batches += 1
        self.examples += int(examples)
        self.loss_sum = self.loss_sum + mean_loss * examples
        self.right = self.right + right

    def score(self) -> Score:
        """Return the score so far, of at least one batch."""
        return Score(float(self.loss_sum) / self.examples, int(self.right) / self.examples)

    def on_cpu(self) -> "Tally":
        """Return the sums as plain numbers, which are exact."""
        return replace(self, loss_sum=float(self.loss_sum), right=int(self.right))


class Update(NamedTuple):
    """The result of a batch before its update."""

    loss: Tensor  # the mean, a scalar without a gradient
    predicted: Tensor  # the class of each input, (B,)


class DivergenceError(UserError):
    """Training that left the finite numbers; the message says what to lower."""


def batch_update(
    model: SoftmaxRegression,
    input: Tensor,
    target: Tensor,
    lr: float,
    weight_decay: float = 0.0,
    ranks: Ranks = ALONE,
) -> Update:
    """Take one step of gradient descent on the mean loss of a batch, in place.

    w ← w − α (1/B Σ_i (S(z_i) − y_i) x_iᵀ + λ w),  b ← b − α 1/B Σ_i (S(z_i) − y_i)

    Args:
        model: Its weight w and bias b are updated; the bias does not decay.
        input: x, floating point of shape (B, in_features).
        target: y, int64 class indices of shape (B,) or probabilities of shape (B, num_classes).
        lr: α, finite and at least 0.
        weight_decay: λ, finite and at least 0.
        ranks: The processes that share the batch, each with its part in x and y; the loss is the
            mean over all their targets that are not ignored.

    Example:
        >>> model = SoftmaxRegression(2, 3)
        >>> input, target = torch.eye(2), torch.tensor([0, 2])
        >>> before = batch_update(model, input, target, lr=0.5)
        >>> bool(model.loss(input, target) < before.loss)
        True
    """
    checks.finite("lr", lr)
    checks.finite("weight_decay", weight_decay)
    loss, predicted = model.loss_and_predicted(input, target)
    parameters = [model.weight] if model.bias is None else [model.weight, model.bias]
    gradients: Sequence[Tensor] = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        loss = loss.detach()
        if ranks.size > 1:
            loss, *gradients = ranks.mean(_count(target), loss, *gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter is model.weight and weight_decay > 0:
                gradient = gradient.add(parameter, alpha=weight_decay)
            parameter.sub_(gradient, alpha=lr)
    return Update(loss, predicted)


def _count(target: Tensor) -> Tensor:
    """Return how many targets count in the mean loss."""
    if target.is_floating_point():
        return torch.tensor(len(target), device=target.device)
    return (target != -100).sum()


def train_epoch(
    model: SoftmaxRegression,
    batches: Batches,
    settings: Settings,
    epoch: int,
    tally: Tally | None = None,
    report: Callable[[Tally], None] = lambda tally: None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> Score:
    """Update the model with each batch in turn.

    Args:
        model: Is updated in place.
        batches: (input, target) as in `batch_update`, on the model's device.
        settings: The learning rate with its schedule, and the weight decay.
        epoch: The number of epochs done before this one.
        tally: Counts the batches, in place; batches that it has counted already are skipped.
        report: Is called with the tally now and then, and after the last batch.
        stop: Is called after each batch; if it is true on any rank, all ranks stop.
        ranks: The processes that share each batch, of which `batches` has this one's part.

    Returns:
        The score of each batch just before its update, over all that the tally has counted.

    Raises:
        DivergenceError: The loss or a weight is no longer finite.
    """
    tally = tally or Tally()
    if tally.batches >= len(batches):
        raise ValueError(f"tally must be of less than {len(batches)} batches, got {tally.batches}")
    start = time.perf_counter()
    for input, target in islice(batches, tally.batches, None):
        lr = settings.learning_rate(epoch + tally.batches / len(batches))
        loss, predicted = batch_update(model, input, target, lr, settings.weight_decay, ranks)
        right = (predicted == target).sum()
        tally.add(loss, *ranks.total(right, len(target)))
        if (tally.batches - 1) % REPORT_EVERY == 0 or tally.batches == len(batches):
            _check_finite("the loss", math.isfinite(tally.score().loss), settings.lr)
            report(tally)
        if any(ranks.total(stop())):
            break
    is_finite = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    _check_finite("a weight", is_finite, settings.lr)
    score = tally.score()
    _check_finite("the loss", math.isfinite(score.loss), settings.lr)
    tally.seconds += time.perf_counter() - start
    return score


def _check_finite(what: str, is_finite: bool, lr: float) -> None:
    if not is_finite:
        raise DivergenceError(f"{what} is no longer a finite number: lower lr, which was {lr}")


@torch.no_grad()
def evaluate(model: SoftmaxRegression, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Return the score of a model over all examples in batches of (input, target)."""
    tally = Tally()
    for input, target in batches:
        loss, predicted = model.loss_and_predicted(input, target)
        tally.add(loss, (predicted == target).sum(), len(target))
    return tally.score()
