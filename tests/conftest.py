"""What every test starts from: a fixed seed, one thread, no warnings of torch's; and the digits."""

import signal

import pytest
import torch

from tests.regression import CLASSES, WEIGHT_DECAY, probabilities
from torch_softmax.mnist.data import load_dataset
from torch_softmax.optim._objective import Objective


def pytest_configure(config):
    # Torch scripts its formulas for forward mode when they are first asked for.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script:FutureWarning")
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c():
    # A job in the background is started with Ctrl-C ignored, which the trainer would respect.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Tensors as small as these take ten times as long where threads share them.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pytest_collection_modifyitems(items):
    # Eagerly all is tested on the oldest torch; whole-graph compilation needs a recent one.
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):
        return
    for item in items:
        if "compile" in item.name or "export" in item.name:
            item.add_marker(pytest.mark.skip(reason="whole graphs are tested with torch 2.14"))


@pytest.fixture(scope="session")
def digits():
    return load_dataset("digits", data_dir="")


@pytest.fixture(scope="session")
def examples(digits):
    """The training examples, x (1442, 64) in float64."""
    return digits.train.images.double() / digits.train.max_pixel, digits.train.labels


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def bias(request):
    return request.param


@pytest.fixture(params=["indices", "probabilities"])
def problem(request, examples, bias):
    """f with its parameters v, and the data it is made of."""
    input, target = examples
    if request.param == "probabilities":
        target = probabilities(target)
    v = 0.3 * torch.randn(CLASSES, 64 + bias, dtype=torch.float64)
    return Objective(input, target, CLASSES, WEIGHT_DECAY, bias), v, input, target
