"""Evaluate a trained classifier: accuracy, loss, calibration, and rates of each class.

    torch-softmax evaluate runs/short
    torch-softmax evaluate runs/short --dataset kmnist --json > evaluation.json

Each number comes with a 95 % interval: the range it could have on other examples of the same kind,
for this classifier. A number without meaning, such as the precision of a class that was never
predicted, is `undefined`, and null in JSON.
"""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

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
    images, estimates = evaluate(checkpoint.build_model(), data.test)
    if args.json:
        heading = {"checkpoint": str(args.run_dir), "dataset": data.name, "images": len(data.test)}
        # Python would write nan, which is not JSON.
        print(json.dumps(heading | to_json(images, estimates), indent=2, allow_nan=False))
    else:
        print(f"{args.run_dir} on the {len(data.test):,} test images of {data.name}\n")
        print(report(images, estimates))


def evaluate(
    model: "SoftmaxRegression", test: "ImageDataset"
) -> tuple[list[int], dict[str, "Estimate"]]:
    """Return the number of images of each class, and every estimate by its name."""
    import torch

    from ...functional import cross_entropy, softmax
    from .. import metrics

    images, labels = test[torch.arange(len(test))]
    with torch.no_grad():
        logits = model(images)
    confusion = metrics.confusion_matrix(labels, logits.argmax(1), NUM_CLASSES)
    return confusion.sum(1).tolist(), {
        **metrics.rates(confusion),
        "loss": metrics.mean(cross_entropy(logits, labels, reduction="none")),
        "expected_calibration_error": metrics.estimate_calibration_error(softmax(logits), labels),
    }


def to_json(images: list[int], estimates: dict[str, "Estimate"]) -> dict[str, Any]:
    """Return the numbers as JSON can hold them, with how their intervals were made."""
    from ..metrics import CALIBRATION_BINS, RESAMPLES

    return {
        **{name: numbers(e) for name, e in estimates.items() if name not in RATES},
        "classes": [
            {"class": k, "images": n, **{name: numbers(estimates[name], k) for name in RATES}}
            for k, n in enumerate(images)
        ],
        "calibration_bins": CALIBRATION_BINS,
        "interval": {
            "level": 0.95,
            "methods": {
                **dict.fromkeys(("accuracy", "precision", "recall"), "Wilson"),
                "F1": "Wilson of F1 / (2 - F1)",
                "loss": "normal",
                "expected_calibration_error": f"bootstrap, {RESAMPLES} resamples",
            },
        },
    }


def numbers(estimate: "Estimate", *index: int) -> dict[str, float | None]:
    """Return value, low and high of an estimate by name, None for nan."""
    values = {name: float(value[index]) for name, value in estimate._asdict().items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def report(images: list[int], estimates: dict[str, "Estimate"]) -> str:
    """Return the numbers as lines of at most 80 columns."""
    from ..metrics import CALIBRATION_BINS, RESAMPLES

    overall = [
        ("accuracy, %", text(estimates["accuracy"], "7.2f", 100)),
        ("calibration error, %", text(estimates["expected_calibration_error"], "7.2f", 100)),
        ("loss", text(estimates["loss"], "7.4f")),
    ]
    rows = [("class", "images", *(f"{name}, %" for name in RATES))]
    for k, n in enumerate(images):
        rates = (text(estimates[name], "5.1f", 100, k) for name in RATES)
        rows.append((str(k), f"{n:,}", *rates))
    return (
        f"{table(overall)}\n\n{table(rows)}\n\n"
        "In brackets: 95% intervals, which are Wilson's for accuracy, precision, recall\n"
        f"and F1, normal for the loss, and by {RESAMPLES:,} bootstrap resamples for the\n"
        f"calibration error (ECE of the likeliest class, {CALIBRATION_BINS} bins of equal width)."
    )


def text(estimate: "Estimate", form: str, scale: float = 1, *index: int) -> str:
    """Return an estimate with its interval, as in ` 92.6 [ 92.1,  93.1]`."""
    value, low, high = (f"{scale * float(part[index]):{form}}" for part in estimate)
    return "undefined" if value.strip() == "nan" else f"{value} [{low}, {high}]"
