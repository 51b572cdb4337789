"""The command that evaluates: its numbers, its two forms, and its one-line errors."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_mnist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import evaluate

from torch_softmax.checkpoints import load_checkpoint, save_checkpoint
from torch_softmax.data import load_dataset
from torch_softmax.training import Score
from torch_softmax.training import evaluate as score


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run directory of a classifier of the digits."""
    directory = tmp_path_factory.mktemp("run")
    options = ["--dataset=digits", "--epochs=3", f"--output-dir={directory}"]
    assert train_mnist.main(options) == 0
    return directory


@pytest.fixture
def evaluation(run, capsys):
    """What the command says as JSON."""
    assert evaluate.main([f"--checkpoint={run}", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_accuracy_and_loss_are_those_of_the_trainer(run, evaluation):
    images, labels = load_dataset("digits", "nowhere").test[torch.arange(355)]
    expected = score(load_checkpoint(run).build_model(), [(images, labels)])
    got = Score(evaluation["loss"]["value"], evaluation["accuracy"]["value"])
    assert got == pytest.approx(expected, rel=1e-6)
    assert got == pytest.approx(metrics_of(run), rel=1e-6)


def metrics_of(run):
    metrics = json.loads((run / "metrics.json").read_text())
    return Score(metrics["test_loss"], metrics["test_accuracy"])


@pytest.mark.parametrize("name", ["accuracy", "loss", "expected_calibration_error"])
def test_an_interval_holds_its_value(evaluation, name):
    estimate = evaluation[name]
    assert 0 <= estimate["low"] < estimate["value"] < estimate["high"]


def test_there_is_a_row_of_rates_for_each_class(evaluation):
    assert [row["class"] for row in evaluation["classes"]] == list(range(10))
    assert sum(row["images"] for row in evaluation["classes"]) == 355
    for row in evaluation["classes"]:
        precision, recall = row["precision"]["value"], row["recall"]["value"]
        f1 = 2 * precision * recall / (precision + recall)
        assert row["F1"]["value"] == pytest.approx(f1)


def test_the_table_fits_a_terminal_and_has_the_same_accuracy(run, evaluation, capsys):
    assert evaluate.main([f"--checkpoint={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    (accuracy,) = (line for line in lines if line.startswith("accuracy"))
    assert f"{100 * evaluation['accuracy']['value']:.2f} [" in accuracy


@pytest.fixture
def one_class_run(run, tmp_path):
    """A run directory of a classifier that says 3 of everything."""
    checkpoint = load_checkpoint(run)
    bias = torch.zeros(10)
    bias[3] = 1.0
    model = {"weight": torch.zeros(10, 64), "bias": bias}
    save_checkpoint(tmp_path / "model.pt", replace(checkpoint, model=model))
    return tmp_path


def test_what_has_no_meaning_is_null(one_class_run, capsys):
    assert evaluate.main([f"--checkpoint={one_class_run}", "--json"]) == 0
    classes = json.loads(capsys.readouterr().out)["classes"]
    assert classes[2]["precision"] == {"value": None, "low": None, "high": None}
    assert classes[2]["recall"]["value"] == 0
    assert classes[3]["recall"]["value"] == 1


def test_what_has_no_meaning_is_undefined(one_class_run, capsys):
    assert evaluate.main([f"--checkpoint={one_class_run}"]) == 0
    assert "undefined" in capsys.readouterr().out


def test_other_images_than_those_it_is_for_are_refused(run, monkeypatch, capsys):
    digits = load_dataset("digits", "nowhere")
    wide = replace_images(digits, digits.test.images.repeat(1, 4))
    monkeypatch.setattr(evaluate, "load_dataset", lambda *_: wide)
    assert evaluate.main([f"--checkpoint={run}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "evaluate.py: the checkpoint is of a model for 64 pixels, but wide has 256"


def replace_images(data, images):
    wide = type(data.test)(images, data.test.labels, data.test.max_pixel)
    return data._replace(name="wide", train=wide, test=wide)


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path, capsys):
    assert evaluate.main([f"--checkpoint={tmp_path / 'model.pt'}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluate.py: ")
    assert "model.pt" in line
