"""Measure speed and memory of the losses beside torch's and other packages', and print a table.

    python -m scripts.benchmark                      # every section, some ten minutes
    python -m scripts.benchmark --quick              # small shapes, a minute or two
    python -m scripts.benchmark --sections linear hvp --output linear.csv

What can't be measured here is left out, with a line that says why.
"""

import argparse
import csv
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from torch_softmax import _checks as checks
from torch_softmax._command_line import Parser, add_device_option, choose_device, run_command
from torch_softmax.mnist.commands._options import add_data_dir_option

from .growth import growth
from .losses import FORWARD, HVP, LINEAR, LOGITS, MNIST_STEP
from .machine import machine
from .measure import (
    TURNS,
    Options,
    Place,
    Problem,
    Row,
    Shape,
    measure,
    reason,
)
from .mnist import mnist_epoch
from .parallel import parallel
from .roofline import roofline
from .start import start

Section = Callable[[Options], Iterator[Row | str]]

SMALL, LARGE = Shape(512, 128, 8192), Shape(2048, 512, 32768)
LARGER = [Shape(4096, 512, 65536), Shape(8192, 768, 50257)]
STEP = Shape(128, 784, 10)


def compare(problem: Problem, shapes: list[Shape], quick_shapes: list[Shape]) -> Section:
    """A section that measures a problem's contestants."""
    return lambda options: measure(problem, quick_shapes if options.quick else shapes, options)


def on_one_thread(section: Section) -> Section:
    """As train_mnist.py goes about a batch, which is too little work to share."""
    return lambda options: section(options._replace(place=options.place._replace(threads=1)))


SECTIONS: dict[str, Section] = {
    "logits": compare(LOGITS, [LARGE._replace(D=1), STEP._replace(D=1)], [SMALL._replace(D=1)]),
    "linear": compare(LINEAR, [LARGE, *LARGER], [SMALL]),
    "forward": compare(FORWARD, [LARGE], [SMALL]),
    "hvp": compare(HVP, [LARGE], [SMALL]),
    "growth": growth,
    "mnist-step": on_one_thread(compare(MNIST_STEP, [STEP], [STEP])),
    "mnist-epoch": on_one_thread(mnist_epoch),
    "start": on_one_thread(start),
    "parallel": parallel,
    "roofline": roofline,
}


def build_parser() -> Parser:
    """The options, with their help."""
    parser = Parser(
        prog="benchmark",
        description="Measure speed and memory of the losses beside torch's and other packages'. "
        'The others are those of pip install "torch_softmax[bench]".',
        example="python -m scripts.benchmark --sections linear --output linear.csv",
    )
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="NAME",
        help=f"some of {', '.join(SECTIONS)} (default: all)",
    )
    parser.add_argument(
        "--parallel",
        dest="sections",
        action="store_const",
        const=["parallel"],
        help="the same as --sections parallel: classes sharded over processes",
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, a minute or two")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="X",
        help=f"how long to go on with a shape, for {TURNS} turns at least (default: 10, quick: 1)",
    )
    add_device_option(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        metavar="N",
        help="for all but the sections on MNIST and start, which take one (default: %(default)s)",
    )
    add_data_dir_option(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the table there too, as a CSV, which must not be there yet",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return run_command(parser, lambda: benchmark(args))


def benchmark(args: argparse.Namespace) -> None:
    """Measure, and print and write each row as it comes."""
    options = choose_options(args)
    with open_new(args.output) as file:
        columns = [field for field in Row._fields if field != "place"]
        writer = csv.DictWriter(file, [*columns, *machine(options.place)])
        writer.writeheader()
        for name in tqdm(args.sections, unit="section", leave=False, disable=None):
            for event in run_section(name, options):
                tqdm.write(line(event) if isinstance(event, Row) else event)
                if isinstance(event, Row):
                    values = event._asdict()
                    writer.writerow(machine(values.pop("place")) | values)
                    file.flush()
    if args.output:
        print(f"saved {args.output}")


def choose_options(args: argparse.Namespace) -> Options:
    """Check what was given, and fill in what was not."""
    checks.positive("threads", args.threads)
    seconds = (1.0 if args.quick else 10.0) if args.seconds is None else args.seconds
    checks.finite("seconds", seconds)
    device = choose_device(args.device).type
    place = Place(device, getattr(torch, args.dtype), args.threads)
    return Options(place, seconds, args.quick, args.data_dir)


def open_new(path: Path | None) -> TextIO:
    """Open a CSV that isn't there yet; or, where none is asked for, what keeps nothing."""
    if path is None:
        return open(os.devnull, "w", encoding="utf-8")
    try:
        return path.open("x", newline="", encoding="utf-8")
    except FileExistsError:
        raise FileExistsError(f"output {path} is there already: name another file") from None
    except OSError as error:
        raise OSError(f"output {path} can't be written: {error.strerror}") from error


def run_section(name: str, options: Options) -> Iterator[Row | str]:
    """A section's rows and remarks; it must not take the others with it when it fails."""
    try:
        yield from SECTIONS[name](options)
    except Exception as error:
        yield f"without {name}: {reason(error)}"


def line(row: Row) -> str:
    """A row to read."""
    memory = "" if row.memory_mib is None else f"{row.memory_mib:8,.0f} MiB"
    return (
        f"{row.section:12}{row.shape:>15}  {row.name:38}"
        f"{row.seconds * 1e3:12,.3f} ms {row.ratio:8.2f} × {memory}"
    ).rstrip()
