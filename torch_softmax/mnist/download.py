"""MNIST and data sets in its format: found on disk or downloaded, and checked before use."""

import gzip
import io
import math
import socket
import struct
import sys
import tempfile
import zlib
from contextlib import redirect_stderr, redirect_stdout
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor

from .._checks import UserError
from .settings import NUM_CLASSES

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}  # its names
PARTS = ("train", "t10k")
FILES = [f"{part}-{kind}" for part in PARTS for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
SILENCE = 20.0  # seconds to wait for the next bytes of a mirror


class DataError(UserError):
    """Data that can't be used; the message is one line that says what the user can do."""


class DataNotFoundError(DataError):
    """Data that are neither on disk nor can be downloaded."""


def find_folder(name: str, root: Path) -> Path | None:
    """Return the folder with a data set's four files, in torchvision's root or `root` itself."""
    folders = [root / TORCHVISION[name] / "raw", root] if name in TORCHVISION else [root]
    return next((folder for folder in folders if not _missing(folder)), None)


def read_mnist(name: str, root: Path) -> list[tuple[Tensor, Tensor]]:
    """Return the images and labels of the training and of the test set, uint8 (N, 784), int64 (N,).

    Each file may be packed (.gz), by any program, or unpacked, which is preferred. What the file
    holds is checked, not its own bytes.

    Args:
        name: 'mnist', 'fashion-mnist' or 'kmnist', whose missing files torchvision downloads, or
            'idx', for other images of ten classes in the same four files.
        root: Torchvision's root directory, or the folder with the four files.

    Raises:
        DataNotFoundError: A file is not on disk and can't be downloaded.
        DataError: A file is broken, or can't be read.
    """
    folder = find_folder(name, root)
    if folder is None and name not in TORCHVISION:
        raise DataNotFoundError(
            f"{name} needs the files {', '.join(FILES)}, packed as .gz or not, in {root}"
        )
    if folder is None:
        folder = root / TORCHVISION[name] / "raw"
        _download(TORCHVISION[name], folder)
    try:
        return [_read_part(folder, part) for part in PARTS]
    except OSError as error:
        raise DataError(f"{error.filename or folder} can't be read: {error.strerror}") from error


def _missing(folder: Path) -> list[str]:
    """Return the names of the files that are there neither unpacked nor packed."""
    return [n for n in FILES if not (folder / n).exists() and not (folder / f"{n}.gz").exists()]


def _download(class_name: str, folder: Path) -> None:
    """Let torchvision download each missing file from its mirrors, and check its MD5 sum."""
    from torchvision import datasets  # slow, and needed only here

    dataset = getattr(datasets, class_name)
    checksums = dict(dataset.resources)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        for name in _missing(folder):
            packed, failures = f"{name}.gz", []
            for mirror in dataset.mirrors:
                try:
                    _fetch(mirror + packed, folder / packed, checksums[packed])
                    break
                except (OSError, RuntimeError, HTTPException) as error:
                    failures.append(f"{mirror}: {' '.join(str(error).split())}")
            else:
                raise DataNotFoundError(
                    f"{class_name} is not in {folder} and can't be downloaded "
                    f"({'; '.join(failures)}): put its four files there or name another --data-dir"
                )
    finally:
        socket.setdefaulttimeout(timeout)


def _fetch(url: str, path: Path, checksum: str) -> None:
    """Download a file, which gets its name only once it is whole; the bar is for terminals only."""
    from torchvision.datasets.utils import download_url

    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=path.parent) as scratch,
        redirect_stdout(io.StringIO()),
        redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()),
    ):
        download_url(url, scratch, path.name, checksum)
        Path(scratch, path.name).replace(path)


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images, image_file = _read_idx(folder, f"{part}-images-idx3-ubyte", dims=3)
    labels, label_file = _read_idx(folder, f"{part}-labels-idx1-ubyte", dims=1)
    count, *size = images.shape
    if count == 0 or size != [28, 28]:
        raise _broken(image_file, f"holds {count} images of {size} pixels, not of [28, 28]")
    if len(labels) != count:
        raise _broken(label_file, f"holds {len(labels)} labels for {count} images")
    if labels.max() >= NUM_CLASSES:
        raise _broken(label_file, f"holds the label {labels.max()}, not only 0 to 9")
    return images.flatten(1), labels.long()


def _read_idx(folder: Path, name: str, dims: int) -> tuple[Tensor, Path]:
    """Return what an IDX file of bytes holds, once that agrees with its header, and its path."""
    is_packed = not (folder / name).exists()
    path = folder / (f"{name}.gz" if is_packed else name)
    content = path.read_bytes()
    if is_packed:
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _broken(path, "is damaged") from error
    header_size = 4 * (1 + dims)
    if len(content) < header_size:
        raise _broken(path, "ends within its header")
    magic, *shape = struct.unpack_from(f">{1 + dims}I", content)
    if magic != 0x800 + dims:
        raise _broken(path, f"has the magic number {magic}, not {0x800 + dims}")
    size = len(content) - header_size
    if size != math.prod(shape):
        raise _broken(path, f"holds {size} bytes, but its header says {math.prod(shape)}")
    # torch needs memory that it could write to.
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)[header_size:]
    return values.reshape(shape), path


def _broken(path: Path, problem: str) -> DataError:
    return DataError(f"{path} {problem}: delete it and run again")
