"""Measure speed and memory of the losses beside torch's own, and write them as a CSV.

    python scripts/benchmark.py                      # every section, some ten minutes
    python scripts/benchmark.py --quick              # small shapes, about a minute
    python scripts/benchmark.py --sections linear hvp --output linear.csv

Every time is the best of several runs that take turns, and each ratio compares times of one run.
On a CPU, memory is the growth of a fresh process's peak, less the gradients that are asked for.
"""

import argparse
import csv
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from torch_softmax._command_line import Parser
from torch_softmax.functional import cross_entropy, linear_cross_entropy

MIB = 2**20
SEED = 0


class Shape(NamedTuple):
    """Rows, features and classes of a problem."""

    N: int
    D: int
    K: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Place(NamedTuple):
    """Where and in which dtype to measure."""

    device: str
    dtype: torch.dtype

    def randn(self, *shape: int, requires_grad: bool = False) -> Tensor:
        """Numbers from the normal distribution."""
        numbers = torch.randn(*shape, device=self.device, dtype=self.dtype)
        return numbers.requires_grad_(requires_grad)


class Row(NamedTuple):
    """One measurement; `ratio` is to the section's yardstick in the same run."""

    section: str
    shape: str
    name: str
    seconds: float
    ratio: float
    memory_mib: float | None


Contestants = dict[str, Callable[[], object]]


def logits_contestants(shape: Shape, place: Place) -> Contestants:
    """The loss on given logits, forward and backward."""
    z = place.randn(shape.N, shape.K, requires_grad=True)
    target = torch.randint(shape.K, (shape.N,), device=place.device)
    return {
        "torch": lambda: torch.autograd.grad(F.cross_entropy(z, target), z),
        "ours": lambda: torch.autograd.grad(cross_entropy(z, target), z),
    }


