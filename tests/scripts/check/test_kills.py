"""The command that kills trainings: a short turn, and that it notices a loss."""

import pytest
import torch

from scripts.check import kills as check_kills
from scripts.check.kills import Training, main
from torch_softmax.mnist.checkpoints import CheckpointError, load_checkpoint


def test_a_few_kills_lose_nothing(capsys):
    assert main(["--kills=3"]) == 0
    assert capsys.readouterr().out.startswith("3 kills of ")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    training = Training(tmp_path_factory.mktemp("trainings") / "whole")
    assert training.run()
    return training


def test_a_lost_epoch_is_noticed(training, monkeypatch):
    training.check_epochs()
    monkeypatch.setattr(training, "log", training.log.with_name("longer.log"))
    training.log.write_text("epoch 5/9  loss\nepoch 6/9  loss\n")
    with pytest.raises(CheckpointError, match="has 5 epochs, where 6 were reported"):
        training.check_epochs()


def test_another_weight_is_noticed(training):
    weights = load_checkpoint(training.directory).model
    training.check_weights(weights)
    nudged = torch.nextafter(weights["bias"], torch.tensor(torch.inf))
    with pytest.raises(CheckpointError, match="not those of a training that was never stopped"):
        training.check_weights({**weights, "bias": nudged})


def test_a_checkpoint_that_does_not_load_is_one_line(monkeypatch, capsys):
    def refuse(path):
        raise CheckpointError("damaged")

    monkeypatch.setattr(check_kills, "load_checkpoint", refuse)
    assert main(["--kills=1"]) == 1
    assert capsys.readouterr().err == "check.kills: damaged\n"


@pytest.mark.parametrize("option", ["--kills=0", "--kills=some", "--seed=x"])
def test_a_bad_option_is_one_line(capsys, option):
    with pytest.raises(SystemExit, match="2"):
        main([option])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("check.kills: ")
