"""Test a trained classifier: how often it is right, class by class, and whether it knows it.

    torch-softmax evaluate runs/short
    torch-softmax evaluate runs/short --dataset kmnist --json > evaluation.json

Each number comes with a 95 % interval: what it could be on other examples of the same kind, for
this classifier. A number without meaning, such as the precision of a class that was never
predicted, is `undefined`, and null in JSON.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...functional import cross_entropy, softmax
from ...modules import SoftmaxRegression
from .. import metrics
from ..checkpoints import load_checkpoint
from ..data import ImageDataset
from ..metrics import CALIBRATION_BINS, RESAMPLES, Estimate
from ..settings import NUM_CLASSES

RATES = {"precision": metrics.precision, "recall": metrics.recall, "F1": metrics.f1_score}
METHODS = {
    "accuracy": "Wilson",
    "loss": "normal",
    "expected_calibration_error": f"bootstrap, {RESAMPLES} resamples",
    "precision": "Wilson",
    "recall": "Wilson",
    "F1": "Wilson of F1 / (2 - F1)",
}
RATE_WIDTH = 20


@dataclass(frozen=True)
class Evaluation:
    """What is known of a classifier after a test; those by class are of shape (K,)."""

    images: torch.Tensor  # of each class
    overall: dict[str, Estimate]
    by_class: dict[str, Estimate]


def run(args: argparse.Namespace) -> None:
    """Load the classifier and the data, and print the result."""
    checkpoint = load_checkpoint(args.run_dir)
    data = checkpoint.load_data(args.data_dir, args.dataset)
    evaluation = evaluate(checkpoint.build_model(), data.test)
    heading = {"checkpoint": str(args.run_dir), "dataset": data.name, "images": len(data.test)}
    if args.json:
        # Python would write nan, which is not JSON.
        print(json.dumps(heading | to_json(evaluation), indent=2, allow_nan=False))
    else:
        print(f"{args.run_dir} on the {len(data.test):,} test images of {data.name}\n")
        print("\n".join(table(evaluation)))


@torch.no_grad()
def evaluate(model: SoftmaxRegression, test: ImageDataset) -> Evaluation:
    """Estimate everything from the predictions for some examples."""
    images, labels = test[torch.arange(len(test))]
    logits = model(images)
    probabilities = softmax(logits)
    confusion = metrics.confusion_matrix(labels, logits.argmax(1), NUM_CLASSES)
    overall = {
        "accuracy": metrics.accuracy(confusion),
        "loss": metrics.mean(cross_entropy(logits, labels, reduction="none")),
        "expected_calibration_error": metrics.estimate_calibration_error(probabilities, labels),
    }
    by_class = {name: rate(confusion) for name, rate in RATES.items()}
    return Evaluation(confusion.sum(1), overall, by_class)


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """The numbers as JSON can hold them, with how their intervals were made."""
    classes = [
        {
            "class": k,
            "images": int(images),
            **{name: numbers(rate, k) for name, rate in evaluation.by_class.items()},
        }
        for k, images in enumerate(evaluation.images)
    ]
    return {
        **{name: numbers(estimate) for name, estimate in evaluation.overall.items()},
        "classes": classes,
        "calibration_bins": CALIBRATION_BINS,
        "interval": {"level": 0.95, "methods": METHODS},
    }


def numbers(estimate: Estimate, *index: int) -> dict[str, float | None]:
    """An estimate as numbers by name, None where there is none."""
    values = {name: float(value[index]) for name, value in estimate._asdict().items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def table(evaluation: Evaluation) -> Iterator[str]:
    """The numbers as lines of at most 80 columns."""
    overall = evaluation.overall
    yield f"accuracy, %           {percent(overall['accuracy'], digits=2)}"
    yield f"calibration error, %  {percent(overall['expected_calibration_error'], digits=2)}"
    yield f"loss                  {text(overall['loss'], '.4f')}"
    yield ""
    yield row("class", "images", *(f"{name}, %" for name in evaluation.by_class))
    for k, images in enumerate(evaluation.images):
        rates = (Estimate(*(part[k] for part in rate)) for rate in evaluation.by_class.values())
        yield row(str(k), f"{int(images):,}", *map(percent, rates))
    yield ""
    yield "In brackets: 95% intervals, which are Wilson's for accuracy, precision, recall"
    yield f"and F1, normal for the loss, and by {RESAMPLES:,} bootstrap resamples for the"
    yield f"calibration error (ECE of the likeliest class, {CALIBRATION_BINS} bins of equal width)."


def row(name: str, images: str, *rates: str) -> str:
    """A line of the table."""
    return f"{name:<5} {images:>7}" + "".join(f"  {rate:>{RATE_WIDTH}}" for rate in rates)


def percent(rate: Estimate, digits: int = 1) -> str:
    """A rate and its interval, as in ` 92.6 [ 92.1,  93.1]`."""
    return text(Estimate(*(100 * part for part in rate)), f"{digits + 4}.{digits}f")


def text(estimate: Estimate, form: str) -> str:
    """An estimate with its interval, in a format of numbers."""
    if estimate.value.isnan():
        return "undefined"
    value, low, high = (f"{part:{form}}" for part in estimate)
    return f"{value} [{low}, {high}]"
