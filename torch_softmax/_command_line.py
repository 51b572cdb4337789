"""What the commands share: options with their defaults, and how an error ends a command."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from .checkpoints import CheckpointError
from .data import DATASETS, DataError
from .training import DivergenceError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help ends with an example.

    Args:
        example: a command line.
        epilog: what comes before it, kept as it is.
        options: those of an ArgumentParser.
    """

    def __init__(self, *, example: str = "", epilog: str = "", **options: Any) -> None:
        if example:
            epilog = f"{epilog}\n\nexample:\n  {example}".strip()
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(epilog=epilog, **options)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add --dataset and --data-dir."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=DATASETS,
        default="auto",
        help="auto (the default) is mnist if it is on disk or can be downloaded, else digits, "
        "which are part of the package",
    )
    add_data_dir_option(data)


def add_data_dir_option(parser: argparse._ActionsContainer) -> None:
    """Add --data-dir."""
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where data sets lie or are downloaded to (default: %(default)s)",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add --device, for `choose_device`."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto (the default) is a GPU if there is one",
    )


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint, for `load_checkpoint`."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="PATH",
        help="a model.pt of train_mnist.py, or the run directory that holds it",
    )


def choose_device(name: str) -> torch.device:
    """The device of a name, or the best that torch finds for 'auto'."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, is_there in available.items() if is_there)
    if not available[name]:
        found = ", ".join(device for device, is_there in available.items() if is_there)
        raise ValueError(f"device must be one that torch finds here ({found}), got {name!r}")
    return torch.device(name)


def run_command(parser: Parser, command: Callable[[], None]) -> int:
    """Run a command, and turn what a user can cause into one line on stderr.

    Args:
        parser: its `prog` begins the line.
        command: raises a ValueError for bad options.

    Returns:
        The exit status: 0, 1 after an error, or 130 after Ctrl-C. Bad options exit with 2.
    """
    try:
        command()
    except ValueError as error:
        parser.error(str(error))
    except (CheckpointError, DataError, DivergenceError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"{parser.prog}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block, only note the first Ctrl-C; a second one raises KeyboardInterrupt.

    Yields:
        A function that tells whether there was one, for a loop to ask where it can stop.
    """
    stopped = False
    usual = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, usual)

    if usual is not signal.SIG_IGN:  # as in a job in the background, which Ctrl-C is not meant for
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, usual)
