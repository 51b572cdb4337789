"""Train softmax regression on MNIST, or a data set like it, from the command line."""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from torch_softmax import SoftmaxRegression, __version__
from torch_softmax._command_line import Parser
from torch_softmax.data import (
    DATASETS,
    NUM_CLASSES,
    DataError,
    ImageDataset,
    batch_loader,
    load_dataset,
)
from torch_softmax.training import (
    DEFAULTS,
    SCHEDULES,
    DivergenceError,
    Score,
    Settings,
    evaluate,
    save_checkpoint,
    train_epoch,
    write_atomically,
)

EVALUATION_BATCH = 2000


def build_parser() -> Parser:
    """The options, with their help."""
    parser = Parser(
        prog="train_mnist.py",
        description="Train softmax regression by gradient descent on batches, and test it.",
        epilog=epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=DATASETS,
        default="auto",
        help="auto (the default) is mnist if it is on disk or can be downloaded, else digits, "
        "which are part of the package",
    )
    data.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where data sets lie or are downloaded to (default: %(default)s)",
    )
    # What is not given stays out of the result, for the data set's own default to stand.
    training = parser.add_argument_group("training", argument_default=argparse.SUPPRESS)
    training.add_argument("--epochs", type=int, metavar="N", help="passes over the training set")
    training.add_argument("--batch-size", type=int, metavar="N", help="examples for one update")
    training.add_argument("--lr", type=float, metavar="X", help="learning rate at the start")
    training.add_argument(
        "--schedule", choices=tuple(SCHEDULES), help="how the learning rate goes on"
    )
    training.add_argument(
        "--weight-decay", type=float, metavar="X", help="pull of the weights towards 0"
    )
    training.add_argument(
        "--seed", type=int, metavar="N", help="of the first weights and the order of the examples"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto (the default) is a GPU if there is one",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="where model.pt and metrics.json go, replacing any that are there "
        "(default: a new runs/DATASET-DATE-TIME)",
    )
    return parser


def epilog() -> str:
    """The training defaults of each data set, and an example."""
    names = [field.name for field in fields(Settings)]
    rows = [["", *(f"--{name.replace('_', '-')}" for name in names)]]
    rows += [
        [dataset, *(str(getattr(settings, name)) for name in names)]
        for dataset, settings in DEFAULTS.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    example = "python train_mnist.py --dataset mnist --epochs 10 --output-dir runs/short"
    return "\n  ".join(["training defaults:", *table]) + f"\n\nexample:\n  {example}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    given = {
        field.name: getattr(args, field.name) for field in fields(Settings) if field.name in args
    }
    try:
        Settings(**given)  # refuses bad values before any data are loaded
        device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    try:
        run(args, given, device)
    except (DataError, DivergenceError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; what was saved stays", file=sys.stderr)
        return 130
    return 0


def choose_device(name: str) -> torch.device:
    """The device of a name, or the best that torch finds for 'auto'."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, is_there in available.items() if is_there)
    if not available[name]:
        found = ", ".join(device for device, is_there in available.items() if is_there)
        raise ValueError(f"device must be one that torch finds here ({found}), got {name!r}")
    return torch.device(name)


def run(args: argparse.Namespace, given: dict[str, Any], device: torch.device) -> None:
    """Load the data, train, test and save; settings that are not given are the data set's."""
    if args.output_dir is not None:
        check_writable(args.output_dir)
    data = load_dataset(
        args.dataset, args.data_dir, notify=lambda line: print(line, file=sys.stderr)
    )
    settings = replace(DEFAULTS[data.name], **given)
    if "OMP_NUM_THREADS" not in os.environ:
        # A batch is too little work to share: a second thread gains a fifth on an idle machine, and
        # waiting for it, when another process holds its core, can make the run ten times as long.
        torch.set_num_threads(1)
    output_dir = args.output_dir or new_run_directory(data.name)
    print(
        f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images, "
        f"{data.train.images.shape[1]} pixels, on {device.type}"
    )

    torch.manual_seed(settings.seed)
    model = SoftmaxRegression(data.train.images.shape[1], NUM_CLASSES, device=device)
    epochs = train(model, data.name, data.train.to(device), settings, output_dir)
    test = evaluate(model, batch_loader(data.test.to(device), EVALUATION_BATCH))

    metrics = {
        "dataset": data.name,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "train_seconds": sum(epoch["seconds"] for epoch in epochs),
        "epochs": epochs,
        "settings": {**asdict(settings), "device": device.type, "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    write_atomically(output_dir / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    print(
        f"test accuracy {test.accuracy:.2%}, test loss {test.loss:.4f}, "
        f"{settings.epochs} epochs in {metrics['train_seconds']:.1f} s"
    )
    print(f"saved {output_dir / 'model.pt'} and {output_dir / 'metrics.json'}")


def check_writable(directory: Path) -> None:
    """Make a directory if need be, and raise at once if no file can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(f"output-dir {directory} can't be written: {error.strerror}") from error


def new_run_directory(dataset: str) -> Path:
    """Make a directory named after the data set and the time, which was not there before."""
    name = f"{dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    parent = Path("runs")
    check_writable(parent)
    directory = parent / name
    number = 1
    while True:
        try:
            directory.mkdir()
        except FileExistsError:
            number += 1
            directory = parent / f"{name}-{number}"
        else:
            return directory


def train(
    model: SoftmaxRegression,
    dataset: str,
    examples: ImageDataset,
    settings: Settings,
    output_dir: Path,
) -> list[dict[str, float]]:
    """Train, save and print a line epoch by epoch; return each one's loss, accuracy and seconds."""
    generator = torch.Generator().manual_seed(settings.seed)
    batches = batch_loader(examples, settings.batch_size, generator)
    checkpoint = output_dir / "model.pt"
    epochs = []
    with tqdm(total=settings.epochs * len(batches), unit="batch", disable=None) as bar:

        def show(batches_done: int, score: Score) -> None:
            bar.set_postfix(
                loss=f"{score.loss:.4f}", accuracy=f"{score.accuracy:.2%}", refresh=False
            )
            bar.update(epoch * len(batches) + batches_done - bar.n)

        for epoch in range(settings.epochs):
            start = time.perf_counter()
            try:
                score = train_epoch(model, batches, settings, epoch, show)
            except DivergenceError as error:
                kept = f"; {checkpoint} keeps epoch {epoch}" if epoch > 0 else ""
                raise DivergenceError(f"in epoch {epoch + 1} {error}{kept}") from error
            seconds = time.perf_counter() - start
            save_checkpoint(checkpoint, model, settings, epoch + 1, dataset)
            # It would tell of the model that has just been replaced.
            (output_dir / "metrics.json").unlink(missing_ok=True)
            epochs.append({"loss": score.loss, "accuracy": score.accuracy, "seconds": seconds})
            tqdm.write(
                f"epoch {epoch + 1:>{len(str(settings.epochs))}}/{settings.epochs}  "
                f"loss {score.loss:.4f}  accuracy {score.accuracy:.2%}  {seconds:.2f} s"
            )
    return epochs


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "torch_softmax": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
    }


if __name__ == "__main__":
    sys.exit(main())
