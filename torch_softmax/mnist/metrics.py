"""How good a classifier is: rates of each class, mean loss and calibration, with 95 % intervals.

Every result is on the CPU and, except for counts, in float64; what is undefined is nan.
"""

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks

CALIBRATION_BINS = 15  # as in Guo et al. (2017)
SUM_TOLERANCE = 0.02  # how far rounding to half precision can move a sum of 1
Z = NormalDist().inv_cdf(0.975)  # half the width of a 95 % interval, in standard deviations


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval, tensors of one shape."""

    value: Tensor
    low: Tensor
    high: Tensor


class CalibrationCurve(NamedTuple):
    """Mean confidence, accuracy and number of the examples in each bin, all of shape (bins,)."""

    confidence: Tensor
    accuracy: Tensor
    counts: Tensor

    @property
    def error(self) -> Tensor:
        """The expected calibration error, ECE = Σ_b n_b/N · |accuracy_b − confidence_b|."""
        return ((self.accuracy - self.confidence).abs() * self.counts).nansum() / self.counts.sum()


def proportion(successes: Tensor, trials: Tensor) -> Estimate:
    """Estimate p = s/n from counts of one shape, s in n independent trials, by Wilson's interval.

    (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n), which is nan where n is 0.

    Example:
        >>> value, low, high = proportion(torch.tensor(9), torch.tensor(10))
        >>> print(f"{value:.2f} [{low:.2f}, {high:.2f}]")
        0.90 [0.60, 0.98]

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference,
    Journal of the American Statistical Association 22 (1927).
    """
    n = _to_float64(trials)
    p = _to_float64(successes) / n
    shrink = 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / shrink
    half = Z / shrink * (p * (1 - p) / n + (Z / (2 * n)) ** 2).sqrt()
    # Rounding must not push an end past the estimate, which happens where p is 0 or 1.
    return Estimate(p, (centre - half).clamp(min=0).minimum(p), (centre + half).maximum(p))


def mean(values: Tensor) -> Estimate:
    """Estimate an expectation from N independent values (N,), by the normal interval m ± z s / √n.

    The interval is nan for N < 2, as the standard deviation s is.

    Example:
        >>> mean(torch.tensor([1.0, 2.0, 3.0, 4.0])).value
        tensor(2.5000, dtype=torch.float64)
    """
    checks.floating("values", values)
    values = _to_float64(values)
    m, n = values.mean(), len(values)
    s = values.std() if n > 1 else torch.full_like(m, torch.nan)
    half = Z * s / n**0.5
    return Estimate(m, m - half, m + half)


def confusion_matrix(target: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Count how often each class was predicted as each class.

    Args:
        target: True class indices, an integer dtype of shape (N,).
        prediction: Predicted class indices of the same shape.
        num_classes: K.

    Returns:
        int64 of shape (K, K): entry (i, j) counts the examples of class i predicted as class j.

    Example:
        >>> confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    checks.positive("num_classes", num_classes)
    _check_indices("target", target, num_classes)
    _check_indices("prediction", prediction, num_classes)
    checks.shape("prediction", prediction, tuple(target.shape), "as target has")
    cell = target.cpu().long() * num_classes + prediction.cpu().long()
    return cell.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def rates(confusion: Tensor) -> dict[str, Estimate]:
    """Estimate the rates of a confusion matrix C (K, K), with Wilson's intervals.

    They are accuracy tr C / Σ C, a scalar, and for each class k, of shape (K,), precision
    C_kk / Σ_i C_ik, recall C_kk / Σ_j C_kj and F1 = 2J / (1 + J), the harmonic mean of the two. It
    grows with the proportion J = C_kk / (Σ_j C_kj + Σ_i C_ik − C_kk), so that the ends of J's
    interval become the ends of its own. A rate without a case is nan.

    Example:
        >>> found = rates(torch.tensor([[8, 2, 0], [0, 10, 0], [1, 1, 0]]))
        >>> found["precision"].value
        tensor([0.8889, 0.7692,    nan], dtype=torch.float64)

    Source: Lam, Gopal and Qian, Confidence intervals for the F1 score: a comparison of four
    methods (2023), the indirect Wilson method.
    """
    right, predicted, true = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    overlap = proportion(right, predicted + true - right)
    return {
        "accuracy": proportion(right.sum(), confusion.sum()),
        "precision": proportion(right, predicted),
        "recall": proportion(right, true),
        "F1": Estimate(*(2 * j / (1 + j) for j in overlap)),
    }


def calibration_curve(
    probabilities: Tensor, target: Tensor, bins: int = CALIBRATION_BINS
) -> CalibrationCurve:
    """Compare the confidence of predictions with how often they are right, bin by bin.

    The confidence of a prediction is its class's probability; bin b of M holds the examples whose
    confidence lies in ((b − 1)/M, b/M]. The values of an empty bin are nan.

    Args:
        probabilities: Floating point of shape (N, K), whose rows sum to 1.
        target: True class indices, an integer dtype of shape (N,).
        bins: M, the number of bins of equal width.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
        >>> curve = calibration_curve(probabilities, torch.tensor([0, 0]), bins=2)
        >>> curve.accuracy, curve.error
        (tensor([   nan, 0.5000], dtype=torch.float64), tensor(0.3000, dtype=torch.float64))

    Source: Guo et al., On calibration of modern neural networks, ICML (2017), section 2.
    """
    checks.positive("bins", bins)
    checks.floating("probabilities", probabilities)
    if probabilities.dim() != 2 or probabilities.numel() == 0:
        raise ValueError(
            "probabilities must have a shape (N, K) of at least one example and class, "
            f"got {tuple(probabilities.shape)}"
        )
    exact = _to_float64(probabilities)
    is_good = ((exact.sum(1) - 1).abs() < SUM_TOLERANCE) & (exact >= 0).all(1)
    if not is_good.all():
        row = int(is_good.int().argmin())
        raise ValueError(
            "probabilities must hold rows of numbers of at least 0 that sum to 1, "
            f"got {exact[row].tolist()} in row {row}"
        )
    _check_indices("target", target, probabilities.shape[1])
    checks.shape("target", target, probabilities.shape[:1], "for one label a row of probabilities")
    confidence, prediction = exact.max(1)
    right = _to_float64(prediction == target.cpu())
    inner_edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    bin_of = torch.bucketize(confidence, inner_edges)
    counts = bin_of.bincount(minlength=bins)
    sums = [bin_of.bincount(values, minlength=bins) for values in (confidence, right)]
    return CalibrationCurve(sums[0] / counts, sums[1] / counts, counts)


def _to_float64(value: Tensor) -> Tensor:
    return value.to("cpu", torch.float64)


def _check_indices(name: str, value: Tensor, num_classes: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {value.dtype}")
    outside = value[(value < 0) | (value >= num_classes)]
    if outside.numel():
        raise ValueError(
            f"{name} must hold class indices in [0, {num_classes}), got {int(outside[0])}"
        )
