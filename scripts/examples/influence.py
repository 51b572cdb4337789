"""Which training images made softmax regression mistake a test image? A picture of the answer.

    python -m scripts.examples.influence                    # influence.png, by MNIST
    python -m scripts.examples.influence --check            # and ten trainings without one image

At the optimum v of f = 1/N Σ L_n + λ/2 ‖W‖², an image i that is left out moves v by H⁻¹ ∇L_i / N to
first order, with the Hessian H of f, and so the loss L of the test image by ∇L · H⁻¹ ∇L_i / N. One
linear system, H u = ∇L, is enough for all images: what is left is the slope of each L_i along u.

Source: Koh and Liang, Understanding black-box predictions via influence functions (2017).
"""

import argparse
import copy
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torch_softmax import SoftmaxRegression
from torch_softmax import _checks as checks
from torch_softmax._checks import UserError
from torch_softmax._command_line import Parser, run_command
from torch_softmax._figures import our_style, save
from torch_softmax.curvature import HeadHessian
from torch_softmax.functional import linear_cross_entropy
from torch_softmax.mnist.commands._options import add_data_options
from torch_softmax.mnist.data import ImageDataset, load_dataset
from torch_softmax.mnist.settings import DEFAULT_DATA_DIR, NUM_CLASSES
from torch_softmax.optim.newton import minimize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 10  # of the images that are most to blame, and of those that help most
# The dtype and the gradient norm to train to. What one image changes is lost in the rounding of
# float32, and only to be checked in the other.
USUAL, CHECKED = (torch.float32, 1e-5), (torch.float64, 1e-9)
LIGHT = "#d8d8d8"
WIDTH, HEIGHT = 8.27, 3.2  # inches


