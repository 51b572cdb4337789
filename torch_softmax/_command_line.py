"""What all commands share: their parser, the device, and how errors and Ctrl-C end them.

None of it loads torch before a command runs, so that --help answers at once.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from ._values import UserError

if TYPE_CHECKING:
    import torch


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help ends with an example.

    Args:
        example: a command line.
        epilog: What comes before it, kept as it is.
        options: Those of an ArgumentParser.
    """

    def __init__(self, *, example: str = "", epilog: str = "", **options: Any) -> None:
        if example:
            epilog = f"{epilog}\n\nexample:\n  {example}".strip()
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(epilog=epilog, **options)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def add_device_option(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    """Add --device, for `choose_device`."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default=default,
        help="auto is a GPU if there is one (default: %(default)s)",
    )


def choose_device(name: str) -> "torch.device":
    """The device of a name, or the best that torch finds for 'auto'."""
    import torch  # slow, and needed only here

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


def run_command(parser: Parser, command: Callable[[], int | None]) -> int:
    """Run a command, and turn what a user can cause into one line on stderr.

    Args:
        parser: Its `prog` begins the line.
        command: Raises a ValueError for bad options; returns a status, or None for 0.

    Returns:
        The exit status: that of the command, 1 after an error, or 130 after Ctrl-C. Bad options
        exit with 2.
    """
    try:
        return command() or 0
    except ValueError as error:
        parser.error(str(error))
    except (UserError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"{parser.prog}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of cells in columns, the first one flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if k else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


@contextmanager
def stop_on_interrupt(patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Within the block, only note the first Ctrl-C; a second one raises KeyboardInterrupt.

    Args:
        patient: Only note the others too, as torchrun passes on the one that all have had.

    Yields:
        A function that tells whether there was one, for a loop to ask where it can stop.
    """
    stopped = False
    usual = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        nonlocal stopped
        stopped = True
        if not patient:
            signal.signal(signal.SIGINT, usual)

    if usual is not signal.SIG_IGN:  # as in a job in the background, which Ctrl-C is not meant for
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, usual)
