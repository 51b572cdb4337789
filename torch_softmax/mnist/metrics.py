"""How good a classifier is: rates by class, mean loss and calibration, with 95 % intervals.

Every result is on the CPU and, but for counts, in float64; what is undefined is nan.
"""

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks

__all__ = [
    "CALIBRATION_BINS",
    "RESAMPLES",
    "CalibrationCurve",
    "Estimate",
    "accuracy",
    "calibration_curve",
    "confusion_matrix",
    "estimate_calibration_error",
    "expected_calibration_error",
    "f1_score",
    "mean",
    "precision",
    "proportion",
    "recall",
]

CALIBRATION_BINS = 15  # as many as Guo et al. (2017) use
SUM_TOLERANCE = 0.02  # what rounding to half precision leaves of a sum of 1
RESAMPLES = 1000  # of the bootstrap
TAIL = 0.025  # probability beyond each end of a 95 % interval
Z = NormalDist().inv_cdf(1 - TAIL)


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


def proportion(successes: Tensor, trials: Tensor) -> Estimate:
    """Estimate a probability from independent trials, with Wilson's interval.

    (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n), with p = s/n

    Args:
        successes: s, counts of any shape.
        trials: n, counts of the same shape.

    Returns:
        p and its interval; nan where n is 0.

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
    """Estimate an expectation from independent values, with the normal interval m ± z s / √n.

    Args:
        values: Real numbers of shape (N,), such as the losses of N examples.

    Returns:
        The mean m and its interval, by the standard deviation s; nan where N is below 2, or 1 for
        the mean.

    Raises:
        TypeError: Values has no floating-point dtype.

    Example:
        >>> value, low, high = mean(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> print(f"{value:.2f} [{low:.2f}, {high:.2f}]")
        2.50 [1.23, 3.77]

    Source: Wasserman, All of Statistics (2004), section 6.3.2.
    """
    checks.floating("values", values)
    values = _to_float64(values)
    m = values.mean()
    n = len(values)
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

    Raises:
        TypeError: Indices are not integers.
        ValueError: The shapes differ or an index lies outside of [0, K).

    Example:
        >>> confusion_matrix(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1]), 3)
        tensor([[1, 1, 0],
                [0, 1, 0],
                [0, 1, 0]])
    """
    checks.positive("num_classes", num_classes)
    _check_indices("target", target, num_classes)
    _check_indices("prediction", prediction, num_classes)
    checks.shape("prediction", prediction, tuple(target.shape), "as target has")
    cell = target.cpu().long() * num_classes + prediction.cpu().long()
    return cell.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def accuracy(confusion: Tensor) -> Estimate:
    """Estimate the fraction of right predictions, tr C / Σ C.

    Args:
        confusion: C, counts of shape (K, K), as `confusion_matrix` returns.

    Returns:
        Scalars, with Wilson's interval.

    Example:
        >>> accuracy(torch.tensor([[8, 2], [0, 10]])).value
        tensor(0.9000, dtype=torch.float64)
    """
    return proportion(confusion.diagonal().sum(), confusion.sum())


def precision(confusion: Tensor) -> Estimate:
    """Estimate, for each class k, how often a prediction of it is right: C_kk / Σ_i C_ik.

    Args:
        confusion: C, counts of shape (K, K), as `confusion_matrix` returns.

    Returns:
        Shape (K,), with Wilson's interval; nan for a class that was never predicted.

    Example:
        >>> precision(torch.tensor([[8, 2, 0], [0, 10, 0], [1, 1, 0]])).value
        tensor([0.8889, 0.7692,    nan], dtype=torch.float64)
    """
    return proportion(confusion.diagonal(), confusion.sum(0))


def recall(confusion: Tensor) -> Estimate:
    """Estimate, for each class k, how often an example of it is found: C_kk / Σ_j C_kj.

    Args:
        confusion: C, counts of shape (K, K), as `confusion_matrix` returns.

    Returns:
        Shape (K,), with Wilson's interval; nan for a class without an example.

    Example:
        >>> recall(torch.tensor([[8, 2], [0, 10]])).value
        tensor([0.8000, 1.0000], dtype=torch.float64)
    """
    return proportion(confusion.diagonal(), confusion.sum(1))


def f1_score(confusion: Tensor) -> Estimate:
    """Estimate, for each class k, the harmonic mean of precision and recall.

    F1 = 2J / (1 + J), where J = C_kk / (Σ_j C_kj + Σ_i C_ik − C_kk) is a proportion: of the
    examples of the class or predicted as it, those for which both hold. F1 grows with J, so
    that the ends of Wilson's interval of J become those of F1.

    Args:
        confusion: C, counts of shape (K, K), as `confusion_matrix` returns.

    Returns:
        Shape (K,); nan for a class without an example that was never predicted.

    Example:
        >>> f1_score(torch.tensor([[8, 2], [0, 10]])).value
        tensor([0.8889, 0.9091], dtype=torch.float64)

    Source: Lam, Gopal and Qian, Confidence intervals for the F1 score: a comparison of four
    methods (2023), the indirect Wilson method.
    """
    right = confusion.diagonal()
    overlap = proportion(right, confusion.sum(0) + confusion.sum(1) - right)
    return Estimate(*(2 * j / (1 + j) for j in overlap))


def calibration_curve(
    probabilities: Tensor, target: Tensor, bins: int = CALIBRATION_BINS
) -> CalibrationCurve:
    """Compare the confidence of predictions with how often they are right, bin by bin.

    The confidence of a prediction is its class's probability; bin b of M holds the examples whose
    confidence lies in ((b − 1)/M, b/M].

    Args:
        probabilities: Floating point of shape (N, K), whose rows sum to 1.
        target: True class indices, an integer dtype of shape (N,).
        bins: M, the number of bins of equal width.

    Returns:
        The mean confidence and the accuracy in each bin, nan where it is empty; its int64 size.

    Raises:
        TypeError: A dtype is none of these.
        ValueError: The shapes don't fit together, a row is no distribution, an index lies
            outside of [0, K), bins is below 1, or there is no example.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
        >>> curve = calibration_curve(probabilities, torch.tensor([0, 0]), bins=2)
        >>> for values in curve:
        ...     print(values)
        tensor([   nan, 0.8000], dtype=torch.float64)
        tensor([   nan, 0.5000], dtype=torch.float64)
        tensor([0, 2])

    Source: Guo et al., On calibration of modern neural networks, ICML (2017), section 2.
    """
    confidence, right, bin_of = _bin_predictions(probabilities, target, bins)
    counts = bin_of.bincount(minlength=bins)
    return CalibrationCurve(
        bin_of.bincount(confidence, minlength=bins) / counts,
        bin_of.bincount(right, minlength=bins) / counts,
        counts,
    )


def expected_calibration_error(
    probabilities: Tensor, target: Tensor, bins: int = CALIBRATION_BINS
) -> Tensor:
    """Return the mean gap between accuracy and confidence, ECE = Σ_b n_b/N · |acc_b − conf_b|.

    Args:
        probabilities: Floating point of shape (N, K), whose rows sum to 1.
        target: True class indices, an integer dtype of shape (N,).
        bins: M, the number of bins of equal width.

    Returns:
        A float64 scalar.

    Raises:
        TypeError, ValueError: As `calibration_curve` does.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
        >>> expected_calibration_error(probabilities, torch.tensor([0, 0]), bins=2)
        tensor(0.3000, dtype=torch.float64)

    Source: Guo et al., On calibration of modern neural networks, ICML (2017), equation 3.
    """
    confidence, right, bin_of = _bin_predictions(probabilities, target, bins)
    return _mean_by_bin(right - confidence, bin_of, bins).abs().sum()


def estimate_calibration_error(
    probabilities: Tensor,
    target: Tensor,
    bins: int = CALIBRATION_BINS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Estimate the expected calibration error, with an interval by a seeded bootstrap.

    ECE = Σ_b |d_b|, where d_b = 1/N · Σ (right − confidence) over bin b. Resampling the examples
    gives d*. The high end is the 97.5 % percentile of Σ_b |d*_b|. The low end can't be a percentile
    of it: noise adds to every |d_b|, so that they all lie above the ECE of a calibrated model.
    But by the triangle inequality noise adds at most Σ_b |d_b − E d_b|, whose 97.5 % percentile,
    estimated by that of Σ_b |d*_b − d_b|, is taken off.

    Args:
        probabilities: Floating point of shape (N, K), whose rows sum to 1.
        target: True class indices, an integer dtype of shape (N,).
        bins: M, the number of bins of equal width.
        resamples: How often N examples are drawn anew.
        seed: Of these draws.

    Returns:
        Float64 scalars.

    Raises:
        TypeError, ValueError: As `calibration_curve` does, and if resamples is below 1.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).repeat(50, 1)
        >>> target = torch.zeros(100, dtype=torch.int64)
        >>> value, low, high = estimate_calibration_error(probabilities, target)
        >>> print(f"{value:.2f} [{low:.2f}, {high:.2f}]")
        0.40 [0.31, 0.46]

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, for
    percentiles.
    """
    checks.positive("resamples", resamples)
    confidence, right, bin_of = _bin_predictions(probabilities, target, bins)
    gap = right - confidence
    d = _mean_by_bin(gap, bin_of, bins)
    generator = torch.Generator().manual_seed(seed)
    size = (len(gap),)
    draws = (torch.randint(len(gap), size, generator=generator) for _ in range(resamples))
    resampled = torch.stack([_mean_by_bin(gap[i], bin_of[i], bins) for i in draws])
    value = d.abs().sum()
    noise = (resampled - d).abs().sum(1).quantile(1 - TAIL)
    high = resampled.abs().sum(1).quantile(1 - TAIL)
    return Estimate(value, (value - noise).clamp(min=0), high.maximum(value))


def _bin_predictions(
    probabilities: Tensor, target: Tensor, bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each example's confidence, whether it is right (0 or 1), and its bin."""
    checks.positive("bins", bins)
    _check_distributions(probabilities)
    _check_indices("target", target, probabilities.shape[1])
    checks.shape("target", target, probabilities.shape[:1], "for one label a row of probabilities")
    confidence, prediction = probabilities.max(1)
    confidence = _to_float64(confidence)
    inner_edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    right = _to_float64(prediction == target)
    return confidence, right, torch.bucketize(confidence, inner_edges)


def _mean_by_bin(values: Tensor, bin_of: Tensor, bins: int) -> Tensor:
    """Sum the values in each bin, over the number of all of them."""
    return bin_of.bincount(values, minlength=bins) / len(values)


def _to_float64(value: Tensor) -> Tensor:
    return value.to("cpu", torch.float64)


def _check_distributions(probabilities: Tensor) -> None:
    checks.floating("probabilities", probabilities)
    if probabilities.dim() != 2 or probabilities.numel() == 0:
        raise ValueError(
            "probabilities must have a shape (N, K) of at least one example and class, "
            f"got {tuple(probabilities.shape)}"
        )
    sums = _to_float64(probabilities).sum(1)
    is_bad = ~((sums - 1).abs() < SUM_TOLERANCE) | (probabilities.cpu() < 0).any(1)
    if is_bad.any():
        row = int(is_bad.int().argmax())
        raise ValueError(
            f"probabilities must hold rows of numbers from 0 on that sum to 1, "
            f"got {probabilities[row].tolist()} in row {row}"
        )


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