def linear_contestants(shape: Shape, place: Place) -> Contestants:
    """The loss of a linear layer with all gradients, beside the bare products of its shapes."""
    x = place.randn(shape.N, shape.D, requires_grad=True)
    W = (place.randn(shape.K, shape.D) / shape.D**0.5).requires_grad_()
    target = torch.randint(shape.K, (shape.N,), device=place.device)

    def products() -> object:
        with torch.no_grad():
            z = x @ W.t()
            return z @ W, z.t() @ x

    def gradients(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), (x, W))

    contestants = {
        "three products": products,
        "torch dense": gradients(lambda: F.cross_entropy(F.linear(x, W), target)),
        "ours": gradients(lambda: linear_cross_entropy(x, W, target)),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        contestants["torch chunked"] = gradients(
            lambda: F.linear_cross_entropy(x, W, target, options=options)
        )
    return contestants


def forward_contestants(shape: Shape, place: Place) -> Contestants:
    """The loss of a linear layer alone, beside the bare product of its shapes."""
    x, W = place.randn(shape.N, shape.D), place.randn(shape.K, shape.D) / shape.D**0.5
    target = torch.randint(shape.K, (shape.N,), device=place.device)
    return {
        "one product": lambda: x @ W.t(),
        "torch dense": lambda: F.cross_entropy(F.linear(x, W), target),
        "ours": lambda: linear_cross_entropy(x, W, target),
    }


def hvp_contestants(shape: Shape, place: Place) -> Contestants:
    """A Hessian-vector product with respect to the weight, with loss and gradient besides.

    By double backward ours needs five products: two for loss and gradient (z = x Wᵀ, gᵀ x), and
    three for their change along the vector (z again, x vᵀ, hᵀ x). By torch.func it needs eight:
    the loss, its slope (two), its gradient (two), and the three.
    """
    x, W = place.randn(shape.N, shape.D), place.randn(shape.K, shape.D) / shape.D**0.5
    v = place.randn(shape.K, shape.D)
    target = torch.randint(shape.K, (shape.N,), device=place.device)

    def products(forth: int, back: int) -> Callable[[], object]:
        z, dW = x @ W.t(), W.clone()

        def run() -> None:
            for _ in range(forth):
                torch.mm(x, W.t(), out=z)
            for _ in range(back):
                torch.mm(z.t(), x, out=dW)

        return run

    def along(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.func.jvp(torch.func.grad(loss), (W,), (v,))

    def twice(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def run() -> object:
            leaf = W.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
            return torch.autograd.grad(gradient, leaf, v)

        return run

    def dense(W: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, W), target)

    def ours(W: Tensor) -> Tensor:
        return linear_cross_entropy(x, W, target)

    return {
        "five products": products(3, 2),
        "eight products": products(6, 2),
        "dense, double backward": twice(dense),
        "ours, double backward": twice(ours),
        "dense, torch.func": along(dense),
        "ours, torch.func": along(ours),
    }


class Section(NamedTuple):
    """A question to measure: contestants, the one that ratios are to, and shapes."""

    contestants: Callable[[Shape, Place], Contestants]
    yardstick: str
    shapes: list[Shape]
    quick_shapes: list[Shape]
    gradient_numel: Callable[[Shape], int]


BIG = [Shape(2048, 512, 32768), Shape(4096, 512, 65536)]
SMALL = [Shape(512, 128, 8192)]
MNIST_STEP = Shape(128, 784, 10)

SECTIONS = {
    "logits": Section(
        logits_contestants,
        "torch",
        [Shape(2048, 1, 32768), Shape(128, 1, 10)],
        [Shape(512, 1, 8192), Shape(128, 1, 10)],
        lambda s: 0,
    ),
    "linear": Section(
        linear_contestants,
        "three products",
        [*BIG, Shape(8192, 768, 50257), MNIST_STEP],
        [*SMALL, MNIST_STEP],
        lambda s: s.N * s.D + s.K * s.D,
    ),
    "forward": Section(forward_contestants, "one product", BIG[:1], SMALL, lambda s: 0),
    "hvp": Section(hvp_contestants, "five products", BIG[:1], SMALL, lambda s: s.K * s.D),
    "growth": Section(
        linear_contestants,
        "three products",
        [Shape(n, 256, 16384) for n in (1024, 4096, 16384)],
        [Shape(n, 64, 4096) for n in (256, 1024)],
        lambda s: s.N * s.D + s.K * s.D,
    ),
}


def prepare(section: str, shape: Shape, place: Place) -> Contestants:
    """The contestants of a section, on the same random numbers every time."""
    torch.manual_seed(SEED)
    return SECTIONS[section].contestants(shape, place)


def best_seconds(contestants: Contestants, place: Place, repeats: int) -> dict[str, float]:
    """The shortest time of each contestant, which take turns."""
    seconds = dict.fromkeys(contestants, float("inf"))
    for _ in range(repeats + 1):  # the first turn warms up, and is as good as any for a minimum
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if place.device == "cuda":
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def resident_peak(*, reset: bool = False) -> int:
    """The most memory in bytes that this process has held, from now on if reset (Linux only)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def memory_bytes(section: str, shape: Shape, place: Place, name: str) -> int:
    """What a contestant's first run adds to the memory in use, gradients included."""
    run = prepare(section, shape, place)[name]
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = resident_peak(reset=True)
    result = run()
    del result
    return resident_peak() - before


def memory_in_fresh_process(section: str, shape: Shape, place: Place, name: str) -> float | None:
    """The memory of a contestant above its gradients in MiB, None where it can't be told."""
    if place.device == "cpu" and sys.platform != "linux":
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        growth = fresh.submit(memory_bytes, section, shape, place, name).result()
    gradients = SECTIONS[section].gradient_numel(shape) * place.dtype.itemsize
    return (growth - gradients) / MIB


def measure(section: str, shape: Shape, place: Place, repeats: int) -> Iterator[Row]:
    """Measure every contestant of a section on one shape."""
    small = shape.N * shape.K < 2**16
    contestants = prepare(section, shape, place)
    seconds = best_seconds(contestants, place, 2000 if small else repeats)
    yardstick = seconds[SECTIONS[section].yardstick]
    del contestants
    for name, best in seconds.items():
        memory = None if small else memory_in_fresh_process(section, shape, place, name)
        yield Row(section, str(shape), name, best, best / yardstick, memory)


def machine(place: Place) -> dict[str, object]:
    """What the numbers were measured on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        processor = models[0].partition(":")[2].strip() if models else processor
    if place.device == "cuda":
        processor = torch.cuda.get_device_name()
    return {
        "device": processor,
        "threads": torch.get_num_threads(),
        "dtype": str(place.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description="Measure speed and memory beside torch's own losses, and write a CSV.",
        epilog="example: python scripts/benchmark.py --sections linear --output linear.csv",
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="small shapes, about a minute")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, default=Path("benchmark.csv"), help="the CSV")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {arguments.repeats}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write."""
    arguments = parse(argv)
    place = Place(arguments.device, getattr(torch, arguments.dtype))
    conditions = machine(place)
    try:
        file = arguments.output.open("w", newline="")
    except OSError as error:
        print(f"--output can't be written: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    with file:
        writer = csv.DictWriter(file, [*Row._fields, *conditions])
        writer.writeheader()
        for section in arguments.sections:
            chosen = SECTIONS[section]
            shapes = chosen.quick_shapes if arguments.quick else chosen.shapes
            for shape in tqdm(shapes, desc=section, leave=False, disable=None):
                for row in measure(section, shape, place, arguments.repeats):
                    writer.writerow(row._asdict() | conditions)
                    memory = "" if row.memory_mib is None else f"{row.memory_mib:8.0f} MiB"
                    tqdm.write(
                        f"{row.section:8} {row.shape:>16}  {row.name:24}"
                        f"{row.seconds * 1e3:10.3f} ms {row.ratio:7.2f} × {memory}"
                    )
                file.flush()
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
