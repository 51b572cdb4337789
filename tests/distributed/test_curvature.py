"""Sharded heads have no Hessian yet, and say so."""

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor

from tests.distributed.world import RankError
from torch_softmax.curvature import HeadHessian, sample_labels

N, D, K = 6, 3, 7


def of_sharded_weight(mesh, make):
    weight = distribute_tensor(torch.zeros(K, D), mesh, [Shard(0)])
    make(torch.zeros(N, D), weight)


def of_whole_weight(mesh):
    weight = distribute_tensor(torch.zeros(K, D), mesh, [Shard(0)]).full_tensor()
    return float(HeadHessian(torch.ones(N, D), weight).trace())


@pytest.mark.parametrize("make", [HeadHessian, sample_labels])
def test_a_sharded_weight_is_refused(two, make):
    with pytest.raises(RankError, match="linear_weight must be whole in this process"):
        two.run(of_sharded_weight, make)


def test_a_weight_that_was_gathered_is_fine(two):
    assert two.run(of_whole_weight) == pytest.approx([D * (1 - 1 / K)] * 2)
