"""The Hessian of a linear layer's cross-entropy, and S held for many products with it.

With a row's x, S = softmax(W x + b), J = diag S − S Sᵀ, and r what its loss is multiplied with, the
Hessian of Σ r L by W and b is H = Σ r J ⊗ x̃ x̃ᵀ, where x̃ is x, with a 1 for the bias behind it. J is
positive semi-definite and does not depend on the label: H is the Gauss-Newton and the Fisher
matrix too. H u takes two products of the layer where S is held, and three otherwise.

    S     (parts, K, n) for few classes, (n, K) for many: dimension 1 is the classes in both
    x     (parts, n, D) for few classes, (n, D) for many

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
# Numbers of x and of logits to work on at a time, so that a CPU's core finds them in its cache for
# the next product or pass; other devices want few large kernels.
_CACHED_INPUT, _CACHED_LOGITS, _LAUNCHED = 2**20, 2**17, 2**26


class Layer(NamedTuple):
    """A linear layer, z = x Wᵀ + b; or M directions of it, W (M, K, D) and b (M, K)."""

    W: Tensor  # (K, D)
    b: Tensor | None  # (K,)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Layer":
        """The results of a function, for W and for b."""
        return Layer(function(self.W), None if self.b is None else function(self.b))


class Batch(NamedTuple):
    """Some rows, and what the loss of each is multiplied with."""

    rows: Rows
    factor: Tensor | None  # r, (N,); None for 1


def by_row(values: Tensor) -> Tensor:
    """Values in the layout of the logits as (n, K)."""
    return values if values.dim() == 2 else values.transpose(1, 2).flatten(0, 1)


def sum_of_rows(values: Tensor) -> Tensor:
    """The sum over rows, (K,), of values in the layout of the logits."""
    return values.sum((0, 2)[: values.dim() - 1])


@dataclass(frozen=True)
class Layout:
    """How the rows are cut, and in which layout their logits are made.

    Args:
        classes: K.
        dtype: The dtype of logits and S.
        step: The rows of a chunk.
        parts: In how many equal parts a chunk is multiplied, each by a core of its own. For few
            classes that takes a quarter less time than a product that all cores share.
    """

    classes: int
    dtype: torch.dtype
    step: int
    parts: int

    def spread(self, values: Tensor) -> Tensor:
        """Values of the rows of a chunk, (n,) or (n, C), in the layout of the logits."""
        values = values.unsqueeze(1) if values.dim() == 1 else values
        return values if self.classes > FEW_CLASSES else self.cut(values).transpose(1, 2)

    def cut(self, x: Tensor) -> Tensor:
        """The rows of a chunk, (n, D), in equal parts (parts, n, D) where the classes are few."""
        if self.classes > FEW_CLASSES:
            return x
        parts = self.parts if len(x) % self.parts == 0 else 1
        return x.view(parts, len(x) // parts, x.shape[1])

    def chunks(self, batches: Iterable[Batch]) -> Iterator["Chunk"]:
        """The rows of all batches, a chunk at a time."""
        for rows, factor in batches:
            for part in slices(len(rows), self.step):
                here = None if factor is None else self.spread(factor[part])
                yield Chunk(self, rows, part, here)

    def blocks(self, z: Tensor) -> list[slice]:
        """The rows of a chunk to go over at a time, so that a CPU finds them in its cache."""
        whole = z.dim() == 3 or z.device.type != "cpu"
        return list(slices(len(z), max(1, len(z)) if whole else cached_rows(z.shape[1])))


@dataclass(frozen=True)
class Chunk:
    """Some rows that are worked on at a time."""

    layout: Layout
    rows: Rows
    part: slice
    factor: Tensor | None  # (parts, 1, n) or (n, 1); None for 1

    @functools.cached_property
    def x(self) -> Tensor:
        """The rows, which are read when they are first needed."""
        x = self.rows.read(self.part)
        few = self.layout.classes <= FEW_CLASSES
        return self.layout.cut(cast(x, self.layout.dtype)) if few else x

    def weighted(self, values: Tensor, block: slice) -> Tensor:
        """Values in the layout of the logits, a block of the chunk's, times the factors."""
        return values if self.factor is None else values * cut(self.factor, block)


def layout_of(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, chunk_size: int | None = None
) -> Layout:
    """A layout for a weight (K, D), with a given number of rows or one that fits the caches."""
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


class Logits:
    """The logits of a chunk, many classes in a buffer that the next chunk writes over.

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
    """Add zᵀ x to `out` (K, D), where z is in the layout of the logits."""
    if z.dim() == 3:
        out.add_(torch.bmm(z, x).sum(0))
    elif out.dtype == accumulation_dtype(x.dtype):
        add_pulled_to_classes_(out, cast(z, multiplied_in(x.dtype, x.device)), x)
    else:  # sums in float64 of products in float32
        out.add_(z.t() @ x)


def rows_to_hold(layout: Layout, device: torch.device) -> int:
    """The rows whose S may be held, in a share of a device's memory."""
    return int(_HELD * memory_of(device)) // (layout.classes * layout.dtype.itemsize)


