"""Labels drawn from the softmax of a linear layer, whose logits are never held as a whole."""

import torch
from torch import Tensor

from .. import _checks as checks
from ..losses._dtypes import accumulation_dtype, outside_autocast
from ..optim._hessian import Logits, blocks, layout_of
from ._rows import Data, layer_of


@torch.no_grad()
def sample_labels(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Draw one label for each row from the softmax of its logits, p(k | x) = S_k(x Wᵀ + b).

    The gradients of the loss at such labels have the Fisher matrix as their second moment. Each
    row has a random number of its own, so that its label depends on neither the chunks nor the rows
    after it, except where rounding decides between two classes.

    Args:
        input: x, (..., D), of a floating-point dtype.
        linear_weight: W, (C, D).
        linear_bias: b, (C).
        generator: Of random numbers, on the device of the input; None for torch's own.
        chunk_size: The rows whose logits are held at a time.

    Returns:
        Class indices, int64 (...).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes don't fit, there is no class, or a row's logits are not finite.
        NotImplementedError: `linear_weight` is sharded.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> sample_labels(torch.zeros(6, 2), torch.zeros(3, 2), generator=generator)
        tensor([2, 2, 1, 2, 1, 2])

    Source: Kunstner, Balles and Hennig, Limitations of the empirical Fisher approximation (2019),
    equation 4.
    """
    checks.floating("input", input)
    layer = layer_of(linear_weight, linear_bias, input)
    size, dtype = checks.chunk_size(chunk_size), accumulation_dtype(layer.W.dtype)
    layout = layout_of(layer.W.shape, dtype, layer.W.device, size)
    batch = Data(input, None, None, -100, layer).batch(input)
    shape, device = input.shape[:-1], input.device
    u = torch.rand(len(batch.rows), 1, generator=generator, dtype=torch.float64, device=device)
    labels = torch.empty(len(u), dtype=torch.int64, device=device)
    logits, are_finite = Logits(layout), torch.ones((), dtype=torch.bool, device=device)
    with outside_autocast(input):
        for chunk in layout.chunks([batch]):
            for block, (z,) in blocks(logits.at(chunk.x, *layer)):
                drawn, total = _invert(z, u[chunk.part][block])
                labels[chunk.part][block] = drawn
                are_finite &= total.isfinite().all()
    if not bool(are_finite):
        raise ValueError("input and linear_weight must give finite logits, got others")
    return labels.view(shape)


def _invert(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The first class with Σ_j≤k e^{z_j − top} > u Σ_j e^{z_j − top}, (n,), and the sum (n, 1)."""
    # In float64, as the sums of many classes would lose the last ones of them in float32.
    sums = (z - z.amax(1, keepdim=True)).double().exp_().cumsum(1)
    total = sums[:, -1:]
    # Below the whole sum, also where the product is rounded: the last class may be impossible.
    threshold = torch.minimum(u * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, threshold, right=True).squeeze(1), total
