"""Checkpoints: what they hold, that they are written whole, and which files are refused."""

import errno
import os
import pickle
import stat
from dataclasses import asdict, replace

import pytest
import torch

from tests.mnist.files import write_mnist
from torch_softmax import SoftmaxRegression
from torch_softmax._files import write_atomically
from torch_softmax.mnist.checkpoints import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from torch_softmax.mnist.data import load_dataset
from torch_softmax.mnist.download import DataNotFoundError
from torch_softmax.mnist.settings import Settings
from torch_softmax.mnist.training import Score, Tally

SETTINGS = Settings(epochs=4, batch_size=32, lr=0.5)
EPOCH = {"loss": 0.25, "accuracy": 0.5, "seconds": 2.0}


@pytest.fixture
def start(digits):
    return Checkpoint.start(SETTINGS, digits)


@pytest.fixture
def checkpoint(start):
    """A run within its third epoch."""
    tally = Tally(batches=2, examples=64, loss_sum=0.1, right=60, seconds=3.5)
    return replace(start, epoch=2, history=[EPOCH, EPOCH], tally=tally)


@pytest.fixture
def path(tmp_path, checkpoint):
    path = tmp_path / "model.pt"
    save_checkpoint(path, checkpoint)
    return path


def same(some, other):
    """Whether two checkpoints are equal, their tensors bit for bit."""
    tensors = [[*c.model.values(), c.generator_state] for c in (some, other)]
    plain = [replace(c, model={"weight": c.model["weight"]}) for c in (some, other)]
    plain = [{**asdict(c), "model": None, "generator_state": None} for c in plain]
    return plain[0] == plain[1] and all(map(torch.equal, *tensors))


# What it holds


def test_the_start_is_decided_by_the_seed(start, digits):
    torch.rand(3)
    assert same(Checkpoint.start(SETTINGS, digits), start)
    other = Checkpoint.start(replace(SETTINGS, seed=1), digits)
    assert not torch.equal(other.model["weight"], start.model["weight"])
    assert not torch.equal(other.generator_state, start.generator_state)


def test_within_an_epoch_the_generator_stays_at_its_start(start):
    generator = torch.Generator()
    generator.set_state(start.generator_state)
    tally = Tally(batches=3, examples=96, loss_sum=torch.tensor(0.1), right=torch.tensor(7))
    after = start.after_batches(start.build_model(), tally)
    assert (after.epoch, after.history) == (0, [])
    assert torch.equal(after.generator_state, start.generator_state)
    assert after.tally == Tally(3, 96, torch.tensor(0.1).item(), 7)
    assert type(after.tally.right) is int


def test_after_an_epoch_the_next_one_has_nothing_done(start):
    generator = torch.Generator().manual_seed(5)
    within = start.after_batches(start.build_model(), Tally(batches=3, examples=80))
    after = within.after_epoch(start.build_model(), Score(0.25, 0.5), 2.0, generator)
    assert (after.epoch, after.history) == (1, [EPOCH])
    assert torch.equal(after.generator_state, generator.get_state())
    assert after.tally == Tally()


def test_later_updates_do_not_reach_a_checkpoint(start):
    model = start.build_model()
    after = start.after_batches(model, Tally(batches=1))
    with torch.no_grad():
        model.weight.zero_()
    assert after.model["weight"].any()
    assert start.model["weight"].any()


def test_the_model_is_a_classifier_in_evaluation_mode(checkpoint):
    model = checkpoint.build_model("cpu")
    assert isinstance(model, SoftmaxRegression)
    assert not model.training
    assert all(
        torch.equal(checkpoint.model[name], value) for name, value in model.named_parameters()
    )


def test_images_of_another_size_do_not_fit(checkpoint, digits, tmp_path):
    assert len(checkpoint.load_data().test) == len(digits.test)
    write_mnist(tmp_path / "MNIST" / "raw")
    message = "is of a model for 64 pixels, but mnist has 784"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_data(tmp_path, "mnist")


