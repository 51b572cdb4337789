"""Train softmax regression on MNIST, or a data set like it, or go on with an interrupted run."""

import argparse
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._command_line import Parser, add_device_option, choose_device, table
from ..._torchrun import launcher
from ..settings import DEFAULTS, OF_SGD, SCHEDULES, UNITS, Settings, newton_defaults
from ._options import add_data_dir_option, add_data_options, add_run_argument

if TYPE_CHECKING:
    from ...distributed.data_parallel import Ranks
    from ..runs import Run

NUMBERS = (
    ("--epochs", int, "passes over the training set, or Newton steps at the most"),
    ("--batch-size", int, "examples for one update"),
    ("--lr", float, "learning rate at the start"),
    ("--weight-decay", float, "factor of the L2 penalty"),
    ("--seed", int, "of the initial weights and the order of the examples"),
)


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command `train`."""
    parser = commands.add_parser(
        "train",
        help="train on MNIST, or a data set like it, and test",
        description="Train softmax regression by gradient descent on batches, or by Newton's "
        "method, and test it.",
        epilog=defaults_table(),
        example="torch-softmax train --dataset mnist --epochs 10 --output-dir runs/short",
    )
    add_data_options(parser)
    # An option that is not given is not in the result, so that the data set's default stands.
    training = parser.add_argument_group("training", argument_default=argparse.SUPPRESS)
    training.add_argument(
        "--optimizer",
        choices=tuple(UNITS),
        help="sgd (the default) goes from batch to batch; newton, with L2, to the optimum",
    )
    training.add_argument("--schedule", choices=tuple(SCHEDULES), help="of the learning rate")
    for name, kind, text in NUMBERS:
        training.add_argument(name, type=kind, metavar="NX"[kind is float], help=text)
    add_device_option(parser)
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="the directory of the run, which must not hold another "
        "(default: a new runs/DATASET-DATE-TIME)",
    )


def defaults_table() -> str:
    """Return the training defaults of each data set."""
    names = [field.name for field in fields(Settings) if field.name != "optimizer"]
    rows = [["", *(f"--{name.replace('_', '-')}" for name in names)]]
    for dataset, settings in DEFAULTS.items():
        rows.append([dataset, *(str(getattr(settings, name)) for name in names)])
    lines = "\n  ".join(["training defaults of sgd:", *table(rows).splitlines()])
    return f"{lines}\n\nnewton: --epochs 100, --weight-decay 1/N, and no batches, rate or schedule"


def add_resume_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command `resume`."""
    parser = commands.add_parser(
        "resume",
        help="go on with a training that was interrupted",
        description="Go on with a training that was interrupted, with its data set and settings, "
        "to the same weights as without the interruption.",
        example="torch-softmax resume runs/short",
    )
    add_run_argument(parser)
    parser.add_argument(
        "--epochs",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="another number of epochs, if the schedule is constant",
    )
    add_data_dir_option(parser, default=None)
    add_device_option(parser)


def run(args: argparse.Namespace) -> None:
    """Begin a run or go on with one, in this process or all that torchrun has started."""
    from ...distributed.data_parallel import join_ranks
    from ..runs import train_and_test

    device = choose_device(args.device)
    with join_ranks(device) as ranks:
        with ranks.first_ahead():
            begin = resumed_run if args.command == "resume" else new_run
            begun = begin(args, ranks)
        try:
            train_and_test(begun, device, ranks)
        except KeyboardInterrupt:
            advice = ""
            if begun.directory is not None:
                advice = f"; go on with: {resume_command(args, begun.directory)}"
            raise KeyboardInterrupt(f"interrupted{advice}") from None


def new_run(args: argparse.Namespace, ranks: "Ranks") -> "Run":
    """Begin a run; settings that are not given are the data set's."""
    from ..checkpoints import CHECKPOINT_NAME, Checkpoint, save_checkpoint
    from ..data import load_dataset
    from ..runs import Run, check_unused, new_directory

    given = given_settings(args)
    is_newton = Settings(**given).optimizer == "newton"  # checked before any data are loaded
    for name in OF_SGD:
        if is_newton and name in given:
            raise ValueError(f"{name} must be left out for optimizer 'newton', got {given[name]!r}")
    if args.output_dir is not None and ranks.is_first:
        check_unused(args.output_dir)
    data = load_dataset(
        args.dataset, args.data_dir, notify=lambda line: print(line, file=sys.stderr)
    )
    defaults = newton_defaults(len(data.train)) if is_newton else DEFAULTS[data.name]
    checkpoint = Checkpoint.start(replace(defaults, **given), data)
    if not ranks.is_first:
        return Run(None, data, checkpoint)
    directory = args.output_dir or new_directory(data.name)
    save_checkpoint(directory / CHECKPOINT_NAME, checkpoint)
    return Run(directory, data, checkpoint)


def resumed_run(args: argparse.Namespace, ranks: "Ranks") -> "Run":
    """Go on with a run; settings that are given must not contradict it."""
    from ..checkpoints import CHECKPOINT_NAME, load_checkpoint, run_directory, save_checkpoint
    from ..runs import Run, check_writable

    directory = run_directory(args.run_dir)
    checkpoint = load_checkpoint(directory / CHECKPOINT_NAME)
    checkpoint = checkpoint.with_settings(**given_settings(args))
    check_writable(directory)
    data = checkpoint.load_data(args.data_dir)
    if data.data_dir != checkpoint.data_dir:
        checkpoint = replace(checkpoint, data_dir=data.data_dir)
        if ranks.is_first:
            save_checkpoint(directory / CHECKPOINT_NAME, checkpoint)
    batches = checkpoint.tally.batches
    print(
        f"going on with {directory} after epoch {checkpoint.epoch}"
        + (f" and {batches} batches" if batches else "")
    )
    return Run(directory if ranks.is_first else None, data, checkpoint)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line names."""
    names = [field.name for field in fields(Settings)]
    return {name: getattr(args, name) for name in names if name in args}


def resume_command(args: argparse.Namespace, directory: Path) -> str:
    """Return the command line that goes on with a run on the same device."""
    command = [*launcher(), "-m", "torch_softmax", "resume", str(directory)]
    if args.device != args.parser.get_default("device"):
        command += ["--device", args.device]
    return shlex.join(command)
