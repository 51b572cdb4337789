"""Cross-entropy a chunk of rows at a time, by hand and with buffers that the chunks share.

The derivatives that are hot have a sweep each, in closed form: the numbers of each row, the
gradient of T, and the Hessian of T along a direction.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _formulas as formulas
from ._chunked import cut, slices
from ._dtypes import accumulation_dtype, cast
from ._formulas import Across, Change, Factors, Numbers, Point, Target
from ._products import (
    add_multiplied_,
    add_pulled_to_classes_,
    add_pulled_to_rows_,
    multiplied_in,
    multiply,
    pull_to_rows,
)

# Logits that fit a core's own cache beside a few passes over them, measured on a CPU; and the cores
# that share a block, so that it stays small beside a chunk.
_CACHED_LOGITS = 2**17
_MOST_CORES = 32
# On other devices few large kernels are better, in memory that stays below 2²⁶ logits.
_LAUNCHED_LOGITS = 2**26
# Up to this many classes, W xᵀ is a faster product than x Wᵀ.
FEW_CLASSES = 32


class Inputs(NamedTuple):
    """What the numbers of a row are made from; and as well one thing for each of these."""

    x: Any  # (N, D); or without a W, the logits (N, K) themselves
    W: Any = None  # (K, D)
    b: Any = None  # (K,)
    p: Any = None  # (N,) class indices, or (N, K) probabilities
    hot: Any = None  # (N,), and the next two (K,), as in Target
    scale: Any = None
    floor: Any = None
    keep: Any = None  # (N,) bool, False where a row is left out; None where none is

    @property
    def y(self) -> Target:
        """The target distribution."""
        return Target(self.p, self.hot, self.scale, self.floor)

    def rows(self, rows: slice) -> "Inputs":
        """The inputs of some rows, with zeros for the x of those left out, whatever they hold."""
        if rows.start == 0 and rows.stop >= self.x.shape[0]:
            here = self
        else:
            pairs = zip(self, OF_ROWS, strict=True)
            here = Inputs(*(v[rows] if r and v is not None else v for v, r in pairs))
        return here if here.keep is None else here._replace(x=kept(here))


# Which of the inputs have a row for each row.
OF_ROWS = Inputs(True, False, False, True, True, False, False, True)


def kept(inputs: Inputs) -> Tensor:
    """The x of rows, with zeros for those left out."""
    x: Tensor = inputs.x
    return x if inputs.keep is None else x.masked_fill(~inputs.keep.unsqueeze(1), 0)


@dataclass(frozen=True)
class How:
    """How the logits are worked out.

    Args:
        step: The rows of a chunk.
        dtype: That of S and of the numbers of a row.
        logits_dtype: That of the logits, as they come out of the layer's products.
        across: How several places combine their numbers; None where the classes are all here.
    """

    step: int
    dtype: torch.dtype
    logits_dtype: torch.dtype
    across: Across | None = None


def cached_rows(classes: int) -> int:
    """The rows of logits that the caches of all cores hold, as many for each."""
    # A compiler, which fuses the passes itself, can't go on from the number of cores.
    cores = 1 if torch.compiler.is_compiling() else min(torch.get_num_threads(), _MOST_CORES)
    return cores * max(1, _CACHED_LOGITS // max(1, classes))


def logits_step(z: Tensor) -> int:
    """The rows of given logits (N, K) to work out at a time."""
    classes = z.shape[1]
    on_cpu = z.device.type == "cpu"
    return cached_rows(classes) if on_cpu else max(1, _LAUNCHED_LOGITS // max(1, classes))


# The loops.


class Logits:
    """The logits of a chunk, in a buffer that all chunks share, and those on their way through.

    Fresh memory costs a CPU more than the arithmetic done in it.
    """

    def __init__(self, inputs: Inputs, how: How) -> None:
        self.how = how
        x, W = inputs.x, inputs.W
        if W is not None and W.shape[0] > FEW_CLASSES:
            rows = min(how.step, x.shape[0])
            self.buffer: Tensor = x.new_empty(rows, W.shape[0], dtype=how.logits_dtype)

    def of(self, x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        """The logits x Wᵀ + b (n, K), in the buffer where they are large; or x without a W."""
        if W is None:
            return x
        if W.shape[0] <= FEW_CLASSES:
            W, x = cast(W, self.how.logits_dtype), cast(x, self.how.logits_dtype)
            b = None if b is None else cast(b, self.how.logits_dtype)
            return (W @ x.t() if b is None else torch.addmm(b.unsqueeze(1), W, x.t())).t()
        return multiply(x, W, b, self.buffer[: x.shape[0], : W.shape[0]])

    def softmax_of(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """S (n, K) of the same logits, whose place it takes where the dtypes are the same."""
        z = self.of(x, W, b)
        S = z if z.dtype == self.how.dtype else torch.empty_like(z, dtype=self.how.dtype)
        for block in self.blocks(z):
            S = put(S, block, formulas.softmax(cast(cut(z, block), self.how.dtype), 1))
        return S

    def blocks(self, z: Tensor) -> Iterator[slice]:
        """The rows of a chunk to go over at a time, so that a CPU finds them in its cache."""
        # Several places wait for one another at every block: one is enough.
        if z.device.type != "cpu" or self.how.across is not None:
            return slices(z.shape[0], z.shape[0] or 1)
        return slices(z.shape[0], cached_rows(z.shape[1]))


def sums_of(inputs: Inputs, wanted: Inputs, dtype: torch.dtype) -> Inputs:
    """Where the wanted derivatives go: rows to be written, and sums that start at 0."""
    x, W = inputs.x, inputs.W
    sums = accumulation_dtype(x.dtype)
    return Inputs(
        x=torch.empty_like(x, memory_format=torch.contiguous_format) if wanted.x else None,
        W=x.new_zeros(W.shape, dtype=sums) if wanted.W else None,
        b=x.new_zeros(len(W), dtype=sums) if wanted.b else None,
        p=x.new_empty(inputs.p.shape, dtype=dtype) if wanted.p else None,
    )


def _part(factors: Factors, rows: slice) -> Factors:
    """The factors of some rows."""
    return Factors(*(None if factor is None else cut(factor, rows) for factor in factors))


def _among(whole: Numbers | None, part: slice, values: Numbers, count: int) -> Numbers:
    """The numbers of all rows so far, with those of a block among them."""
    if values.gap.shape[0] == count:
        return values
    # Made once: small tensors that stay between large ones that go would break up the heap.
    whole = whole or Numbers(*(value.new_empty(count) for value in values))
    for rows, value in zip(whole, values, strict=True):
        rows[part] = value
    return whole


def put(into: Tensor, block: slice, value: Tensor) -> Tensor:
    """Write a block of a chunk's rows; or return it where it is all of them."""
    if value.shape == into.shape and value.dtype == into.dtype:
        return value
    into[block] = value
    return into


