"""The page about a trained classifier: its weights, how it learned, where it is right and wrong."""

import math
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from ... import SoftmaxRegression
from ..._figures import GREY
from .. import metrics
from ..checkpoints import Checkpoint
from ..data import ImageDataset
from ..settings import NUM_CLASSES

WIDTH, HEIGHT = 8.27, 11.69  # A4; these and all places on the page are in inches
MARGIN = 0.65
PANEL = 3.3  # the width of a panel that has another beside it
RIGHT = WIDTH - MARGIN - PANEL  # where the panels on the right begin
INDENT = 0.4  # of the axes from the edge of their panel, for the numbers there
AXES_WIDTH = PANEL - INDENT
BELOW_HEADING = 0.3
GAP = 0.12  # between two small images
IMAGE = (WIDTH - 2 * MARGIN + GAP) / NUM_CLASSES - GAP
IMAGE_BELOW_HEADING = 0.42
MISTAKES = 2 * NUM_CLASSES

LIGHT = "#d8d8d8"
BLUE, ORANGE = "#005a8f", "#b34700"  # which the colour-blind tell apart
PALE_BLUE, PALE_ORANGE = "#79b4d9", "#f2a878"
SIGNED = LinearSegmentedColormap.from_list("", [BLUE, PALE_BLUE, "white", PALE_ORANGE, ORANGE])
COUNTS = LinearSegmentedColormap.from_list("", ["white", PALE_ORANGE, ORANGE])
DIAGONAL = "#dbe9f3"
FULL_COLOUR = 0.995  # the quantile of the weights' sizes from which on they have the full colour

TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "kmnist": "KMNIST"}
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")


