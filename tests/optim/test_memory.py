"""Examples that are larger than the memory that a process may have."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT

resource = pytest.importorskip("resource")  # not there on Windows

FIT = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from torch_softmax import SoftmaxRegression
from torch_softmax.optim import Rows, minimize

path, rows, room = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
X = np.memmap(path, dtype=np.float16, mode="r", shape=(rows, 256))
y = torch.arange(rows) % 3
model = SoftmaxRegression(256, 3)
status = Path("/proc/self/status").read_text().split()
used = 1024 * int(status[status.index("VmData:") + 1])
resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
result = minimize(model, Rows(X), y, weight_decay=0.1, tolerance=1e-3)
right = int((model.predict(torch.from_numpy(X[:3000].astype("f4"))) == y[:3000]).sum())
print(result.converged, right)
"""

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process allocates")
def test_memory_mapped_examples_are_fitted_in_less_memory_than_they_take(tmp_path):
    # Rows of 512 bytes, of which the first three numbers tell the class.
    np = pytest.importorskip("numpy")
    rows, room = 3 * 2**16, 44 * MIB
    path = tmp_path / "X"
    X = np.memmap(path, dtype=np.float16, mode="w+", shape=(rows, 256))
    X[np.arange(rows), np.arange(rows) % 3] = 1
    X.flush()
    assert X.nbytes > 2 * room
    command = [sys.executable, "-c", FIT, str(path), str(rows), str(room)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", "3000"]
