"""The checks that need no torch, of words and numbers, and the error of commands."""

import math
import operator


class UserError(RuntimeError):
    """Something that a user gave can't be used; the message is one line that says why."""


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless a named option is one of some words."""
    if value not in choices:
        words = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise ValueError(f"{name} must be {words}, got {value!r}")


def positive(name: str, value: object) -> None:
    """Raise unless a named argument is an int of at least 1."""
    if integer(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def count(name: str, value: object) -> None:
    """Raise unless a named argument is an int of at least 0."""
    if integer(name, value) < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def seed(name: str, value: object) -> None:
    """Raise unless a named argument is an int that every generator of torch takes as its seed."""
    if not 0 <= integer(name, value) < 2**63:
        raise ValueError(f"{name} must be from 0 to 2**63 - 1, got {value}")


def integer(name: str, value: object) -> int:
    """Return a named argument as an int, or raise: NumPy's integers and 0-d tensors will do."""
    try:
        if isinstance(value, (bool, float)):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def finite(name: str, value: float, *, above_zero: bool = False) -> None:
    """Raise unless a named number is finite and at least 0, or above it if so asked."""
    if not (0 < value < math.inf or (value == 0 and not above_zero)):
        bound = "above 0" if above_zero else "of at least 0"
        raise ValueError(f"{name} must be a finite number {bound}, got {value}")
