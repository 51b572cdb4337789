"""Draw a report of a training run on one page: weights, curves, mistakes."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._command_line import Parser
from ..._figures import GREY, our_style, save
from ..settings import NUM_CLASSES
from ._options import add_data_dir_option, add_run_argument

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..checkpoints import Checkpoint
    from ..data import ImageDataset
    from ..metrics import CalibrationCurve

A4 = (8.27, 11.69)  # inches
GRID = {"left": 0.1, "right": 0.94, "top": 0.95, "bottom": 0.06, "hspace": 0.45, "wspace": 0.2}
# The panels of each row, and its height. A star stands for ten small images.
ROWS = {
    ("title",): 0.6,
    ("about weights",): 0.4,
    ("weights *",): 0.75,
    ("about loss", "about accuracy"): 0.4,
    ("loss", "accuracy"): 1.3,
    ("about confusion", "about calibration"): 0.4,
    ("confusion", "calibration"): 2.2,
    ("confusion", "counts"): 1.1,
    ("about mistakes",): 0.4,
    ("mistakes 0*",): 0.75,
    ("mistakes 1*",): 0.75,
}
NOTES = {
    "weights": "ink on red speaks for the class, ink on blue against it",
    "loss": "training: mean over each epoch; test: at the end",
    "accuracy": "training: mean over each epoch; test: at the end",
    "confusion": "number of test images; the colours compare mistakes only",
    "calibration": "expected calibration error {error:.2%}; lines are 95% intervals",
    "mistakes": "the most confident: true → predicted class, and its confidence",
}
LIGHT, BLUE, ORANGE = "#d8d8d8", "#005a8f", "#b34700"  # which colour-blind readers can tell apart
FULL_COLOUR = 0.995  # the quantile of the weights' sizes that has the full colour
TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "kmnist": "KMNIST"}


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command `plot`."""
    parser = commands.add_parser(
        "plot",
        help="draw a page about a training: weights, curves, mistakes",
        description="Draw a report of a training run on one page: weights, learning curves, "
        "confusion, calibration and the most confident mistakes.",
        example="torch-softmax plot runs/short",
    )
    add_run_argument(parser)
    add_data_dir_option(parser, default=None)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the page goes, as PNG, PDF or SVG by its ending (default: RUN_DIR/report.png)",
    )


def run(args: argparse.Namespace) -> None:
    """Draw the page about a run, and save it."""
    from ..checkpoints import CHECKPOINT_NAME, load_checkpoint, run_directory

    with our_style(args.parser.prog):
        run_dir = run_directory(args.run_dir)
        checkpoint = load_checkpoint(run_dir / CHECKPOINT_NAME)
        data = checkpoint.load_data(args.data_dir)
        save(draw_run(checkpoint, data.test), args.output or run_dir / "report.png")


def draw_run(checkpoint: "Checkpoint", test: "ImageDataset") -> "Figure":
    """Return the page about a run and its test examples; its axes are labelled by panel."""
    import torch
    from matplotlib.figure import Figure

    from .. import metrics

    model = checkpoint.build_model()
    images, labels = test[torch.arange(len(test))]
    with torch.no_grad():
        probabilities, loss = model.predict_proba(images), model.loss(images, labels).item()
    confusion = metrics.confusion_matrix(labels, probabilities.argmax(1), NUM_CLASSES)
    accuracy = metrics.rates(confusion)["accuracy"]
    curve = metrics.calibration_curve(probabilities, labels)

    figure = Figure(figsize=A4, facecolor="white")
    mosaic: list[Any] = [columns(panels) for panels in ROWS]
    heights = list(ROWS.values())
    axes = figure.subplot_mosaic(mosaic, height_ratios=heights, gridspec_kw=GRID, empty_sentinel="")
    title = f"Softmax regression on {TITLES.get(checkpoint.dataset, checkpoint.dataset)}"
    result = (
        f"{accuracy.value:.2%} of {len(test):,} test images right "
        f"(95% interval {accuracy.low:.2%} to {accuracy.high:.2%}), mean loss {loss:.4f}"
    )
    settings = checkpoint.settings.used()
    words = [f"epoch {checkpoint.epoch} of {settings.pop('epochs')}"]
    words += [f"{name.replace('_', ' ')} {value}" for name, value in settings.items()]
    write(axes["title"], 18, title, result, " · ".join(words))
    for name, note in NOTES.items():
        write(axes[f"about {name}"], 10, name.capitalize(), note.format(error=curve.error))
    draw_weights([axes[f"weights {k}"] for k in range(NUM_CLASSES)], model.weight.detach())
    draw_curve(axes["loss"], checkpoint.history, loss)
    draw_curve(axes["accuracy"], checkpoint.history, accuracy.value.item())
    draw_confusion(axes["confusion"], confusion)
    draw_calibration(axes["calibration"], axes["counts"], curve)
    slots = [axes[f"mistakes {k:02}"] for k in range(2 * NUM_CLASSES)]
    draw_mistakes(slots, images, labels, probabilities)
    return figure


