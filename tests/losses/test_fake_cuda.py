"""Nothing waits for a GPU: every option traced over fake CUDA tensors, where a wait raises."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.helpers import every_option, needs_fake_cuda
from torch_softmax.functional import cross_entropy, linear_cross_entropy

N, D, K = 6, 4, 40


@pytest.fixture(autouse=True)
def _fake():
    with FakeTensorMode():
        yield


def target_of(kind):
    if kind == "probabilities":
        return torch.rand(N, K, device="cuda")
    return torch.randint(K, (N,), device="cuda")


def test_a_wait_raises():
    with pytest.raises(DataDependentOutputException):
        target_of("indices").max().item()


@needs_fake_cuda
@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [False, True], ids=["logits", "layer"])
def test_no_option_waits(layer, dtype, kind, weighted, label_smoothing, reduction):
    weight = torch.rand(K, device="cuda") if weighted else None
    options = {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
    x, W, b, z = (
        torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)
        for shape in ((N, D), (K, D), (K,), (N, K))
    )
    target = target_of(kind)
    if layer:
        loss = linear_cross_entropy(x, W, target, linear_bias=b, chunk_size=4, **options)
    else:
        loss = cross_entropy(z, target, **options)
    assert loss.shape == ((N,) if reduction == "none" else ())
    assert loss.requires_grad
