"""Checkpoints: what a run needs to go on as if it had never stopped, written in one step."""

import io
import os
import warnings
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from .data import DATASETS, NUM_CLASSES, TrainTest
from .modules import SoftmaxRegression
from .training import Settings, Tally

CHECKPOINT_NAME = "model.pt"  # in a run directory


class CheckpointError(RuntimeError):
    """A checkpoint that can't be used; the message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """A run at the end of an epoch, or where it was interrupted within the next one.

    Args:
        model: the state_dict on the CPU: `weight` of shape (K, D) and `bias` of shape (K,).
        settings: those of the run.
        dataset: the name of the data set.
        epoch: the number of epochs done.
        history: `loss`, `accuracy` and `seconds` of each of these epochs.
        generator_state: uint8, of the generator that shuffles, at the end of these epochs.
        tally: of the batches done since then.

    Raises:
        ValueError: if they don't fit together.

    Example:
        >>> from torch_softmax.data import load_dataset
        >>> checkpoint = Checkpoint.start(Settings(epochs=5), load_dataset("digits", "data"))
        >>> checkpoint.epoch, checkpoint.build_model()
        (0, SoftmaxRegression(in_features=64, out_features=10, bias=True))
    """

    model: dict[str, Tensor]
    settings: Settings
    dataset: str
    epoch: int
    history: list[dict[str, float]]
    generator_state: Tensor
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        checks.one_of("dataset", self.dataset, DATASETS[1:])
        classes = len(self.model["weight"])
        if classes != NUM_CLASSES:
            raise ValueError(
                f"model must have {NUM_CLASSES} classes, as {self.dataset} has, got {classes}"
            )
        if len(self.history) != self.epoch:
            raise ValueError(f"history must be of {self.epoch} epochs, got {len(self.history)}")
        begun = self.epoch + (self.tally.batches > 0)
        if begun > self.settings.epochs:
            raise ValueError(
                f"epochs must be at least {begun}, which are begun, got {self.settings.epochs}"
            )

    @classmethod
    def start(cls, settings: Settings, data: TrainTest) -> "Checkpoint":
        """Return the state before the first epoch on a data set."""
        torch.manual_seed(settings.seed)
        model = SoftmaxRegression(data.train.images.shape[1], NUM_CLASSES)
        if settings.optimizer == "newton":
            model.load_state_dict({k: v.new_zeros(v.shape) for k, v in model.state_dict().items()})
        generator = torch.Generator().manual_seed(settings.seed)
        return cls(_weights(model), settings, data.name, 0, [], generator.get_state())

    def after(
        self, model: SoftmaxRegression, tally: Tally, generator: torch.Generator | None
    ) -> "Checkpoint":
        """Return the state after more batches.

        Args:
            model: as they left it.
            tally: of all batches of the epoch so far.
            generator: the one that shuffles, if these were the last of the epoch; None otherwise.
        """
        weights = _weights(model)
        if generator is None:
            return replace(self, model=weights, tally=tally.on_cpu())
        epoch = {**tally.score()._asdict(), "seconds": tally.seconds}
        return replace(
            self,
            model=weights,
            epoch=self.epoch + 1,
            history=[*self.history, epoch],
            generator_state=generator.get_state(),
            tally=Tally(),
        )

    def with_settings(self, **given: Any) -> "Checkpoint":
        """Return the same run with given settings, which must be those that it has.

        More epochs may be given where no schedule is stretched by them.

        Raises:
            ValueError: if a setting is another one.
        """
        free = ("epochs",) if self.settings.schedule == "constant" else ()
        for name, value in given.items():
            so_far = getattr(self.settings, name)
            if value != so_far and name not in free:
                raise ValueError(f"{name} must be {so_far!r} as in the run so far, got {value!r}")
        return replace(self, settings=replace(self.settings, **given))

    def check_fits(self, data: TrainTest) -> None:
        """Raise a CheckpointError unless the model is for images as large as a data set's."""
        features = self.model["weight"].shape[1]
        pixels = data.train.images.shape[1]
        if features != pixels:
            raise CheckpointError(
                f"the checkpoint is of a model for {features} pixels, but {data.name} has {pixels}"
            )

    def build_model(self, device: torch.device | str = "cpu") -> SoftmaxRegression:
        """Return the classifier with these weights, on a device and in evaluation mode."""
        features = self.model["weight"].shape[1]
        model = SoftmaxRegression(features, NUM_CLASSES, device=device)
        model.load_state_dict(self.model)
        return model.eval()


def _weights(model: SoftmaxRegression) -> dict[str, Tensor]:
    """A copy on the CPU, which later updates leave as it is."""
    return {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in one step, so that `torch.load(path, weights_only=True)` reads it.

    Args:
        path: the file, replaced once the new content is on the disk.
        checkpoint: becomes a dict with its fields as keys; settings and tally become dicts too.

    Raises:
        OSError: if the file can't be written; what was there before stays.
    """
    buffer = io.BytesIO()  # so that a full disk shows as an OSError, not from within torch.save
    torch.save(asdict(checkpoint), buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check that it is whole, without running any code that it holds.

    Args:
        path: the file, or the run directory in which it is `model.pt`.

    Returns:
        The checkpoint, with its tensors on the CPU.

    Raises:
        CheckpointError: if there is none, or none that this program wrote.
    """
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what ends as an error here anyway
            return _from_dict(_unpack(path.read_bytes()))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} can't be used: {error}") from error
    except Exception as error:  # of many kinds, as the damage will have it
        raise CheckpointError(
            f"{path} is damaged or no checkpoint of this program; no code in it was run"
        ) from error


def _unpack(packed: bytes) -> dict[str, Any]:
    """What torch.save wrote, once all of it has the checksums that torch.load does not look at."""
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        if (name := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{name} does not have its checksum")
    content: dict[str, Any] = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    return content


def _from_dict(content: dict[str, Any]) -> Checkpoint:
    """The reverse of `asdict`."""
    settings, tally = Settings(**content["settings"]), Tally(**content["tally"])
    checkpoint = Checkpoint(**{**content, "settings": settings, "tally": tally})
    checkpoint.build_model()
    torch.Generator().set_state(checkpoint.generator_state)
    return checkpoint


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: whoever reads it, even after a crash, finds the old or the new.

    Args:
        path: the file; `path` with `.tmp` behind it is used on the way.
        content: the new bytes.

    Raises:
        OSError: if the file can't be written; what was there before stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        raise OSError(f"{path} can't be written: {error.strerror}") from error
    finally:
        with suppress(OSError):  # it has become the file, or never was
            temporary.unlink()


def _sync_directory(directory: Path) -> None:
    """Make a new name in a directory last through a crash of the machine."""
    if not hasattr(os, "O_DIRECTORY"):  # on Windows, directories can't be opened
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
