"""Matrix products, written to where they belong, in the dtype that a device is fast in."""

import torch
from torch import Tensor

from ._chunked import slices
from ._dtypes import accumulation_dtype, cast

# Classes whose numbers are widened, or multiplied into memory of their own, at a time: a CPU finds
# them in its cache.
_CLASSES = 2**12
# Whether this torch has products of half precision with float32 results, for devices that do.
_HAS_WIDE_PRODUCTS = hasattr(torch.ops.aten.addmm, "dtype_out")


# The dtypes whose products a CPU without instructions for them emulates, tens of times slower than
# those of float32. oneDNN knows, where torch has it; asked once, as a compiler can't ask.
_ASK_IF_MULTIPLIED = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
EMULATED = {
    dtype
    for dtype, question in _ASK_IF_MULTIPLIED.items()
    if hasattr(torch.ops.mkldnn, question) and not getattr(torch.ops.mkldnn, question)()
}


def multiplied_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products of a dtype are made: itself, or float32 where it is emulated."""
    emulated = device.type == "cpu" and dtype in EMULATED
    return accumulation_dtype(dtype) if emulated else dtype


def multiply(x: Tensor, W: Tensor, b: Tensor | None, out: Tensor) -> Tensor:
    """Write x Wᵀ + b into `out` (n, K), in its dtype."""
    if out.dtype == x.dtype:
        return torch.mm(x, W.t(), out=out) if b is None else torch.addmm(b, x, W.t(), out=out)
    if x.is_cuda and _HAS_WIDE_PRODUCTS and out.dtype == torch.float32:
        torch.mm(x, W.t(), out_dtype=out.dtype, out=out)
    else:
        _multiply_wide(out, x, W, beta=0)
    return out if b is None else out.add_(b)


def add_multiplied_(out: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """Add x Wᵀ to `out` (n, K), in its dtype."""
    if out.dtype == x.dtype:
        return torch.addmm(out, x, W.t(), out=out)
    return _multiply_wide(out, x, W, beta=1)


def _multiply_wide(out: Tensor, x: Tensor, W: Tensor, beta: int) -> Tensor:
    """Write beta out + x Wᵀ into `out`, which is wider: W is widened a few classes at a time."""
    x = cast(x, out.dtype)
    for classes in slices(len(W), _CLASSES):
        part = out[:, classes]
        torch.addmm(part, x, cast(W[classes], out.dtype).t(), beta=beta, out=part)
    return out


def pull_to_rows(g: Tensor, W: Tensor, out: Tensor) -> None:
    """Write g W into `out` (n, D), worked out in the dtype of g."""
    if g.dtype == W.dtype:
        torch.mm(g, W, out=out)
    else:
        out.copy_(_wide_product(g, W))


def add_pulled_to_rows_(out: Tensor, g: Tensor, W: Tensor) -> None:
    """Add g W to `out` (n, D), worked out in the dtype of g."""
    if g.dtype == W.dtype:
        torch.addmm(out, g, W, out=out)
    else:
        out.add_(_wide_product(g, W))


def _wide_product(g: Tensor, W: Tensor) -> Tensor:
    """The product g W (n, D) in the dtype of g, which is the wider one."""
    total = g.new_zeros(g.shape[0], W.shape[1])
    for classes in slices(len(W), _CLASSES):
        torch.addmm(total, g[:, classes], cast(W[classes], g.dtype), out=total)
    return total


def add_pulled_to_classes_(total: Tensor, g: Tensor, x: Tensor) -> None:
    """Add gᵀ x to a total (K, D), in the dtype of the total."""
    if g.dtype == total.dtype:
        torch.addmm(total, g.t(), cast(x, total.dtype), out=total)
    elif x.is_cuda and _HAS_WIDE_PRODUCTS:
        torch.addmm(total, g.t(), x, out_dtype=total.dtype, out=total)
    else:
        for classes in slices(g.shape[1], _CLASSES):
            total[classes] += g[:, classes].t() @ x
