"""The command: what it writes, how it stops and goes on, and how it takes bad input."""

import errno
import json
import shlex
import signal
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT, one_line
from tests.mnist.files import write_mnist
from torch_softmax import SoftmaxRegression
from torch_softmax.__main__ import main
from torch_softmax.mnist import checkpoints, data, runs, training
from torch_softmax.mnist.checkpoints import load_checkpoint
from torch_softmax.mnist.settings import DEFAULTS, Settings

SCRIPT = ROOT / "train_mnist.py"


def train(output_dir, *options, dataset="digits", epochs=2):
    """Run the command in this process, and return its exit status."""
    return main(
        [
            "train",
            f"--dataset={dataset}",
            f"--epochs={epochs}",
            f"--output-dir={output_dir}",
            *options,
        ]
    )


def resume(output_dir, *options):
    """Go on with a run, and return the exit status."""
    return main(["resume", str(output_dir), *options])


def results(output_dir):
    """The metrics without the times, and the weights, bit for bit."""
    metrics = json.loads((output_dir / "metrics.json").read_text())
    del metrics["train_seconds"]
    for epoch in metrics["epochs"]:
        del epoch["seconds"]
    weights = load_checkpoint(output_dir).model
    return metrics, {name: weight.tolist() for name, weight in weights.items()}


def contents(output_dir):
    """The bytes of each file."""
    return {path.name: path.read_bytes() for path in output_dir.iterdir()}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The result of a run with the digits' defaults."""
    output_dir = tmp_path_factory.mktemp("run")
    assert main(["train", "--dataset=digits", f"--output-dir={output_dir}"]) == 0
    return output_dir


@pytest.fixture(scope="module")
def metrics(run_dir):
    return json.loads((run_dir / "metrics.json").read_text())


# What it writes


def test_the_metrics_tell_of_the_run(run_dir, metrics):
    assert metrics["dataset"] == "digits"
    assert metrics["test_accuracy"] > 0.93
    epochs = metrics["epochs"]
    assert len(epochs) == DEFAULTS["digits"].epochs
    assert all(epoch.keys() == {"loss", "accuracy", "seconds"} for epoch in epochs)
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert metrics["train_seconds"] == pytest.approx(sum(epoch["seconds"] for epoch in epochs))
    names = Settings.__dataclass_fields__.keys()
    assert Settings(**{name: metrics["settings"][name] for name in names}) == DEFAULTS["digits"]
    assert metrics["versions"]["torch"] == torch.__version__


def test_the_checkpoint_has_the_accuracy_that_the_metrics_tell(run_dir, metrics, digits):
    model = SoftmaxRegression(64, 10)
    model.load_state_dict(torch.load(run_dir / "model.pt", weights_only=True)["model"])
    input, target = digits.test[torch.arange(len(digits.test))]
    accuracy = (model.predict(input) == target).double().mean().item()
    assert accuracy == pytest.approx(metrics["test_accuracy"], rel=1e-12)
    assert model.loss(input, target).item() == pytest.approx(metrics["test_loss"], rel=1e-5)


def test_an_option_wins_over_the_default(tmp_path):
    train(tmp_path, "--lr=0.25", "--batch-size=100", "--schedule=constant", epochs=1)
    settings = results(tmp_path)[0]["settings"]
    assert (settings["lr"], settings["batch_size"]) == (0.25, 100)
    assert settings["schedule"] == "constant"
    assert settings["weight_decay"] == DEFAULTS["digits"].weight_decay


