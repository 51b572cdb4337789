"""What scikit-learn's users hand in: examples, labels and weights, checked without a copy."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_array,
    column_or_1d,
    validate_data,
)
from torch import Tensor

from .. import _checks as checks
from .._command_line import choose_device
from ..losses._chunked import slices
from ..optim._rows import Rows, as_tensor, memory_of
from ._sparse import SparseRows

_MOVED = 0.25  # of a device's memory, for examples that come from elsewhere
_NUMBERS = 2**24  # to look at at a time
_HALF = (torch.float16, torch.bfloat16)
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Labels(NamedTuple):
    """The classes, in order, and the index of each example's among them."""

    classes: Any  # (K,)
    codes: Tensor  # (N,) int64


class Examples(NamedTuple):
    """What a fit is about, checked."""

    rows: Rows
    y: Labels
    weight: Tensor | None  # (N,) in float64, None for 1

    def take(self, index: Tensor) -> "Examples":
        """Some of them, with all classes."""
        weight = None if self.weight is None else self.weight[index]
        return Examples(self.rows.take(index), self.y._replace(codes=self.y.codes[index]), weight)

    @property
    def total(self) -> float:
        """Σw."""
        return len(self.rows) if self.weight is None else float(self.weight.sum())

    def absent(self) -> list[Any]:
        """The classes that no example of a weight above 0 has."""
        totals = torch.bincount(self.y.codes, self.weight, minlength=len(self.y.classes))
        return list(self.y.classes[(totals == 0).numpy()].tolist())

    def penalty(self, C: float) -> float:
        """λ: a mean loss is 1/Σw of the sum, and of two classes our rows are half as long."""
        return (2 if len(self.y.classes) == 2 else 1) / C / self.total


def examples_of(estimator: Any, X: Any, y: Any, sample_weight: Any) -> Examples:
    """Check what is given to `fit`."""
    rows = check_examples(estimator, X, reset=True)
    of_y = labels(y, len(rows))
    w = weights(sample_weight, estimator.class_weight, of_y)
    rows = placed(rows, place_of(estimator.device, X), dtype_of(estimator.dtype, rows.x))
    return Examples(rows, of_y, w)


def check_C(name: str, value: Any) -> float:
    """Return a C as a number, or raise unless it is above 0."""
    number = checks.number(name, value)
    if not number > 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return number


def place_of(device: Any, X: Any) -> torch.device:
    """Where to work: where a tensor is, or on a GPU if there is one."""
    if device != "auto":
        try:
            return torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(f"device must be 'auto' or one of torch's, got {device!r}") from None
    if isinstance(X, Tensor):
        return X.device
    found = choose_device("auto")
    return torch.device("cpu") if found.type == "mps" else found  # which has no float64


def dtype_of(dtype: Any, X: Tensor) -> torch.dtype:
    """The dtype of the products: float32 for examples of that or less, float64 for the others."""
    if dtype != "auto":
        chosen = DTYPES.get(getattr(dtype, "__name__", str(dtype)).removeprefix("torch."))
        if chosen is None:
            raise ValueError(f"dtype must be 'auto', 'float32' or 'float64', got {dtype!r}")
        return chosen
    return torch.float32 if X.dtype in (torch.float32, *_HALF) else torch.float64


def check_examples(estimator: Any, X: Any, *, reset: bool) -> Rows:
    """Check X (N, D), and take it for rows that share its memory."""
    if isinstance(X, Rows | Tensor):
        rows = X if isinstance(X, Rows) else _rows_of_tensor(X)
        if 0 in rows.x.shape or len(rows) == 0:
            least = "feature(s)" if len(rows) else "sample(s)"
            raise ValueError(f"Found array with 0 {least} (shape={tuple(rows.x.shape)})")
        validate_data(estimator, rows.x, skip_check_array=True, reset=reset)
    else:
        # Numbers that are no floats of 4 or 8 bytes would be checked by copies of them all.
        options = {"accept_sparse": "csr", "dtype": "numeric", "ensure_all_finite": False}
        array = validate_data(estimator, X, reset=reset, **options)
        is_sparse = sparse.issparse(array)
        rows = SparseRows.of(array, _shared(array.data)) if is_sparse else Rows(_shared(array))
    _check_finite(rows.x)
    return rows


