"""A classifier of the digits, as a run would have saved it."""

from dataclasses import replace

import pytest
import torch

from torch_softmax.mnist.checkpoints import Checkpoint
from torch_softmax.mnist.data import batch_loader
from torch_softmax.mnist.settings import DEFAULTS
from torch_softmax.mnist.training import train_epoch


@pytest.fixture(scope="session")
def trained(digits):
    """A run on the digits, short but good."""
    settings = replace(DEFAULTS["digits"], epochs=20)
    checkpoint = Checkpoint.start(settings, digits)
    model = checkpoint.build_model()
    batches = batch_loader(digits.train, settings.batch_size, torch.Generator().manual_seed(0))
    for epoch in range(settings.epochs):
        train_epoch(model, batches, settings, epoch)
    return replace(checkpoint, model=model.state_dict())
