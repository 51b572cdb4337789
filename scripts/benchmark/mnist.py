"""An epoch of softmax regression on MNIST, by loops from the usual one to the barest."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from torch_softmax import SoftmaxRegression
from torch_softmax.mnist.data import BatchLoader, ImageDataset, load_dataset
from torch_softmax.mnist.settings import NUM_CLASSES, Settings
from torch_softmax.mnist.training import train_epoch

from .measure import Options, Row, best_seconds, reason

SECTION = "mnist-epoch"
SETTINGS = Settings(epochs=1, batch_size=128, lr=0.01, schedule="constant")
QUICK_SIZE = 6000
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels
BARE = "no DataLoader, no autograd"
BY_INDEX = "the same, batches cut by index"

Batches = Iterable[tuple[Tensor, Tensor]]
Loop = Callable[[], nn.Linear]
Fetch = Callable[[ImageDataset, Tensor], tuple[Tensor, Tensor]]


def mnist_epoch(options: Options) -> Iterator[Row | str]:
    """Time an epoch of each loop, in float32."""
    place = options.place._replace(dtype=torch.float32)
    examples = load_dataset("mnist", options.data_dir).train
    if options.quick:
        examples = ImageDataset(examples.images[:QUICK_SIZE], examples.labels[:QUICK_SIZE], 255)
    loops = in_memory_loops(examples.to(place.device))
    try:
        usual = Subset(torchvision_mnist(options), range(len(examples)))
        loops = {
            "ToTensor and Normalize for each image": lambda: torch_loop(
                shuffled(usual), examples.images.shape[1], place.device
            ),
            **loops,
        }
    except (ImportError, RuntimeError) as error:
        yield f"{SECTION} without torchvision's MNIST: {reason(error)}"
    torch.set_num_threads(place.threads)
    seconds = yield from best_seconds(SECTION, loops, options._replace(place=place))
    shape = f"{len(examples)}x{examples.images.shape[1]}x{NUM_CLASSES}"
    for name, best in seconds.items():
        yield Row(SECTION, shape, name, best, best / seconds[BARE], None, place)


def torchvision_mnist(options: Options) -> Any:
    """The data set as tutorials set it up."""
    from torchvision import datasets, transforms  # slow, and needed only here

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return datasets.MNIST(options.data_dir, transform=transform, download=True)


def in_memory_loops(examples: ImageDataset) -> dict[str, Loop]:
    """The loops over examples in memory, by name."""
    every = torch.arange(len(examples))
    tensors: TensorDataset = TensorDataset(*examples[every])
    features, device = examples.images.shape[1], examples.images.device
    return {
        "tensors in memory": lambda: torch_loop(shuffled(tensors), features, device),
        "ours": lambda: our_loop(examples),
        BY_INDEX: lambda: bare_loop(examples, cut_by_index),
        BARE: lambda: bare_loop(examples, ImageDataset.__getitem__),
    }


def shuffled(dataset: Any) -> Batches:
    """A DataLoader with everything else left as it is."""
    batches: Batches = DataLoader(dataset, SETTINGS.batch_size, shuffle=True)
    return batches


def new_model(features: int, device: torch.device | str) -> nn.Linear:
    """A linear layer of zeros, so that every loop begins with the same."""
    model = nn.Linear(features, NUM_CLASSES, device=device)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def torch_loop(batches: Batches, features: int, device: torch.device | str) -> nn.Linear:
    """The loop as tutorials write it, without any bookkeeping."""
    model = new_model(features, device)
    optimizer = torch.optim.SGD(model.parameters(), SETTINGS.lr)
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.flatten(1)), labels)
        loss.backward()
        optimizer.step()
    return model


def our_loop(examples: ImageDataset) -> nn.Linear:
    """`train_epoch` with `BatchLoader`, which keep the loss and the accuracy as well."""
    features, device = examples.images.shape[1], examples.images.device
    model = SoftmaxRegression(features, NUM_CLASSES, device=device)
    model.load_state_dict(new_model(features, device).state_dict())
    batches = BatchLoader(examples, SETTINGS.batch_size, torch.Generator())
    train_epoch(model, batches, SETTINGS, epoch=0)
    return model


def cut_by_index(examples: ImageDataset, index: Tensor) -> tuple[Tensor, Tensor]:
    """A batch as most write it."""
    return examples.images[index].float() / examples.max_pixel, examples.labels[index]


@torch.no_grad()
def bare_loop(examples: ImageDataset, fetch: Fetch) -> nn.Linear:
    """What can't be left out: fetch a batch, S − y, and the update."""
    model = new_model(examples.images.shape[1], examples.images.device)
    W, b = model.weight, model.bias
    for index in torch.randperm(len(examples)).split(SETTINGS.batch_size):
        images, labels = fetch(examples, index)
        S = torch.addmm(b, images, W.t()).softmax(1)
        S[torch.arange(len(labels)), labels] -= 1  # S − y
        step = SETTINGS.lr / len(labels)
        W.addmm_(S.t(), images, alpha=-step)
        b.sub_(S.sum(0), alpha=step)
    return model
