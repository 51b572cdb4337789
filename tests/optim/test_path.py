"""The path of penalties: each optimum on it, and what is saved on the way."""

import math

import pytest
import torch

from tests.regression import CLASSES
from torch_softmax import SoftmaxRegression
from torch_softmax.optim import newton, penalty_path

PENALTIES = [1e-3, 1.0, 1e-1, 1e-2]


def new_model():
    return SoftmaxRegression(64, CLASSES, dtype=torch.float64)


def test_every_model_is_at_the_optimum_of_its_penalty(examples):
    path = list(penalty_path(new_model(), *examples, PENALTIES, tolerance=1e-9))
    assert [fitted.weight_decay for fitted in path] == sorted(PENALTIES, reverse=True)
    for weight_decay, model, result in path:
        assert result.converged
        alone = new_model()
        expected = newton.minimize(alone, *examples, weight_decay, tolerance=1e-9)
        assert result.objective == pytest.approx(expected.objective, rel=1e-12)
        torch.testing.assert_close(model.weight, alone.weight, rtol=0, atol=1e-5)


def test_models_of_the_path_are_independent_and_the_first_one_stays(examples):
    model = new_model()
    before = model.weight.detach().clone()
    first, second = (f.model for f in penalty_path(model, *examples, [1.0, 0.1]))
    assert torch.equal(model.weight, before)
    assert not torch.equal(first.weight, second.weight)
    assert first.weight.norm() < second.weight.norm()


def test_the_path_takes_fewer_products_than_single_fits(examples):
    weak = [1e-3, 3e-4, 1e-4, 3e-5]
    path = list(penalty_path(new_model(), *examples, weak, tolerance=1e-6))
    alone = [newton.minimize(new_model(), *examples, each, tolerance=1e-6) for each in weak]
    assert sum(f.result.products for f in path) < sum(result.products for result in alone)


def test_steps_of_every_penalty_are_reported(examples):
    reported = []
    path = list(penalty_path(new_model(), *examples, [1.0, 0.1], report=reported.append))
    assert [r.steps for r in reported] == [
        step for fitted in path for step in range(1, fitted.result.steps + 1)
    ]


def test_penalties_may_lie_further_apart_than_a_float_tells(examples):
    path = list(penalty_path(new_model(), *examples, [1e150, 1e149, 1e-200]))
    assert all(fitted.result.converged for fitted in path)


@pytest.mark.parametrize("penalties", [[], [0.1, -1.0], [math.nan]])
def test_penalties_that_are_none_are_refused(examples, penalties):
    with pytest.raises(ValueError, match=r"weight_decays must "):
        penalty_path(new_model(), *examples, penalties)
