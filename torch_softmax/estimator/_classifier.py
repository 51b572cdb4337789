"""`SoftmaxClassifier`: softmax regression with scikit-learn's objective, shapes and names."""

import copy
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn import functional as F

from ..losses._chunked import slices
from ..modules import SoftmaxRegression
from ._data import as_array, check_C, check_examples, examples_of, place_of
from ._fit import check_parameters, fit_model, model_at, shortcoming

_SCORED = 2**24  # numbers of X to work out at a time


class LinearSoftmax(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """What both estimators do once they have `classes_`, `coef_` and `intercept_`."""

    def decision_function(self, X: Any) -> Any:
        """The logits (N, K); with two classes that of the second one less the first's, (N,)."""
        return _like(X, self._logits(X))

    def predict(self, X: Any) -> Any:
        """The most probable class of each example, (N,)."""
        z = self._logits(X)
        index = (z > 0).long() if z.dim() == 1 else z.argmax(1)
        if isinstance(X, Tensor) and self.classes_.dtype.kind in "iufb":
            return torch.from_numpy(self.classes_).to(X.device)[index.to(X.device)]
        return self.classes_[index.cpu().numpy()]

    def predict_proba(self, X: Any) -> Any:
        """The probability of each class, (N, K)."""
        return _like(X, self._log_probabilities(X).exp())

    def predict_log_proba(self, X: Any) -> Any:
        """The logarithm of each class's probability, (N, K)."""
        return _like(X, self._log_probabilities(X))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of examples whose class is predicted right."""
        y, predicted, weight = map(as_array, (y, self.predict(X), sample_weight))
        return float(accuracy_score(y, predicted, sample_weight=weight))

    def to_linear(self) -> SoftmaxRegression:
        """The same classifier as a module, an `nn.Linear` of a row for each class."""
        check_is_fitted(self)
        coef, intercept = (
            torch.as_tensor(value).detach().clone() for value in (self.coef_, self.intercept_)
        )
        if len(coef) == 1:
            coef, intercept = (torch.cat([-v / 2, v / 2]) for v in (coef, intercept))
        classes, features = coef.shape
        model = SoftmaxRegression(features, classes, device=coef.device, dtype=coef.dtype)
        model.load_state_dict({"weight": coef, "bias": intercept})
        return model

    def _log_probabilities(self, X: Any) -> Tensor:
        z = self._logits(X)
        if z.dim() == 1:
            return torch.stack([F.logsigmoid(-z), F.logsigmoid(z)], 1)
        return F.log_softmax(z, 1)

    @torch.no_grad()
    def _logits(self, X: Any) -> Tensor:
        check_is_fitted(self)
        rows = check_examples(self, X, reset=False)
        device = place_of(self.device, X)
        W, b = (torch.as_tensor(value).to(device) for value in (self.coef_, self.intercept_))
        rows = rows.to(device, W.dtype)
        parts = slices(len(rows), max(1, _SCORED // rows.features))
        z = torch.cat([torch.addmm(b, rows.read(part), W.t()) for part in parts])
        if not bool(z.isfinite().all()):
            raise ValueError(
                f"X must hold numbers whose logits are finite in {W.dtype}, got others"
            )
        return z.squeeze(1) if len(self.classes_) == 2 else z

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> list[str | None]:
        """Go to the optimum, and return what a user has to know of it."""
        raise NotImplementedError

    def _fit_or_stay(self, X: Any, y: Any, sample_weight: Any) -> None:
        """Fit, and warn of what a user has to know; an estimator that can't be stays as it was."""
        fitted = copy.copy(self)
        problems = fitted._fit(X, y, sample_weight)
        self.__dict__ = fitted.__dict__
        for problem in dict.fromkeys(filter(None, problems)):
            warnings.warn(problem, ConvergenceWarning, stacklevel=3)

    def _keep(self, model: SoftmaxRegression, like: Any) -> None:
        """Have the coefficients of a model: tensors for tensors, and arrays otherwise."""
        W = model.weight.detach()
        b = W.new_zeros(len(W)) if model.bias is None else model.bias.detach()
        if len(W) == 2:  # which has one vector in scikit-learn
            W, b = W[1:] - W[:1], b[1:] - b[:1]
        self.coef_, self.intercept_ = (_like(like, value.clone()) for value in (W, b))

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "coef_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class SoftmaxClassifier(LinearSoftmax):
    """Softmax regression to its optimum, in the place of scikit-learn's `LogisticRegression`.

    It minimises C Σ_n w_n L_n + ½‖W‖² with the cross-entropy L and a free intercept, by Newton's
    method with Hessian-vector products, in the memory of a few rows of X and of some matrices
    (D, D). Its optimum, shapes and names are those of `LogisticRegression`.

    Args:
        C: The inverse of the penalty's strength, above 0; `float("inf")` for no penalty.
        fit_intercept: Whether there is an intercept.
        class_weight: What classes count for: a dict, "balanced", or None for 1.
        tol: How near the coefficients come to the optimum's, in parts of their length:
            ‖W − W*‖ ≤ tol ‖W‖; with a gradient norm of tol at most. Without a penalty nothing
            tells how near they are, and the gradient's norm is to be tol².
        max_iter: The Newton steps to give up after, 0 or more.
        warm_start: Whether to begin with the coefficients that are there.
        device: Where to work; "auto" is where a tensor X is, else a GPU if there is one.
        dtype: "float32" or "float64", of the products; sums are in float64, and gradients too where
            rounding would hide the optimum. "auto" is float32 for X of that or less.

    Attributes:
        classes_: (K,), in order.
        coef_, intercept_: (K, D) and (K,), or (1, D) and (1,) for two classes; tensors on the
            device of X where that is a tensor.
        n_iter_: The Newton steps, (1,).
        n_features_in_: D. And `feature_names_in_` where X has names.
        result_: How far it came, an `optim.Result`.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> classifier = SoftmaxClassifier().fit(X, y)
        >>> classifier.coef_.shape, round(classifier.score(X, y), 4)
        ((3, 4), 0.9733)
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        fit_intercept: bool = True,
        class_weight: Any = None,
        tol: float = 1e-4,
        max_iter: int = 100,
        warm_start: bool = False,
        device: Any = "auto",
        dtype: Any = "auto",
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.warm_start = warm_start
        self.device = device
        self.dtype = dtype

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "SoftmaxClassifier":
        """Go to the optimum.

        Args:
            X: (N, D): an array, memory-mapped or not, a frame, a sparse matrix of scipy, a tensor,
                or `optim.Rows`, of any real dtype. It is read a few rows at a time, and not copied
                but to a device on which it fits, or to CSR format.
            y: The class of each example, (N,): integers or strings.
            sample_weight: What each example counts for, (N,).

        Raises:
            ValueError: X or y can't be used, or a parameter is out of range.

        Warns:
            ConvergenceWarning: The optimum was not reached, or is not finite.
        """
        self._fit_or_stay(X, y, sample_weight)
        return self

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> list[str | None]:
        check_parameters(self)
        C = check_C("C", self.C)
        examples = examples_of(self, X, y, sample_weight)
        start = self.to_linear() if self.warm_start and hasattr(self, "coef_") else None
        model = model_at(start, examples, self.fit_intercept)
        result = fit_model(model, examples, C, self)
        self.classes_ = examples.y.classes
        self._keep(model, X)
        self.n_iter_ = np.array([result.steps], dtype=np.int32)
        self.result_ = result
        return [shortcoming(result, examples, C, self.tol)]


def _like(X: Any, value: Tensor) -> Any:
    """A result as a tensor where X is one, and else as an array."""
    return value.to(X.device) if isinstance(X, Tensor) else value.cpu().numpy()
