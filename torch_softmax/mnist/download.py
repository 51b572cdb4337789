"""MNIST and the data sets in its format: fetched by torchvision, and checked before use."""

import hashlib
import math
import os
import shutil
import socket
import struct
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor

from .._checks import UserError
from .sources import ARCHIVES, NUM_CLASSES, Source

PROBE_SECONDS = 4.0
STALL_SECONDS = 20.0


class DataError(UserError):
    """Data that can't be used; the message is one line that says what the user can do."""


class DataNotFoundError(DataError):
    """Data that is neither on disk nor to be had from the network."""


def read_mnist(source: Source, root: Path) -> list[tuple[Tensor, Tensor]]:
    """Return the images and labels of the training and of the test set.

    torchvision only looks whether its files exist. Here the packed ones must have the source's
    checksums, and the unpacked ones must be whole, in the right format, and the same as what the
    packed ones hold, where these are there too.

    Args:
        source: The data set.
        root: Torchvision's root directory; missing files are downloaded to it.

    Returns:
        For each set, uint8 images of shape (N, 784) and int64 labels of shape (N,).

    Raises:
        DataNotFoundError: The files are not on disk and can't be fetched.
        DataError: A file is broken.
    """
    folder = root / source.name / "raw"
    archives = [folder / name for name in ARCHIVES]
    for path, checksum in zip(archives, source.checksums, strict=True):
        if path.exists() and _md5(path) != checksum:
            raise _broken(path, f"does not have {source.name}'s checksum")

    if not all(path.with_suffix("").exists() for path in archives):
        packed = all(path.exists() for path in archives)
        if packed and not os.access(folder, os.W_OK):
            return _read_from_copy(source, archives)
        _fetch(source, root, packed)

    return [_read_part(folder, part) for part in ("train", "t10k")]


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _read_from_copy(source: Source, archives: list[Path]) -> list[tuple[Tensor, Tensor]]:
    """Read packed files from a folder that can't be written, by way of a temporary one."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, source.name, "raw")
        folder.mkdir(parents=True)
        for path in archives:
            shutil.copyfile(path, folder / path.name)
        return read_mnist(source, Path(scratch))


def _fetch(source: Source, root: Path, packed: bool) -> None:
    """Let torchvision download what is missing and unpack it, and leave no half-made file."""
    from torchvision import datasets  # slow, and needed only here

    dataset = getattr(datasets, source.name)
    folder = root / source.name / "raw"
    if not packed and not _any_answers(mirror + ARCHIVES[0] for mirror in dataset.mirrors):
        raise _not_found(source, folder, "no mirror answers")
    before = set(folder.glob("*"))
    timeout = socket.getdefaulttimeout()
    # torchvision sets no timeout of its own: a stalled connection would wait for ever.
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        dataset(root, download=True)
    except BaseException as error:
        for path in set(folder.glob("*")) - before:
            path.unlink()
        if isinstance(error, (RuntimeError, OSError, HTTPException)):
            raise _not_found(source, folder, " ".join(str(error).split())) from error
        raise
    finally:
        socket.setdefaulttimeout(timeout)


def _any_answers(urls: Iterable[str]) -> bool:
    """Whether one of these addresses answers within PROBE_SECONDS."""
    answers: list[str] = []

    def probe(url: str) -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except Exception:  # whatever it is, a download would meet it too
            return
        answers.append(url)

    # In threads, because looking up a name can take minutes and has no timeout.
    threads = [threading.Thread(target=probe, args=(url,), daemon=True) for url in urls]
    deadline = time.monotonic() + PROBE_SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return bool(answers)


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    image_file = folder / f"{part}-images-idx3-ubyte"
    label_file = folder / f"{part}-labels-idx1-ubyte"
    images = _read_idx(image_file, dims=3)
    labels = _read_idx(label_file, dims=1)
    count, height, width = images.shape
    if count == 0 or (height, width) != (28, 28):
        raise _broken(image_file, f"holds {count} images of {height}x{width} pixels, not of 28x28")
    if len(labels) != count:
        raise _broken(label_file, f"holds {len(labels)} labels for {count} images")
    if labels.max() >= NUM_CLASSES:
        raise _broken(
            label_file, f"holds the label {labels.max()}, not only 0 to {NUM_CLASSES - 1}"
        )
    return images.flatten(1), labels.long()


def _read_idx(path: Path, dims: int) -> Tensor:
    """Return what an IDX file of bytes holds, once that agrees with its header and its archive."""
    content = bytearray(path.read_bytes())  # torch wants memory that it could write to
    header_size = 4 * (1 + dims)
    if len(content) < header_size:
        raise _broken(path, "ends within its header")
    magic, *shape = struct.unpack_from(f">{1 + dims}I", content)
    if magic != 0x800 + dims:
        raise _broken(path, f"has the magic number {magic}, not {0x800 + dims}")
    size = len(content) - header_size
    if size != math.prod(shape):
        raise _broken(path, f"holds {size} bytes where its header tells of {math.prod(shape)}")
    archive = path.with_name(path.name + ".gz")
    # The last eight bytes of a gzip file are the CRC-32 and the size of what it holds.
    if archive.exists() and archive.read_bytes()[-8:-4] != struct.pack("<I", zlib.crc32(content)):
        raise _broken(path, f"is not what {archive.name} holds")
    return torch.frombuffer(content, dtype=torch.uint8)[header_size:].reshape(shape)


def _broken(path: Path, problem: str) -> DataError:
    return DataError(f"{path} {problem}: delete it and run again to get it anew")


def _not_found(source: Source, folder: Path, reason: str) -> DataNotFoundError:
    return DataNotFoundError(
        f"{source.name} is not in {folder} and can't be fetched ({reason}): "
        f"put its four .gz files there or name another data directory"
    )
