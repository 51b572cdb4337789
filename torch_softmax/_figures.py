"""Figures by matplotlib, of the extra [plot]: their style, and how they become files."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ._files import write_atomically

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


@contextmanager
def our_style(command: str) -> Iterator[None]:
    """Draw in our style within the block; end a command in one line where there is no matplotlib.

    Args:
        command: What begins that line.
    """
    if find_spec("matplotlib") is None:
        sys.exit(f'{command}: needs matplotlib: pip install "torch_softmax[plot]"')
    from matplotlib import style  # slow, and not always there

    with style.context(["default", STYLE]):
        yield


def save(figure: "Figure", path: Path) -> None:
    """Write a figure in one step, in the format that its name ends in, and tell where."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:] or "png", dpi=DPI, metadata={"Date": None})
    write_atomically(path, buffer.getvalue())
    print(f"saved {path}")
