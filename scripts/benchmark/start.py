"""How long a program waits before it can begin: imports, and the first step of a training."""

import subprocess
import sys
from collections.abc import Iterator

import torch

from .losses import MNIST_STEP
from .measure import (
    TURNS,
    Options,
    Place,
    Problem,
    Row,
    Shape,
    fresh_process,
    seconds_of,
)

SECTION = "start"
IMPORTS = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
from torch_softmax import SoftmaxRegression
print(middle - start, time.perf_counter() - middle)
"""


def start(options: Options) -> Iterator[Row]:
    """Time both in fresh processes."""
    turns = 1 if options.quick else TURNS
    torchs, ours = map(min, zip(*(import_seconds() for _ in range(turns)), strict=True))
    yield Row(SECTION, "", "import torch", torchs, 1.0, None, options.place)
    yield Row(SECTION, "", "and then torch_softmax", ours, ours / torchs, None, options.place)
    yield from first_steps(MNIST_STEP, Shape(128, 784, 10), options.place, turns)


def import_seconds() -> list[float]:
    """How long torch takes to import, and then this package."""
    command = [sys.executable, "-c", IMPORTS]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(number) for number in output.split()]


def first_steps(problem: Problem, shape: Shape, place: Place, turns: int) -> Iterator[Row]:
    """The first run of each contestant in a process."""
    seconds = dict.fromkeys(problem.contestants, float("inf"))
    for _ in range(turns):
        for name in problem.contestants:
            with fresh_process() as process:
                first = process.submit(first_seconds, problem, name, shape, place).result()
            seconds[name] = min(seconds[name], first)
    for name, best in seconds.items():
        ratio = best / seconds[problem.yardstick]
        yield Row(SECTION, str(shape), f"first step, {name}", best, ratio, None, place)


def first_seconds(problem: Problem, name: str, shape: Shape, place: Place) -> float:
    """How long a contestant's run takes in this process."""
    torch.set_num_threads(place.threads)
    inputs = problem.make_inputs(shape, place)
    return seconds_of(lambda: problem.contestants[name](*inputs), place)
