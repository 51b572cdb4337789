"""The command that evaluates a classifier: its numbers, its table, its JSON, and bad input."""

import json
import runpy
from dataclasses import replace

import pytest
import torch

from tests.helpers import ROOT, one_line
from tests.mnist.files import write_mnist
from torch_softmax.__main__ import main
from torch_softmax.mnist.checkpoints import Checkpoint, save_checkpoint
from torch_softmax.mnist.data import BatchLoader, load_dataset
from torch_softmax.mnist.settings import DEFAULTS
from torch_softmax.mnist.training import evaluate as score
from torch_softmax.mnist.training import train_epoch


@pytest.fixture(scope="module")
def trained(digits):
    """A run of one epoch, so that every class has some mistakes."""
    checkpoint = Checkpoint.start(DEFAULTS["digits"], digits)
    model = checkpoint.build_model()
    train_epoch(model, BatchLoader(digits.train, 100), checkpoint.settings, 0)
    return replace(checkpoint, model=model.state_dict())


@pytest.fixture(scope="module")
def run_dir(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "model.pt", trained)
    return folder


@pytest.fixture
def never_8(trained, tmp_path):
    """A run whose classifier never predicts the class 8."""
    bias = trained.model["bias"].clone()
    bias[8] = -100
    save_checkpoint(tmp_path / "model.pt", replace(trained, model={**trained.model, "bias": bias}))
    return tmp_path


def run(run_dir, *arguments):
    return main(["evaluate", str(run_dir), *arguments])


def run_json(capsys, run_dir, *arguments):
    """The result of --json, by a parser that takes no nan."""
    assert run(run_dir, "--json", *arguments) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_accuracy_and_loss_are_the_training_loops(run_dir, trained, digits, capsys):
    result = run_json(capsys, run_dir)
    expected = score(trained.build_model(), BatchLoader(digits.test, 1000))
    assert (result["dataset"], result["images"]) == ("digits", 355)
    assert result["accuracy"]["value"] == pytest.approx(expected.accuracy, rel=1e-12)
    assert result["loss"]["value"] == pytest.approx(expected.loss, rel=1e-5)
    assert run_json(capsys, run_dir) == result


def test_each_class_has_its_images_and_rates(run_dir, trained, digits, capsys):
    classes = run_json(capsys, run_dir)["classes"]
    images, labels = digits.test[torch.arange(len(digits.test))]
    predicted = trained.build_model().predict(images)
    assert [row["class"] for row in classes] == list(range(10))
    for k, row in enumerate(classes):
        right = int(((predicted == k) & (labels == k)).sum())
        assert row["images"] == int((labels == k).sum())
        assert row["recall"]["value"] == pytest.approx(right / int((labels == k).sum()))
        assert row["precision"]["value"] == pytest.approx(right / int((predicted == k).sum()))


def test_every_number_lies_in_its_interval(run_dir, capsys):
    result = run_json(capsys, run_dir)
    estimates = [result["accuracy"], result["loss"]]
    rows = result["classes"]
    estimates += [row[name] for row in rows for name in ("precision", "recall", "F1")]
    assert all(e["low"] <= e["value"] <= e["high"] and e["low"] < e["high"] for e in estimates)
    assert 0 < result["expected_calibration_error"] < 1
    assert result["interval"]["level"] == 0.95
    assert result["interval"]["methods"].keys() <= result.keys() | rows[0].keys()


def test_what_is_undefined_is_null(never_8, capsys):
    row = run_json(capsys, never_8)["classes"][8]
    assert row["precision"] == {"value": None, "low": None, "high": None}
    assert row["recall"]["value"] == row["F1"]["value"] == 0


def test_the_table_has_the_numbers_of_the_json(run_dir, capsys):
    result = run_json(capsys, run_dir)
    run(run_dir)
    lines = capsys.readouterr().out.splitlines()
    (first,) = (line for line in lines if line.startswith("accuracy"))
    value, low, high = (100 * result["accuracy"][end] for end in ("value", "low", "high"))
    assert first.split(maxsplit=2)[2].replace(" ", "") == f"{value:.2f}[{low:.2f},{high:.2f}]"
    (row,) = (line for line in lines if line.startswith("3 "))
    assert row.split()[:3] == ["3", "36", f"{100 * result['classes'][3]['precision']['value']:.1f}"]


def test_columns_stay_in_line_where_a_number_is_undefined(never_8, monkeypatch, capsys):
    monkeypatch.chdir(never_8)
    run("model.pt")
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("8 "))
    (other,) = (line for line in lines if line.startswith("7 "))
    assert row.index("undefined") + len("undefined") == other.index("]") + 1
    assert len(row) == len(other)
    assert max(map(len, lines)) <= 80


def test_as_a_script(run_dir, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(run_dir)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"{run_dir} on the 355 test images of digits\n")


def test_the_data_are_where_the_run_had_them(tmp_path, monkeypatch, capsys):
    write_mnist(tmp_path / "lent" / "MNIST" / "raw", test_size=7)
    data = load_dataset("mnist", tmp_path / "lent")
    save_checkpoint(tmp_path / "model.pt", Checkpoint.start(DEFAULTS["mnist"], data))
    monkeypatch.chdir(tmp_path)
    assert run_json(capsys, tmp_path)["images"] == 7


# Bad input


def test_a_data_set_of_another_size(run_dir, tmp_path, capsys):
    write_mnist(tmp_path / "files")
    assert run(run_dir, "--dataset=idx", f"--data-dir={tmp_path / 'files'}") == 1
    assert one_line(capsys) == (
        "torch-softmax evaluate: the checkpoint is of a model for 64 pixels, but idx has 784"
    )


def test_no_data(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchvision.datasets.KMNIST.mirrors", ["http://127.0.0.1:1/"])
    assert run(run_dir, "--dataset=kmnist", f"--data-dir={tmp_path}") == 1
    assert one_line(capsys).startswith("torch-softmax evaluate: KMNIST is not in ")


def test_no_checkpoint(tmp_path, capsys):
    assert run(tmp_path / "nowhere.pt") == 1
    message = f"torch-softmax evaluate: {tmp_path / 'nowhere.pt'} can't be read"
    assert one_line(capsys).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN_DIR"),
        (["x", "--dataset=cifar"], "argument --dataset: invalid choice: 'cifar'"),
    ],
)
def test_a_bad_argument(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", *arguments])
    assert one_line(capsys).startswith(f"torch-softmax evaluate: {message}")
