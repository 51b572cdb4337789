"""Tell what is drawn in pictures: one character each, as PNG, JPEG or the like.

    torch-softmax predict runs/short photo.jpg scans/
    torch-softmax predict runs/short --json scans/ > predictions.json

A picture may have any size and colours, dark ink on light or light ink on dark. It is cropped,
scaled and centred as the images were that the classifier was trained on (see `mnist.images`).
Of a folder, the files named like pictures are taken, in order of their names, and not those in
folders within it. What can't be used is one line on stderr, and the exit status is then 1.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ... import SoftmaxRegression
from ..checkpoints import Checkpoint, CheckpointError, load_checkpoint
from ..images import (
    FORMATS,
    FRAMES,
    BlankImageError,
    Frame,
    ImageError,
    normalize,
    read_image,
)

WIDTH = 56  # columns of a bar for 100 %
SHOWN = 0.01  # the least probability that has a bar of its own


def run(args: argparse.Namespace) -> int:
    """Print what each picture shows; return 1 where one can't be used."""
    if "OMP_NUM_THREADS" not in os.environ:
        # A picture is too little work to share: where another process holds a core, waiting for
        # the second thread takes twenty times as long as the work.
        torch.set_num_threads(1)
    checkpoint = load_checkpoint(args.run_dir)
    model, frame = checkpoint.build_model(), frame_of(checkpoint)
    results = []
    paths = list(find_images(args.images))
    # The bar shows where it takes long, and lines go above it.
    for path in tqdm(paths, unit="image", disable=None, delay=2, leave=False):
        try:
            result = classify(path, model, frame)
        except ImageError as error:
            tqdm.write(f"{args.parser.prog}: {error}", file=sys.stderr)
            result = {"path": str(path), "error": str(error)}
        else:
            if not args.json:
                tqdm.write(chart(result))
        results.append(result)
    if args.json:
        print(json.dumps(results, indent=2))
    return int(any("error" in result for result in results))


def frame_of(checkpoint: Checkpoint) -> Frame:
    """How to make images for a classifier."""
    frame = FRAMES[checkpoint.dataset]
    features = checkpoint.model["weight"].shape[1]
    if features != frame.pixels:
        raise CheckpointError(
            f"the checkpoint is of a model for {features} pixels, "
            f"but {checkpoint.dataset} has {frame.pixels}"
        )
    return frame


def find_images(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield each path, or for a folder each picture in it."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        inside = sorted(file for file in path.iterdir() if looks_like_image(file))
        if not inside:
            raise FileNotFoundError(f"{path} holds no image")
        yield from inside


def looks_like_image(path: Path) -> bool:
    """Whether a file in a folder is named like a picture, and not hidden."""
    return path.suffix.lower() in FORMATS and not path.name.startswith(".") and path.is_file()


def classify(path: Path, model: SoftmaxRegression, frame: Frame) -> dict[str, Any]:
    """Return the path of a picture, its class and the probability of each class."""
    try:
        pixels = normalize(read_image(path), frame)
    except BlankImageError as error:
        raise ImageError(f"{path}: {error}") from error
    with torch.no_grad():
        probabilities = model.predict_proba(pixels)
    return {
        "path": str(path),
        "class": int(probabilities.argmax()),
        "probabilities": probabilities.tolist(),
    }


def chart(result: dict[str, Any]) -> str:
    """Show a result as text: the path and the class, and a bar for each class that is likely."""
    probabilities = result["probabilities"]
    classes = sorted(range(len(probabilities)), key=lambda k: -probabilities[k])
    likely = {str(k): probabilities[k] for k in classes if probabilities[k] >= SHOWN}
    likely["others"] = max(0.0, 1 - sum(likely.values()))
    bars = [bar(label, probability) for label, probability in likely.items()]
    return "\n".join([f"{result['path']}: {result['class']}", *bars])


def bar(label: str, probability: float) -> str:
    """Show a probability as a number and a bar."""
    return f"  {label:>6}  {probability:6.1%}  {'#' * round(WIDTH * probability)}".rstrip()
