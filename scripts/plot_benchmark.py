"""The charts of a benchmark: how long the losses of a linear layer take, and how much memory."""

import csv
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter

SECTION = "linear"
COLORS = {"ours": "#005a8f", "torch dense": "#f2a878", "torch chunked": "#b34700"}
LEAST_MIB = 1.0  # less is within the noise of a measurement
WIDTH, BAR, GROUP, HEAD, FOOT = 7.0, 0.22, 0.82, 0.8, 0.3  # inches


class Measurement(NamedTuple):
    """One loss on one shape; its memory is None where it was not measured."""

    shape: str
    name: str
    ratio: float
    memory_mib: float | None
    conditions: str


def read_benchmark(path: Path) -> list[Measurement]:
    """Read what scripts/benchmark.py wrote about the losses of a linear layer.

    Raises:
        ValueError: if the file is none of that script's, has none of these losses, or was put
            together from runs under several conditions.
        OSError: if it can't be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [_parse(row) for row in csv.DictReader(file) if row["section"] == SECTION]
    except (IndexError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"bench must be a CSV of scripts/benchmark.py, got {path}") from error
    losses = [row for row in rows if row.name in COLORS]
    conditions = {row.conditions for row in losses}
    if len(conditions) != 1:
        raise ValueError(
            f"bench must have rows of the section {SECTION!r} from one machine and dtype, "
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


def draw_benchmark(rows: list[Measurement]) -> dict[str, Figure]:
    """Draw a chart of the 'time', and one of the 'memory' where any was measured."""
    conditions = rows[0].conditions
    time = {(row.shape, row.name): row.ratio for row in rows}
    memory = {
        (row.shape, row.name): max(row.memory_mib, LEAST_MIB)
        for row in rows
        if row.memory_mib is not None
    }
    charts = {
        "time": draw_bars(
            "Loss of a linear layer with all gradients: time",
            f"multiples of its three bare matrix products · {conditions}",
            time,
            "{:.2f} ×",
        )
    }
    if memory:
        charts["memory"] = draw_bars(
            "Loss of a linear layer with all gradients: memory",
            f"MiB above the gradients themselves · {conditions}",
            memory,
            "{:,.0f} MiB",
        )
    return charts


def draw_bars(title: str, note: str, values: dict[tuple[str, str], float], number: str) -> Figure:
    """Draw a group of bars for each shape, which begin at 1 on a logarithmic axis.

    Args:
        title: the first line.
        note: the second line.
        values: where the bar of a shape and a name ends.
        number: the format of what is written at its end.
    """
    shapes = list(dict.fromkeys(shape for shape, _ in values))
    names = list(COLORS)
    height = HEAD + len(shapes) * GROUP + FOOT
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    axes = figure.add_axes((0.1, FOOT / height, 0.78, len(shapes) * GROUP / height))
    for (shape, name), value in values.items():
        y = shapes.index(shape) * GROUP + names.index(name) * BAR
        axes.barh(y, value - 1, 0.85 * BAR, left=1, color=COLORS[name])
        axes.text(max(value, 1), y, "  " + number.format(value), va="center")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(len(shapes) * GROUP - BAR, -BAR))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter(LogFormatter())  # writes only where there is room
    axes.set_yticks([i * GROUP + BAR for i in range(len(shapes))], shapes)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    figure.text(0.02, 1 - 0.25 / height, title, fontsize=10, fontweight="bold")
    figure.text(0.02, 1 - 0.42 / height, note)
    figure.legend(
        handles=[Patch(color=color, label=name) for name, color in COLORS.items()],
        loc="upper left",
        bbox_to_anchor=(0.09, 1 - 0.48 / height),
        ncols=len(COLORS),
    )
    return figure