def later(rows: slice, block: slice) -> slice:
    """A block of a chunk's rows, counted among all rows."""
    return slice(rows.start + block.start, rows.start + block.stop)


def _leave_out_(gradient: Tensor | None, here: Inputs, rows: slice) -> None:
    """Put 0 where a gradient is that of a row left out, whatever the factors are."""
    if gradient is not None and here.keep is not None:
        gradient[rows].masked_fill_(~here.keep.unsqueeze(1), 0)


def numbers_and_gradients(
    inputs: Inputs, factors: Factors, wanted: Inputs, how: How, *, numbers_too: bool = True
) -> tuple[Numbers | None, Inputs]:
    """The numbers of each row, (N,), if asked for, and the gradient of T where it is wanted.

    With g = ∂T/∂z = s S − t y and z = x Wᵀ + b:  ∂T/∂x = Wᵀ g,  ∂T/∂W = g xᵀ,  ∂T/∂b = g
    """
    count, W = inputs.x.shape[0], inputs.W
    numbers: Numbers | None = None
    out = sums_of(inputs, wanted, how.dtype)
    logits = Logits(inputs, how)
    for rows in slices(count, how.step):
        here = inputs.rows(rows)
        z = logits.of(here.x, W, here.b)
        g = z
        for block in logits.blocks(z):
            part = later(rows, block)
            wide = cast(cut(z, block), how.dtype)
            y = here.y if wide.shape == z.shape else here.y.rows(block)
            of_part = _part(factors, part)
            top: Tensor | None
            if numbers_too:
                S, top, numbers_here = formulas.softmax_and_numbers(wide, y, how.across)
                numbers = _among(numbers, part, numbers_here, count)
            else:
                S, top = formulas.softmax_alone(wide, y, how.across)
            if out.p is not None and top is not None:
                out.p[part] = formulas.target_gradient(wide, top, y, of_part.t)
            if wanted.x or wanted.W or wanted.b:
                gradient = formulas.gradient_(S, y, of_part)
                if out.b is not None:
                    out.b.add_(gradient.sum(0))
                if W is not None:
                    g = put(z, block, gradient)
                elif out.x is not None:
                    out.x[part] = gradient
                del gradient
            del wide, S  # before the next ones are made, as they may be as large as a chunk
        if W is not None and (wanted.x or wanted.W):
            g = cast(g, multiplied_in(W.dtype, W.device))
            if out.x is not None:
                pull_to_rows(g, W, out.x[rows])
            if out.W is not None:
                add_pulled_to_classes_(out.W, g, here.x)
        _leave_out_(out.x, here, rows)
    return numbers, _over_all_places(out, how)


