"""At home in other people's tools: their operators and ours are the same numbers."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import assert_same
from torch_softmax import CrossEntropyLoss, SoftmaxRegression
from torch_softmax.curvature import HeadHessian, predictive_variance
from torch_softmax.functional import linear_cross_entropy

N, D, K = 23, 6, 4

# They warn of their own imports, of torch's scripts and of what of theirs will change.
pytestmark = pytest.mark.filterwarnings("ignore")


def imported(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.fixture
def batches():
    x, y = torch.randn(N, D, dtype=torch.float64), torch.randint(K, (N,))
    return [(x[:10], y[:10]), (x[10:], y[10:])]


@pytest.mark.parametrize("operator", ["HessianLinearOperator", "GGNLinearOperator"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_curvlinops_takes_our_loss_and_has_our_products(batches, bias, operator, reduction):
    curvlinops = imported("curvlinops")
    model = SoftmaxRegression(D, K, bias, dtype=torch.float64)
    loss = CrossEntropyLoss(reduction=reduction)
    theirs = getattr(curvlinops, operator)(model, loss, list(model.parameters()), batches)
    H = HeadHessian(batches, model.weight, linear_bias=model.bias, reduction=reduction)
    ours = H.as_linear_operator()
    v = torch.randn(H.shape[0], dtype=torch.float64)
    assert_same(theirs @ v, torch.from_numpy(ours @ v.numpy()))


@pytest.mark.parametrize(
    ("theirs", "ours", "biased"),
    [
        ("diag", "diagonal", True),
        ("diag", "diagonal", False),
        # They have a factor of its own for a bias, apart from that of the weight.
        ("kron", "kronecker", False),
    ],
)
def test_variances_are_those_of_laplace(batches, theirs, ours, biased):
    laplace = imported("laplace")
    head = SoftmaxRegression(D, K, biased)
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), head).double()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    approximation = laplace.Laplace(
        model,
        "classification",
        subset_of_weights="last_layer",
        hessian_structure=theirs,
        prior_precision=0.7,
    )
    approximation.fit(DataLoader(TensorDataset(x, y), batch_size=N))
    jacobians, _ = approximation.backend.last_layer_jacobians(x)
    covariance = approximation.functional_variance(jacobians)

    features = model[:2](x)
    H = HeadHessian(features, head.weight, linear_bias=head.bias)
    variance = predictive_variance(H, features, 0.7, structure=ours)
    assert_same(variance, covariance.diagonal(dim1=1, dim2=2))


def test_products_are_those_of_torch_func(batches):
    (x, y), _ = batches
    W, b = torch.randn(K, D, dtype=torch.float64), torch.randn(K, dtype=torch.float64)

    def loss(W, b):
        return linear_cross_entropy(x, W, y, linear_bias=b)

    def product(*u):
        return torch.func.jvp(torch.func.grad(loss, (0, 1)), (W, b), u)[1]

    u = torch.randn(3, K, D, dtype=torch.float64), torch.randn(3, K, dtype=torch.float64)
    assert_same(HeadHessian(x, W, linear_bias=b) @ u, torch.vmap(product)(*u))
