"""The command: what it writes, that it repeats itself, and how it takes bad input."""

import json
import subprocess
import sys

import pytest
import torch

import train_mnist
from torch_softmax import SoftmaxRegression
from torch_softmax.data import batch_loader, load_dataset
from torch_softmax.training import DEFAULTS, Settings, evaluate


def train(output_dir, *options, dataset="digits", epochs=2):
    """Run the command in this process, and return its exit status."""
    return train_mnist.main(
        [
            f"--dataset={dataset}",
            f"--epochs={epochs}",
            f"--output-dir={output_dir}",
            *options,
        ]
    )


def results(output_dir):
    """The metrics without the times, and the checkpoint."""
    metrics = json.loads((output_dir / "metrics.json").read_text())
    del metrics["train_seconds"]
    for epoch in metrics["epochs"]:
        del epoch["seconds"]
    return metrics, (output_dir / "model.pt").read_bytes()


def one_line(capsys):
    """The only line on stderr, which must not tell of a traceback."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The result of a run with the digits' defaults."""
    output_dir = tmp_path_factory.mktemp("run")
    assert train_mnist.main(["--dataset=digits", f"--output-dir={output_dir}"]) == 0
    return output_dir


@pytest.fixture(scope="module")
def metrics(run_dir):
    return json.loads((run_dir / "metrics.json").read_text())


# What it writes


def test_the_defaults_learn_the_digits(metrics):
    assert metrics["dataset"] == "digits"
    assert metrics["test_accuracy"] > 0.93


def test_the_checkpoint_has_the_accuracy_that_the_metrics_tell(run_dir, metrics):
    model = SoftmaxRegression(64, 10)
    model.load_state_dict(torch.load(run_dir / "model.pt", weights_only=True)["model"])
    score = evaluate(model, batch_loader(load_dataset("digits", "nowhere").test, 100))
    assert score.accuracy == metrics["test_accuracy"]
    assert score.loss == pytest.approx(metrics["test_loss"], rel=1e-5)


def test_the_metrics_tell_of_every_epoch(metrics):
    assert len(metrics["epochs"]) == DEFAULTS["digits"].epochs
    assert all(epoch.keys() == {"loss", "accuracy", "seconds"} for epoch in metrics["epochs"])
    assert metrics["epochs"][-1]["loss"] < metrics["epochs"][0]["loss"]


def test_the_training_seconds_are_those_of_the_epochs(metrics):
    seconds = [epoch["seconds"] for epoch in metrics["epochs"]]
    assert metrics["train_seconds"] == pytest.approx(sum(seconds))


def test_the_metrics_tell_the_settings_and_versions(metrics):
    names = Settings.__dataclass_fields__.keys()
    assert Settings(**{name: metrics["settings"][name] for name in names}) == DEFAULTS["digits"]
    assert metrics["versions"]["torch"] == torch.__version__


def test_an_option_wins_over_the_default(tmp_path):
    train(tmp_path, "--lr=0.25", "--batch-size=100", "--schedule=constant")
    settings = results(tmp_path)[0]["settings"]
    assert (settings["lr"], settings["batch_size"]) == (0.25, 100)
    assert settings["schedule"] == "constant"
    assert settings["weight_decay"] == DEFAULTS["digits"].weight_decay


