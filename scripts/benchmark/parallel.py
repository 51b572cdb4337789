"""Classes sharded over processes: what these send, how long a step takes, and what to expect."""

import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from torch_softmax.functional import linear_cross_entropy
from torch_softmax.losses.linear import default_chunk_size

from .measure import MIB, SEED, Options, Place, Row, Shape, tensors_in

SECTION = "parallel"
SHAPE, QUICK_SHAPE = Shape(2048, 256, 32768), Shape(256, 64, 4096)
STEPS = 5

# What the estimate is for: its peak is that of an H100's data sheet, in bfloat16 without sparsity,
# and its link one direction of such a GPU's NVLink.
HEAD, RANKS, BYTES = Shape(8192, 4096, 1_000_000), 8, 2
PEAK_FLOPS, LINK_BYTES = 989e12, 450e9


class Message(NamedTuple):
    """A collective that was started, and the numbers that each rank brought."""

    name: str
    numel: int
    nbytes: int


class Traffic(TorchDispatchMode):
    """Records the collectives that are started while this is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: list[Message] = []

    @property
    def messages(self) -> list[tuple[str, int]]:
        """The name and the numbers of each."""
        return [(message.name, message.numel) for message in self.sent]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d":
            tensors = tensors_in(args)
            numel, nbytes = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
            self.sent.append(Message(name, numel, nbytes))
        return func(*args, **(kwargs or {}))


def parallel(options: Options) -> Iterator[Row | str]:
    """Measure a step of one and of two processes on this machine, a thread each, and estimate."""
    shape = QUICK_SHAPE if options.quick else SHAPE
    place = Place("cpu", torch.float32, 1)
    alone, _ = measure_world(1, shape)
    yield Row(SECTION, str(shape), "1 process", alone, 1.0, None, place)
    shared, nbytes = measure_world(2, shape)
    yield Row(SECTION, str(shape), "2 processes", shared, shared / alone, None, place)
    yield message_line(shape, 2, nbytes)
    wide = shape._replace(K=2 * shape.K)
    doubled, _ = measure_world(2, wide)
    name = "2 processes, as many classes each"
    yield Row(SECTION, str(wide), name, doubled, doubled / alone, None, place)
    yield from estimate()


def message_line(shape: Shape, size: int, nbytes: int) -> str:
    """What was sent, beside what a gather of the logits would take."""
    gathered = shape.N * shape.K * 4 * (size - 1) / size
    dx = shape.N * shape.D * 4
    return (
        f"{SECTION} at {shape}, {size} processes: each brings {nbytes / 1024:,.0f} KiB to the sums "
        f"of a step, of which ∂L/∂x is {dx / 1024:,.0f}; a gather of the logits would bring it "
        f"{gathered / 1024:,.0f} KiB (N K {size - 1}/{size} numbers, computed, as of Megatron-LM's "
        "ColumnParallelLinear with gather_output) besides ∂L/∂x"
    )


def measure_world(size: int, shape: Shape) -> tuple[float, int]:
    """The shortest of some steps, of the slowest rank, and the bytes that a rank brings to one."""
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        arguments = ((rank, size, shape, Path(folder, "store"), results) for rank in range(size))
        ranks = [context.Process(target=run_rank, args=each, daemon=True) for each in arguments]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError(f"one of {size} processes failed")
        result: tuple[float, int] = results.get()
        return result


def run_rank(rank: int, size: int, shape: Shape, store: Path, results: Any) -> None:
    """Be one of the processes; the first one answers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store.as_uri(), world_size=size, rank=rank)
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(SEED)
    x = torch.randn(shape.N, shape.D, requires_grad=True)
    target = torch.randint(shape.K, (shape.N,))
    part = torch.empty(shape.K, 0).chunk(size)[rank]
    torch.manual_seed(SEED + rank)
    local = torch.randn(len(part), shape.D) / shape.D**0.5
    whole = torch.Size((shape.K, shape.D))
    W = DTensor.from_local(local, mesh, [Shard(0)], shape=whole, stride=(shape.D, 1))
    W.requires_grad_()

    def step() -> None:
        torch.autograd.grad(linear_cross_entropy(x, W, target), (x, W))

    with Traffic() as traffic:
        step()
    best = float("inf")
    for _ in range(STEPS):
        dist.barrier()
        start = time.perf_counter()
        step()
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        best = min(best, seconds.item())
    if rank == 0:
        results.put((best, sum(message.nbytes for message in traffic.sent)))
    dist.barrier()
    dist.destroy_process_group()


def estimate() -> Iterator[str]:
    """What a large head would take on several GPUs, by formulas and not measured."""
    N, D, K = HEAD
    share = K // RANKS
    rows = default_chunk_size(share, D, torch.device("cuda"))
    ring = 2 * (RANKS - 1) / RANKS  # what an all-reduce sends, in sizes of the tensor
    flops = 3 * 2 * N * D * share
    sums, dx = 3 * N * 4, N * D * 4  # float32, also where the input is narrower
    memory = {
        "the weight": share * D * BYTES,
        "its gradient in float32": share * D * 4,
        "a chunk's part of that": share * D * 4,
        f"{rows} rows of logits with two copies in float32": rows * share * (BYTES + 2 * 4),
        "the input and its gradient": 2 * N * D * BYTES,
    }
    parts = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in memory.items())
    yield f"estimate, not measured: {N} rows, {D} features, {K:,} classes on {RANKS} GPUs, bfloat16"
    yield (
        f"  memory of a rank: {sum(memory.values()) / MIB:,.0f} MiB at the peak ({parts}); "
        f"all logits alone would be {N * K * BYTES / MIB:,.0f} MiB"
    )
    yield (
        f"  sent by a rank in a step: {ring * sums / 1024:,.0f} KiB for the loss and "
        f"{ring * dx / MIB:,.0f} MiB for ∂L/∂x; a gather of the logits: "
        f"{N * share * BYTES * (RANKS - 1) / MIB:,.0f} MiB"
    )
    yield (
        f"  floor of a step: {flops / PEAK_FLOPS * 1e3:.0f} ms of products at the peak of an H100 "
        f"({PEAK_FLOPS / 1e12:.0f} TFLOP/s), and {ring * dx / LINK_BYTES * 1e3:.2f} ms for ∂L/∂x "
        f"at {LINK_BYTES / 1e9:.0f} GB/s; a gather of the logits would add "
        f"{N * share * BYTES * (RANKS - 1) / LINK_BYTES * 1e3:.0f} ms"
    )
