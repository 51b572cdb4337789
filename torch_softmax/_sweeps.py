"""The loops over chunks of rows of a linear layer's logits: loss, gradients and curvature."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _formulas as formulas
from ._chunks import accumulation_dtype, cached_slices, slices
from ._targets import Targets


class Needs(NamedTuple):
    """Which derivatives are asked for; the others are neither computed nor allocated."""

    x: bool
    W: bool
    b: bool
    p: bool


# With respect to x (N, D), W (K, D), b (K,) and the probabilities p (N, K); None where not needed.
Derivatives = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _multiply_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Write the product a b into `out`."""
    if torch.compiler.is_compiling():  # an exported graph may be differentiated, unlike `out=`
        return out.copy_(a @ b)
    return torch.mm(a, b, out=out)


def _logits(x: Tensor, W: Tensor, b: Tensor | None, out: Tensor) -> Tensor:
    """The logits x Wᵀ + b (N, K), in the buffer `out` where they are large."""
    if W.shape[0] <= 32:  # with few classes, W xᵀ is the faster product
        z = torch.mm(W, x.t()) if b is None else torch.addmm(b.unsqueeze(1), W, x.t())
        return z.t()
    return _multiply_(out, x, W.t()) if b is None else out.copy_(b).addmm_(x, W.t())


def _blocks(z: Tensor, y: Targets) -> Iterator[slice]:
    """The rows of a chunk's logits to go over at a time."""
    # The ranks of a spread softmax wait for one another at every block: one is enough.
    return cached_slices(z) if y.spread is None else slices(len(z), len(z))


def _add_product_(total: Tensor, rows_by_class: Tensor, x: Tensor) -> None:
    """Add rows_by_classᵀ x to a total, in the dtype of the total."""
    a = rows_by_class.t()
    if total.dtype != x.dtype and x.is_cuda:  # has products of half precision in float32
        total += torch.mm(a, x, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), x.to(total.dtype))


def loss_and_gradients(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Targets,
    r: Tensor | None,
    chunk_size: int,
    needs: Needs,
) -> tuple[Tensor, Derivatives]:
    """The loss L_n of each row, (N,), and the gradient of Σ_n r_n L_n where it is needed.

    z = x Wᵀ + b,  ∂L/∂z = m S − y,  ∂L/∂x = W ∂L/∂z,  ∂L/∂W = ∂L/∂z xᵀ,  ∂L/∂b = ∂L/∂z
    """
    count, classes, dtype = x.shape[0], W.shape[0], accumulation_dtype(x.dtype)
    losses = x.new_empty(count, dtype=dtype)
    dx = x.new_empty(x.shape) if needs.x else None
    dW = x.new_zeros(W.shape, dtype=dtype) if needs.W else None
    db = x.new_zeros(classes, dtype=dtype) if needs.b else None
    dp = x.new_empty(count, classes, dtype=dtype) if needs.p else None
    # Every chunk reuses one buffer: fresh memory costs a CPU more than the arithmetic done in it.
    buffer = x.new_empty(min(chunk_size, count), classes)
    for rows in slices(count, chunk_size):
        z = _logits(x[rows], W, b, buffer[: rows.stop - rows.start])
        for block in _blocks(z, y):
            part = slice(rows.start + block.start, rows.start + block.stop)
            y_part, r_part = y.rows(part), None if r is None else r[part]
            wide = z[block].to(dtype)
            softmax, losses[part] = formulas.softmax_and_losses(wide, y_part)
            if dp is not None:
                dp[part] = formulas.target_gradients(wide, y_part, r_part)
            if needs.x or needs.W or needs.b:
                dz = formulas.gradients_(softmax, y_part, r_part)
                if db is not None:
                    db += dz.sum(0)
                z[block] = dz
        if dx is not None:
            _multiply_(dx[rows], z, W)
        if dW is not None:
            _add_product_(dW, z, x[rows])
    if dx is not None and y.spread is not None:
        dx = y.spread.sum_(dx.to(dtype)).to(dx.dtype)
    return losses, (dx, dW, db, dp)


def curvature(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Targets,
    r: Tensor | None,
    ux: Tensor | None,
    uW: Tensor | None,
    ub: Tensor | None,
    up: Tensor | None,
    chunk_size: int,
    needs: Needs,
) -> tuple[Derivatives, Tensor]:
    """Second order: the derivatives of Σ_n r_n D_n, with D_n the slope of L_n along (ux, ..., up).

    The direction moves the logits by u = ux Wᵀ + x uWᵀ + ub. With g = r (m S − y) and h = ∂D/∂z,
    ∂D/∂x = W h + uW g,  ∂D/∂W = h xᵀ + g uxᵀ,  ∂D/∂b = h;  and last, D itself, (N,).
    """
    # A direction is a gradient's cotangent, which float32 sums of half precision have in float32.
    ux, uW, ub = (None if u is None else u.to(x.dtype) for u in (ux, uW, ub))
    count, classes, dtype = x.shape[0], W.shape[0], accumulation_dtype(x.dtype)
    slope = x.new_empty(count, dtype=dtype)
    hx = x.new_empty(x.shape) if needs.x else None
    hW = x.new_zeros(W.shape, dtype=dtype) if needs.W else None
    hb = x.new_zeros(classes, dtype=dtype) if needs.b else None
    hp = x.new_empty(count, classes, dtype=dtype) if needs.p else None
    needs_g = (needs.x and uW is not None) or (needs.W and ux is not None)
    z_buffer = x.new_empty(min(chunk_size, count), classes)
    u_buffer = torch.empty_like(z_buffer)
    for rows in slices(count, chunk_size):
        size = rows.stop - rows.start
        z, u = _logits(x[rows], W, b, z_buffer[:size]), u_buffer[:size]
        moves = [(a, c) for a, c in ((ux, W), (x, uW)) if a is not None and c is not None]
        u = _multiply_(u, moves[0][0][rows], moves[0][1].t()) if moves else u.zero_()
        for a, c in moves[1:]:
            u.addmm_(a[rows], c.t())
        for block in _blocks(z, y):
            part = slice(rows.start + block.start, rows.start + block.stop)
            y_part, r_part = y.rows(part), None if r is None else r[part]
            wide_z, wide_u = z[block].to(dtype), u[block].to(dtype)
            if ub is not None:
                wide_u += ub
            moved = None if up is None else up[part]
            along_z, along_p, slope[part] = formulas.curvature(
                wide_z, y_part, r_part, wide_u, moved
            )
            if hp is not None and along_p is not None:
                hp[part] = along_p
            if hb is not None:
                hb += along_z.sum(0)
            u[block] = along_z
            if needs_g:
                softmax, _ = formulas.softmax_and_losses(wide_z, y_part)
                z[block] = formulas.gradients_(softmax, y_part, r_part)
        h, g = u, z
        if hx is not None:
            _multiply_(hx[rows], h, W)
            if uW is not None:
                hx[rows].addmm_(g, uW)
        if hW is not None:
            _add_product_(hW, h, x[rows])
            if ux is not None:
                _add_product_(hW, g, ux[rows])
    if hx is not None and y.spread is not None:
        hx = y.spread.sum_(hx.to(dtype)).to(hx.dtype)
    return (hx, hW, hb, hp), slope
