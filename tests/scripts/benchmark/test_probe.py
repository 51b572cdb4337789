"""The probe section on tiny problems: who contends reaches the same objective; no times."""

import time

import pytest
import torch

from scripts.benchmark import probe
from scripts.benchmark.measure import Options, Place, Row, Shape, UnavailableError

PLACE = Place("cpu", torch.float32, 1)
TINY = Shape(120, 4, 3)


@pytest.fixture
def problem():
    return probe.drawn(TINY)


@pytest.mark.parametrize("name", probe.FITS)
def test_contestants_reach_the_same_optimum(problem, name):
    if name.startswith("scikit"):
        pytest.importorskip("sklearn")
    fit = probe.run(probe.FITS[name], problem, [0.01, 1.0], threads=1)
    expected = probe.run(*probe.EXACT.values(), problem, [0.01, 1.0], 1)
    assert fit.objectives == pytest.approx(expected.objectives, rel=1e-6)
    assert fit.seconds > 0


def test_models_come_in_the_order_of_C(problem):
    norms = [float(W.norm()) for W, _ in probe.FITS[probe.OURS](problem, [1e-3, 1.0, 10.0])]
    assert norms == sorted(norms)


def test_a_row_and_a_line_for_each_and_who_fails_is_left_out(problem, monkeypatch):
    monkeypatch.setattr(probe, "limited", lambda function: function())

    def failing(problem, Cs):
        raise UnavailableError("not here")
        yield

    contestants = {probe.OURS: probe.FITS[probe.OURS], "other": failing}
    left_out, row, told = probe.compare("C=1", problem, [1.0], contestants, PLACE)
    assert left_out == f"probe, C=1 at {TINY} without other: not here"
    assert isinstance(row, Row)
    assert (row.name, row.ratio) == (f"C=1, {probe.OURS}", 1.0)
    assert "within 0.0e+00 of the lowest" in told


def test_a_hessian_that_is_too_large_is_not_made(problem, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(probe, "HESSIAN_LIMIT", 1000)
    with pytest.raises(UnavailableError, match="its Hessian would take 0 MiB"):
        probe.run(probe.FITS["scikit-learn, newton-cholesky"], problem, [1.0], 1)


def sleep():
    time.sleep(60)


def fail():
    raise ValueError("too hard")


@pytest.mark.parametrize(
    ("function", "message"), [(sleep, "not done in"), (fail, "fails with ValueError: too hard")]
)
def test_who_takes_too_long_or_fails_is_told_of(monkeypatch, function, message):
    monkeypatch.setattr(probe, "LIMIT", 0.5 if function is sleep else 60)
    with pytest.raises(UnavailableError, match=message):
        probe.limited(function)


def test_growth_and_the_estimate_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "FACTORS", (1, 2))
    options = Options(PLACE, 0.0, True, tmp_path)
    events = list(probe.growth(options, PLACE))
    assert sum(isinstance(event, Row) for event in events) == 6
    lines = list(probe.estimate())
    assert lines[0].startswith("estimate, not measured: 1,281,167 rows")
    assert len(lines) == 3
