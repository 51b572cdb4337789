"""Runs: trained to their end by either optimizer, with a checkpoint after each epoch or step."""

import json
import os
import platform
import shlex
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from .. import __version__
from .._command_line import stop_on_interrupt
from .._files import write_atomically
from ..distributed.data_parallel import Ranks
from ..optim import newton
from .checkpoints import CHECKPOINT_NAME, Checkpoint, save_checkpoint
from .data import BatchLoader, ImageDataset, TrainTest
from .settings import UNITS
from .training import DivergenceError, Score, Tally, evaluate, train_epoch

METRICS_NAME = "metrics.json"
EVALUATION_BATCH = 2000


class Run(NamedTuple):
    """Where a run writes to, the data, and the state from which it goes on.

    Of several ranks only the first has a directory, and writes.
    """

    directory: Path | None
    data: TrainTest
    checkpoint: Checkpoint


def train_and_test(run: Run, device: torch.device, ranks: Ranks) -> None:
    """Train from the run's checkpoint to the end, test, and write the metrics.

    The first Ctrl-C is raised as KeyboardInterrupt once the batch or step is done and saved.
    """
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
    train = train_by_newton if is_newton else train_by_batches
    finished = train(run.checkpoint, data.train.to(device), run.directory, ranks)
    if run.directory is None:
        return
    batches = BatchLoader(data.test.to(device), EVALUATION_BATCH)
    test = evaluate(finished.build_model(device), batches)
    write_metrics(run.directory / METRICS_NAME, finished, test, device)
    print(f"saved {run.directory / CHECKPOINT_NAME} and {run.directory / METRICS_NAME}")


def train_by_batches(
    checkpoint: Checkpoint, examples: ImageDataset, directory: Path | None, ranks: Ranks
) -> Checkpoint:
    """Train by gradient descent, save and print a line after each epoch; return the last state."""
    settings = checkpoint.settings
    model = checkpoint.build_model(examples.images.device)
    generator = torch.Generator()
    batches = BatchLoader(examples, settings.batch_size, generator, ranks)
    size = len(batches)
    done, end = checkpoint.epoch * size + checkpoint.tally.batches, settings.epochs * size
    silent = None if ranks.is_first else True  # None leaves the bar to terminals
    with (
        tqdm(initial=done, total=end, unit="batch", disable=silent) as bar,
        stop_on_interrupt(ranks.size > 1) as stop,
    ):

        def show(epoch: int, tally: Tally) -> None:
            loss, accuracy = tally.score()
            bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.2%}", refresh=False)
            bar.update(epoch * size + tally.batches - bar.n)

        while checkpoint.epoch < settings.epochs:
            epoch, tally = checkpoint.epoch, replace(checkpoint.tally)
            generator.set_state(checkpoint.generator_state)
            try:
                report = partial(show, epoch)
                train_epoch(model, batches, settings, epoch, tally, report, stop, ranks)
            except DivergenceError as error:
                file = directory and directory / CHECKPOINT_NAME
                kept = f"; {file} keeps epoch {epoch}" if file and epoch > 0 else ""
                raise DivergenceError(f"in epoch {epoch + 1} {error}{kept}") from error
            is_whole = tally.batches == size
            if is_whole:
                checkpoint = checkpoint.after_epoch(model, tally.score(), tally.seconds, generator)
            else:
                checkpoint = checkpoint.after_batches(model, tally)
            save_run(checkpoint, directory, ranks)
            if is_whole:
                tqdm.write(epoch_line(checkpoint))
            if not is_whole or any(ranks.total(stop())):
                raise KeyboardInterrupt
    return checkpoint