class Examples(NamedTuple):
    """Images x (N, D), and their labels (N,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def without(self, i: int) -> "Examples":
        """All but one."""
        return Examples(*(torch.cat([t[:i], t[i + 1 :]]) for t in self))


def examples_of(dataset: ImageDataset, dtype: torch.dtype, count: int | None = None) -> Examples:
    """The first images of a data set."""
    x, y = dataset[torch.arange(len(dataset))[:count]]
    return Examples(x.to(dtype), y)


def fit(model: SoftmaxRegression, train: Examples, weight_decay: float) -> None:
    """Bring a model to the optimum."""
    _, tolerance = CHECKED if model.weight.dtype == torch.float64 else USUAL
    result = minimize(model, *train, weight_decay, tolerance=tolerance)
    if not result.converged:
        raise UserError(
            "weight-decay must be larger for Newton's method to reach the optimum, "
            f"got {weight_decay}: the gradient is still {result.gradient_norm:.1e}"
        )


def most_confident_mistakes(model: SoftmaxRegression, test: Examples) -> Tensor:
    """The indices of all test images that the model mistakes, the most confident one first."""
    with torch.no_grad():
        confidence, predicted = model.predict_proba(test.x).max(1)
    wrong = (predicted != test.y).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True)]


def influences(
    model: SoftmaxRegression, train: Examples, one: Examples, weight_decay: float
) -> Tensor:
    """By how much the loss of one test image changes where a training image is left out, (N,)."""
    parameters = (model.weight, model.bias)
    of_weight, of_bias = torch.autograd.grad(model.loss(*one), parameters)
    H = HeadHessian(train.x, model.weight, linear_bias=model.bias, weight_decay=weight_decay)
    u = H.solve((of_weight, of_bias))

    def losses(weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(train.x, weight, train.y, linear_bias=bias, reduction="none")

    at = tuple(parameter.detach() for parameter in parameters)
    with warnings.catch_warnings():
        # Torch scripts its formulas for forward mode when they are first asked for.
        warnings.filterwarnings("ignore", "`torch.jit.script")
        slopes: Tensor = torch.func.jvp(losses, at, u)[1]
    return slopes / len(train)


def change_without(
    i: int, model: SoftmaxRegression, train: Examples, one: Examples, weight_decay: float
) -> float:
    """The same of one training image, by training to the optimum again."""
    other = copy.deepcopy(model)
    # The mean is over one less, and so its share in f is kept.
    fit(other, train.without(i), weight_decay * len(train) / (len(train) - 1))
    with torch.no_grad():
        return float(other.loss(*one) - model.loss(*one))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of numbers that are all different."""
    ranks = [t.argsort().argsort().double() for t in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def draw(one: Examples, told: str, train: Examples, influence: Tensor, title: str) -> "Figure":
    """The test image, and the training images that raise and lower its loss most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    grid = figure.add_gridspec(
        2, SHOWN + 3, left=0.03, right=0.97, top=0.8, bottom=0.08, hspace=0.6, wspace=0.15
    )
    figure.text(0.03, 0.94, title, fontsize=10, fontweight="bold")
    show(figure.add_subplot(grid[:, :2]), one.x[0], f"the test image, a {int(one.y)}", told)
    order = influence.argsort()
    rows = (
        (
            "to blame: without one of these, the loss of the test image would fall, by",
            order[:SHOWN],
        ),
        ("of help: without one of these, it would rise, by", order.flip(0)[:SHOWN]),
    )
    for row, (heading, chosen) in enumerate(rows):
        for column, i in enumerate(chosen.tolist()):
            axes = figure.add_subplot(grid[row, 3 + column])
            show(axes, train.x[i], str(int(train.y[i])), f"{influence[i]:+.4f}".replace("-", "−"))
            if column == 0:
                axes.annotate(
                    heading, (0, 1.45), xycoords="axes fraction", fontsize=8, fontweight="bold"
                )
    return figure


def show(axes: Any, pixels: Tensor, title: str, note: str) -> None:
    """An image with a line above and one below it."""
    side = math.isqrt(len(pixels))
    axes.imshow(pixels.view(side, side).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[], title=title, xlabel=note)
    axes.spines[:].set(visible=True, color=LIGHT)


def explain(args: argparse.Namespace) -> None:
    """Train, ask for the influence of each training image, and draw it."""
    checks.finite("weight-decay", args.weight_decay, above_zero=True)
    if args.examples is not None:
        checks.positive("examples", args.examples)
    data = load_dataset(args.dataset, args.data_dir or DEFAULT_DATA_DIR)
    dtype, _ = CHECKED if args.check else USUAL
    train, test = examples_of(data.train, dtype, args.examples), examples_of(data.test, dtype)
    model = SoftmaxRegression(train.x.shape[1], NUM_CLASSES, dtype=dtype)
    start = time.perf_counter()
    fit(model, train, args.weight_decay)
    print(f"trained on {len(train):,} images in {time.perf_counter() - start:.1f} s")

    mistakes = most_confident_mistakes(model, test)
    if not 1 <= args.mistake <= len(mistakes):
        raise ValueError(f"mistake must be from 1 to {len(mistakes)}, got {args.mistake}")
    i = int(mistakes[args.mistake - 1])
    one = Examples(test.x[i : i + 1], test.y[i : i + 1])
    with torch.no_grad():
        confidence, predicted = model.predict_proba(one.x)[0].max(0)
    told = f"taken for a {int(predicted)} ({confidence:.0%})"
    print(f"test image {i} of {len(test):,}, of class {int(one.y)}, is {told}")

    start = time.perf_counter()
    influence = influences(model, train, one, args.weight_decay)
    print(f"influence of all training images in {time.perf_counter() - start:.1f} s")
    if args.check:
        compare(influence, model, train, one, args.weight_decay)
    title = f"Why is this {int(one.y)} {told}?"
    save(draw(one, told, train, influence, title), args.output)


def compare(
    influence: Tensor,
    model: SoftmaxRegression,
    train: Examples,
    one: Examples,
    weight_decay: float,
) -> None:
    """Print what leaving out the most influential images one by one does, as told and as done."""
    chosen = influence.abs().argsort(descending=True)[:SHOWN]
    changes = []
    print(f"{'left out':>10}{'label':>8}{'expected':>12}{'trained':>12}")
    for i in tqdm(chosen.tolist(), unit="training", leave=False, disable=None):
        changes.append(change_without(i, model, train, one, weight_decay))
        tqdm.write(f"{i:>10}{int(train.y[i]):>8}{influence[i]:>+12.5f}{changes[-1]:>+12.5f}")
    agreement = rank_correlation(influence[chosen], torch.tensor(changes))
    print(f"rank correlation of the changes of the loss: {agreement:.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = Parser(
        prog="influence",
        description="Train softmax regression to the optimum, and draw the training images that "
        "made it mistake a test image, by influence functions.",
        example="python -m scripts.examples.influence --dataset mnist --check",
    )
    add_data_options(parser)
    parser.add_argument(
        "--examples", type=int, metavar="N", help="how many training images (default: all)"
    )
    parser.add_argument("--weight-decay", type=float, default=1e-3, metavar="X")
    parser.add_argument(
        "--mistake",
        type=int,
        default=1,
        metavar="N",
        help="which of the mistakes, from the most confident one on (default: %(default)s)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"leave out the {SHOWN} most influential images one by one, and train again",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("influence.png"),
        metavar="FILE",
        help="the picture, as PNG, PDF or SVG by its ending (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    with our_style(parser.prog):
        return run_command(parser, lambda: explain(args))


if __name__ == "__main__":
    sys.exit(main())