def test_a_line_an_epoch_and_a_summary(tmp_path, capsys):
    train(tmp_path, epochs=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    accuracy = results(tmp_path)[0]["test_accuracy"]
    assert lines[-2].startswith(f"test accuracy {accuracy:.2%}, test loss ")


def test_no_bar_without_a_terminal(tmp_path):
    command = [sys.executable, train_mnist.__file__, "--dataset=digits", "--epochs=1"]
    done = subprocess.run(
        [*command, f"--output-dir={tmp_path}"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "\r" not in done.stdout


def test_a_run_directory_of_its_own_for_each_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train_mnist.main(["--dataset=digits", "--epochs=1"]) == 0
    runs = list((tmp_path / "runs").glob("digits-20*"))
    assert len(runs) == 2
    assert all((run / "model.pt").exists() and (run / "metrics.json").exists() for run in runs)


def test_the_same_seed_gives_the_same_bits(tmp_path):
    for name in ("first", "second"):
        train(tmp_path / name, "--seed=3")
    assert results(tmp_path / "first") == results(tmp_path / "second")


def test_another_seed_gives_another_run(tmp_path):
    for seed in ("0", "1"):
        train(tmp_path / seed, f"--seed={seed}")
    assert results(tmp_path / "0")[0]["epochs"] != results(tmp_path / "1")[0]["epochs"]


def test_auto_without_mnist_trains_on_the_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:1/"])
    assert train(tmp_path, f"--data-dir={tmp_path}", dataset="auto") == 0
    assert "training on the embedded 8x8 digits" in one_line(capsys)
    assert results(tmp_path)[0]["dataset"] == "digits"


# Bad input


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--lr=-0.1", "lr must be a finite number above 0, got -0.1"),
        ("--lr=nan", "lr must be a finite number above 0, got nan"),
        ("--lr=fast", "argument --lr: invalid float value: 'fast'"),
        ("--batch-size=0", "batch_size must be at least 1, got 0"),
        ("--epochs=0", "epochs must be at least 1, got 0"),
        ("--epochs=1.5", "argument --epochs: invalid int value: '1.5'"),
        ("--weight-decay=-1", "weight_decay must be a finite number of at least 0, got -1.0"),
        ("--seed=-1", "seed must be from 0 to 2**63 - 1, got -1"),
        ("--schedule=linear", "argument --schedule: invalid choice: 'linear'"),
        ("--dataset=cifar", "argument --dataset: invalid choice: 'cifar'"),
        ("--device=mps", "device must be one that torch finds here (cpu), got 'mps'"),
        ("--device=cuda", "device must be one that torch finds here (cpu), got 'cuda'"),
        ("--momentum=1", "unrecognized arguments: --momentum=1"),
    ],
)
def test_a_bad_option_is_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, option, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        train_mnist.main([f"--output-dir={tmp_path / 'run'}", option])
    assert one_line(capsys).startswith(f"train_mnist.py: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_output_directory_that_cannot_be(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(train_mnist, "load_dataset", pytest.fail)
    assert train(tmp_path / name) == 1
    assert one_line(capsys).startswith(
        f"train_mnist.py: output-dir {tmp_path / name} can't be written: "
    )


def test_a_broken_data_file(tmp_path, capsys):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"half a file")
    assert train(tmp_path / "run", f"--data-dir={tmp_path}", dataset="auto") == 1
    assert f"{folder / 'train-images-idx3-ubyte.gz'} does not have" in one_line(capsys)


def test_a_run_that_diverges_keeps_what_was_there(tmp_path, capsys):
    train(tmp_path)
    before = results(tmp_path)
    capsys.readouterr()
    assert train(tmp_path, "--lr=1e38") == 1
    assert "lower lr, which was 1e+38" in one_line(capsys)
    assert results(tmp_path) == before


def test_a_run_that_diverges_later_names_the_epoch_that_it_keeps(tmp_path, monkeypatch, capsys):
    train_epoch = train_mnist.train_epoch

    def diverge_in_the_third(model, batches, settings, epoch, report):
        if epoch == 2:
            raise train_mnist.DivergenceError("the loss is no longer a finite number")
        return train_epoch(model, batches, settings, epoch, report)

    monkeypatch.setattr(train_mnist, "train_epoch", diverge_in_the_third)
    assert train(tmp_path, epochs=5) == 1
    assert one_line(capsys).endswith(f"{tmp_path / 'model.pt'} keeps epoch 2")
    assert torch.load(tmp_path / "model.pt", weights_only=True)["epoch"] == 2


def test_an_interrupted_run_leaves_its_checkpoint_and_no_metrics_of_another(
    tmp_path, monkeypatch, capsys
):
    train(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_mnist, "evaluate", interrupt)
    assert train(tmp_path, "--seed=1", epochs=1) == 130
    assert "interrupted" in one_line(capsys)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["settings"]["seed"] == 1
    assert not (tmp_path / "metrics.json").exists()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    assert train(tmp_path) == 1
    assert one_line(capsys) == "train_mnist.py: [Errno 28] No space left on device"
