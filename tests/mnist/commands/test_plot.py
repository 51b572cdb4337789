"""The page about a run: what it shows, and how the command takes bad input."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image

from tests.helpers import one_line, texts
from tests.mnist.files import write_mnist
from torch_softmax import _figures
from torch_softmax.__main__ import main
from torch_softmax.mnist.checkpoints import Checkpoint, save_checkpoint
from torch_softmax.mnist.commands import plot
from torch_softmax.mnist.data import ImageDataset, load_dataset
from torch_softmax.mnist.settings import Settings


def checkpoint(dataset="digits", history=()):
    """A run on the digits of as many epochs as it has a history of."""
    start = Checkpoint.start(Settings(epochs=5), load_dataset("digits", "nowhere"))
    return replace(start, dataset=dataset, epoch=len(history), history=list(history))


def epoch(loss, accuracy):
    return {"loss": loss, "accuracy": accuracy, "seconds": 1.0}


HISTORY = [epoch(2.0, 0.5), epoch(1.0, 0.75)]


@pytest.fixture
def run_dir(tmp_path):
    save_checkpoint(tmp_path / "model.pt", checkpoint(history=HISTORY))
    return tmp_path


@pytest.fixture
def empty_page(monkeypatch):
    """An empty figure in place of the page, for tests of what becomes of it."""
    monkeypatch.setattr(plot, "draw_run", lambda *_: Figure())


def panels(run, test):
    """The page, and its axes by the names of the panels."""
    with style.context(["default", _figures.STYLE]):
        figure = plot.draw_run(run, test)
        tight = figure.get_tightbbox()
    # Whatever it shows, it lies within the page.
    assert min(tight.x0, tight.y0) > 0.3
    assert tight.x1 < plot.A4[0] - 0.3
    assert tight.y1 < plot.A4[1] - 0.3
    return {axes.get_label(): axes for axes in figure.axes}


@pytest.fixture(scope="module")
def page():
    run = checkpoint(history=HISTORY)
    return run, panels(run, load_dataset("digits", "nowhere").test)


def test_the_title_tells_the_run_and_its_result(page):
    told = texts(page[1]["title"])[::-1]
    assert told[0] == "Softmax regression on digits"
    assert "of 355 test images right (95% interval" in told[1]
    assert told[2].startswith("epoch 2 of 5 · optimizer sgd · batch size 256")


def test_the_weights_are_images_on_one_symmetric_scale(page):
    run, axes = page
    images = [axes[f"weights {k}"].images[0] for k in range(10)]
    for image, weight in zip(images, run.model["weight"], strict=True):
        assert (image.get_array() == weight.view(8, 8).numpy()).all()
    ((low, high),) = {image.get_clim() for image in images}
    assert low == -high


@pytest.mark.parametrize("name", ["loss", "accuracy"])
@pytest.mark.parametrize("epochs", [0, 1, 3, 100])
def test_a_curve_has_a_point_for_each_epoch_and_the_test(name, epochs):
    history = [epoch(3.0 - i, 0.25 * i) for i in range(epochs)]
    axes = Figure().subplots()
    axes.set_label(name)
    plot.draw_curve(axes, history, 0.5)
    training, test = axes.lines
    assert list(training.get_xdata()) == list(range(1, epochs + 1))
    assert list(training.get_ydata()) == [epoch[name] for epoch in history]
    assert training.get_marker() == ("o" if epochs == 1 else "None")  # there is no line of one
    assert (list(test.get_xdata()), list(test.get_ydata())) == ([epochs], [0.5])
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_the_confusion_has_every_count_and_no_colour_for_what_is_right():
    confusion = torch.arange(100).view(10, 10) + 900 * torch.eye(10, dtype=torch.int64)
    axes = Figure().subplots()
    plot.draw_confusion(axes, confusion)
    assert texts(axes) == [str(count) for count in confusion.flatten().tolist()]
    (image,) = axes.images
    assert (image.get_array().mask == torch.eye(10).bool().numpy()).all()
    assert image.get_clim() == (0, 98)


def shown(wrong):
    """A page on ten images, of which the first are labelled wrongly; pixel k speaks for class k."""
    images = 16 * torch.eye(10, 64, dtype=torch.uint8)
    labels = (torch.arange(10) + (torch.arange(10) < wrong)) % 10
    weight = torch.eye(10, 64) * torch.arange(3.0, 13.0)[:, None]
    run = replace(checkpoint(), model={"weight": weight, "bias": torch.zeros(10)})
    return panels(run, ImageDataset(images, labels, 16)), images


@pytest.mark.parametrize("wrong", [0, 3])
def test_the_mistakes_are_the_wrong_ones_by_confidence(wrong):
    axes, images = shown(wrong)
    mistakes = [axes[f"mistakes {k:02}"] for k in range(20)]
    told = [panel.get_xlabel().split("\n")[0] for panel in mistakes if panel.images]
    assert told == ["3 → 2", "2 → 1", "1 → 0"][3 - wrong :]
    assert texts(axes["title"])[1].startswith(f"{10 - wrong}0.00% of 10 test images right")
    if wrong:
        pixels = mistakes[0].images[0].get_array()
        assert (pixels == images[2].view(8, 8).numpy() / 16).all()


def test_the_calibration_has_a_point_and_a_count_for_each_bin_in_use():
    axes, _ = shown(3)
    odds = torch.arange(3.0, 13.0, dtype=torch.float64).exp()
    confidence = odds / (odds + 9)  # 0.69, 0.86, and eight in the last of 15 bins
    points = axes["calibration"].lines[1]
    means = [*confidence[:2].tolist(), confidence[2:].mean().item()]
    assert list(points.get_xdata()) == pytest.approx(means)
    assert list(points.get_ydata()) == [0, 0, 7 / 8]
    assert [text for text in texts(axes["counts"]) if text] == ["1", "1", "8"]
    error = (confidence[:2].sum() + (confidence[2:].sum() - 7).abs()) / 10
    told = f"expected calibration error {error:.2%}; lines are 95% intervals"
    assert texts(axes["about calibration"])[0] == told


# The command


def test_the_report_is_one_page_of_a4_at_300_dots_an_inch(run_dir, capsys):
    assert main(["plot", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"saved {run_dir / 'report.png'}\n"
    with Image.open(run_dir / "report.png") as image:
        assert image.size == pytest.approx((210 / 25.4 * 300, 297 / 25.4 * 300), abs=1)
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)


@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_the_ending_decides_the_format(run_dir, empty_page, ending):
    output = run_dir / f"page.{ending}"
    assert main(["plot", str(run_dir / "model.pt"), f"--output={output}"]) == 0
    assert output.read_bytes().startswith({"pdf": b"%PDF", "svg": b"<?xml"}[ending])


def test_the_data_are_where_the_run_had_them(tmp_path, monkeypatch, empty_page):
    write_mnist(tmp_path / "lent" / "MNIST" / "raw")
    data = load_dataset("mnist", tmp_path / "lent")
    save_checkpoint(tmp_path / "model.pt", Checkpoint.start(Settings(epochs=5), data))
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(tmp_path)]) == 0


# Bad input


def test_a_run_that_is_not_there(tmp_path, capsys):
    assert main(["plot", str(tmp_path / "none")]) == 1
    assert "No such file or directory" in one_line(capsys)


def test_a_run_whose_data_are_not_to_be_had(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:1/"])
    save_checkpoint(tmp_path / "model.pt", checkpoint("mnist"))
    assert main(["plot", str(tmp_path), f"--data-dir={tmp_path}"]) == 1
    assert "MNIST" in one_line(capsys)
    assert not (tmp_path / "report.png").exists()


def test_an_unknown_ending_leaves_the_old_report(run_dir, empty_page, capsys):
    (run_dir / "report.txt").write_text("old")
    with pytest.raises(SystemExit, match="2"):
        main(["plot", str(run_dir), f"--output={run_dir / 'report.txt'}"])
    assert one_line(capsys).startswith("torch-softmax plot: Format 'txt' is not supported")
    assert (run_dir / "report.txt").read_text() == "old"


def test_a_folder_for_the_output_that_is_not_there(run_dir, empty_page, capsys):
    output = run_dir / "none" / "report.png"
    assert main(["plot", str(run_dir), f"--output={output}"]) == 1
    assert one_line(capsys).startswith(
        f"torch-softmax plot: {output} can't be written: No such file"
    )


def test_without_matplotlib_the_extra_is_named(run_dir, monkeypatch):
    monkeypatch.setattr(_figures, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'pip install "torch_softmax\[plot\]"'):
        main(["plot", str(run_dir)])
