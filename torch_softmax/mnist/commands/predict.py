"""Tell what is drawn in pictures: a character or a row of them each, as PNG, JPEG or the like.

    torch-softmax predict runs/short photo.jpg scans/
    torch-softmax predict runs/short --json scans/ > predictions.json

A picture may have any size and colours, dark ink on light or light ink on dark. It is cropped,
scaled and centred as the images were that the classifier was trained on (see `mnist.frames`).
Digits may lie on a desk or half in the shade, and several beside each other are told one by one,
from left to right (see `mnist.characters`). Of a folder, the files named like pictures are taken,
in order of their names, and not those in folders within it.

What can't be used is one line on stderr. The exit status is 1 where a file can't be read, and else
3 where a picture shows no character. With --json there is one object for each character, in the
order of the pictures and from left to right in each, and one with the error for what can't be used.
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
from ..characters import NoCharacterError
from ..checkpoints import Checkpoint, CheckpointError, load_checkpoint
from ..frames import FRAMES, Frame, normalize
from ..images import FORMATS, ImageError, read_image

WIDTH = 56  # columns of a bar for 100 %
SHOWN = 0.01  # the least probability that has a bar of its own
UNREADABLE, NO_CHARACTER = 1, 3  # exit statuses; 2 is that of bad options


def run(args: argparse.Namespace) -> int:
    """Print what each picture shows, and return the exit status."""
    if "OMP_NUM_THREADS" not in os.environ:
        # A picture is too little work to share: where another process holds a core, waiting for
        # the second thread takes twenty times as long as the work.
        torch.set_num_threads(1)
    checkpoint = load_checkpoint(args.run_dir)
    model, frame = checkpoint.build_model(), frame_of(checkpoint)
    results: list[dict[str, Any]] = []
    statuses = {0}
    paths = list(find_images(args.images))
    # The bar shows where it takes long, and lines go above it.
    for path in tqdm(paths, unit="image", disable=None, delay=2, leave=False):
        try:
            characters = classify(path, model, frame)
        except ImageError as error:
            is_read = isinstance(error, NoCharacterError)
            line = f"{path}: {error}" if is_read else str(error)
            tqdm.write(f"{args.parser.prog}: {line}", file=sys.stderr)
            results.append({"path": str(path), "error": line})
            statuses.add(NO_CHARACTER if is_read else UNREADABLE)
        else:
            results += characters
            if not args.json:
                tqdm.write(chart(characters))
    if args.json:
        print(json.dumps(results, indent=2))
    return UNREADABLE if UNREADABLE in statuses else max(statuses)


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


def classify(path: Path, model: SoftmaxRegression, frame: Frame) -> list[dict[str, Any]]:
    """Return for each character the path, its class and the probability of each class."""
    pixels = normalize(read_image(path), frame)
    with torch.no_grad():
        probabilities = model.predict_proba(pixels)
    return [
        {"path": str(path), "class": int(row.argmax()), "probabilities": row.tolist()}
        for row in probabilities
    ]


def chart(characters: list[dict[str, Any]]) -> str:
    """Show a picture's characters as text: the path and the classes, and bars.

    A single character has one for each class that is likely, and one of several has its own.
    """
    if len(characters) == 1:
        bars = likely(characters[0]["probabilities"])
    else:
        bars = [(str(c["class"]), max(c["probabilities"])) for c in characters]
    told = " ".join(str(character["class"]) for character in characters)
    return "\n".join([f"{characters[0]['path']}: {told}", *(bar(*each) for each in bars)])


def likely(probabilities: list[float]) -> list[tuple[str, float]]:
    """Return the classes that are likely and their probabilities, falling, and the others'."""
    classes = sorted(range(len(probabilities)), key=lambda k: -probabilities[k])
    shown = [(str(k), probabilities[k]) for k in classes if probabilities[k] >= SHOWN]
    return [*shown, ("others", max(0.0, 1 - sum(share for _, share in shown)))]


def bar(label: str, probability: float) -> str:
    """Show a probability as a number and a bar."""
    return f"  {label:>6}  {probability:6.1%}  {'#' * round(WIDTH * probability)}".rstrip()
