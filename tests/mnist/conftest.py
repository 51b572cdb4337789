"""Classifiers of the digits and of MNIST, as a run would have saved them."""

from dataclasses import replace

import pytest
import torch

from tests.helpers import ROOT
from torch_softmax.mnist.checkpoints import Checkpoint
from torch_softmax.mnist.data import BatchLoader, load_dataset
from torch_softmax.mnist.settings import DEFAULTS
from torch_softmax.mnist.training import train_epoch


def train(data, epochs):
    settings = replace(DEFAULTS[data.name], epochs=epochs)
    checkpoint = Checkpoint.start(settings, data)
    model = checkpoint.build_model()
    batches = BatchLoader(data.train, settings.batch_size, torch.Generator().manual_seed(0))
    for epoch in range(settings.epochs):
        train_epoch(model, batches, settings, epoch)
    return replace(checkpoint, model=model.state_dict())


@pytest.fixture(scope="session")
def trained(digits):
    """A run on the digits, short but good."""
    return train(digits, epochs=20)


@pytest.fixture(scope="session")
def reader(trained):
    """A run on MNIST, or on the digits where MNIST is not on disk, and its data."""
    for folder in (ROOT / "data", ROOT.parent / "shared" / "mnist"):
        if (folder / "MNIST" / "raw").is_dir():
            data = load_dataset("mnist", folder)
            return train(data, epochs=1), data
    return trained, load_dataset("digits", "")
