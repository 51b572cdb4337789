"""The command torch-softmax, which is python -m torch_softmax too: the trainer and the audit."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from ._command_line import Parser, add_device_option, run_command
from ._torchrun import one_voice
from .mnist.commands import evaluate, export, plot, predict, train

# What each command runs: `run(args)` of a module, which is loaded only then.
MODULES = {
    "train": "torch_softmax.mnist.commands.train",
    "resume": "torch_softmax.mnist.commands.train",
    "evaluate": "torch_softmax.mnist.commands.evaluate",
    "predict": "torch_softmax.mnist.commands.predict",
    "plot": "torch_softmax.mnist.commands.plot",
    "export": "torch_softmax.mnist.commands.export",
    "verify": "torch_softmax._verify_losses",
}
DTYPES = ("float64", "float32", "bfloat16", "float16")


def build_parser() -> Parser:
    """The commands and their options, with their help."""
    parser = Parser(
        prog="torch-softmax",
        description="Train softmax regression on images of ten classes, use what was trained, "
        "or check the derivatives of the losses.",
        example="torch-softmax train --dataset digits --output-dir runs/first",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(
        title="commands",
        description="each has a --help of its own",
        dest="command",
        metavar="COMMAND",
        required=True,
    )
    train.add_parser(commands)
    train.add_resume_parser(commands)
    for command in (evaluate, predict, plot, export):
        command.add_parser(commands)
    add_verify(commands)
    for each in commands.choices.values():
        each.set_defaults(parser=each)
    return parser


def add_verify(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Check the losses."""
    parser = commands.add_parser(
        "verify",
        help="check every derivative of the losses, here and now",
        description="Check every derivative of the losses, each way that PyTorch has to take it, "
        "against plain operations in float64.",
        epilog="exit status: 0 where every claim holds, 1 where one does not",
        example="torch-softmax verify --device cuda --dtype bfloat16",
    )
    add_device_option(parser, default="cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="of the inputs (default: %(default)s)"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="check compiled code too, which takes a minute"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    # Threads that spin while they wait for one another take the cores that others need: on a busy
    # machine two of them are many times slower than one. OpenMP reads this once, as torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with one_voice():
        args = build_parser().parse_args(argv)
        return run_command(args.parser, lambda: import_module(MODULES[args.command]).run(args))


if __name__ == "__main__":
    sys.exit(main())
