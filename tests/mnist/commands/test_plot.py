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
from torch_softmax import SoftmaxRegression, _figures
from torch_softmax.__main__ import main
from torch_softmax.mnist.checkpoints import Checkpoint, save_checkpoint
from torch_softmax.mnist.commands import _page
from torch_softmax.mnist.data import ImageDataset, load_dataset
from torch_softmax.mnist.settings import Settings


def checkpoint(dataset="digits", history=()):
    """A run on the digits of as many epochs as it has a history of."""
    start = Checkpoint.start(Settings(epochs=5), load_dataset("digits", "nowhere"))
    return replace(start, dataset=dataset, epoch=len(history), history=list(history))


def epoch(loss, accuracy):
    return {"loss": loss, "accuracy": accuracy, "seconds": 1.0}


@pytest.fixture
def run_dir(tmp_path):
    save_checkpoint(tmp_path / "model.pt", checkpoint(history=[epoch(2.0, 0.5), epoch(1.0, 0.75)]))
    return tmp_path


@pytest.fixture
def empty_page(monkeypatch):
    """In the place of the page, where the test is of what becomes of it."""
    monkeypatch.setattr(_page, "draw_run", lambda *_: Figure())


@pytest.fixture
def page():
    return _page.Page()


# The page


def test_the_report_is_one_page_of_a4_at_300_dots_an_inch(run_dir, capsys):
    assert main(["plot", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"saved {run_dir / 'report.png'}\n"
    with Image.open(run_dir / "report.png") as image:
        assert image.size == pytest.approx((210 / 25.4 * 300, 297 / 25.4 * 300), abs=1)
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_nothing_lies_outside_of_the_page():
    with style.context(["default", _figures.STYLE]):
        figure = _page.draw_run(checkpoint(), load_dataset("digits", "nowhere").test)
        tight = figure.get_tightbbox()
    assert tight.x0 > 0.3
    assert tight.x1 < _page.WIDTH - 0.3
    assert tight.y0 > 0.3
    assert tight.y1 < _page.HEIGHT - 0.3


def test_the_title_tells_the_run_and_its_result(page):
    _page.draw_title(page, 1, checkpoint("fashion-mnist", [epoch(2.0, 0.5)]), "half are right")
    told = texts(page.figure)
    assert told[:2] == ["Softmax regression on Fashion-MNIST", "half are right"]
    assert told[2].startswith("epoch 1 of 5 · optimizer sgd · batch size 256")


@pytest.mark.parametrize("side", [8, 28])
def test_the_weights_are_images_on_one_symmetric_scale(page, side):
    model = SoftmaxRegression(side * side, 10)
    _page.draw_weights(page, 1, model)
    images = [axes.images[0] for axes in page.figure.axes[:10]]
    for image, weight in zip(images, model.weight.detach(), strict=True):
        assert (image.get_array() == weight.view(side, side).numpy()).all()
    ((low, high),) = {image.get_clim() for image in images}
    assert low == -high


@pytest.mark.parametrize("name", ["loss", "accuracy"])
@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_a_curve_has_a_point_for_each_epoch_and_the_test(page, name, epochs):
    history = [epoch(3.0 - i, 0.25 * i) for i in range(epochs)]
    _page.draw_curve(page, 1, 1, name, history, 0.5)
    training, test = page.figure.axes[0].lines
    assert list(training.get_xdata()) == list(range(1, epochs + 1))
    assert list(training.get_ydata()) == [epoch[name] for epoch in history]
    assert (list(test.get_xdata()), list(test.get_ydata())) == ([epochs], [0.5])


@pytest.mark.parametrize("epochs", [0, 1, 3, 100])
def test_epochs_are_counted_in_whole_numbers(page, epochs):
    _page.draw_curve(page, 1, 1, "loss", [epoch(1.0, 0.5)] * epochs, 0.5)
    ticks = page.figure.axes[0].get_xticks()
    assert len(ticks) > 0
    assert all(tick == round(tick) for tick in ticks)


def test_a_single_epoch_is_a_point_as_there_is_no_line(page):
    _page.draw_curve(page, 1, 1, "loss", [epoch(1.0, 0.5)], 0.5)
    assert page.figure.axes[0].lines[0].get_marker() == "o"


def test_the_confusion_has_every_count_and_no_colour_for_what_is_right(page):
    confusion = torch.arange(100).view(10, 10) + 900 * torch.eye(10, dtype=torch.int64)
    _page.draw_confusion(page, 1, confusion)
    (axes,) = page.figure.axes
    assert texts(axes) == [str(count) for count in confusion.flatten().tolist()]
    (image,) = axes.images
    assert (image.get_array().mask == torch.eye(10).bool().numpy()).all()
    assert image.get_clim() == (0, 98)


def test_the_calibration_has_a_point_and_a_count_for_each_bin_in_use(page):
    probabilities = torch.tensor([[0.9, 0.1], [0.88, 0.12], [0.3, 0.7], [0.4, 0.6]])
    _page.draw_calibration(page, 1, probabilities, torch.tensor([0, 1, 1, 1]))
    reliability, counts = page.figure.axes
    points = reliability.lines[1]
    assert list(points.get_xdata()) == pytest.approx([0.6, 0.7, 0.89])
    assert list(points.get_ydata()) == [1.0, 1.0, 0.5]
    assert [text for text in texts(counts) if text] == ["1", "1", "2"]
    # 0.25 * (0.4 + 0.3) + 0.5 * (0.89 - 0.5)
    assert "expected calibration error 37.00%" in texts(page.figure)[1]


def mistakes(page):
    return [(axes.get_title(), axes.get_xlabel()) for axes in page.figure.axes]


def test_the_mistakes_are_the_wrong_ones_by_confidence(page):
    probabilities = torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.125, 0.875], [0.25, 0.75]])
    images = torch.rand(4, 64)
    _page.draw_mistakes(page, 1, images, torch.tensor([1, 0, 0, 1]), probabilities)
    assert mistakes(page) == [("0 → 1", "87.5%"), ("1 → 0", "75.0%")]
    shown = page.figure.axes[0].images[0].get_array()
    assert (shown == images[2].view(8, 8).numpy()).all()