def columns(panels: tuple[str, ...]) -> list[str]:
    """Return the name of the panel in each of twenty columns of a row."""
    if len(panels) == 2:  # with a gap for the numbers beside the axes
        return [panels[0]] * 9 + [""] * 2 + [panels[1]] * 9
    return [panels[0].replace("*", str(k // 2)) for k in range(2 * NUM_CLASSES)]


def write(axes: "Axes", size: int, title: str, *lines: str) -> None:
    """Write a title and lines in place of a panel, the last line in grey."""
    axes.axis("off")
    for k, line in enumerate(lines[::-1]):
        color, fontsize = ("black", 10) if k else (GREY, None)
        axes.text(0, (k - 0.4) / (1 + len(lines)), line, color=color, fontsize=fontsize)
    place = (len(lines) - 0.4) / (1 + len(lines))
    axes.text(0, place, title, fontsize=size, fontweight="bold")


def show_image(axes: "Axes", pixels: "Tensor", label: str, cmap: str, low: float) -> None:
    """Show the pixels of a square image on a scale from `low` to its absolute value, or 1."""
    side = math.isqrt(len(pixels))
    high = -low or 1.0
    axes.imshow(pixels.view(side, side).numpy(), cmap=cmap, vmin=low, vmax=high)
    axes.set(xticks=[], yticks=[], xlabel=label)
    axes.spines[:].set(visible=True, color=LIGHT)


def draw_weights(slots: "list[Axes]", weight: "Tensor") -> None:
    """Show the weights of each class as an image, all on one scale."""
    limit = weight.abs().quantile(FULL_COLOUR).item()
    for k, (axes, pixels) in enumerate(zip(slots, weight, strict=True)):
        show_image(axes, pixels, str(k), "RdBu_r", -limit)


def draw_curve(axes: "Axes", history: list[dict[str, float]], test: float) -> None:
    """Show the loss or the accuracy over the epochs, and on the test set at their end."""
    from matplotlib.ticker import MaxNLocator

    name = str(axes.get_label())
    values, marker = [epoch[name] for epoch in history], "o" if len(history) == 1 else None
    axes.plot(range(1, len(history) + 1), values, color=BLUE, marker=marker, label="training")
    axes.plot(len(history), test, "D", color=ORANGE, markersize=4, label="test")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if name == "accuracy":
        in_percent(axes.yaxis)
    axes.legend()


def in_percent(axis: Any) -> None:
    """Write the numbers of an axis as percentages."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")


def draw_confusion(axes: "Axes", confusion: "Tensor") -> None:
    """Show how often each class was predicted as each other."""
    mistakes = confusion.double().fill_diagonal_(math.nan)
    most = max(mistakes.nan_to_num().max().item(), 1.0)
    axes.imshow(mistakes.numpy(), cmap="Oranges", vmin=0, vmax=most)
    for true, row in enumerate(confusion.tolist()):
        for predicted, count in enumerate(row):
            is_dark = true != predicted and count > 0.6 * most
            color = "white" if is_dark else "black" if count else LIGHT
            axes.text(predicted, true, count, ha="center", va="center", color=color)
    classes = range(NUM_CLASSES)
    axes.set(xticks=classes, yticks=classes, xlabel="predicted class", ylabel="true class")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_calibration(rates: "Axes", counts: "Axes", curve: "CalibrationCurve") -> None:
    """Show how often the predictions of each bin are right, and how many there are."""
    import torch

    from ..metrics import proportion

    confidence, accuracy, sizes = (values[curve.counts > 0] for values in curve)
    _, low, high = proportion((accuracy * sizes).round(), sizes)
    ends = torch.stack([accuracy - low, high - accuracy]).numpy()
    rates.plot([0, 1], [0, 1], color=LIGHT)
    points = rates.errorbar(confidence.numpy(), accuracy.numpy(), ends, fmt="o", color=BLUE)
    points.lines[0].set_clip_on(False)
    rates.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", xticklabels=[])
    in_percent(rates.yaxis)

    bins = len(curve.counts)
    edges = [k / bins for k in range(bins)]
    bars = counts.bar(edges, curve.counts.numpy(), 1 / bins, align="edge", color=BLUE, ec="w")
    labels = [f"{count:,}" if count else "" for count in curve.counts.tolist()]
    counts.bar_label(bars, labels, fontsize=6, rotation="vertical", padding=2)
    most = curve.counts.max().item()
    counts.set(xlim=(0, 1), yscale="log", ylim=(0.8, 20 * most))
    counts.set(xlabel="confidence", ylabel="images (log)")
    counts.tick_params(axis="y", which="both", left=False, labelleft=False)
    counts.spines["left"].set_visible(False)
    in_percent(counts.xaxis)


def draw_mistakes(
    slots: "list[Axes]", images: "Tensor", labels: "Tensor", probabilities: "Tensor"
) -> None:
    """Show the wrong predictions of the highest confidence."""
    confidence, prediction = probabilities.max(1)
    wrong = (prediction != labels).nonzero()[:, 0]
    chosen = wrong[confidence[wrong].argsort(descending=True)].tolist()[: len(slots)]
    for axes, i in zip(slots, chosen, strict=False):
        told = f"{labels[i]} → {prediction[i]}\n{confidence[i]:.1%}"
        show_image(axes, images[i], told, "gray_r", 0)
    for axes in slots[len(chosen) :]:
        axes.axis("off")
