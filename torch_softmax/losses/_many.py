"""The Hessian of T along many directions of a layer, which all go along the same S of a chunk."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _formulas as formulas
from ._chunked import cut, slices
from ._dtypes import accumulation_dtype, cast
from ._formulas import Factors, Numbers
from ._products import add_pulled_to_classes_, multiplied_in
from ._sweeps import FEW_CLASSES, How, Inputs, Logits, later, put


class Directions:
    """M directions of a layer's weight (M, K, D), and of its bias (M, K) where that moves."""

    def __init__(self, x: Tensor, W: Tensor, b: Tensor | None, how: How) -> None:
        self.W, self.b = W, b
        number, classes, _ = W.shape
        # Few classes are many directions' at a time, in a product that is faster for it.
        self.together = max(1, min(number, FEW_CLASSES // classes))
        self.changes = Logits(Inputs(x, W[: self.together].flatten(0, 1)), how)

    def along(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Some of the directions after another, with the changes x uWᵀ + ub of logits (n, m K).

        They are in a buffer that the next ones write over.
        """
        for some in slices(len(self.W), self.together):
            W, b = (None if t is None else t[some].flatten(0, 1) for t in (self.W, self.b))
            assert W is not None
            yield some, self.changes.of(x, W, b)


def add_hessians_(
    out: Inputs, x: Tensor, softmax: Tensor, s: Tensor | None, directions: Directions
) -> None:
    """Add s J (u x̃) x̃ᵀ of some rows, for each direction u, to W (M, K, D) and b (M, K).

    With the softmax's Jacobian J, that is how ∂T/∂W and ∂T/∂b change; and it takes 2 M products.
    """
    classes = softmax.shape[1]
    for some, u in directions.along(x):
        h = u
        for block in directions.changes.blocks(u):
            S = cut(softmax, block).unsqueeze(1)
            along = cast(cut(u, block), S.dtype).unflatten(1, (-1, classes))
            by_z = formulas.jacobian_product(S, along, 2).flatten(1)
            by_z = formulas.times(by_z, None if s is None else cut(s, block))
            if out.b is not None:
                out.b[some].add_(by_z.sum(0).view(-1, classes))
            h = put(u, block, by_z)
        if out.W is not None:
            h = cast(h, multiplied_in(x.dtype, x.device))
            add_pulled_to_classes_(out.W[some].flatten(0, 1), h, x)


def hessians_along(
    inputs: Inputs, factors: Factors, directions: Inputs, wanted: Inputs, how: How
) -> Inputs:
    """How the gradient of T by W, and by b, changes along each direction of these, (M, ...)."""
    many, sums = _of_inputs(inputs, directions, how), accumulation_dtype(inputs.x.dtype)
    out = Inputs(
        x=None,
        W=many.W.new_zeros(many.W.shape, dtype=sums) if wanted.W else None,
        b=many.W.new_zeros(many.W.shape[:2], dtype=sums) if wanted.b else None,
    )
    for rows, here, softmax in _softmaxes(inputs, how):
        add_hessians_(out, here.x, softmax, None if factors.s is None else factors.s[rows], many)
    return out


def slopes_along(inputs: Inputs, directions: Inputs, how: How) -> Numbers:
    """How log_sum and gap of each row change along each direction of W and b, (N, M)."""
    many = _of_inputs(inputs, directions, how)
    shape = (len(inputs.x), len(many.W))
    mean, slope = (many.W.new_empty(shape, dtype=how.dtype) for _ in Numbers._fields)
    for rows, here, softmax in _softmaxes(inputs, how):
        for some, u in many.along(here.x):
            for block in many.changes.blocks(u):
                part = later(rows, block)
                S, y = cut(softmax, block), here.y.rows(block)
                along = cast(cut(u, block), how.dtype).unflatten(1, (-1, S.shape[1]))
                # log_sum changes by S · u, and gap by −y · u
                mean[part, some] = (S.unsqueeze(1) * along).sum(2)
                slope[part, some] = torch.stack([y.below(0.0, u) for u in along.unbind(1)], 1)
    return Numbers(mean, slope)


def _of_inputs(inputs: Inputs, directions: Inputs, how: How) -> Directions:
    """Directions in the dtype of what they are of: as cotangents they may be in that of sums."""
    W, b = (None if u is None else u.to(inputs.x.dtype) for u in (directions.W, directions.b))
    assert W is not None
    return Directions(inputs.x, W, b, how)


def _softmaxes(inputs: Inputs, how: How) -> Iterator[tuple[slice, Inputs, Tensor]]:
    """The rows of each chunk, with what they hold and S, in a buffer that the next one uses."""
    logits = Logits(inputs, how)
    for rows in slices(len(inputs.x), how.step):
        here = inputs.rows(rows)
        yield rows, here, logits.softmax_of(here.x, inputs.W, inputs.b)
