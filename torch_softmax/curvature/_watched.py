"""Tensors that must stay as they are, by the changes in place that torch counts."""

from typing import Any

from torch import Tensor


class Watched:
    """Tensors by their names, none of which may be changed in place from now on.

    A copy, deep or pickled, watches copies of the tensors, whose count may start anew.
    """

    def __init__(self, **values: object) -> None:
        tensors = {name: t for name, t in values.items() if isinstance(t, Tensor)}
        # Nothing is counted for a tensor of inference mode. A detached tensor shares its count, and
        # no graph is held or copied with it.
        counted = {name: t for name, t in tensors.items() if not t.is_inference()}
        self.__setstate__({name: t if t.is_leaf else t.detach() for name, t in counted.items()})

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
        return self.tensors

    def __setstate__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.versions = {name: tensor._version for name, tensor in tensors.items()}
