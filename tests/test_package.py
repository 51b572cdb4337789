"""What importing the package needs and gives, each in a process of its own."""

import subprocess
import sys

import pytest

import torch_softmax
from tests.helpers import ROOT

HIDE_TORCHVISION = """
import sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torchvision", "PIL"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Finder)
"""

USE_EVERYTHING = """
import torch
import torch_softmax
from torch_softmax import CrossEntropyLoss, LinearCrossEntropyLoss, SoftmaxRegression
from torch_softmax.distributed.class_parallel import ClassParallel
from torch_softmax.functional import cross_entropy, linear_cross_entropy, softmax
from torch_softmax.optim.newton import minimize
from torch_softmax.verify import audit

x, labels = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2
model = SoftmaxRegression(3, 2, dtype=torch.float64)
model.loss(x, labels).backward()
minimize(model, x, labels, weight_decay=0.1)
CrossEntropyLoss()(model(x), labels)
LinearCrossEntropyLoss(3, 2, dtype=torch.float64)(x, labels)
print(audit(softmax, [x.requires_grad_()]).ok)
"""


def run(code):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_losses_need_no_torchvision():
    assert run(HIDE_TORCHVISION + USE_EVERYTHING) == "True\n"


def test_every_name_is_there_for_the_asking_and_torch_not_before():
    code = """
import sys
import torch_softmax
print("torch" in sys.modules)
for name in torch_softmax.__all__:
    print(getattr(torch_softmax, name).__name__.split(".")[-1])
"""
    assert run(code).split() == ["False", *torch_softmax.__all__]


def test_the_names_are_listed():
    assert set(torch_softmax.__all__) <= set(dir(torch_softmax))


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'torch_softmax' has no attribute 'nothing'"):
        torch_softmax.nothing  # noqa: B018


def test_compiled_code_may_ask_first():
    code = """
import torch
import torch_softmax

@torch.compile(backend="eager", fullgraph=True)
def loss(z, labels):
    return torch_softmax.functional.cross_entropy(z, labels)

print(loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)).exp().round())
"""
    assert run(code) == "tensor(2.)\n"