class Held:
    """Logits or S of the first chunks, of some rows at most."""

    def __init__(self, rows: int, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        # Made once: small tensors that stay between large ones that go would break up the heap.
        self.room = torch.empty(rows * layout.classes, dtype=layout.dtype, device=device)
        self.chunks: list[Tensor] = []
        self.used = 0

    def get(self, number: int) -> Tensor | None:
        """What is held of the chunk of a number, or None."""
        return self.chunks[number] if number < len(self.chunks) else None

    def has_room(self, rows: int) -> bool:
        """Whether as many rows more can be held."""
        return self.used + rows * self.layout.classes <= len(self.room)

    def add(self, number: int, value: Tensor) -> Tensor:
        """Hold a copy of a chunk if it is the next one and there is room, and return what stays."""
        end = self.used + value.numel()
        if number != len(self.chunks) or end > len(self.room):
            return value
        self.chunks.append(self.room[self.used : end].view(value.shape).copy_(value))
        self.used = end
        return self.chunks[-1]


@dataclass(frozen=True)
class Softmaxes:
    """S of all rows, a chunk at a time: once it was made it is held, as far as there is room.

    Args:
        batches: The rows; gone over again in every pass.
        layer: The layer.
        layout: How the rows are cut.
        held: Where S is held; None for a single pass.
        logits: Logits of the first chunks, where they are known.
    """

    batches: Iterable[Batch]
    layer: Layer
    layout: Layout
    held: Held | None = None
    logits: Held | None = None

    def __iter__(self) -> Iterator[tuple[Chunk, Tensor]]:
        logits = Logits(self.layout)
        for number, chunk in enumerate(self.layout.chunks(self.batches)):
            S = None if self.held is None else self.held.get(number)
            if S is None:
                z = None if self.logits is None else self.logits.get(number)
                made_here = z is None
                if z is None:
                    z = logits.at(chunk.x, *self.layer)
                S = self._softmax(z, write=made_here)
                S = S if self.held is None else self.held.add(number, S)
            yield chunk, S

    def _softmax(self, z: Tensor, *, write: bool) -> Tensor:
        S = z if write else torch.empty_like(z, dtype=self.layout.dtype)
        for block in self.layout.blocks(z):
            S = put(S, block, formulas.softmax(cast(cut(z, block), self.layout.dtype), 1))
        return S


def put(into: Tensor, block: slice, value: Tensor) -> Tensor:
    """Write a block of a chunk; or return the value where it is all of the chunk."""
    if value.shape == into.shape and value.dtype == into.dtype:
        return value
    into[block] = value
    return into


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
            for block in layout.blocks(u):
                along = cut(u, block).unflatten(1, (-1, layout.classes))
                product = formulas.jacobian_product(cut(S, block).unsqueeze(1), along, 2)
                product = chunk.weighted(product.flatten(1, 2), block)
                if out.b is not None:
                    out.b[some].add_(sum_of_rows(product).view(-1, layout.classes))
                u = put(u, block, product)
            add_pulled_(out.W[some].flatten(0, 1), u, chunk.x)


class Moments(NamedTuple):
    """The first and second moments of rows x, that may be weighted.

    Where there is a bias, the second moments are those of x − mean, which are not lost in rounding
    where the mean is large; and otherwise those of x.
    """

    mean: Tensor | None  # (D,), where there is a bias
    second: Tensor  # (D, D)
    made_in: torch.dtype | None = None  # the dtype of the products, where it is another


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

    Args:
        batches: The rows; gone over twice where there is a bias, and once otherwise.
        layout: How many rows to read at a time, and the dtype of products.
        zeros: (D,), of the dtype and on the device of the sums.
        bias: Whether the layer has one.
        total: Adds up a tensor over all processes.
    """

    def read(mean: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | int]]:
        """Some rows x − mean, the same times their weights, and the sum of these."""
        for rows, factor in batches:
            for part in slices(len(rows), layout.step):
                x = cast(rows.read(part), layout.dtype)
                x = x if mean is None else x - mean.to(x.dtype)
                if factor is None:
                    yield x, x, len(x)
                else:
                    weight = factor[part].abs()
                    yield x, weight.unsqueeze(1) * x, weight.sum(dtype=zeros.dtype)

    mean = None
    if bias:
        ones, count = zeros.clone(), zeros.new_zeros(())
        for _, weighted, weight in read(None):
            ones += weighted.sum(0)
            count += weight
        mean = total(ones) / _above_0(total(count))
    second, count = zeros.new_zeros(len(zeros), len(zeros)), zeros.new_zeros(())
    for x, weighted, weight in read(mean):
        second += x.t() @ weighted
        count += weight
    return Moments(mean, total(second) / _above_0(total(count)), layout.dtype)


def _above_0(count: Tensor) -> Tensor:
    """A count to divide by."""
    return torch.where(count == 0, 1, count)
