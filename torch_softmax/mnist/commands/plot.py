"""Draw a report of a training run on one page.

torch-softmax plot runs/mnist-20260131-120000      # report.png in that directory
"""

import argparse

from ..._figures import our_style, save
from ..checkpoints import CHECKPOINT_NAME, load_checkpoint, run_directory


def run(args: argparse.Namespace) -> None:
    """Draw the page about a run."""
    with our_style(args.parser.prog):
        from ._page import draw_run

        run_dir = run_directory(args.run_dir)
        checkpoint = load_checkpoint(run_dir / CHECKPOINT_NAME)
        data = checkpoint.load_data(args.data_dir)
        save(draw_run(checkpoint, data.test), args.output or run_dir / "report.png")
