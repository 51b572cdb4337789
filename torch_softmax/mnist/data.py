"""Data sets of images in memory, and their batches."""

import gzip
import math
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import _checks as checks
from ..distributed.data_parallel import Ranks
from .download import DataNotFoundError, read_mnist
from .settings import DATASETS, NUM_CLASSES


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels held in memory, and indexed by a whole batch of numbers at a time.

    The pixels stay uint8, and become float32 from 0 to 1 as they are fetched: pixel / max_pixel.

    Args:
        images: uint8 of shape (N, D), one flattened image a row.
        labels: int64 of shape (N,).
        max_pixel: The value of a fully inked pixel.

    Example:
        >>> dataset = ImageDataset(torch.tensor([[0, 8], [16, 4]], dtype=torch.uint8),
        ...                        torch.tensor([3, 7]), max_pixel=16)
        >>> dataset[torch.tensor([1, 0])]
        (tensor([[1.0000, 0.2500],
                [0.0000, 0.5000]]), tensor([7, 3]))
    """

    def __init__(self, images: Tensor, labels: Tensor, max_pixel: int) -> None:
        if images.shape[:1] != labels.shape:
            raise ValueError(
                f"labels must have shape {tuple(images.shape[:1])}, one for each image, "
                f"got {tuple(labels.shape)}"
            )
        self.images = images
        self.labels = labels
        self.max_pixel = max_pixel

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.labels.device)
        # index_select copies whole rows, several times as fast as images[index] does.
        pixels = self.images.index_select(0, index)
        return pixels.float().div_(self.max_pixel), self.labels.index_select(0, index)

    def to(self, device: torch.device | str) -> "ImageDataset":
        """Return the same examples on a device."""
        return ImageDataset(self.images.to(device), self.labels.to(device), self.max_pixel)


class BatchLoader:
    """Batches of a data set on its device, each indexed at once: float32 (B, D) and int64 (B,).

    Args:
        dataset: The examples.
        batch_size: B; the last batch has what is left.
        generator: Shuffles each pass anew, or None to keep the order.
        ranks: The processes that share each batch, each with a generator of the same state, or
            None for this process alone.

    Example:
        >>> dataset = ImageDataset(torch.zeros(5, 4, dtype=torch.uint8), torch.arange(5), 255)
        >>> [labels.tolist() for _, labels in BatchLoader(dataset, 2)]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        generator: torch.Generator | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        checks.positive("batch_size", batch_size)
        self.dataset, self.batch_size, self.generator = dataset, batch_size, generator
        self.ranks = ranks or Ranks()

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.dataset))
        if self.generator is not None:
            order = torch.randperm(len(order), generator=self.generator)
            # Torch's DataLoader, with which older runs began, then draws such a number.
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        for indices in order.split(self.batch_size):
            yield self.dataset[self.ranks.part(indices)]


class TrainTest(NamedTuple):
    """A data set with its fixed split, and the absolute path that it was loaded from, if any."""

    name: str
    train: ImageDataset
    test: ImageDataset
    data_dir: str | None = None


def load_dataset(
    name: str, data_dir: str | Path, notify: Callable[[str], None] = print
) -> TrainTest:
    """Load a data set, downloading it to `data_dir` if it isn't there yet.

    Args:
        name: 'mnist', 'fashion-mnist', 'kmnist' (28x28 pixels, 60,000 + 10,000 images, downloaded),
            'idx' (other images of ten classes in MNIST's four files),
            'digits' (8x8 pixels, 1,442 + 355 images, part of this package), or 'auto': mnist if it
            is on disk or can be downloaded, else digits.
        data_dir: The root folder of torchvision's data sets, or the folder with the four files.
        notify: Is called with one line when 'auto' falls back to the digits.

    Example:
        >>> digits = load_dataset("digits", data_dir="data")
        >>> len(digits.train), len(digits.test)
        (1442, 355)
    """
    checks.one_of("dataset", name, DATASETS)
    if name == "digits":
        return _load_digits()
    if name != "auto":
        root = Path(data_dir).expanduser()
        parts = read_mnist(name, root)
        train, test = (ImageDataset(*part, max_pixel=255) for part in parts)
        return TrainTest(name, train, test, str(root.absolute()))
    try:
        return load_dataset("mnist", data_dir)
    except DataNotFoundError as error:
        notify(f"{error}; training on the embedded 8x8 digits instead")
        return load_dataset("digits", data_dir)


def _load_digits() -> TrainTest:
    packed = (files("torch_softmax.mnist") / "digits" / "digits.csv.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    table = torch.tensor([[int(value) for value in line.split(",")] for line in lines])
    images, labels = table[:, :-1].to(torch.uint8), table[:, -1]
    seen = torch.nn.functional.one_hot(labels, NUM_CLASSES).cumsum(0)  # (N, K)
    is_test = seen.gather(1, labels[:, None])[:, 0] % 5 == 0  # each fifth of a class
    train, test = (
        ImageDataset(images[chosen], labels[chosen], max_pixel=16) for chosen in (~is_test, is_test)
    )
    return TrainTest("digits", train, test)
