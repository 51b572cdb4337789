"""The command that predicts: its chart, its JSON, folders, and files it can't use."""

import json
import runpy
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

from tests.helpers import ROOT, one_line
from torch_softmax.__main__ import main
from torch_softmax.mnist.checkpoints import save_checkpoint
from torch_softmax.mnist.commands import predict


@pytest.fixture(scope="module")
def run_dir(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "model.pt", trained)
    return folder


def paper(pixels):
    """A digit as dark ink on a sheet of light paper, several times as large."""
    ink = interpolate(pixels.view(1, 1, 8, 8) / 16, scale_factor=12, mode="bilinear")[0, 0]
    sheet = 230 - 180 * pad(ink, (30, 50, 40, 20))
    return Image.fromarray(sheet.byte().numpy())


@pytest.fixture
def seven(digits, tmp_path):
    path = tmp_path / "seven.png"
    paper(digits.test.images[(digits.test.labels == 7).nonzero()[0]]).save(path)
    return path


@pytest.fixture
def scans(digits, tmp_path):
    """A folder of four pictures and some other files, and the paths in order of the names."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for i, name in enumerate(("b.png", "a.jpg", "C.PNG", "d.bmp")):
        paper(digits.test.images[i]).save(folder / name)
    (folder / "notes.txt").write_text("which pen, which paper")
    (folder / ".hidden.png").write_text("of the file system")
    (folder / "inner.png").mkdir()
    return folder, [str(folder / name) for name in ("C.PNG", "a.jpg", "b.png", "d.bmp")]


def run(run_dir, *arguments):
    return main(["predict", str(run_dir), *map(str, arguments)])


def results(capsys):
    return json.loads(capsys.readouterr().out)


# What it prints


def test_most_digits_are_predicted_as_well_as_in_the_data_set(run_dir, digits, tmp_path, capsys):
    for i in range(60):
        paper(digits.test.images[i]).save(tmp_path / f"{i:03}.png")
    assert run(run_dir, tmp_path, "--json") == 0
    predicted = torch.tensor([result["class"] for result in results(capsys)])
    assert (predicted == digits.test.labels[:60]).double().mean() >= 0.9


def test_the_class_and_a_bar_for_each_likely_class(run_dir, seven, capsys):
    assert run(run_dir, seven) == 0
    first, *bars = capsys.readouterr().out.splitlines()
    assert first == f"{seven}: 7"
    assert bars[0].split()[0] == "7"
    assert bars[-1].split()[0] == "others"
    shares = [float(bar.split()[1].rstrip("%")) for bar in bars]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert shares[:-1] == sorted(shares[:-1], reverse=True)
    assert all(len(bar) <= 80 for bar in bars)


def test_a_bar_is_as_long_as_the_probability():
    likely, other, others = predict.bars([0.0, 0.25, 0.0, 0.746, 0.004])
    assert likely == "       3   74.6%  " + 42 * "#"
    assert other == "       1   25.0%  " + 14 * "#"
    assert others == "  others    0.4%"


def test_json_has_path_class_and_all_probabilities(run_dir, scans, seven, capsys):
    folder, paths = scans
    assert run(run_dir / "model.pt", "--json", seven, folder) == 0
    first, *rest = results(capsys)
    assert [result["path"] for result in rest] == paths
    assert (first["path"], first["class"]) == (str(seven), 7)
    assert first["probabilities"][7] == max(first["probabilities"])
    assert sum(first["probabilities"]) == pytest.approx(1, abs=1e-6)


def test_as_a_script(run_dir, seven, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["predict.py", str(run_dir), str(seven)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "scripts" / "predict.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"{seven}: 7\n")


# What it can't use


@pytest.fixture
def unusable(digits, tmp_path):
    """Paths that show no digit or are no picture, with the status and the line for each."""
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (50, 50), 240).save(tmp_path / "blank.png")
    row = Image.new("L", (360, 160), 230)
    for k in range(2):
        row.paste(paper(digits.test.images[k]), (180 * k, 0))
    row.save(tmp_path / "row.png")
    return {
        tmp_path / "text.png": (1, "{} is no image, or is damaged"),
        tmp_path / "blank.png": (3, "{}: nothing is drawn, or it is too faint"),
        tmp_path / "row.png": (3, "{}: several parts are drawn, not one digit"),
        tmp_path / "missing.png": (1, "{} can't be read: No such file or directory"),
    }


def test_a_line_and_a_status_for_each_picture_that_cannot_be_used(run_dir, unusable, capsys):
    for path, (status, line) in unusable.items():
        assert run(run_dir, path) == status
        assert one_line(capsys) == f"torch-softmax predict: {line.format(path)}"


def test_the_other_pictures_are_predicted_all_the_same(run_dir, unusable, seven, capsys):
    assert run(run_dir, "--json", *unusable, seven) == 1
    out, err = capsys.readouterr()
    *failed, last = json.loads(out)
    lines = [line.format(path) for path, (_, line) in unusable.items()]
    assert [result["error"] for result in failed] == lines
    assert last["class"] == 7
    assert len(err.splitlines()) == len(unusable)


def test_a_folder_without_pictures(run_dir, tmp_path, capsys):
    assert run(run_dir, tmp_path) == 1
    assert one_line(capsys) == f"torch-softmax predict: {tmp_path} holds no image"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("mnist", "the checkpoint is of a model for 64 pixels, but mnist has 784"),
        ("kmnist", "the checkpoint is of a model for kmnist; predict reads digits only"),
    ],
)
def test_a_checkpoint_of_other_images(trained, tmp_path, seven, capsys, dataset, message):
    save_checkpoint(tmp_path / "model.pt", replace(trained, dataset=dataset))
    assert run(tmp_path, seven) == 1
    assert one_line(capsys).startswith(f"torch-softmax predict: {message}")


def test_no_checkpoint(tmp_path, seven, capsys):
    assert run(tmp_path / "nowhere.pt", seven) == 1
    message = f"torch-softmax predict: {tmp_path / 'nowhere.pt'} can't be read"
    assert one_line(capsys).startswith(message)


def test_a_missing_argument(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "model.pt"])
    message = "torch-softmax predict: the following arguments are required: IMAGE"
    assert one_line(capsys) == message
