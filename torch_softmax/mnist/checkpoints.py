"""Checkpoints: what a run needs to go on as if it had never stopped, written in one step."""

import io
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks
from .._checks import UserError
from .._files import write_atomically
from ..modules import SoftmaxRegression
from .data import TrainTest, load_dataset
from .download import DataError, find_folder
from .settings import DATASETS, DEFAULT_DATA_DIR, NUM_CLASSES, Settings
from .training import Score, Tally

CHECKPOINT_NAME = "model.pt"  # in a run directory


class CheckpointError(UserError):
    """A checkpoint that can't be used; the message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """A run at the end of an epoch, or where it was interrupted within the next one.

    The fields are checked against one another; a ValueError says what is wrong.
    """

    model: dict[str, Tensor]  # on the CPU: `weight` of shape (K, D) and `bias` of shape (K,)
    settings: Settings
    dataset: str
    epoch: int  # the number of epochs done
    history: list[dict[str, float]]  # `loss`, `accuracy` and `seconds` of each of these epochs
    generator_state: Tensor  # uint8, of the generator that shuffles, at the end of these epochs
    tally: Tally = field(default_factory=Tally)  # sums over the batches done since then
    data_dir: str | None = None  # an absolute path; None for the digits and in older checkpoints

    def __post_init__(self) -> None:
        checks.one_of("dataset", self.dataset, DATASETS[1:])
        classes = len(self.model["weight"])
        if classes != NUM_CLASSES:
            raise ValueError(
                f"model must have {NUM_CLASSES} classes, as {self.dataset} has, got {classes}"
            )
        if not isinstance(self.data_dir, str | None):
            raise ValueError(f"data_dir must be a path or None, got {self.data_dir!r}")
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
        state = generator.get_state()
        return cls(_weights(model), settings, data.name, 0, [], state, data_dir=data.data_dir)

    def after_batches(self, model: SoftmaxRegression, tally: Tally) -> "Checkpoint":
        """Return the state within an epoch, as its batches so far left the model."""
        return replace(self, model=_weights(model), tally=tally.on_cpu())

    def after_epoch(
        self,
        model: SoftmaxRegression,
        score: Score,
        seconds: float,
        generator: torch.Generator | None = None,
    ) -> "Checkpoint":
        """Return the state at the end of an epoch, which the generator shuffled, if any."""
        return replace(
            self,
            model=_weights(model),
            epoch=self.epoch + 1,
            history=[*self.history, {**score._asdict(), "seconds": seconds}],
            generator_state=generator.get_state() if generator else self.generator_state,
            tally=Tally(),
        )

    def with_settings(self, **given: Any) -> "Checkpoint":
        """Return the same run, or raise a ValueError if a given setting is not the run's.

        Another number of epochs may be given if the schedule doesn't depend on it.
        """
        free = ("epochs",) if self.settings.schedule == "constant" else ()
        for name, value in given.items():
            so_far = getattr(self.settings, name)
            if value != so_far and name not in free:
                raise ValueError(f"{name} must be {so_far!r} as in the run so far, got {value!r}")
        return replace(self, settings=replace(self.settings, **given))

    def load_data(self, data_dir: Path | None = None, dataset: str | None = None) -> TrainTest:
        """Load a data set, or raise a UserError if that fails or its images have another size.

        Args:
            data_dir: Where it is, or None for where the run had its data or, if they are no longer
                there, for the default.
            dataset: Its name, or None for the run's data set.
        """
        gone = ""
        if data_dir is None and self.data_dir is not None:
            if find_folder(self.dataset, Path(self.data_dir)) is not None:
                data_dir = Path(self.data_dir)
            else:
                gone = f"; the run had its data in {self.data_dir}, where they are no longer"
        try:
            data = load_dataset(dataset or self.dataset, data_dir or DEFAULT_DATA_DIR)
        except DataError as error:
            raise type(error)(f"{error}{gone}") from error
        self.check_pixels(data.train.images.shape[1], data.name)
        return data

    def check_pixels(self, pixels: int, dataset: str) -> None:
        """Raise a CheckpointError unless the model is for images of a number of pixels."""
        features = self.model["weight"].shape[1]
        if features != pixels:
            raise CheckpointError(
                f"the checkpoint is of a model for {features} pixels, but {dataset} has {pixels}"
            )

    def build_model(self, device: torch.device | str = "cpu") -> SoftmaxRegression:
        """Return the classifier with these weights, on a device and in evaluation mode."""
        features = self.model["weight"].shape[1]
        model = SoftmaxRegression(features, NUM_CLASSES, device=device)
        model.load_state_dict(self.model)
        return model.eval()


def _weights(model: SoftmaxRegression) -> dict[str, Tensor]:
    """Return a copy on the CPU, which later updates don't change."""
    return {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in one step, so that `torch.load(path, weights_only=True)` reads it.

    It becomes a dict with the fields as keys, and settings and tally become dicts too. An OSError
    leaves what was there before.
    """
    buffer = io.BytesIO()  # so that a full disk shows as an OSError, not from within torch.save
    torch.save(asdict(checkpoint), buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint from a file or run directory, without running any code that it holds.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, or another program wrote it.
    """
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what ends as an error here anyway
            return _from_dict(_unpack(path.read_bytes()))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} can't be used: {error}") from error
    except Exception as error:  # of many kinds, depending on the damage
        raise CheckpointError(
            f"{path} is damaged or no checkpoint of this program; no code in it was run"
        ) from error


def run_directory(path: Path) -> Path:
    """Return the run directory that a path names, itself or by the checkpoint in it."""
    return path.parent if path.name == CHECKPOINT_NAME else path


def _unpack(packed: bytes) -> dict[str, Any]:
    """Return what torch.save wrote, after checking the checksums that torch.load ignores."""
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        if (name := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{name} does not have its checksum")
    content: dict[str, Any] = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    return content


def _from_dict(content: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint whose `asdict` this is."""
    settings, tally = Settings(**content["settings"]), Tally(**content["tally"])
    checkpoint = Checkpoint(**{**content, "settings": settings, "tally": tally})
    checkpoint.build_model()
    torch.Generator().set_state(checkpoint.generator_state)
    return checkpoint
