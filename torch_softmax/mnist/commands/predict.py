"""Predict the digit in each picture, from PNG, JPEG and similar files.

    torch-softmax predict runs/short --json photo.jpg scans/ > predictions.json

See `mnist.pictures` for what is read and what is refused. A picture that can't be used is one line
on stderr, and with --json an object with an error in place of a class.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._command_line import Parser
from ._options import add_run_argument

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint
    from ..pictures import Frame

WIDTH = 56  # columns of a bar for 100 %
SHOWN = 0.01  # the least probability that has a bar of its own
UNREADABLE, NO_DIGIT = 1, 3  # exit statuses; bad options exit with 2


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command `predict`."""
    parser = commands.add_parser(
        "predict",
        help="predict the digit in each of your own pictures",
        description="Predict the digit in each picture, and the probability of each class. "
        "A picture shows one digit, dark on light or light on dark, on an even ground.",
        epilog="exit status: 1 if a picture can't be read, else 3 if one doesn't show one digit",
        example="torch-softmax predict runs/short photo.jpg scans/",
    )
    add_run_argument(parser)
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="a picture, or a folder: then each picture in it, in order of name",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array of all results")


def run(args: argparse.Namespace) -> int:
    """Print the digit in each picture, and return the exit status."""
    import torch

    from ..checkpoints import load_checkpoint
    from ..pictures import NoDigitError, PictureError, normalize, read_grey

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a picture is too little work to share
    checkpoint = load_checkpoint(args.run_dir)
    model, frame = checkpoint.build_model(), frame_for(checkpoint)
    results: list[dict[str, Any]] = []
    statuses = {0}
    for path in find_pictures(args.images):
        try:
            pixels = normalize(read_grey(path), frame)
        except PictureError as error:
            has_pixels = isinstance(error, NoDigitError)
            line = f"{path}: {error}" if has_pixels else str(error)
            print(f"{args.parser.prog}: {line}", file=sys.stderr)
            results.append({"path": str(path), "error": line})
            statuses.add(NO_DIGIT if has_pixels else UNREADABLE)
            continue
        with torch.no_grad():
            probabilities = model.predict_proba(pixels[None])[0].tolist()
        digit = probabilities.index(max(probabilities))
        results.append({"path": str(path), "class": digit, "probabilities": probabilities})
        if not args.json:
            print("\n".join([f"{path}: {digit}", *bars(probabilities)]))
    if args.json:
        print(json.dumps(results, indent=2))
    return UNREADABLE if UNREADABLE in statuses else max(statuses)


def frame_for(checkpoint: "Checkpoint") -> "Frame":
    """Return how to make images for a classifier."""
    from ..checkpoints import CheckpointError
    from ..pictures import FRAMES

    name = "mnist" if checkpoint.dataset == "idx" else checkpoint.dataset
    if name not in FRAMES:
        raise CheckpointError(f"the checkpoint is of a model for {name}; predict reads digits only")
    frame = FRAMES[name]
    checkpoint.check_pixels((frame.side // frame.block) ** 2, checkpoint.dataset)
    return frame


def find_pictures(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield each path, or for a folder each picture in it that is not hidden."""
    from PIL import Image

    from ..pictures import FORMATS

    endings = {end for end, name in Image.registered_extensions().items() if name in FORMATS}
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        inside = [
            file
            for file in sorted(path.iterdir())
            if file.suffix.lower() in endings and file.name[0] != "." and file.is_file()
        ]
        if not inside:
            raise FileNotFoundError(f"{path} holds no image")
        yield from inside


def bars(probabilities: list[float]) -> Iterator[str]:
    """Yield a line with a bar for each likely class, the likeliest first, and for all others."""
    classes = sorted(range(len(probabilities)), key=lambda k: -probabilities[k])
    shown = [(str(k), probabilities[k]) for k in classes if probabilities[k] >= SHOWN]
    others = max(0.0, 1 - sum(share for _, share in shown))
    for name, share in [*shown, ("others", others)]:
        yield f"  {name:>6}  {share:6.1%}  {'#' * round(WIDTH * share)}".rstrip()
