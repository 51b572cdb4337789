"""Fit a linear probe for each of many penalties, and keep the one that predicts best.

    python scripts/probe.py train.npz test.npz
    python scripts/probe.py train_X.npy,train_y.npy --holdout 0.1 --standardize --json

A file holds X (N, D), such as the embeddings of a frozen model, and y (N,): an .npz or .pt with
these two, or two .npy with a comma between. The penalty is chosen on examples of the training file
that are held out, fold by fold or once, and the model is then fitted to all of it.
"""

import argparse
import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import ShuffleSplit, StratifiedKFold
from torch import Tensor

from .. import _checks as checks
from .._checks import UserError
from .._command_line import Parser, add_device_option, choose_device, run_command
from .._files import write_atomically
from ..losses._chunked import slices
from ..mnist.metrics import Estimate, proportion
from ..optim._rows import Rows, as_tensor
from ._cross_validation import SoftmaxClassifierCV
from ._files import File, read_file

_READ = 2**24  # numbers of X to look at at a time


def build_parser() -> Parser:
    """The options, with their help."""
    parser = Parser(
        prog="probe.py",
        description="Fit softmax regression to its optimum for many penalties, choose by accuracy "
        "on held-out examples, and test.",
        example="python scripts/probe.py train.npz test.npz --holdout 0.1",
    )
    parser.add_argument("train", metavar="TRAIN", help="an .npz or .pt of X and y, or X.npy,y.npy")
    parser.add_argument("test", metavar="TEST", nargs="?", help="the same, to test on")
    parser.add_argument(
        "--Cs",
        nargs=3,
        type=float,
        metavar=("LOW", "HIGH", "COUNT"),
        default=[1e-6, 1e5, 45],
        help="the inverse strengths of the penalty, log-spaced (default: DINOv2's 1e-6 1e5 45)",
    )
    held = parser.add_mutually_exclusive_group()
    held.add_argument("--folds", type=int, default=5, metavar="N", help="default: %(default)s")
    held.add_argument(
        "--holdout", type=float, metavar="X", help="hold out this part of TRAIN once instead"
    )
    parser.add_argument(
        "--standardize", action="store_true", help="give features mean 0 and deviation 1 first"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is held out")
    add_device_option(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("probe.pt"),
        metavar="FILE",
        help="the chosen model: its coefficients, and the state of an nn.Linear that takes X as it "
        "is in the files (default: %(default)s)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy over C")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return run_command(parser, lambda: probe(args))


def probe(args: argparse.Namespace) -> None:
    """Fit, choose, test, and tell."""
    Cs = _values(*args.Cs)
    checks.seed("seed", args.seed)
    train = read_file(args.train)
    test = None if args.test is None else read_file(args.test)
    if test is not None:
        _check_alike(train, test, args)
    folds = _folds(train, args)
    shift, scale = _moments(train.X) if args.standardize else (0.0, 1.0)
    classifier = SoftmaxClassifierCV(
        Cs, cv=folds, verbose=sys.stderr.isatty(), device=choose_device(args.device)
    )
    with _lines_of_warnings(), _errors_of(args.train):
        classifier.fit(Rows(train.X, shift, scale), train.y)
    sizes = torch.tensor([len(held) for _, held in folds], dtype=torch.float64)
    right = (torch.from_numpy(classifier.scores_) * sizes.unsqueeze(1)).sum(0).round()
    path = proportion(right, sizes.sum().expand(len(Cs)))
    result: dict[str, Any] = {
        "path": [
            {"C": C, "accuracy": _numbers(path, number)} for number, C in enumerate(classifier.Cs_)
        ],
        "C": classifier.C_,
    }
    if test is not None:
        with _errors_of(args.test):
            predicted = classifier.predict(Rows(test.X, shift, scale))
        correct = torch.tensor(int((predicted == np.asarray(test.y)).sum()))
        tested = proportion(correct.view(1), torch.tensor([len(predicted)]))
        result["test_accuracy"] = _numbers(tested, 0)
    _save(classifier, shift, scale, args.output)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n".join([*_table(result), f"saved {args.output}"]))
    if args.plot is not None:
        _draw(result, args.plot)


def _values(low: float, high: float, count: float) -> list[float]:
    """The values of C."""
    if not 0 < low <= high < float("inf") or count < 1 or count != int(count):
        raise ValueError(
            f"Cs must be two numbers above 0, rising, and a count, got {low:g} {high:g} {count:g}"
        )
    return [float(C) for C in np.geomspace(low, high, int(count))]


def _check_alike(train: File, test: File, args: argparse.Namespace) -> None:
    """Raise unless a classifier of one file can be tested on the other."""
    if test.X.shape[1] != train.X.shape[1]:
        raise UserError(
            f"{args.test} must have {train.X.shape[1]} features as {args.train} has, "
            f"got {test.X.shape[1]}"
        )
    learnt, asked = np.asarray(train.y), np.asarray(test.y)
    # As Python's own values, for NumPy would find 1 among strings.
    if set(learnt.tolist()).isdisjoint(asked.tolist()):
        raise UserError(
            f"{args.test} must have labels of {args.train}, whose y is {learnt.dtype}, "
            f"got none of them in {asked.dtype}"
        )


def _folds(train: File, args: argparse.Namespace) -> list[Any]:
    """What is held out: pairs of indices, (train, held)."""
    y = np.asarray(train.y)
    if args.holdout is not None:
        if not 0 < args.holdout < 1:
            raise ValueError(f"holdout must lie between 0 and 1, got {args.holdout}")
        return list(ShuffleSplit(1, test_size=args.holdout, random_state=args.seed).split(y))
    if args.folds < 2:
        raise ValueError(f"folds must be at least 2, got {args.folds}")
    splitter = StratifiedKFold(args.folds, shuffle=True, random_state=args.seed)
    return list(splitter.split(y, y))


def _moments(X: Any) -> tuple[Tensor, Tensor]:
    """The mean of each feature, and 1 by its standard deviation; 1 where it is constant."""
    x = as_tensor("X", X)
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    squares, parts = total.clone(), max(1, _READ // x.shape[1])
    for rows in slices(len(x), parts):
        total += x[rows].double().sum(0)
    mean = total / len(x)
    for rows in slices(len(x), parts):
        squares += (x[rows].double() - mean).square().sum(0)
    variance = squares / len(x)
    # What rounding makes of the variance of a constant, at most.
    epsilon = torch.finfo(torch.float64).eps
    rounding = len(x) * epsilon * variance + (len(x) * epsilon * mean).square()
    return mean, torch.where(variance > rounding, variance, 1).rsqrt()


def _numbers(estimate: Estimate, number: int) -> dict[str, float]:
    return {name: float(value[number]) for name, value in estimate._asdict().items()}


@contextmanager
def _lines_of_warnings() -> Iterator[None]:
    """Tell each warning of the block in a line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(
        str(warning.message) for warning in caught if warning.category is ConvergenceWarning
    ):
        print(f"probe.py: {message}", file=sys.stderr)


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Tell which file it is that the block can't use."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{name} can't be used: {str(error).splitlines()[0]}") from None


def _save(classifier: SoftmaxClassifierCV, shift: Any, scale: Any, path: Path) -> None:
    """Write the chosen model: W (x − shift) ∘ scale + b = (W ∘ scale) x + b − (W ∘ scale) shift."""
    model = classifier.to_linear().cpu()
    dtype, linear = model.weight.dtype, model.double()
    W = linear.weight.detach() * scale
    b = linear.bias.detach() - (W @ shift if isinstance(shift, Tensor) else 0)
    saved = {
        "C": classifier.C_,
        "classes": classifier.classes_.tolist(),
        "coef": torch.as_tensor(classifier.coef_),
        "intercept": torch.as_tensor(classifier.intercept_),
        "shift": shift,
        "scale": scale,
        "linear": {"weight": W.to(dtype), "bias": b.to(dtype)},
    }
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    write_atomically(path, buffer.getvalue())


def _table(result: dict[str, Any]) -> Iterator[str]:
    """The path and the choice, to read."""
    yield "         C  held-out accuracy with its 95 % interval"
    for row in result["path"]:
        mark = "  chosen" if row["C"] == result["C"] else ""
        yield f"{row['C']:10.3g}  {_interval(row['accuracy'])}{mark}"
    if "test_accuracy" in result:
        yield f"test accuracy {_interval(result['test_accuracy'])}"


def _interval(accuracy: dict[str, float]) -> str:
    return f"{accuracy['value']:.2%} [{accuracy['low']:.2%}, {accuracy['high']:.2%}]"


def _draw(result: dict[str, Any], path: Path) -> None:
    """Draw accuracy over C."""
    from .._figures import GREY, our_style, save

    with our_style("probe.py"):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.6, 2.4), layout="constrained")
        axes = figure.subplots()
        Cs = [row["C"] for row in result["path"]]
        value, low, high = (
            [row["accuracy"][name] for row in result["path"]] for name in ("value", "low", "high")
        )
        axes.fill_between(Cs, low, high, color=GREY, alpha=0.25, linewidth=0)
        axes.plot(Cs, value, marker="o")
        axes.axvline(result["C"], color=GREY, linewidth=0.6)
        axes.set(xscale="log", xlabel="C", ylabel="held-out accuracy")
        save(figure, path)
