"""Evaluate a trained classifier: accuracy, loss, calibration, and rates of each class.

    torch-softmax evaluate runs/short --dataset kmnist --json > evaluation.json

Each number but the calibration error comes with a 95 % interval. A number without meaning, such as
the precision of a class that was never predicted, is `undefined`, and null in JSON.
"""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from ..._command_line import Parser, table
from ..settings import DATASETS, NUM_CLASSES
from ._options import add_data_dir_option, add_run_argument

if TYPE_CHECKING:
    from ...modules import SoftmaxRegression
    from ..data import ImageDataset
    from ..metrics import Estimate

RATES = ("precision", "recall", "F1")  # of each class


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command `evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="test a trained classifier, with 95%% intervals",
        description="Test a trained classifier: accuracy, loss, calibration, and of each class\n"
        "precision, recall and F1, with 95% intervals.",
        example="torch-softmax evaluate runs/short",
    )
    add_run_argument(parser)
    parser.add_argument(
        "--dataset",
        choices=DATASETS[1:],
        help="the data set whose test images are taken (default: the one it was trained on)",
    )
    add_data_dir_option(parser, default=None)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> None:
    """Load the classifier and the data, and print the result."""
    from ..checkpoints import load_checkpoint

    checkpoint = load_checkpoint(args.run_dir)
    data = checkpoint.load_data(args.data_dir, args.dataset)
    results = estimate(checkpoint.build_model(), data.test)
    if args.json:
        heading = {"checkpoint": str(args.run_dir), "dataset": data.name, "images": len(data.test)}
        # Python would write nan, which is not JSON.
        print(json.dumps(heading | to_json(results), indent=2, allow_nan=False))
    else:
        print(f"{args.run_dir} on the {len(data.test):,} test images of {data.name}\n")
        print(report(results))


class Results(NamedTuple):
    """The number of images of each class, the estimates by name, and the calibration error."""

    images: list[int]
    estimates: "dict[str, Estimate]"
    calibration_error: float


def estimate(model: "SoftmaxRegression", test: "ImageDataset") -> Results:
    """Estimate everything from the predictions for some examples."""
    import torch

    from ...functional import cross_entropy, softmax
    from .. import metrics

    images, labels = test[torch.arange(len(test))]
    with torch.no_grad():
        logits = model(images)
    confusion = metrics.confusion_matrix(labels, logits.argmax(1), NUM_CLASSES)
    loss = metrics.mean(cross_entropy(logits, labels, reduction="none"))
    error = metrics.calibration_curve(softmax(logits), labels).error.item()
    return Results(confusion.sum(1).tolist(), {**metrics.rates(confusion), "loss": loss}, error)


def to_json(results: Results) -> dict[str, Any]:
    """Return the numbers as JSON can hold them, with how their intervals were made."""
    from ..metrics import CALIBRATION_BINS

    estimates = results.estimates
    methods = dict.fromkeys(("accuracy", "precision", "recall"), "Wilson")
    return {
        "accuracy": numbers(estimates["accuracy"]),
        "loss": numbers(estimates["loss"]),
        "expected_calibration_error": results.calibration_error,
        "calibration_bins": CALIBRATION_BINS,
        "classes": [
            {"class": k, "images": n, **{name: numbers(estimates[name], k) for name in RATES}}
            for k, n in enumerate(results.images)
        ],
        "interval": {
            "level": 0.95,
            "methods": {**methods, "F1": "Wilson of F1 / (2 - F1)", "loss": "normal"},
        },
    }


def numbers(estimate: "Estimate", *index: int) -> dict[str, float | None]:
    """Return value, low and high of an estimate by name, None for nan."""
    values = {name: float(value[index]) for name, value in estimate._asdict().items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def report(results: Results) -> str:
    """Return the numbers as lines of at most 80 columns."""
    from ..metrics import CALIBRATION_BINS

    estimates = results.estimates
    overall = [
        ("accuracy, %", text(estimates["accuracy"], "7.2f", 100)),
        ("loss", text(estimates["loss"], "7.4f")),
        ("calibration error, %", f"{100 * results.calibration_error:.2f}"),
    ]
    rows = [("class", "images", *(f"{name}, %" for name in RATES))]
    for k, n in enumerate(results.images):
        rates = (text(estimates[name], "5.1f", 100, k) for name in RATES)
        rows.append((str(k), f"{n:,}", *rates))
    return (
        f"{table(overall)}\n\n{table(rows)}\n\n"
        "In brackets: 95% intervals, Wilson's for rates and normal for the loss. The\n"
        f"calibration error is of the likeliest class, in {CALIBRATION_BINS} bins of equal width."
    )


def text(estimate: "Estimate", form: str, scale: float = 1, *index: int) -> str:
    """Return an estimate with its interval, as in ` 92.6 [ 92.1,  93.1]`."""
    value, low, high = (f"{scale * float(part[index]):{form}}" for part in estimate)
    return "undefined" if value.strip() == "nan" else f"{value} [{low}, {high}]"
