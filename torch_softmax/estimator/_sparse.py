"""Sparse matrices of scipy as examples, of which the rows at work are made dense."""

from dataclasses import dataclass
from typing import Any

import torch
from scipy import sparse
from torch import Tensor

from ..optim._rows import Rows


@dataclass(frozen=True)
class SparseRows(Rows):
    """Rows of a matrix in CSR format, which is never made dense as a whole.

    Args:
        x: The numbers of the matrix that are there, (n, 1).
        matrix: The matrix, (N, D).
    """

    matrix: Any = None

    @classmethod
    def of(cls, matrix: Any, values: Tensor) -> "SparseRows":
        """Those of a matrix in CSR format, whose numbers are these values."""
        parts = (values.numpy(), matrix.indices, matrix.indptr)
        whole = sparse.csr_matrix(parts, shape=matrix.shape, copy=False)
        return cls(values.unsqueeze(1), matrix=whole)

    def __len__(self) -> int:
        return self.matrix.shape[0] if self.index is None else len(self.index)

    @property
    def features(self) -> int:
        """D."""
        return int(self.matrix.shape[1])

    def read(self, rows: slice) -> Tensor:
        """Some rows (n, D), dense, in the dtype and on the device."""
        index = rows if self.index is None else self.index[rows].numpy()
        dense = torch.from_numpy(self.matrix[index].toarray())
        part = Rows(dense, self.shift, self.scale, None, self.dtype, self.device, self.centre)
        return part.read(slice(None))
