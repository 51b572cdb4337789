"""The parsers of the commands, apart from what they run, so that --help needs no torch."""

import argparse
from dataclasses import fields
from pathlib import Path

from ..._command_line import Parser, add_device_option
from ..settings import DEFAULTS, SCHEDULES, UNITS, Settings
from ._options import add_data_options, add_run_argument, add_run_data_dir_option

EXPORT_FORMATS = ("pt2", "onnx")

Commands = argparse._SubParsersAction  # of a Parser, which is that of all commands


def add_train(commands: "Commands[Parser]") -> None:
    """Train from the beginning."""
    parser = commands.add_parser(
        "train",
        help="train on MNIST, or a data set like it, and test",
        description="Train softmax regression by gradient descent on batches, or by Newton's "
        "method, and test it.",
        epilog=defaults_table(),
        example="torch-softmax train --dataset mnist --epochs 10 --output-dir runs/short",
    )
    add_data_options(parser)
    # What is not given stays out of the result, for the data set's own default to stand.
    training = parser.add_argument_group("training", argument_default=argparse.SUPPRESS)
    training.add_argument(
        "--optimizer",
        choices=tuple(UNITS),
        help="sgd (the default) goes from batch to batch; newton, with L2, to the optimum",
    )
    training.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="passes over the training set, or Newton steps at the most",
    )
    training.add_argument("--batch-size", type=int, metavar="N", help="examples for one update")
    training.add_argument("--lr", type=float, metavar="X", help="learning rate at the start")
    training.add_argument(
        "--schedule", choices=tuple(SCHEDULES), help="how the learning rate goes on"
    )
    training.add_argument(
        "--weight-decay", type=float, metavar="X", help="pull of the weights towards 0"
    )
    training.add_argument(
        "--seed", type=int, metavar="N", help="of the first weights and the order of the examples"
    )
    add_device_option(parser)
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="the directory of the run, which must not hold another "
        "(default: a new runs/DATASET-DATE-TIME)",
    )


def add_resume(commands: "Commands[Parser]") -> None:
    """Go on with a training."""
    parser = commands.add_parser(
        "resume",
        help="go on with a training that was interrupted",
        description="Go on with a training that was interrupted, with its data set and settings, "
        "to the same weights as if it had not been.",
        example="torch-softmax resume runs/short",
    )
    add_run_argument(parser)
    parser.add_argument(
        "--epochs",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="more than were meant at first, where no schedule depends on them",
    )
    add_run_data_dir_option(parser)
    add_device_option(parser)


def add_export(commands: "Commands[Parser]") -> None:
    """Export a trained classifier."""
    parser = commands.add_parser(
        "export",
        help="write a trained classifier for use without this package",
        description="Export a trained classifier for use without this package. It takes pixels, "
        "float32 of shape (batch, D) from 0 to 1, and returns probabilities, float32 of shape "
        "(batch, classes), for any batch size.",
        example="torch-softmax export runs/short --output digits.pt2",
    )
    add_run_argument(parser)
    parser.add_argument(
        "--format",
        choices=EXPORT_FORMATS,
        help="pt2 is for torch.export.load; onnx needs the extra [onnx] "
        "(default: what --output ends in, else pt2)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where it goes, replacing any that is there (default: beside the checkpoint)",
    )


def defaults_table() -> str:
    """The training defaults of each data set."""
    names = [field.name for field in fields(Settings) if field.name != "optimizer"]
    rows = [["", *(f"--{name.replace('_', '-')}" for name in names)]]
    rows += [
        [dataset, *(str(getattr(settings, name)) for name in names)]
        for dataset, settings in DEFAULTS.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    of_newton = "newton: --epochs 100, --weight-decay 1/N, and no batches, rate or schedule"
    return "\n  ".join(["training defaults of sgd:", *table]) + f"\n\n{of_newton}"