# Where its data are


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """The folder that the test works in, which is not the one that has its data."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:1/"])
    return home


@pytest.fixture
def on_mnist(tmp_path, at_home):
    """A run on a small MNIST, whose path was given from where it began."""
    write_mnist(tmp_path / "lent" / "MNIST" / "raw", train_size=12)
    return Checkpoint.start(SETTINGS, load_dataset("mnist", "../lent"))


def test_it_finds_the_data_from_elsewhere(on_mnist, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "model.pt", on_mnist)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(load_checkpoint(tmp_path).load_data().train) == 12


def test_data_that_are_named_win(on_mnist, tmp_path):
    write_mnist(tmp_path / "other" / "MNIST" / "raw", train_size=13)
    assert len(on_mnist.load_data(tmp_path / "other").train) == 13


def test_data_that_are_gone_are_looked_for_in_the_default_place(on_mnist, tmp_path):
    (tmp_path / "lent" / "MNIST").rename(tmp_path / "lent" / "moved")
    write_mnist(tmp_path / "home" / "data" / "MNIST" / "raw", train_size=13)
    assert len(on_mnist.load_data().train) == 13


def test_data_that_are_nowhere_are_told_of_with_both_places(on_mnist, tmp_path):
    (tmp_path / "lent" / "MNIST").rename(tmp_path / "lent" / "moved")
    with pytest.raises(DataNotFoundError) as raised:
        on_mnist.load_data()
    message = str(raised.value)
    assert message.startswith("MNIST is not in data/MNIST/raw and can't be downloaded")
    assert message.endswith(
        f"; the run had its data in {on_mnist.data_dir}, where they are no longer"
    )


def test_another_data_set_is_looked_for_beside_that_of_the_run(on_mnist, tmp_path):
    write_mnist(tmp_path / "lent" / "KMNIST" / "raw", train_size=13)
    assert len(on_mnist.load_data(dataset="kmnist").train) == 13


def test_a_checkpoint_that_does_not_tell_takes_the_default_place(on_mnist, tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, on_mnist)
    content = torch.load(path, weights_only=True)
    del content["data_dir"]
    torch.save(content, path)
    write_mnist(tmp_path / "home" / "data" / "MNIST" / "raw", train_size=13)
    assert len(load_checkpoint(path).load_data().train) == 13


def test_the_digits_are_nowhere(start):
    assert start.data_dir is None
    assert start.load_data().name == "digits"


# Settings to go on with


@pytest.mark.parametrize("given", [{}, {"lr": 0.5}, {"epochs": 4, "batch_size": 32}])
def test_the_same_settings_may_be_given(checkpoint, given):
    assert checkpoint.with_settings(**given).settings == SETTINGS


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 0.6), ("epochs", 5), ("schedule", "constant"), ("seed", 1)]
)
def test_other_settings_are_refused(checkpoint, name, value):
    message = f"{name} must be {getattr(SETTINGS, name)!r} as in the run so far, got {value!r}"
    with pytest.raises(ValueError, match=message):
        checkpoint.with_settings(**{name: value})


def test_without_a_schedule_there_may_be_other_epochs(checkpoint):
    checkpoint = replace(checkpoint, settings=replace(SETTINGS, schedule="constant"))
    assert checkpoint.with_settings(epochs=9).settings.epochs == 9
    assert checkpoint.with_settings(epochs=3).settings.epochs == 3
    with pytest.raises(ValueError, match="epochs must be at least 3, which are begun, got 2"):
        checkpoint.with_settings(epochs=2)


# Written and read


def test_what_is_read_is_what_was_written(path, checkpoint):
    assert same(load_checkpoint(path), checkpoint)
    assert same(load_checkpoint(path.parent), checkpoint)


def test_torch_alone_can_read_it(path, checkpoint):
    content = torch.load(path, weights_only=True)
    torch.nn.Linear(64, 10).load_state_dict(content["model"])
    assert content["settings"] == asdict(SETTINGS)
    assert (content["epoch"], content["dataset"]) == (2, "digits")


# Files that are refused


def refusal(path):
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(f"{path} ")


NOT_OURS = "is damaged or no checkpoint of this program; no code in it was run"


def test_a_file_that_is_not_there(tmp_path):
    assert refusal(tmp_path / "none.pt") == "can't be read: No such file or directory"


@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_a_truncated_file(path, part):
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert refusal(path) == NOT_OURS


def test_a_weight_with_one_wrong_bit(path, checkpoint):
    content = bytearray(path.read_bytes())
    weight = bytes(checkpoint.model["weight"].flatten().view(torch.uint8)[:64].tolist())
    content[content.index(weight)] ^= 1
    path.write_bytes(content)
    assert not torch.equal(
        torch.load(path, weights_only=True)["model"]["weight"], checkpoint.model["weight"]
    )
    assert refusal(path) == NOT_OURS


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(10, 64),
        {"weight": torch.zeros(10, 64), "bias": torch.zeros(10)},
        {"model": {"weight": torch.zeros(10, 64)}, "settings": asdict(SETTINGS)},
        [1, 2],
        b"any text",
        pickle.dumps({"model": 1}),
    ],
)
def test_what_another_program_wrote(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert refusal(path) == NOT_OURS


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        (
            "dataset",
            "cifar",
            "dataset must be 'mnist', 'fashion-mnist', 'kmnist', 'idx' or 'digits', got 'cifar'",
        ),
        ("epoch", 1, "history must be of 1 epochs, got 2"),
        ("data_dir", 7, "data_dir must be a path or None, got 7"),
        (
            "settings",
            {**asdict(SETTINGS), "epochs": 2},
            "epochs must be at least 3, which are begun, got 2",
        ),
        (
            "settings",
            {**asdict(SETTINGS), "lr": -1.0},
            "lr must be a finite number above 0, got -1.0",
        ),
    ],
)
def test_values_that_cannot_be(path, name, value, problem):
    torch.save({**torch.load(path, weights_only=True), name: value}, path)
    assert refusal(path) == f"can't be used: {problem}"


@pytest.mark.parametrize("name", ["settings", "epoch", "generator_state", "tally", "model"])
def test_values_of_another_kind(path, name):
    content = torch.load(path, weights_only=True)
    for value in (None, "x", torch.zeros(3)):
        torch.save({**content, name: value}, path)
        assert refusal(path)


@pytest.mark.parametrize("classes", [5, 11])
def test_another_number_of_classes(path, classes):
    content = torch.load(path, weights_only=True)
    content["model"] = SoftmaxRegression(64, classes).state_dict()
    torch.save(content, path)
    problem = f"model must have 10 classes, as digits has, got {classes}"
    assert refusal(path) == f"can't be used: {problem}"


class Malicious:
    """An object whose unpickling makes a directory."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("packed", [False, True])
def test_code_in_a_checkpoint_is_not_run(path, tmp_path, packed):
    trace = tmp_path / "it ran"
    content = {**torch.load(path, weights_only=True), "model": Malicious(str(trace))}
    if packed:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    assert refusal(path) == NOT_OURS
    assert not trace.exists()

    # It would have run, had it been loaded without care.
    pickle.loads(pickle.dumps(content))
    assert trace.exists()


# Written in one step


def test_a_write_replaces_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    synced = []

    def fsync(descriptor):
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append((is_directory, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(path, b"new")
    assert synced == [(False, b"old"), (True, b"new")]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=f"^{path} can't be written: No space left on device$"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_cut_short_leaves_what_was_there(path, checkpoint):
    resource = pytest.importorskip("resource")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match=f"^{path} can't be written: File too large$"):
            save_checkpoint(path, checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["nowhere/file", "file/below"])
def test_a_directory_that_is_none(tmp_path, name):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match=f"^{tmp_path / name} can't be written: "):
        write_atomically(tmp_path / name, b"new")
