"""`SoftmaxClassifierCV`: the penalty that predicts best, by paths over the folds."""

import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.metrics import check_scoring
from sklearn.model_selection import check_cv
from sklearn.utils import _safe_indexing
from torch import Tensor
from tqdm import tqdm

from .. import _checks as checks
from ..modules import SoftmaxRegression
from ..optim import Result, penalty_path
from ..optim._rows import Rows
from ._classifier import LinearSoftmax, SoftmaxClassifier
from ._data import Examples, as_array, check_C, examples_of, place_of
from ._fit import check_parameters, fit_model, model_at, shortcoming


class SoftmaxClassifierCV(LinearSoftmax):
    """`SoftmaxClassifier` with the C that scores best on held-out examples.

    For each fold it goes along all C, from the strongest penalty to the weakest, and each fit
    begins where the one before has led to. The best is then fitted to all examples.

    Args:
        Cs: The values of C; or how many, from 10⁻⁴ to 10⁴.
        cv: The folds: a number, a splitter of scikit-learn, or an iterable of (train, test).
            `ShuffleSplit(1, test_size=0.1)` is a tenth held out.
        scoring: A name or a function as scikit-learn takes it; None for accuracy.
        refit: Whether to fit the best C to all examples; otherwise the coefficients are the mean
            of those of the folds at that C, where `LogisticRegressionCV` takes each fold's own
            best.
        verbose: Whether to show a progress bar.
        fit_intercept, class_weight, tol, max_iter, device, dtype: As in `SoftmaxClassifier`.

    Attributes:
        C_: The best C.
        Cs_: All of them, rising, (n_Cs,).
        scores_: On the examples held out, (n_folds, n_Cs).
        n_iter_: Newton steps, (n_folds, n_Cs).
        classes_, coef_, intercept_, n_features_in_, feature_names_in_: As in `SoftmaxClassifier`.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> classifier = SoftmaxClassifierCV(Cs=[0.01, 1, 100]).fit(X, y)
        >>> classifier.C_, classifier.scores_.mean(0).round(3).tolist()
        (100.0, [0.86, 0.973, 0.98])
    """

    def __init__(
        self,
        Cs: Any = 10,
        *,
        cv: Any = 5,
        scoring: Any = None,
        refit: bool = True,
        verbose: int = 0,
        fit_intercept: bool = True,
        class_weight: Any = None,
        tol: float = 1e-4,
        max_iter: int = 100,
        device: Any = "auto",
        dtype: Any = "auto",
    ) -> None:
        self.Cs = Cs
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.verbose = verbose
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.device = device
        self.dtype = dtype

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "SoftmaxClassifierCV":
        """Find the best C, and go to its optimum; the arguments are those of SoftmaxClassifier.fit.

        Raises:
            ValueError: As SoftmaxClassifier.fit does; or there is no fold, or no score of one.

        Warns:
            ConvergenceWarning: Some optimum was not reached, or is not finite.
        """
        self._fit_or_stay(X, y, sample_weight)
        return self

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> list[str | None]:
        check_parameters(self)
        Cs = _values(self.Cs)
        every = examples_of(self, X, y, sample_weight)
        self.classes_ = every.y.classes
        index = every.y.codes.numpy()
        folds = list(check_cv(self.cv, index, classifier=True).split(index, index))
        if not folds:
            raise ValueError("cv must give at least one fold, got none")
        self.Cs_ = np.array(Cs)
        self.scores_ = np.zeros((len(folds), len(Cs)))
        self.n_iter_ = np.zeros((len(folds), len(Cs)), dtype=np.int32)
        problems: list[str | None] = []
        means: dict[float, SoftmaxRegression] = {}  # of the folds' models, at each C
        with tqdm(total=self.scores_.size, unit="fit", disable=not self.verbose) as bar:
            for fold, (train, test) in enumerate(folds):
                score = self._scorer(X, every, sample_weight, test)
                for at, (C, model, result) in enumerate(self._path(every, train, Cs)):
                    means[C] = model if fold == 0 else _mean(means[C], model, fold)
                    self.scores_[fold, at], self.n_iter_[fold, at] = score(model), result.steps
                    if math.isnan(self.scores_[fold, at]):
                        raise ValueError(f"scoring must give numbers, got nan at C={C:g}")
                    problems.append(shortcoming(result, every, C, self.tol))
                    bar.update()
        self.C_ = Cs[int(self.scores_.mean(0).argmax())]
        model = means[self.C_]
        if self.refit:
            result = fit_model(model, every, self.C_, self)
            problems.append(shortcoming(result, every, self.C_, self.tol))
        self._keep(model, X)
        return problems

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The score of `scoring`; the share of right predictions where that is None."""
        if self.scoring is None:
            return super().score(X, y, sample_weight)
        options = {} if sample_weight is None else {"sample_weight": as_array(sample_weight)}
        X = Rows(X) if isinstance(X, Tensor) else X  # whose predictions are arrays
        return float(check_scoring(self, self.scoring)(self, X, as_array(y), **options))

    def _path(
        self, every: Examples, train: Any, Cs: list[float]
    ) -> Iterator[tuple[float, SoftmaxRegression, Result]]:
        """A model of some examples for each C, from the strongest penalty on."""
        examples = every.take(torch.as_tensor(train))
        if not examples.total > 0:
            raise ValueError("cv must give folds that train on examples of a weight above 0")
        path = penalty_path(
            model_at(None, examples, self.fit_intercept),
            examples.rows,
            examples.y.codes,
            [examples.penalty(C) for C in Cs],
            sample_weight=examples.weight,
            tolerance=self.tol,
            weight_tolerance=self.tol,
            max_steps=self.max_iter,
        )
        for C, (_, model, result) in zip(Cs, path, strict=True):
            yield C, model, result

    def _scorer(
        self, X: Any, examples: Examples, sample_weight: Any, test: Any
    ) -> Callable[[SoftmaxRegression], float]:
        """How a model scores on the examples of a fold that were held out."""
        held = _taken(X, test)
        y = examples.y.classes[examples.y.codes.numpy()[test]]
        options = {}
        if sample_weight is not None:
            weight = np.broadcast_to(np.asarray(as_array(sample_weight)), len(examples.y.codes))
            options["sample_weight"] = weight[test]
        classifier = SoftmaxClassifier(device=place_of(self.device, X))
        classifier.classes_ = examples.y.classes
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self, name):
                setattr(classifier, name, getattr(self, name))
        scorer = check_scoring(classifier, self.scoring)

        def score(model: SoftmaxRegression) -> float:
            classifier._keep(model, X)
            return float(scorer(classifier, held, y, **options))

        return score


def _taken(X: Any, index: Any) -> Any:
    """Some of the examples, as a frame where they are in one, or as rows of a tensor."""
    if isinstance(X, Rows | Tensor):  # rows, as a score of scikit-learn is one of arrays
        rows = X if isinstance(X, Rows) else Rows(X)
        return rows.take(torch.as_tensor(index))
    if sparse.issparse(X):
        return X.tocsr()[index]
    return _safe_indexing(X, index) if hasattr(X, "columns") else np.asarray(X)[index]


def _values(Cs: Any) -> list[float]:
    """The values of C, rising."""
    if isinstance(Cs, numbers.Integral):
        checks.positive("Cs", Cs)
        return [float(C) for C in np.logspace(-4, 4, int(Cs))]
    try:
        given = list(Cs)
    except TypeError:
        raise TypeError(f"Cs must be a number of them or some numbers, got {Cs!r}") from None
    values = sorted({check_C("Cs", C) for C in given})
    if not values:
        raise ValueError("Cs must hold at least one number, got none")
    return values


def _mean(mean: SoftmaxRegression, model: SoftmaxRegression, count: int) -> SoftmaxRegression:
    """The mean of some models, with one more."""
    with torch.no_grad():
        for name, value in mean.named_parameters():
            value.lerp_(getattr(model, name), 1 / (count + 1))
    return mean
