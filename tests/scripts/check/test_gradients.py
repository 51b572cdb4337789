"""The command that checks gradients: its table, its exit status, and how it takes bad input."""

import json

import pytest
import torch
from torch.nn import functional as F

from scripts.check import gradients as check_gradients
from scripts.check.gradients import main, on_logits
from tests.helpers import one_line
from torch_softmax.verify import audit


def right(x, W, b, target, **options):
    return F.cross_entropy(F.linear(x, W, b), target, **options)


def wrong(x, W, b, target, **options):
    """A loss whose bias gets the gradient 0."""
    return right(x, W, b.detach() + 0 * b, target, **options)


@pytest.fixture
def implementations(monkeypatch):
    """Puts other losses in the place of ours, without what takes a compiler."""

    def replace(loss):
        losses = {"ours on logits": loss}
        monkeypatch.setattr(check_gradients, "OURS", losses)
        monkeypatch.setattr(check_gradients, "IMPLEMENTATIONS", {**losses, "torch chunked": None})
        monkeypatch.setattr(check_gradients, "compiled", check_gradients.as_the_oracle)
        monkeypatch.setattr(check_gradients, "reports_of_heads", lambda problem: iter(()))

    return replace


def table(output):
    """The lines of the table by their claims."""
    _, body, _ = output.split("\n\n")
    return {line[:28].strip(): line[28:].split() for line in body.splitlines()}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_right_loss_passes(implementations, capsys, dtype):
    implementations(right)
    assert main(["--dtype", dtype]) == 0
    assert "0 failures" in capsys.readouterr().out


def test_a_wrong_loss_fails_where_it_is_wrong(implementations, capsys):
    implementations(wrong)
    assert main([]) == 1
    rows = table(capsys.readouterr().out)
    assert rows["∂L/∂b = 1/B Σ (S − y)"] == ["SILENTLY", "WRONG", "-"]
    assert float(rows["∂L/∂W = 1/B Σ (S − y) xᵀ"][0]) < 1e-12


def test_a_loss_that_raises_is_said_to(implementations, capsys):
    def refuses(x, W, b, target, **options):
        if "weight" in options:
            raise NotImplementedError("no weights here")
        return right(x, W, b, target, **options)

    implementations(refuses)
    assert main([]) == 1
    output = capsys.readouterr().out
    assert table(output)["class weights"] == ["raises", "-"]
    assert "ours on logits: class weights: raises NotImplementedError: no weights here" in output


def test_a_column_that_this_torch_lacks_is_left_empty(implementations, capsys):
    implementations(right)
    main([])
    cells = table(capsys.readouterr().out).values()
    assert {row[-1] for row in list(cells)[1:]} == {"-"}


@pytest.mark.parametrize(
    ("fn", "status"), [(torch.exp, 0), (lambda x: x.detach().exp() + 0 * x, 1)]
)
def test_a_head_is_judged_by_its_worst_claim(implementations, monkeypatch, capsys, fn, status):
    implementations(right)
    report = audit(fn, [torch.ones(2, dtype=torch.float64, requires_grad=True)], torch.exp)
    monkeypatch.setattr(check_gradients, "OURS", {"ours on logits": right, "ours fused": right})
    monkeypatch.setattr(
        check_gradients, "reports_of_heads", lambda problem: iter([("a head", report)])
    )
    monkeypatch.setattr(
        check_gradients, "IMPLEMENTATIONS", {"ours on logits": right, "ours fused": right}
    )
    assert main([]) == status
    _, cell, *_ = table(capsys.readouterr().out)["a head"]
    assert cell == "SILENTLY" if status else float(cell) < 1e-12


def test_json_holds_the_table(implementations, capsys, tmp_path):
    implementations(wrong)
    main(["--json", str(tmp_path / "audit.json")])
    written = json.loads((tmp_path / "audit.json").read_text())
    shown = table(capsys.readouterr().out)
    del shown[""]
    assert list(written["claims"]) == list(shown)
    assert written["dtype"] == "float64"
    bias = written["claims"]["∂L/∂b = 1/B Σ (S − y)"]["ours on logits"]
    assert bias == {"outcome": "SILENTLY WRONG", "error": 1.0, "detail": ""}


def test_an_error_that_is_no_number_is_null_in_json(implementations, tmp_path):
    implementations(lambda *args, **options: right(*args, **options) * torch.nan)
    main(["--json", str(tmp_path / "audit.json")])
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["claims"]["L = −Σ y log S"]["ours on logits"]["error"] is None


def test_another_seed_is_another_problem():
    problems = [check_gradients.Problem.random(s, "cpu", torch.float64) for s in (0, 1)]
    assert not torch.equal(problems[0].x, problems[1].x)


@pytest.mark.parametrize(
    "options",
    [
        ["--dtype", "int8"],
        ["--device", "abacus"],
        ["--seed", "-1"],
        ["--seed", "many"],
        ["--json", "no/such/directory/audit.json"],
    ],
)
def test_a_bad_argument_is_one_line(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(options)
    (line,) = capsys.readouterr().err.splitlines()
    assert options[0] in line


def test_an_unwritable_file_is_one_line(implementations, capsys, tmp_path):
    implementations(right)
    assert main(["--json", str(tmp_path)]) == 1
    assert one_line(capsys).startswith(f"check.gradients: {tmp_path} can't be written")


def test_the_layer_of_logits_has_its_bias():
    x, W, b, target = (
        torch.ones(1, 1),
        torch.zeros(2, 1),
        torch.tensor([0.0, 1.0]),
        torch.tensor([1]),
    )
    assert on_logits(F.cross_entropy)(x, W, b, target) < F.cross_entropy(x @ W.t(), target)
