"""The influence of training images: what leaving them out does, and the picture of it."""

import re

import pytest
import torch

from scripts.examples import influence as script
from tests.helpers import one_line
from torch_softmax import SoftmaxRegression
from torch_softmax.mnist.data import load_dataset

WEIGHT_DECAY = 1e-2


@pytest.fixture(scope="module")
def trained():
    """A model at its optimum, the images it was trained on, and one that it mistakes."""
    data = load_dataset("digits", data_dir="")
    train = script.examples_of(data.train, torch.float64, 200)
    test = script.examples_of(data.test, torch.float64)
    torch.manual_seed(0)
    model = SoftmaxRegression(64, 10, dtype=torch.float64)
    script.fit(model, train, WEIGHT_DECAY)
    i = int(script.most_confident_mistakes(model, test)[0])
    return model, train, script.Examples(test.x[i : i + 1], test.y[i : i + 1])


def test_mistakes_are_the_wrong_predictions_from_the_most_confident_on():
    model = SoftmaxRegression(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model.bias.zero_()
    test = script.Examples(torch.tensor([[1.0], [2.0], [3.0], [-1.0]]), torch.tensor([0, 1, 0, 0]))
    assert script.most_confident_mistakes(model, test).tolist() == [2, 0]


def test_influence_is_what_leaving_an_image_out_does(trained):
    model, train, one = trained
    influence = script.influences(model, train, one, WEIGHT_DECAY)
    chosen = influence.abs().argsort(descending=True)[:10]
    changes = torch.tensor(
        [script.change_without(int(i), model, train, one, WEIGHT_DECAY) for i in chosen]
    )
    assert script.rank_correlation(influence[chosen], changes) > 0.9
    torch.testing.assert_close(influence[chosen], changes, rtol=0.3, atol=1e-3, check_dtype=False)


def test_images_of_the_true_class_help_most(trained):
    model, train, one = trained
    influence = script.influences(model, train, one, WEIGHT_DECAY)
    assert train.y[influence.argmax()] == one.y


def test_rank_correlation_is_that_of_the_order():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert script.rank_correlation(a, a.exp()) == pytest.approx(1)
    assert script.rank_correlation(a, -a) == pytest.approx(-1)
    assert script.rank_correlation(a, torch.tensor([2.0, 1.0, 3.0, 4.0])) == pytest.approx(0.8)


# The command


def test_the_command_draws_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output = tmp_path / "influence.png"
    assert script.main(["--dataset=digits", "--examples=200", f"--output={output}"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"test image \d+ of 355, of class \d, is taken for a \d \(\d+%\)", said)
    assert output.read_bytes().startswith(b"\x89PNG")


def test_the_command_checks_what_it_says(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(script, "SHOWN", 3)
    output = tmp_path / "influence.svg"
    options = ["--dataset=digits", "--examples=200", "--weight-decay=0.01", "--check"]
    assert script.main([*options, f"--output={output}"]) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"^ +\d+ +\d +[+-]0\.\d{5} +[+-]0\.\d{5}$", said, re.MULTILINE)) == 3
    assert float(re.search(r"rank correlation .*: (.*)", said)[1]) > 0.4


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--weight-decay=0", "weight-decay must be a finite number above 0"),
        ("--examples=0", "examples must be at least 1, got 0"),
        ("--mistake=0", "mistake must be from 1 to "),
    ],
)
def test_a_bad_option_is_one_line(capsys, option, message):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="2"):
        script.main(["--dataset=digits", "--examples=200", option])
    assert one_line(capsys).startswith(f"influence: {message}")
