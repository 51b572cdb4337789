"""Draw a report of a training run on one page.

python scripts/plot.py runs/mnist-20260131-120000      # report.png in that directory
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..._command_line import Parser, run_command
from ..._figures import our_style, save
from ..checkpoints import CHECKPOINT_NAME, load_checkpoint, run_directory
from ._options import add_run_data_dir_option


def build_parser() -> Parser:
    """The options, with their help."""
    parser = Parser(
        prog="plot.py",
        description="Draw a report of a training run on one page: weights, learning curves, "
        "confusion, calibration and the most confident mistakes.",
        example="python scripts/plot.py runs/mnist-20260131-120000",
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="a directory that train_mnist.py wrote, or the model.pt in it",
    )
    add_run_data_dir_option(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the page goes, as PNG, PDF or SVG by its ending (default: RUN_DIR/report.png)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with our_style(parser.prog):
        return run_command(parser, lambda: plot(args))


def plot(args: argparse.Namespace) -> None:
    """Draw the page about a run."""
    from ._page import draw_run

    run_dir = run_directory(args.run_dir)
    checkpoint = load_checkpoint(run_dir / CHECKPOINT_NAME)
    data = checkpoint.load_data(args.data_dir)
    save(draw_run(checkpoint, data.test), args.output or run_dir / "report.png")
