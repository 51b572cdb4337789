"""The training loop, written out: settings, batch update, epoch and evaluation."""

import math
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _checks as checks
from .data_parallel import Ranks
from .modules import SoftmaxRegression

ALONE = Ranks()
REPORT_EVERY = 50  # batches; each report waits for the device to catch up


def constant(progress: float) -> float:
    """The factor 1 at any progress from 0 to 1."""
    return 1.0


def cosine(progress: float) -> float:
    """The factor ½(1 + cos π·progress), which falls from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


OPTIMIZERS = ("sgd", "newton")
OF_SGD = ("batch_size", "lr", "schedule")  # the settings that Newton's method has no use for
SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine}


@dataclass(frozen=True)
class Settings:
    """What decides a run, together with the data; `DEFAULTS` has one for each data set.

    Args:
        optimizer: 'sgd', gradient descent on batches, or 'newton', which sees all examples at
            each step and has no use for batch_size, lr and schedule.
        epochs: passes over the training set, or Newton steps at the most.
        batch_size: examples for one update.
        lr: the learning rate before the schedule's factor.
        schedule: 'constant' or 'cosine'.
        weight_decay: λ of the penalty λ/2 ‖W‖², the factor of the weights in the gradient.
        seed: of the initial weights and of the order of the examples.

    Raises:
        ValueError: if a number is out of its range or the schedule unknown.
    """

    optimizer: str = "sgd"
    epochs: int = 25
    batch_size: int = 256
    lr: float = 1.5
    schedule: str = "cosine"
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks.one_of("optimizer", self.optimizer, OPTIMIZERS)
        checks.positive("epochs", self.epochs)
        checks.positive("batch_size", self.batch_size)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a finite number above 0, got {self.lr}")
        checks.one_of("schedule", self.schedule, tuple(SCHEDULES))
        _check_not_negative("weight_decay", self.weight_decay)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")

    def used(self) -> dict[str, Any]:
        """Return the settings that the optimizer has a use for, by name."""
        unused = OF_SGD if self.optimizer == "newton" else ()
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def learning_rate(self, epochs_done: float) -> float:
        """Return the learning rate after a number of epochs, fractions included."""
        return self.lr * SCHEDULES[self.schedule](epochs_done / self.epochs)


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")


# Chosen without any test set. MNIST: on the last 10,000 training images, held out, the fastest of
# those within the noise of the best accuracy, among batches of 128, 256 and 512, 20 to 80 epochs,
# learning rates from 0.25 to 4 and weight decays of 0, 1e-5 and 1e-4. The digits: the best on a
# random fifth of the training examples. The other two were not tried out: they are MNIST's, with
# the learning rate divided by how much larger their mean squared pixel is, as it sets how steep
# the loss can be.
DEFAULTS = {
    "mnist": Settings(),
    "fashion-mnist": Settings(lr=0.75),
    "kmnist": Settings(lr=1.0),
    "digits": Settings(epochs=100, batch_size=32, lr=1.0),
}


def newton_defaults(examples: int) -> Settings:
    """The settings of Newton's method for a number of examples: λ = 1/N, scikit-learn's C = 1."""
    return Settings(optimizer="newton", epochs=100, weight_decay=1 / examples)


class Batches(Sized, Iterable[tuple[Tensor, Tensor]], Protocol):
    """Batches of (input, target), with their number: a DataLoader or a list."""


class Score(NamedTuple):
    """The mean loss and the fraction of right predictions over some examples."""

    loss: float
    accuracy: float


@dataclass
class Tally:
    """Sums over the batches done; they stay on their device until the score is asked for.

    Args:
        batches, examples: how many were counted.
        loss_sum: over these examples.
        right: how many of them were predicted right.
        seconds: what the batches took.
    """

    batches: int = 0
    examples: int = 0
    loss_sum: Tensor | float = 0.0
    right: Tensor | int = 0
    seconds: float = 0.0

    def add(self, mean_loss: Tensor, right: Tensor | int, examples: Tensor | int) -> None:
        """Count a batch."""
        self.batches += 1
        self.examples += int(examples)
        self.loss_sum = self.loss_sum + mean_loss * examples
        self.right = self.right + right

    def score(self) -> Score:
        """The score so far, of at least one batch."""
        return Score(float(self.loss_sum) / self.examples, int(self.right) / self.examples)

    def on_cpu(self) -> "Tally":
        """The same sums as plain numbers, which lose nothing."""
        return replace(self, loss_sum=float(self.loss_sum), right=int(self.right))


class DivergenceError(RuntimeError):
    """Training that left the finite numbers; the message says what to lower."""


def batch_update(
    model: SoftmaxRegression,
    input: Tensor,
    target: Tensor,
    lr: float,
    weight_decay: float = 0.0,
    ranks: Ranks = ALONE,
) -> Tensor:
    r"""Take one step of gradient descent on the mean loss of a batch, in place.

    .. math::
        w \leftarrow w - \alpha \Big(\frac{1}{B} \sum_i x_i (S(z_i) - y_i)^T + \lambda w\Big),
        \qquad b \leftarrow b - \alpha \frac{1}{B} \sum_i (S(z_i) - y_i)

    Args:
        model: its weight w and bias b are updated; the bias does not decay.
        input: x, floating point of shape (B, in_features).
        target: y, int64 class indices of shape (B,) or probabilities of shape (B, num_classes).
        lr: α, at least 0.
        weight_decay: λ, at least 0.
        ranks: the processes that share the batch, of which each has its part in x and y: they take
            the step for the whole batch together, a mean over all targets that are not ignored.

    Returns:
        The mean loss before the step, without a gradient and not yet waited for.

    Raises:
        ValueError: if lr or weight_decay is negative or not finite.

    Example:
        >>> model = SoftmaxRegression(2, 3)
        >>> input, target = torch.eye(2), torch.tensor([0, 2])
        >>> before = batch_update(model, input, target, lr=0.5)
        >>> bool(model.loss(input, target) < before)
        True
    """
    _check_not_negative("lr", lr)
    _check_not_negative("weight_decay", weight_decay)
    parameters = tuple(model.parameters())
    loss = model.loss(input, target)
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        loss, *averages = ranks.mean(_count(target), loss.detach(), *gradients)
        for parameter, gradient in zip(parameters, averages, strict=True):
            if parameter is model.weight and weight_decay > 0:
                gradient = gradient.add(parameter, alpha=weight_decay)
            parameter.sub_(gradient, alpha=lr)
    return loss


def _count(target: Tensor) -> Tensor:
    """How many targets count in the mean loss."""
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
        model: is updated in place.
        batches: (input, target) as `batch_update` takes them, on the model's device.
        settings: the learning rate with its schedule, and the weight decay.
        epoch: the number of epochs done before this one.
        tally: counts the batches, in place; those that it has counted already are left out.
        report: is called with the tally now and then, and after the last batch.
        stop: is asked after each batch whether to leave the rest for later; the ranks do so
            together.
        ranks: the processes that share each batch, of which `batches` has this one's part.

    Returns:
        The score of each batch just before its update, over all that the tally has counted.

    Raises:
        ValueError: if the tally has counted as many batches as there are.
        DivergenceError: if the loss or a weight is no longer finite.
    """
    tally = tally or Tally()
    if tally.batches >= len(batches):
        raise ValueError(f"tally must be of less than {len(batches)} batches, got {tally.batches}")
    start = time.perf_counter()
    for input, target in islice(batches, tally.batches, None):
        lr = settings.learning_rate(epoch + tally.batches / len(batches))
        with torch.no_grad():
            hits = (model.predict(input) == target).sum()
        loss = batch_update(model, input, target, lr, settings.weight_decay, ranks)
        tally.add(loss, *ranks.total(hits, len(target)))
        if (tally.batches - 1) % REPORT_EVERY == 0 or tally.batches == len(batches):
            _finite(tally.score(), settings)
            report(tally)
        if any(ranks.total(stop())):
            break
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise _diverged("a weight", settings)
    score = _finite(tally.score(), settings)
    tally.seconds += time.perf_counter() - start
    return score


def _finite(score: Score, settings: Settings) -> Score:
    if not math.isfinite(score.loss):
        raise _diverged("the loss", settings)
    return score


def _diverged(what: str, settings: Settings) -> DivergenceError:
    return DivergenceError(
        f"{what} is no longer a finite number: lower lr, which was {settings.lr}"
    )


@torch.no_grad()
def evaluate(model: SoftmaxRegression, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Return the score of a model over batches of (input, target), all examples counting alike."""
    tally = Tally()
    for input, target in batches:
        right = (model.predict(input) == target).sum()
        tally.add(model.loss(input, target), right, len(target))
    return tally.score()
