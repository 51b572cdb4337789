"""Rates, intervals and calibration, against plain counting and against known values."""

import math
from fractions import Fraction

import pytest
import torch

from torch_softmax.mnist.metrics import (
    calibration_curve,
    confusion_matrix,
    mean,
    proportion,
    rates,
)

K = 4


def confident(confidence, size):
    """Predictions of class 0 with a confidence, as probabilities (size, 2)."""
    return torch.tensor([[confidence, 1 - confidence]], dtype=torch.float64).repeat(size, 1)


# Rates


def test_rates_are_their_definitions():
    target, prediction = torch.randint(K, (200,)), torch.randint(K, (200,))
    confusion = confusion_matrix(target, prediction, K)
    found = rates(confusion)
    for k in range(K):
        both = int(((target == k) & (prediction == k)).sum())
        predicted, true = int((prediction == k).sum()), int((target == k).sum())
        assert confusion[k, k] == both
        assert found["precision"].value[k] == both / predicted
        assert found["recall"].value[k] == both / true
        harmonic = 2 / (Fraction(predicted, both) + Fraction(true, both))
        assert found["F1"].value[k].item() == pytest.approx(float(harmonic), rel=1e-15)
    assert found["accuracy"].value == (target == prediction).double().mean()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_confusion_matrix_of_narrow_indices(dtype):
    first, last = torch.full((3,), 98, dtype=dtype), torch.full((3,), 99, dtype=dtype)
    assert confusion_matrix(first, last, 100)[98, 99] == 3


@pytest.mark.parametrize(
    ("confusion", "precision", "recall", "f1"),
    [
        ([[5, 0], [3, 0]], math.nan, 0, 0),  # the class 1 is never predicted
        ([[5, 3], [0, 0]], 0, math.nan, 0),  # it has no example
        ([[5, 0], [0, 0]], math.nan, math.nan, math.nan),
    ],
)
def test_what_is_undefined_is_nan_and_what_is_0_is_0(confusion, precision, recall, f1):
    found = rates(torch.tensor(confusion))
    for name, expected in (("precision", precision), ("recall", recall), ("F1", f1)):
        for part in found[name][:2]:
            assert part[1].item() == pytest.approx(expected, nan_ok=True, abs=1e-15)


@pytest.mark.parametrize("right", [0, 1, 50])
def test_an_interval_holds_its_estimate_and_lies_in_0_to_1(right):
    for value, low, high in rates(
        torch.tensor([[right, 50 - right], [50 - right, right]])
    ).values():
        assert ((low >= 0) & (low <= value) & (value <= high) & (high <= 1) & (low < high)).all()


# By the formula in exact arithmetic but for z = 1.959963985 and the root.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval(successes, trials, low, high):
    estimate = proportion(torch.tensor(successes), torch.tensor(trials))
    assert estimate.low.item() == pytest.approx(low, abs=5e-5)
    assert estimate.high.item() == pytest.approx(high, abs=5e-5)


def test_wilson_interval_holds_the_truth_in_95_of_100_samples():
    for p in (0.02, 0.3, 0.9):
        successes = torch.distributions.Binomial(200, p).sample((20_000,))
        _, low, high = proportion(successes, torch.full_like(successes, 200))
        assert ((low <= p) & (p <= high)).double().mean() == pytest.approx(0.95, abs=0.02)


def test_f1_interval_holds_the_truth_in_95_of_100_samples():
    cells = torch.tensor([0.2, 0.05, 0.1, 0.65])  # hits, misses, false alarms, the rest
    counts = torch.distributions.Multinomial(300, cells).sample((1000,)).view(-1, 2, 2)
    intervals = [rates(confusion)["F1"] for confusion in counts]
    covered = sum(bool(low[0] <= 0.4 / 0.55 <= high[0]) for _, low, high in intervals)
    assert covered / 1000 == pytest.approx(0.95, abs=0.02)


# Mean


def test_mean_interval_is_by_the_standard_error():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    value, low, high = mean(values)
    error = math.sqrt(sum((x - 4) ** 2 for x in values.tolist()) / 3 / 4)
    assert value == 4
    assert (high - value).item() == pytest.approx(1.959964 * error, rel=1e-6)
    assert (value - low).item() == pytest.approx(1.959964 * error, rel=1e-6)