def _rows_of_tensor(X: Tensor) -> Rows:
    if X.dim() != 2:
        raise ValueError(f"Expected 2D array, got {X.dim()}D tensor instead: X.shape={X.shape}")
    if X.is_complex():
        raise ValueError("Complex data not supported: X must be real")
    return Rows(X)


def placed(rows: Rows, device: torch.device, dtype: torch.dtype) -> Rows:
    """The examples to be read for a device; they are moved there at once where they fit."""
    x = rows.x
    moves = device != x.device and not isinstance(rows, SparseRows)
    if moves and x.nbytes <= _MOVED * memory_of(device):
        rows = replace(rows, x=x.to(device))
    return rows.to(device, dtype)


def labels(y: Any, count: int) -> Labels:
    """Check y (N,) and tell its classes."""
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None")
    y = column_or_1d(as_array(y), warn=True)
    check_array(y, ensure_2d=False, dtype=None, input_name="y")
    check_classification_targets(y)
    if len(y) != count:
        raise ValueError(
            f"Found input variables with inconsistent numbers of samples: {[count, len(y)]}"
        )
    classes, index = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            "This solver needs samples of at least 2 classes in the data, "
            f"but the data contains only one class: {classes[0]!r}"
        )
    classes = classes.astype(classes.dtype.newbyteorder("="), copy=False)  # as torch wants it
    return Labels(classes, torch.from_numpy(index.astype(np.int64)))


def weights(sample_weight: Any, class_weight: Any, y: Labels) -> Tensor | None:
    """What each example counts for, (N,) in float64; None for 1."""
    w = None
    if sample_weight is not None:
        given = as_array(sample_weight)
        given = _check_sample_weight(
            given, y.codes.numpy(), dtype=np.float64, ensure_non_negative=True
        )
        w = torch.from_numpy(given)
        if not bool((w > 0).any()):  # which older versions of scikit-learn take
            raise ValueError("sample_weight must hold a number above 0, got zeros alone")
    if class_weight is None:
        return w
    of_class = _class_weights(
        class_weight, y, torch.ones(len(y.codes)).double() if w is None else w
    )
    both = of_class[y.codes] if w is None else of_class[y.codes] * w
    if not bool((both > 0).any()):
        raise ValueError("class_weight must leave an example a weight above 0, got zeros alone")
    return both


def _class_weights(class_weight: Any, y: Labels, w: Tensor) -> Tensor:
    """What each class counts for, (K,): 'balanced' is Σw / (K Σw of the class)."""
    if isinstance(class_weight, dict):
        known = [class_weight.get(label, 1.0) for label in y.classes.tolist()]
        missing = [label for label in y.classes.tolist() if label not in class_weight]
        if missing and len(class_weight) > len(known) - len(missing):  # it has classes of its own
            raise ValueError(f"The classes, {missing}, are not in class_weight")
        for value in known:
            checks.finite("class_weight", checks.number("class_weight", value))
        return torch.tensor(known, dtype=torch.float64)
    if not isinstance(class_weight, str) or class_weight != "balanced":
        raise ValueError(f"class_weight must be a dict, 'balanced' or None, got {class_weight!r}")
    totals = torch.bincount(y.codes, w, minlength=len(y.classes))
    return torch.where(totals > 0, w.sum() / (len(totals) * totals), 0)


def as_array(value: Any) -> Any:
    """A tensor as an array, and all else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _shared(array: Any) -> Tensor:
    """An array as a tensor of the same memory, or of a copy where torch can't read it."""
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    try:
        return as_tensor("X", array)
    except TypeError:
        return as_tensor("X", array.astype(np.float64))


def _check_finite(x: Tensor) -> None:
    """Raise unless all numbers are finite, in the words of scikit-learn."""
    if not x.is_floating_point():
        return
    for rows in slices(len(x), max(1, _NUMBERS // x.shape[1])):
        # A sum is finite where its terms are, but for an overflow.
        if not bool(
            x[rows].sum(dtype=torch.float64 if x.device.type != "mps" else None).isfinite()
        ):
            if bool(x[rows].isnan().any()):
                raise ValueError("Input X contains NaN. SoftmaxClassifier does not accept it.")
            if bool(x[rows].isinf().any()):
                raise ValueError("Input X contains infinity or a value too large for its dtype.")