def hessian_along(
    inputs: Inputs,
    factors: Factors,
    direction: Inputs,
    of_factors: Factors,
    wanted: Inputs,
    how: How,
) -> tuple[Inputs, Numbers]:
    """Second order: how the gradient of T changes along a direction, where that is wanted.

    The logits move by u = Wᵀ ux + x uWᵀ + ub. With g = s S − t y, and h its change,
    ∂T/∂x changes by Wᵀ h + uWᵀ g,  ∂T/∂W by h xᵀ + g uxᵀ,  ∂T/∂b by h,  and ∂T/∂s and ∂T/∂t by
    the slopes of log_sum and gap.

    The direction is a change of the inputs, and one of the factors; None for what does not move.
    """
    count, W = inputs.x.shape[0], inputs.W
    slopes: Numbers | None = None
    out = sums_of(inputs, wanted, how.dtype)
    # A direction is a gradient's cotangent, which float32 sums of half precision have in float32.
    ux, uW, ub = (None if u is None else u.to(inputs.x.dtype) for u in direction[:3])
    needs_g = (wanted.x and uW is not None) or (wanted.W and ux is not None and W is not None)
    logits, changes = Logits(inputs, how), Logits(inputs, how)
    for rows in slices(count, how.step):
        here = inputs.rows(rows)
        moved = None if ux is None else kept(here._replace(x=ux[rows]))
        z = logits.of(here.x, W, here.b)
        u = _change(changes, here, Inputs(moved, uW, ub))
        h = u if W is not None or out.x is None else out.x[rows]
        for block in logits.blocks(z):
            part = later(rows, block)
            wide = cut(z, block).to(how.dtype)
            y = here.y if wide.shape == z.shape else here.y.rows(block)
            of_part = _part(factors, part)
            S, top = formulas.softmax_alone(wide, y, how.across)
            point = Point(wide, S, top, y, of_part)
            dp = None if direction.p is None else direction.p[part]
            change = Change(u[block].to(how.dtype), dp, *_part(of_factors, part))
            second = formulas.hessian_product(point, change, how.across)
            slopes = _among(slopes, part, second.by_factors, count)
            if out.p is not None:
                out.p[part] = second.by_p
            if out.b is not None:
                out.b.add_(second.by_z.sum(0))
            if wanted.x or wanted.W:
                h[block] = second.by_z
            if needs_g:
                z[block] = formulas.gradient_(S, y, of_part)
            del wide, S, point, change, second  # as above
        if W is not None and (wanted.x or wanted.W):
            g, h = (cast(t, multiplied_in(W.dtype, W.device)) for t in (z, h))
            if out.x is not None:
                pull_to_rows(h, W, out.x[rows])
                if uW is not None:
                    add_pulled_to_rows_(out.x[rows], g, uW)
            if out.W is not None:
                add_pulled_to_classes_(out.W, h, here.x)
                if moved is not None:
                    add_pulled_to_classes_(out.W, g, moved)
        _leave_out_(out.x, here, rows)
    assert slopes is not None
    return _over_all_places(out, how), slopes


def _change(changes: Logits, here: Inputs, direction: Inputs) -> Tensor:
    """The change u = Wᵀ ux + x uWᵀ + ub of a chunk's logits."""
    x: Tensor = here.x
    ux, uW, ub = direction.x, direction.W, direction.b
    if here.W is None:
        return torch.zeros_like(here.x) if ux is None else ux
    if uW is not None:
        u = changes.of(here.x, uW, ub)
        if ux is not None:
            add_multiplied_(u, ux, here.W)
        return u
    if ux is not None:
        return changes.of(ux, here.W, ub)
    u = x.new_zeros(x.shape[0], here.W.shape[0], dtype=changes.how.logits_dtype)
    return u if ub is None else u.add_(ub)


def _over_all_places(gradients: Inputs, how: How) -> Inputs:
    """The gradient of x added up over all places of the classes, with the other gradients."""
    if how.across is None or gradients.x is None:
        return gradients
    (x,) = how.across.total(gradients.x.to(accumulation_dtype(gradients.x.dtype)))
    return gradients._replace(x=x.to(gradients.x.dtype))