class Page:
    """A sheet of A4, with places in inches from its top left corner."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Add axes whose top left corner is at (x, y)."""
        bottom = 1 - (y + height) / HEIGHT
        return self.figure.add_axes((x / WIDTH, bottom, width / WIDTH, height / HEIGHT))

    def image(self, column: int, y: float, pixels: Tensor, **options: Any) -> Axes:
        """Add a small image in one of ten columns, from its pixels in a row."""
        axes = self.axes(MARGIN + column * (IMAGE + GAP), y, IMAGE, IMAGE)
        side = math.isqrt(len(pixels))
        axes.imshow(pixels.view(side, side).numpy(), interpolation="nearest", **options)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=LIGHT)
        return axes

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write a line whose baseline begins at (x, y)."""
        self.figure.text(x / WIDTH, 1 - y / HEIGHT, text, **style)

    def heading(self, x: float, y: float, title: str, note: str) -> None:
        """Write the title of a panel, and under it how to read the panel."""
        self.text(x, y, title, fontsize=10, fontweight="bold")
        self.text(x, y + 0.17, note, color=GREY)


def draw_run(checkpoint: Checkpoint, test: ImageDataset) -> Figure:
    """Draw the page.

    Args:
        checkpoint: The run.
        test: Examples that it has not seen, of as many pixels as its model takes.

    Returns:
        A figure of the size of A4.
    """
    model = checkpoint.build_model()
    images, labels = test[torch.arange(len(test))]
    with torch.no_grad():
        probabilities, loss = model.predict_proba(images), model.loss(images, labels).item()
    confusion = metrics.confusion_matrix(labels, probabilities.argmax(1), NUM_CLASSES)
    accuracy = metrics.rates(confusion)["accuracy"]
    result = (
        f"{accuracy.value:.2%} of {len(test):,} test images right "
        f"(95% interval {accuracy.low:.2%} to {accuracy.high:.2%}), mean loss {loss:.4f}"
    )

    page = Page()
    draw_title(page, 0.72, checkpoint, result)
    draw_weights(page, 1.6, model)
    draw_curve(page, MARGIN, 3.05, "loss", checkpoint.history, loss)
    draw_curve(page, RIGHT, 3.05, "accuracy", checkpoint.history, accuracy.value.item())
    draw_confusion(page, 5.2, confusion)
    draw_calibration(page, 5.2, probabilities, labels)
    draw_mistakes(page, 9.15, images, labels, probabilities)
    return page.figure


def draw_title(page: Page, y: float, checkpoint: Checkpoint, result: str) -> None:
    """Say which run this is, and how good it became."""
    dataset = TITLES.get(checkpoint.dataset, checkpoint.dataset)
    settings = checkpoint.settings.used()
    told = [f"epoch {checkpoint.epoch} of {settings.pop('epochs')}"]
    told += [f"{name.replace('_', ' ')} {value}" for name, value in settings.items()]
    page.text(MARGIN, y, f"Softmax regression on {dataset}", fontsize=18, fontweight="bold")
    page.text(MARGIN, y + 0.27, result, fontsize=10)
    page.text(MARGIN, y + 0.47, " · ".join(told), color=GREY)


def draw_weights(page: Page, y: float, model: SoftmaxRegression) -> None:
    """Show the weights of each class as an image, all on one scale."""
    weight = model.weight.detach()
    limit = weight.abs().quantile(FULL_COLOUR).item()
    page.heading(MARGIN, y, "Weights", "ink on orange speaks for the class, ink on blue against it")
    for k, pixels in enumerate(weight):
        axes = page.image(k, y + IMAGE_BELOW_HEADING, pixels, cmap=SIGNED, vmin=-limit, vmax=limit)
        axes.set_title(str(k))
    bar = page.axes(WIDTH - MARGIN - 1.6, y - 0.09, 1.6, 0.09)
    page.figure.colorbar(axes.images[0], cax=bar, orientation="horizontal", extend="both")


def draw_curve(
    page: Page, x: float, y: float, name: str, history: list[dict[str, float]], test: float
) -> None:
    """Show the loss or the accuracy over the epochs, and on the test set at their end."""
    page.heading(x, y, name.capitalize(), "training: mean over each epoch; test: at the end")
    axes = page.axes(x + INDENT, y + BELOW_HEADING, AXES_WIDTH, 1.15)
    done = len(history)
    axes.plot(
        range(1, done + 1),
        [epoch[name] for epoch in history],
        color=BLUE,
        marker="o" if done == 1 else None,
        label="training",
    )
    axes.plot(done, test, "D", color=ORANGE, markersize=4, label="test")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if name == "accuracy":
        axes.yaxis.set_major_formatter(PERCENT)
    axes.legend()


def draw_confusion(page: Page, y: float, confusion: Tensor) -> None:
    """Show how often each class was taken for each other."""
    page.heading(MARGIN, y, "Confusion", "number of test images; the colours compare mistakes only")
    axes = page.axes(MARGIN + INDENT, y + BELOW_HEADING, AXES_WIDTH, AXES_WIDTH)
    mistakes = confusion.double().fill_diagonal_(math.nan)
    most = max(mistakes.nan_to_num().max().item(), 1.0)
    axes.imshow(mistakes.numpy(), cmap=COUNTS.with_extremes(bad=DIAGONAL), vmin=0, vmax=most)
    for true, row in enumerate(confusion.tolist()):
        for predicted, count in enumerate(row):
            is_dark = true != predicted and count > 0.6 * most
            color = "white" if is_dark else "black" if count else LIGHT
            axes.text(predicted, true, count, ha="center", va="center", color=color)
    classes = range(NUM_CLASSES)
    axes.set(xticks=classes, yticks=classes, xlabel="predicted class", ylabel="true class")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_calibration(page: Page, y: float, probabilities: Tensor, labels: Tensor) -> None:
    """Show how often predictions of a confidence are right, and how many there are."""
    curve = metrics.calibration_curve(probabilities, labels)
    note = f"expected calibration error {curve.error:.2%}; lines are 95% intervals"
    page.heading(RIGHT, y, "Calibration", note)
    draw_reliability(page.axes(RIGHT + INDENT, y + BELOW_HEADING, AXES_WIDTH, 1.95), curve)
    draw_counts(page.axes(RIGHT + INDENT, y + BELOW_HEADING + 2.05, AXES_WIDTH, 0.85), curve.counts)


def draw_reliability(axes: Axes, curve: metrics.CalibrationCurve) -> None:
    """Show how often the predictions of each bin are right, beside their confidence."""
    confidence, accuracy, counts = (values[curve.counts > 0] for values in curve)
    _, low, high = metrics.proportion((accuracy * counts).round(), counts)
    axes.plot([0, 1], [0, 1], color=LIGHT)
    axes.errorbar(
        confidence.numpy(),
        accuracy.numpy(),
        yerr=torch.stack([accuracy - low, high - accuracy]).numpy(),
        fmt="o",
        color=BLUE,
        elinewidth=0.8,
        clip_on=False,
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    axes.tick_params(labelbottom=False)
    axes.yaxis.set_major_formatter(PERCENT)


def draw_counts(axes: Axes, counts: Tensor) -> None:
    """Show the number of predictions in each bin."""
    edges = torch.linspace(0, 1, len(counts) + 1)
    bars = axes.bar(
        edges[:-1].numpy(), counts.numpy(), 1 / len(counts), align="edge", color=PALE_BLUE, ec="w"
    )
    labels = [f"{count:,}" if count else "" for count in counts.tolist()]
    axes.bar_label(bars, labels, fontsize=6, rotation="vertical", padding=2)
    most = counts.max().item()
    axes.set(xlim=(0, 1), yscale="log", ylim=(0.8, 20 * most), xlabel="confidence")
    axes.set_ylabel("images (log)")
    axes.tick_params(axis="y", which="both", left=False, labelleft=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(PERCENT)


def draw_mistakes(
    page: Page, y: float, images: Tensor, labels: Tensor, probabilities: Tensor
) -> None:
    """Show the wrong predictions of the highest confidence."""
    page.heading(MARGIN, y, "Most confident mistakes", "true → predicted class, and its confidence")
    confidence, prediction = probabilities.max(1)
    wrong = (prediction != labels).nonzero()[:, 0]
    chosen = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES]
    for place, i in enumerate(chosen.tolist()):
        row, column = divmod(place, NUM_CLASSES)
        top = y + IMAGE_BELOW_HEADING + row * (IMAGE + 0.42)
        axes = page.image(column, top, images[i], cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(f"{labels[i]} → {prediction[i]}")
        axes.set_xlabel(f"{confidence[i]:.1%}", color=GREY, labelpad=2)
