"""Newton's method on several ranks, each of which holds some of the examples."""

import pytest
import torch

from tests.distributed.world import World
from torch_softmax import SoftmaxRegression
from torch_softmax.distributed.data_parallel import Ranks
from torch_softmax.optim import minimize, penalty_path

ROWS, FEATURES, CLASSES = 101, 6, 4
OPTIONS = {"tolerance": 1e-9}


@pytest.fixture(scope="module", params=[2, 3], ids="{}ranks".format)
def world(request):
    with World(request.param) as world:
        yield world


def problem(mean=0.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.rand(ROWS, CLASSES, generator=generator, dtype=torch.float64).log().neg().log()
    y = (x @ torch.randn(FEATURES, CLASSES, generator=generator).double() - noise).argmax(1)
    return x + mean, y, torch.rand(ROWS, generator=generator)


def new_model():
    torch.manual_seed(0)
    return SoftmaxRegression(FEATURES, CLASSES, dtype=torch.float64)


def fitted(ranks, mean, weighted):
    """The result and the parameters, with this rank's part of the examples."""
    x, y, w = (value[ranks.part(torch.arange(ROWS))] for value in problem(mean))
    model = new_model()
    result = minimize(
        model, x, y, 1e-4, sample_weight=w if weighted else None, ranks=ranks, **OPTIONS
    )
    return result, [parameter.detach() for parameter in model.parameters()]


def fitted_on_rank(mesh, mean, weighted):
    return fitted(Ranks(mesh.get_rank(), mesh.size()), mean, weighted)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_ranks_reach_the_optimum_of_one_process(world, mean, weighted):
    expected, parameters = fitted(Ranks(), mean, weighted)
    assert expected.converged
    results = world.run(fitted_on_rank, mean, weighted)
    for result, of_rank in results:
        assert result == results[0][0]
        assert result.converged
        assert result.objective == pytest.approx(expected.objective, rel=1e-12)
        for value, right in zip(of_rank, parameters, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-6, atol=1e-6)


def path_on_rank(mesh):
    ranks = Ranks(mesh.get_rank(), mesh.size())
    x, y, _ = (value[ranks.part(torch.arange(ROWS))] for value in problem())
    path = penalty_path(new_model(), x, y, [1.0, 1e-2, 1e-4], ranks=ranks, **OPTIONS)
    return [fit.result.objective for fit in path]


def test_ranks_go_along_the_path_of_one_process(world):
    path = penalty_path(new_model(), *problem()[:2], [1.0, 1e-2, 1e-4], **OPTIONS)
    expected = [fit.result.objective for fit in path]
    for objectives in world.run(path_on_rank):
        assert objectives == pytest.approx(expected, rel=1e-12)


def one_rank_has_all(mesh):
    ranks = Ranks(mesh.get_rank(), mesh.size())
    x, y, _ = problem()
    x, y = (x, y) if ranks.is_first else (x[:0], y[:0])
    return minimize(new_model(), x, y, 1e-4, ranks=ranks, **OPTIONS).objective


def test_a_rank_may_have_no_examples(world):
    expected = fitted(Ranks(), 0.0, False)[0].objective
    assert world.run(one_rank_has_all) == pytest.approx([expected] * world.size, rel=1e-12)


def refusal_on_rank(mesh):
    ranks = Ranks(mesh.get_rank(), mesh.size())
    x, y, _ = problem()
    if not ranks.is_first:
        y = y + CLASSES
    with pytest.raises(ValueError, match="must hold class indices") as raised:
        minimize(new_model(), x, y, 1e-4, ranks=ranks)
    return type(raised.value)


def test_what_is_refused_on_one_rank_is_refused_on_all(world):
    assert world.run(refusal_on_rank) == [ValueError] * world.size
