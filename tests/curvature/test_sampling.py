"""Labels drawn from the softmax: as often as it says, and the same whatever the chunks."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import NewTensors
from torch_softmax.curvature import sample_labels

N, D, K = 11, 3, 40


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("classes", [2, 5, K])
@pytest.mark.parametrize("biased", [False, True])
def test_labels_are_as_frequent_as_they_are_probable(classes, biased):
    row, W = torch.randn(1, D), torch.randn(classes, D)
    b = torch.randn(classes) if biased else None
    draws = 200_000
    labels = sample_labels(row.expand(draws, D), W, linear_bias=b, generator=seeded())
    p = F.linear(row.double(), W.double(), None if b is None else b.double()).softmax(1)[0]
    frequency = labels.bincount(minlength=classes) / draws
    # Five standard deviations: one seed in a million would fail for a class.
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / draws).sqrt() + 1e-9).all()


@pytest.mark.parametrize("classes", [5, K])
def test_chunks_change_no_label(classes):
    x, W = torch.randn(50, D), torch.randn(classes, D)
    expected = sample_labels(x, W, generator=seeded())
    for chunk_size in (1, 7, 50):
        assert torch.equal(sample_labels(x, W, generator=seeded(), chunk_size=chunk_size), expected)


def test_the_generator_decides():
    x, W = torch.zeros(50, D), torch.zeros(K, D)
    first, same, other = (sample_labels(x, W, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_without_a_generator_it_is_that_of_torch():
    x, W = torch.zeros(50, D), torch.zeros(K, D)
    torch.manual_seed(3)
    first = sample_labels(x, W)
    torch.manual_seed(3)
    assert torch.equal(sample_labels(x, W), first)


def test_what_is_impossible_is_never_drawn():
    W = torch.full((K, 1), -1e4)
    W[7] = 0
    assert (sample_labels(torch.ones(1000, 1), W) == 7).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_numbers_have_a_possible_label(u, monkeypatch):
    monkeypatch.setattr(
        torch, "rand", lambda *shape, **options: torch.full(shape, u, dtype=torch.float64)
    )
    W = torch.full((K, 1), -1e4)
    W[3] = W[7] = 0
    assert sample_labels(torch.ones(1, 1), W).item() == (3 if u == 0 else 7)


def test_leading_dimensions_stay():
    x, W = torch.randn(2, 5, D), torch.randn(K, D)
    labels = sample_labels(x, W, generator=seeded())
    assert labels.dtype == torch.int64
    assert torch.equal(labels.flatten(), sample_labels(x.flatten(0, 1), W, generator=seeded()))
    assert sample_labels(x[:, :0], W).shape == (2, 0)


def test_half_precision_and_parameters_are_fine():
    x, W = torch.randn(N, D).bfloat16(), torch.randn(K, D).bfloat16().requires_grad_()
    assert sample_labels(x, W).max() < K


def test_logits_are_held_a_chunk_at_a_time():
    x, W = torch.randn(100, D), torch.randn(K, D)
    with NewTensors() as new:
        sample_labels(x, W, chunk_size=7)
    assert max(new.sizes) == 7 * K


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("input", torch.ones(2, D + 1), ValueError),
        ("input", [torch.ones(2, D)], TypeError),
        ("input", torch.full((2, D), torch.nan), ValueError),
        ("linear_weight", torch.ones(0, D), ValueError),
        ("linear_bias", torch.ones(K + 1), ValueError),
        ("chunk_size", 0, ValueError),
    ],
)
def test_an_unfit_argument_is_named(name, value, error):
    arguments = {"input": torch.ones(2, D), "linear_weight": torch.ones(K, D), name: value}
    with pytest.raises(error, match=rf"^{name}( and linear_weight)? must "):
        sample_labels(**arguments)
