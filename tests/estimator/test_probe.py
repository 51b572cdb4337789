"""`scripts/probe.py`: its table, what it saves, and what it says of files that it can't use."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.datasets import load_iris

from tests.helpers import one_line
from torch_softmax.estimator import probe

OPTIONS = ["--Cs", "1e-3", "10", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def iris():
    X, y = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return 10 * X[order], y[order]


@pytest.fixture
def files(iris, tmp_path):
    X, y = iris
    for name, part in (("train", slice(100)), ("test", slice(100, 150))):
        np.savez(tmp_path / f"{name}.npz", X=X[part], y=y[part])
    return tmp_path


def run(files, *options):
    names = [str(files / name) for name in ("train.npz", "test.npz")]
    return probe.main([*names, *OPTIONS, "--output", str(files / "probe.pt"), *options])


@pytest.mark.parametrize("held", [["--folds", "3"], ["--holdout", "0.2"]], ids=["folds", "once"])
def test_a_table_of_the_path_and_the_test(files, capsys, held):
    assert run(files, *held) == 0
    title, *rows, tested, saved = capsys.readouterr().out.splitlines()
    assert title.endswith("held-out accuracy with its 95 % interval")
    assert [float(row.split()[0]) for row in rows] == [0.001, 0.01, 0.1, 1.0, 10.0]
    assert sum(row.endswith("chosen") for row in rows) == 1
    assert tested.startswith("test accuracy 9")
    assert saved == f"saved {files / 'probe.pt'}"


@pytest.mark.parametrize("options", [[], ["--standardize"]], ids=["as it is", "standardized"])
def test_what_is_saved_predicts_as_the_test_says(files, iris, capsys, options):
    assert run(files, *options, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    saved = torch.load(files / "probe.pt", weights_only=True)
    linear = torch.nn.Linear(4, 3)
    linear.load_state_dict(saved["linear"])
    predicted = linear(torch.tensor(iris[0][100:]).float()).argmax(1)
    right = (np.array(saved["classes"])[predicted] == iris[1][100:]).mean()
    assert right == pytest.approx(result["test_accuracy"]["value"])
    assert saved["C"] == result["C"]
    assert len(result["path"]) == 5


def test_what_is_learnt_in_float64_is_saved_so(files):
    assert run(files) == 0
    saved = torch.load(files / "probe.pt", weights_only=True)
    assert saved["linear"]["weight"].dtype == torch.float64


def test_a_constant_stays_as_it_is_when_others_are_standardized():
    X = np.stack([np.full(1000, 0.1), np.linspace(0, 1e-3, 1000)], 1)
    _, scale = probe._moments(X)
    assert scale[0] == 1
    assert scale[1] == pytest.approx(1 / X[:, 1].std())


@pytest.mark.parametrize("kind", ["str", "bytes"])
def test_labels_of_another_kind_are_refused(files, iris, capsys, kind):
    np.savez(files / "test.npz", X=iris[0][100:], y=iris[1][100:].astype(kind))
    assert run(files) == 1
    assert "must have labels of" in one_line(capsys)
    assert not (files / "probe.pt").exists()


@pytest.mark.parametrize("kind", ["npy", "pt"])
def test_other_formats_are_the_same(files, iris, capsys, kind):
    X, y = iris[0][:100], iris[1][:100]
    if kind == "npy":
        np.save(files / "X.npy", X)
        np.save(files / "y.npy", y)
        name = f"{files / 'X.npy'},{files / 'y.npy'}"
    else:
        torch.save({"X": torch.tensor(X), "y": torch.tensor(y)}, files / "train.pt")
        name = str(files / "train.pt")
    output = ["--output", str(files / "probe.pt"), "--json"]
    assert probe.main([str(files / "train.npz"), *OPTIONS, *output]) == 0
    expected = capsys.readouterr().out
    assert probe.main([name, *OPTIONS, *output]) == 0
    assert capsys.readouterr().out == expected


def test_the_path_is_drawn(files, capsys):
    pytest.importorskip("matplotlib")
    assert run(files, "--plot", str(files / "path.svg")) == 0
    assert "held-out accuracy" in (files / "path.svg").read_text()


def bad_files():
    X, y = np.ones((6, 2)), np.array([0, 1, 0, 1, 0, 1])
    with_nan = X.copy()
    with_nan[2, 1] = np.nan
    return {
        "nan": ({"X": with_nan, "y": y}, "Input X contains NaN"),
        "lengths": ({"X": X, "y": y[:4]}, "must hold X (N, D) and y (N,), got (6, 2) and (4,)"),
        "one class": ({"X": X, "y": 0 * y}, "at least 2 classes"),
        "names": ({"a": X, "b": y}, "must hold X and y, got a, b"),
        "words": ({"X": X.astype(str), "y": y}, "X of real numbers"),
        "empty": ({"X": X[:0], "y": y[:0]}, "at least one example"),
    }


@pytest.mark.parametrize("kind", bad_files())
def test_a_file_that_can_not_be_used_gets_one_line(tmp_path, capsys, kind):
    arrays, message = bad_files()[kind]
    path, output = tmp_path / "train.npz", tmp_path / "probe.pt"
    np.savez(path, **arrays)
    status = 0
    try:
        status = probe.main([str(path), *OPTIONS, "--folds", "2", "--output", str(output)])
    except SystemExit as ended:
        status = ended.code
    assert status in (1, 2)
    line = one_line(capsys)
    assert message in line
    assert str(path) in line
    assert not output.exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"X": [[1.0], [2.0]], "y": [0, 1]}, "dense tensors or arrays"),
        ({"X": torch.eye(2).to_sparse(), "y": torch.arange(2)}, "dense tensors or arrays"),
        (torch.eye(2), "must hold X and y, got one Tensor"),
    ],
    ids=["lists", "sparse", "a tensor"],
)
def test_what_torch_has_saved_of_another_kind_gets_one_line(tmp_path, capsys, held, message):
    torch.save(held, tmp_path / "train.pt")
    assert probe.main([str(tmp_path / "train.pt"), *OPTIONS]) == 1
    assert message in one_line(capsys)


def test_one_array_alone_gets_one_line(tmp_path, capsys):
    np.save(tmp_path / "X.npy", np.eye(2))
    assert probe.main([str(tmp_path / "X.npy"), *OPTIONS]) == 1
    assert "must hold X and y, got one ndarray" in one_line(capsys)


def test_a_test_file_that_can_not_be_used_is_named(files, iris, capsys):
    X, y = iris
    np.savez(
        files / "test.npz", X=np.where(np.arange(50)[:, None] == 3, np.nan, X[100:]), y=y[100:]
    )
    assert run(files) == 1
    line = one_line(capsys)
    assert str(files / "test.npz") in line
    assert "NaN" in line


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    for name in list(sys.modules):
        if name.startswith("torch_softmax.estimator"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match=r"^probe\.py: .* needs scikit-learn: pip install"):
        runpy.run_path("scripts/probe.py")


@pytest.mark.parametrize("content", [b"", b"no array", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("name", ["train.npz", "train.pt", "train.npy,train.npy"])
def test_a_file_that_is_none_gets_one_line(tmp_path, capsys, name, content):
    names = [tmp_path / part for part in name.split(",")]
    for path in names:
        path.write_bytes(content)
    assert probe.main([",".join(map(str, names)), *OPTIONS]) == 1
    assert "can't be read" in one_line(capsys)


def test_a_file_that_is_not_there_gets_one_line(tmp_path, capsys):
    assert probe.main([str(tmp_path / "none.npz")]) == 1
    assert "none.npz" in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--Cs", "0", "1", "3"], "Cs must be two numbers above 0"),
        (["--holdout", "1.5"], "holdout must lie between 0 and 1"),
        (["--folds", "1"], "folds must be at least 2"),
    ],
)
def test_an_unfit_option_is_named(files, capsys, options, message):
    with pytest.raises(SystemExit):
        run(files, *options)
    assert message in one_line(capsys)
