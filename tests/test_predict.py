"""The command that predicts: pictures and folders, its two forms, and its one-line errors."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_mnist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import predict

from torch_softmax.data import load_dataset


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run directory of a classifier of the digits."""
    directory = tmp_path_factory.mktemp("run")
    options = ["--dataset=digits", "--epochs=20", f"--output-dir={directory}"]
    assert train_mnist.main(options) == 0
    return directory


def draw(path, number, scale=16, invert=True):
    """Draw a test image of the digits, large and with a margin; return its label."""
    images, labels = load_dataset("digits", "nowhere").test[torch.tensor([number])]
    ink = images.view(8, 8).mul(255).round().byte()
    picture = Image.fromarray(ink.numpy()).resize((8 * scale, 8 * scale), Image.Resampling.BICUBIC)
    page = Image.new("L", (16 * scale, 12 * scale))
    page.paste(picture, (3 * scale, 2 * scale))
    page.point(lambda value: 255 - value if invert else value).save(path)
    return labels.item()


def predicted(run, capsys, *arguments):
    """The status, the JSON and the lines on stderr."""
    status = predict.main([f"--checkpoint={run}", "--json", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, json.loads(captured.out), captured.err.splitlines()


@pytest.mark.parametrize("invert", [False, True], ids=["light on dark", "dark on light"])
def test_most_pictures_are_told(run, tmp_path, capsys, invert):
    labels = [draw(tmp_path / f"{i:02}.png", i, invert=invert) for i in range(40)]
    status, results, _ = predicted(run, capsys, tmp_path)
    right = [result["class"] == label for result, label in zip(results, labels, strict=True)]
    assert status == 0
    assert sum(right) >= 30  # by chance, 4


def test_probabilities_are_of_all_classes_and_sum_to_1(run, tmp_path, capsys):
    draw(tmp_path / "a.png", 0)
    _, (result,), _ = predicted(run, capsys, tmp_path / "a.png")
    assert len(result["probabilities"]) == 10
    assert sum(result["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert max(result["probabilities"]) == result["probabilities"][result["class"]]


def test_the_chart_names_the_class_and_is_as_long_as_it_is_sure(run, tmp_path, capsys):
    draw(tmp_path / "a.png", 0)
    _, (result,), _ = predicted(run, capsys, tmp_path / "a.png")
    assert predict.main([f"--checkpoint={run}", str(tmp_path / "a.png")]) == 0
    title, *bars = capsys.readouterr().out.splitlines()
    assert title == f"{tmp_path / 'a.png'}: {result['class']}"
    assert bars[0].count("#") == round(predict.WIDTH * max(result["probabilities"]))
    assert max(map(len, bars)) <= 80


def test_a_folder_is_its_pictures_in_order_of_name(run, tmp_path, capsys):
    for name in ("b.png", "a.jpg", ".hidden.png"):
        draw(tmp_path / name, 0)
    (tmp_path / "notes.txt").write_text("no picture")
    status, results, _ = predicted(run, capsys, tmp_path)
    assert status == 0
    assert [Path(result["path"]).name for result in results] == ["a.jpg", "b.png"]


def test_a_file_that_is_no_image_is_one_line_and_the_others_are_told(run, tmp_path, capsys):
    draw(tmp_path / "b.png", 0)
    (tmp_path / "a.png").write_text("no picture")
    status, (broken, told), (line,) = predicted(run, capsys, tmp_path)
    assert status == 1
    assert str(tmp_path / "a.png") in line
    assert line == f"predict.py: {broken['error']}"
    assert "class" in told


def test_a_blank_picture_is_one_line(run, tmp_path, capsys):
    Image.new("L", (50, 40), 255).save(tmp_path / "a.png")
    status, (result,), (line,) = predicted(run, capsys, tmp_path / "a.png")
    assert status == 1
    assert line == f"predict.py: {result['error']}"
    assert str(tmp_path / "a.png") in line


@pytest.mark.parametrize("kind", ["missing", "empty folder"])
def test_nothing_to_look_at_is_one_line(run, tmp_path, capsys, kind):
    path = tmp_path / "a.png" if kind == "missing" else tmp_path
    assert predict.main([f"--checkpoint={run}", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
