"""How contestants are measured: results are checked first, then memory, and times in turns.

A time is the best of several, for which the contestants take turns, so that whatever else the
machine does meets them alike. On a CPU, memory is what a process grows by at its peak.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_softmax._checks import UserError

MIB = 2**20
SEED = 0
TURNS = 3  # at least
FEW_LOGITS = 2**16  # fewer are lost in the noise of a process's memory
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # relative, of the norm of a result

# Its server imports torch once, where otherwise every process would.
PROCESSES = get_context("spawn" if sys.platform == "win32" else "forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch_softmax.functional"])

Results = tuple[Tensor, ...]
Run = Callable[[], object]
Contestant = Callable[..., Results]  # called with a problem's inputs
Floor = Callable[..., Run]  # the same, to come to its run


class Shape(NamedTuple):
    """Rows, features and classes of a problem."""

    N: int
    D: int
    K: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


CHECKED = Shape(64, 32, 512)  # what results are compared on


class Place(NamedTuple):
    """Where and in which dtype to measure."""

    device: str
    dtype: torch.dtype
    threads: int

    def randn(self, *shape: int) -> Tensor:
        """Numbers from the normal distribution."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def classes(self, shape: Shape) -> Tensor:
        """A class for each row."""
        return torch.randint(shape.K, (shape.N,), device=self.device)

    def wait(self) -> None:
        """Wait for what the device was given to do."""
        if self.device != "cpu":
            torch.accelerator.synchronize()


class Options(NamedTuple):
    """What the command line says to every section."""

    place: Place
    seconds: float
    quick: bool
    data_dir: Path


class Row(NamedTuple):
    """One measurement; `ratio` is to the time of the section's yardstick in the same run."""

    section: str
    shape: str
    name: str
    seconds: float
    ratio: float
    memory_mib: float | None
    place: Place


class Problem(NamedTuple):
    """What several contestants compute from the same inputs.

    Args:
        section: Its name.
        inputs: The tensors that each contestant is called with.
        floors: The bare matrix products that the results need.
        contestants: By name; a fresh process is sent them, so they are functions of a module.
        reference: The name of the contestant whose results are right.
        yardstick: The name of the contestant or floor that ratios are to.
    """

    section: str
    inputs: Callable[[Shape, Place], Results]
    floors: Mapping[str, Floor]
    contestants: Mapping[str, Contestant]
    reference: str
    yardstick: str

    def make_inputs(self, shape: Shape, place: Place) -> Results:
        """The inputs, of the same random numbers every time."""
        torch.manual_seed(SEED)
        return self.inputs(shape, place)


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among some arguments or results, however they are nested."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class UnavailableError(Exception):
    """Something can't be measured here; the message says why."""


def reason(error: Exception) -> str:
    """Why something was not measured, in a line."""
    if isinstance(error, (UnavailableError, UserError)):
        return str(error)
    if isinstance(error, BrokenProcessPool):
        return "its process was killed, mostly for want of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([f"fails with {type(error).__name__}", *lines[:1]])


def measure(problem: Problem, shapes: Sequence[Shape], options: Options) -> Iterator[Row | str]:
    """Measure a problem's contestants and floors on some shapes; what is left out is a string."""
    memory: dict[tuple[str, Shape], float | None] = {}
    for name in problem.contestants:
        try:
            for shape, mib in weigh(problem, name, shapes, options.place):
                memory[name, shape] = mib
        except Exception as error:
            missing = ", ".join(str(shape) for shape in shapes if (name, shape) not in memory)
            yield f"{problem.section} at {missing} without {name}: {reason(error)}"
    torch.set_num_threads(options.place.threads)
    for shape in shapes:
        inputs = problem.make_inputs(shape, options.place)
        runs = {name: floor(*inputs) for name, floor in problem.floors.items()}
        for name, contestant in problem.contestants.items():
            if (name, shape) in memory:
                runs[name] = partial(contestant, *inputs)
        seconds = yield from best_seconds(f"{problem.section} at {shape}", runs, options)
        for name, best in seconds.items():
            ratio = best / seconds.get(problem.yardstick, float("nan"))
            mib = memory.get((name, shape))
            yield Row(problem.section, str(shape), name, best, ratio, mib, options.place)


def best_seconds(
    title: str, runs: Mapping[str, Run], options: Options
) -> Generator[str, None, dict[str, float]]:
    """The shortest time of each run that doesn't fail, by its name; yields who did and why."""
    seconds = dict.fromkeys(runs, float("inf"))
    begin, turn = time.perf_counter(), 0
    # The first turn warms up, and is as good as any for a minimum.
    while turn < TURNS or time.perf_counter() - begin < options.seconds:
        for name in list(seconds):
            try:
                seconds[name] = min(seconds[name], seconds_of(runs[name], options.place))
            except Exception as error:
                del seconds[name]
                yield f"{title} without {name}: {reason(error)}"
        turn += 1
    return seconds


def seconds_of(run: Run, place: Place) -> float:
    """How long a run takes."""
    place.wait()
    start = time.perf_counter()
    run()
    place.wait()
    return time.perf_counter() - start


def weigh(
    problem: Problem, name: str, shapes: Sequence[Shape], place: Place
) -> Iterator[tuple[Shape, float | None]]:
    """The memory in MiB that a contestant needs above its results, None where it can't be told.

    All happens in a process of its own, where a failure harms no other contestant.
    """
    with fresh_process() as process:
        process.submit(check, problem, name, place).result()
        for shape in shapes:
            yield shape, process.submit(memory_mib, problem, name, shape, place).result()


def fresh_process() -> Executor:
    """One process that has imported torch, and computed nothing yet."""
    return ProcessPoolExecutor(1, mp_context=PROCESSES)


def check(problem: Problem, name: str, place: Place) -> None:
    """Raise unless a contestant's results are the reference's; this warms it up as well."""
    torch.set_num_threads(place.threads)
    inputs = problem.make_inputs(CHECKED, place)
    results = problem.contestants[name](*inputs)
    expected = problem.contestants[problem.reference](*inputs)
    for result, right in zip(results, expected, strict=True):
        error = float((result - right).double().norm() / right.double().norm())
        if not error <= TOLERANCES[place.dtype]:
            raise UnavailableError(f"its result is wrong, with a relative error of {error:.1e}")


def memory_mib(problem: Problem, name: str, shape: Shape, place: Place) -> float | None:
    """What a contestant's run adds at its peak to the memory in use, less its results."""
    inputs = problem.make_inputs(shape, place)
    before = peak_bytes(place, reset=True)
    results = problem.contestants[name](*inputs)
    place.wait()
    after = peak_bytes(place)
    if before is None or after is None or shape.N * shape.K < FEW_LOGITS:
        return None
    return (after - before - sum(result.nbytes for result in results)) / MIB


def peak_bytes(place: Place, *, reset: bool = False) -> int | None:
    """The most memory in use so far, from now on if reset; None where it can't be told."""
    if place.device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    return resident_peak(reset=reset) if sys.platform == "linux" else None


def resident_peak(*, reset: bool = False) -> int:
    """The most memory in bytes that this process has held, from now on if reset (Linux only)."""
    if reset:
        # What was freed before would hide as much of what is to come.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024
