"""Train softmax regression on MNIST, or a data set like it, from the command line."""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import fields, replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from torch_softmax import __version__, newton
from torch_softmax._command_line import (
    Parser,
    add_data_options,
    add_device_option,
    choose_device,
    run_command,
    stop_on_interrupt,
)
from torch_softmax.checkpoints import (
    CHECKPOINT_NAME,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from torch_softmax.data import ImageDataset, TrainTest, batch_loader, load_dataset
from torch_softmax.data_parallel import Ranks, join_ranks
from torch_softmax.training import (
    DEFAULTS,
    OF_SGD,
    OPTIMIZERS,
    SCHEDULES,
    DivergenceError,
    Score,
    Settings,
    Tally,
    evaluate,
    newton_defaults,
    train_epoch,
)

EVALUATION_BATCH = 2000
METRICS_NAME = "metrics.json"


class Run(NamedTuple):
    """Where a run writes to, the data, and the state from which it goes on.

    Of several processes only the first has a directory, and writes.
    """

    directory: Path | None
    data: TrainTest
    checkpoint: Checkpoint


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
        choices=OPTIMIZERS,
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
    args = parser.parse_args(argv)
    return run_command(parser, lambda: train_and_test(args))


def train_and_test(args: argparse.Namespace) -> None:
    """Begin a run or go on with one, in this process or all that torchrun has started."""
    device = choose_device(args.device)
    with join_ranks(device) as ranks, ExitStack() as stack:
        if not ranks.is_first:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
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
            finished = train_by_newton(run.checkpoint, examples, run.directory)
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


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names."""
    names = [field.name for field in fields(Settings)]
    return {name: getattr(args, name) for name in names if name in args}


def check_given(given: dict[str, Any], ranks: Ranks) -> None:
    """Raise a ValueError unless the settings that were given are sound together."""
    if Settings(**given).optimizer != "newton":
        return
    for name in OF_SGD:
        if name in given:
            raise ValueError(f"{name} must be left out for optimizer 'newton', got {given[name]!r}")
    if ranks.size > 1:
        raise ValueError(f"optimizer must be 'sgd' for {ranks.size} processes, got 'newton'")


def new_run(args: argparse.Namespace, ranks: Ranks) -> Run:
    """Begin a run; settings that are not given are the data set's."""
    given = given_settings(args)
    check_given(given, ranks)  # before any data are loaded
    if args.output_dir is not None and ranks.is_first:
        check_unused(args.output_dir)
    data = load(args.dataset, args.data_dir)
    is_newton = given.get("optimizer") == "newton"
    defaults = newton_defaults(len(data.train)) if is_newton else DEFAULTS[data.name]
    settings = replace(defaults, **given)
    checkpoint = Checkpoint.start(settings, data)
    if not ranks.is_first:
        return Run(None, data, checkpoint)
    directory = args.output_dir or new_run_directory(data.name)
    save_checkpoint(directory / CHECKPOINT_NAME, checkpoint)
    return Run(directory, data, checkpoint)


def resumed_run(args: argparse.Namespace, ranks: Ranks) -> Run:
    """Go on with a run; what is given must not contradict it."""
    is_file = args.resume.name == CHECKPOINT_NAME
    directory = args.resume.parent if is_file else args.resume
    checkpoint = load_checkpoint(directory / CHECKPOINT_NAME)
    if args.dataset not in ("auto", checkpoint.dataset):
        raise ValueError(
            f"dataset must be {checkpoint.dataset!r} as in the run so far, got {args.dataset!r}"
        )
    checkpoint = checkpoint.with_settings(**given_settings(args))
    check_writable(directory)
    data = load(checkpoint.dataset, args.data_dir)
    checkpoint.check_fits(data)
    print(
        f"going on with {directory} after epoch {checkpoint.epoch}"
        + (f" and {checkpoint.tally.batches} batches" if checkpoint.tally.batches else "")
    )
    return Run(directory if ranks.is_first else None, data, checkpoint)


def load(dataset: str, data_dir: Path) -> TrainTest:
    """Load a data set, with notes on stderr."""
    return load_dataset(dataset, data_dir, notify=lambda line: print(line, file=sys.stderr))


def check_unused(directory: Path) -> None:
    """Raise unless a run can begin in a directory without a loss to another."""
    check_writable(directory)
    if any((directory / name).exists() for name in (CHECKPOINT_NAME, METRICS_NAME)):
        raise FileExistsError(
            f"output-dir {directory} holds a run already: name another directory, "
            f"or go on with --resume {shlex.quote(str(directory))}"
        )


def check_writable(directory: Path) -> None:
    """Make a directory if need be, and raise at once if no file can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(f"{directory} can't be written: {error.strerror}") from error


def new_run_directory(dataset: str) -> Path:
    """Make a directory named after the data set and the time, which was not there before."""
    name = f"{dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    parent = Path("runs")
    check_writable(parent)
    directory = parent / name
    number = 1
    while True:
        try:
            directory.mkdir()
        except FileExistsError:
            number += 1
            directory = parent / f"{name}-{number}"
        else:
            return directory


def resume_command(args: argparse.Namespace, directory: Path) -> str:
    """What to type to go on with a run, on the same data and device."""
    command = ["python", "train_mnist.py", "--resume", str(directory)]
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

    with progress_bar(checkpoint, len(batches), ranks) as show, stop_on_interrupt() as stop:
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
            checkpoint = checkpoint.after(model, tally, generator if is_whole else None)
            save(checkpoint, directory)
            if is_whole:
                tqdm.write(epoch_line(checkpoint))
            if not is_whole or any(ranks.total(stop())):
                raise KeyboardInterrupt
    return checkpoint


def train_by_newton(
    checkpoint: Checkpoint, examples: ImageDataset, directory: Path | None
) -> Checkpoint:
    """Go to the optimum, save and print a line step by step; return the last one."""
    settings = checkpoint.settings
    model = checkpoint.build_model(examples.images.device)
    input, target = examples[torch.arange(len(examples))]
    generator = torch.Generator()  # which stays as it is, as nothing is shuffled
    generator.set_state(checkpoint.generator_state)
    start = time.perf_counter()

    with tqdm(total=settings.epochs, unit="step", disable=None) as bar, stop_on_interrupt() as stop:

        def report(result: newton.Result) -> None:
            nonlocal checkpoint, start
            penalty = 0.5 * settings.weight_decay * model.weight.square().sum().item()
            tally = Tally(seconds=time.perf_counter() - start)
            right = (model.predict(input) == target).sum()
            tally.add(torch.tensor(result.objective - penalty), right, len(target))
            checkpoint = checkpoint.after(model, tally, generator)
            save(checkpoint, directory)
            bar.update()
            tqdm.write(f"{epoch_line(checkpoint)}  gradient {result.gradient_norm:.1e}")
            if stop():
                raise KeyboardInterrupt
            start = time.perf_counter()

        left = settings.epochs - checkpoint.epoch
        if left == 0:
            return checkpoint
        result = newton.minimize(
            model, input, target, settings.weight_decay, max_steps=left, report=report
        )
    if not result.converged:
        note = f"not converged: the gradient's norm is {result.gradient_norm:.1e}"
        tqdm.write(note, file=sys.stderr)
    return checkpoint


def save(checkpoint: Checkpoint, directory: Path | None) -> None:
    """Save a checkpoint, in the one process that has a directory."""
    if directory is not None:
        save_checkpoint(directory / CHECKPOINT_NAME, checkpoint)
        # It would tell of the model that has just been replaced.
        (directory / METRICS_NAME).unlink(missing_ok=True)


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


def unit(checkpoint: Checkpoint) -> str:
    """What a run's epochs are: passes over the data, or steps that each see all of them."""
    return "step" if checkpoint.settings.optimizer == "newton" else "epoch"


def epoch_line(checkpoint: Checkpoint) -> str:
    """How the last epoch went."""
    epochs = checkpoint.settings.epochs
    last = checkpoint.history[-1]
    number = f"{checkpoint.epoch:>{len(str(epochs))}}/{epochs}"
    return (
        f"{unit(checkpoint)} {number}  loss {last['loss']:.4f}  "
        f"accuracy {last['accuracy']:.2%}  {last['seconds']:.2f} s"
    )


def write_metrics(path: Path, finished: Checkpoint, test: Score, device: torch.device) -> None:
    """Write the curves and the result of a run as JSON."""
    metrics = {
        "dataset": finished.dataset,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "train_seconds": sum(epoch["seconds"] for epoch in finished.history),
        "epochs": finished.history,
        "settings": {
            **finished.settings.used(),
            "device": device.type,
            "threads": torch.get_num_threads(),
        },
        "versions": versions(),
    }
    write_atomically(path, (json.dumps(metrics, indent=2) + "\n").encode())
    print(
        f"test accuracy {test.accuracy:.2%}, test loss {test.loss:.4f}, "
        f"{finished.epoch} {unit(finished)}s in {metrics['train_seconds']:.1f} s"
    )


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "torch_softmax": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
    }


if __name__ == "__main__":
    sys.exit(main())
