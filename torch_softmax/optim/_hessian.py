"""The Hessian of a linear layer's cross-entropy, and softmaxes held for many products with it.

With a row's x, S = softmax(W x + b), J = diag S − S Sᵀ, and r what its loss is multiplied with, the
Hessian of Σ r L by W and b is H = Σ r J ⊗ x̃ x̃ᵀ, where x̃ is x followed by a 1 for the bias. J is
positive semi-definite and does not depend on the label: H is the Gauss-Newton and the Fisher
matrix too. H u takes two products of the layer where S is held, and three otherwise.

Source: Böhning, Multinomial logistic regression algorithm (1992), equation 2.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses import _formulas as formulas
from ..losses._chunked import cut, slices
from ..losses._dtypes import accumulation_dtype, cast
from ..losses._products import add_pulled_to_classes_, multiplied_in, multiply
from ..losses._sweeps import FEW_CLASSES, cached_rows
from ..losses.linear import default_chunk_size
from ._rows import Rows, memory_of

_HELD = 0.25  # of the memory of a device, for S
# A CPU's core finds this many numbers of x and of logits in its cache for the next product or pass;
# other devices want few large kernels.
_CACHED_INPUT, _CACHED_LOGITS, _LAUNCHED = 2**20, 2**17, 2**26


class Layer(NamedTuple):
    """A linear layer, z = x Wᵀ + b; or M directions of its W (M, K, D) and b (M, K)."""

    W: Tensor  # (K, D)
    b: Tensor | None  # (K,)

    @classmethod
    def split(cls, v: Tensor, features: int) -> "Layer":
        """W and b as views of v (..., K, P), whose last column is b if P is D + 1."""
        return cls(v[..., :features], v[..., features] if v.shape[-1] > features else None)

    def join(self) -> Tensor:
        """The tensor v (..., K, P) of W and b."""
        return self.W if self.b is None else torch.cat([self.W, self.b.unsqueeze(-1)], -1)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Layer":
        """The results of a function for W and for b."""
        return Layer(function(self.W), None if self.b is None else function(self.b))


class Batch(NamedTuple):
    """Some rows, and what the loss of each is multiplied with."""

    rows: Rows
    factor: Tensor | None  # r, (N,); None for 1


@dataclass(frozen=True)
class Layout:
    """How rows are cut into chunks, and in which form a chunk's logits are computed.

    Logits are (n, K). Few classes are (parts, K, n / parts) instead: each core multiplies a part of
    its own, which takes a quarter less time than one product that all cores share.
    """

    classes: int  # K
    dtype: torch.dtype  # of logits and S
    step: int  # the number of rows of a chunk
    parts: int

    def chunks(self, batches: Iterable[Batch]) -> Iterator["Chunk"]:
        """The rows of all batches, a chunk at a time."""
        for rows, factor in batches:
            for part in slices(len(rows), self.step):
                yield Chunk(self, rows, part, None if factor is None else factor[part])


def layout_of(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, chunk_size: int | None = None
) -> Layout:
    """The layout for a weight (K, D), with a given number of rows or one that fits the caches."""
    on_cpu, classes, features = device.type == "cpu", shape[0], max(1, shape[1])
    parts = torch.get_num_threads() if on_cpu and classes <= FEW_CLASSES else 1
    if chunk_size is None and classes > FEW_CLASSES:
        chunk_size = default_chunk_size(classes, features, device)
        if on_cpu:
            chunk_size = min(chunk_size, max(512, _CACHED_INPUT // features))
    elif chunk_size is None and on_cpu:
        chunk_size = parts * max(512, min(_CACHED_INPUT // features, _CACHED_LOGITS // classes))
    elif chunk_size is None:
        chunk_size = max(1024, _LAUNCHED // max(features, classes))
    return Layout(classes, dtype, chunk_size, parts)


@dataclass(frozen=True)
class Chunk:
    """Some rows that are worked on at a time."""

    layout: Layout
    rows: Rows
    part: slice
    factor: Tensor | None  # (n,)

    @functools.cached_property
    def x(self) -> Tensor:
        """The rows (n, D), or (parts, n / parts, D) for few classes, read when first needed."""
        x, parts = self.rows.read(self.part), self.layout.parts
        if self.layout.classes > FEW_CLASSES:
            return x
        parts = 1 if len(x) % parts else parts
        return cast(x, self.layout.dtype).view(parts, len(x) // parts, x.shape[1])

    def weighted(self, values: Tensor, block: slice) -> Tensor:
        """Values (n, C) of a block of the chunk's rows, times the factors of these rows."""
        return values if self.factor is None else values * self.factor[block].unsqueeze(1)


