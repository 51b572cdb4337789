"""The curvature of a softmax head: its Hessian as an operator, and what it is used for."""

from .hessian import HeadHessian, Kronecker

__all__ = ["HeadHessian", "Kronecker"]
