"""Draw a report of a training run on one page, or the charts of a benchmark.

python scripts/plot.py runs/mnist-20260131-120000      # report.png in that directory
python scripts/plot.py --bench benchmark.csv           # benchmark-time.svg, -memory.svg
"""

import argparse
import io
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch_softmax._command_line import Parser, add_data_dir_option, run_command
from torch_softmax.checkpoints import CHECKPOINT_NAME, load_checkpoint, write_atomically
from torch_softmax.data import load_dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 300
GREY = "#666666"
STYLE = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titlepad": 3,
    "axes.linewidth": 0.6,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "svg.fonttype": "none",  # text stays text, in a fifth of the bytes
    "svg.hashsalt": "torch_softmax",  # the same file from the same numbers
}


def build_parser() -> Parser:
    """The options, with their help."""
    parser = Parser(
        prog="plot.py",
        description="Draw a report of a training run on one page: weights, learning curves, "
        "confusion, calibration and the most confident mistakes. Or chart a benchmark.",
        example="python scripts/plot.py runs/mnist-20260131-120000",
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "run_dir",
        nargs="?",
        type=Path,
        metavar="RUN_DIR",
        help="a directory that train_mnist.py wrote, or the model.pt in it",
    )
    subject.add_argument(
        "--bench",
        type=Path,
        metavar="CSV",
        help="chart what scripts/benchmark.py wrote instead, as two SVG files",
    )
    add_data_dir_option(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the page goes, as PNG, PDF or SVG by its ending (default: RUN_DIR/report.png); "
        "with --bench, -time.svg and -memory.svg take the place of the ending (default: the CSV's)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if find_spec("matplotlib") is None:
        sys.exit('plot.py: needs matplotlib: pip install "torch_softmax[plot]"')
    return run_command(parser, lambda: plot(args))


def plot(args: argparse.Namespace) -> None:
    """Draw what was asked for."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        if args.bench is not None:
            plot_benchmark(args.bench, args.output or args.bench)
        else:
            is_file = args.run_dir.name == CHECKPOINT_NAME
            run_dir = args.run_dir.parent if is_file else args.run_dir
            plot_run(run_dir, args.data_dir, args.output or run_dir / "report.png")


def plot_run(run_dir: Path, data_dir: Path, output: Path) -> None:
    """Draw the page about a run."""
    from plot_run import draw_run

    checkpoint = load_checkpoint(run_dir / CHECKPOINT_NAME)
    data = load_dataset(checkpoint.dataset, data_dir)
    checkpoint.check_fits(data)
    save(draw_run(checkpoint, data.test), output)


def plot_benchmark(table: Path, output: Path) -> None:
    """Chart a benchmark."""
    from plot_benchmark import draw_benchmark, read_benchmark

    for name, figure in draw_benchmark(read_benchmark(table)).items():
        save(figure, output.with_name(f"{output.stem}-{name}.svg"))


def save(figure: "Figure", path: Path) -> None:
    """Write a figure in one step, in the format that its name ends in, and tell where."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:] or "png", dpi=DPI, metadata={"Date": None})
    write_atomically(path, buffer.getvalue())
    print(f"saved {path}")


if __name__ == "__main__":
    sys.exit(main())
