"""Softmax regression as estimators of scikit-learn, from the extra [sklearn]."""

try:
    import sklearn  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        'torch_softmax.estimator needs scikit-learn: pip install "torch_softmax[sklearn]"'
    ) from error

from ._classifier import SoftmaxClassifier
from ._cross_validation import SoftmaxClassifierCV

__all__ = ["SoftmaxClassifier", "SoftmaxClassifierCV"]
