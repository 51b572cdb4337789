"""The curvature of a softmax head: its Hessian as an operator, and what is made of it."""

from .hessian import HeadHessian, Kronecker
from .laplace import predictive_variance
from .sampling import sample_labels

__all__ = ["HeadHessian", "Kronecker", "predictive_variance", "sample_labels"]
