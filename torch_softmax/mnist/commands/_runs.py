"""Runs: a directory for each, begun anew or gone on with, and what is written there."""

import argparse
import json
import platform
import shlex
import sys
import tempfile
from dataclasses import fields, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import __version__
from ..._files import write_atomically
from ...distributed.data_parallel import Ranks
from ..checkpoints import (
    CHECKPOINT_NAME,
    Checkpoint,
    load_checkpoint,
    run_directory,
    save_checkpoint,
)
from ..data import TrainTest, load_dataset
from ..settings import DEFAULTS, OF_SGD, UNITS, Settings, newton_defaults
from ..training import Score

METRICS_NAME = "metrics.json"


class Run(NamedTuple):
    """Where a run writes to, the data, and the state from which it goes on.

    Of several processes only the first has a directory, and writes.
    """

    directory: Path | None
    data: TrainTest
    checkpoint: Checkpoint


def new_run(args: argparse.Namespace, ranks: Ranks) -> Run:
    """Begin a run; settings that are not given are the data set's."""
    given = given_settings(args)
    check_given(given, ranks)  # before any data are loaded
    if args.output_dir is not None and ranks.is_first:
        check_unused(args.output_dir)
    data = load_dataset(
        args.dataset, args.data_dir, notify=lambda line: print(line, file=sys.stderr)
    )
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
    directory = run_directory(args.run_dir)
    checkpoint = load_checkpoint(directory / CHECKPOINT_NAME)
    checkpoint = checkpoint.with_settings(**given_settings(args))
    check_writable(directory)
    data = checkpoint.load_data(args.data_dir)
    if data.data_dir != checkpoint.data_dir:
        checkpoint = replace(checkpoint, data_dir=data.data_dir)
        if ranks.is_first:
            save_checkpoint(directory / CHECKPOINT_NAME, checkpoint)
    print(
        f"going on with {directory} after epoch {checkpoint.epoch}"
        + (f" and {checkpoint.tally.batches} batches" if checkpoint.tally.batches else "")
    )
    return Run(directory if ranks.is_first else None, data, checkpoint)


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


def check_unused(directory: Path) -> None:
    """Raise unless a run can begin in a directory without a loss to another."""
    check_writable(directory)
    if any((directory / name).exists() for name in (CHECKPOINT_NAME, METRICS_NAME)):
        raise FileExistsError(
            f"output-dir {directory} holds a run already: name another directory, "
            f"or go on with it: python -m torch_softmax resume {shlex.quote(str(directory))}"
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


def save(checkpoint: Checkpoint, directory: Path | None) -> None:
    """Save a checkpoint, in the one process that has a directory."""
    if directory is not None:
        save_checkpoint(directory / CHECKPOINT_NAME, checkpoint)
        # It would tell of the model that has just been replaced.
        (directory / METRICS_NAME).unlink(missing_ok=True)


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
    rounds = f"{finished.epoch} {UNITS[finished.settings.optimizer]}s"
    print(
        f"test accuracy {test.accuracy:.2%}, test loss {test.loss:.4f}, "
        f"{rounds} in {metrics['train_seconds']:.1f} s"
    )


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "torch_softmax": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
    }
