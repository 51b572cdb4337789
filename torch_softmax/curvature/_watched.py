"""Tensors that must stay as they are, by the changes in place that torch counts."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Watched:
    """Tensors by their names, none of which may be changed in place from now on.

    A copy, deep or pickled, watches copies of the tensors, whose count may start anew.
    """

    def __init__(self, values: Mapping[str, object]) -> None:
        tensors = {name: t for name, t in values.items() if isinstance(t, Tensor)}
        self._watch(
            {
                # A detached tensor shares its count, and a graph is neither held nor copied.
                name: t if t.is_leaf else t.detach()
                for name, t in tensors.items()
                if not t.is_inference()  # of which nothing is counted
            }
        )

    def _watch(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.versions = {name: tensor._version for name, tensor in tensors.items()}

    def check(self) -> None:
        """Raise if one was changed."""
        for name, tensor in self.tensors.items():
            if tensor._version != self.versions[name]:
                raise RuntimeError(
                    f"{name} must not be changed in place as long as its HeadHessian is used: "
                    "make a new one, or give it a clone"
                )

    def __getstate__(self) -> dict[str, Any]:
        self.check()
        return {"tensors": self.tensors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._watch(state["tensors"])
