"""MNIST and the data sets in its format: downloaded if need be, and checked before use."""

import gzip
import hashlib
import math
import os
import struct
import tempfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .._checks import UserError
from .mirrors import FetchError, fetch
from .sources import ARCHIVES, NUM_CLASSES, Source


class DataError(UserError):
    """Data that can't be used; the message is one line that says what the user can do."""


class DataNotFoundError(DataError):
    """Data that is neither on disk nor to be had from the network."""


def read_mnist(source: Source, root: Path) -> list[tuple[Tensor, Tensor]]:
    """Return the images and labels of the training and of the test set.

    The files lie where torchvision has them, which only looks whether they exist. Here the packed
    ones must have the source's checksums, and the unpacked ones must be whole, in the right format,
    and the same as what the packed ones hold, where these are there too.

    Args:
        source: The data set.
        root: Torchvision's root directory; missing files are downloaded to it and unpacked.

    Returns:
        For each set, uint8 images of shape (N, 784) and int64 labels of shape (N,).

    Raises:
        DataNotFoundError: The files are not on disk and can't be fetched.
        DataError: A file is broken, or can't be read.
    """
    folder = root / source.name / "raw"
    try:
        for name, checksum in zip(ARCHIVES, source.checksums, strict=True):
            path = folder / name
            if path.exists() and _md5(path) != checksum:
                raise _broken(path, f"does not have {source.name}'s checksum")
        _fetch_missing(source, folder)
        return [_read_part(folder, part) for part in ("train", "t10k")]
    except OSError as error:
        raise DataError(f"{error.filename or folder} can't be read: {error.strerror}") from error


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _fetch_missing(source: Source, folder: Path) -> None:
    """Download each file that is there neither packed nor unpacked."""
    checksums = dict(zip(ARCHIVES, source.checksums, strict=True))
    missing = [
        name
        for name in ARCHIVES
        if not (folder / name).exists() and not (folder / name).with_suffix("").exists()
    ]
    if not missing:
        return
    mirrors = _mirrors(source)
    for name in missing:
        try:
            has_it, content = fetch(mirrors, name, checksums[name])
            _write(folder / name, content)
        except (FetchError, DataError) as error:
            raise DataNotFoundError(
                f"{source.name} is not in {folder} and can't be fetched ({error}): "
                f"put its four .gz files there or name another data directory"
            ) from error
        mirrors.sort(key=lambda mirror: mirror != has_it)  # the next file begins with this one


def _mirrors(source: Source) -> list[str]:
    """The addresses to download from, with those over HTTP at the end.

    These are for a machine that has no certificates; the checksums keep them honest.
    """
    from torchvision import datasets  # slow, and needed only here

    mirrors = getattr(datasets, source.name).mirrors
    secure = [mirror for mirror in mirrors if mirror.startswith("https:")]
    return [*mirrors, *(mirror.replace("https:", "http:", 1) for mirror in secure)]


def _write(path: Path, content: bytes) -> None:
    """Write a file in one step, even where other processes do so at the same time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch, path.name)
            whole.write_bytes(content)
            whole.replace(path)
    except OSError as error:
        raise DataError(f"{path} can't be written: {error.strerror}") from error


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
    archive = path.with_name(path.name + ".gz")
    packed = archive.read_bytes() if archive.exists() else None
    if packed is not None and not path.exists():
        unpacked = gzip.decompress(packed)
        if os.access(path.parent, os.W_OK):
            _write(path, unpacked)
    else:
        unpacked = path.read_bytes()
    content = bytearray(unpacked)  # torch wants memory that it could write to
    header_size = 4 * (1 + dims)
    if len(content) < header_size:
        raise _broken(path, "ends within its header")
    magic, *shape = struct.unpack_from(f">{1 + dims}I", content)
    if magic != 0x800 + dims:
        raise _broken(path, f"has the magic number {magic}, not {0x800 + dims}")
    size = len(content) - header_size
    if size != math.prod(shape):
        raise _broken(path, f"holds {size} bytes where its header tells of {math.prod(shape)}")
    # The last eight bytes of a gzip file are the CRC-32 and the size of what it holds.
    if packed is not None and packed[-8:-4] != struct.pack("<I", zlib.crc32(content)):
        raise _broken(path, f"is not what {archive.name} holds")
    return torch.frombuffer(content, dtype=torch.uint8)[header_size:].reshape(shape)


def _broken(path: Path, problem: str) -> DataError:
    return DataError(f"{path} {problem}: delete it and run again to get it anew")
