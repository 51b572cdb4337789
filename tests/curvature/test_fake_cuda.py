"""The operator on fake CUDA tensors: it runs there, in the dtypes that its products should have."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.helpers import needs_fake_cuda
from torch_softmax.curvature import HeadHessian


@needs_fake_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [(), (3,)], ids=["a direction", "three"])
def test_results_are_in_float32_on_a_gpu(dtype, number, bias):
    with FakeTensorMode(), torch.device("cuda"):
        x, W = torch.empty(2048, 16, dtype=dtype), torch.empty(300, 16, dtype=dtype)
        b = torch.empty(300, dtype=dtype) if bias else None
        H = HeadHessian(x, W, linear_bias=b, weight_decay=0.1)
        u = torch.empty(*number, 300, 16)
        product = H @ ((u, torch.empty(*number, 300)) if bias else u)
        results = [*(product if bias else [product]), H.trace(), *H.factors()]
        diagonal = H.diagonal()
        results += diagonal if bias else [diagonal]
        for result in results:
            assert result.dtype == torch.float32
            assert result.device.type == "cuda"
