"""The prediction for a GPU: what a kernel costs, and what is alive at a time."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scripts.benchmark import roofline
from scripts.benchmark.measure import Shape
from scripts.benchmark.roofline import Card, Trace, predict, three_products
from tests.helpers import needs_fake_cuda

CARD = Card(flops=1e3, bandwidth=1e9, launch=0.0)  # on which products take all the time
WIRE = Card(flops=1e18, bandwidth=1.0, launch=0.0)  # and bytes a second each
MIB = 2**20


def traced(card, run):
    with FakeTensorMode():
        a = torch.empty(2, 3, device="cuda")
        b = torch.empty(3, 4, device="cuda")
        with Trace(card) as trace:
            run(a, b)
    return trace


def test_a_product_takes_its_flops():
    assert traced(CARD, lambda a, b: a @ b).seconds == pytest.approx(2 * 2 * 3 * 4 / 1e3)


@pytest.mark.parametrize(
    ("run", "numbers"),
    [
        (lambda a, b: a @ b, 6 + 12 + 8),
        (lambda a, b: a + 1, 6 + 6),
        (lambda a, b: a.add_(1), 6 + 6),
        (lambda a, b: a.exp_(), 6 + 6),
        (lambda a, b: a.new_empty(5), 5),
        (lambda a, b: a.t(), 0),
        (lambda a, b: torch.mm(a, b, out=torch.empty(2, 4, device="cuda")), 8 + 6 + 12 + 8),
    ],
    ids=["product", "sum", "in place", "exponential", "new", "view", "out"],
)
def test_a_kernel_reads_and_writes(run, numbers):
    assert traced(WIRE, run).seconds == 4 * numbers


def test_every_kernel_is_launched():
    card = Card(flops=1e30, bandwidth=1e30, launch=1.0)
    assert traced(card, lambda a, b: (a @ b).exp_().t()).seconds == pytest.approx(2)


def test_the_peak_is_of_what_is_alive_together():
    def run(a, b):
        large = a.new_empty(MIB)
        del large
        large = a.new_empty(MIB)
        also = large.view(2, -1)
        del large
        a.new_empty(MIB // 2)
        return also

    assert traced(CARD, run).peak == 6 * MIB


@needs_fake_cuda
def test_more_classes_take_longer():
    small, large = (predict(Shape(64, 32, classes))[0] for classes in (1000, 2000))
    assert small < large


@needs_fake_cuda
def test_the_loss_takes_at_least_its_products():
    shape = Shape(2048, 64, 4096)
    assert predict(shape)[0] > three_products(shape)


@needs_fake_cuda
def test_it_says_that_nothing_was_measured(monkeypatch):
    monkeypatch.setattr(roofline, "HEADS", [Shape(64, 32, 1000)])
    options = type("Options", (), {"quick": True})()
    remark, row = roofline.roofline(options)
    assert "not measured" in remark
    assert row.name == "ours, predicted"


def test_it_is_left_out_where_torch_would_abort(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (remark,) = roofline.roofline(type("Options", (), {"quick": True})())
    assert remark == "roofline: left out, as torch 2.6 needs a driver for it"