def train_by_newton(
    checkpoint: Checkpoint, examples: ImageDataset, directory: Path | None, ranks: Ranks
) -> Checkpoint:
    """Train to the optimum, save and print a line after each step; return the last state.

    Each rank has its part of the examples.
    """
    settings = checkpoint.settings
    if checkpoint.epoch == settings.epochs:
        return checkpoint
    model = checkpoint.build_model(examples.images.device)
    input, target = examples[ranks.part(torch.arange(len(examples)))]
    silent = None if ranks.is_first else True
    start = time.perf_counter()
    with (
        tqdm(total=settings.epochs, unit="step", disable=silent) as bar,
        stop_on_interrupt(ranks.size > 1) as stop,
    ):

        def report(result: newton.Result) -> None:
            nonlocal checkpoint, start
            seconds = time.perf_counter() - start
            (right,) = ranks.total((model.predict(input) == target).sum())
            score = Score(result.loss, int(right) / len(examples))
            checkpoint = checkpoint.after_epoch(model, score, seconds)
            save_run(checkpoint, directory, ranks)
            bar.update()
            tqdm.write(f"{epoch_line(checkpoint)}  gradient {result.gradient_norm:.1e}")
            if any(ranks.total(stop())):
                raise KeyboardInterrupt
            start = time.perf_counter()

        left = settings.epochs - checkpoint.epoch
        result = newton.minimize(
            model, input, target, settings.weight_decay, report=report, max_steps=left, ranks=ranks
        )
    if not result.converged:
        note = f"not converged: the gradient's norm is {result.gradient_norm:.1e}"
        tqdm.write(note, file=sys.stderr)
    return checkpoint


def epoch_line(checkpoint: Checkpoint) -> str:
    """Return how the last epoch went."""
    epochs = checkpoint.settings.epochs
    last = checkpoint.history[-1]
    number = f"{checkpoint.epoch:>{len(str(epochs))}}/{epochs}"
    return (
        f"{UNITS[checkpoint.settings.optimizer]} {number}  loss {last['loss']:.4f}  "
        f"train accuracy {last['accuracy']:.2%}  {last['seconds']:.2f} s"
    )


def save_run(checkpoint: Checkpoint, directory: Path | None, ranks: Ranks) -> None:
    """Save a checkpoint on the rank that has a directory; raise on all ranks if that fails."""
    with ranks.together():
        if directory is not None:
            save_checkpoint(directory / CHECKPOINT_NAME, checkpoint)
            # The metrics describe the model that has just been replaced.
            (directory / METRICS_NAME).unlink(missing_ok=True)


def write_metrics(path: Path, finished: Checkpoint, test: Score, device: torch.device) -> None:
    """Write the curves and the result of a run as JSON, and print the result."""
    seconds = sum(epoch["seconds"] for epoch in finished.history)
    threads = torch.get_num_threads()
    metrics = {
        "dataset": finished.dataset,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "train_seconds": seconds,
        "epochs": finished.history,
        "settings": {**finished.settings.used(), "device": device.type, "threads": threads},
        "versions": {
            "torch_softmax": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
        },
    }
    write_atomically(path, (json.dumps(metrics, indent=2) + "\n").encode())
    rounds = f"{finished.epoch} {UNITS[finished.settings.optimizer]}s"
    print(
        f"test accuracy {test.accuracy:.2%}, test loss {test.loss:.4f}, {rounds} in {seconds:.1f} s"
    )


def check_unused(directory: Path) -> None:
    """Raise unless a run can begin in a directory without replacing another."""
    check_writable(directory)
    if any((directory / name).exists() for name in (CHECKPOINT_NAME, METRICS_NAME)):
        raise FileExistsError(
            f"output-dir {directory} holds a run already: name another directory, "
            f"or go on with it: python -m torch_softmax resume {shlex.quote(str(directory))}"
        )


def check_writable(directory: Path) -> None:
    """Make a directory if it isn't there, and raise if no file can be written in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(f"{directory} can't be written: {error.strerror}") from error


def new_directory(dataset: str) -> Path:
    """Make a directory named after the data set and the time, which was not there before."""
    parent, name = Path("runs"), f"{dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    check_writable(parent)
    for ending in chain([""], (f"-{number}" for number in count(2))):
        with suppress(FileExistsError):
            (parent / f"{name}{ending}").mkdir()
            return parent / f"{name}{ending}"
    raise AssertionError  # the endings don't end
