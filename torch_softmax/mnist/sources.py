"""The data sets that there are: names, classes, where they lie, and checksums of their files."""

from pathlib import Path
from typing import NamedTuple

NUM_CLASSES = 10  # of every one of them
DEFAULT_DATA_DIR = Path("data")  # where their folders are

ARCHIVES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


class Source(NamedTuple):
    """A data set in MNIST's format: torchvision's class, and the MD5 sums of the ARCHIVES.

    torchvision has these sums too, but takes as long to import as torch itself.
    """

    name: str
    checksums: tuple[str, ...]


SOURCES = {
    "mnist": Source(
        "MNIST",
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": Source(
        "FashionMNIST",
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "kmnist": Source(
        "KMNIST",
        (
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
    ),
}

DATASETS = ("auto", *SOURCES, "digits")
