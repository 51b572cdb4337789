"""How time and memory grow with the rows, the features and the classes."""

from collections.abc import Iterator, Sequence

import torch

from .losses import LINEAR
from .measure import Options, Row, Shape, measure

NAMES = ("torch dense", "torch chunked", "ours")
PROBLEM = LINEAR._replace(
    section="growth", contestants={name: LINEAR.contestants[name] for name in NAMES}
)
BASE, QUICK_BASE = Shape(2048, 128, 8192), Shape(512, 128, 4096)
FACTORS = (1, 2, 4)
LEAST_MIB = 1.0  # less is within the noise of a measurement


def growth(options: Options) -> Iterator[Row | str]:
    """Double N, D and K, each by itself, and tell the powers that time and memory follow."""
    base, sizes = (QUICK_BASE, ["N"]) if options.quick else (BASE, Shape._fields)
    series = {size: doubled(base, size) for size in sizes}
    shapes = list(dict.fromkeys(shape for shapes in series.values() for shape in shapes))
    rows = {}
    for event in measure(PROBLEM, shapes, options):
        yield event
        if isinstance(event, Row):
            rows[event.name, event.shape] = event
    for size, shapes in series.items():
        for name in NAMES:
            measured = [rows[name, str(shape)] for shape in shapes if (name, str(shape)) in rows]
            if len(measured) == len(FACTORS):
                yield f"growth of {name} with {size}: {powers(measured)}"


def doubled(base: Shape, size: str) -> list[Shape]:
    """A shape with one of its sizes growing by the FACTORS."""
    return [base._replace(**{size: getattr(base, size) * factor}) for factor in FACTORS]


def powers(rows: Sequence[Row]) -> str:
    """The exponents of time and memory over a size that grows by the FACTORS."""
    text = f"time to the power {exponent(FACTORS, [row.seconds for row in rows]):.2f}"
    memory = [row.memory_mib for row in rows if row.memory_mib is not None]
    if len(memory) == len(rows):
        power = exponent(FACTORS, [max(mib, LEAST_MIB) for mib in memory])
        text += f", memory to the power {power:.2f}"
    return text


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value over log size, by least squares."""
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (sizes, values))
    x -= x.mean()
    return float(x @ y / (x @ x))
