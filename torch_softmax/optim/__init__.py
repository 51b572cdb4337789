"""Optimizers that go to the optimum: Newton's method, for one penalty or many."""

from ._rows import Rows
from .newton import Result, minimize
from .path import Fitted, penalty_path

__all__ = ["Fitted", "Result", "Rows", "minimize", "penalty_path"]
