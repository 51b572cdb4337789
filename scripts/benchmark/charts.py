"""Chart how long the losses of a linear layer take, and how much memory.

python -m scripts.benchmark.charts benchmark.csv      # benchmark-time.svg, -memory.svg
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch_softmax._command_line import Parser, run_command
from torch_softmax._figures import our_style, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SECTION = "linear"
COLORS = {
    "ours": "#005a8f",
    "ours, chunk_size=128": "#79b4d9",
    "torch dense": "#f2a878",
    "torch chunked": "#b34700",
    "cut-cross-entropy": "#7b5ea7",
    "Liger": "#4d9a5b",
    "torchtune": "#b0b0b0",
}
LEAST_MIB = 1.0  # less is within the noise of a measurement
WIDTH, BAR, GAP, HEAD, FOOT = 7.0, 0.19, 0.17, 0.9, 0.3  # inches


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = Parser(
        prog="benchmark.charts",
        description="Chart what the benchmark measured of the losses of a linear layer.",
        example="python -m scripts.benchmark.charts benchmark.csv",
    )
    parser.add_argument("table", type=Path, metavar="CSV", help="what the benchmark wrote")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="-time.svg and -memory.svg take the place of its ending (default: the CSV's)",
    )
    args = parser.parse_args(argv)
    with our_style(parser.prog):
        return run_command(parser, lambda: chart(args))


def chart(args: argparse.Namespace) -> None:
    """Draw each chart, and save it."""
    output = args.output or args.table
    for name, figure in draw_benchmark(read_benchmark(args.table)).items():
        save(figure, output.with_name(f"{output.stem}-{name}.svg"))


class Measurement(NamedTuple):
    """One loss on one shape; its memory is None where it was not measured."""

    shape: str
    name: str
    ratio: float
    memory_mib: float | None
    conditions: str


def read_benchmark(path: Path) -> list[Measurement]:
    """Read what the benchmark wrote about the losses of a linear layer.

    Raises:
        ValueError: The file is none of the benchmark's, has none of these losses, or was put
            together from runs under several conditions.
        OSError: It can't be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [_parse(row) for row in csv.DictReader(file) if row["section"] == SECTION]
    except (IndexError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"table must be a CSV of scripts.benchmark, got {path}") from error
    losses = [row for row in rows if row.name in COLORS]
    conditions = {row.conditions for row in losses}
    if len(conditions) != 1:
        raise ValueError(
            f"table must have rows of the section {SECTION!r} from one machine and dtype, "
            f"got those of {len(conditions)} in {path}"
        )
    return losses


def _parse(row: dict[str, str]) -> Measurement:
    return Measurement(
        shape="N {}\nD {}\nK {}".format(*row["shape"].split("x")),
        name=row["name"],
        ratio=float(row["ratio"]),
        memory_mib=float(row["memory_mib"]) if row["memory_mib"] else None,
        conditions="{device}, {threads} threads, {dtype}, torch {torch}".format(**row),
    )


def draw_benchmark(rows: list[Measurement]) -> "dict[str, Figure]":
    """Draw a chart of the 'time', and one of the 'memory', each where any was measured."""
    title, conditions = "Loss of a linear layer with all gradients", rows[0].conditions
    time = {(row.shape, row.name): row.ratio for row in rows if not math.isnan(row.ratio)}
    memory = {
        (row.shape, row.name): max(row.memory_mib, LEAST_MIB)
        for row in rows
        if row.memory_mib is not None
    }
    charts = {}
    if time:
        charts["time"] = figure = draw_bars(time, 0, "{:.2f} ×")
        draw_floor(figure.axes[0])
        draw_head(
            figure,
            f"{title}: time",
            f"in multiples of its three bare matrix products · {conditions}",
        )
    if memory:
        charts["memory"] = figure = draw_bars(memory, LEAST_MIB, "{:,.0f} MiB")
        draw_decades(figure.axes[0])
        draw_head(figure, f"{title}: memory", f"above that of the gradients · {conditions}")
    return charts


def draw_bars(values: dict[tuple[str, str], float], start: float, number: str) -> "Figure":
    """Draw a group of bars for each shape, and a legend.

    Args:
        values: Where the bar of a shape and a name ends.
        start: Where all bars begin.
        number: The format of what is written at a bar's end.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shapes = list(dict.fromkeys(shape for shape, _ in values))
    names = [name for name in COLORS if any(name == other for _, other in values)]
    group = len(names) * BAR + GAP
    height = HEAD + len(shapes) * group + FOOT
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    axes = figure.add_axes((0.1, FOOT / height, 0.78, len(shapes) * group / height))
    for (shape, name), value in values.items():
        y = shapes.index(shape) * group + names.index(name) * BAR
        axes.barh(y, value - start, 0.85 * BAR, left=start, color=COLORS[name])
        axes.text(value, y, "  " + number.format(value), va="center")
    axes.set_ylim(len(shapes) * group - (BAR + GAP) / 2, -(BAR + GAP) / 2)
    middle = (len(names) - 1) / 2 * BAR
    axes.set_yticks([i * group + middle for i in range(len(shapes))], shapes)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.axvline(start, color="black", linewidth=0.8)
    figure.legend(
        handles=[Patch(color=COLORS[name], label=name) for name in names],
        loc="upper left",
        bbox_to_anchor=(0.09, 1 - 0.46 / height),
        ncols=len(names),
        columnspacing=1.2,
    )
    return figure


def draw_floor(axes: "Axes") -> None:
    """Mark the time of the bare products, below which no loss can come."""
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.text(1, 1, "three products", transform=axes.get_xaxis_transform(), ha="center")


def draw_decades(axes: "Axes") -> None:
    """Make an axis logarithmic, with numbers in full."""
    from matplotlib.ticker import LogFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter(LogFormatter())  # writes only where there is room


def draw_head(figure: "Figure", title: str, note: str) -> None:
    """Write two lines above a chart."""
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.25 / height, title, fontsize=10, fontweight="bold")
    figure.text(0.02, 1 - 0.42 / height, note)


if __name__ == "__main__":
    sys.exit(main())