@pytest.mark.parametrize(("size", "value_is_nan"), [(0, True), (1, False)])
def test_mean_of_too_few_values_has_no_interval(size, value_is_nan):
    value, low, high = mean(torch.ones(size))
    assert (value.isnan(), low.isnan(), high.isnan()) == (value_is_nan, True, True)


# Calibration


def test_calibration_curve_against_a_loop():
    probabilities, target = torch.rand(300, K).softmax(1).double(), torch.randint(K, (300,))
    curve = calibration_curve(probabilities, target, 7)
    error = 0.0
    for b in range(7):
        confidences, right = [], []
        for row, label in zip(probabilities.tolist(), target.tolist(), strict=True):
            if b / 7 < max(row) <= (b + 1) / 7:
                confidences.append(max(row))
                right.append(row.index(max(row)) == label)
        assert curve.counts[b] == len(right)
        if right:
            assert curve.confidence[b].item() == pytest.approx(sum(confidences) / len(right))
            assert curve.accuracy[b].item() == pytest.approx(sum(right) / len(right))
            error += abs(sum(right) - sum(confidences)) / 300
        else:
            assert curve.confidence[b].isnan()
            assert curve.accuracy[b].isnan()
    assert curve.error.item() == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize(("confidence", "bin_of"), [(0.75, 2), (1.0, 3)])
def test_a_confidence_on_an_edge_is_in_the_bin_below(confidence, bin_of):
    counts = calibration_curve(confident(confidence, 1), torch.tensor([0]), 4).counts
    assert counts.tolist() == [k == bin_of for k in range(4)]


def test_gaps_of_opposite_sign_do_not_cancel_across_bins():
    probabilities = torch.cat([confident(0.6, 10), confident(0.9, 10)])
    target = torch.tensor([0] * 8 + [1] * 2 + [0] * 7 + [1] * 3)
    assert calibration_curve(probabilities, target).error.item() == pytest.approx(0.2)


def test_half_precision_probabilities():
    probabilities, target = torch.rand(50, 100).softmax(1), torch.randint(100, (50,))
    exact = calibration_curve(probabilities, target).error.item()
    rounded = calibration_curve(probabilities.bfloat16(), target).error.item()
    assert rounded == pytest.approx(exact, abs=probabilities.max().item() * 2**-8)


# Bad input

LABELS = torch.tensor([0, 1])
EVEN = torch.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: confusion_matrix(LABELS.float(), LABELS, 2), TypeError, "target must have an int"),
        (lambda: confusion_matrix(LABELS, LABELS.bool(), 2), TypeError, "prediction must have an "),
        (lambda: confusion_matrix([0, 1], LABELS, 2), TypeError, "target must be a tensor, got "),
        (
            lambda: confusion_matrix(LABELS, LABELS, 1),
            ValueError,
            r"target must .* \[0, 1\), got 1",
        ),
        (lambda: confusion_matrix(LABELS, LABELS - 1, 2), ValueError, "prediction must .* got -1"),
        (lambda: confusion_matrix(LABELS, LABELS[:1], 2), ValueError, r"prediction must .* \(2,\)"),
        (lambda: confusion_matrix(LABELS, LABELS, 0), ValueError, "num_classes must be at least 1"),
        (lambda: mean(LABELS), TypeError, "values must have a floating-point dtype"),
        (
            lambda: calibration_curve(LABELS, LABELS),
            TypeError,
            "probabilities must have a floating",
        ),
        (lambda: calibration_curve(EVEN[0], LABELS), ValueError, r"a shape \(N, K\) .* got \(2,\)"),
        (lambda: calibration_curve(EVEN[:0], LABELS[:0]), ValueError, r"at least one example"),
        (lambda: calibration_curve(EVEN, LABELS[:1]), ValueError, r"target must have shape \(2,\)"),
        (lambda: calibration_curve(EVEN, LABELS + 1), ValueError, r"target must hold .* got 2"),
        (lambda: calibration_curve(EVEN * 2, LABELS), ValueError, r"sum to 1, got \[1.0, 1.0\]"),
        (lambda: calibration_curve(EVEN * math.nan, LABELS), ValueError, r"sum to 1, got \[nan"),
        (
            lambda: calibration_curve(3 * LABELS - 1.0 + 0 * EVEN, LABELS),
            ValueError,
            "at least 0 that",
        ),
        (lambda: calibration_curve(EVEN, LABELS, 0), ValueError, "bins must be at least 1, got 0"),
    ],
)
def test_bad_input_is_told(call, error, message):
    with pytest.raises(error, match=message):
        call()
