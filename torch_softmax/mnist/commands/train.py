"""Train softmax regression on MNIST, or a data set like it, from the command line."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..._command_line import choose_device, stop_on_interrupt
from ..._torchrun import launcher
from ...distributed.data_parallel import Ranks, join_ranks
from ...optim import newton
from ..checkpoints import CHECKPOINT_NAME, Checkpoint
from ..data import ImageDataset, batch_loader
from ..settings import UNITS
from ..training import DivergenceError, Score, Tally, evaluate, train_epoch
from ._runs import METRICS_NAME, Run, new_run, resumed_run, save, write_metrics

EVALUATION_BATCH = 2000


def run(args: argparse.Namespace) -> None:
    """Begin a run or go on with one, in this process or all that torchrun has started."""
    device = choose_device(args.device)
    with join_ranks(device) as ranks:
        with ranks.first_ahead():
            begin = resumed_run if args.command == "resume" else new_run
            begun = begin(args, ranks)
        train_and_test(begun, args, device, ranks)


def train_and_test(run: Run, args: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
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


def resume_command(args: argparse.Namespace, directory: Path) -> str:
    """What to type to go on with a run, on the same device; it knows where its data are."""
    command = [*launcher(), "-m", "torch_softmax", "resume", str(directory)]
    if args.device != args.parser.get_default("device"):
        command += ["--device", args.device]
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
    checkpoint: Checkpoint, examples: ImageDataset, directory: Path | None
) -> Checkpoint:
    """Go to the optimum, save and print a line step by step; return the last one."""
    settings = checkpoint.settings
    model = checkpoint.build_model(examples.images.device)
    input, target = examples[torch.arange(len(examples))]
    start = time.perf_counter()

    with tqdm(total=settings.epochs, unit="step", disable=None) as bar, stop_on_interrupt() as stop:

        def report(result: newton.Result) -> None:
            nonlocal checkpoint, start
            seconds = time.perf_counter() - start
            right = (model.predict(input) == target).sum()
            score = Score(result.loss, int(right) / len(target))
            checkpoint = checkpoint.after_epoch(model, score, seconds)
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