@pytest.mark.parametrize(("wrong", "shown"), [(0, 0), (3, 3), (50, 20)])
def test_as_many_mistakes_as_there_are_and_as_there_is_room_for(page, wrong, shown):
    probabilities = torch.tensor([[0.25, 0.75]]).repeat(50, 1)
    labels = (torch.arange(50) >= wrong).long()
    _page.draw_mistakes(page, 1, torch.rand(50, 64), labels, probabilities)
    assert len(mistakes(page)) == shown


def test_a_classifier_without_a_mistake_has_a_page(tmp_path):
    images = torch.zeros(10, 64, dtype=torch.uint8)
    images[range(10), range(10)] = 16
    model = {"weight": 9 * torch.eye(10, 64), "bias": torch.zeros(10)}
    perfect = replace(checkpoint(), model=model)
    figure = _page.draw_run(perfect, ImageDataset(images, torch.arange(10), 16))
    assert texts(figure)[1].startswith("100.00% of 10 test images right")


@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_the_ending_decides_the_format(run_dir, empty_page, ending):
    output = run_dir / f"page.{ending}"
    assert main(["plot", str(run_dir), f"--output={output}"]) == 0
    assert output.read_bytes().startswith({"pdf": b"%PDF", "svg": b"<?xml"}[ending])


@pytest.mark.parametrize("given", ["", "model.pt"])
def test_a_run_is_its_directory_or_its_checkpoint(run_dir, empty_page, given):
    assert main(["plot", str(run_dir / given)]) == 0
    assert (run_dir / "report.png").exists()


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


def test_a_run_must_be_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plot"])
    assert "RUN_DIR" in one_line(capsys)


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