def test_a_line_an_epoch_and_a_summary(tmp_path, capsys):
    train(tmp_path, epochs=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    metrics = results(tmp_path)[0]
    assert f"  train accuracy {metrics['epochs'][-1]['accuracy']:.2%}  " in lines[-3]
    accuracy = metrics["test_accuracy"]
    assert lines[-2].startswith(f"test accuracy {accuracy:.2%}, test loss ")


def test_as_a_command_of_its_own_without_a_bar(tmp_path):
    command = [sys.executable, SCRIPT, "--dataset=digits", "--epochs=1"]
    done = subprocess.run(
        [*command, f"--output-dir={tmp_path}"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "\r" not in done.stdout


def test_a_run_directory_of_its_own_for_each_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", "--dataset=digits", "--epochs=1"]) == 0
    runs = list((tmp_path / "runs").glob("digits-20*"))
    assert len(runs) == 2
    assert all((run / "model.pt").exists() and (run / "metrics.json").exists() for run in runs)


def test_the_seed_decides_every_bit(tmp_path):
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        train(tmp_path / name, f"--seed={seed}", epochs=1)
    assert results(tmp_path / "first") == results(tmp_path / "second")
    assert results(tmp_path / "first")[0]["epochs"] != results(tmp_path / "other")[0]["epochs"]


def test_auto_without_mnist_trains_on_the_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:1/"])
    assert train(tmp_path, f"--data-dir={tmp_path}", dataset="auto", epochs=1) == 0
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
        main(["train", f"--output-dir={tmp_path / 'run'}", option])
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_output_directory_that_cannot_be(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(data, "load_dataset", pytest.fail)
    assert train(tmp_path / name) == 1
    assert one_line(capsys).startswith(f"torch-softmax train: {tmp_path / name} can't be written: ")


def test_a_broken_data_file(tmp_path, capsys):
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder)
    (folder / "train-images-idx3-ubyte").write_bytes(b"half a file")
    assert train(tmp_path / "run", f"--data-dir={tmp_path}", dataset="auto") == 1
    assert f"{folder / 'train-images-idx3-ubyte'} ends within its header" in one_line(capsys)


def test_a_directory_that_holds_a_run_is_left_alone(finished, capsys):
    before = contents(finished)
    assert train(finished, "--seed=1") == 1
    assert one_line(capsys).endswith(f"or go on with it: python -m torch_softmax resume {finished}")
    assert contents(finished) == before


def test_a_run_that_diverges_in_its_first_epoch(tmp_path, capsys):
    assert train(tmp_path, "--lr=1e38") == 1
    assert one_line(capsys).endswith("lower lr, which was 1e+38")


def test_a_run_that_diverges_later_names_the_epoch_that_it_keeps(tmp_path, monkeypatch, capsys):
    train_epoch = runs.train_epoch

    def diverge_in_the_third(model, batches, settings, epoch, *rest):
        if epoch == 2:
            raise training.DivergenceError("the loss is no longer a finite number")
        return train_epoch(model, batches, settings, epoch, *rest)

    monkeypatch.setattr(runs, "train_epoch", diverge_in_the_third)
    assert train(tmp_path, epochs=5) == 1
    assert one_line(capsys).endswith(f"{tmp_path / 'model.pt'} keeps epoch 2")
    assert load_checkpoint(tmp_path).epoch == 2


def test_an_interruption_before_the_training_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load_dataset", interrupt)
    assert train(tmp_path) == 130
    assert one_line(capsys) == "torch-softmax train: interrupted"


# Stopped, and gone on with


BATCHES = 46  # in an epoch of the digits


def interrupt(*_, **__):
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interrupt_in(monkeypatch):
    """Press Ctrl-C within some batches, which are counted from 1."""
    update, count = training.batch_update, 0

    def prepare(*batches):
        def interrupted_update(*args):
            nonlocal count
            count += 1
            for _ in range(batches.count(count)):
                interrupt()
            return update(*args)

        monkeypatch.setattr(training, "batch_update", interrupted_update)

    return prepare


@pytest.fixture
def fail_in_save(monkeypatch):
    """Let the disk be full when a checkpoint is saved, counted from 0 for that before training."""

    def prepare(number):
        saves = []

        def write(path, checkpoint):
            saves.append(path)
            if len(saves) > number:
                monkeypatch.setattr("os.fsync", full_disk)
            save(path, checkpoint)

        def full_disk(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        save = runs.save_checkpoint
        for module in (checkpoints, runs):  # before the training, and in it
            monkeypatch.setattr(module, "save_checkpoint", write)

    yield prepare
    monkeypatch.undo()


@pytest.fixture(scope="module")
def never_stopped(finished):
    """The results of a run of two epochs."""
    return results(finished)


@pytest.mark.parametrize("batch", [1, BATCHES, BATCHES + 20, 2 * BATCHES])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, interrupt_in, never_stopped, batch):
    interrupt_in(batch)
    assert train(tmp_path) == 130
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.epoch * BATCHES + checkpoint.tally.batches == batch
    assert resume(tmp_path) == 0
    assert results(tmp_path) == never_stopped


def test_a_run_may_be_interrupted_more_than_once(tmp_path, interrupt_in, never_stopped):
    interrupt_in(10, 20, BATCHES + 3)
    assert [train(tmp_path), *(resume(tmp_path) for _ in range(3))] == [130, 130, 130, 0]
    assert results(tmp_path) == never_stopped


@pytest.fixture
def lent(tmp_path, monkeypatch):
    """A run that was interrupted, on data in a place of their own; nothing can be downloaded."""
    write_mnist(tmp_path / "lent" / "MNIST" / "raw")
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:1/"])
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", interrupt)
        assert train(tmp_path / "run", "--data-dir=lent", dataset="mnist") == 130
    return tmp_path / "run"


def test_a_run_goes_on_with_the_data_that_it_had(lent):
    assert resume(lent) == 0


def test_a_run_goes_on_with_data_that_have_moved_and_knows_it_from_then_on(lent, tmp_path):
    (tmp_path / "lent").rename(tmp_path / "moved")
    assert resume(lent, "--data-dir=moved") == 0
    assert resume(lent) == 0


def test_a_run_whose_data_are_gone_says_so(lent, tmp_path, capsys):
    (tmp_path / "lent").rename(tmp_path / "moved")
    capsys.readouterr()
    assert resume(lent) == 1
    told = f"; the run had its data in {tmp_path / 'lent'}, where they are no longer"
    assert one_line(capsys).endswith(told)


def test_an_interruption_tells_how_to_go_on(tmp_path, interrupt_in, never_stopped, capsys):
    output_dir = tmp_path / "two words"
    interrupt_in(20)
    assert train(output_dir, "--device=cpu") == 130
    said, command = one_line(capsys).split(" go on with: python -m torch_softmax ")
    assert said == "torch-softmax train: interrupted;"
    assert shlex.split(command) == ["resume", str(output_dir), "--device", "cpu"]
    assert main(shlex.split(command)) == 0
    assert results(output_dir) == never_stopped


def test_a_second_interruption_ends_at_once(tmp_path, interrupt_in, never_stopped):
    interrupt_in(BATCHES + 5, BATCHES + 5)
    assert train(tmp_path) == 130
    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.epoch, checkpoint.tally.batches) == (1, 0)
    assert resume(tmp_path) == 0
    assert results(tmp_path) == never_stopped


def test_an_interruption_of_the_last_test_loses_no_epoch(tmp_path, monkeypatch, never_stopped):
    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", interrupt)
        assert train(tmp_path) == 130
    assert load_checkpoint(tmp_path).epoch == 2
    assert not (tmp_path / "metrics.json").exists()
    assert resume(tmp_path) == 0
    assert results(tmp_path) == never_stopped


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_training_leaves_the_signal_handler_as_it_was(tmp_path, interrupt_in, handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        interrupt_in(20)
        # A job in the background ignores Ctrl-C, which is meant for the one in the foreground.
        assert train(tmp_path) == (0 if handler is signal.SIG_IGN else 130)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("save", [0, 1, 2])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_stays(
    tmp_path, monkeypatch, capsys, fail_in_save, never_stopped, save
):
    fail_in_save(save)
    assert train(tmp_path) == 1
    message = f"{tmp_path / 'model.pt'} can't be written: No space left on device"
    assert one_line(capsys) == f"torch-softmax train: {message}"
    monkeypatch.undo()
    if save == 0:
        assert list(tmp_path.iterdir()) == []
    else:
        assert load_checkpoint(tmp_path).epoch == save - 1
        assert resume(tmp_path) == 0
        assert results(tmp_path) == never_stopped


def test_a_finished_run_is_only_tested_again(finished, tmp_path, monkeypatch, never_stopped):
    (tmp_path / "model.pt").write_bytes((finished / "model.pt").read_bytes())
    monkeypatch.setattr(runs, "train_epoch", pytest.fail)
    assert resume(tmp_path) == 0
    assert results(tmp_path) == never_stopped


@pytest.mark.parametrize("given", ["model.pt", "."])
def test_a_run_is_named_by_its_directory_or_its_checkpoint(tmp_path, interrupt_in, given):
    interrupt_in(20)
    train(tmp_path)
    assert resume(tmp_path / given, "--epochs=2") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "metrics.json"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run of two epochs, which no test may change."""
    output_dir = tmp_path_factory.mktemp("finished")
    assert train(output_dir) == 0
    return output_dir


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--epochs=3", "torch-softmax resume: epochs must be 2 as in the run so far, got 3"),
        ("--lr=0.5", "torch-softmax: unrecognized arguments: --lr=0.5"),
        ("--dataset=mnist", "torch-softmax: unrecognized arguments: --dataset=mnist"),
    ],
)
def test_an_option_that_contradicts_the_run_is_refused(finished, capsys, option, message):
    before = contents(finished)
    with pytest.raises(SystemExit, match="2"):
        resume(finished, option)
    assert one_line(capsys) == message
    assert contents(finished) == before


def test_without_a_schedule_a_run_can_be_made_longer(tmp_path, interrupt_in):
    for name, epochs in (("short", 1), ("long", 2)):
        assert train(tmp_path / name, "--schedule=constant", epochs=epochs) == 0
    interrupt_in(20)
    assert resume(tmp_path / "short", "--epochs=2") == 130
    assert not (tmp_path / "short" / "metrics.json").exists()  # it would be the shorter run's
    assert resume(tmp_path / "short") == 0
    assert results(tmp_path / "short") == results(tmp_path / "long")


def test_a_run_that_is_not_there(tmp_path, capsys):
    assert resume(tmp_path / "none") == 1
    path = tmp_path / "none" / "model.pt"
    assert (
        one_line(capsys) == f"torch-softmax resume: {path} can't be read: No such file or directory"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda content: {**content, "model": content["model"]["weight"]}, "is damaged or no"),
        (
            lambda content: {**content, "model": SoftmaxRegression(64, 5).state_dict()},
            "can't be used: model must have 10 classes, as digits has, got 5",
        ),
        (
            lambda content: {**content, "model": SoftmaxRegression(784, 10).state_dict()},
            "is of a model for 784 pixels, but digits has 64",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line_and_stays(
    finished, tmp_path, capsys, damage, problem
):
    content = torch.load(finished / "model.pt", weights_only=True)
    torch.save(damage(content), tmp_path / "model.pt")
    before = contents(tmp_path)
    assert resume(tmp_path) == 1
    assert problem in one_line(capsys)
    assert contents(tmp_path) == before


def test_a_read_only_directory_is_found_before_the_training(finished, monkeypatch, capsys):
    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    before = contents(finished)
    # A superuser may write anywhere, so that taking the permission away would not do.
    monkeypatch.setattr(runs.tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(checkpoints, "load_dataset", pytest.fail)
    assert resume(finished) == 1
    assert one_line(capsys) == (
        f"torch-softmax resume: {finished} can't be written: Read-only file system"
    )
    assert contents(finished) == before


@pytest.fixture
def newton(tmp_path):
    """The arguments of a run by Newton's method."""
    return ["train", "--dataset", "digits", "--optimizer", "newton", "--output-dir", str(tmp_path)]


def test_newton_reaches_the_optimum_and_stops(newton, tmp_path, capsys):
    assert main(newton) == 0
    printed = capsys.readouterr()
    checkpoint = load_checkpoint(tmp_path)
    assert 3 < checkpoint.epoch < 20
    assert checkpoint.settings.weight_decay == 1 / 1442
    assert f"step  {checkpoint.epoch:>2}/100" in printed.out
    assert "not converged" not in printed.err
    assert checkpoint.history[-1]["loss"] < checkpoint.history[0]["loss"]


def test_newton_that_runs_out_of_steps_says_so(newton, capsys):
    assert main([*newton, "--epochs", "2"]) == 0
    assert "not converged: the gradient's norm is" in capsys.readouterr().err


def test_newton_goes_on_to_the_same_optimum(newton, tmp_path, monkeypatch):
    def interrupted(*args, report, **options):
        def report_twice(result):
            report(result)
            if result.steps == 2:
                raise KeyboardInterrupt

        return minimize(*args, report=report_twice, **options)

    minimize = runs.newton.minimize
    with monkeypatch.context() as patched:
        patched.setattr(runs.newton, "minimize", interrupted)
        assert main(newton) == 130
    stopped = load_checkpoint(tmp_path)
    assert stopped.epoch == 2
    assert resume(tmp_path) == 0
    resumed = load_checkpoint(tmp_path)

    assert main([*newton[:-1], str(tmp_path / "whole")]) == 0
    whole = load_checkpoint(tmp_path / "whole")
    assert resumed.history[:2] == stopped.history
    assert resumed.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], abs=1e-3)


@pytest.mark.parametrize("option", ["--lr=1", "--batch-size=8", "--schedule=cosine"])
def test_newton_refuses_what_it_has_no_use_for(newton, option, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*newton, option])
    assert exit.value.code == 2
    name = option[2:].partition("=")[0].replace("-", "_")
    assert f"{name} must be left out for optimizer 'newton'" in capsys.readouterr().err
