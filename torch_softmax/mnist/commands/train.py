"""Train softmax regression on MNIST, or a data set like it, from the command line."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..._command_line import (
    Parser,
    add_device_option,
    choose_device,
    run_command,
    stop_on_interrupt,
)
from ..._torchrun import launcher, one_voice
from ...distributed.data_parallel import Ranks, join_ranks
from ...optim import newton
from ..checkpoints import CHECKPOINT_NAME, Checkpoint
from ..data import ImageDataset, batch_loader
from ..settings import DEFAULTS, SCHEDULES, UNITS, Settings
from ..training import DivergenceError, Score, Tally, evaluate, train_epoch
from ._options import add_data_options
from ._runs import METRICS_NAME, Run, new_run, resumed_run, save, write_metrics

EVALUATION_BATCH = 2000


def build_parser() -> Parser:
    """The options, with their help."""
    parser = Parser(
        prog="train_mnist.py",
        description="Train softmax regression by gradient descent on batches, or by Newton's "
        "method, and test it.",
        epilog=defaults_table(),
        example="python train_mnist.py --dataset mnist --epochs 10 --output-dir runs/short",
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
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help=f"where {CHECKPOINT_NAME} and {METRICS_NAME} go, which must not be there yet "
        "(default: a new runs/DATASET-DATE-TIME)",
    )
    place.add_argument(
        "--resume",
        type=Path,
        metavar="RUN_DIR",
        help="go on with a run that was interrupted, with its data set and settings, to the same "
        "weights as if it had not been",
    )
    return parser


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser()
    with one_voice():
        args = parser.parse_args(argv)
        return run_command(parser, lambda: train_and_test(args))


def train_and_test(args: argparse.Namespace) -> None:
    """Begin a run or go on with one, in this process or all that torchrun has started."""
    device = choose_device(args.device)
    with join_ranks(device) as ranks:
        with ranks.first_ahead():
            run = new_run(args, ranks) if args.resume is None else resumed_run(args, ranks)
        train_and_test_run(run, args, device, ranks)


def train_and_test_run(
    run: Run, args: argparse.Namespace, device: torch.device, ranks: Ranks
) -> None:
    """Train, test and save."""
    is_newton = run.checkpoint.settings.optimizer == "newton"
    if not is_newton and "OMP_NUM_THREADS" not in os.environ:
        # A batch is too little work to share: a second thread gains a fifth on an idle machine, and
        # waiting for it, when another process holds its core, can make the run ten times as long.
        torch.set_num_threads(1)
    data = run.data
    print(
        f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images, "
        f"{data.train.images.shape[1]} pixels, on {device.type}"
    )
    try:
        examples = data.train.to(device)
        if is_newton:
            finished = train_by_newton(run.checkpoint, examples, run.directory, ranks)
        else:
            finished = train(run.checkpoint, examples, run.directory, ranks)
        if run.directory is None:
            return
        model = finished.build_model(device)
        test = evaluate(model, batch_loader(data.test.to(device), EVALUATION_BATCH))
        write_metrics(run.directory / METRICS_NAME, finished, test, device)
    except KeyboardInterrupt:
        advice = f"; go on with: {resume_command(args, run.directory)}" if run.directory else ""
        raise KeyboardInterrupt(f"interrupted{advice}") from None
    print(f"saved {run.directory / CHECKPOINT_NAME} and {run.directory / METRICS_NAME}")


def resume_command(args: argparse.Namespace, directory: Path) -> str:
    """What to type to go on with a run, on the same data and device."""
    command = [*launcher(), "train_mnist.py", "--resume", str(directory)]
    parser = build_parser()
    for name in ("data_dir", "device"):
        value = getattr(args, name)
        if value != parser.get_default(name):
            command += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(command)


def train(
    checkpoint: Checkpoint, examples: ImageDataset, directory: Path | None, ranks: Ranks
) -> Checkpoint:
    """Train from a checkpoint on, save and print a line epoch by epoch; return the last one.

    Ctrl-C is raised once the batch at work has come to its end and what was done is saved.
    """
    settings = checkpoint.settings
    model = checkpoint.build_model(examples.images.device)
    generator = torch.Generator()
    batches = batch_loader(examples, settings.batch_size, generator, ranks)

    is_patient = ranks.size > 1
    with (
        progress_bar(checkpoint, len(batches), ranks) as show,
        stop_on_interrupt(is_patient) as stop,
    ):
        while checkpoint.epoch < settings.epochs:
            epoch, tally = checkpoint.epoch, replace(checkpoint.tally)
            generator.set_state(checkpoint.generator_state)
            try:
                report = partial(show, epoch)
                train_epoch(model, batches, settings, epoch, tally, report, stop, ranks)
            except DivergenceError as error:
                kept = ""
                if epoch > 0 and directory is not None:
                    kept = f"; {directory / CHECKPOINT_NAME} keeps epoch {epoch}"
                raise DivergenceError(f"in epoch {epoch + 1} {error}{kept}") from error
            is_whole = tally.batches == len(batches)
            if is_whole:
                checkpoint = checkpoint.after_epoch(model, tally.score(), tally.seconds, generator)
            else:
                checkpoint = checkpoint.after_batches(model, tally)
            with ranks.together():
                save(checkpoint, directory)
            if is_whole:
                tqdm.write(epoch_line(checkpoint))
            if not is_whole or any(ranks.total(stop())):
                raise KeyboardInterrupt
    return checkpoint


def train_by_newton(
    checkpoint: Checkpoint, examples: ImageDataset, directory: Path | None, ranks: Ranks
) -> Checkpoint:
    """Go to the optimum, save and print a line step by step; return the last one.

    Each rank holds its part of the examples.
    """
    settings = checkpoint.settings
    model = checkpoint.build_model(examples.images.device)
    input, target = examples[ranks.part(torch.arange(len(examples)))]
    start = time.perf_counter()
    disable = None if ranks.is_first else True

    with (
        tqdm(total=settings.epochs, unit="step", disable=disable) as bar,
        stop_on_interrupt(ranks.size > 1) as stop,
    ):

        def report(result: newton.Result) -> None:
            nonlocal checkpoint, start
            seconds = time.perf_counter() - start
            (right,) = ranks.total((model.predict(input) == target).sum())
            score = Score(result.loss, int(right) / len(examples))
            checkpoint = checkpoint.after_epoch(model, score, seconds)
            with ranks.together():
                save(checkpoint, directory)
            bar.update()
            tqdm.write(f"{epoch_line(checkpoint)}  gradient {result.gradient_norm:.1e}")
            if any(ranks.total(stop())):
                raise KeyboardInterrupt
            start = time.perf_counter()

        left = settings.epochs - checkpoint.epoch
        if left == 0:
            return checkpoint
        result = newton.minimize(
            model, input, target, settings.weight_decay, max_steps=left, report=report, ranks=ranks
        )
    if not result.converged:
        note = f"not converged: the gradient's norm is {result.gradient_norm:.1e}"
        tqdm.write(note, file=sys.stderr)
    return checkpoint


@contextmanager
def progress_bar(
    checkpoint: Checkpoint, batches: int, ranks: Ranks
) -> Iterator[Callable[[int, Tally], None]]:
    """A bar over all epochs, from where the run stands; yields the function that moves it on."""
    done = checkpoint.epoch * batches + checkpoint.tally.batches
    total = checkpoint.settings.epochs * batches
    disable = None if ranks.is_first else True
    with tqdm(initial=done, total=total, unit="batch", disable=disable) as bar:

        def show(epoch: int, tally: Tally) -> None:
            score = tally.score()
            bar.set_postfix(
                loss=f"{score.loss:.4f}", accuracy=f"{score.accuracy:.2%}", refresh=False
            )
            bar.update(epoch * batches + tally.batches - bar.n)

        yield show


def epoch_line(checkpoint: Checkpoint) -> str:
    """How the last epoch went."""
    epochs = checkpoint.settings.epochs
    last = checkpoint.history[-1]
    number = f"{checkpoint.epoch:>{len(str(epochs))}}/{epochs}"
    return (
        f"{UNITS[checkpoint.settings.optimizer]} {number}  loss {last['loss']:.4f}  "
        f"train accuracy {last['accuracy']:.2%}  {last['seconds']:.2f} s"
    )
