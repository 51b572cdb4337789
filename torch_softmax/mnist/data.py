"""Data sets of images in memory, and loaders that fetch a whole batch by its indices."""

import gzip
import math
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

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


class BatchIndices(Sampler[Tensor]):
    """The indices of one batch after another, as the arguments of `batch_loader` say."""

    def __init__(
        self,
        size: int,
        batch_size: int,
        generator: torch.Generator | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        checks.positive("batch_size", batch_size)
        self.size = size
        self.batch_size = batch_size
        self.generator = generator
        self.ranks = ranks or Ranks()

    def __len__(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        if self.generator is None:
            order = torch.arange(self.size)
        else:
            order = torch.randperm(self.size, generator=self.generator)
        return map(self.ranks.part, order.split(self.batch_size))


def batch_loader(
    dataset: ImageDataset,
    batch_size: int,
    generator: torch.Generator | None = None,
    ranks: Ranks | None = None,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return a DataLoader that indexes the data set once a batch, not once an example.

    Args:
        dataset: The examples.
        batch_size: The number of examples in a batch; the last batch has what is left.
        generator: Shuffles each pass anew, or None to keep the order.
        ranks: The processes that share each batch, each with a generator of the same state, or
            None for this process alone.

    Returns:
        A loader of (images, labels): float32 of shape (batch_size, D) and int64 of (batch_size,),
        on the data set's device.

    Example:
        >>> dataset = ImageDataset(torch.zeros(5, 4, dtype=torch.uint8), torch.arange(5), 255)
        >>> [labels.tolist() for _, labels in batch_loader(dataset, 2)]
        [[0, 1], [2, 3], [4]]
    """
    batches = BatchIndices(len(dataset), batch_size, generator, ranks)
    # batch_size=None passes what the sampler yields, a batch of indices, to the data set as it is.
    return DataLoader(dataset, sampler=batches, batch_size=None, generator=generator)


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
        name: 'mnist', 'fashion-mnist', 'kmnist' (28x28 pixels, 60,000 + 10,000 images, from
            torchvision's mirrors), 'idx' (other images of ten classes in MNIST's four files),
            'digits' (8x8 pixels, 1,442 + 355 images, part of this package), or 'auto': mnist if it
            is on disk or can be downloaded, else digits.
        data_dir: The root folder of torchvision's data sets, or the folder with the four files.
        notify: Is called with one line when 'auto' falls back to the digits.

    Raises:
        DataNotFoundError: The files are not on disk and can't be downloaded.
        DataError: A file is broken.

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
    is_test = _rank_in_class(labels) % 5 == 4
    train, test = (
        ImageDataset(images[chosen], labels[chosen], max_pixel=16) for chosen in (~is_test, is_test)
    )
    return TrainTest("digits", train, test)


def _rank_in_class(labels: Tensor) -> Tensor:
    """Return how many earlier examples have the same label: int64 of shape (N,)."""
    seen = torch.nn.functional.one_hot(labels, NUM_CLASSES).cumsum(0)  # (N, K)
    return seen.gather(1, labels[:, None])[:, 0] - 1
