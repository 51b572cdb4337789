"""What a mean loss with its gradients would take on a GPU: a prediction, without one at hand.

The loss is traced over fake CUDA tensors, which have shapes and no numbers. Each kernel is taken
to last as long as its products or its traffic, whichever is longer, and a launch; memory is what
the tensors alive add up to. What a real allocator and cache do is left out. Only the forward pass
can be traced without a GPU, which is where the gradients are taken along.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from torch_softmax.functional import linear_cross_entropy

from .measure import MIB, Options, Place, Row, Shape, tensors_in

SECTION = "roofline"
# Heads of language models, (rows of a step, width, vocabulary).
HEADS = [
    Shape(8192, 4096, 128256),
    Shape(16384, 2048, 151936),
    Shape(8192, 2304, 256000),
    Shape(4096, 768, 50257),
]
PLACE = Place("H100, by tracing", torch.bfloat16, 1)


class Card(NamedTuple):
    """The speed of a GPU."""

    flops: float  # a second, in bfloat16
    bandwidth: float  # bytes a second
    launch: float  # seconds of a kernel that has nothing to do

    def seconds(self, flops: float, traffic: float) -> float:
        """What a kernel takes that does so many operations, and moves so many bytes."""
        return max(flops / self.flops, traffic / self.bandwidth) + self.launch


H100 = Card(flops=798e12, bandwidth=3.0e12, launch=4e-6)  # both rates were measured on one


class Trace(TorchDispatchMode):
    """Adds up, while this is active, what the kernels called would take, and what is alive."""

    def __init__(self, card: Card) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.card = card
        self.seconds = 0.0
        self.peak = 0
        self.alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = tensors_in((args, {name: v for name, v in (kwargs or {}).items() if name != "out"}))
        written = tensors_in(result)
        self._hold(written)
        name = func._schema.name
        if written and not func.is_view:
            count = flop_registry.get(func._overloadpacket)
            flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=result)
            self.seconds += self.card.seconds(flops, _traffic(name, read, written))
        return result

    def _hold(self, tensors: list[Tensor]) -> None:
        """Count the storages that are new, without those that are gone."""
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.alive.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(self.alive.values()))


def _traffic(name: str, read: list[Tensor], written: list[Tensor]) -> int:
    """The bytes that a kernel reads and writes."""
    if name.startswith("aten::new_"):  # whose argument only tells of dtype and device
        read = []
    if name == "aten::copy_":  # which reads nothing of what it writes over
        _, *read = read
    if name in ("aten::gather", "aten::scatter_add_"):  # which touch a number for each index
        index = next(tensor for tensor in read if tensor.dtype == torch.int64)
        return index.nbytes + 3 * index.numel() * written[0].element_size()
    return sum(tensor.nbytes for tensor in (*read, *written))


def predict(shape: Shape, card: Card = H100) -> tuple[float, int]:
    """The seconds of our mean loss with its gradients, and the bytes above its inputs and these."""
    with FakeTensorMode(), Trace(card) as trace:
        x = torch.empty(shape.N, shape.D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        W = torch.empty(shape.K, shape.D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        target = torch.empty(shape.N, device="cuda", dtype=torch.int64)
        trace.seconds = 0.0
        linear_cross_entropy(x, W, target)
    return trace.seconds, trace.peak - 2 * (x.nbytes + W.nbytes) - target.nbytes


def three_products(shape: Shape, card: Card = H100) -> float:
    """The seconds of x Wᵀ, z W and zᵀ x alone."""
    flops = 2 * shape.N * shape.D * shape.K
    numbers = shape.N * shape.D + shape.K * shape.D + shape.N * shape.K
    return 3 * card.seconds(flops, torch.bfloat16.itemsize * numbers)


def roofline(options: Options) -> Iterator[Row | str]:
    """Predict each contestant at each head."""
    if torch.__version__.startswith("2.6.") and not torch.cuda.is_available():
        # Which would abort where a fake CUDA tensor is differentiated.
        yield f"{SECTION}: left out, as torch 2.6 needs a driver for it"
        return
    yield f"{SECTION}: predicted by tracing for an H100 in bfloat16, and not measured"
    for shape in HEADS[-1:] if options.quick else HEADS:
        seconds, extra = predict(shape)
        ratio = seconds / three_products(shape)
        yield Row(SECTION, str(shape), "ours, predicted", seconds, ratio, extra / MIB, PLACE)
