"""Softmax regression for PyTorch, with closed-form derivatives of every order, in little memory."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import functional
    from .modules import CrossEntropyLoss, LinearCrossEntropyLoss, SoftmaxRegression

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss", "SoftmaxRegression", "functional"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Load a name when it is first asked for, so that the commands can begin without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "functional":
        return import_module(".functional", __name__)
    value = getattr(import_module(".modules", __name__), name)
    globals()[name] = value  # for the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
