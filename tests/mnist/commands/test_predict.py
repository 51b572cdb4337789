"""The command that tells what is drawn: its chart, its JSON, folders, and files it can't use."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
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
    """A folder of five pictures and some other files, and the labels in order of the names."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for i, name in enumerate(("b.png", "a.jpg", "C.PNG", "d.bmp", "e.webp")):
        paper(digits.test.images[i]).save(folder / name)
    (folder / "notes.txt").write_text("which pen, which paper")
    (folder / ".hidden.png").write_text("of the file system")
    (folder / "inner.png").mkdir()
    order = ("C.PNG", "a.jpg", "b.png", "d.bmp", "e.webp")
    return folder, order


def run(run_dir, *arguments):
    return main(["predict", str(run_dir), *map(str, arguments)])


def results(capsys):
    return json.loads(capsys.readouterr().out)


# What it prints


def test_most_digits_are_told_as_well_as_in_the_data_set(run_dir, digits, tmp_path, capsys):
    for i in range(100):
        paper(digits.test.images[i]).save(tmp_path / f"{i:03}.png")
    assert run(run_dir, tmp_path, "--json") == 0
    told = torch.tensor([result["class"] for result in results(capsys)])
    assert (told == digits.test.labels[:100]).double().mean() >= 0.9


def test_the_class_and_a_bar_for_each_likely_class(run_dir, seven, capsys):
    assert run(run_dir, seven) == 0
    first, *bars = capsys.readouterr().out.splitlines()
    assert first == f"{seven}: 7"
    assert bars[0].split()[0] == "7"
    assert bars[-1].split()[0] == "others"
    shares = [float(bar.split()[1].rstrip("%")) for bar in bars]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert shares[:-1] == sorted(shares[:-1], reverse=True)


@pytest.fixture
def row(digits, tmp_path):
    """A picture of 3 1 4, written beside each other."""
    first = [(digits.test.labels == label).nonzero()[0] for label in (3, 1, 4)]
    sheets = [np.asarray(paper(digits.test.images[i])) for i in first]
    path = tmp_path / "row.png"
    Image.fromarray(np.concatenate(sheets, 1)).save(path)
    return path


def test_several_characters_from_left_to_right_with_a_bar_each(run_dir, row, capsys):
    assert run(run_dir, row) == 0
    first, *bars = capsys.readouterr().out.splitlines()
    assert first == f"{row}: 3 1 4"
    assert [bar.split()[0] for bar in bars] == ["3", "1", "4"]


def test_json_has_an_object_for_each_character(run_dir, row, seven, capsys):
    assert run(run_dir, "--json", row, seven) == 0
    told = results(capsys)
    assert [(each["path"], each["class"]) for each in told] == [
        (str(row), 3),
        (str(row), 1),
        (str(row), 4),
        (str(seven), 7),
    ]
    assert all(len(each["probabilities"]) == 10 for each in told)


@pytest.mark.parametrize(
    ("probability", "line"),
    [
        (1.0, "       3  100.0%  " + 56 * "#"),
        (0.5, "       3   50.0%  " + 28 * "#"),
        (0.001, "       3    0.1%"),
    ],
)
def test_a_bar_is_as_long_as_the_probability(probability, line):
    assert predict.bar("3", probability) == line


def test_lines_fit_in_80_columns(run_dir, seven, capsys):
    run(run_dir, seven)
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines()[1:])


def test_json_has_path_class_and_all_probabilities(run_dir, seven, capsys):
    assert run(run_dir, "--json", seven) == 0
    (result,) = results(capsys)
    assert result["path"] == str(seven)
    assert result["class"] == 7
    assert len(result["probabilities"]) == 10
    assert result["probabilities"][7] == max(result["probabilities"])
    assert sum(result["probabilities"]) == pytest.approx(1, abs=1e-6)


def test_a_folder_is_its_pictures_in_order_of_their_names(run_dir, scans, capsys):
    folder, order = scans
    assert run(run_dir, "--json", folder) == 0
    assert [result["path"] for result in results(capsys)] == [str(folder / name) for name in order]


def test_files_and_folders_in_the_given_order(run_dir, scans, seven, capsys):
    folder, order = scans
    assert run(run_dir, "--json", seven, folder, seven) == 0
    paths = [result["path"] for result in results(capsys)]
    assert paths == [str(seven), *(str(folder / name) for name in order), str(seven)]


def test_a_run_directory_or_its_checkpoint(run_dir, seven, capsys):
    run(run_dir, seven)
    run(run_dir / "model.pt", seven)
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]


def test_as_a_command_of_its_own(run_dir, seven):
    command = [sys.executable, ROOT / "scripts" / "predict.py", run_dir, seven]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{seven}: 7\n")
    assert done.stderr == ""


# What it can't use


@pytest.fixture
def unusable(tmp_path):
    """Paths that are no picture, and what is said of each."""
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (50, 50), 240).save(tmp_path / "blank.png")
    return {
        tmp_path / "text.png": "{path} is no image, or is damaged",
        tmp_path / "blank.png": "{path}: nothing is drawn",
        tmp_path / "missing.png": "{path} can't be read: No such file or directory",
    }


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("text.png", predict.UNREADABLE),
        ("blank.png", predict.NO_CHARACTER),
        ("missing.png", predict.UNREADABLE),
    ],
)
def test_a_line_and_a_status_for_what_is_no_picture(
    run_dir, unusable, tmp_path, capsys, name, status
):
    path = tmp_path / name
    assert run(run_dir, path) == status
    assert one_line(capsys) == f"torch-softmax predict: {unusable[path].format(path=path)}"


def test_the_other_pictures_are_told_all_the_same(run_dir, unusable, seven, capsys):
    assert run(run_dir, *unusable, seven) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{seven}: 7")
    assert len(err.splitlines()) == 3


def test_json_tells_of_what_is_no_picture(run_dir, unusable, seven, capsys):
    assert run(run_dir, "--json", *unusable, seven) == 1
    *failed, told = results(capsys)
    assert [result["error"] for result in failed] == [
        line.format(path=path) for path, line in unusable.items()
    ]
    assert told["class"] == 7


def test_a_damaged_picture_in_a_folder_is_told(run_dir, scans, capsys):
    folder, _ = scans
    (folder / "d.bmp").write_bytes(b"BM")
    assert run(run_dir, folder) == 1
    out, err = capsys.readouterr()
    assert len([line for line in out.splitlines() if str(folder) in line]) == 4
    assert err == f"torch-softmax predict: {folder / 'd.bmp'} is no image, or is damaged\n"


def test_a_folder_without_pictures(run_dir, tmp_path, capsys):
    assert run(run_dir, tmp_path) == 1
    assert one_line(capsys) == f"torch-softmax predict: {tmp_path} holds no image"


def test_no_checkpoint(tmp_path, seven, capsys):
    assert run(tmp_path / "nowhere.pt", seven) == 1
    told = f"torch-softmax predict: {tmp_path / 'nowhere.pt'} can't be read"
    assert one_line(capsys).startswith(told)


def test_a_checkpoint_of_another_size(trained, tmp_path, seven, capsys):
    save_checkpoint(tmp_path / "model.pt", replace(trained, dataset="mnist"))
    assert run(tmp_path, seven) == 1
    assert one_line(capsys) == (
        "torch-softmax predict: the checkpoint is of a model for 64 pixels, but mnist has 784"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.pt"], "the following arguments are required: IMAGE"),
        ([], "the following arguments are required: RUN_DIR, IMAGE"),
    ],
)
def test_a_missing_argument(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["predict", *arguments])
    assert one_line(capsys) == f"torch-softmax predict: {message}"