def blocks(*values: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Rows that fit a CPU's cache, with views (n, C) of these rows in tensors like the logits."""
    first = values[0]
    if first.dim() == 3:
        for i, part in enumerate(slices(first.shape[0] * first.shape[2], max(1, first.shape[2]))):
            yield part, [value[i].t() for value in values]
    else:
        on_cpu, rows = first.device.type == "cpu", len(first)
        for part in slices(rows, cached_rows(first.shape[1]) if on_cpu else max(1, rows)):
            yield part, [cut(value, part) for value in values]


class Logits:
    """The logits of a chunk, many classes in a buffer that the next chunk overwrites.

    Fresh memory costs a CPU more than the arithmetic done in it.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.buffer: Tensor | None = None

    def at(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The logits x Wᵀ + b, for the classes of a layer or of several."""
        dtype = self.layout.dtype
        if x.dim() == 3:
            z = torch.bmm(cast(W, dtype).expand(len(x), -1, -1), x.transpose(1, 2))
            return z if b is None else z.add_(cast(b, dtype).unsqueeze(1))
        if self.buffer is None or len(self.buffer) < len(x):
            self.buffer = x.new_empty(len(x), len(W), dtype=dtype)
        return multiply(x, W, b, self.buffer[: len(x)])


def add_pulled_(out: Tensor, z: Tensor, x: Tensor) -> None:
    """Add zᵀ x to `out` (K, D), for a chunk's x and z in the form of its logits."""
    if z.dim() == 3:
        out.add_(torch.bmm(z, x).sum(0))
    elif out.dtype == accumulation_dtype(x.dtype):
        add_pulled_to_classes_(out, cast(z, multiplied_in(x.dtype, x.device)), x)
    else:  # sums in float64 of products in float32
        out.add_(z.t() @ x)


def rows_to_hold(layout: Layout, device: torch.device) -> int:
    """The number of rows whose S may be held, in a share of a device's memory."""
    return int(_HELD * memory_of(device)) // (layout.classes * layout.dtype.itemsize)


class Held:
    """Logits or S of the first chunks, of a limited number of rows."""

    def __init__(self, rows: int, layout: Layout, device: torch.device) -> None:
        # Made once: small tensors that stay between large ones that go would break up the heap.
        self.room = torch.empty(rows * layout.classes, dtype=layout.dtype, device=device)
        self.chunks: list[Tensor] = []

    def get(self, number: int) -> Tensor | None:
        """What is held of the chunk of a number, or None."""
        return self.chunks[number] if number < len(self.chunks) else None

    def over(
        self, chunks: Iterable[Chunk], make: Callable[[int, Chunk], Tensor]
    ) -> Iterator[tuple[Chunk, Tensor]]:
        """Each chunk with what is held of it, or is made, and then held if there is room."""
        for number, chunk in enumerate(chunks):
            value = self.get(number)
            if value is None:
                value = make(number, chunk)
                if number == len(self.chunks) and value.numel() <= len(self.room):
                    room, self.room = self.room.tensor_split([value.numel()])
                    value = room.view(value.shape).copy_(value)
                    self.chunks.append(value)
            yield chunk, value


@dataclass(frozen=True)
class Softmaxes:
    """S of all rows, a chunk at a time; it is computed once, as far as there is room to hold it."""

    batches: Iterable[Batch]  # read again in every pass
    layer: Layer
    layout: Layout
    held: Held | None = None  # where S is held; None for a single pass
    logits: Held | None = None  # of the first chunks, where they are known

    def __iter__(self) -> Iterator[tuple[Chunk, Tensor]]:
        logits = Logits(self.layout)

        def make(number: int, chunk: Chunk) -> Tensor:
            z = None if self.logits is None else self.logits.get(number)
            if z is None:
                z = S = logits.at(chunk.x, *self.layer)
            else:
                S = torch.empty_like(z, dtype=self.layout.dtype)
            if z.dim() == 3:
                return torch.softmax(z, 1, dtype=self.layout.dtype)
            for _, (here, out) in blocks(z, S):
                out.copy_(formulas.softmax(cast(here, self.layout.dtype), 1))
            return S

        held = self.held or Held(0, self.layout, self.layer.W.device)
        return held.over(self.layout.chunks(self.batches), make)


def add_products_(out: Layer, softmaxes: Softmaxes, directions: Layer) -> None:
    """Add the products H u = Σ r J (u x̃) x̃ᵀ with M directions u to W (M, K, D) and b (M, K)."""
    layout = softmaxes.layout
    W, b = directions
    # Few classes are many directions' at a time, in a product that is faster for it.
    together, changes = max(1, FEW_CLASSES // layout.classes), Logits(layout)
    for chunk, S in softmaxes:
        if chunk.x.dim() == 2:
            W = cast(W, multiplied_in(chunk.x.dtype, chunk.x.device))
        for some in slices(len(W), together) if len(W) else ():
            bias = None if b is None else b[some].flatten()
            u = changes.at(chunk.x, W[some].flatten(0, 1), bias)
            for block, (softmax, along) in blocks(S, u):
                change = along.unflatten(1, (-1, layout.classes))
                product = formulas.jacobian_product(softmax.unsqueeze(1), change, 2).flatten(1, 2)
                along.copy_(chunk.weighted(product, block))
                if out.b is not None:
                    out.b[some].add_(along.sum(0).view(-1, layout.classes))
            add_pulled_(out.W[some].flatten(0, 1), u, chunk.x)


class Moments(NamedTuple):
    """The first and second moments of rows x, that may be weighted."""

    mean: Tensor | None  # (D,), where there is a bias
    second: Tensor  # (D, D), of x − mean, as rounding would hide them beside a large mean; or of x
    made_in: torch.dtype  # the dtype of the products


def alone(sums: Tensor) -> Tensor:
    """The sums over all processes, where there is one."""
    return sums


def moments_of(
    batches: Iterable[Batch],
    layout: Layout,
    zeros: Tensor,
    *,
    bias: bool,
    total: Callable[[Tensor], Tensor] = alone,
) -> Moments:
    """The moments of all rows, each weighted by the size of its factor.

    Sums have the dtype and device of some zeros (D,), and are totalled over all ranks. Rows are
    read twice if there is a bias.
    """

    def average(
        sums: Tensor, mean: Tensor | None, term: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The weighted average of a term of x − mean and of x − mean times its weight."""
        count = zeros.new_zeros(())
        for rows, factor in batches:
            for part in slices(len(rows), layout.step):
                x = cast(rows.read(part), layout.dtype)
                x = x if mean is None else x - mean.to(x.dtype)
                weight = None if factor is None else factor[part].abs().unsqueeze(1)
                sums += term(x, x if weight is None else weight * x)
                count += len(x) if weight is None else weight.sum(dtype=zeros.dtype)
        count = total(count)
        return total(sums) / torch.where(count == 0, 1, count)

    mean = average(zeros.clone(), None, lambda _, weighted: weighted.sum(0)) if bias else None
    square = zeros.new_zeros(len(zeros), len(zeros))
    second = average(square, mean, lambda x, weighted: x.t() @ weighted)
    return Moments(mean, second, layout.dtype)
